"""Labelled images by position, stacked in memory or read batch by batch.

An example's `id` names it for ever: random views are keyed by it, and a
subset keeps the ids of the whole.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import importlib.util
import operator
from typing import Any, TypeVar

import numpy as np

from kd_jax.data import order
from kd_jax.errors import BadInput

Arrays = dict[str, np.ndarray]
T = TypeVar("T")
Images = Sequence[np.ndarray] | np.ndarray
# ids -> (images, labels), in the order of the ids.
Fetch = Callable[[np.ndarray], tuple[Images, np.ndarray]]

_CHUNK = 8192  # Examples that are decoded and then stacked at a time.


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Labelled images by position, with what a model must know about them.

  Attributes:
    name: the data set's name.
    split: the part of it.
    class_names: the name of each class; a label is an index into it.
    image_shape: (height, width, channels), None where it varies.
    ids: int32[n], the distinct ids of the examples by position.
    fetch: reads examples by id; the other methods check what it returns.
  """

  name: str
  split: str
  class_names: tuple[str, ...]
  image_shape: tuple[int | None, ...]
  ids: np.ndarray
  fetch: Fetch

  @property
  def num_classes(self) -> int:
    """The number of classes."""
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self.ids)

  def __getitem__(self, position: int) -> dict[str, Any]:
    """The example at a position: {"id", "image": uint8[H, W, C], "label"}."""
    ids, images, labels = self.read(np.array([operator.index(position)]))
    return {"id": ids[0], "image": images[0], "label": labels[0]}

  def rows(self, positions: np.ndarray) -> Arrays:
    """Stacked examples.

    Args:
      positions: int[k] positions in this source.

    Returns:
      {"id": int32[k], "image": uint8[k, H, W, C], "label": int32[k]}.

    Raises:
      ValueError: if a label is outside the classes or the images differ in
        shape; the message names the id.
    """
    ids, images, labels = self.read(positions)
    return {"id": ids, "image": self._stack(images, ids), "label": labels}

  def subset(self, positions: slice | np.ndarray) -> "Source":
    """The examples at some positions, with the ids that they have here.

    Args:
      positions: a slice, distinct int[k] positions or a bool[n] mask.

    Returns:
      A source of those examples, in that order.

    Raises:
      ValueError: if nothing is chosen, a position is out of range or occurs
        twice.
    """
    n = len(self)
    if isinstance(positions, slice):
      chosen = np.arange(n)[positions]
    else:
      given = np.asarray(positions)
      if given.dtype == np.bool_ and given.shape == (n,):
        chosen = np.flatnonzero(given)
      elif given.ndim == 1 and (
        given.size == 0 or np.issubdtype(given.dtype, np.integer)
      ):
        chosen = given
      else:
        raise ValueError(
          f"positions is {given.dtype}{list(given.shape)}; it must be a "
          f"slice, int[k] or bool[{n}]"
        )
    if chosen.size == 0:
      raise ValueError(f"positions chooses nothing of {self._where()}")
    if chosen.min() < 0 or chosen.max() >= n:
      bad = chosen[(chosen < 0) | (chosen >= n)][0]
      raise ValueError(
        f"positions holds {bad}, but {self._where()} has {n} examples"
      )
    if np.unique(chosen).size != chosen.size:
      raise ValueError("positions holds the same position twice")
    return dataclasses.replace(self, ids=read_only(self.ids[chosen]))

  def _where(self) -> str:
    return f"data set {self.name!r} split {self.split!r}"

  def read(
    self, positions: np.ndarray
  ) -> tuple[np.ndarray, Images, np.ndarray]:
    """Examples whose images may differ in shape.

    Args:
      positions: int[k] positions in this source.

    Returns:
      (ids int32[k], k images uint8[H, W, C], labels int32[k]).

    Raises:
      BadInput: if a label is outside the classes; the message names the id.
    """
    ids = self.ids[positions]
    images, labels = self.fetch(ids)
    bad = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
    if bad.size:
      first = bad[0]
      raise BadInput(
        f"label {labels[first]} of id {ids[first]} in {self._where()} is "
        f"outside its {self.num_classes} classes [0, {self.num_classes - 1}]"
      )
    return ids, images, labels.astype(np.int32)

  def _stack(self, images: Images, ids: np.ndarray) -> np.ndarray:
    if isinstance(images, np.ndarray):
      return images
    shape = images[0].shape
    for image, row in zip(images, ids, strict=True):
      if image.shape != shape:
        raise BadInput(
          f"images differ in shape in {self._where()}: id {ids[0]} is "
          f"{list(shape)}, id {row} is {list(image.shape)}; crop or resize "
          "them to one shape first"
        )
    return np.stack(images)


