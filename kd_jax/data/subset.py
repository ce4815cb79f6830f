"""Which examples a student gets to see."""

from collections.abc import Sequence

import numpy as np

from kd_jax.data import order


def transfer_set(
  labels: np.ndarray,
  *,
  classes: Sequence[int] = (),
  fraction: float = 1.0,
  seed: int = 0,
) -> np.ndarray:
  """Positions of a part of a data set: some classes, some of the examples.

  Args:
    labels: int[n].
    classes: the classes to keep; () is all.
    fraction: share of the data set from which they are taken, in (0, 1]; drawn
      at random, not class by class.
    seed: of the draw.

  Returns:
    int64, ascending positions.

  Raises:
    ValueError: if the fraction is out of range.

  Example:
    >>> transfer_set(np.array([0, 1, 2, 1]), classes=(1, 2))
    array([1, 2, 3])
  """
  if not 0 < fraction <= 1:
    raise ValueError(f"fraction is {fraction}; it must be in (0, 1]")
  n = len(labels)
  take = np.ones(n, bool)
  if len(classes):
    take &= np.isin(labels, classes)
  if fraction < 1:
    size = max(1, round(fraction * n))
    drawn = np.zeros(n, bool)
    drawn[order.batch_ids(seed, 0, size, n)] = True
    take &= drawn
  return np.flatnonzero(take)
