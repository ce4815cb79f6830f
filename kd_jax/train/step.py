"""From a method's `loss_fn` to the pure training step.

The step owns what cannot differ between methods: global sum over global count
across devices and accumulation steps, gradients, clipping, and the guard that
keeps a non-finite update out of the state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
import optax

from kd_jax import reduce
from kd_jax.train.state import TrainState

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Aux:
  """What a `loss_fn` returns beside its terms.

  Attributes:
    model_state: the new `TrainState.model_state`.
    metrics: [...] float per-example values (or a `reduce.Term` with a mask)
      by name; their global means are reported, and not differentiated.
  """

  model_state: Mapping[str, Any]
  metrics: Mapping[str, Any] = flax.struct.field(default_factory=dict)


LossFn = Callable[
  [Mapping[str, Any], Mapping[str, Any], Any, Batch, jax.Array],
  tuple[dict[str, reduce.Term], Aux],
]
Optimizer: TypeAlias = (
  optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
)


def make_step(
  loss_fn: LossFn,
  optimizer: Optimizer,
  *,
  microbatches: int = 1,
  clip_norm: float | None = None,
  max_skipped: int = 0,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Makes the pure training step of a method.

  Args:
    loss_fn: `loss_fn(params, model_state, frozen, batch, key) -> (terms,
      Aux)`, with `terms` a dict of `reduce.Term`. `batch` also holds `step`,
      the scalar step. The loss is the weighted sum of the terms' global means.
      Nothing here stops a gradient: `loss_fn` says what is a teacher.
    optimizer: an optax transformation, or a function that makes it of
      `frozen["hparams"]`, so that no learning rate is compiled in.
    microbatches: the batch is taken in this many parts, with the gradient of
      the whole (exactly: masks count over the whole batch).
    clip_norm: gradients are scaled down to this global norm.
    max_skipped: how many steps with a non-finite loss or gradient are skipped.
      At the next one the state stops changing (so `step` does, too), and
      `metrics["ok"]` is 0 from then on.

  Returns:
    `step(state, frozen, batch, *, axis_name=None) -> (state, metrics)`.
    `frozen` (teachers, hyper-parameters, data) is never differentiated,
    donated or saved. Metrics are float32 scalars: `loss`, each term's mean by
    its name, `Aux.metrics`, `grad_norm` before clipping, and `ok`.

  Raises:
    ValueError: if `microbatches` is not positive or `clip_norm` not above 0.
  """
  gradients, move = parts_of_step(loss_fn, optimizer, microbatches, clip_norm)
  return guarded(gradients, move, max_skipped)


