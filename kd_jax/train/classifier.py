"""One classifier in training: its step, its predictions, its test scores."""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any

import jax
from jax.tree_util import Partial
import numpy as np
import optax

from kd_jax import evaluate
from kd_jax.models import Model
from kd_jax.train.loop import fit
from kd_jax.train.parallel import compile
from kd_jax.train.state import TrainState, init_state
from kd_jax.train.step import LossFn, gather_batch, index_batches, make_step

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
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    preprocess: Callable[[Any], Any],
    how: str = "jit",
    devices: Sequence[jax.Device] | None = None,
    steps_per_call: int = 1,
    clip_norm: float | None = None,
  ):
    """Makes the step.

    Args:
      model: the model to train.
      loss_fn: see `make_step`; `params` and `model_state` have the one role
        `model`, `frozen` has `view_key`, a random key of the run.
      optimizer: an optax transformation.
      preprocess: images as stored -> inputs of the model.
      how: "jit" or "pmap".
      devices: see `compile`.
      steps_per_call: see `compile`.
      clip_norm: see `make_step`.
    """
    self.model = model
    self.preprocess = preprocess
    self.optimizer = optimizer
    step = gather_batch(make_step(loss_fn, optimizer, clip_norm=clip_norm))
    self.runner = compile(
      step, how=how, devices=devices, steps_per_call=steps_per_call
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
      {"params", "state"} after the last step.
    """
    key = jax.random.key(seed)
    start = self.model.init(key, self.preprocess(test["image"][:1]))
    state = init_state(
      {"model": start["params"]},
      self.optimizer,
      jax.random.fold_in(key, 1),
      model_state={"model": start["state"]},
    )

    def variables(state: TrainState) -> Variables:
      return {
        "params": state.params["model"],
        "state": state.model_state["model"],
      }

    def scores(state: TrainState) -> dict[str, float]:
      logits = self.predict(variables(state), test["image"])
      found = evaluate.classification(logits, test["label"])
      return {"test errors": found["errors"], "test NLL": found["nll"]}

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
    return variables(state)
