"""The loop: resuming, logging, stopping."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kd_jax.train import loop
from kd_jax.train.workdir import hash_ids, read_metrics


def lines(path):
  return read_metrics(path / "metrics.jsonl")


@pytest.mark.parametrize(
  "how,devices,per_call", [("jit", 1, 1), ("pmap", 8, 3)]
)
def test_resuming_gives_the_bits_of_an_uninterrupted_run(
  problem, same, tmp_path, how, devices, per_call
):
  options = {"how": how, "devices": devices, "per_call": per_call}
  options |= {"save_every": 5, "eval_every": 4}
  options["evaluate"] = lambda state: {"at": float(state.step)}
  whole = problem.fit(workdir=tmp_path / "a", **options)
  problem.fit(workdir=tmp_path / "b", **options | {"num_steps": 7})
  resumed = problem.fit(workdir=tmp_path / "b", **options)
  same(resumed.params, whole.params, exact=True)
  same(resumed.opt_state, whole.opt_state, exact=True)
  a, b = lines(tmp_path / "a"), lines(tmp_path / "b")
  b = [row for row in b if row != {"step": 7, "at": 7.0}]  # its first end
  assert json.dumps(a) == json.dumps(b)
  assert [row["at"] for row in a if "at" in row] == [4.0, 8.0, 12.0]


def test_a_finished_run_returns_at_once(problem, same, tmp_path):
  first = problem.fit(workdir=tmp_path)
  before = (tmp_path / "metrics.jsonl").read_bytes()

  def never(step):
    raise AssertionError("a batch was asked for")

  again = problem.fit(workdir=tmp_path, batches=never)
  same(again.params, first.params, exact=True)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_every_line_names_its_batch(problem, tmp_path):
  problem.fit(workdir=tmp_path, log_every=3, per_call=2)
  rows = lines(tmp_path)
  assert [row["step"] for row in rows] == [3, 6, 9, 12]
  for row in rows:
    assert row["ids"] == hash_ids(problem.batches()(row["step"] - 1)["index"])
    total = row["hard"] + 0.1 * row["small"]
    assert row["loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
  "per_call, seconds", [(1, 0.0), (1, 60.0), (4, 0.0), (4, 60.0)]
)
def test_a_non_finite_step_stops_the_run_and_says_where(
  problem, same, tmp_path, monkeypatch, per_call, seconds
):
  """However late it is looked for."""
  monkeypatch.setattr(loop, "SETTLE", seconds)
  row = int(problem.batches()(6)["index"][3])
  first = min(
    step for step in range(12) if row in problem.batches()(step)["index"]
  )
  x = problem.data["x"].copy()
  x[row] = np.nan
  data = {**problem.data, "x": x, "valid": np.ones(64, bool)}
  options = {"data": data, "workdir": tmp_path, "per_call": per_call}
  with pytest.raises(FloatingPointError) as error:
    problem.fit(**options)
  text = str(error.value)
  assert text.startswith(f"step {first} is not finite: ")
  assert "hard = nan" in text and "model/Dense_0/" in text
  assert str(problem.batches()(first)["index"][0]) in text
  with pytest.raises(FloatingPointError):  # and again from the saved state
    problem.fit(**options)
  good = {**data, "x": problem.data["x"]}
  mended = problem.fit(**options | {"data": good})
  want = problem.fit(data=good)
  same(mended.params, want.params, exact=True)


def test_sigterm_saves_and_leaves_with_143(problem, same, tmp_path):
  batches = problem.batches()

  def terminated(step):
    if step == 6:
      os.kill(os.getpid(), signal.SIGTERM)
      os.kill(os.getpid(), signal.SIGTERM)
    return batches(step)

  with pytest.raises(SystemExit) as error:
    problem.fit(workdir=tmp_path, batches=terminated)
  assert error.value.code == 143
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert "7" in {p.name for p in (tmp_path / "checkpoints").iterdir()}
  resumed = problem.fit(workdir=tmp_path)
  same(resumed.params, problem.fit().params, exact=True)


def test_sigterm_at_the_end_of_a_stage_is_not_forgotten(problem, tmp_path):
  def evaluate(state):
    os.kill(os.getpid(), signal.SIGTERM)
    return {}

  with pytest.raises(SystemExit) as error:
    problem.fit(workdir=tmp_path, evaluate=evaluate)
  assert error.value.code == 143
  assert problem.fit(workdir=tmp_path).step == 12  # it was finished and saved


def test_progress_is_a_line_where_there_is_no_terminal(problem, capfd):
  problem.fit(progress=True, evaluate=lambda state: {"errors": 3.0})
  assert "training: step 12/12, errors 3" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["num_steps", "save_every", "log_every"])
def test_periods_are_positive(problem, name):
  with pytest.raises(ValueError, match=f"{name} is 0"):
    problem.fit(**{name: 0})


def test_saving_by_the_clock_gives_the_same_bits(
  problem, same, tmp_path, monkeypatch
):
  now = 0.0

  def clock():
    nonlocal now
    now += 11.0
    return now

  whole = problem.fit(save_every=4, per_call=2)
  with monkeypatch.context() as patch:
    patch.setattr("kd_jax.train.period.monotonic", clock)
    saved = problem.fit(
      workdir=tmp_path,
      save_every="1 minute",
      eval_every="0.6 minutes",
      evaluate=lambda state: {"at": float(state.step)},
      per_call=2,
      num_steps=11,
    )
  assert int(saved.step) == 11
  at = [row["at"] for row in lines(tmp_path) if "at" in row]
  assert at == [4, 8, 11]  # two periods look at the clock in each call
  resumed = problem.fit(workdir=tmp_path, per_call=2)
  same(resumed.params, whole.params, exact=True)


def test_epochs_are_periods_too(problem, tmp_path):
  evaluate = lambda state: {"at": float(state.step)}
  problem.fit(
    workdir=tmp_path,
    eval_every="1 epoch",
    steps_per_epoch=4,
    evaluate=evaluate,
    num_steps=10,
  )
  at = [row["at"] for row in lines(tmp_path) if "at" in row]
  assert at == [4, 8, 10]


def test_where_there_is_no_terminal_the_time_left_is_said(
  problem, capsys, tmp_path
):
  problem.fit(
    progress=True, eval_every=5, evaluate=lambda state: {"errors": 3.0}
  )
  first, *said = capsys.readouterr().err.splitlines()
  assert first == "training: 12 steps, compiling"
  assert len(said) == 3
  assert "step 5/12, errors 3, " in said[0] and said[0].endswith(" s left")
  assert said[2].endswith("step 12/12, errors 3")


STUCK = """
import sys, threading, time
import jax, jax.numpy as jnp
sys.path.insert(0, "tests/train")
from conftest import Problem
from kd_jax.train import signals
signals.GRACE = 1.0

@jax.jit
def busy(x):  # for minutes, in XLA: no Python instruction in between
  return jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.sin(x @ x), x)

def evaluate(state):
  print("evaluating", flush=True)
  return {"x": float(busy(jnp.eye(200)).sum())}

Problem().fit(num_steps=12, eval_every=5, evaluate=evaluate,
              workdir=sys.argv[1])
"""


def test_sigterm_in_the_middle_of_a_long_computation(problem, same, tmp_path):
  """Nothing that was finished is lost, and it does not take for ever."""
  command = [sys.executable, "-c", STUCK, str(tmp_path / "run")]
  root = pathlib.Path(__file__).parents[2]
  with subprocess.Popen(
    command, cwd=root, stdout=subprocess.PIPE, text=True
  ) as run:
    assert run.stdout.readline() == "evaluating\n"
    time.sleep(0.5)
    begin = time.monotonic()
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 143
  assert time.monotonic() - begin < 25
  assert (tmp_path / "run/checkpoints/5").is_dir()
  resumed = problem.fit(workdir=tmp_path / "run")
  same(resumed.params, problem.fit().params, exact=True)
