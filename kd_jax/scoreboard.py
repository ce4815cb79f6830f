"""The rows of a result: one per setting, one number per seed in each."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kd_jax import comparison, evaluate, fidelity

_FIDELITY = ("agreement", "kl_teacher_student", "kl_student_teacher")


class Scoreboard:
  """Collects the test scores of classifiers, for the result file.

  Attributes:
    labels: [n] int, the labels of the test set.
  """

  def __init__(self, labels: np.ndarray):
    self.labels = np.asarray(labels)
    self._rows: dict[str, dict[str, Any]] = {}

  def add(
    self,
    name: str,
    logits: np.ndarray,
    *,
    seed: int,
    title: str | None = None,
    paper: float | None = None,
    teacher_logits: np.ndarray | None = None,
    absent: np.ndarray | None = None,
    curve: tuple[str, float] | None = None,
    **details: float,
  ) -> float:
    """Adds one seed to the row `name`.

    Args:
      name: short name of the setting; rows keep the order of their first seed.
      logits: [n, classes], the predictions for the test set; of several alike
        [members, n, classes], of whose scores the mean counts.
      seed: the run's seed.
      title: what a person reads in the table; `name` by default.
      paper: the paper's number of errors; None or 0 if it gives none.
      teacher_logits: [n, classes], for agreement and KL.
      absent: [classes] bool, classes that were not trained on; if there are
        any, the errors on them are counted apart.
      curve: (name, number): the row is a point of that curve, over what the
        result calls `curve_over`.
      **details: further numbers of this seed.

    Returns:
      The number of test errors.
    """
    row = self._rows.setdefault(
      name,
      {
        "name": title or name,
        "paper": paper or None,
        "seeds": [],
        "values": [],
        "details": {},
        **({"curve": list(curve)} if curve else {}),
      },
    )
    members = [
      self._scores(one, teacher_logits, absent)
      for one in (logits if np.ndim(logits) == 3 else [logits])
    ]
    scores = {
      key: float(np.mean([one[key] for one in members])) for key in members[0]
    }
    errors = scores.pop("errors")
    row["seeds"].append(int(seed))
    row["values"].append(errors)
    for key, value in {**scores, **details}.items():
      row["details"].setdefault(key, []).append(float(value))
    return errors

  def _scores(
    self,
    logits: np.ndarray,
    teacher_logits: np.ndarray | None,
    absent: np.ndarray | None,
  ) -> dict[str, float]:
    scores = evaluate.classification(logits, self.labels)
    del scores["count"]
    if teacher_logits is not None:
      match = fidelity.measure(logits, teacher_logits)
      scores |= {key: match[key] for key in _FIDELITY}
    if absent is not None and absent.any():
      wrong = logits.argmax(-1) != self.labels
      scores["errors on absent classes"] = wrong[absent[self.labels]].sum()
    return scores

  def result(
    self, claims: Sequence[tuple[str, str, str, str]], **fields: Any
  ) -> dict[str, Any]:
    """The result file's rows, metric and comparisons, and `fields`."""
    metric = {
      "name": "test errors",
      "unit": f"of {len(self.labels)}",
      "better": "lower",
    }
    rows = list(self._rows.values())
    comparisons = self.compare(claims)
    return {
      "rows": rows,
      "metric": metric,
      "comparisons": comparisons,
      **fields,
    }

  def compare(
    self, claims: Sequence[tuple[str, str, str, str]]
  ) -> list[dict[str, Any]]:
    """What became of the claims, each stated before the run.

    Args:
      claims: (claim, row a, row b, whether a is expected "lower" or "higher").

    Returns:
      The comparisons of the result file, paired by seed.
    """
    found = []
    for claim, a, b, expected in claims:
      first, second = self._rows[a], self._rows[b]
      found.append(
        comparison.compare(
          claim,
          first["values"],
          second["values"],
          expected,
          a=first["name"],
          b=second["name"],
        )
      )
    return found
