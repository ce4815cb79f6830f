"""Several settings of one student as one program, taught by one teacher pass.

The settings share the batches and what is computed once of each, such as the
teacher's logits. Each has its own weights, optimiser state, random key and
hyper-parameters, with a leading axis [settings].
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from kd_jax.errors import check_choice, check_number
from kd_jax.train.state import TrainState
from kd_jax.train.step import (
  Batch,
  LossFn,
  Metrics,
  Optimizer,
  guarded,
  parts_of_step,
)

# What each setting has for itself, in the state and in `frozen`.
FIELDS = ("params", "opt_state", "model_state", "key", "extra")
OWN = ("hparams", "extra")


def grid(**values: Sequence[Any]) -> dict[str, np.ndarray]:
  """Every combination of some hyper-parameters' values.

  Args:
    **values: for each hyper-parameter the numbers it takes.

  Returns:
    By name [settings], as many as there are combinations; the last name
    changes fastest.

  Raises:
    ValueError: if there is no hyper-parameter, or one has no value.

  Example:
    >>> from kd_jax import train
    >>> train.grid(temperature=(1.0, 4.0), seed=(0, 1))
    {'temperature': array([1., 1., 4., 4.], dtype=float32),
     'seed': array([0, 1, 0, 1], dtype=int32)}
  """
  combinations = list(itertools.product(*values.values()))
  if not values or not combinations:
    raise ValueError(f"values is {values}; each should have at least one value")
  columns = map(np.asarray, zip(*combinations, strict=True))
  return {
    name: x.astype(np.float32 if x.dtype.kind == "f" else np.int32)
    for name, x in zip(values, columns, strict=True)
  }


def sweep_state(
  start: Callable[[Mapping[str, jax.Array]], TrainState],
  hparams: Mapping[str, Any],
) -> TrainState:
  """The state of all settings at step 0.

  Args:
    start: `start(hparams) -> TrainState` of one setting, as from
      `train.init_state`; it is traced, with scalars in `hparams`.
    hparams: a tree of arrays [settings, ...], see `grid`.

  Returns:
    A state whose `params`, `opt_state`, `model_state`, `key` and `extra` have a
    leading axis [settings]; `step` and `skipped` are common to all.

  Raises:
    ValueError: if the leading axes of `hparams` differ.
  """
  count_settings(hparams)
  state = jax.jit(lambda own: lax.map(start, own))(dict(hparams))
  return state.replace(step=state.step[0], skipped=state.skipped[0])


def setting(state: TrainState, index: int) -> TrainState:
  """The state of one setting: to evaluate, to save, or to train on alone.

  Args:
    state: of a sweep, unreplicated.
    index: of the setting.

  Returns:
    The state as `make_step` wants it.

  Raises:
    ValueError: if there is no such setting, or the state is of one run.
  """
  check_number("index", index, least=0, most=_settings_of(state) - 1)
  own = {name: getattr(state, name) for name in FIELDS}
  return state.replace(**jax.tree.map(lambda x: x[index], own))


def sweep(
  loss_fn: LossFn,
  optimizer: Optimizer,
  *,
  shared: Callable[[Any, Batch], Batch] | None = None,
  how: str = "vmap",
  microbatches: int = 1,
  clip_norm: float | None = None,
  max_skipped: int = 0,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Makes the step of several settings, which is `make_step` for each of them.

  The settings may differ in whatever `loss_fn` and `optimizer` read from
  `frozen["hparams"]`, in their weights and in their random keys. They see the
  same batches. If a number of one is not finite, none moves: all are at the
  same step, and `train.fit` stops and names the setting.

  Args:
    loss_fn: see `make_step`; of one setting, with scalars in
      `frozen["hparams"]`.
    optimizer: an optax transformation, or a function that makes it of
      `frozen["hparams"]`: `lambda h: optax.adam(h["learning_rate"])`.
    shared: `shared(frozen, batch) -> batch`, called once for all settings: it
      adds to the batch what does not depend on them, with a leading axis
      [batch]. The place for a teacher and for random views: what `loss_fn`
      computes is computed anew for each setting.
    how: "vmap" makes batched operations of those of one setting; the numbers
      are those of runs of one setting up to rounding. "map" takes the settings
      one after the other within the program; it needs the working memory of
      one, and on a CPU the weights have the bits of a run of that setting
      alone (reported metrics may differ in the last one). It copies each
      setting's weights in and out, which large students feel. On a CPU both
      are slow for convolutions.
    microbatches: see `make_step`.
    clip_norm: see `make_step`; the norm is that of each setting.
    max_skipped: see `make_step`; a skipped step is skipped by all.

  Returns:
    `step(state, frozen, batch, *, axis_name=None) -> (state, metrics)`, with
    the state of `sweep_state`. `frozen["hparams"]` is a tree of arrays
    [settings, ...]; the rest of `frozen` is common to all. Metrics are float32
    [settings], but for the scalar `ok`.

  Raises:
    ValueError: if an argument is out of range; by the step, if the leading
      axes of `hparams` differ, or are not that of the state.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from kd_jax import losses, train
    >>> from kd_jax.reduce import Term
    >>> def loss_fn(params, model_state, frozen, batch, key):
    ...   soft = losses.kl(batch["x"] @ params["w"], batch["teacher_logits"],
    ...                    temperature=frozen["hparams"]["temperature"])
    ...   return {"soft": Term(soft)}, train.Aux(model_state)
    >>> adam = lambda h: optax.adam(h["learning_rate"])
    >>> def start(h):
    ...   key = jax.random.key(h["seed"])
    ...   params = {"w": jax.random.normal(key, (3, 4))}
    ...   return train.init_state(params, adam(h), key)
    >>> hparams = train.grid(
    ...     temperature=(1.0, 4.0), learning_rate=(1e-3, 1e-2), seed=(0, 1))
    >>> step = train.sweep(
    ...     loss_fn, adam,
    ...     shared=lambda frozen, batch: {
    ...         **batch, "teacher_logits": batch["x"] @ frozen["teacher"]})
    >>> state, metrics = jax.jit(step)(
    ...     train.sweep_state(start, hparams),
    ...     {"hparams": hparams, "teacher": jnp.eye(3, 4)},
    ...     {"x": jnp.ones((5, 3))})
    >>> metrics["soft"].shape, int(state.step)
    ((8,), 1)
    >>> train.setting(state, 7).params["w"].shape
    (3, 4)
  """
  check_choice("how", how, ("vmap", "map"))
  gradients, move = parts_of_step(loss_fn, optimizer, microbatches, clip_norm)

  def each(
    function: Callable[..., Any], state: TrainState, frozen: Any, *more: Any
  ) -> Any:
    """`function(state, frozen, *more)` of every setting."""

    def one(args: Any) -> Any:
      fields, own, *rest = args
      return function(state.replace(**fields), {**frozen, **own}, *rest)

    fields = {name: getattr(state, name) for name in FIELDS}
    own = {name: frozen[name] for name in OWN if name in frozen}
    every = jax.vmap(one) if how == "vmap" else lambda x: lax.map(one, x)
    return every((fields, own, *more))

  def all_gradients(
    state: TrainState, frozen: Any, batch: Batch, axis_name: str | None
  ) -> Any:
    count, there = count_settings(frozen["hparams"]), _settings_of(state)
    if count != there:
      raise ValueError(
        f"hparams has {count} settings; it should have those of the state, "
        f"{there}"
      )
    if shared is not None:
      batch = shared(frozen, batch)

    def one(state: TrainState, frozen: Any, *own: Batch) -> Any:
      return gradients(state, frozen, own[0] if own else batch, axis_name)

    if how == "map":
      return each(one, state, frozen)
    # A copy of the batch for each. With a common one, the product with the
    # first layer's weights brings these in another layout and back.
    copies = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)))
    return each(one, state, frozen, jax.tree.map(copies, dict(batch)))

  def all_move(state: TrainState, frozen: Any, *more: Any) -> TrainState:
    def one(*args: Any) -> Any:
      new = move(*args)
      return {name: getattr(new, name) for name in FIELDS}

    return state.replace(**each(one, state, frozen, *more))

  return guarded(all_gradients, all_move, max_skipped)


def count_settings(hparams: Any) -> int:
  """How many settings there are: the leading axis of every array.

  Args:
    hparams: a tree of arrays [settings, ...].

  Returns:
    The number.

  Raises:
    ValueError: if there is no array, or the axes differ.
  """
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(x)
    for path, x in jax.tree_util.tree_leaves_with_path(hparams)
  }
  counts = {shape[:1] for shape in shapes.values()}
  if len(counts) != 1 or counts & {(), (0,)}:
    shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(
      f"hparams has the shapes {shown or 'of nothing'}; all should have one "
      "leading axis, [settings, ...]"
    )
  return counts.pop()[0]


def _settings_of(state: TrainState) -> int:
  if not state.key.ndim:
    raise ValueError("state is that of one run; it should be of sweep_state")
  return len(state.key)
