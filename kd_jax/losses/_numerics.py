"""Softmax arithmetic that stays right where the plain formulas do not.

With p the teacher's and q the student's distribution, divergences are made of
p, q, their logarithms and log(q / p). The ratio is kept on its own, since near
equality, and at high temperatures, the difference of two rounded logarithms is
all rounding.
"""

import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

# A logit below this, so -inf or the lowest float of its dtype, says that the
# class does not exist.
ABSENT = -1e30
# Stands for log 0. Large against any log-probability that logits within
# +-1e4 give, small enough for sums and gradients to stay finite.
LOG_ZERO = -1e5


class Pair(NamedTuple):
  """Two distributions over the same classes.

  Attributes:
    p: [..., classes] float32, the teacher's probabilities.
    q: [..., classes] float32, the student's.
    log_p: [..., classes] float32, the teacher's log-probabilities.
    log_q: [..., classes] float32, the student's.
    log_ratio: [..., classes] float32, log(q / p).
  """

  p: jax.Array
  q: jax.Array
  log_p: jax.Array
  log_q: jax.Array
  log_ratio: jax.Array


def softmax_pair(
  student: jax.Array,
  teacher: jax.Array,
  temperature: jax.Array,
  teacher_temperature: jax.Array | None,
  axis: int,
) -> Pair:
  """The distributions of student and teacher, and their accurate ratio.

  Args:
    student: [..., classes] float32 logits; below `ABSENT`: no such class.
    teacher: [..., classes] float32 logits.
    temperature: scalar, the student's.
    teacher_temperature: scalar, the teacher's; None: the student's.
    axis: the class axis.

  Returns:
    A `Pair`. A class absent on both sides has log_ratio 0, one absent on
    one side a log-probability of `LOG_ZERO` there.
    Derivatives of log_ratio are those of log_q - log_p: exact in the logits,
    but in a temperature with the rounding of the two, which shows where they
    are nearly equal.
  """
  scale: jax.Array | float = 1.0
  if teacher_temperature is None:
    teacher_temperature = temperature
  else:
    scale = teacher_temperature / temperature
  p = _softmax_parts(teacher, teacher_temperature, axis)
  q = _softmax_parts(student, temperature, axis)
  both = p.present & q.present
  # Subtracted before any rounding: exact for logits that are nearly equal.
  # The normalisers' rounding is the same for all classes of an example, and
  # cancels to first order in the divergences and in their gradients. Logits
  # that are far apart, since each side has its own large offset, would lose
  # their digits so: there the offsets go first.
  offset = q.top * scale - p.top
  student, teacher = (
    jnp.where(both, student, 0.0),
    jnp.where(both, teacher, 0.0),
  )
  gap = jnp.where(
    jnp.abs(offset) < 16.0,
    student * scale - teacher - offset,
    (student - q.top) * scale - (teacher - p.top),
  )
  gap = gap / teacher_temperature
  log_ratio = jnp.where(
    both, gap - (q.log_total - p.log_total), q.log_prob - p.log_prob
  )
  log_ratio = _difference_known(
    q.log_prob, p.log_prob, lax.stop_gradient(log_ratio)
  )
  return Pair(p.prob, q.prob, p.log_prob, q.log_prob, log_ratio)


def log_softmax(
  logits: jax.Array, temperature: jax.Array | float, axis: int
) -> jax.Array:
  """Log-probabilities; `LOG_ZERO` for absent classes.

  Args:
    logits: [..., classes] float32; below `ABSENT`: no such class.
    temperature: scalar.
    axis: the class axis.

  Returns:
    [..., classes] float32. NaN and +inf logits give NaN.
  """
  return _softmax_parts(logits, temperature, axis).log_prob


def present(logits: jax.Array) -> jax.Array:
  """[...] bool, False where the logit says that there is no such class."""
  return ~(logits < ABSENT)  # not >=, which would take NaN for absent


def excess(p: jax.Array, q: jax.Array, log_ratio: jax.Array) -> jax.Array:
  """The terms q - p - p log(q / p), whose sum over classes is KL(p || q).

  No term is negative, and a pair that is nearly equal keeps its digits. The
  plain terms p log(p / q) have both signs and cancel to noise there.

  Args:
    p: float32, probabilities.
    q: float32, probabilities. Classes with p = 0 count: they give q.
    log_ratio: float32, log(q / p).
  """
  near = jnp.abs(log_ratio) < 1.0
  rest = _exp_rest(jnp.where(near, log_ratio, 0.0))
  return jnp.where(near, p * rest, q - p - p * log_ratio)


