"""Files that are there whole or not at all."""

from collections.abc import Callable
import json
import os
import pathlib
from typing import Any, BinaryIO

from kd_jax.errors import BadInput


def write(
  path: str | os.PathLike[str], fill: Callable[[BinaryIO], object]
) -> None:
  """Writes a file whole or not at all, and durably.

  Args:
    path: where to; the folder exists.
    fill: writes to the open binary file.

  Raises:
    OSError: if it cannot be written; what was there before stays.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      fill(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)  # So that the new name survives a power cut as well.
  finally:
    os.close(folder)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text file as UTF-8, see `write`."""
  write(path, lambda file: file.write(text.encode()))


def read_json(path: str | os.PathLike[str], kind: type = dict) -> Any:
  """What a JSON file of a run holds.

  Args:
    path: of the file.
    kind: that it should be, of those of `json.loads`.

  Raises:
    BadInput: if it is missing, as files of a run are there whole or not at
      all, or cut or changed, or of another kind.
  """
  try:
    found = json.loads(pathlib.Path(path).read_bytes())
  except FileNotFoundError:
    raise BadInput(f"{path} is missing; restore it from a copy") from None
  except ValueError as error:
    raise BadInput(f"{path} is damaged: {error}") from None
  if not isinstance(found, kind):
    raise BadInput(
      f"{path} is damaged: it holds a {type(found).__name__}, not a "
      f"{kind.__name__}"
    )
  return found
