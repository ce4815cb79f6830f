"""What every loss asks of its arguments: dtypes, shapes, masks, numbers.

All errors are raised while tracing, so they cost nothing in a compiled
program. What can only be known at run time (a traced temperature that is not
positive, a traced label that is no class) turns the result into NaN: a wrong
number that looks right is worse.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np


def floats(**arrays: ArrayLike) -> list[jax.Array]:
  """The arrays in float32; TypeError if one is not floating point."""
  return [_float(name, array) for name, array in arrays.items()]


def same_shape(**arrays: jax.Array) -> None:
  """ValueError if the shapes differ in anything: nothing is broadcast."""
  (first, reference), *others = arrays.items()
  for name, array in others:
    if array.shape != reference.shape:
      raise ValueError(
        f"{first} has shape {reference.shape} and {name} has shape "
        f"{array.shape}; they should be equal (nothing is broadcast)"
      )


def logit_pair(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  axis: int,
  where: ArrayLike | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Checks the inputs of a loss on two arrays of logits.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape.
    axis: the class axis.
    where: [...] bool or None.

  Returns:
    (student, teacher, where): float32, with the masked examples zeroed.
  """
  student, teacher = floats(
    student_logits=student_logits, teacher_logits=teacher_logits
  )
  same_shape(student_logits=student, teacher_logits=teacher)
  mask = valid(where, example_shape("student_logits", student, axis))
  student, teacher = select(mask, student, teacher, axis=axis)
  return student, teacher, mask


def examples(
  where: ArrayLike | None,
  layout: str,
  *,
  output_ndim: int = 1,
  same: bool = True,
  **arrays: ArrayLike,
) -> tuple[list[jax.Array], jax.Array | None]:
  """Checks the arrays of a loss on features: one example along axis 0.

  Args:
    where: mask, or None.
    layout: the axes as the docstring has them, "[batch, channels]", which
      fixes their number; "[batch, ...]" asks for at least one besides.
    output_ndim: how many leading axes are those of the loss; the arrays must
      share them, and none of the others may be empty.
    same: whether the shapes must be equal in the other axes too.
    **arrays: two or more floating-point arrays by argument name.

  Returns:
    (the arrays in float32 with the masked examples zeroed, the mask).

  Raises:
    TypeError: for an array that is not floating point.
    ValueError: for shapes that do not fit; both arguments are named.
  """
  converted = floats(**arrays)
  named = dict(zip(arrays, converted, strict=True))
  if same:
    same_shape(**named)
  ndim = layout.count(",") + 1
  (first, reference), (second, other), *_ = named.items()
  for name, array in named.items():
    right_ndim = array.ndim == ndim or ("..." in layout and array.ndim > ndim)
    if (
      not right_ndim
      or array.shape[:output_ndim] != reference.shape[:output_ndim]
      or 0 in array.shape[output_ndim:]
    ):
      partner = (second, other) if name == first else (first, reference)
      equal = "all axes"
      if not same:
        equal = "axis 0" if output_ndim == 1 else f"axes 0 to {output_ndim - 1}"
      raise ValueError(
        f"{name} has shape {array.shape} and {partner[0]} has shape "
        f"{partner[1].shape}; they should be {layout}, equal in {equal}, and "
        "not empty beyond the batch"
      )
  mask = valid(where, reference.shape[:output_ndim])
  return select(mask, *converted), mask


def example_shape(name: str, array: jax.Array, axis: int) -> tuple[int, ...]:
  """The array's shape without the class axis, which must exist."""
  if not isinstance(axis, int) or not -array.ndim <= axis < array.ndim:
    raise ValueError(
      f"axis is {axis!r}, but {name} has shape {array.shape}; it should be one "
      "of its axes"
    )
  axis %= array.ndim
  if array.shape[axis] == 0:
    raise ValueError(
      f"{name} has shape {array.shape}; axis {axis} should hold at least one "
      "class"
    )
  return array.shape[:axis] + array.shape[axis + 1 :]


