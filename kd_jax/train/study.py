"""A comparison: several networks, several seeds, one table."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
import numpy as np

from kd_jax import compression
from kd_jax.errors import check_number, check_numbers
from kd_jax.scoreboard import Scoreboard
from kd_jax.train.classifier import Classifier, Variables
from kd_jax.train.parallel import check_divides
from kd_jax.train.stages import Stages

_ONCE = {"least": 1}
_POSITIVE = {"above": 0}


def check_comparison(
  rows: Sequence[str],
  claims: Sequence[Sequence[str]],
  seeds: Sequence[int],
  *,
  derived: Sequence[str] = (),
) -> None:
  """Refuses a comparison that could not be reported.

  Args:
    rows: names of the settings that will be trained.
    claims: (claim, row a, row b, direction), see `Scoreboard.compare`.
    seeds: of the students.
    derived: further rows that the experiment computes.

  Raises:
    ValueError: if a claim speaks of a row that is not there, or the seeds are
      empty or not distinct.
  """
  claimed = {row for claim in claims for row in claim[1:3]}
  missing = claimed - {*rows, *derived}
  if missing:
    raise ValueError(
      f"claims speak of {sorted(missing)}, which rows leaves out; set claims"
    )
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(f"seeds is {seeds}; it should name distinct seeds")


def check_training(
  name: str, settings: Mapping[str, Any], devices: int
) -> None:
  """Checks `steps`, `learning_rate` and `batch_size` of a config group.

  Args:
    name: the group's name, for the message.
    settings: the group.
    devices: how many devices share a batch.

  Raises:
    ValueError: if a number is out of range, or the batch does not divide.
  """
  check_numbers(name, settings, steps=_ONCE, learning_rate=_POSITIVE)
  check_number(f"{name}.batch_size", settings["batch_size"], least=1)
  check_divides(settings["batch_size"], devices)


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
    **periods: int,
  ):
    """Opens the table.

    Args:
      path: the run's directory.
      test: arrays `image` and `label`.
      total: how many networks will be trained.
      **periods: `eval_every`, `save_every`, `log_every`, in steps.
    """
    self.board = Scoreboard(test["label"])
    self.stages = Stages(path, total)
    self.costs: dict[str, dict[str, Any]] = {}
    self._test = test
    self._periods: dict[str, Any] = dict(periods)

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
      **batches: `views` and `partners` of `Classifier.fit`.

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
    images = self._test["image"]
    if kind not in self.costs:
      self.costs[kind] = compression.cost(net.logits, variables, images[:100])
    return variables, net.predict(variables, images)

  def result(
    self, claims: Sequence[tuple[str, str, str, str]], **fields: Any
  ) -> dict[str, Any]:
    """The result file's fields, see `Scoreboard.result`."""
    return self.board.result(claims, models=self.costs, **fields)


def use_devices(count: int) -> list[jax.Device]:
  """The first `count` devices; 0 is all."""
  return jax.devices()[: count or None]
