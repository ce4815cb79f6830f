"""A comparison: several networks, several seeds, one table."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
import numpy as np

from kd_jax import compression
from kd_jax.scoreboard import Scoreboard
from kd_jax.train.checks import PERIODS
from kd_jax.train.classifier import Classifier, Variables
from kd_jax.train.stages import Stages


class Study:
  """Trains the networks of a comparison, each in a stage that can resume.

  Attributes:
    board: the test scores.
    stages: the trainings, in order.
    costs: size and latency of each kind of network, by its title.
  """

  def __init__(
    self,
    path: pathlib.Path,
    test: Mapping[str, np.ndarray],
    total: int,
    config: Mapping[str, Any],
  ):
    """Opens the table.

    Args:
      path: the run's directory.
      test: arrays `image` and `label`.
      total: how many networks will be trained.
      config: has the periods `eval_every`, `save_every` and `log_every`, as
        `train.fit` takes them.
    """
    self.board = Scoreboard(test["label"])
    self.stages = Stages(path, total)
    self.costs: dict[str, dict[str, Any]] = {}
    self._test = test
    self._periods = {name: config[name] for name in PERIODS}

  def train(
    self,
    net: Classifier,
    frozen: Mapping[str, Any],
    *,
    name: str,
    title: str,
    kind: str,
    seed: int,
    settings: Mapping[str, Any],
    **batches: Any,
  ) -> tuple[Variables, np.ndarray]:
    """Trains one network with one seed.

    Args:
      net: the network and its step.
      frozen: see `Classifier.fit`.
      name: of the stage's folder below `seed<seed>`.
      title: for people.
      kind: the network's title in the table of costs.
      seed: see `Classifier.fit`.
      settings: has `steps` and `batch_size`.
      **batches: `views`, `partners`, `batches` of `Classifier.fit`.

    Returns:
      (its variables after the last step, its logits for the test set).
    """
    workdir, label = self.stages.enter(
      f"seed{seed}/{name}", f"{title}, seed {seed}"
    )
    variables = net.fit(
      frozen,
      self._test,
      seed,
      batch_size=settings["batch_size"],
      num_steps=settings["steps"],
      workdir=workdir,
      title=label,
      **self._periods,
      **batches,
    )
    return variables, self.test(net, variables, kind=kind)

  def test(
    self, net: Classifier, variables: Variables, *, kind: str
  ) -> np.ndarray:
    """A network's logits for the test set; the first of a kind is timed."""
    images = self._test["image"]
    if kind not in self.costs:
      self.costs[kind] = compression.cost(net.logits, variables, images[:100])
    return net.predict(variables, images)

  def result(
    self, claims: Sequence[tuple[str, str, str, str]], **fields: Any
  ) -> dict[str, Any]:
    """The result file's fields, see `Scoreboard.result`."""
    return self.board.result(claims, models=self.costs, **fields)


def use_devices(count: int) -> list[jax.Device]:
  """The first `count` devices; 0 is all.

  Raises:
    ValueError: if there are not as many.
  """
  found = jax.devices()
  if not 0 <= count <= len(found):
    raise ValueError(
      f"devices is {count}; it should be at most {len(found)}, what there is, "
      "or 0 for all"
    )
  return found[: count or None]