def valid(where: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
  """The mask, which must be boolean and have the shape of the output."""
  if where is None:
    return None
  found = dtype("where", where)
  if found != jnp.bool_:
    raise TypeError(f"where has dtype {found}; it should be bool")
  where = jnp.asarray(where)
  if where.shape != shape:
    raise ValueError(
      f"where has shape {where.shape} and the output has shape {shape}; they "
      "should be equal (nothing is broadcast)"
    )
  return where


def select(
  where: jax.Array | None, *arrays: jax.Array, axis: int | None = None
) -> list[jax.Array]:
  """Zeroes the masked examples before anything is computed from them.

  Masking the result is not enough: the gradient of what is thrown away is
  0 times the gradient there, which is NaN where that one is not finite.

  Args:
    where: mask, or None.
    *arrays: the examples; the axes of `where` are their leading axes, or, if
      `axis` is given, all axes but that one.
    axis: the class axis of the arrays.
  """
  if where is None:
    return list(arrays)
  selected = []
  for array in arrays:
    if axis is None:
      mask = where.reshape(where.shape + (1,) * (array.ndim - where.ndim))
    else:
      mask = jnp.expand_dims(where, axis)
    selected.append(jnp.where(mask, array, jnp.zeros((), array.dtype)))
  return selected


def masked(loss: jax.Array, where: jax.Array | None) -> jax.Array:
  """The loss, exactly 0 where masked. Its inputs have been selected before."""
  return loss if where is None else jnp.where(where, loss, 0.0)


def positive(name: str, value: ArrayLike) -> jax.Array:
  """A float32 scalar above 0 and finite."""
  return _scalar(
    name,
    value,
    lambda v: (v > 0.0) & (v < math.inf),
    "a finite number above 0",
  )


def fraction(name: str, value: ArrayLike) -> jax.Array:
  """A float32 scalar from 0 to 1, both included."""
  return _scalar(
    name, value, lambda v: (v >= 0.0) & (v <= 1.0), "a number from 0 to 1"
  )


def open_fraction(name: str, value: ArrayLike, why: str) -> jax.Array:
  """A float32 scalar between 0 and 1, both excluded for the reason given."""
  return _scalar(
    name,
    value,
    lambda v: (v > 0.0) & (v < 1.0),
    f"a number between 0 and 1, both excluded ({why})",
  )


def weight(name: str, value: ArrayLike) -> jax.Array:
  """A float32 scalar that is finite and not negative."""
  return _scalar(
    name,
    value,
    lambda v: (v >= 0.0) & (v < math.inf),
    "a finite number, 0 or more",
  )


def finite(name: str, value: ArrayLike) -> jax.Array:
  """A float32 scalar that is neither infinite nor NaN."""
  return _scalar(name, value, lambda v: abs(v) < math.inf, "a finite number")


def choice(name: str, value: str, *options: str) -> None:
  """ValueError unless a word is one of the options."""
  if value not in options:
    wanted = " or ".join(
      filter(
        None, [", ".join(f'"{x}"' for x in options[:-1]), f'"{options[-1]}"']
      )
    )
    raise ValueError(f"{name} is {value!r}; it should be {wanted}")


def class_labels(
  labels: ArrayLike, classes: int, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Checks class numbers, see `rows`."""
  reason = f"there are {classes} classes (leave padding out with where)"
  return rows("labels", labels, classes, reason, where)


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
    numbers: [..., more] integers, the shape of `where` and perhaps more axes.
    size: how many rows there are.
    reason: why the numbers should be below `size`, for the message.
    where: [...] bool or None; masked numbers may be anything.

  Returns:
    (int32 of the same shape, all of them usable as an index; the same shape,
    float32, 1 where the number is a row and NaN where not).

  Raises:
    TypeError: if the numbers are not integers.
    ValueError: if a number that is not traced names no row.
  """
  found = dtype(name, numbers)
  if not jnp.issubdtype(found, jnp.integer):
    raise TypeError(f"{name} has dtype {found}; it should be integer")
  if where is not None:
    more = jnp.ndim(numbers) - where.ndim
    where = where.reshape(where.shape + (1,) * more)
  if is_known(numbers) and (where is None or is_known(where)):
    # In NumPy, so that 64-bit numbers are compared before they are cut to 32.
    seen = np.asarray(numbers)
    wrong = (seen < 0) | (seen >= size)
    if where is not None:
      wrong &= np.asarray(where)
    if wrong.any():
      index = np.unravel_index(np.argmax(wrong), wrong.shape)
      place = f"[{', '.join(str(i) for i in index)}]" if index else ""
      raise ValueError(
        f"{name}{place} is {seen[index]}; it should be from 0 to {size - 1}, "
        f"as {reason}"
      )
  numbers = jnp.asarray(numbers).astype(jnp.int32)
  if where is not None:
    numbers = jnp.where(where, numbers, 0)
  known = (numbers >= 0) & (numbers < size)
  return jnp.where(known, numbers, 0), jnp.where(known, 1.0, jnp.nan)


def dtype(name: str, array: Any) -> Any:
  """The dtype of an array; TypeError for what is none, such as a list."""
  if not hasattr(array, "dtype") and not isinstance(
    array, int | float | complex
  ):
    what = "None" if array is None else f"a {type(array).__name__}"
    hint = " (see jnp.stack)" if isinstance(array, list | tuple) else ""
    raise TypeError(f"{name} is {what}; it should be an array{hint}")
  return jnp.result_type(array)


def _float(name: str, array: ArrayLike) -> jax.Array:
  found = dtype(name, array)
  if not jnp.issubdtype(found, jnp.floating):
    raise TypeError(f"{name} has dtype {found}; it should be a float dtype")
  return jnp.asarray(array).astype(jnp.float32)


def _scalar(
  name: str, value: Any, fits: Callable[[Any], Any], wanted: str
) -> jax.Array:
  """A number that fits; a traced one that does not becomes NaN."""
  dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
  if not (
    jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
  ):
    raise TypeError(f"{name} is {value!r}; it should be {wanted}")
  if np.shape(value) != ():
    raise ValueError(
      f"{name} has shape {np.shape(value)}; it should be a scalar"
    )
  if not is_known(value):
    value = jnp.asarray(value, jnp.float32)
    return jnp.where(fits(value), value, jnp.nan)
  # As it will be used: 1e-60 is 0 in float32.
  with np.errstate(all="ignore"):
    number = np.float32(value)
  if not fits(number):
    raise ValueError(f"{name} is {value}; it should be {wanted}")
  return jnp.asarray(number)


def is_known(value: Any) -> bool:
  """Whether the values can be looked at now, on this host."""
  if isinstance(value, jax.core.Tracer):
    return False
  return not isinstance(value, jax.Array) or value.is_fully_addressable
