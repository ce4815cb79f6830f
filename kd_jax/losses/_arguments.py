"""Arguments that several losses on logits share."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks


def true_class(
  labels: ArrayLike, logits: jax.Array, axis: int, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Checks class numbers against the student's logits.

  Args:
    labels: [...] integers; where masked, they may be anything.
    logits: [..., classes], the student's, already checked.
    axis: the class axis.
    where: [...] bool or None.

  Returns:
    ([..., classes] bool, True at the true class; [...] float32, 1 where the
    label is a class and NaN where not, to multiply the loss by).

  Raises:
    TypeError: for labels that are not integers.
    ValueError: for another shape, or a known label that is no class.
  """
  dtype = checks.dtype("labels", labels)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"labels has dtype {dtype}; it should be an integer dtype")
  shape = checks.example_shape("student_logits", logits, axis)
  if jnp.shape(labels) != shape:
    raise ValueError(
      f"labels has shape {jnp.shape(labels)} and student_logits has shape "
      f"{logits.shape}; integer labels should have shape {shape}"
    )
  classes = logits.shape[axis]
  index, known = checks.class_labels(labels, classes, where)
  return jax.nn.one_hot(index, classes, dtype=bool, axis=axis), known


def temperatures(
  temperature: ArrayLike, teacher_temperature: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
  """(the student's, the teacher's) temperature; None: the student's."""
  student = checks.positive("temperature", temperature)
  if teacher_temperature is None:
    return student, student
  return student, checks.positive("teacher_temperature", teacher_temperature)


def label_first(logits: jax.Array, is_true: jax.Array, axis: int) -> jax.Array:
  """The same values, dealt out anew: the true class gets the largest.

  The classes that were above it go down by one place.
  """
  order = descending(logits, is_true, axis)
  rank = jnp.argsort(order, axis)
  true_rank = jnp.sum(jnp.where(is_true, rank, 0), axis, keepdims=True)
  new_rank = jnp.where(is_true, 0, rank + (rank < true_rank))
  source = jnp.take_along_axis(order, new_rank, axis)
  return jnp.take_along_axis(logits, source, axis)


def descending(logits: jax.Array, is_true: jax.Array, axis: int) -> jax.Array:
  """The classes by falling logit; among equals the true one comes first."""
  # lexsort takes its last key first, and keeps the order of what is equal.
  return jnp.lexsort((~is_true, -lax.stop_gradient(logits)), axis)
