"""The `.npz` files in which the weights of Big Transfer were released.

They hold one array per parameter, under the names of the original TensorFlow
variables, for example (block 1, unit 1, the unit's convolutions a, b, c):

    resnet/root_block/standardized_conv2d/kernel         [7, 7, 3, c]
    resnet/block1/unit01/a/group_norm/gamma              [c]
    resnet/block1/unit01/a/group_norm/beta               [c]
    resnet/block1/unit01/a/standardized_conv2d/kernel    [1, 1, c, c]
    resnet/block1/unit01/a/proj/standardized_conv2d/kernel  [1, 1, c, 4 c]
    resnet/group_norm/gamma, resnet/group_norm/beta      [32 c]
    resnet/head/conv2d/kernel                            [1, 1, 32 c, classes]
    resnet/head/conv2d/bias                              [classes]

Reference: Kolesnikov et al. 2020, arXiv:1912.11370; the names are those that
google-research/big_transfer and big_vision (`models/bit_paper.py`) read.
"""

from collections.abc import Iterator, Mapping, Set
import contextlib
import math
import os
import re
from typing import Any
import zipfile
import zlib

import flax.core
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import files
from kd_jax.errors import BadInput
from kd_jax.models.bit_resnet import BiTResNet
from kd_jax.models.weights import (
  check_names,
  holds_pickle,
  refuse_pickle,
  shown,
)

# What the last module of a parameter's path is called in a file.
_MODULES = {
  "conv": "standardized_conv2d",
  "norm": "group_norm",
  "conv1": "a/standardized_conv2d",
  "norm1": "a/group_norm",
  "conv2": "b/standardized_conv2d",
  "norm2": "b/group_norm",
  "conv3": "c/standardized_conv2d",
  "norm3": "c/group_norm",
  "proj": "a/proj/standardized_conv2d",
  "head": "head/conv2d",
}
_HEAD = "resnet/head/"

Path = str | os.PathLike[str]


def load(
  path: Path, like: BiTResNet | Mapping[str, Any], *, head: bool = True
) -> dict[str, Any]:
  """Reads the parameters of a `BiTResNet` from a file.

  Args:
    path: the file, in the layout of the release.
    like: the model that the file should fit: the module (of 3-channel images),
      or its variables or parameters, whose shapes and dtypes count (abstract
      ones will do).
    head: False leaves the file's head unread, for a model with other classes,
      and keeps the head of `like`: zeros, if `like` is the module.

  Returns:
    The parameters, as NumPy arrays (but for a head that was kept, which is that
    of `like`); `jax.device_put` brings them to a device or shards them over
    several. `like` is left as it is.

  Raises:
    BadInput: if the file cannot be read or does not fit. The message is one
      line that names the first entry that is missing, unknown or misshapen.
    ValueError: if `like` is another model, or has no numbers for its head.

  Example:
    >>> model = BiTResNet(10, depth="R50")
    >>> params = load("BiT-M-R50x1.npz", model, head=False)  # doctest: +SKIP
  """
  flat = _flat(like)
  keys = {_entry(key): key for key in flat}
  if not head:
    kept = [keys.pop(entry) for entry in list(keys) if entry.startswith(_HEAD)]
    if any(isinstance(flat[key], jax.ShapeDtypeStruct) for key in kept):
      raise ValueError(
        "like has an abstract head; head=False keeps it, so it should be arrays"
      )
  with _opened(path) as archive:
    names = _names(path, archive.namelist())
    if not head:
      names = {n: m for n, m in names.items() if not n.startswith(_HEAD)}
    check_names(
      f"{path} is of another architecture",
      keys.keys(),
      names.keys(),
      _head_hint(keys.keys() ^ names.keys()),
    )
    for entry, key in keys.items():
      _check(path, entry, archive, names[entry], flat[key])
    loaded = {
      key: _read(archive, names[entry], flat[key])
      for entry, key in keys.items()
    }
  return flax.traverse_util.unflatten_dict(flat | loaded)


def save(path: Path, params: Mapping[str, Any]) -> None:
  """Writes the parameters of a `BiTResNet` in the layout of the release.

  Args:
    path: the file, under this very name; written whole or not at all.
    params: the parameters, or variables that hold them; stored as float32.

  Raises:
    ValueError: if there are parameters that no `BiTResNet` has.

  Example:
    >>> save("student.npz", state.params["student"])  # doctest: +SKIP
  """
  entries: dict[str, Any] = {}
  for key, leaf in _flat(params).items():
    entry, array = _entry(key), np.asarray(leaf, np.float32)
    entries[entry] = array.reshape(_shape_in_file(entry, array))
  files.write(path, lambda file: np.savez(file, **entries))


