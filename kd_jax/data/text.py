"""Text for language models: its units, their numbers, windows of them."""

from collections import Counter
from collections.abc import Sequence
import gzip
import importlib
import os
import pathlib
import zlib

import numpy as np

from kd_jax.errors import BadInput, check_choice, check_number

UNITS = ("character", "word")
UNKNOWN = "<unk>"
EMBEDDED = "pydoc"


def read(
  source: str | os.PathLike[str], folder: str | os.PathLike[str] = ""
) -> str:
  """A text.

  Args:
    source: a UTF-8 file, perhaps gzipped (`.gz`); or "pydoc", the help texts
      that come with Python, about 700,000 characters of English prose and
      code, which differ a little from version to version.
    folder: where the file is, if its name is not absolute.

  Returns:
    The text.

  Raises:
    BadInput: if there is no such file, it is no text, or empty.
  """
  if source == EMBEDDED:
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))
  path = pathlib.Path(folder) / source
  if not path.is_file():
    raise BadInput(
      f"text {path} does not exist; it should be a file or {EMBEDDED!r}"
    )
  try:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    found = data.decode("utf-8")
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise BadInput(f"text {source} is no UTF-8 text: {error}") from None
  if not found.strip():
    raise BadInput(f"text {source} is empty")
  return found


def split(text: str, unit: str) -> list[str]:
  """The units of a text: its characters, or its words.

  Words are what white space separates, and a line's end is the word `<eos>`, as
  in the preparation of the Penn Treebank.
  """
  check_choice("unit", unit, UNITS)
  if unit == "character":
    return list(text)
  lines = text.split("\n")
  return [
    word for line in lines if line.strip() for word in (*line.split(), "<eos>")
  ]


def vocabulary(units: Sequence[str], most: int = 10_000) -> tuple[str, ...]:
  """The units that get numbers: `<unk>`, then the most frequent ones.

  Args:
    units: from `split`, of the training text only.
    most: size of the vocabulary, `<unk>` included.

  Returns:
    The units by number; equally frequent ones in the order of the alphabet.

  Example:
    >>> vocabulary(list("abracadabra"), most=4)
    ('<unk>', 'a', 'b', 'r')
  """
  check_number("most", most, least=2)
  counts = Counter(units)
  counts.pop(UNKNOWN, None)
  order = sorted(counts, key=lambda unit: (-counts[unit], unit))
  return (UNKNOWN, *order[: most - 1])


def encode(units: Sequence[str], known: Sequence[str]) -> np.ndarray:
  """int32[n], the numbers of the units; 0 for what is not in `known`.

  Example:
    >>> encode(list("abc"), ("<unk>", "a", "b")).tolist()
    [1, 2, 0]
  """
  numbers = {unit: number for number, unit in enumerate(known)}
  found = (numbers.get(unit, 0) for unit in units)
  return np.fromiter(found, np.int32, len(units))


def windows(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
  """A text cut into windows, each with the token that comes after it.

  Args:
    tokens: int32[n].
    length: of the input of a model.

  Returns:
    {"id": int32[k], "tokens": int32[k, length], "label": int32[k, length]}:
    `label` is `tokens` one later. What is left at the end is dropped; every
    other token but the first is predicted once.

  Raises:
    ValueError: if the text is shorter than one window.

  Example:
    >>> found = windows(np.arange(8, dtype=np.int32), 3)
    >>> found["tokens"].tolist(), found["label"].tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
  """
  check_number("length", length, least=1)
  count = (len(tokens) - 1) // length
  if count < 1:
    raise ValueError(
      f"the text has {len(tokens)} tokens; a window of {length} needs "
      f"{length + 1}"
    )
  cut = lambda start: tokens[start : start + count * length].reshape(count, -1)
  return {
    "id": np.arange(count, dtype=np.int32),
    "tokens": cut(0),
    "label": cut(1),
  }
