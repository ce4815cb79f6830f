"""Targets on the way between models, and beyond them."""

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
from kd_jax.targets import _inputs as inputs


def alpha_mixture(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  order: ArrayLike,
  mixing: ArrayLike,
  temperature: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """A distribution on a path from the student to the teacher.

    softmax(target / T) ~ [l p^a + (1 - l) q^a]^(1 / a),   a = (1 - order) / 2
    softmax(target / T) ~ p^l q^(1 - l)                    for order = 1
    p = softmax(teacher_logits / T),   q = softmax(student_logits / T)

  An assistant that a student far from its teacher can follow. The order bends
  the path: -1 is the arithmetic mean (the mixture of skew divergences), 1 the
  geometric mean (the path of TAID, which takes the student in it as constant:
  `jax.lax.stop_gradient`), 3 the harmonic mean; the mixing l is the place on
  it, 0 the student, 1 the teacher. Below order 1 a class that one side rules
  out is in, otherwise out. The released code takes all orders above 1 as 1.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape.
    order: scalar, any finite number, may be traced.
    mixing: scalar l, 0 <= l <= 1, may be traced.
    temperature: scalar T > 0, may be traced.
    axis: the class axis.
    where: [...] bool; entries that are False get no gradient.

  Returns:
    [..., classes] float32, the target. NaN if a traced number is out of range.

  Raises:
    ValueError: if the shapes differ, or a number is out of range.
    TypeError: if an array has the wrong dtype.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> student, teacher = jnp.log(jnp.array([[0.8, 0.2], [0.2, 0.8]]))
    >>> for order in (-1.0, 0.0, 1.0):
    ...   target = alpha_mixture(student, teacher, order=order, mixing=0.25)
    ...   print([f"{p:.3f}" for p in jax.nn.softmax(target)])
    ['0.650', '0.350']
    ['0.662', '0.338']
    ['0.667', '0.333']

  Reference: Shin et al. 2025 (AMiD), arXiv:2510.15982.
  """
  (student, teacher), _ = inputs.logits(
    where, axis, student_logits=student_logits, teacher_logits=teacher_logits
  )
  order = checks.finite("order", order)
  mixing = checks.fraction("mixing", mixing)
  temperature = checks.positive("temperature", temperature)
  _, _, log_p, log_q, log_ratio = numerics.softmax_pair(
    student, teacher, temperature, None, axis
  )
  # By the ratio where p^a and q^a are close, be it since a is near 0: that
  # holds the geometric mean and passes it smoothly.
  power = (1.0 - order) / 2.0
  gap = power * log_ratio
  near = jnp.abs(gap) < 1.0
  slope = softened.mean_slope(jnp.where(near, gap, 0.0), 1.0 - mixing)
  at_end = (mixing == 0.0) | (mixing == 1.0)
  inner = jnp.where(at_end, 0.5, mixing)
  far = jnp.logaddexp(
    jnp.log(inner) + power * log_p, jnp.log1p(-inner) + power * log_q
  ) / jnp.where(power == 0.0, 1.0, power)
  far = jnp.where(at_end, jnp.where(mixing == 0.0, log_q, log_p), far)
  log_mean = jnp.where(near, log_p + log_ratio * slope, far)
  here = numerics.present(student) | numerics.present(teacher)
  return inputs.absent(temperature * log_mean, here)


def delta(
  teacher_logits: ArrayLike,
  teacher_base_logits: ArrayLike,
  student_base_logits: ArrayLike,
  *,
  strength: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """What the teacher's fine-tuning changed, applied to the student's base.

    softmax(target) ~ s (p / b)^strength
    p, b, s = softmax(teacher), softmax(teacher_base), softmax(student_base)

  A small student need not end where a large teacher does; it can make the same
  move. With `student_base_logits = teacher_base_logits` the target runs from
  the base (strength 0) over the tuned model (1) and beyond, the teacher that
  reinforcement learning with the reward of direct preference optimisation is
  equivalent to. The contrastive form starts from the tuned model and moves
  away from one tuned to the reverse preferences: `delta(tuned, reverse,
  tuned)`, with a strength for each token. At any temperature: it is the logits
  that are combined.

  Args:
    teacher_logits: [..., classes] any float dtype, classes along `axis`; the
      fine-tuned teacher.
    teacher_base_logits: the same shape; the teacher before.
    student_base_logits: the same shape; the student before.
    strength: scalar, or [...] float for one number per example.
    axis: the class axis.
    where: [...] bool; entries that are False get no gradient.

  Returns:
    [..., classes] float32, the target. A class exists where it exists for all
    three.

  Raises:
    ValueError: if a shape does not fit, or the strength is not finite.
    TypeError: if an array has the wrong dtype.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> tuned, base = jnp.log(jnp.array([[0.6, 0.4], [0.5, 0.5]]))
    >>> student_base = jnp.log(jnp.array([0.2, 0.8]))
    >>> target = delta(tuned, base, student_base)
    >>> print([f"{p:.3f}" for p in jax.nn.softmax(target)])
    ['0.273', '0.727']

  Reference: Cao et al. 2025 (Delta-KD), arXiv:2509.14526; from one base, Zhang
  et al. 2025 (AlignDistil), arXiv:2503.02832.
  """
  arrays, mask = inputs.logits(
    where,
    axis,
    teacher_logits=teacher_logits,
    teacher_base_logits=teacher_base_logits,
    student_base_logits=student_base_logits,
  )
  here = numerics.present(arrays[0])
  for array in arrays[1:]:
    here &= numerics.present(array)
  # Offsets mean nothing, but would cost digits when they are added up.
  tuned, base, start = (_centred(array, here, axis) for array in arrays)
  if jnp.shape(strength) == ():
    strength = checks.finite("strength", strength)
  else:
    (strength,) = checks.floats(strength=strength)
    shape = checks.example_shape("teacher_logits", arrays[0], axis)
    if strength.shape != shape:
      raise ValueError(
        f"strength has shape {strength.shape} and teacher_logits has shape "
        f"{arrays[0].shape}; strength should be a scalar or have shape {shape}"
      )
    (strength,) = checks.select(mask, strength)
    strength = jnp.expand_dims(strength, axis)
  return inputs.absent(start + strength * (tuned - base), here)


def calibrated(
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The teacher's logits, as sure as the teacher is right.

    target = teacher_logits / T

  T is fitted once, on data that neither trained the teacher nor will judge the
  student. It comes before the temperature of the loss, and is no part of it:
  no T^2.

  Args:
    teacher_logits: [..., classes] any float dtype, classes along `axis`.
    temperature: scalar T > 0, may be traced; `calibration.fit_temperature`
      finds it.
    axis: the class axis.
    where: [...] bool; entries that are False get no gradient.

  Returns:
    [..., classes] float32, the target.

  Raises:
    ValueError: if the temperature is not positive, or the mask has another
      shape.
    TypeError: if an array has the wrong dtype.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import calibration
    >>> held_out, labels = jnp.array([[4.0, 0.0]] * 4), jnp.array([0, 0, 0, 1])
    >>> fitted = calibration.fit_temperature(held_out, labels)
    >>> teacher = jnp.array([4.0, 0.0])
    >>> target = calibrated(teacher, temperature=fitted)
    >>> print([f"{p:.2f}" for p in jax.nn.softmax(target)])
    ['0.75', '0.25']

  Reference: Guo et al. 2017, arXiv:1706.04599, Sec. 4.2; before distillation,
  Kim et al. 2025, arXiv:2508.20224.
  """
  (teacher,), _ = inputs.logits(where, axis, teacher_logits=teacher_logits)
  temperature = checks.positive("temperature", temperature)
  here = numerics.present(teacher)
  return inputs.absent(jnp.where(here, teacher, 0.0) / temperature, here)


def _centred(logits: jax.Array, here: jax.Array, axis: int) -> jax.Array:
  """The logits minus their largest; 0 for absent classes."""
  top = jnp.max(jnp.where(here, logits, numerics.ABSENT), axis, keepdims=True)
  return jnp.where(here, logits - lax.stop_gradient(top), 0.0)
