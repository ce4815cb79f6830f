"""Divergences that mix: the two predictions, or two divergences.

A class that one side alone rules out is no infinity for the arithmetic
mixture, which has mass wherever one of the two has; otherwise log 0 is taken
as -1e5, as for `kl`.
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


def skew_kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  skew: ArrayLike = 0.1,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Skew KL divergence: from the teacher to student mixed with teacher.

    m = skew p + (1 - skew) q
    loss = T^2 sum_c p(c) [log p(c) - log m(c)]
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  `kl` without its extremes, for language models with large vocabularies: a
  class that the student finds impossible costs -log skew at most, so neither
  value nor gradient explodes. As skew tends to 0, it tends to `kl`; at 1, it
  would be 0.

  The released code returns the cross-entropy -sum_c p log m, which has the
  student's gradient of this, and neither code nor paper has a temperature; T^2
  is ours, as in `kl`.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    skew: scalar, 0 < skew < 1, the teacher's weight in m; may be traced.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, from 0 to -T^2 log skew. NaN if a
    traced temperature or skew is out of range.

  Raises:
    ValueError: if the shapes differ, a temperature is not positive, or skew
      is not between 0 and 1.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 1000.0]])
    >>> teacher = jnp.array([[1000.0, 0.0]])
    >>> print([f"{x:.2f}" for x in skew_kl(student, teacher)])  # log 10
    ['2.30']

  Reference: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, Sec. 3.1.
  """
  skew = checks.open_fraction(
    "skew", skew, "as it tends to 0 this is kl, and at 1 it would be 0"
  )
  pair, scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  terms = _skewed(pair, skew)
  return checks.masked(scale * terms.sum(axis), where)


