"""A run's directory: whose it is, who writes to it, what is logged in it."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import fcntl
import json
import os
import pathlib
import re
import socket
from typing import Any, TextIO
import zlib

import jax
import numpy as np
from tensorboardX import SummaryWriter

from kd_jax.errors import BadInput
from kd_jax.files import read_json, write_text

# What may differ when a run is taken up again: none of it changes the numbers.
SAFE_FIELDS = (
  *("log_every", "save_every", "eval_every", "progress"),
  *("data_dir", "compilation_cache"),
)


# What there may be before the first checkpoint.
_STARTING = (
  *(".lock", "config.json", "inputs.json", "changes.json", "seconds.json"),
  *("session.json", "stage.json", "metrics.jsonl"),
)


@contextlib.contextmanager
def open_workdir(
  workdir: str | os.PathLike[str],
  config: Mapping[str, Any],
  *,
  inputs: Mapping[str, str] | None = None,
  allow: Sequence[str] = (),
) -> Iterator[pathlib.Path]:
  """Claims a directory for a run and writes what it is made of into it.

  That is `config.json`, `inputs.json`, and `changes.json`, a line for each
  change that was allowed.

  Args:
    workdir: local path; made if missing.
    config: plain nested mapping of the run's settings.
    inputs: what pins the data and teachers that were read, by name; None if
      they are not known.
    allow: fields of the config, or names of inputs, that may differ from those
      with which the run began.

  Yields:
    The path. Until the block ends no other process can open it.

  Raises:
    BadInput: if the directory belongs to a run with another config or other
      inputs (the differences are listed), or another process is writing to it.
      Nothing is changed then.
  """
  path = check_workdir(workdir, config, inputs=inputs, allow=allow)
  if jax.process_index() != 0:
    yield path
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise BadInput(f"workdir {path} cannot be made: {error}") from None
  with open(path / ".lock", "a+", encoding="utf-8") as lock:
    _take(lock, path)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    changed = _changes(path, config, inputs)
    if changed:
      earlier = read_changes(path)
      write_text(path / "changes.json", _dump(earlier + changed))
    if not (path / "result.json").exists():  # else it is left as it is
      write_text(path / "config.json", _dump(config))
      write_text(path / "inputs.json", _dump(inputs or {}))
    yield path


def check_workdir(
  workdir: str | os.PathLike[str],
  config: Mapping[str, Any],
  *,
  inputs: Mapping[str, str] | None = None,
  allow: Sequence[str] = (),
) -> pathlib.Path:
  """Checks that a directory is free for this config; touches nothing.

  Args:
    workdir: local path, may be missing.
    config: plain nested mapping of the run's settings.
    inputs: as for `open_workdir`.
    allow: likewise.

  Returns:
    The path.

  Raises:
    BadInput: if it cannot hold this run, another process writes to it, or what
      is allowed has not changed or cannot any more.
  """
  if "://" in str(workdir):
    raise BadInput(
      f"workdir is {workdir}; it should be a local path (mount the bucket)"
    )
  path = pathlib.Path(workdir).absolute()
  if path.exists() and not path.is_dir():
    raise BadInput(f"workdir {path} is a file; it should be a directory")
  parent = path
  while not parent.exists():
    parent = parent.parent
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise BadInput(
      f"workdir {path} cannot be made: {parent} is no directory that this "
      "user may write to"
    )
  if (path / ".lock").exists() and jax.process_index() == 0:
    with open(path / ".lock", encoding="utf-8") as lock:
      _take(lock, path)  # and leave it
  stored = path / "config.json"
  files = path.iterdir() if path.exists() else ()
  if not stored.exists() and any(file.name != ".lock" for file in files):
    raise BadInput(
      f"workdir {path} holds files but no config.json, so it is no run of "
      "kd_jax; name an empty or new --workdir"
    )
  if not _has_begun(path):
    if allow:
      raise BadInput(
        f"--allow is for a run that has begun, and the one in {path} has saved "
        "nothing yet; leave it out"
      )
    return path
  changes = _changes(path, config, inputs)
  if changes and allow and (path / "result.json").exists():
    raise BadInput(
      f"the run in {path} is finished, so --allow comes too late: name another "
      "--workdir"
    )
  below = lambda line, name: re.match(rf"{re.escape(name)}[ .]", line)
  for name in allow:
    if not any(below(line, name) for line in changes):
      raise BadInput(
        f"--allow names {name!r}, which is no field or what it was"
      )
  changes = [
    line for line in changes if not any(below(line, name) for name in allow)
  ]
  if changes:
    raise BadInput(
      f"workdir {path} belongs to a run with another config: "
      f"{'; '.join(changes)} (old -> new). Name another --workdir, undo "
      "the change, or go on with it by --allow=FIELD"
    )
  return path


def _take(lock: TextIO, path: pathlib.Path) -> None:
  """Locks a file until it is closed, or says which process has it."""
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.seek(0)
    raise BadInput(
      f"workdir {path} is in use by {lock.read().strip() or 'a process'}; "
      "wait for it or name another --workdir"
    ) from None
  lock.seek(0)


def read_changes(path: pathlib.Path) -> list[str]:
  """What was changed while a run was going on, a line for each field."""
  stored = path / "changes.json"
  return read_json(stored, list) if stored.exists() else []


def _changes(
  path: pathlib.Path,
  config: Mapping[str, Any],
  inputs: Mapping[str, str] | None,
) -> list[str]:
  """How this config and these inputs differ from those that were stored."""
  if not _has_begun(path):
    return []
  found = _differences(
    read_json(path / "config.json"), json.loads(_dump(config))
  )
  old = read_json(path / "inputs.json") if inputs is not None else {}
  return found + (_differences(old, dict(inputs or {})) if old else [])


def check_branch(
  run: str | os.PathLike[str], config: Mapping[str, Any], fields: Sequence[str]
) -> None:
  """Refuses to go on from another run whose settings were others.

  Args:
    run: the other run's directory.
    config: plain nested mapping of this run's settings.
    fields: those that must be equal, as "networks.student".

  Raises:
    BadInput: if it is no run, or naming the fields that differ.
  """
  stored = pathlib.Path(run).absolute() / "config.json"
  if not stored.exists():
    raise BadInput(
      f"{run} is no run of kd_jax: it has no config.json. It should be the "
      "--workdir of another run"
    )
  there = read_json(stored)
  here = json.loads(_dump(config))
  changes = []
  for field in fields:
    old, new = there, here
    for part in field.split("."):
      old = old.get(part, "(none)") if isinstance(old, dict) else "(none)"
      new = new.get(part, "(none)") if isinstance(new, dict) else "(none)"
    changes += _differences(old, new, field)
  if changes:
    raise BadInput(
      f"{run} had other settings: {'; '.join(changes)} (there -> here)"
    )


def _has_begun(path: pathlib.Path) -> bool:
  """Whether there is more than a run writes before its first checkpoint.

  Settings of a run that has stopped before it may be corrected.
  """
  return any(
    child.name not in _STARTING and child.parent.name != "tensorboard"
    for child in path.rglob("*")
    if child.is_file()
  )


class MetricWriter:
  """`metrics.jsonl` (unrounded numbers) and TensorBoard events of one stage.

  Only process 0 writes.
  """

  def __init__(self, directory: pathlib.Path, start_step: int):
    """Opens the files, dropping what a killed run logged past `start_step`."""
    self._on = jax.process_index() == 0
    if not self._on:
      return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    lines = [row for row in read_metrics(path) if row["step"] <= start_step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in lines))
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    self._board = SummaryWriter(
      str(directory / "tensorboard"), purge_step=start_step + 1
    )

  def write(self, step: int, scalars: Mapping[str, Any], **more: Any) -> None:
    """Adds one line: `step`, the scalars, and `more` (not for TensorBoard)."""
    if not self._on:
      return
    values = {name: float(value) for name, value in scalars.items()}
    try:
      self._file.write(json.dumps({"step": step, **values, **more}) + "\n")
      self._file.flush()
    except OSError as error:  # which does not name the file
      raise OSError(error.errno, error.strerror, self._file.name) from None
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes both files."""
    if self._on:
      self._file.close()
      self._board.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`; a last line cut short by a kill is left out.

  Args:
    path: the file; may be missing.

  Returns:
    One dict per line, in order.

  Raises:
    BadInput: if a line other than the last is damaged.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").splitlines()
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      rows.append(json.loads(line))
    except ValueError:
      if number < len(lines):
        raise BadInput(
          f"{path}, line {number} is damaged; remove that line to go on"
        ) from None
  return rows


def hash_ids(ids: np.ndarray) -> str:
  """A short fingerprint of a batch's example ids, in their order."""
  data = np.ascontiguousarray(np.asarray(ids, np.int64))
  return f"{zlib.crc32(data.tobytes()):08x}"


def _dump(config: Any) -> str:
  return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    found = []
    for name in sorted(set(old) | set(new)):
      if name not in SAFE_FIELDS:
        found += _differences(
          old.get(name, "(none)"),
          new.get(name, "(none)"),
          f"{path}.{name}" if path else name,
        )
    return found
  return [] if old == new else [f"{path} {old} -> {new}"]