@jax.custom_jvp
def _exp_rest(d: jax.Array) -> jax.Array:
  """exp(d) - 1 - d for |d| <= 1, by its Taylor series."""
  # Terms are added in pairs, and pairs of these: no addition waits for all
  # before it.
  terms = [jnp.full_like(d, 1.0 / math.factorial(k)) for k in range(2, 12)]
  power = d
  while len(terms) > 1:
    odd = terms[len(terms) // 2 * 2 :]
    terms = [
      a + b * power for a, b in zip(terms[::2], terms[1::2], strict=False)
    ] + odd
    power = power * power
  return terms[0] * d * d


@_exp_rest.defjvp
def _exp_rest_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """The slope, exp(d) - 1, from the same series.

  Subtracting 1 from exp(d) would lose the digits that are to be kept, and
  differentiating the series term by term costs twice the series.
  """
  (d,), (change,) = primals, tangents
  rest = _exp_rest(d)
  return rest, (d + rest) * change


def root(x: jax.Array) -> jax.Array:
  """The square root, with gradient 0 at 0 instead of infinity.

  Args:
    x: float32, not negative.
  """
  positive = x > 0.0
  # NaN stays NaN; only exact zeros (and what rounding put below) become 0.
  return jnp.where(
    x <= 0.0, 0.0, jnp.sqrt(jnp.where(positive | jnp.isnan(x), x, 1.0))
  )


def norm(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
  """Euclidean norm along axes, which are kept with size 1.

  Neither overflows nor underflows, and has gradient 0 at the zero vector.
  """
  scale = _scale(x, axis)
  return scale * root(jnp.sum((x / scale) ** 2, axis, keepdims=True))


def unit(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
  """The direction x / ||x||; 0, with gradient 0, for a zero vector.

  The direction does not depend on the length, so any scale may be divided out
  before: exact from 1e-37 to 1e37, without a constant beside the norm.
  """
  x = x / _scale(x, axis)
  length = root(jnp.sum(x**2, axis, keepdims=True))
  return jnp.where(
    length == 0.0, 0.0, x / jnp.where(length == 0.0, 1.0, length)
  )


def _scale(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
  """The largest absolute value, 1 for zero vectors; no gradient."""
  scale = lax.stop_gradient(
    jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0)
  )
  return jnp.where(scale == 0.0, 1.0, scale)


class _SoftmaxParts(NamedTuple):
  present: jax.Array  # [..., classes] bool
  prob: jax.Array  # [..., classes]
  log_prob: jax.Array  # [..., classes]
  top: jax.Array  # [..., 1] the largest logit, not divided by temperature
  log_total: jax.Array  # [..., 1] log sum exp((logits - top) / temperature)


def _softmax_parts(
  logits: jax.Array, temperature: jax.Array | float, axis: int
) -> _SoftmaxParts:
  here = present(logits)
  # Softmax does not depend on the shift, so neither does its gradient.
  top = lax.stop_gradient(
    jnp.maximum(jnp.max(logits, axis=axis, keepdims=True), ABSENT)
  )
  shifted = jnp.where(here, logits - top, 0.0) / temperature
  shares = jnp.where(here, jnp.exp(shifted), 0.0)
  total = shares.sum(axis, keepdims=True)
  # The total is 0 only where every class is absent.
  total = jnp.where(total == 0.0, 1.0, total)
  log_total = jnp.log(total)
  log_prob = jnp.where(here, shifted - log_total, LOG_ZERO)
  prob = _exp_known(log_prob, lax.stop_gradient(shares * (1.0 / total)))
  return _SoftmaxParts(here, prob, log_prob, top, log_total)


@jax.custom_jvp
def _exp_known(x: jax.Array, exp_x: jax.Array) -> jax.Array:
  """exp(x), for the price of its derivative: its value is there already."""
  del x
  return exp_x


@_exp_known.defjvp
def _exp_known_jvp(
  primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  value = _exp_known(*primals)
  return value, value * tangents[0]


@jax.custom_jvp
def _difference_known(
  a: jax.Array, b: jax.Array, difference: jax.Array
) -> jax.Array:
  """The difference a - b, known better than from the rounded a and b.

  All that a divergence's gradient has of a distribution so comes in by one
  array, its logarithm, and goes through its normaliser once.
  """
  del a, b
  return difference


@_difference_known.defjvp
def _difference_known_jvp(
  primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  return _difference_known(*primals), tangents[0] - tangents[1]