def parts_of_step(
  loss_fn: LossFn,
  optimizer: Optimizer,
  microbatches: int,
  clip_norm: float | None,
) -> tuple[Callable[..., Any], Callable[..., TrainState]]:
  """The two halves of a step, see `make_step`.

  Returns:
    `gradients(state, frozen, batch, axis_name) -> (grads, metrics,
    model_state)` and `move(state, frozen, grads, norm, model_state) -> state`.
  """
  if microbatches < 1:
    raise ValueError(f"microbatches is {microbatches}; it should be positive")
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(f"clip_norm is {clip_norm}; it should be above 0")

  def forward(
    params: Any, model_state: Any, frozen: Any, batch: Batch, key: jax.Array
  ) -> tuple[Any, tuple[Any, Any, Any]]:
    terms, aux = loss_fn(params, model_state, frozen, batch, key)
    if not terms:
      raise ValueError("loss_fn returned no terms; it should return at least 1")
    reported = {
      name: value if isinstance(value, reduce.Term) else reduce.Term(value)
      for name, value in aux.metrics.items()
    }
    clash = set(reported) & (set(terms) | {"loss", "grad_norm", "ok"})
    if clash:
      raise ValueError(f"Aux.metrics repeats the names {sorted(clash)}")
    both = {
      name: reduce.sum_and_count(term.value, term.where, term.count)
      for name, term in {**terms, **reported}.items()
    }
    sums = {name: pair[0] for name, pair in both.items()}
    counts = {name: pair[1] for name, pair in both.items()}
    weighted = {name: terms[name].weight * sums[name] for name in terms}
    return weighted, (sums, counts, aux.model_state)

  def gradients(
    state: TrainState, frozen: Any, batch: Batch, axis_name: str | None
  ) -> tuple[Any, Metrics, Any]:
    psum = (
      (lambda tree: lax.psum(tree, axis_name))
      if axis_name is not None
      else (lambda tree: tree)
    )
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
      key = jax.random.fold_in(key, lax.axis_index(axis_name))

    def part(
      model_state: Any, micro: Batch, micro_key: jax.Array, counts: Any
    ) -> tuple[Any, Any, Any, Any]:
      """Sums of one microbatch and the gradient of its share of the loss."""
      micro = {**micro, "step": state.step}
      weighted, vjp, (sums, own, model_state) = jax.vjp(
        lambda p: forward(p, model_state, frozen, micro, micro_key),
        state.params,
        has_aux=True,
      )
      counts = psum(own) if counts is None else counts
      # The loss is sum_k weighted_k / count_k. The counts are global, so
      # adding up the parts' gradients gives the gradient of the whole.
      share = {k: reduce.divide(jnp.float32(1.0), counts[k]) for k in weighted}
      (grads,) = vjp({k: share[k].astype(weighted[k].dtype) for k in weighted})
      loss = sum(weighted[k] * share[k] for k in weighted)
      return grads, (loss, sums), counts, model_state

    if microbatches == 1:
      grads, totals, counts, model_state = part(
        state.model_state, batch, key, None
      )
    else:
      parts = jax.tree.map(lambda x: _split(x, microbatches), dict(batch))
      keys = jax.random.split(key, microbatches)

      def count(args: tuple[Batch, jax.Array]) -> Any:
        micro, micro_key = args
        micro = {**micro, "step": state.step}
        return forward(
          state.params, state.model_state, frozen, micro, micro_key
        )[1][1]

      # Only the masks matter here; the compiler drops the rest.
      counts = psum(
        jax.tree.map(lambda x: x.sum(0), lax.map(count, (parts, keys)))
      )

      def body(carry: Any, args: tuple[Batch, jax.Array]) -> tuple[Any, Any]:
        grads, totals, model_state = carry
        new_grads, new_totals, _, model_state = part(
          model_state, args[0], args[1], counts
        )
        add = lambda a, b: jax.tree.map(jnp.add, a, b)
        return (add(grads, new_grads), add(totals, new_totals), model_state), ()

      zeros = jax.tree.map(
        jnp.zeros_like,
        (state.params, (jnp.float32(0.0), counts)),
      )
      (grads, totals, model_state), _ = lax.scan(
        body, (*zeros, state.model_state), (parts, keys)
      )
    grads, (loss, sums) = psum((grads, totals))
    if axis_name is not None:  # batch statistics: the devices' mean
      model_state = jax.tree.map(
        lambda x: (
          lax.pmean(x, axis_name)
          if jnp.issubdtype(x.dtype, jnp.floating)
          else x
        ),
        model_state,
      )
    means = {name: reduce.divide(sums[name], counts[name]) for name in sums}
    metrics = {"loss": loss, **means, "grad_norm": optax.tree.norm(grads)}
    return grads, metrics, model_state

  def move(
    state: TrainState, frozen: Any, grads: Any, norm: Any, model_state: Any
  ) -> TrainState:
    if clip_norm is not None:
      scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
      grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
    made = optimizer(frozen["hparams"]) if callable(optimizer) else optimizer
    updates, opt_state = made.update(grads, state.opt_state, state.params)
    return state.replace(
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      model_state=model_state,
    )

  return gradients, move


