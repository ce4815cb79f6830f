"""Divergences between the softened predictions of teacher and student.

Classes that both sides rule out with a logit of -inf (a padded vocabulary)
count as absent. Where a divergence is infinite, since one side rules out a
class to which the other gives mass, the value is finite and large: log 0 is
taken as -1e5. The gradients are those of that value: among the other classes
they lead to what is left of the teacher.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import (
  _checks as checks,
  _numerics as numerics,
  _softened as softened,
)


def kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Softened KL divergence from teacher to student: the soft-target loss.

    loss = T^2 sum_c p(c) [log p(c) - log q(c)]
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  The loss of classical distillation, and the default choice: the student has
  to cover every class that the teacher finds likely. Its gradient is that of
  the cross-entropy with soft targets, T (q - p), but it is 0 at equality.
  T^2 keeps the gradient's size as T grows. The factor is the student's
  temperature alone; policy distillation, with a sharpened teacher (T_t = 0.01)
  and T = 1, then has its published form.

  Class-wise self-distillation (CS-KD, arXiv:2003.13964) is this loss at T = 4
  between the network's predictions for two images of one class, the second
  behind `jax.lax.stop_gradient`. From a cohort: `mutual_kl`.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature is not positive and finite.

  Raises:
    ValueError: if the shapes differ, or a temperature is not positive.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    >>> teacher = jnp.array([[1.0, 2.0, 3.0], [0.0, 4.0, 0.0]])
    >>> print([f"{x:.2f}" for x in kl(student, teacher, temperature=4.0)])
    ['0.00', '1.97']

  Reference: Hinton et al. 2015, arXiv:1503.02531, Sec. 2; for two
  temperatures, Rusu et al. 2015, arXiv:1511.06295, Sec. 3.2.
  """
  (p, q, _, _, log_ratio), scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  terms = numerics.excess(p, q, log_ratio)
  return checks.masked(scale * terms.sum(axis), where)


def reverse_kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Softened KL divergence from student to teacher.

    loss = T^2 sum_c q(c) [log q(c) - log p(c)]
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  For students too small to cover the teacher, language models above all: it
  punishes mass where the teacher has none, and lets the student leave modes
  out. The paper takes T = 1 and whole sequences; this is one token's exact
  term, with T^2 as in `kl`.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature is not positive and finite.

  Raises:
    ValueError: if the shapes differ, or a temperature is not positive.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 4.0, 0.0]])
    >>> teacher = jnp.array([[0.0, 0.0, 0.0]])
    >>> loss = reverse_kl(student, teacher, temperature=2.0)
    >>> print([f"{x:.2f}" for x in loss])
    ['1.73']

  Reference: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, Sec. 2.1.
  """
  (p, q, _, _, log_ratio), scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  terms = numerics.excess(q, p, -log_ratio)
  return checks.masked(scale * terms.sum(axis), where)


def jsd(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  beta: ArrayLike = 0.5,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Generalised Jensen-Shannon divergence of student and teacher.

    m = beta p + (1 - beta) q
    loss = T^2 [beta KL(p || m) + (1 - beta) KL(q || m)]
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  Between `kl` and `reverse_kl`, and bounded: T^2 log 2 at most for beta = 0.5,
  so outliers do not rule the batch. beta weights the teacher, as in the paper
  and in TRL; where a lambda weights the student (DistiLLM), beta = 1 - lambda.

  The ends: loss / beta tends to `kl` as beta tends to 0, and loss / (1 - beta)
  to `reverse_kl` as beta tends to 1, but the loss itself tends to 0. TRL puts
  the two divergences there, a jump; here both ends are errors: call `kl` or
  `reverse_kl`. T^2 is ours, as in `kl`; the paper and TRL have no such factor.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    beta: scalar, 0 < beta < 1, the teacher's weight; may be traced.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature or beta is out of range.

  Raises:
    ValueError: if the shapes differ, a temperature is not positive, or beta
      is not between 0 and 1.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 100.0]])
    >>> teacher = jnp.array([[100.0, 0.0]])
    >>> print([f"{x:.2f}" for x in jsd(student, teacher)])  # at most log 2
    ['0.69']

  Reference: Agarwal et al. 2024 (GKD), arXiv:2306.13649, Sec. 2.
  """
  beta = checks.open_fraction(
    "beta", beta, "the ends are kl, beta -> 0, and reverse_kl, beta -> 1"
  )
  pair, scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  weights = beta, 1.0 - beta
  m, log_m_p = softened.mixture(pair, *weights)
  _, log_m_q = softened.mixture(softened.swapped(pair), *weights[::-1])
  terms = weights[0] * numerics.excess(pair.p, m, log_m_p)
  terms += weights[1] * numerics.excess(pair.q, m, log_m_q)
  return checks.masked(scale * terms.sum(axis), where)


def total_variation(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Total variation distance of student and teacher.

    loss = T^2 1/2 sum_c |p(c) - q(c)|
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  Symmetric, and bounded by T^2: the largest difference in the probability that
  the two give to any set of classes. A metric, not a divergence: near equality
  it is of first order in the difference, the others of second, so its gradient
  keeps its size up to equality, where it jumps to 0. By Pinsker's inequality
  it is at most sqrt(kl / 2) for T = 1.

  The paper sums it over the steps of sampled sequences; this is one step. T^2
  is ours, as in `kl`, so that one rule holds for all; as the value is of first
  order, T would have kept the gradient's size.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, from 0 to T^2. NaN if a traced
    temperature is not positive and finite.

  Raises:
    ValueError: if the shapes differ, or a temperature is not positive.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    >>> teacher = jnp.log(jnp.array([[0.2, 0.6, 0.2]]))
    >>> print([f"{x:.2f}" for x in total_variation(student, teacher)])
    ['0.35']

  Reference: Wen et al. 2023 (f-distill), arXiv:2307.15190, Sec. 2.
  """
  distributions, scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  change = softened.difference(distributions, axis)
  # Not abs, whose gradient at 0 is 1.
  distance = (change * lax.stop_gradient(jnp.sign(change))).sum(axis) / 2.0
  return checks.masked(scale * distance, where)
