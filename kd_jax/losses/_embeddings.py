"""Embeddings of a batch, as the losses that relate examples take them."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks


def pair(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  where: ArrayLike | None,
  *,
  same: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Checks both, masks them and flattens each example.

  Args:
    student_embeddings: [batch, ...] any float dtype.
    teacher_embeddings: [batch, ...] with as many axes.
    where: [batch] bool or None.
    same: whether the sizes must be equal beyond the batch too.

  Returns:
    (student [batch, width], teacher [batch, width], where): float32, with the
    masked examples zeroed.
  """
  (student, teacher), where = checks.examples(
    where,
    "[batch, ...]",
    same=same,
    student_embeddings=student_embeddings,
    teacher_embeddings=teacher_embeddings,
  )
  if student.ndim != teacher.ndim:
    raise ValueError(
      f"student_embeddings has shape {student.shape} and teacher_embeddings "
      f"has shape {teacher.shape}; they should have as many axes"
    )
  return _flat(student), _flat(teacher), where


def at_least_one(count: jax.Array) -> jax.Array:
  """A divisor; where there is nothing to count, the sum over it is 0."""
  return jnp.maximum(count, 1.0)


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], math.prod(x.shape[1:]))
