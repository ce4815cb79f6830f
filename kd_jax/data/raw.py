"""Raw image data sets, checked: what `prepare` stores, and IDX files.

Everything is checked before it is believed: magic numbers, shapes, counts,
labels, truncation. What is wrong raises `BadInput` with one line that names
the file.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import gzip
import hashlib
import pathlib
import re
from typing import Any
import zlib

import numpy as np

from kd_jax.data import png
from kd_jax.errors import BadInput

_IDX_SPLITS = {"train": "train", "test": "test", "t10k": "test"}
_IDX_NAME = re.compile(
  r"(?:.*[-_])?(train|t10k|test)[-_](images|labels)[-_.]idx\d[-_]ubyte(?:\.gz)?"
)
_IDX_DIMS = {"images": 3, "labels": 1}
_MAX_IDX = 2**34  # Bytes of data in one file.
_DEFLATE_RATIO = 1032  # No deflate stream can unpack to more.


@dataclasses.dataclass(frozen=True)
class RawSplit:
  """The examples of one split, in the order of the raw files.

  Attributes:
    labels: int64[n].
    image: the bytes of the PNG or JPEG file to store for a position.
    digest: SHA-256 of the content, the same however it was packed.
  """

  labels: np.ndarray
  image: Callable[[int], bytes]
  digest: str


@dataclasses.dataclass(frozen=True)
class RawData:
  """A raw data set that has been checked.

  Attributes:
    splits: by name.
    class_names: a label is an index into it.
    image_shape: (height, width, channels), None where it varies.
    files: SHA-256 of the unpacked IDX files, by the names that MNIST's have.
    lossy: True if the images are JPEG files.
  """

  splits: Mapping[str, RawSplit]
  class_names: tuple[str, ...]
  image_shape: tuple[int | None, int | None, int]
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)
  lossy: bool = False

  @property
  def digest(self) -> str:
    """SHA-256 of all that is stored."""
    parts = [repr((self.class_names, self.image_shape))]
    parts += [f"{name} {self.splits[name].digest}" for name in self.splits]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def from_arrays(
  splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
  class_names: Sequence[str] | None = None,
) -> RawData:
  """A data set from arrays in memory.

  Args:
    splits: (uint8[n, height, width, 1 or 3] images, int[n] labels) by name.
    class_names: by default "0", "1", ... up to the largest label.

  Returns:
    The data set.

  Raises:
    BadInput: if the counts or shapes do not fit, a split is empty or a label
      is outside the classes.
  """
  if not splits:
    raise BadInput("there are no splits")
  shapes = {name: images.shape[1:] for name, (images, _) in splits.items()}
  for name, (images, labels) in splits.items():
    if images.dtype != np.uint8 or images.ndim != 4:
      raise BadInput(
        f"{name} images are {images.dtype}{list(images.shape)}; they must be "
        "uint8[n, height, width, channels]"
      )
    if len(images) == 0:
      raise BadInput(f"{name} is empty")
    if labels.shape != images.shape[:1]:
      raise BadInput(
        f"{name} has {len(images)} images but {len(labels)} labels"
      )
    if shapes[name] != next(iter(shapes.values())):
      raise BadInput(f"the images of the splits differ in shape: {shapes}")
  if class_names is None:
    largest = max(int(labels.max()) for _, labels in splits.values())
    class_names = [str(label) for label in range(largest + 1)]
  for name, (_, labels) in splits.items():
    check_labels(labels, len(class_names), name)
  return RawData(
    splits={
      name: _array_split(images, labels)
      for name, (images, labels) in splits.items()
    },
    class_names=tuple(class_names),
    image_shape=next(iter(shapes.values())),
  )


def find_idx(directory: pathlib.Path) -> dict[pathlib.Path, tuple[str, str]]:
  """The IDX files in a directory by name: path -> (split, kind), sorted."""
  found = {}
  for path in sorted(directory.iterdir()):
    if match := _IDX_NAME.fullmatch(path.name):
      found[path] = (_IDX_SPLITS[match[1]], match[2])
  return found


def read_idx(
  directory: pathlib.Path, class_names: Sequence[str] | None = None
) -> RawData:
  """Reads grey images and labels in the format of MNIST.

  Args:
    directory: holds files named as train-images-idx3-ubyte, packed with gzip
      or not, and the same for train-labels-idx1 and t10k.
    class_names: the classes; by default "0", "1", ... up to the largest label.

  Returns:
    The data set.

  Raises:
    BadInput: if a file is missing, damaged or does not fit the others.
  """
  paths: dict[tuple[str, str], pathlib.Path] = {}
  for path, key in find_idx(directory).items():
    if key in paths:
      raise BadInput(
        f"{directory} holds both {paths[key].name} and {path.name}: keep one"
      )
    paths[key] = path
  splits, files = {}, {}
  for split, original in (("train", "train"), ("test", "t10k")):
    if split == "test" and not any((split, k) in paths for k in _IDX_DIMS):
      continue
    arrays = {}
    for kind, dims in _IDX_DIMS.items():
      if (split, kind) not in paths:
        raise BadInput(f"{directory} holds no {split} {kind} file")
      arrays[kind], digest = _read_idx_file(paths[split, kind], dims)
      files[f"{original}-{kind}-idx{dims}-ubyte"] = digest
    images, labels = arrays["images"], arrays["labels"]
    if len(images) != len(labels):
      raise BadInput(
        f"{paths[split, 'images']} holds {len(images)} images, but "
        f"{paths[split, 'labels']} {len(labels)} labels"
      )
    splits[split] = (images[..., None], labels.astype(np.int64))
  return dataclasses.replace(from_arrays(splits, class_names), files=files)


def _read_idx_file(path: pathlib.Path, dims: int) -> tuple[np.ndarray, str]:
  """The array in an IDX file of unsigned bytes, and its content's SHA-256."""
  with path.open("rb") as file:
    packed = file.read(2) == b"\x1f\x8b"
  limit = path.stat().st_size * (_DEFLATE_RATIO if packed else 1)
  try:
    with contextlib.ExitStack() as stack:
      reader: Any = stack.enter_context(path.open("rb"))
      if packed:
        reader = stack.enter_context(gzip.open(reader))
      head = reader.read(4 + 4 * dims)
      want = bytes([0, 0, 8, dims])
      if head[:4] != want:
        raise BadInput(
          f"{path} starts with {head[:4].hex()}, not with the magic number "
          f"{want.hex()} of IDX files of this kind"
        )
      if len(head) < 4 + 4 * dims:
        raise BadInput(f"{path} is cut off in its header")
      shape = tuple(int(size) for size in np.frombuffer(head, ">u4", dims, 4))
      size = int(np.prod(shape, dtype=object))
      if size == 0:
        raise BadInput(f"{path} is empty: its header says {list(shape)}")
      if size > min(limit, _MAX_IDX):
        raise BadInput(
          f"{path} says that it holds {list(shape)}, more than it can"
        )
      data = reader.read(size + 1)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise BadInput(f"{path} is damaged or cut off: {error}") from error
  if len(data) != size:
    what = "is cut off" if len(data) < size else "goes on after its end"
    raise BadInput(
      f"{path} {what}: its header {list(shape)} asks for {size} bytes of data"
      + (f", it has {len(data)}" if len(data) < size else "")
    )
  digest = hashlib.sha256(head + data).hexdigest()
  return np.frombuffer(data, np.uint8).reshape(shape), digest


def _array_split(images: np.ndarray, labels: np.ndarray) -> RawSplit:
  digest = hashlib.sha256(repr(images.shape).encode())
  digest.update(images.tobytes())
  digest.update(labels.astype("<i8").tobytes())
  return RawSplit(
    labels=labels.astype(np.int64),
    image=lambda index: png.encode(images[index]),
    digest=digest.hexdigest(),
  )


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
  """Raises BadInput that names the first label outside the classes."""
  bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if bad.size:
    raise BadInput(
      f"label {labels[bad[0]]} of {where} image {bad[0]} is outside the "
      f"{num_classes} classes [0, {num_classes - 1}]"
    )
