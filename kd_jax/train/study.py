"""A comparison: several networks, several seeds, one table."""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
from typing import Any

import jax
import numpy as np

from kd_jax import compression, teachers
from kd_jax.files import read_json, write, write_text
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
    offset: int = 0,
    **batches: Any,
  ) -> tuple[Variables, Any]:
    """Trains one network with one seed.

    Args:
      net: the network and its step.
      frozen: see `Classifier.fit`.
      name: of the stage's folder below `seed<seed>`.
      title: for people.
      kind: the network's title in the table of costs.
      seed: of the run, see `Classifier.fit`.
      offset: is added to the seed in training: a twin of the same run.
      settings: has `steps` and `batch_size`.
      **batches: `views`, `partners`, `batches` of `Classifier.fit`.

    Returns:
      (its variables after the last step, what `test` returns).
    """
    workdir, label = self.stages.enter(
      f"seed{seed}/{name}", f"{title}, seed {seed}"
    )
    variables = net.fit(
      frozen,
      self._test,
      seed + offset,
      batch_size=settings["batch_size"],
      num_steps=settings["steps"],
      workdir=workdir,
      title=label,
      **self._periods,
      **batches,
    )
    said = self.test(net, variables, kind=kind, kept=workdir / "logits.npz")
    return variables, said

  def test(
    self,
    net: Classifier,
    variables: Variables,
    *,
    kind: str,
    kept: pathlib.Path | None = None,
  ) -> Any:
    """A network's logits for the test set; the first of a kind is timed.

    Args:
      net: the network.
      variables: its.
      kind: its title in the table of costs.
      kept: a file that keeps them for a run that is taken up again; another
        one's variables, or a damaged file, are asked anew.

    Returns:
      [n, classes]; with heads, what `Classifier.predict_heads` returns.
    """
    images = self._test["image"]
    if kind not in self.costs:
      self.costs[kind] = compression.cost(net.logits, variables, images[:100])
    pin = teachers.digest(variables)
    logits = _read_logits(kept, pin) if kept else None
    if logits is None:
      if net.heads:
        logits = net.predict_heads(variables, images)
      else:
        logits = (net.predict(variables, images),)
      if kept and jax.process_index() == 0:
        named: Any = {f"part{i}": part for i, part in enumerate(logits)}
        write(kept, lambda file: np.savez(file, pin=pin, **named))
    return logits if net.heads else logits[0]

  def once(
    self, name: str, measure: Callable[[], Mapping[str, float]]
  ) -> dict[str, float]:
    """What `measure` returns, from a file if it was measured before.

    Args:
      name: of the file, below the run's directory.
      measure: returns numbers by name.

    Returns:
      The numbers.
    """
    path = self.stages.directory / name
    if path.exists():
      return read_json(path)
    found = {key: float(value) for key, value in measure().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      write_text(path, json.dumps(found) + "\n")
    return found

  def result(
    self, claims: Sequence[tuple[str, str, str, str]], **fields: Any
  ) -> dict[str, Any]:
    """The result file's fields, see `Scoreboard.result`."""
    return self.board.result(claims, models=self.costs, **fields)


def _read_logits(path: pathlib.Path, pin: str) -> tuple[np.ndarray, ...] | None:
  """What was kept for the variables with this digest, if it is whole."""
  try:
    with open(path, "rb") as file, np.load(file) as stored:
      if str(stored["pin"]) != pin:
        return None
      return tuple(stored[name] for name in stored if name != "pin")
  except Exception:  # missing, or damaged: then numpy raises anything
    return None


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
