"""Rows of a result, seed by seed."""

import numpy as np
import pytest

from kd_jax.scoreboard import Scoreboard


def logits_of(predictions, classes=3):
  return 4.0 * np.eye(classes, dtype=np.float32)[predictions]


def test_rows_and_comparisons():
  labels = np.array([0, 1, 2, 2])
  board = Scoreboard(labels)
  absent = np.array([False, False, True])
  for wrong in (0, 1, 2):
    guess = labels.copy()
    guess[: wrong + 1] = (guess[: wrong + 1] + 1) % 3
    found = board.add("hard", logits_of(guess), seed=wrong, title="hard labels")
    assert found == wrong + 1
    taught = logits_of(labels)
    board.add(
      "soft",
      taught,
      seed=wrong,
      teacher_logits=taught,
      paper=7,
      absent=absent,
    )
  claims = [("soft is better", "soft", "hard", "lower")]
  result = board.result(claims, experiment="x")
  assert result["experiment"] == "x"
  assert result["metric"]["unit"] == "of 4"
  hard, soft = result["rows"]
  assert hard["name"] == "hard labels" and hard["values"] == [1, 2, 3]
  assert hard["seeds"] == [0, 1, 2]
  assert hard["paper"] is None and soft["paper"] == 7
  assert "agreement" not in hard["details"]
  assert soft["details"]["agreement"] == [1.0] * 3
  assert soft["details"]["errors on absent classes"] == [0.0] * 3
  assert hard["details"]["accuracy"] == [0.75, 0.5, 0.25]
  (entry,) = result["comparisons"]
  assert entry["differences"] == [-1, -2, -3]
  assert entry["a"] == "soft" and entry["b"] == "hard labels"


def test_an_unknown_row_is_an_error():
  with pytest.raises(KeyError, match="soft"):
    Scoreboard(np.zeros(1, int)).compare([("", "soft", "hard", "lower")])


def test_several_alike_count_with_the_mean_of_their_scores():
  labels = np.array([0, 1, 1, 0])
  logits = np.random.default_rng(0).normal(size=(3, 4, 2))
  board = Scoreboard(labels)
  board.add("all", logits, seed=0)
  each = Scoreboard(labels)
  for i, one in enumerate(logits):
    each.add("each", one, seed=i)
  found = board.result(())["rows"][0]
  apart = each.result(())["rows"][0]
  np.testing.assert_allclose(found["values"], [np.mean(apart["values"])])
  np.testing.assert_allclose(
    found["details"]["nll"], [np.mean(apart["details"]["nll"])]
  )
