"""What the result files of benchmarks have in common."""

import datetime
import pathlib
from typing import Any


def result(**fields: Any) -> dict[str, Any]:
  """The content of a result file, see `kd_jax.result_file`.

  Args:
    **fields: `title`, `command`, `metric`, `rows`, `data`, `wall_seconds`, and
      those of the others that are not empty.
  """
  from kd_jax import result_file

  now = datetime.datetime.now(datetime.UTC)
  return {
    "experiment": "benchmarks",
    "source": "kd_jax",
    "config": {},
    "seeds": [0],
    "comparisons": [],
    "models": {},
    "environment": result_file.environment(),
    "finished": now.isoformat(timespec="seconds"),
    **fields,
  }


def show(found: dict[str, Any], path: pathlib.Path | None) -> None:
  """Prints a result, and keeps it if there is a path."""
  from kd_jax import result_file, results

  print(results.table(found))
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    result_file.save(path, found)
