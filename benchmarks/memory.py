"""Whether a long run keeps its memory: resident MiB, thousand by thousand.

A student MLP learns from a live teacher for many steps, with metrics, scores
and checkpoints on the way. What is told is the resident memory of the process
at each of ten marks; the first tenth, in which programs are compiled and
buffers found, is the base.

Run: python -m benchmarks.memory --json results/benchmarks/memory.json
"""

import pathlib
import tempfile
import time
from typing import Any

from benchmarks import _common
from kd_jax import memory

MARKS = 10


def resident() -> float:
  """The resident memory of this process in MiB (Linux)."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmRSS:"):
      return int(line.split()[1]) / 1024
  raise RuntimeError("/proc/self/status has no VmRSS")


def measure(steps: int, workdir: pathlib.Path) -> dict[int, float]:
  """Resident MiB by step, at ten marks of a training."""
  from kd_jax import train

  run = _common.mlp_pair((300, 300), (100, 100))
  found: dict[int, float] = {}

  def evaluate(state: Any) -> dict[str, float]:
    found[int(state.step)] = resident()
    return {"resident MiB": found[int(state.step)]}

  every = f"{max(1, steps // MARKS)} steps"
  train.fit(
    run.runner,
    run.state,
    run.frozen,
    run.batches,
    num_steps=steps,
    workdir=workdir,
    evaluate=evaluate,
    eval_every=every,
    save_every=every,
    log_every="10 steps",
  )
  return found


def result(found: dict[int, float], seconds: float) -> dict[str, Any]:
  """The result file's content, see `kd_jax.result_file`."""
  first = min(found)
  rows = [
    {
      "name": f"at step {step:,}",
      "values": [mib],
      "details": {f"more than at step {first:,}": [mib - found[first]]},
    }
    for step, mib in found.items()
  ]
  return _common.result(
    title="Memory of a long run",
    command=f"{_common.settings()}python -m benchmarks.memory "
    f"--steps {max(found)}",
    data={"teacher": "784-300-300-10", "student": "784-100-100-10"},
    metric={"name": "resident memory", "unit": "MiB", "better": "lower"},
    rows=rows,
    wall_seconds=seconds,
  )


def main() -> None:
  parser = _common.parser(__doc__)
  parser.add_argument(
    "--steps", type=_common.at_least(2 * MARKS), default=10_000
  )
  options = parser.parse_args()
  memory.keep()  # as the commands do
  begin = time.time()
  with tempfile.TemporaryDirectory() as folder:
    found = measure(options.steps, pathlib.Path(folder) / "run")
  _common.show(result(found, time.time() - begin), options.json)


if __name__ == "__main__":
  main()
