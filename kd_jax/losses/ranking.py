"""Losses on the order of the classes: the true class first, then the teacher's.

Absent classes (logits of -inf) are treated as in `divergences`. Gradients by
the teacher's logits are those at a fixed order.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import (
  _arguments as arguments,
  _checks as checks,
  _numerics as numerics,
  divergences,
)


def plackett_luce(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  *,
  teacher_temperature: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Plackett-Luce distillation: the student draws the classes in order.

    loss = sum_k p(c_k) [log sum_{l >= k} exp s(c_l) - s(c_k)]
    c_1 = y, then c_2, c_3, ... by falling teacher logit
    p = softmax(teacher_logits / T_t),   s = student_logits

  The likelihood that the student, drawing classes without replacement, draws
  the true class first and the rest as the teacher ranks them; each draw counts
  with the teacher's probability of what is drawn. The first draw is the
  cross-entropy, so no hard-label loss is needed beside it, nor a weight. The
  loss is convex in the student's logits and not 0 at equality.

  The temperature is the teacher's alone, as in the paper's code: there is no
  T^2. (CIFAR-100: T_t = 4.)

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well, through
      the weights. Equal logits are ranked by class number.
    labels: [...] integers from 0 to classes - 1, the true classes y.
    teacher_temperature: scalar T_t > 0, may be traced.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient, and
      their labels may be anything, for example -100.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature is not positive and finite, or a traced label no class.

  Raises:
    ValueError: if the shapes do not fit, a label that is not traced is no
      class, or the temperature is not positive.
    TypeError: if the logits are not floating point, the labels not integer,
      or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> teacher = jnp.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    >>> student = jnp.array([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    >>> loss = plackett_luce(student, teacher, jnp.array([1, 1]))
    >>> print([f"{x:.2f}" for x in loss])
    ['0.35', '0.97']

  Reference: Bassam et al. 2025 (PLD), arXiv:2506.12542, Sec. 4.2.
  """
  student, teacher, where = checks.logit_pair(
    student_logits, teacher_logits, axis=axis, where=where
  )
  is_true, known = arguments.true_class(labels, student, axis, where)
  teacher_temperature = checks.positive(
    "teacher_temperature", teacher_temperature
  )
  # Moves the true class to the front by its key, not by its logit.
  order = arguments.descending(
    jnp.where(is_true, jnp.inf, teacher), is_true, axis
  )
  p = jnp.exp(numerics.log_softmax(teacher, teacher_temperature, axis))
  # Only differences of the student's logits count; absent ones are finite.
  log_q = numerics.log_softmax(student, 1.0, axis)
  p = jnp.take_along_axis(p, order, axis)
  log_q = jnp.take_along_axis(log_q, order, axis)
  remaining = lax.cumlogsumexp(log_q, axis % log_q.ndim, reverse=True)
  loss = jnp.sum(p * (remaining - log_q), axis)
  return checks.masked(loss * known, where)


def sorted_kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """KL divergence from the teacher, its logits re-sorted: true class on top.

    loss = T^2 sum_c p(c) [log p(c) - log q(c)]
    p = softmax(r / T_t),   q = softmax(student_logits / T)
    r: teacher_logits, where the true class gets the largest one and each
       class that was above it the next smaller one

  `kl` for a teacher that makes mistakes: where it is right, nothing changes;
  where it is wrong, the set of its logits stays, and so does the order of the
  other classes, but the true class wins. No hyper-parameter is added.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well. Of equal
      logits, the one of the true class counts as larger, then that of the
      smaller class number.
    labels: [...] integers from 0 to classes - 1, the true classes.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient, and
      their labels may be anything, for example -100.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature is not positive and finite, or a traced label no class.

  Raises:
    ValueError: if the shapes do not fit, a label that is not traced is no
      class, or a temperature is not positive.
    TypeError: if the logits are not floating point, the labels not integer,
      or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[3.0, 2.0, 1.0]])
    >>> teacher = jnp.array([[2.0, 3.0, 1.0]])  # takes class 0 for class 1
    >>> print(sorted_kl(student, teacher, jnp.array([0])))
    [0.]

  Reference: Limantoro 2025 (Sort-KD), arXiv:2508.16544, for the sorting;
  Hinton et al. 2015, arXiv:1503.02531, Sec. 2, for the divergence.
  """
  student, teacher, where = checks.logit_pair(
    student_logits, teacher_logits, axis=axis, where=where
  )
  is_true, known = arguments.true_class(labels, student, axis, where)
  loss = divergences.kl(
    student,
    arguments.label_first(teacher, is_true, axis),
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  return loss * known
