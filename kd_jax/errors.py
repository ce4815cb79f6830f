"""Exceptions that commands print as one line, and checks that raise them."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
import re
from typing import Any


class BadInput(ValueError):
  """Wrong input, found before anything was compiled or written.

  Commands print its message as one line and exit with code 2.
  """


class NotFinite(FloatingPointError, ValueError):
  """A NaN or an infinity where a result should be, as of a run that diverged.

  Commands print its message as one line and exit with code 1.
  """


class CheckpointError(RuntimeError):
  """No checkpoint can be trusted, or one could not be written.

  Commands print its message as one line and exit with code 1.
  """


@contextlib.contextmanager
def checking() -> Iterator[None]:
  """Turns errors about the input into `BadInput`, keeping their message.

  Experiments wrap what they do before the first side effect, that is reading
  the config and the data, so that a real bug later keeps its traceback.

  Yields:
    Nothing.

  Raises:
    BadInput: from ValueError, TypeError, LookupError, AttributeError, OSError
      and ImportError raised in the block.
  """
  try:
    yield
  except BadInput:
    raise
  except (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OSError,
    ImportError,
  ) as error:
    message = str(error)
    if isinstance(error, KeyError | AttributeError):
      message = str(error.args[0]) if error.args else "missing key"
      field = re.fullmatch(r"""["']+(\w+)["']+""", message)
      if field:  # all that ml_collections says
        message = (
          f"the config has no field {field[1]!r}: is it of this experiment?"
        )
    raise BadInput(message or type(error).__name__) from error


def check_number(
  name: str,
  value: float,
  *,
  above: float | None = None,
  least: float | None = None,
  most: float | None = None,
  below: float | None = None,
) -> None:
  """Raises ValueError unless a number is finite and in its range.

  Args:
    name: what to call it in the message.
    value: the number.
    above: it must be larger than this.
    least: it must be at least this.
    most: it must be at most this.
    below: it must be smaller than this.
  """
  wanted = []
  fine = math.isfinite(value)
  if above is not None:
    wanted.append(f"above {above:g}")
    fine = fine and value > above
  if least is not None:
    wanted.append(f"at least {least:g}")
    fine = fine and value >= least
  if most is not None:
    wanted.append(f"at most {most:g}")
    fine = fine and value <= most
  if below is not None:
    wanted.append(f"below {below:g}")
    fine = fine and value < below
  if not fine:
    wanted = ["finite", *wanted] if not math.isfinite(value) else wanted
    raise ValueError(f"{name} is {value}; it should be {' and '.join(wanted)}")


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
  """Puts the name of a config's field before the message of a ValueError.

  Args:
    where: the field.

  Yields:
    Nothing.

  Raises:
    BadInput: from a ValueError in the block.
  """
  try:
    yield
  except ValueError as error:
    raise BadInput(f"{where}: {error}") from error


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises ValueError unless a word is one of those there are.

  Args:
    name: what to call it in the message.
    value: the word.
    choices: the words there are.

  Example:
    >>> check_choice("mode", "fixed", ("fixed", "live"))
  """
  if value not in choices:
    wanted = ", ".join(repr(choice) for choice in choices)
    raise ValueError(f"{name} is {value!r}; it should be one of {wanted}")


def check_numbers(
  where: str, settings: Mapping[str, Any], **ranges: Mapping[str, float]
) -> None:
  """Checks several numbers of a config.

  Args:
    where: the name of the group, for the message.
    settings: the group.
    **ranges: for each field, keyword arguments of `check_number`.

  Example:
    >>> check_numbers("teacher", {"steps": 5}, steps={"least": 1})
  """
  for field, limits in ranges.items():
    name = f"{where}.{field}" if where else field
    check_number(name, settings[field], **limits)
