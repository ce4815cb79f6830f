"""The optimisers of the papers, by name."""

from collections.abc import Sequence
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax.errors import check_choice, check_number

OPTIMIZERS = ("adam", "sgd", "nesterov")


def optimizer(
  steps: int, *, name: str, learning_rate: float, **settings: Any
) -> optax.GradientTransformation:
  """The optimiser that a config describes.

  Args:
    steps: of the whole training.
    name: "adam" or "sgd", see `decoupled`, or "nesterov", see `staircase`.
    learning_rate: the peak.
    **settings: what that function takes beside.

  Returns:
    The transformation.

  Raises:
    ValueError: if there is no such optimiser, it has no such setting, or one is
      out of range.
  """
  check_choice("optimizer", name, OPTIMIZERS)
  make: Any = staircase if name == "nesterov" else decoupled
  if make is decoupled:
    settings = {"name": name, **settings}
  known = set(inspect.signature(make).parameters) - {"steps"}
  unknown = sorted(set(settings) - known)
  if unknown:
    raise ValueError(
      f"optimizer {name} has no setting {', '.join(unknown)}; it should be one "
      f"of {', '.join(sorted(known))}"
    )
  return make(steps, learning_rate=learning_rate, **settings)


def decoupled(
  steps: int,
  *,
  name: str = "adam",
  learning_rate: float,
  weight_decay: float = 0.0,
  warmup: float = 0.0,
  momentum_dtype: str = "float32",
) -> optax.GradientTransformation:
  """Adam or SGD whose weight decay has no factor of the learning rate.

    update = -schedule(step) (learning_rate direction + weight_decay kernel)

  The schedule rises linearly from 0 to 1 and falls to 0 as a cosine. Only
  parameters that are called `kernel` decay.

  Args:
    steps: of the whole training.
    name: "adam", or "sgd" with momentum 0.9.
    learning_rate: the peak.
    weight_decay: the peak share of a kernel that one step takes away.
    warmup: steps, or if below 1 the share of the steps.
    momentum_dtype: of the first moment, "float32" or "bfloat16".

  Returns:
    The transformation.

  Raises:
    ValueError: if an argument is out of range.

  Reference: Beyer et al. 2022, arXiv:2106.05237, App. A (the settings);
  Loshchilov & Hutter 2019, arXiv:1711.05101 (decoupling).
  """
  check_choice("optimizer", name, OPTIMIZERS[:2])
  check_choice("momentum_dtype", momentum_dtype, ("float32", "bfloat16"))
  check_number("steps", steps, least=1)
  check_number("learning_rate", learning_rate, above=0)
  check_number("weight_decay", weight_decay, least=0)
  check_number("warmup", warmup, least=0)
  rising = round(warmup if warmup >= 1 else warmup * steps)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 1.0, min(rising, steps - 1), steps
  )
  direction = {
    "adam": lambda: optax.scale_by_adam(mu_dtype=momentum_dtype),
    "sgd": lambda: optax.trace(0.9, accumulator_dtype=momentum_dtype),
  }

  return optax.chain(
    direction[name](),
    optax.scale(learning_rate),
    optax.add_decayed_weights(weight_decay, _kernels),
    optax.scale_by_learning_rate(schedule),
  )


def staircase(
  steps: int,
  *,
  learning_rate: float,
  weight_decay: float = 0.0,
  momentum: float = 0.9,
  drops: Sequence[float] = (0.3, 0.6, 0.8),
  factor: float = 0.2,
) -> optax.GradientTransformation:
  """SGD with Nesterov's momentum, the learning rate falling in steps.

  The weight decay is a part of the gradient, as in the networks' papers, and
  acts on all parameters.

  Args:
    steps: of the whole training.
    learning_rate: the first.
    weight_decay: half the weight of the squared norm in the loss.
    momentum: 0.9 everywhere.
    drops: shares of the steps at which the rate is multiplied by `factor`.
    factor: 0.2 for wide residual networks, 0.1 for DenseNet and DML.

  Returns:
    The transformation.

  Raises:
    ValueError: if an argument is out of range.

  Reference: Zagoruyko & Komodakis 2016, arXiv:1605.07146, Sec. 3.
  """
  check_number("steps", steps, least=1)
  check_number("learning_rate", learning_rate, above=0)
  check_number("weight_decay", weight_decay, least=0)
  check_number("momentum", momentum, least=0, most=1)
  check_number("factor", factor, above=0)
  for share in drops:
    check_number("drops", share, above=0, most=1)
  schedule = optax.piecewise_constant_schedule(
    learning_rate, {round(share * steps): factor for share in drops}
  )
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(schedule, momentum, nesterov=True),
  )


def by_peer(
  inner: optax.GradientTransformation,
  *,
  active: str | None = None,
  clip_norm: float | None = None,
  stacked: bool = False,
) -> optax.GradientTransformation:
  """An optimiser for each peer of a cohort, as if it were trained alone.

  Args:
    inner: the optimiser of one.
    active: the only peer that moves; None is all. The state is the same, so
      steps for one peer each can take turns.
    clip_norm: the norm to which each peer's gradient is scaled down.
    stacked: the parameters have a leading axis for the peers, see
      `models.stacked`; otherwise they are dicts by the peers' names.

  Returns:
    A transformation of {role: parameters of the peers}.

  Raises:
    ValueError: if `active` is given for stacked peers, or is none of them.
  """
  if clip_norm is not None:
    inner = optax.chain(optax.clip_by_global_norm(clip_norm), inner)
  if stacked and active is not None:
    raise ValueError(f"active is {active!r}; stacked peers move together")

  def init(params: Any) -> Any:
    if stacked:
      return {role: jax.vmap(inner.init)(own) for role, own in params.items()}
    return {
      role: {name: inner.init(one) for name, one in own.items()}
      for role, own in params.items()
    }

  def update(grads: Any, state: Any, params: Any = None) -> Any:
    moved: dict[str, Any] = {role: {} for role in grads}
    kept: dict[str, Any] = {role: {} for role in grads}
    for role, own in grads.items():
      if stacked:
        moved[role], kept[role] = jax.vmap(inner.update)(
          own, state[role], params[role]
        )
        continue
      if active is not None and active not in own:
        raise ValueError(f"active is {active!r}; it should be one of {[*own]}")
      for name, grad in own.items():
        old = state[role][name]
        if active in (None, name):
          found = inner.update(grad, old, params[role][name])
        else:
          found = jax.tree.map(jnp.zeros_like, grad), old
        moved[role][name], kept[role][name] = found
    return moved, kept

  return optax.GradientTransformation(init, update)


def _kernels(params: Any) -> Any:
  """Which parameters are called `kernel`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(path[-1], "key", None) == "kernel", params
  )
