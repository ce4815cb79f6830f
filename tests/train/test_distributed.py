"""Two and four real processes with two devices each: the numbers of one."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from kd_jax.train.workdir import read_metrics
from tests.train.pair import Pair

ROOT = pathlib.Path(__file__).parents[2]


def start(how, path, *more, count=2):
  """(exit code, output) of each of the processes."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
  environment = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": str(ROOT),
  }
  script = ROOT / "tests" / "train" / "one_process.py"
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, script, coordinator, str(count), str(index), how),
        *(path, *more),
      ],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(count)
  ]
  try:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  codes = [process.returncode for process in processes]
  return list(zip(codes, outputs, strict=True))


@pytest.mark.parametrize("where", ["in step", "in evaluation"])
def test_sigterm_to_one_stops_both_at_one_step(problem, where, tmp_path):
  found = start("jit", tmp_path, where)
  assert [code for code, _ in found] == [143, 143], found
  saved = {int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()}
  if where == "in step":
    assert max(saved) >= 3 and max(saved) < 12
  else:  # which would take hours: nobody waited for its end
    assert saved == {4}
  found = start("jit", tmp_path)
  assert [code for code, _ in found] == [0, 0], found
  check(problem.fit(), tmp_path)


@pytest.mark.parametrize("how,count", [("sharded", 2), ("pmap", 2), ("jit", 4)])
def test_processes(problem, how, count, tmp_path):
  found = start(how, tmp_path, count=count)
  assert [code for code, _ in found] == [0] * count, found
  if how == "sharded":
    pair = Pair()
    alone = pair.fit(pair.runner(devices=1))
  else:
    alone = problem.fit()
  check(alone, tmp_path, count)


def check(alone, tmp_path, count=2):
  """All ended with the numbers of one, and only one has written."""
  want = jax.tree.leaves(alone.params)
  each = [np.load(tmp_path / f"params{index}.npz") for index in range(count)]
  for found in each:
    for i, leaf in enumerate(want):
      np.testing.assert_allclose(found[f"arr_{i}"], leaf, rtol=1e-5, atol=1e-6)
      np.testing.assert_array_equal(found[f"arr_{i}"], each[0][f"arr_{i}"])
  rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
  losses = [row["step"] for row in rows if "loss" in row]
  assert losses == list(range(1, 13))  # once each: only one process writes
