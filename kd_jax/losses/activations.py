"""Activations before the ReLU: what a neuron lets through.

Both losses take features before the nonlinearity, and neither cares how far
below 0 a neuron is that the teacher switches off.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks


def activation_boundary(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  *,
  margin: ArrayLike = 1.0,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared hinge that asks for the teacher's signs.

    y = 1 where t > 0, else -1
    loss = sum max(0, margin - y s)^2

  Which neurons fire, and not how strongly: for initialising a student before
  it is trained on labels. The sum is over all entries of an example. It is not
  0 at equality, but where every s has the teacher's sign and is at least the
  margin away from 0. The teacher's gradient is 0: only its signs count. Paper
  and released code agree; the weights in the code, such as 3/1000 for its
  CIFAR-10 networks, belong to the caller.

  Args:
    student_features: [batch, ...] any float dtype, before the ReLU.
    teacher_features: the same shape.
    margin: scalar > 0, may be traced.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, never negative. NaN if a traced margin is not positive
    and finite.

  Raises:
    ValueError: if the shapes differ, or `margin` is not positive.
    TypeError: if the features are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[2.0, 0.5, 0.5]])
    >>> teacher = jnp.array([[0.1, 3.0, -3.0]])
    >>> print(activation_boundary(student, teacher))  # 0 + 0.5^2 + 1.5^2
    [2.5]

  Reference: Heo et al. 2019 (AB), arXiv:1811.03233, Sec. on the method (they
  have no numbers).
  """
  (student, teacher), where = checks.examples(
    where,
    "[batch, ...]",
    student_features=student_features,
    teacher_features=teacher_features,
  )
  margin = checks.positive("margin", margin)
  # The sign of NaN is NaN, which a comparison would turn into "off".
  side = jnp.where(teacher == 0.0, -1.0, jnp.sign(teacher))
  squares = jnp.maximum(margin - side * student, 0.0) ** 2
  loss = jnp.sum(squares, tuple(range(1, squares.ndim)))
  return checks.masked(loss, where)


def ofd(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  *,
  margin: ArrayLike,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Overhaul of feature distillation: margin ReLU and partial L2 distance.

    r = max(t, margin(c))
    loss = sum [0 if s <= r <= 0 else (s - r)^2]

  Where the teacher is active the student has to give its value; elsewhere it
  has to come down to the teacher's, or to the margin, and may be lower. The
  sum is over all entries of an example. The margin of a channel is the mean of
  the teacher's negative responses: `kd_jax.targets.ofd_margin` has it from the
  batch norm before the ReLU. The student's features come from a learned 1x1
  convolution and batch norm. Paper and released code agree; the factor 1/1000
  in the latter is the caller's.

  Args:
    student_features: [batch, ..., channels] any float dtype, before the ReLU.
    teacher_features: the same shape. Gradients flow into it as well.
    margin: [channels] any float dtype, negative numbers (not checked).
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, never negative.

  Raises:
    ValueError: if the shapes do not fit.
    TypeError: if an array is not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 1.0, -5.0]])
    >>> teacher = jnp.array([[3.0, -2.0, -2.0]])
    >>> print(ofd(student, teacher, margin=jnp.full(3, -0.5)))  # 4 + 1.5^2 + 0
    [6.25]

  Reference: Heo et al. 2019 (OFD), arXiv:1904.01866, Sec. 3.2.
  """
  (student, teacher), where = checks.examples(
    where,
    "[batch, ...]",
    student_features=student_features,
    teacher_features=teacher_features,
  )
  (margin,) = checks.floats(margin=margin)
  if margin.shape != student.shape[-1:]:
    raise ValueError(
      f"margin has shape {margin.shape} and student_features has shape "
      f"{student.shape}; margin should have shape {student.shape[-1:]}, one "
      "number per channel"
    )
  target = jnp.maximum(teacher, margin)
  gap = student - target
  gap = jnp.where(target > 0.0, gap, jnp.maximum(gap, 0.0))
  loss = jnp.sum(gap**2, tuple(range(1, gap.ndim)))
  return checks.masked(loss, where)
