"""One classifier in training: its step, its predictions, its test scores."""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np
import optax

from kd_jax import evaluate, fidelity, teachers
from kd_jax.models import Model
from kd_jax.train.batches import gather_batch, index_batches
from kd_jax.train.extras import Extra, with_extra
from kd_jax.train.loop import fit
from kd_jax.train.parallel import compile
from kd_jax.train.state import TrainState, init_state
from kd_jax.train.step import (
  LossFn,
  in_turn,
  make_step,
)

Variables = dict[str, Any]


def view_key(seed: int) -> jax.Array:
  """The key of the random views of a run with this seed."""
  return jax.random.fold_in(jax.random.key(seed), 2)


class Classifier:
  """A model in the role `model`, trained on data that lives on the device.

  One object serves any number of runs (seeds, temperatures, teachers), which
  then share one compiled program.

  Attributes:
    model: the model.
    runner: the compiled step.
  """

  def __init__(
    self,
    model: Model,
    loss_fn: LossFn | list[LossFn],
    optimizer: optax.GradientTransformation
    | list[optax.GradientTransformation],
    *,
    preprocess: Callable[[Any], Any],
    how: str = "jit",
    devices: Sequence[jax.Device] | None = None,
    steps_per_call: int = 1,
    clip_norm: float | None = None,
    heads: int = 0,
    extra: Extra | None = None,
    peers: int = 1,
    teacher: Model | None = None,
    sharded: Sequence[str] = (),
  ):
    """Makes the step.

    Args:
      model: the model to train.
      loss_fn: see `make_step`; `params` and `model_state` have the one role
        `model`, `frozen` has `view_key`, a random key of the run. A list
        makes steps in turn on each batch, see `in_turn`.
      optimizer: an optax transformation; for a list of loss functions a list,
        with states of one structure.
      preprocess: images as stored -> inputs of the model.
      how: "jit" or "pmap".
      devices: see `compile`.
      steps_per_call: see `compile`.
      clip_norm: see `make_step`.
      heads: how many `Outputs.heads` the model has, to be tested beside
        `Outputs.logits`.
      extra: what the state carries beside, see `train.extras`.
      peers: see `compile`.
      teacher: what `loss_fn` asks with `frozen["teacher"]`; it is looked at
        before the first step, see `teachers.check`.
      sharded: see `compile`.
    """
    self.model = model
    self.preprocess = preprocess
    self.heads = heads
    self.extra = extra
    self.teacher = teacher
    losses = loss_fn if isinstance(loss_fn, list) else [loss_fn]
    moved = optimizer if isinstance(optimizer, list) else [optimizer]
    self.optimizer = moved[0]
    steps = [
      make_step(one, move, clip_norm=clip_norm)
      for one, move in zip(losses, moved, strict=True)
    ]
    step = steps[0] if len(steps) == 1 else in_turn(steps)
    if extra is not None:
      step = with_extra(step, extra.update)
    step = gather_batch(step)
    self.runner = compile(
      step,
      how=how,
      devices=devices,
      steps_per_call=steps_per_call,
      peers=peers,
      sharded=sharded,
    )

  def logits(self, variables: Variables, images: Any) -> jax.Array:
    """[batch, classes] float32 logits of stored images, in evaluation mode."""
    inputs = self.preprocess(images)
    return self.model.apply(variables, inputs)[0].logits

  def predict(
    self, variables: Variables, images: np.ndarray, *, batch_size: int = 1000
  ) -> np.ndarray:
    """Logits of all images, see `evaluate.predict`."""
    fn = Partial(self.logits, variables)
    return evaluate.predict(fn, images, batch_size=batch_size)

  def predict_heads(
    self, variables: Variables, images: np.ndarray, *, batch_size: int = 1000
  ) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all images, of the whole and of each head.

    Args:
      variables: of the model, whose outputs have heads.
      images: [n, ...] as stored.
      batch_size: images at a time.

    Returns:
      ([n, classes], [heads, n, classes]) float32.
    """
    fn = Partial(self._all_logits, variables)
    flat = evaluate.predict(fn, images, batch_size=batch_size)
    each = np.moveaxis(flat.reshape(len(flat), 1 + self.heads, -1), 1, 0)
    return each[0], each[1:]

  def _all_logits(self, variables: Variables, images: Any) -> jax.Array:
    """[batch, (1 + heads) classes], for `evaluate.predict`."""
    out = self.model.apply(variables, self.preprocess(images))[0]
    assert out.heads is not None, "the model has no heads"
    each = jnp.concatenate([out.logits[None], out.heads])
    return jnp.moveaxis(each, 0, 1).reshape(each.shape[1], -1)

  def fit(
    self,
    frozen: Mapping[str, Any],
    test: Mapping[str, np.ndarray],
    seed: int,
    *,
    batch_size: int,
    num_steps: int,
    workdir: str | os.PathLike[str] | None = None,
    views: int | None = None,
    partners: bool = False,
    batches: Callable[[int], Mapping[str, np.ndarray]] | None = None,
    **loop: Any,
  ) -> Variables:
    """Trains from scratch, or from where `workdir` was left.

    Args:
      frozen: what the step only reads, with `data`, the training arrays.
        Without `data` the examples come with the batches.
      test: arrays `image` and `label`, for the learning curve only.
      seed: of the initial weights, the order of the examples, the views and
        the dropout.
      batch_size: examples a step, over all devices.
      num_steps: how many updates.
      workdir: the stage's directory.
      views: see `index_batches`.
      partners: see `index_batches`.
      batches: `batches(step)`, if the examples are read on the host.
      **loop: further arguments of `train.fit`.

    Returns:
      {"params", "state"} after the last step, and `extra` if there is one.

    Raises:
      BadInput: if the teacher cannot be trusted.
    """
    if self.teacher is not None and "teacher" in frozen:
      teachers.check(
        self.teacher, frozen["teacher"], self.preprocess(test["image"][:4])
      )
    key = jax.random.key(seed)
    start = self.model.init(key, self.preprocess(test["image"][:1]))
    state = init_state(
      {"model": start["params"]},
      self.optimizer,
      jax.random.fold_in(key, 1),
      model_state={"model": start["state"]},
      extra=self.extra
      and self.extra.start(
        {"model": start["params"]}, {"model": start["state"]}
      ),
    )

    def variables(state: TrainState) -> Variables:
      return {
        "params": state.params["model"],
        "state": state.model_state["model"],
      }

    def scores(state: TrainState) -> dict[str, float]:
      said = variables(state)
      more: dict[str, float] = {}
      if self.heads:
        logits, heads = self.predict_heads(said, test["image"])
        each = [evaluate.classification(h, test["label"]) for h in heads]
        more["mean test errors"] = float(np.mean([e["errors"] for e in each]))
        if len(heads) > 1:
          more["peer agreement"] = fidelity.peer_agreement(heads)
      else:
        logits = self.predict(said, test["image"])
      found = evaluate.classification(logits, test["label"])
      whole = "ensemble " if self.heads > 1 else ""
      errors, nll = f"{whole}test errors", f"{whole}test NLL"
      return {**more, errors: found["errors"], nll: found["nll"]}

    if batches is None:
      n = len(frozen["data"]["id"])
      batches = index_batches(
        seed, batch_size, n, views=views, partners=partners
      )
      loop.setdefault("steps_per_epoch", n // batch_size)
    state = fit(
      self.runner,
      state,
      {**frozen, "view_key": view_key(seed)},
      batches,
      num_steps=num_steps,
      workdir=workdir,
      evaluate=scores,
      **loop,
    )
    found = variables(state)
    return {**found, "extra": state.extra} if self.extra else found
