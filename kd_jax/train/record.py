"""From a config and a directory to a result on disk, once."""

from collections.abc import Callable, Mapping
import datetime
import json
import os
import pathlib
import re
import shlex
import sys
import time
from typing import Any

import jax

from kd_jax import report, result_file, results
from kd_jax.files import write_text
from kd_jax.train.workdir import check_workdir, open_workdir


def record(
  body: Callable[[pathlib.Path], tuple[dict[str, Any], dict[str, Any]]],
  config: Mapping[str, Any],
  workdir: str | os.PathLike[str],
) -> dict[str, Any]:
  """Runs an experiment's body unless it has finished in `workdir` already.

  Writes `config.json`, `result.json` and `report.html`, and prints the table.

  Args:
    body: `body(path) -> (result, report)`: the fields of the result file that
      only the experiment knows, and keyword arguments for `report.write`.
    config: plain nested mapping of the settings.
    workdir: the run's directory; the same again resumes or shows the result.

  Returns:
    The result, see `kd_jax.result_file`.

  Raises:
    BadInput: if the directory belongs to another config or another process.
  """
  check_workdir(workdir, config)
  start = time.time()
  with open_workdir(workdir, config) as path:
    stored = path / "result.json"
    if stored.exists():
      result = result_file.load(stored)
    else:
      try:
        result, pages = body(path)
      finally:
        seconds = _add_time(path / "seconds.json", time.time() - start)
      result = {
        "command": command(),
        "config": _portable(config),
        "environment": result_file.environment(),
        "wall_seconds": seconds,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(
          timespec="seconds"
        ),
        "models": {},
        **result,
      }
      if jax.process_index() == 0:
        report.write(path / "report.html", result, **pages)
        result_file.save(stored, result)
    if jax.process_index() == 0:
      print(results.table(result))
      print(f"report: {path / 'report.html'}")
    return result


def command() -> str:
  """The command line of this process, without the paths of this machine."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  if spec is None:
    return "(called from Python)"
  args = list(sys.argv[1:])
  for i, arg in enumerate(args):
    if i and args[i - 1] == "--workdir":
      args[i] = "WORKDIR"
    arg = re.sub(r"^--workdir=.*", "--workdir=WORKDIR", args[i])
    args[i] = re.sub(r"data_dir=[^\s,]+", "data_dir=DATA_DIR", arg)
  # Quoted, so that it can be pasted.
  return f"python -m {spec.name} {shlex.join(args)}"


def _add_time(path: pathlib.Path, seconds: float) -> float:
  """Adds up the time of a run that was interrupted and taken up again."""
  if path.exists():
    seconds += json.loads(path.read_text(encoding="utf-8"))
  if jax.process_index() == 0:
    write_text(path, json.dumps(seconds))
  return seconds


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config without the paths of this machine."""
  names = {"data_dir": "DATA_DIR"} if config.get("data_dir") else {}
  return {**config, **names}
