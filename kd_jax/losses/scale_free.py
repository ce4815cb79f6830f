"""Losses that leave the student free to choose the scale of its predictions.

Absent classes (logits of -inf) are treated as in `divergences`; they take no
part in means and deviations.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import (
  _arguments as arguments,
  _batch as batch,
  _checks as checks,
  _numerics as numerics,
  divergences,
)

# Vectors that spread less than this are constant: dividing by less would
# overflow in the gradients.
_NO_SPREAD = 1e-30


def standardized_kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  form: str = "released",
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """KL divergence of standardised logits: mean 0 and deviation 1 per example.

    loss = T^2 sum_c p(c) [log p(c) - log q(c)]
    p = softmax(Z(teacher_logits) / T_t),   q = softmax(Z(student_logits) / T)
    Z(z) = (z - mean(z)) / (std(z) + 1e-7), std over C - 1   form="released"
    Z(z) = (z - mean(z)) / std(z),          std over C       form="paper"

  `kl` for a student that is too small to reach the size of the teacher's
  logits: only their shape has to agree. T is what the paper calls the base
  temperature (2, with a weight of 9, in the authors' example).

  The authors' code takes the sample deviation, over C - 1 classes, where the
  paper has the population's: form="paper" at T is form="released" at
  T sqrt(1 - 1/C), but for the factor T^2.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    form: "released" or "paper".
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, never negative. Logits that are all
    equal give the uniform distribution and get no gradient. NaN if a traced
    temperature is not positive and finite.

  Raises:
    ValueError: if the shapes differ, a temperature is not positive, or `form`
      is none of the two.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    >>> teacher = jnp.array([[0.0, 9.0, 18.0], [0.0, 9.0, 18.0]])
    >>> loss = standardized_kl(student, teacher, temperature=2.0)
    >>> print([f"{x:.2f}" for x in loss])
    ['0.00', '1.28']

  Reference: Sun et al. 2024, arXiv:2403.01427, Sec. 4.3.
  """
  checks.choice("form", form, "released", "paper")
  student, teacher, where = checks.logit_pair(
    student_logits, teacher_logits, axis=axis, where=where
  )
  return divergences.kl(
    _standardized(student, form, axis),
    _standardized(teacher, form, axis),
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )


def dist(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  inter_weight: ArrayLike = 1.0,
  intra_weight: ArrayLike = 1.0,
  form: str = "released",
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """DIST: correlate the predictions, per example and per class.

    loss = T^2 [w_e d(q_i, p_i) + w_a mean_c d(q(c), p(c))]
    q_i: example i over the classes,   q(c): class c over the batch
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)
    d(u, v) = 1 - u.v / (|u| |v| + 1e-8), u, v centred   form="released"
    d(u, v) = 1 - u.v / (|u| |v|),        u, v centred   form="paper"

  For teachers much stronger than the student: the probabilities need to agree
  up to a scale and an offset only, among the classes of an example (inter) and
  among the examples of a class (intra). The second part needs a batch that is
  large enough to compare examples, and its value is the same for all of them.

  The authors' code adds 1e-8 to the product of the norms. With many classes
  that matters: a class to which the whole batch gives about 1e-5 counts almost
  nothing, where in form="paper" it counts like any other. The code multiplies
  by T^2, the paper does not. Weights are 1 in the code; the paper takes 2, with
  T = 4 on CIFAR-100 and T = 1 on ImageNet, beside the hard-label loss.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`. All
      other axes hold examples, for example pixels.
    teacher_logits: the same shape. Gradients flow into it as well.
    inter_weight: scalar w_e >= 0, may be traced.
    intra_weight: scalar w_a >= 0, may be traced.
    form: "released" or "paper".
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    axis_name: the mapped axis whose devices hold the rest of the batch, under
      `pmap` or `shard_map`; None: the batch is all here.
    where: [...] bool; entries that are False are 0 and get no gradient, and
      are left out of the classes' correlations.

  Returns:
    [...] float32, one value per example. Examples, or classes, in which either
    side is constant have d = 1 without gradient: a batch of one, for example.
    NaN if a traced temperature or weight is out of range.

  Raises:
    ValueError: if the shapes differ, a temperature is not positive, a weight
      is negative, or `form` is none of the two.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> student = jnp.array([[9.0, 0.0], [0.0, 0.5]])
    >>> print([f"{x:.2f}" for x in dist(student, teacher)])
    ['0.00', '0.00']
    >>> print([f"{x:.2f}" for x in dist(student, -teacher)])
    ['4.00', '4.00']

  Reference: Huang et al. 2022 (DIST), arXiv:2205.10536, Sec. 3.
  """
  checks.choice("form", form, "released", "paper")
  student, teacher, where = checks.logit_pair(
    student_logits, teacher_logits, axis=axis, where=where
  )
  temperature, teacher_temperature = arguments.temperatures(
    temperature, teacher_temperature
  )
  inter_weight = checks.weight("inter_weight", inter_weight)
  intra_weight = checks.weight("intra_weight", intra_weight)
  shape = checks.example_shape("student_logits", student, axis)
  # One example a row.
  student, teacher = (
    jnp.moveaxis(z, axis, -1).reshape(-1, z.shape[axis])
    for z in (student, teacher)
  )
  q = jnp.exp(numerics.log_softmax(student, temperature, -1))
  p = jnp.exp(numerics.log_softmax(teacher, teacher_temperature, -1))
  here = numerics.present(student) | numerics.present(teacher)
  inter = _pearson_distance(q, p, here, form, -1)
  if where is not None:
    here &= where.reshape(-1, 1)
  q, p, here = (batch.gather(axis_name, x) for x in (q, p, here))
  intra = _pearson_distance(q, p, here, form, 0)
  exists = jnp.any(here, 0)
  intra = jnp.sum(jnp.where(exists, intra, 0.0)) / jnp.maximum(exists.sum(), 1)
  loss = inter_weight * inter.reshape(shape) + intra_weight * intra
  return checks.masked(temperature**2 * loss, where)


def _standardized(logits: jax.Array, form: str, axis: int) -> jax.Array:
  """Logits with mean 0 and deviation 1 over the classes that exist."""
  here = numerics.present(logits)
  centred = _centred(logits, here, axis)
  scaled = numerics.unit(centred, axis)
  count = here.sum(axis, keepdims=True)
  if form == "paper":
    scaled *= jnp.sqrt(jnp.maximum(count, 1))
  else:
    root = jnp.sqrt(jnp.maximum(count - 1, 1))
    deviation = numerics.norm(centred, axis) / root
    scaled *= root * (deviation / (deviation + 1e-7))
  return jnp.where(here, scaled, -jnp.inf)


def _pearson_distance(
  a: jax.Array, b: jax.Array, where: jax.Array, form: str, axis: int
) -> jax.Array:
  """1 - the correlation of the entries in `where` along an axis."""
  a, b = _centred(a, where, axis), _centred(b, where, axis)
  a_norm, b_norm = (numerics.norm(x, axis).squeeze(axis) for x in (a, b))
  # 1 - cos of the angle, with its digits where the angle is small.
  between = numerics.unit(a, axis) - numerics.unit(b, axis)
  distance = jnp.sum(between**2, axis) / 2.0
  if form == "released":
    size = a_norm * b_norm
    distance = (size * distance + 1e-8) / (size + 1e-8)
  return jnp.where((a_norm == 0.0) | (b_norm == 0.0), 1.0, distance)


def _centred(x: jax.Array, where: jax.Array, axis: int) -> jax.Array:
  """The entries less their mean; 0 outside `where`, and if all are equal."""
  # Without an offset first, so that a large one costs the mean no digits and
  # equal entries become exactly 0.
  top = jnp.max(
    jnp.where(where, x, -jnp.inf), axis, keepdims=True, initial=-jnp.inf
  )
  x = jnp.where(where, x - lax.stop_gradient(top), 0.0)
  count = jnp.maximum(where.sum(axis, keepdims=True), 1)
  x = jnp.where(where, x - x.sum(axis, keepdims=True) / count, 0.0)
  constant = numerics.norm(x, axis) < _NO_SPREAD
  return jnp.where(constant, 0.0, x)
