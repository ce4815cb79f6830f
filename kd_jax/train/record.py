"""From a config and a directory to a result on disk, once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import datetime
import inspect
import json
import os
import pathlib
import re
import shlex
import sys
import time
from typing import Any

import jax
import numpy as np

from kd_jax import report, result_file, results, teachers
from kd_jax.errors import BadInput, checking
from kd_jax.files import read_json, write_text
from kd_jax.train.images import Images
from kd_jax.train.setup import ImageData
from kd_jax.train.workdir import check_workdir, open_workdir, read_changes


def execute(
  load: Callable[[Any], Sequence[Any]],
  body: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
  config: Any,
  workdir: str | os.PathLike[str],
  *,
  allow: Sequence[str] = (),
) -> dict[str, Any]:
  """What every experiment does: reads, checks, trains, records.

  Compiled programs are kept in the folder `config.compilation_cache` and
  found there by the next run, unless JAX has been told of one already; ""
  keeps none.

  Args:
    load: `load(config) -> inputs`: checks the config and reads what it names,
      before anything is compiled or written. It may raise what `checking`
      turns into `BadInput`.
    body: `body(config, *inputs, path)`, see `record`. A run pins the arrays
      among its inputs: it goes on only with the same, by the names of these
      arguments.
    config: a ConfigDict.
    workdir: see `record`.
    allow: see `record`.

  Returns:
    The result.

  Raises:
    BadInput: as `record`, and from `load`.
  """
  _keep_programs(config.get("compilation_cache", ""))
  with checking():
    if not allow:  # then it is known only with the inputs what has changed
      check_workdir(workdir, config.to_dict())
    inputs = tuple(load(config))
  names = list(inspect.signature(body).parameters)[1:-1]
  pinned: dict[str, str] = {}
  for name, value in zip(names, inputs, strict=True):
    pinned |= _pins(name, value)
    if isinstance(value, ImageData):
      pinned["classes"] = ", ".join(value.pool.class_names)
  if config.get("parallel") == "pmap":  # its random numbers depend on them
    pinned["devices"] = str(config.devices or jax.device_count())
  return record(
    lambda path: body(config, *inputs, path),
    config.to_dict(),
    workdir,
    inputs=pinned,
    allow=allow,
  )


def record(
  body: Callable[[pathlib.Path], tuple[dict[str, Any], dict[str, Any]]],
  config: Mapping[str, Any],
  workdir: str | os.PathLike[str],
  *,
  inputs: Mapping[str, str] | None = None,
  allow: Sequence[str] = (),
) -> dict[str, Any]:
  """Runs an experiment's body unless it has finished in `workdir` already.

  Writes `config.json`, `result.json` and `report.html`, and prints the table.

  Args:
    body: `body(path) -> (result, report)`: the fields of the result file that
      only the experiment knows, and keyword arguments for `report.write`.
    config: plain nested mapping of the settings.
    workdir: the run's directory; the same again resumes or shows the result.
    inputs: what pins the data and teachers, by name.
    allow: fields and inputs that may differ from those of the run's beginning;
      the result's notes tell of it.

  Returns:
    The result, see `kd_jax.result_file`.

  Raises:
    BadInput: if the directory belongs to another config or another process, or
      its result is damaged.
  """
  how: Any = {"inputs": inputs, "allow": allow}
  with open_workdir(workdir, config, **how) as path:
    stored = path / "result.json"
    if stored.exists():
      try:
        result = result_file.load(stored)
      except ValueError as error:
        raise BadInput(
          f"{stored} is damaged ({error}); remove it to have it made again"
        ) from None
    else:
      with _timed(path) as seconds:
        result, pages = body(path)
      result = {
        "command": command(),
        "config": _portable(config),
        "environment": result_file.environment(),
        "wall_seconds": seconds(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(
          timespec="seconds"
        ),
        "models": {},
        **result,
      }
      changed = [f"Changed on the way: {line}" for line in read_changes(path)]
      if changed:
        result["notes"] = [*result.get("notes", []), *changed]
      if jax.process_index() == 0:
        report.write(path / "report.html", result, **pages)
        result_file.save(stored, result)
    if jax.process_index() == 0:
      print(results.table(result))
      print(f"report: {path / 'report.html'}")
    return result


def _keep_programs(folder: str) -> None:
  """Has JAX keep what it compiles, and says where."""
  if not folder or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    return
  path = pathlib.Path(folder).expanduser().absolute()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:  # a home that is read-only should stop nobody
    line = f"compiled programs are not kept, see compilation_cache: {error}"
    print(line, file=sys.stderr)
  else:
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Half of the wait for a first step is small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _pins(name: str, value: Any) -> dict[str, str]:
  """What tells an input from another: examples and a digest of its arrays."""
  if hasattr(value, "_fields"):
    pins: dict[str, str] = {}
    for field in value._fields:
      pins |= _pins(f"{name}.{field}", getattr(value, field))
    return pins
  if isinstance(value, Images):
    return {name: value.fingerprint()}
  arrays = [
    leaf
    for leaf in jax.tree.leaves(value)
    if isinstance(leaf, np.ndarray | jax.Array)
  ]
  return {name: teachers.fingerprint(value)} if arrays else {}


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
    arg = re.sub(r"data_dir=[^\s,]+", "data_dir=DATA_DIR", arg)
    args[i] = re.sub(r"=[~/][^\s,]*/", "=.../", arg)
  # Quoted, so that it can be pasted.
  return f"python -m {spec.name} {shlex.join(args)}"


@contextlib.contextmanager
def _timed(path: pathlib.Path) -> Iterator[Callable[[], float]]:
  """Adds up the time of a run that was interrupted and taken up again.

  Args:
    path: the run's directory.

  Yields:
    A function that says how many seconds it has taken so far. A session that
    was killed counts up to the last file that it wrote in a stage.
  """
  total, session = path / "seconds.json", path / "session.json"
  read = lambda file: read_json(file, float) if file.exists() else 0.0
  earlier = read(total)
  if session.exists():  # it had no time to end
    last = [f.stat().st_mtime for f in path.glob("*/**/*") if f.is_file()]
    earlier += max(0.0, max(last, default=0.0) - read(session))
  start = time.time()
  seconds = lambda: earlier + time.time() - start
  if jax.process_index() == 0:
    write_text(total, json.dumps(earlier))
    write_text(session, json.dumps(start))
  try:
    yield seconds
  finally:
    if jax.process_index() == 0:
      write_text(total, json.dumps(seconds()))
      session.unlink()


def _portable(value: Any, name: str = "") -> Any:
  """The config without the paths of this machine: only their ends remain."""
  if isinstance(value, Mapping):
    return {key: _portable(part, key) for key, part in value.items()}
  if name == "data_dir" and value:
    return "DATA_DIR"
  if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)):
    return f".../{pathlib.PurePath(value).name}"
  return value
