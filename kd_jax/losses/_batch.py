"""The batch as a whole, for losses that relate its examples.

Under `jit` arrays are global and every example is there. Under `pmap` or
`shard_map` a device holds a part of the batch; `axis_name` then brings the
others. Gradients flow back through the exchange, so the sum over devices of
the local losses has the gradient of the global one.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

# How many numbers an array may have where it has many for each example. XLA
# writes out most of what it sums on a CPU; some arrays of this size stay in a
# core's cache.
CACHE = 2**15
# The same on an accelerator, which needs more to do at a time.
ROOM = 2**20


def gather(axis_name: str | None, array: jax.Array) -> jax.Array:
  """[n, ...] local examples to [devices * n, ...], those of all devices."""
  if axis_name is None:
    return array
  return lax.all_gather(array, axis_name, axis=0, tiled=True)


def positions(axis_name: str | None, n: int) -> jax.Array:
  """[n] int32, where the local examples stand in the gathered batch."""
  first = 0 if axis_name is None else lax.axis_index(axis_name) * n
  return first + jnp.arange(n, dtype=jnp.int32)


def partners(
  axis_name: str | None, where: jax.Array | None, n: int
) -> jax.Array:
  """Who may be compared with whom: never an example with itself.

  Args:
    axis_name: the mapped axis, or None.
    where: [n] bool, the local mask, or None.
    n: the number of local examples.

  Returns:
    [n, devices * n] bool, True where both examples are valid and differ.
  """
  mask = jnp.ones(n, bool) if where is None else where
  everyone = gather(axis_name, mask)
  other = positions(axis_name, n)[:, None] != jnp.arange(everyone.shape[0])
  return mask[:, None] & everyone & other


def count(axis_name: str | None, where: jax.Array | None, n: int) -> jax.Array:
  """float32 scalar, the number of valid examples in the whole batch."""
  mask = jnp.ones(n, bool) if where is None else where
  return jnp.sum(gather(axis_name, mask), dtype=jnp.float32)


def by_row(
  function: Callable[..., jax.Array], numbers: int, *arrays: jax.Array
) -> jax.Array:
  """What a function gives for each row, with the memory of a few rows.

  As `jax.vmap`, but for some rows at a time, and what the function computes on
  the way is not kept: the gradient computes it again.

  Args:
    function: of one row of each array.
    numbers: how many the function's largest array has.
    *arrays: [n, ...], at least one.

  Returns:
    [n, ...].
  """
  n = arrays[0].shape[0]
  room = CACHE if jax.default_backend() == "cpu" else ROOM
  chunks = -(-n // max(1, room // max(1, numbers)))
  size = -(-n // max(1, chunks))
  each = jax.checkpoint(
    function if size == 1 else jax.vmap(function), prevent_cse=False
  )
  if size == 1:
    return lax.map(lambda rows: each(*rows), arrays)

  def split(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, [(0, size * chunks - n)] + [(0, 0)] * (x.ndim - 1))
    # Every chunks-th row, not neighbours: where the rows are divided over
    # devices, each has its share of every chunk then.
    return x.reshape(size, chunks, *x.shape[1:]).swapaxes(0, 1)

  found = lax.map(lambda rows: each(*rows), tuple(map(split, arrays)))
  return found.swapaxes(0, 1).reshape(size * chunks, *found.shape[2:])[:n]
