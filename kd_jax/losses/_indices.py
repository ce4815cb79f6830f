"""Integers that name rows of an array: of a memory bank, or a graph's nodes."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kd_jax.losses import _checks as checks


def rows(
  name: str,
  numbers: ArrayLike,
  size: int,
  reason: str,
  where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Checks row numbers where they can be seen, flags them where not.

  Args:
    name: the argument's name.
    numbers: [batch, ...] integers.
    size: how many rows there are.
    reason: why the numbers should be below `size`, for the message.
    where: [batch] bool or None; masked numbers may be anything.

  Returns:
    ([batch, ...] int32, all of them usable as an index; the same shape,
    float32, 1 where the number is a row and NaN where not).

  Raises:
    TypeError: if the numbers are not integers.
    ValueError: if a number that is not traced names no row.
  """
  dtype = jnp.result_type(numbers)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"{name} has dtype {dtype}; it should be integer")
  if where is not None:
    where = where.reshape(where.shape + (1,) * (jnp.ndim(numbers) - 1))
  if checks._is_known(numbers) and (where is None or checks._is_known(where)):
    # In NumPy, so that 64-bit numbers are compared before they are cut to 32.
    seen = np.asarray(numbers)
    wrong = (seen < 0) | (seen >= size)
    if where is not None:
      wrong &= np.asarray(where)
    if wrong.any():
      index = np.unravel_index(np.argmax(wrong), wrong.shape)
      place = ", ".join(str(i) for i in index)
      raise ValueError(
        f"{name}[{place}] is {seen[index]}; it should be from 0 to {size - 1}, "
        f"as {reason}"
      )
  numbers = jnp.asarray(numbers).astype(jnp.int32)
  if where is not None:
    numbers = jnp.where(where, numbers, 0)
  known = (numbers >= 0) & (numbers < size)
  return jnp.where(known, numbers, 0), jnp.where(known, 1.0, jnp.nan)
