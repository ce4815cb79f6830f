"""How long one waits for the first step, with and without kept programs.

Each time is of a process of its own, from the end of its imports to the end of
the first distillation step of a pair of `benchmarks.step_floor`: it draws the
weights, compiles and makes the step. In each round one process finds no
compiled program, and the next one those that it has left.

Run: python -m benchmarks.compile_time
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import _common, step_floor

FORMS = ("nothing kept", "programs kept")


def first_step(pair: str) -> float:
  """Seconds until the first step of a pair is made, in this process."""
  begin = time.perf_counter()
  step_floor.benchmark(pair).forms["a distillation step"]()
  return time.perf_counter() - begin


def in_a_process(pair: str, folder: pathlib.Path) -> float:
  """The same in a process of its own, which keeps its programs in a folder."""
  more = {
    "JAX_COMPILATION_CACHE_DIR": str(folder),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  args = [sys.executable, "-m", "benchmarks.compile_time", "--of", pair]
  env = {**os.environ, **more}
  out = subprocess.run(
    args, env=env, check=True, capture_output=True, text=True
  )
  return float(out.stdout)


def result(
  seconds: dict[tuple[str, str], list[float]], wall_seconds: float
) -> dict[str, Any]:
  """The result file's content, see `kd_jax.result_file`."""
  from kd_jax import comparison

  pairs = dict.fromkeys(pair for pair, _ in seconds)
  return _common.result(
    title="The wait for the first step",
    command="python -m benchmarks.compile_time",
    data={"pairs": "of benchmarks.step_floor"},
    seeds=list(range(len(next(iter(seconds.values()))))),
    metric={"name": "seconds", "unit": "each", "better": "lower"},
    rows=[
      {"name": f"{pair}, {form}", "values": found}
      for (pair, form), found in seconds.items()
    ],
    comparisons=[
      comparison.compare(
        f"{pair}: kept programs save time",
        seconds[pair, FORMS[1]],
        seconds[pair, FORMS[0]],
        "lower",
        a=f"{pair}, {FORMS[1]}",
        b=f"{pair}, {FORMS[0]}",
      )
      for pair in pairs
    ],
    wall_seconds=wall_seconds,
    notes=['Each "seed" is a round: two processes for each pair.'],
  )


def main() -> None:
  parser = _common.parser(__doc__, rounds=3)
  parser.add_argument("--of", choices=step_floor.PAIRS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.of:
    print(first_step(options.of))
    return
  begin = time.time()
  seconds: dict[tuple[str, str], list[float]] = {}
  for number in range(options.rounds):
    for pair in step_floor.PAIRS:
      with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
          taken = in_a_process(pair, pathlib.Path(folder))
          seconds.setdefault((pair, form), []).append(taken)
    print(f"round {number + 1}/{options.rounds}", file=sys.stderr, flush=True)
  _common.show(result(seconds, time.time() - begin), options.json)


if __name__ == "__main__":
  main()