def _flat(like: BiTResNet | Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
  """The parameters by path; those of a module abstract, but for its head."""
  if isinstance(like, BiTResNet):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(like.init, jax.random.key(0), images)["params"]
    zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)
    params = dict(params) | {"head": jax.tree.map(zeros, params["head"])}
  else:
    params = flax.core.unfreeze(like.get("params", like))
  return flax.traverse_util.flatten_dict(params)


def _entry(key: tuple[str, ...]) -> str:
  """What a parameter is called in a file."""
  *parents, module, leaf = ("", *key)
  if module not in _MODULES:
    raise ValueError(
      f"{'/'.join(key)} is no parameter of a BiTResNet; the model should be one"
    )
  if "norm" in module:
    leaf = {"scale": "gamma", "bias": "beta"}.get(leaf, leaf)
  parents = ["root_block" if name == "root" else name for name in parents[1:]]
  return "/".join(["resnet", *parents, _MODULES[module], leaf])


def _shape_in_file(entry: str, leaf: Any) -> tuple[int, ...]:
  """The head of the release is a 1x1 convolution."""
  if entry == _HEAD + "conv2d/kernel":
    return (1, 1, *leaf.shape)
  return tuple(leaf.shape)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
  """Opens a file; whatever makes it unreadable becomes one line."""
  refuse_pickle(path, archive=True)
  try:
    with open(path, "rb") as file:
      if not zipfile.is_zipfile(file):
        raise BadInput(f"{path} is not an .npz file, or it has been cut short")
      file.seek(0)
      with zipfile.ZipFile(file) as archive:
        yield archive
  except BadInput:
    raise
  except (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,  # Encrypted, or an unknown compression.
    MemoryError,  # A damaged header may ask for any size.
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise BadInput(f"{path} cannot be read: {reason}") from error


def _names(path: Path, stored: list[str]) -> dict[str, str]:
  """Maps the regular name of each entry to the one in the file.

  Some released files number a convolution: `standardized_conv2d_17`.
  """
  names: dict[str, str] = {}
  for name in stored:
    regular = re.sub(
      r"/standardized_conv2d_\d+/", "/standardized_conv2d/", name
    ).removesuffix(".npy")
    if regular in names:
      both = f"{shown(names[regular])} and {shown(name)}"
      raise BadInput(f"{path} has {shown(regular)} twice: {both}")
    if name.endswith((".pkl", ".pickle")):
      raise holds_pickle(path)
    names[regular] = name
  return names


def _check(
  path: Path, entry: str, archive: zipfile.ZipFile, name: str, leaf: Any
) -> None:
  """Raises BadInput unless an entry is what it should be.

  Reads no more of it than its header: unpacked, it may have any size.
  """
  info = archive.getinfo(name)
  if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise BadInput(f"{path}: {entry} is compressed as no .npz file is")
  with archive.open(info) as file:
    # The only version of numbers, and whose header has no more than 64 KiB.
    if file.read(8) != np.lib.format.magic(1, 0):
      raise BadInput(f"{path}: {entry} is not an array")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    header = file.tell()
  if dtype.hasobject:
    raise holds_pickle(path)
  if not np.issubdtype(dtype, np.floating):
    raise BadInput(
      f"{path}: {entry} has dtype {dtype}; it should be floating point"
    )
  expected = _shape_in_file(entry, leaf)
  if shape != expected:
    if entry.startswith(_HEAD) and shape[:-1] == expected[:-1]:
      raise BadInput(
        f"{path} has {shape[-1]} classes; it should have {expected[-1]}"
        + _head_hint({entry})
      )
    raise BadInput(
      f"{path} is of another architecture: {entry} has shape {shape}; it "
      f"should be {expected}" + _head_hint({entry})
    )
  size = header + math.prod(shape) * dtype.itemsize
  if info.file_size != size:
    raise BadInput(
      f"{path}: {entry} has {info.file_size} bytes; it should have {size}"
    )


def _read(archive: zipfile.ZipFile, name: str, leaf: Any) -> np.ndarray:
  """An entry with the shape and dtype of the model's parameter."""
  with archive.open(name) as file:
    array = np.lib.format.read_array(file, allow_pickle=False)
  return array.reshape(leaf.shape).astype(leaf.dtype)


def _head_hint(names: Set[str]) -> str:
  if all(name.startswith(_HEAD) for name in names):
    return " (head=False leaves the head out)"
  return ""