def to_arrays(source: Source) -> Arrays:
  """The whole source in memory, for data that fits on the device.

  Args:
    source: where the examples come from; all images have one shape.

  Returns:
    {"id": int32[n], "image": uint8[n, H, W, C], "label": int32[n]}.

  Raises:
    ValueError: if the source is empty, a label is outside the classes, or the
      images differ in shape.
  """
  if not len(source):
    raise ValueError(
      f"data set {source.name!r} split {source.split!r} is empty"
    )
  positions = np.arange(len(source))
  chunks = [
    source.rows(positions[start : start + _CHUNK])
    for start in range(0, len(source), _CHUNK)
  ]
  shapes: dict[tuple[int, ...], int] = {}
  for chunk in chunks:
    shapes.setdefault(chunk["image"].shape[1:], chunk["id"][0])
  if len(shapes) > 1:
    (a, id_a), (b, id_b) = list(shapes.items())[:2]
    raise ValueError(
      f"images differ in shape in data set {source.name!r} split "
      f"{source.split!r}: id {id_a} is {list(a)}, id {id_b} is {list(b)}; "
      "crop or resize them to one shape first"
    )
  return {
    key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]
  }


def batch_at(source: Source, seed: int, step: int, batch_size: int) -> Arrays:
  """Batch number `step`, read on the host: a pure function of its arguments.

  Args:
    source: where the examples come from.
    seed: the seed of the order.
    step: the number of the batch, from 0.
    batch_size: examples in a batch.

  Returns:
    {"id": int32[b], "epoch": int32[b], "image": uint8[b, H, W, C],
    "label": int32[b]}.

  Raises:
    ValueError: as `order.batch_ids` and `Source.rows`.
  """
  positions = order.batch_ids(seed, step, batch_size, len(source))
  epoch = order.epoch_of(step, batch_size, len(source))
  return {
    **source.rows(positions),
    "epoch": np.full(batch_size, epoch, np.int32),
  }


def ahead(read: Callable[[int], T], num_threads: int = 4) -> Callable[[int], T]:
  """Reads batches ahead of time, for data that does not fit on the device.

  Threads (Grain) call `read` for the steps that come next; their number
  changes nothing but the speed.

  Args:
    read: `read(step)`, a pure function, such as `batch_at` of a source.
    num_threads: threads that read, each a batch; 0 reads when asked.

  Returns:
    The same function. It is fast when the steps come in order; after a jump it
    begins to read ahead from there.

  Raises:
    ValueError: if num_threads is negative.
    ModuleNotFoundError: if grain is not installed.
  """
  if num_threads < 0:
    raise ValueError(f"num_threads is {num_threads}; it must be 0 or more")
  if num_threads == 0:
    return read
  require("grain", "grain")
  import grain

  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  upcoming: Iterator[T] = iter(())
  expected = -1

  def batches(step: int) -> T:
    nonlocal upcoming, expected
    if step != expected:
      steps = grain.MapDataset.range(step, step + 2**40)
      upcoming = iter(steps.map(read).to_iter_dataset(options))
    expected = step + 1
    return next(upcoming)

  return batches


def require(module: str, packages: str) -> None:
  """Raises ModuleNotFoundError with the line that installs the module."""
  if importlib.util.find_spec(module) is None:
    raise ModuleNotFoundError(
      f"{module} is not installed: pip install {packages}"
    )


def read_only(ids: np.ndarray) -> np.ndarray:
  """The ids as an int32 array that nobody can change by accident."""
  ids = ids.astype(np.int32)
  ids.flags.writeable = False
  return ids
