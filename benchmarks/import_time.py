"""What `import kd_jax.losses` adds to `import jax`.

Each import is timed in a process of its own, the two in turn so that a busy
moment of the machine hits both, after one untimed round that fills the caches.

Run: python -m benchmarks.import_time
"""

import subprocess
import sys
import time
from typing import Any

from benchmarks import _common

BASE = "import jax"
IMPORTS = (BASE, "import kd_jax.losses")

_PROBE = """
import time
begin = time.perf_counter()
{line}
print(time.perf_counter() - begin)
"""


def in_a_process(line: str) -> float:
  """Seconds that a new interpreter takes for an import."""
  done = subprocess.run(
    [sys.executable, "-c", _PROBE.format(line=line)],
    check=True,
    capture_output=True,
    text=True,
  )
  return float(done.stdout)


def result(
  seconds: dict[str, list[float]], wall_seconds: float
) -> dict[str, Any]:
  """The result file's content, see `kd_jax.result_file`."""
  rounds = len(seconds[BASE])
  return _common.result(
    title="What importing costs",
    command=f"python -m benchmarks.import_time --rounds {rounds}",
    data={"processes": "one for each import, after one that is not timed"},
    seeds=list(range(rounds)),
    metric={
      "name": "time",
      "unit": f"in that of: {BASE}",
      "better": "lower",
    },
    rows=[
      {
        "name": line,
        "values": [t / b for t, b in zip(taken, seconds[BASE], strict=True)],
        "details": {"milliseconds": [1e3 * t for t in taken]},
      }
      for line, taken in seconds.items()
    ],
    wall_seconds=wall_seconds,
    notes=['Each "seed" is a round in which the imports take turns.'],
  )


def main() -> None:
  options = _common.parser(__doc__, rounds=15).parse_args()
  begin = time.time()
  seconds: dict[str, list[float]] = {line: [] for line in IMPORTS}
  for number in range(options.rounds + 1):
    for line, taken in seconds.items():
      found = in_a_process(line)
      if number:
        taken.append(found)
  _common.show(result(seconds, time.time() - begin), options.json)


if __name__ == "__main__":
  main()