def guarded(
  gradients: Callable[..., Any],
  move: Callable[..., TrainState],
  max_skipped: int,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """The step of two halves, see `make_step`: no move if a number is bad."""

  def step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    axis_name: str | None = None,
  ) -> tuple[TrainState, Metrics]:
    grads, metrics, model_state = gradients(state, frozen, batch, axis_name)
    norm = metrics["grad_norm"]
    # The squares in the norm overflow where Adam's second moment would.
    finite = (jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)).all()
    frozen_for_good = state.skipped > max_skipped

    def moved(state: TrainState) -> TrainState:
      return move(state, frozen, grads, norm, model_state)

    skipped = state.skipped + (~finite & ~frozen_for_good).astype(jnp.int32)
    alive = skipped <= max_skipped
    new = change_if(finite & ~frozen_for_good, moved, state).replace(
      step=state.step + alive.astype(jnp.int32), skipped=skipped
    )
    return new, {**metrics, "ok": alive.astype(jnp.float32)}

  def bad_leaves(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    axis_name: str | None = None,
  ) -> tuple[Any, Metrics]:
    """Whether each gradient leaf is finite, for the message of a stop."""
    grads, metrics, _ = gradients(state, frozen, batch, axis_name)
    return jax.tree.map(lambda g: jnp.isfinite(g).all(), grads), metrics

  step.bad_leaves = bad_leaves  # type: ignore[attr-defined]
  return step


def change_if(
  good: jax.Array, change: Callable[[TrainState], TrainState], state: TrainState
) -> TrainState:
  """`change(state)` if `good`, else the state.

  A condition, where a choice between two states would cost a second copy of
  all parameters and moments, and on a CPU half of a small step's time.
  """
  return lax.cond(good, change, lambda same: same, state)


def in_turn(
  steps: Sequence[Callable[..., tuple[TrainState, Metrics]]],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Several steps on one batch as one: each sees what those before have done.

  Args:
    steps: what `make_step` returned, for one state, without `max_skipped`.

  Returns:
    A step that counts as one. If one of them is not finite, none is made. Its
    metrics are sums over the steps, but for `grad_norm`, the largest.

  Raises:
    ValueError: if there is no step.
  """
  if not steps:
    raise ValueError("steps is empty; it should hold at least one")

  def step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    axis_name: str | None = None,
  ) -> tuple[TrainState, Metrics]:
    now, found = state, []
    for one in steps:
      now, metrics = one(
        now.replace(step=state.step), frozen, batch, axis_name=axis_name
      )
      found.append(metrics)
    how = {"ok": jnp.minimum, "grad_norm": jnp.maximum}
    together: Metrics = {}
    for metrics in found:
      for name, value in metrics.items():
        join = how.get(name, jnp.add)
        known = name in together
        together[name] = join(together[name], value) if known else value
    fine = together["ok"] > 0
    new = change_if(fine, lambda same: now, state)
    new = new.replace(skipped=now.skipped)
    return new, together

  def bad_leaves(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    axis_name: str | None = None,
  ) -> tuple[Any, Metrics]:
    """Of the first of the steps that is not finite."""
    now = state.replace(skipped=jnp.zeros_like(state.skipped))
    leaves: Any = None
    metrics: Metrics = {}
    for one in steps:
      fine, own = one.bad_leaves(now, frozen, batch, axis_name=axis_name)  # type: ignore[attr-defined]
      now, _ = one(now, frozen, batch, axis_name=axis_name)
      now = now.replace(step=state.step)
      both = lambda a, b: a & b
      leaves = fine if leaves is None else jax.tree.map(both, leaves, fine)
      metrics |= own
    return leaves, metrics

  step.bad_leaves = bad_leaves  # type: ignore[attr-defined]
  return step


def _split(x: jax.Array, parts: int) -> jax.Array:
  """[batch, ...] -> [parts, batch / parts, ...].

  Part i takes every parts-th row, so that a batch sharded over devices is cut
  within each device and no row moves.
  """
  if x.shape[0] % parts:
    raise ValueError(
      f"microbatches is {parts}; it should divide the batch, {x.shape[0]} "
      "examples on each device"
    )
  x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
  return jnp.swapaxes(x, 0, 1)
