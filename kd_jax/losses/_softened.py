"""What divergences of two softened predictions have in common.

p is the teacher's distribution and q the student's, as in `_numerics`.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks, _numerics as numerics


def pair(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike,
  teacher_temperature: ArrayLike | None,
  axis: int,
  where: ArrayLike | None,
) -> tuple[numerics.Pair, jax.Array, jax.Array | None]:
  """Checks the arguments that all divergences share, and softens.

  Returns:
    (the two distributions, temperature**2, the mask). Masked examples have
    equal logits.
  """
  student, teacher, where = checks.logit_pair(
    student_logits, teacher_logits, axis=axis, where=where
  )
  temperature = checks.positive("temperature", temperature)
  if teacher_temperature is not None:
    teacher_temperature = checks.positive(
      "teacher_temperature", teacher_temperature
    )
  softened = numerics.softmax_pair(
    student, teacher, temperature, teacher_temperature, axis
  )
  return softened, temperature**2, where


def present(softened: numerics.Pair) -> jax.Array:
  """[..., classes] bool, False for a class that is absent on both sides."""
  return (softened.log_p != numerics.LOG_ZERO) | (
    softened.log_q != numerics.LOG_ZERO
  )


def mixture(
  pair: numerics.Pair, p_weight: jax.Array, q_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The mixture m = p_weight p + q_weight q, and log(m / p).

  The weights sum to 1. The logarithm is taken from the ratio where that is
  small, so that it keeps its digits.
  """
  p, q, log_p, log_q, log_ratio = pair
  m = p_weight * p + q_weight * q
  # Where m underflows, its larger part is as good as the whole.
  some = m >= jnp.finfo(jnp.float32).tiny
  log_m = jnp.where(
    some,
    jnp.log(jnp.where(some, m, 1.0)),
    jnp.maximum(jnp.log(p_weight) + log_p, jnp.log(q_weight) + log_q),
  )
  near = jnp.abs(log_ratio) < 1.0
  d = jnp.where(near, log_ratio, 0.0)
  return m, jnp.where(near, jnp.log1p(q_weight * jnp.expm1(d)), log_m - log_p)


def swapped(pair: numerics.Pair) -> numerics.Pair:
  """The same two distributions, named the other way round."""
  p, q, log_p, log_q, log_ratio = pair
  return numerics.Pair(q, p, log_q, log_p, -log_ratio)


def difference(softened: numerics.Pair, axis: int) -> jax.Array:
  """The change q - p, with its digits kept where the two are nearly equal."""
  p, q, _, _, log_ratio = softened
  near = jnp.abs(log_ratio) < 1.0
  change = jnp.where(
    near, p * jnp.expm1(jnp.where(near, log_ratio, 0.0)), q - p
  )
  # The rounding of the normalisers, which is the same factor for all classes,
  # shows as a sum that is not 0.
  surplus = lax.stop_gradient(jnp.sum(change, axis, keepdims=True))
  return jnp.where(near, change - p * surplus, change)


def mean_slope(x: jax.Array, weight: jax.Array) -> jax.Array:
  """log(1 + weight (exp(x) - 1)) / x for |x| < 1; `weight` at 0."""
  small = jnp.abs(x) < 0.125
  y = jnp.where(small, x, 0.0)
  # Both factors by their Taylor series, (exp(y) - 1) / y and then
  # log(1 + u) / u, so that the derivatives come out right as well.
  slope = jnp.ones_like(y)
  for k in range(7, 1, -1):
    slope = 1.0 + slope * y / k
  u = weight * y * slope
  log_slope = jnp.zeros_like(y)
  for k in range(10, 0, -1):
    log_slope = 1.0 / k - u * log_slope
  x = jnp.where(small, 1.0, x)
  return jnp.where(
    small, weight * slope * log_slope, jnp.log1p(weight * jnp.expm1(x)) / x
  )
