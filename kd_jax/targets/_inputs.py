"""What the targets ask of their arguments, on top of the losses' checks."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks


def logits(
  where: ArrayLike | None, axis: int, **arrays: ArrayLike
) -> tuple[list[jax.Array], jax.Array | None]:
  """Checks logits of one shape; masked examples become zeros.

  Args:
    where: [...] bool or None.
    axis: the class axis.
    **arrays: [..., classes] float, by argument name.

  Returns:
    (the arrays in float32, the mask).
  """
  converted = checks.floats(**arrays)
  checks.same_shape(**dict(zip(arrays, converted, strict=True)))
  shape = checks.example_shape(next(iter(arrays)), converted[0], axis)
  mask = checks.valid(where, shape)
  return checks.select(mask, *converted, axis=axis), mask


def count(name: str, value: Any, most: int | None = None) -> int:
  """A whole number from 1 to `most`."""
  wanted = "at least 1" if most is None else f"from 1 to {most}"
  try:
    number = operator.index(value)
  except TypeError:
    raise TypeError(
      f"{name} is {value!r}; it should be a whole number, {wanted}"
    ) from None
  if number < 1 or (most is not None and number > most):
    raise ValueError(f"{name} is {number}; it should be {wanted}")
  return number


def absent(target: jax.Array, here: jax.Array) -> jax.Array:
  """The target, -inf where there is no such class."""
  return jnp.where(here, target, -jnp.inf)
