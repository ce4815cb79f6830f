"""Which examples are in which batch: a pure function of (seed, step).

The step counter is the whole state of the iterator: a restarted run, another
number of devices and another process all see the same batches.
"""

from collections.abc import Iterator
import functools
import operator

import numpy as np

_MAX_EXAMPLES = 2**31 - 1  # Positions are int32.


def batch_ids(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
  """Positions of the examples in batch number `step`.

  Each epoch is a new random permutation of the n examples, cut into
  `n // batch_size` full batches. The remainder is dropped, a different one in
  each epoch.

  Args:
    seed: the seed of the order, 0 <= seed < 2**64.
    step: the number of the batch, from 0.
    batch_size: examples in a batch.
    n: examples in the source.

  Returns:
    int32[batch_size], distinct, each in [0, n).

  Raises:
    ValueError: if a number is out of range, or the batch is larger than the
      source.
    TypeError: if one is not an integer.

  Example:
    >>> batch_ids(seed=0, step=1, batch_size=3, n=6)
    array([5, 4, 3], dtype=int32)
  """
  epoch = epoch_of(step, batch_size, n)
  seed = _check_seed(seed)
  start = int(step - epoch * (n // batch_size)) * batch_size
  return _permutation(seed, epoch, int(n))[start : start + batch_size].copy()


def partners(seed: int, view: int, positions: np.ndarray, n: int) -> np.ndarray:
  """With which example each one is mixed: another permutation for each view.

  The partner belongs to the example and the view, not to the batch, so a mixed
  image can be made again at any time, on any number of devices.

  Args:
    seed: the seed of the order, 0 <= seed < 2**64.
    view: the number of the view or epoch, from 0.
    positions: int[batch], in [0, n).
    n: examples in the source.

  Returns:
    int32[batch], in [0, n); once in n cases an example itself.

  Raises:
    ValueError: if a number is out of range.
  """
  _check_sizes(1, n)
  _check_seed(seed)
  if not 0 <= view < 2**63:
    raise ValueError(f"view is {view}; it must be in [0, 2**63)")
  # The upper half of the counter: the lower one orders the epochs.
  return _permutation(int(seed), 2**63 + int(view), int(n))[positions]


def epoch_of(step: int, batch_size: int, n: int) -> int:
  """The epoch that batch number `step` belongs to, from 0.

  Args:
    step: the number of the batch, from 0.
    batch_size: examples in a batch.
    n: examples in the source.

  Returns:
    step // (n // batch_size).

  Raises:
    ValueError: as `batch_ids`.

  Example:
    >>> epoch_of(step=7, batch_size=3, n=10)
    2
  """
  _check_sizes(batch_size, n)
  if _integer("step", step) < 0:
    raise ValueError(f"step is {step}; it must be 0 or more")
  if batch_size > n:
    raise ValueError(
      f"batch_size is {batch_size}, but the data set has only {n} examples"
    )
  return int(step // (n // batch_size))


def eval_batches(
  n: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Batches of one shape that hold each of n examples exactly once.

  The last batch is filled up with position 0, masked out, so that one compiled
  program serves all batches and no example is dropped or counted twice.

  Args:
    n: examples in the source.
    batch_size: examples in a batch; it may be larger than n.

  Returns:
    An iterator of (positions int32[batch_size], mask bool[batch_size]).

  Raises:
    ValueError: if a number is not positive. It is raised by the call itself,
      not by the first batch.

  Example:
    >>> for positions, mask in eval_batches(3, 2):
    ...   print(positions, mask)
    [0 1] [ True  True]
    [2 0] [ True False]
  """
  _check_sizes(batch_size, n)

  def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, n, batch_size):
      positions = np.arange(start, start + batch_size, dtype=np.int64)
      mask = positions < n
      yield np.where(mask, positions, 0).astype(np.int32), mask

  return generate()


def _integer(name: str, value: int) -> int:
  try:
    return operator.index(value)
  except TypeError:
    raise TypeError(f"{name} is {value!r}; it must be an integer") from None


def _check_seed(seed: int) -> int:
  seed = _integer("seed", seed)
  if not 0 <= seed < 2**64:
    raise ValueError(f"seed is {seed}; it must be in [0, 2**64)")
  return seed


def _check_sizes(batch_size: int, n: int) -> None:
  if _integer("batch_size", batch_size) <= 0:
    raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
  if _integer("n", n) <= 0:
    raise ValueError(f"n is {n}: the data set is empty")
  if n > _MAX_EXAMPLES:
    raise ValueError(f"n is {n}; at most {_MAX_EXAMPLES} are supported")


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  # NumPy promises that the raw bits of a bit generator never change, which it
  # does not promise for shuffle() or permutation().
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
  order = np.argsort(bits, kind="stable").astype(np.int32)
  order.flags.writeable = False  # The cache hands out the same array again.
  return order
