"""Two real processes with two devices each give the numbers of one."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from kd_jax.train.workdir import read_metrics

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("how", ["jit", "pmap"])
def test_two_processes(problem, how, tmp_path):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
  environment = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": str(ROOT),
  }
  script = ROOT / "tests" / "train" / "two_processes.py"
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, script, coordinator, "2", str(index), how),
        tmp_path,
      ],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  codes = [process.returncode for process in processes]
  assert codes == [0, 0], "\n".join(outputs)

  want = jax.tree.leaves(problem.fit().params)
  both = [np.load(tmp_path / f"params{index}.npz") for index in range(2)]
  for found in both:
    for i, leaf in enumerate(want):
      np.testing.assert_allclose(found[f"arr_{i}"], leaf, rtol=1e-5, atol=1e-6)
      np.testing.assert_array_equal(found[f"arr_{i}"], both[0][f"arr_{i}"])
  rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
  losses = [row["step"] for row in rows if "loss" in row]
  assert losses == list(range(1, 13))  # once each: only one process writes
