"""Periods: by steps, epochs and minutes."""

import pytest

from kd_jax.train import Period


@pytest.mark.parametrize(
  ("every", "steps"),
  [
    (3, 3),
    ("3", 3),
    ("3 steps", 3),
    ("1 step", 1),
    ("2 epochs", 20),
    ("0.5 epochs", 5),
    ("0.01 epochs", 1),
  ],
)
def test_steps_and_epochs(every, steps):
  period = Period("save_every", every, steps_per_epoch=10)
  assert [s for s in range(1, 61) if period.due(s)] == list(
    range(steps, 61, steps)
  )
  for step in range(60):
    end = min(s for s in range(step + 1, 99) if s % steps == 0)
    assert period.end(step) == end


def test_never():
  period = Period("eval_every", None)
  assert not any(map(period.due, range(1, 99)))
  assert period.end(5) == float("inf")


def test_minutes_go_by_the_clock(monkeypatch):
  now = 1000.0
  monkeypatch.setattr("kd_jax.train.period.monotonic", lambda: now)
  period = Period("save_every", "1.5 minutes")
  assert period.end(3) == float("inf")
  found = []
  for step in range(1, 21):
    now += 20.0
    if period.due(step):
      found.append(step)
  assert found == [5, 10, 15, 20]  # the first step past 90 seconds


@pytest.mark.parametrize(
  "every",
  [0, -1, "0 steps", "2.5 steps", "often", "3 weeks", "steps", "1 2", "", 1.5],
)
def test_what_is_no_period(every):
  with pytest.raises(ValueError, match=r"save_every is .*'2 epochs'"):
    Period("save_every", every, steps_per_epoch=10)


def test_epochs_need_epochs():
  with pytest.raises(ValueError, match="there are no epochs here"):
    Period("save_every", "2 epochs")
