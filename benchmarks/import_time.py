"""Prints what `import kd_jax.losses` adds to `import jax`.

Each import is timed in a process of its own, the two in turn so that a busy
moment of the machine hits both, after one untimed round that fills the caches.

Run: python benchmarks/import_time.py [rounds]
"""

import statistics
import subprocess
import sys

_PROBE = """
import time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def import_seconds(module: str) -> float:
  """Returns how long a new interpreter takes to import `module`."""
  done = subprocess.run(
    [sys.executable, "-c", _PROBE.format(module=module)],
    check=True,
    capture_output=True,
    text=True,
  )
  return float(done.stdout)


def main() -> None:
  rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
  modules = ("jax", "kd_jax.losses")
  seconds: dict[str, list[float]] = {module: [] for module in modules}
  for round_number in range(rounds + 1):
    for module in modules:
      taken = import_seconds(module)
      if round_number:
        seconds[module].append(taken)
  median = {module: statistics.median(seconds[module]) for module in modules}
  for module in modules:
    low, high = min(seconds[module]), max(seconds[module])
    print(f"import {module:14} {median[module]:.3f} s  ({low:.3f}..{high:.3f})")
  added = median["kd_jax.losses"] - median["jax"]
  print(f"added by kd_jax.losses {added:.3f} s, medians of {rounds} rounds")


if __name__ == "__main__":
  main()
