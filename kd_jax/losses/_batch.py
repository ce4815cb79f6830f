"""The batch as a whole, for losses that relate its examples.

Under `jit` arrays are global and every example is there. Under `pmap` or
`shard_map` a device holds a part of the batch; `axis_name` then brings the
others. Gradients flow back through the exchange, so the sum over devices of
the local losses has the gradient of the global one.
"""

import jax
from jax import lax
import jax.numpy as jnp


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