def skew_reverse_kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  skew: ArrayLike = 0.1,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Skew reverse KL: from the student to teacher mixed with student.

    m = skew q + (1 - skew) p
    loss = T^2 sum_c q(c) [log q(c) - log m(c)]
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  `reverse_kl` without its extremes, as `skew_kl` is `kl` without them: a class
  that the teacher rules out costs -log skew at most. As skew tends to 0, it
  tends to `reverse_kl`; at 1, it would be 0. T^2 is ours, as in `kl`.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    skew: scalar, 0 < skew < 1, the student's weight in m; may be traced.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, from 0 to -T^2 log skew. NaN if a
    traced temperature or skew is out of range.

  Raises:
    ValueError: if the shapes differ, a temperature is not positive, or skew
      is not between 0 and 1.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 1000.0]])
    >>> teacher = jnp.array([[1000.0, 0.0]])
    >>> print([f"{x:.2f}" for x in skew_reverse_kl(student, teacher, skew=0.5)])
    ['0.69']

  Reference: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, Sec. 3.1.
  """
  skew = checks.open_fraction(
    "skew", skew, "as it tends to 0 this is reverse_kl, and at 1 it would be 0"
  )
  pair, scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  terms = _skewed(softened.swapped(pair), skew)
  return checks.masked(scale * terms.sum(axis), where)


def alpha_mixture_kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  order: ArrayLike = 0.5,
  mixing: ArrayLike = 0.5,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """KL divergence from the teacher to an alpha-mixture of teacher and student.

    r(c) = [mixing p(c)^s + (1 - mixing) q(c)^s]^(1/s) / Z,   sum_c r(c) = 1
    loss = T^2 sum_c p(c) [log p(c) - log r(c)],   s = (1 - order) / 2
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  The assistant r lies between the two; `order`, the paper's alpha, bends the
  path: -1 mixes probabilities, and this is `skew_kl` with skew = mixing; 1
  mixes logits, the geometric mean (TAID's path), and 3 is the harmonic mean.
  All orders are one continuous family, and may be swept in one program. Below
  1, r has mass wherever one of the two has, from 1 on only where both have.
  As mixing tends to 0, the loss tends to `kl`; at 1, it would be 0.

  The paper allows any divergence between r and one of the two; this is the
  forward KL of its code (order "pr"). The defaults are those of its scripts.
  The code treats orders above 1 as 1; here they are what the paper defines.
  T^2 is ours, as in `kl`.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    order: scalar, any finite number; may be traced.
    mixing: scalar, 0 < mixing < 1, the teacher's weight; may be traced.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature, order or mixing is out of range.

  Raises:
    ValueError: if the shapes differ, a temperature is not positive, order is
      not finite, or mixing is not between 0 and 1.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 3.0, 0.0]])
    >>> teacher = jnp.array([[5.0, 0.0, 0.0]])
    >>> print(f"{alpha_mixture_kl(student, teacher, order=-1.0)[0]:.2f}")
    0.60
    >>> print(f"{alpha_mixture_kl(student, teacher, order=1.0)[0]:.2f}")
    0.31

  Reference: Shin et al. 2025 (AMiD), arXiv:2510.15982, Sec. 3.
  """
  order = checks.finite("order", order)
  mixing = checks.open_fraction(
    "mixing", mixing, "as it tends to 0 this is kl, and at 1 it would be 0"
  )
  pair, scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  p, _, log_p, log_q, log_ratio = pair
  # log(r Z) by the logarithms; but by the ratio where p^s and q^s are close,
  # since p and q are or since s is small. That holds at s = 0 as well, the
  # geometric mean, and passes it smoothly.
  power = (1.0 - order) / 2.0
  gap = power * log_ratio
  near = jnp.abs(gap) < 1.0
  mean = jnp.logaddexp(
    jnp.log(mixing) + power * log_p, jnp.log1p(-mixing) + power * log_q
  ) / jnp.where(power == 0.0, 1.0, power)
  shift = log_ratio * softened.mean_slope(
    jnp.where(near, gap, 0.0), 1.0 - mixing
  )
  log_mean = jnp.where(near, log_p + shift, mean)
  present = softened.present(pair)
  sum_exp = lambda x: jax.nn.logsumexp(
    jnp.where(present, x, numerics.ABSENT), axis, keepdims=True
  )
  # p sums to 1 but for rounding, which r then shares: 0 at equality.
  rounding = lax.stop_gradient(sum_exp(log_p))
  log_total = sum_exp(log_mean)
  log_total -= jnp.where(jnp.abs(rounding) < 1e-3, rounding, 0.0)
  r = jnp.exp(jnp.where(present, log_mean - log_total, numerics.LOG_ZERO))
  log_r_p = jnp.where(near, shift, mean - log_p) - log_total
  log_r_p = jnp.where(present, log_r_p, 0.0)
  terms = numerics.excess(p, r, log_r_p)
  return checks.masked(scale * terms.sum(axis), where)


def adaptive_kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  head_mass: ArrayLike = 0.5,
  form: str = "released",
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Forward and reverse KL, weighted by where student and teacher differ.

    head = the likeliest class, and further ones
           while their sum of p is at most head_mass       form="released"
           until their sum of p reaches head_mass          form="paper"
    w = sum_head |p - q| / sum_c |p(c) - q(c)|,  taken as a constant
    loss = T^2 [w KL(p || q) + (1 - w) KL(q || p)]
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  `kl` fits the teacher's likely classes first, `reverse_kl` the unlikely ones;
  this gives more weight to the one that works where the gap is larger. The two
  forms differ in the class whose mass crosses head_mass (the paper's mu): the
  released code leaves it in the tail, the paper counts it to the head.

  No gradient flows through the weight, as in the released code, which detaches
  the student there; so the gradient is not that of the value. T^2 is ours, as
  in `kl`. The classes are sorted, which is slow for a large vocabulary.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    head_mass: scalar, 0 < head_mass < 1; may be traced.
    form: "released" or "paper".
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, never negative, between `kl` and
    `reverse_kl`. NaN if a traced temperature or head_mass is out of range.

  Raises:
    ValueError: if the shapes differ, a temperature is not positive, head_mass
      is not between 0 and 1, or `form` is none of the two.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.log(jnp.array([[0.3, 0.69, 0.01]]))
    >>> teacher = jnp.log(jnp.array([[0.4, 0.3, 0.3]]))
    >>> print(f"{adaptive_kl(student, teacher)[0]:.2f}")
    0.51
    >>> print(f"{adaptive_kl(student, teacher, form='paper')[0]:.2f}")
    0.73

  Reference: Wu et al. 2024 (AKL), arXiv:2404.02657, Sec. 4.
  """
  checks.choice("form", form, "released", "paper")
  head_mass = checks.open_fraction(
    "head_mass", head_mass, "head and tail should both hold classes"
  )
  pair, scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  p, q, log_p, _, log_ratio = pair
  forward = numerics.excess(p, q, log_ratio).sum(axis)
  reverse = numerics.excess(q, p, -log_ratio).sum(axis)

  gap = jnp.abs(softened.difference(pair, axis))
  order = jnp.argsort(log_p, axis, descending=True)
  gap, p = (jnp.take_along_axis(x, order, axis) for x in (gap, p))
  mass = jnp.cumsum(p, axis)
  if form == "released":
    rank = lax.broadcasted_iota(jnp.int32, p.shape, axis % p.ndim)
    in_head = (mass <= head_mass) | (rank == 0)
  else:
    in_head = mass - p < head_mass
  head = jnp.where(in_head, gap, 0.0).sum(axis)
  total = gap.sum(axis)
  # Without a gap, both divergences are 0, whatever the weight.
  weight = lax.stop_gradient(head / jnp.where(total == 0.0, 1.0, total))
  loss = scale * (weight * forward + (1.0 - weight) * reverse)
  loss = jnp.where(jnp.isnan(head_mass), jnp.nan, loss)
  return checks.masked(loss, where)


def _skewed(pair: numerics.Pair, skew: jax.Array) -> jax.Array:
  """The terms of KL(p || skew p + (1 - skew) q)."""
  mixture, log_m_p = softened.mixture(pair, skew, 1.0 - skew)
  return numerics.excess(pair.p, mixture, log_m_p)
