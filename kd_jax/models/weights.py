"""Weights in `.safetensors` files, which hold numbers and nothing that runs.

A tensor is called by its path in the variables: "params/Dense_0/kernel",
"state/batch_stats/BatchNorm_0/mean". Large models of other programs come as
several files and an index, `x.safetensors.index.json`, which says what is
where: {"weight_map": {tensor: file name}}.

The format notices a file that was cut short, but no flipped bit. `save`
therefore stores a SHA-256 digest in it, which `load` checks; files of other
programs have none.

Reference: https://github.com/huggingface/safetensors (the format).
"""

from collections.abc import Iterator, Mapping, Set
import contextlib
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np

from kd_jax import files
from kd_jax.errors import BadInput

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"

# Files in which programs keep weights as pickles.
_PICKLES = (
  *(".pt", ".pth", ".bin", ".ckpt"),
  *(".pkl", ".pickle", ".joblib", ".npy"),
)
# What the format calls the dtypes that all its versions have.
_DTYPES = {
  "bool": "BOOL",
  "bfloat16": "BF16",
  **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
  **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
  **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_DIGEST = "kd_jax.sha256"  # Its key in the metadata of a file.

Path = str | os.PathLike[str]


def save(path: Path, variables: Mapping[str, Any]) -> None:
  """Writes the variables of a model.

  Args:
    path: a `.safetensors` file, written whole or not at all.
    variables: {"params", "state"}; no state will do.

  Raises:
    ValueError: if the file is called otherwise, two paths make one name, or a
      dtype is none of the format's.

  Example:
    >>> save("student.safetensors", variables)  # doctest: +SKIP
  """
  if not os.fspath(path).endswith(SUFFIX):
    raise ValueError(f"{path} should be called *{SUFFIX}")
  from safetensors.numpy import save as serialize

  tensors = {}
  for name, leaf in _named(variables).items():
    array = np.asarray(leaf, order="C")
    _format(name, array)
    # The digest is one of bytes, which are little-endian in the file.
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    tensors[name] = array
  content = serialize(tensors, {_DIGEST: _digest(tensors)})
  files.write(path, lambda file: file.write(content))


def load(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
  """Reads the variables of a model.

  Names, shapes and dtypes are checked before the first number is read. The
  files are mapped, so that only the result takes memory.

  Args:
    path: a `.safetensors` file, or the `.safetensors.index.json` of several in
      its folder.
    like: variables of the model that the file should fit, whose structure,
      shapes and dtypes count (abstract ones will do).

  Returns:
    {"params", "state"} as `like` has them, of NumPy arrays. Numbers that are
    not finite are left in, see `teachers.check`.

  Raises:
    BadInput: if a file cannot be read, is damaged, may hold a pickle, or does
      not fit. The message is one line that names the first tensor that is
      missing, unknown, misshapen or of another dtype.
    ValueError: if `like` has what no such file can hold.

  Example:
    >>> like = jax.eval_shape(model.init, key, images)  # doctest: +SKIP
    >>> load("student.safetensors", like)  # doctest: +SKIP
  """
  wanted = _named(like)
  for name, leaf in wanted.items():
    _format(name, leaf)
  refuse_pickle(path)
  # Longer than names and their places ever are. The format allows 100 MB,
  # which would take seconds to parse.
  limit = 1_000_000 + 1_000 * len(wanted)
  if os.fspath(path).endswith(INDEX):
    shards = _shards(pathlib.Path(path), wanted.keys(), limit)
    where = f"is not what {os.path.basename(path)} says"
  else:
    shards = {pathlib.Path(path): set(wanted)}
    where = "is of another architecture"
  for shard, names in shards.items():
    part = {name: wanted[name] for name in sorted(names)}
    _check(shard, part, f"{shard} {where}", limit)
  found: dict[str, np.ndarray] = {}
  for shard, names in shards.items():
    found |= _read(shard, names)
  structure = jax.tree.structure(_parts(like))
  return jax.tree.unflatten(structure, [found[name] for name in wanted])


def check_is_file(path: Path) -> None:
  """Raises BadInput unless a file is there, and no folder or pipe."""
  if not os.path.exists(path):
    raise BadInput(f"{path} does not exist")
  if not os.path.isfile(path):
    raise BadInput(f"{path} is not a file")


def refuse_pickle(path: Path, *, archive: bool = False) -> None:
  """Raises BadInput unless a file is there that neither is nor holds a pickle.

  Args:
    path: the file, of which the name and the first bytes are looked at.
    archive: it may be a zip archive; whoever opens that looks for pickles.
  """
  check_is_file(path)
  suffix = pathlib.Path(path).suffix.lower()
  with _one_line(path), open(path, "rb") as file:
    start = file.read(9)
  zipped = start.startswith(b"PK\3\4") and not archive
  # The first bytes may also be the size of a header, which begins with {.
  pickle = re.match(rb"\x80[\x02-\x05]", start) and start[8:] != b"{"
  if zipped or pickle or suffix in _PICKLES:
    raise holds_pickle(path)


def holds_pickle(path: Path) -> BadInput:
  """The error of a file that is a pickle, or may hold one."""
  return BadInput(
    f"{path} is or may hold a pickle, which could run any program and is never "
    "read; convert it where it was made, for example by safetensors.torch."
    'save_file(model.state_dict(), "x.safetensors"), and give the tensors the '
    "names and shapes that models.save gives those of this model"
  )


def check_names(
  where: str, wanted: Set[str], present: Set[str], hint: str = ""
) -> None:
  """Raises BadInput unless a file has the names that it should have.

  Args:
    where: what the message begins with, as "x.npz is of another architecture".
    wanted: the names that it should have.
    present: those that it has.
    hint: what the message ends with.
  """
  faults = []
  for what, names in (
    ("no", wanted - present),
    ("an unknown", present - wanted),
  ):
    if names:
      more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
      faults.append(f"{what} {shown(min(names))}{more}")
  if faults:
    raise BadInput(f"{where}: it has {', and '.join(faults)}{hint}")


def shown(name: str) -> str:
  """A name from a file, as it fits in a line."""
  return name if name.isprintable() and len(name) <= 200 else f"{name!r:.200}"


def _parts(variables: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "params": variables["params"],
    "state": variables.get("state", {}),
  }


def _named(variables: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves by name, in their order."""
  leaves = jax.tree_util.tree_leaves_with_path(_parts(variables))
  named = {}
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in named:
      raise ValueError(f"two variables are called {name}; rename one")
    named[name] = leaf
  return named


def _format(name: str, leaf: Any) -> str:
  """What the format calls the dtype of a leaf."""
  if leaf.dtype.name not in _DTYPES:
    raise ValueError(
      f"{name} has dtype {leaf.dtype}; it should be one of {', '.join(_DTYPES)}"
    )
  return _DTYPES[leaf.dtype.name]


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of names, dtypes, shapes and bytes."""
  found = hashlib.sha256()
  for name, array in sorted(tensors.items()):
    found.update(f"{name} {_format(name, array)} {array.shape}\n".encode())
    found.update(array.reshape(-1).view(np.uint8).data)
  return found.hexdigest()


@contextlib.contextmanager
def _one_line(path: Path, *others: type[Exception]) -> Iterator[None]:
  """Whatever makes a file unreadable becomes one line."""
  kinds: tuple[type[Exception], ...] = (OSError, MemoryError, *others)
  try:
    yield
  except kinds as error:
    reason = " ".join(str(error).split()) or type(error).__name__
    raise BadInput(f"{path} cannot be read: {reason:.200}") from error


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
  from safetensors import SafetensorError, safe_open

  with (
    _one_line(path, SafetensorError),
    safe_open(path, framework="numpy") as file,
  ):
    yield file


def _shards(
  path: pathlib.Path, wanted: Set[str], limit: int
) -> dict[pathlib.Path, set[str]]:
  """The names of the tensors in each file that an index lists."""
  with _one_line(path), path.open("rb") as file:
    content = file.read(limit + 1)
  if len(content) > limit:
    raise BadInput(f"{path} has more than {limit} bytes; no index has")
  try:
    places = json.loads(content)["weight_map"]
  except (ValueError, LookupError, TypeError, RecursionError):
    places = None
  if not isinstance(places, dict):
    raise BadInput(
      f'{path} is no index; it should be JSON, {{"weight_map": {{tensor: file '
      "name}}"
    )
  shards: dict[pathlib.Path, set[str]] = {}
  for name, place in places.items():
    # No other folder, and no way to one.
    plain = isinstance(place, str) and re.fullmatch(r"[\w.-]+", place)
    shard = path.parent / (place if plain else "")
    if not plain or not place.endswith(SUFFIX) or shard.is_symlink():
      raise BadInput(
        f"{path}: {place!r:.200} should be the plain name of a {SUFFIX} file "
        "in the same folder, and no link"
      )
    shards.setdefault(shard, set()).add(name)
  check_names(f"{path} is of another architecture", wanted, places.keys())
  return shards


def _check(
  path: pathlib.Path, like: Mapping[str, Any], where: str, limit: int
) -> None:
  """Raises BadInput unless a file holds what it should; reads no numbers."""
  refuse_pickle(path)
  with _one_line(path), path.open("rb") as file:
    header = int.from_bytes(file.read(8), "little")
    rest = os.fstat(file.fileno()).st_size - 8
  if rest < 0 or header > rest:
    raise BadInput(
      f"{path} is not a {SUFFIX} file, or it has been cut short: its header "
      f"should take {header} bytes, and there are {max(rest, 0)}"
    )
  if header > limit:
    raise BadInput(
      f"{path} has a header of {header} bytes; it should have at most {limit}"
    )
  with _opened(path) as file:
    check_names(where, like.keys(), set(file.keys()))
    for name, leaf in like.items():
      tensor = file.get_slice(name)
      shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
      if shape != tuple(leaf.shape):
        raise BadInput(
          f"{path} is of another architecture: {name} has shape {shape}; it "
          f"should be {tuple(leaf.shape)}"
        )
      if dtype != _format(name, leaf):
        raise BadInput(
          f"{path}: {name} has dtype {dtype}; it should be "
          f"{_format(name, leaf)}"
        )


def _read(path: pathlib.Path, names: Set[str]) -> dict[str, np.ndarray]:
  with _opened(path) as file:
    tensors = {name: file.get_tensor(name) for name in names}
    digest = (file.metadata() or {}).get(_DIGEST)
  if digest is not None and digest != _digest(tensors):
    raise BadInput(
      f"{path} is damaged: its SHA-256 is not the one that was written with it"
    )
  return tensors
