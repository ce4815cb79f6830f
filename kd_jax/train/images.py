"""Training images: on the device, or read and cropped on the host."""

from collections.abc import Callable, Mapping, Sequence
import os
import sys
from typing import Any

import jax
import numpy as np

from kd_jax import teachers
from kd_jax.data import crops, order
from kd_jax.data.source import Arrays, Source, ahead, to_arrays


class Images:
  """What a training asks of its images, wherever they are.

  Images of one size go to the device as a whole, and the step makes their
  views. Images of many sizes are decoded and cropped on the host, see
  `data.crops`; what remains (a flip, mixup) is the step's.

  Attributes:
    n: how many there are.
    arrays: all of them; None if they are read on the host.
  """

  def __init__(
    self,
    source: Source,
    *,
    crop: Mapping[str, Any] | None = None,
    evaluation: Sequence[int] = (),
    readers: int = 4,
  ):
    """Loads them, unless they are to be read on the host.

    Args:
      source: where they come from.
      crop: None keeps them on the device; else `size`, `area`, `aspect` of
        `crops.random_crops`, made on the host.
      evaluation: `resize` and `size` of `crops.central`, for `evaluated`. ()
        leaves the images whole, which needs images of one size.
      readers: threads that read ahead.

    Raises:
      ValueError: if the images are to be on the device but vary in size, or
        are to be cropped for neither.
    """
    whole = all(isinstance(side, int) for side in evaluation)
    if len(evaluation) not in (0, 2) or not whole:
      raise ValueError(
        f"evaluation is {tuple(evaluation)}; it should be (resize, size) or ()"
      )
    if crop is not None and not evaluation:
      raise ValueError("evaluation is (); images cropped on the host need it")
    self.n = len(source)
    self.arrays = to_arrays(source) if crop is None else None
    self._source, self._crop = source, crop
    self._evaluation, self._readers = evaluation, readers

  @property
  def class_names(self) -> tuple[str, ...]:
    """The name of each class; a label is an index into it."""
    return self._source.class_names

  @property
  def channels(self) -> int:
    """Of an image."""
    return self._source[0]["image"].shape[-1]

  def fingerprint(self) -> str:
    """Their number and a digest; of images on the host, of 16 among them."""
    if self.arrays is not None:
      return teachers.fingerprint(self.arrays)
    shown = np.linspace(0, self.n - 1, 16).astype(int)
    few = [dict(self._source[int(i)]) for i in shown]
    return f"{self.n} examples, {teachers.digest(few)[:16]}"

  def some(self, count: int, seed: int = 0) -> "Images":
    """A part of them, drawn at random."""
    drawn = order.batch_ids(seed, 0, count, self.n)
    return Images(
      self._source.subset(np.sort(drawn)),
      crop=self._crop,
      evaluation=self._evaluation,
      readers=self._readers,
    )

  def evaluated(self) -> Arrays:
    """All of them as they are evaluated: {"id", "image", "label"}."""
    if self._evaluation:
      return crops.central_arrays(self._source, *self._evaluation)
    assert self.arrays is not None  # see __init__
    return self.arrays

  def rows(
    self,
    positions: np.ndarray,
    view: int,
    *,
    keys: Sequence[jax.Array],
    partners: int | None = None,
  ) -> Arrays:
    """The examples of which the step makes one view.

    Args:
      positions: int[batch].
      view: its number, or the epoch.
      keys: of the run's views, see `crops.random_crops`.
      partners: a seed adds `partner`, the rows to mix with, see
        `order.partners`.

    Returns:
      {"id", "image", "label", "epoch"} and perhaps "other_image", "partner".
    """
    epoch = np.full(len(positions), view, np.int32)
    if self.arrays is None:
      assert self._crop is not None
      read = crops.random_crops(self._source, keys, **self._crop)
      return {**read(positions, view), "epoch": epoch}
    rows: dict[str, Any] = {k: v[positions] for k, v in self.arrays.items()}
    if partners is not None:
      other = order.partners(partners, view, positions, self.n)
      rows["partner"] = {k: v[other] for k, v in self.arrays.items()}
    return {**rows, "epoch": epoch}

  def bank(
    self,
    directory: str | os.PathLike[str],
    ask: Callable[[Any, Any], jax.Array],
    variables: Any,
    *,
    views: int,
    batch_size: int,
    keys: Sequence[jax.Array],
    partners: int | None = None,
    manifest: Mapping[str, Any],
  ) -> np.ndarray:
    """What a teacher says of a finite bank of views, see `teachers.bank`.

    Args:
      directory: where it is cached.
      ask: `ask(variables, rows) -> logits`, compiled here.
      variables: the teacher's.
      views: of each example.
      batch_size: examples that the teacher is asked at a time.
      keys: as for `rows`.
      partners: likewise.
      manifest: what else the logits depend on: how `ask` makes a view.

    Returns:
      float32 [n, views, classes].

    Raises:
      BadInput: if the directory holds another bank.
      ValueError: if the images are read on the host, where nothing pins them.
    """
    if self.arrays is None:
      raise ValueError("images read on the host have no bank")
    compiled = jax.jit(ask)
    one = self.rows(np.zeros(1, np.int32), 0, keys=keys, partners=partners)
    classes = jax.eval_shape(ask, variables, one).shape[-1]
    return teachers.bank(
      directory,
      lambda rows, view: compiled(variables, rows),
      lambda at, view: self.rows(at, view, keys=keys, partners=partners),
      n=self.n,
      classes=classes,
      views=views,
      batch_size=min(batch_size, self.n),
      manifest={
        **manifest,
        "teacher": teachers.digest(variables),
        "data": teachers.digest(self.arrays),
        "keys": [jax.random.key_data(key).tolist() for key in keys],
        "partners": partners,
      },
      progress=lambda line: print(line, file=sys.stderr, flush=True),
    )

  def feed(
    self,
    seed: int,
    batch_size: int,
    *,
    keys: Sequence[jax.Array],
    views: int = 0,
    partners: bool = False,
    columns: Mapping[str, np.ndarray] | None = None,
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """How `Classifier.fit` gets at them.

    Args:
      seed: of the order.
      batch_size: examples in a batch.
      keys: as for `rows`.
      views: of each image, which then come again; 0 is a new one for ever.
      partners: see `train.index_batches`; images from the host are mixed
        within their batch.
      columns: [n, ...] what else belongs to each image, by name; it comes with
        the batches.

    Returns:
      (entries of `frozen`, arguments of `Classifier.fit`).

    Raises:
      ValueError: if `views` is given for images that are read on the host.
    """
    if self.arrays is not None:
      data = {**self.arrays, **(columns or {})}
      return {"data": data}, {"views": views or None, "partners": partners}
    if views:
      raise ValueError(
        f"views is {views}; images read on the host have no bank"
      )
    assert self._crop is not None
    read = crops.crop_batches(
      crops.random_crops(self._source, keys, **self._crop),
      seed,
      batch_size,
      self.n,
      columns,
    )
    return {}, {
      "batches": ahead(read, self._readers),
      "steps_per_epoch": self.n // batch_size,
    }
