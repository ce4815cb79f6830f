"""Where a feature target is cut off: the margin of the overhaul."""

from __future__ import annotations

import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.scipy import special
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks

# From here on (in standard deviations) the mean is taken from a continued
# fraction, to so many terms: then it is exact to float32.
_TAIL = 2.0
_TERMS = 32
# The probability of a negative response at which the released code gives up.
_RARE = 0.001


def ofd_margin(
  mean: ArrayLike, scale: ArrayLike, *, form: str = "released"
) -> jax.Array:
  """The expected negative response of a batch-normalised channel.

    margin = E[x | x < 0] = m - s phi(m / s) / Phi(-m / s),   x ~ N(m, s^2)
    margin = -3 s  where Phi(-m / s) <= 0.001            form="released"

  The teacher's features are taken before the ReLU, and cut off from below at
  this margin: how negative a negative response is, is not to be learnt. m is
  the shift (beta) of the batch norm before the ReLU and s the size of its
  scale (gamma), so nothing has to be measured. Where less than one response
  in a thousand is negative, the released code puts -3 s in the place of
  the mean, which is no more than -0.3 s there: a jump. form="paper" has the
  mean everywhere.

  Args:
    mean: [channels], or any shape, float; the batch norm's shift m.
    scale: the same shape; the batch norm's scale. Its sign does not count.
    form: "released" or "paper".

  Returns:
    float32 of that shape, not above 0. A scale of 0 gives min(m, 0).

  Raises:
    ValueError: if the shapes differ, or `form` is none of the two.
    TypeError: if an array is not floating point.

  Example:
    >>> import jax.numpy as jnp
    >>> mean, scale = jnp.array([-2.0, 0.0, 4.0]), jnp.ones(3)
    >>> print([f"{x:.2f}" for x in ofd_margin(mean, scale)])
    ['-2.06', '-0.80', '-3.00']
    >>> print([f"{x:.2f}" for x in ofd_margin(mean, scale, form="paper")])
    ['-2.06', '-0.80', '-0.23']

  Reference: Heo et al. 2019, arXiv:1904.01866, Sec. 3.2.
  """
  checks.choice("form", form, "released", "paper")
  m, s = checks.floats(mean=mean, scale=scale)
  checks.same_shape(mean=m, scale=s)
  s = jnp.abs(s)
  # In units of the larger of the two, so that no square leaves float32.
  unit = lax.stop_gradient(jnp.maximum(jnp.abs(m), s))
  unit = jnp.where(unit == 0.0, 1.0, unit)
  m, s = m / unit, s / unit
  sharp = s <= 1e-6  # then x is m, and m / s is too large
  u = m / jnp.where(sharp, 1.0, s)
  tail = u > _TAIL
  near = jnp.where(tail, 0.0, u)
  negative = special.ndtr(-near)
  density = jnp.exp(-0.5 * near**2) / math.sqrt(2.0 * math.pi)
  margin = m - s * density / negative
  # phi / Phi is u + 1 / (u + 2 / (u + 3 / ...)) in the tail. What remains of
  # its difference with u is a fraction, and nothing cancels.
  far = jnp.where(tail, u, _TAIL)
  fraction = lax.fori_loop(
    0, _TERMS - 1, lambda i, below: far + (_TERMS - i) / below, far
  )
  margin = jnp.where(tail, -s / fraction, margin)
  margin = jnp.where(sharp, jnp.minimum(m, 0.0), margin)
  if form == "released":
    rare = special.ndtr(-u) <= _RARE
    rare = jnp.where(sharp, m > 0.0, rare)
    margin = jnp.where(rare, -3.0 * s, margin)
  return unit * margin
