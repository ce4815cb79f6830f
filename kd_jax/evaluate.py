"""Predictions for every example exactly once, and what they are worth."""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial
import numpy as np
from numpy.typing import ArrayLike

from kd_jax import calibration

# One jitted function for every Partial: its arguments (a model's variables) are
# traced, so a model that goes on training does not compile anew.
_call = jax.jit(lambda function, batch: function(batch))


def predict(
  apply_fn: Callable[[Any], jax.Array],
  inputs: Any,
  *,
  batch_size: int,
  devices: Sequence[jax.Device] | None = None,
  on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
  """Logits of all examples, in order, each computed exactly once.

  The last batch is filled up with copies of an example and the filling is cut
  off again, so one shape is compiled, whatever the number of examples. The
  model must treat examples one by one (BatchNorm in evaluation mode).

  Use `jax.tree_util.Partial` for anything that is evaluated more than once,

      predict(Partial(logits_of, variables), images, batch_size=500)

  with `logits_of(variables, images)` defined once: the program is compiled
  once. A new closure or lambda each time compiles each time, with the
  variables in it as constants.

  Args:
    apply_fn: batch -> logits [batch, classes], pure; `inputs` with
      another leading size goes in.
    inputs: array or pytree of arrays that share the leading axis n. Batches
      are cut on the host.
    batch_size: examples a call; over all devices.
    devices: devices of this process to spread each batch over; None leaves
      the placement to JAX.
    on_batch: called with the number of examples done after each batch: for a
      progress bar, or to raise when the process is asked to stop.

  Returns:
    [n, classes] float32.

  Raises:
    TypeError: if the logits are not floating point.
    ValueError: if there is no example, the leading axes differ, `batch_size`
      is not positive or the devices do not divide it, or the logits are not
      [batch, classes].
  """
  inputs = jax.tree.map(np.asarray, inputs)
  n = _examples(jax.tree.leaves(inputs))
  if batch_size < 1:
    raise ValueError(f"batch_size is {batch_size}; it should be at least 1")
  place, replicate = _placement(batch_size, devices)
  function: Callable[[Any], jax.Array]
  if isinstance(apply_fn, Partial):
    function = functools.partial(_call, replicate(apply_fn))
  else:
    function = jax.jit(apply_fn)

  def outputs() -> Iterator[jax.Array]:
    for start in range(0, n, batch_size):
      ids = np.minimum(np.arange(start, start + batch_size), n - 1)
      batch = jax.tree.map(lambda array, ids=ids: array[ids], inputs)
      yield function(place(batch))

  rows = []
  for i, logits in enumerate(_one_behind(outputs())):
    rows.append(_to_host(logits, batch_size))
    if on_batch is not None:
      on_batch(min((i + 1) * batch_size, n))
  return np.concatenate(rows)[:n]


def classification(
  logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> dict[str, float]:
  """What a classifier's logits are worth, in exact float64.

  The prediction is the first of the largest logits.

  Args:
    logits: [examples, classes] floating point; -inf marks an absent class.
    labels: [examples] integers in 0..classes-1.
    where: [examples] bool, the examples that count; the rest may be anything.

  Returns:
    `accuracy` in [0, 1], `errors` (how many), `nll` (nats), `ece` (15 bins of
    equal width), `brier` (in [0, 2]) and `count`, the examples that counted.

  Raises:
    TypeError: if a dtype is wrong.
    ValueError: if a shape is wrong, a label is outside the classes, a valid row
      is not finite, or no example counts: there is no accuracy of nothing.

  Example:
    >>> scores = classification(
    ...   np.array([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), np.array([0, 1, 1])
    ... )
    >>> scores["errors"], scores["count"]
    (1, 3)
  """
  z = calibration.select(logits, where)
  y = calibration.select_labels(
    labels, z.shape[1], len(np.asarray(logits)), where
  )
  errors = int((z.argmax(axis=1) != y).sum())
  return {
    "accuracy": (len(y) - errors) / len(y),
    "errors": errors,
    "nll": calibration.nll(z, y),
    "ece": calibration.ece(z, y),
    "brier": calibration.brier(z, y),
    "count": len(y),
  }


def _examples(arrays: list[np.ndarray]) -> int:
  """The leading size that all arrays share."""
  if not arrays or any(array.ndim == 0 for array in arrays):
    raise ValueError("inputs should be arrays with a leading axis of examples")
  sizes = sorted({len(array) for array in arrays})
  if len(sizes) > 1:
    raise ValueError(
      f"inputs have leading axes {sizes}; they should be the same"
    )
  if sizes[0] == 0:
    raise ValueError("inputs holds no example; there is nothing to predict")
  return sizes[0]


def _placement(
  batch_size: int, devices: Sequence[jax.Device] | None
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
  """How to put a batch on the devices, and how what all batches share."""
  if devices is None:
    # Numpy arrays are uncommitted: they follow the variables' placement.
    return (lambda batch: batch), (lambda shared: shared)
  count = len(devices)
  if count == 0:
    raise ValueError(
      "devices is empty; it should name at least one, or be None"
    )
  if batch_size % count:
    raise ValueError(
      f"batch_size is {batch_size}; it should be a multiple of the {count} "
      f"devices, such as {max(count, batch_size // count * count)}"
    )
  mesh = Mesh(np.asarray(devices), ("batch",))
  split = NamedSharding(mesh, PartitionSpec("batch"))
  whole = NamedSharding(mesh, PartitionSpec())
  return (
    lambda batch: jax.device_put(batch, split),
    lambda shared: jax.device_put(shared, whole),
  )


def _one_behind(items: Iterator[jax.Array]) -> Iterator[jax.Array]:
  """Yields each item once the next has been started.

  One batch computes while the one before it is fetched.
  """
  previous = next(items)
  for item in items:
    yield previous
    previous = item
  yield previous


def _to_host(logits: jax.Array, batch_size: int) -> np.ndarray:
  """`logits` as float32 on the host, checked."""
  shape = np.shape(logits)
  if len(shape) != 2 or shape[0] != batch_size:
    raise ValueError(
      f"apply_fn returned shape {shape}; it should be logits "
      f"[{batch_size}, classes]"
    )
  if not jnp.issubdtype(logits.dtype, np.floating):
    raise TypeError(
      f"apply_fn returned dtype {logits.dtype}; logits should be a float"
    )
  return np.asarray(logits).astype(np.float32)
