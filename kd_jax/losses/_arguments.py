"""Arguments that several losses on logits share."""

import math

import jax
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
  dtype = jnp.result_type(labels)
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


def weight(name: str, value: ArrayLike) -> jax.Array:
  """A float32 scalar that is finite and not negative."""
  return checks._scalar(
    name,
    value,
    lambda v: (v >= 0.0) & (v < math.inf),
    "a finite number, 0 or more",
  )
