"""What a state carries beside its parameters: averages and stale copies.

Each is a pair of functions: `start(params, model_state) -> extra`, for
`init_state`, and `update(extra, state) -> extra`, for `with_extra`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.errors import check_number
from kd_jax.train.state import TrainState
from kd_jax.train.step import Batch, Metrics, change_if


class Extra(NamedTuple):
  """See the module.

  Attributes:
    start: the extra at step 0.
    update: the extra after a step.
  """

  start: Callable[[Any, Any], dict[str, Any]]
  update: Callable[[Mapping[str, Any], TrainState], dict[str, Any]]


def _copies(params: Any, model_state: Any) -> dict[str, Any]:
  return {"params": params, "state": model_state}


def ema(decay: float) -> Extra:
  """The running mean of the weights, the "mean teacher".

    w'_t = a_t w'_{t-1} + (1 - a_t) w_t,   a_t = min(1 - 1/(t + 1), decay)

  At first it is the plain mean of all weights so far, the initial ones among
  them, as in the authors' code; these do not linger. Counts, and the state of
  the model (batch statistics), are those of the last step.

  Args:
    decay: within [0, 1).

  Returns:
    An `Extra` with `params` and `state`, both by role.

  Raises:
    ValueError: if decay is out of range.

  Reference: Tarvainen & Valpola 2017, arXiv:1703.01780, Sec. 2.
  """
  check_number("decay", decay, least=0.0)
  if not decay < 1.0:
    raise ValueError(f"decay is {decay}; it should be below 1")

  def update(extra: Mapping[str, Any], state: TrainState) -> dict[str, Any]:
    t = state.step.astype(jnp.float32)  # 1 after the first step
    a = jnp.minimum(1.0 - 1.0 / (t + 1.0), decay)

    def mean(old: jax.Array, new: jax.Array) -> jax.Array:
      if not jnp.issubdtype(new.dtype, jnp.floating):
        return new
      return (a * old + (1.0 - a) * new).astype(new.dtype)

    averaged = jax.tree.map(mean, extra["params"], state.params)
    return _copies(averaged, state.model_state)

  return Extra(_copies, update)


def stale(every: int) -> Extra:
  """A copy of all weights that is renewed every so many steps.

  What the workers of codistillation know of each other.

  Args:
    every: steps between the exchanges, at least 1.

  Returns:
    An `Extra` with `params` and `state`, both by role, as they were after the
    last step whose number divides by `every`.

  Raises:
    ValueError: if every is not positive.

  Reference: Anil et al. 2018, arXiv:1804.03235.
  """
  check_number("every", every, least=1)

  def update(extra: Mapping[str, Any], state: TrainState) -> dict[str, Any]:
    due = state.step % every == 0
    return jax.tree.map(
      lambda old, new: jnp.where(due, new, old),
      dict(extra),
      _copies(state.params, state.model_state),
    )

  return Extra(_copies, update)


def with_extra(
  step: Callable[..., tuple[TrainState, Metrics]],
  update: Callable[[Any, TrainState], Any],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Lets a step keep something beside the parameters, see the module.

  Args:
    step: what `make_step` or `in_turn` returned.
    update: `update(extra, state) -> extra`, from the extra before the step and
      the state after it. It is not called for a step that was not made.

  Returns:
    The same step, whose `loss_fn` finds the extra in `frozen["extra"]`.
  """

  def run(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    axis_name: str | None = None,
  ) -> tuple[TrainState, Metrics]:
    frozen = {**frozen, "extra": state.extra}
    new, metrics = step(state, frozen, batch, axis_name=axis_name)
    more = lambda now: now.replace(extra=update(state.extra, now))
    return change_if(new.step > state.step, more, new), metrics

  def bad_leaves(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    axis_name: str | None = None,
  ) -> tuple[Any, Metrics]:
    frozen = {**frozen, "extra": state.extra}
    return step.bad_leaves(state, frozen, batch, axis_name=axis_name)  # type: ignore[attr-defined]

  run.bad_leaves = bad_leaves  # type: ignore[attr-defined]
  return run
