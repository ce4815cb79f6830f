"""Similarities between the examples of a batch.

What is matched is how like each other the examples are, so student and teacher
may have different widths and no layer is needed between them. Masked examples
are nobody's partner. With `axis_name`, partners come from all devices.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax import relate
from kd_jax.losses import (
  _batch as batch,
  _checks as checks,
  _embeddings as embeddings,
  _numerics as numerics,
)

# The released code of `pkt` adds it to each probability.
_EPSILON = 1e-7


def similarity_preserving(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  *,
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Similarity-preserving distillation: the rows of the batch's Gram matrix.

    g(i) = G(i, :) / ||G(i, :)||,   G = X X^T
    loss = 1/N^2 sum_i ||g_s(i) - g_t(i)||^2

  For feature maps as they are: pairs that excite the teacher alike should
  excite the student alike. Lengths count besides directions, so examples with
  large activations dominate the rows of all others.

  Args:
    student_embeddings: [batch, ...] any float dtype, flattened per example.
    teacher_embeddings: [batch, ...] with as many axes, in which the sizes may
      differ. Gradients flow into it as well.
    axis_name: the mapped axis that the batch is split over; None: not split.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, one value per anchor i, never negative. The row of an
    example that is 0 throughout is 0.

  Raises:
    ValueError: if the batch sizes differ.
    TypeError: if the embeddings are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> teacher = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    >>> print([f"{x:.3f}" for x in similarity_preserving(student, teacher)])
    ['0.293', '0.293']

  Reference: Tung and Mori 2019 (SP), arXiv:1907.09682, Sec. 2.
  """
  student, teacher, where = embeddings.pair(
    student_embeddings, teacher_embeddings, where
  )

  def rows(x: jax.Array) -> jax.Array:
    everyone = batch.gather(axis_name, x)
    # Rows of length 1 do not depend on the common scale. Without it, squares
    # of small activations do not vanish.
    scale = lax.stop_gradient(jnp.max(jnp.abs(everyone), initial=0.0))
    scale = jnp.where(scale == 0.0, 1.0, scale)
    return numerics.unit(relate.gram(x / scale, everyone / scale))

  gaps = jnp.sum((rows(student) - rows(teacher)) ** 2, -1)
  total = batch.count(axis_name, where, student.shape[0])
  return checks.masked(gaps / embeddings.at_least_one(total), where)


def correlation_congruence(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  *,
  gamma: ArrayLike = 0.4,
  order: int = 2,
  kernel: str = "rbf",
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Correlation congruence: a kernel between the examples of the batch.

    loss = 1/N^2 sum_ij [k_s(i, j) - k_t(i, j)]^2
    k = exp(-2 gamma) sum_{n=0..order} (2 gamma <u(i), u(j)>)^n / n!
    u = x / ||x||;   kernel="bilinear": k = <x(i), x(j)>

  Like `similarity_preserving`, for embeddings. k is the Taylor series of the
  Gaussian kernel exp(-gamma ||u(i) - u(j)||^2). The authors have published no
  code. The defaults are those of the ports of this equation; RepDistiller has,
  under this name, products of the differences of neighbouring examples, which
  the paper does not have.

  Args:
    student_embeddings: [batch, ...] any float dtype, flattened per example.
    teacher_embeddings: [batch, ...] with as many axes, in which the sizes may
      differ. Gradients flow into it as well.
    gamma: scalar > 0, may be traced; for kernel="rbf".
    order: how many terms the series has beside the constant, at least 1.
    kernel: "rbf" or "bilinear".
    axis_name: the mapped axis that the batch is split over; None: not split.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, one value per anchor i, never negative. The direction of
    an example that is 0 throughout is 0. NaN if a traced gamma is not positive
    and finite.

  Raises:
    ValueError: if the batch sizes differ, or gamma, order or kernel is none
      of those allowed.
    TypeError: if the embeddings are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> teacher = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    >>> loss = correlation_congruence(student, teacher)
    >>> print([f"{x:.3f}" for x in loss])
    ['0.127', '0.127']

  Reference: Peng et al. 2019 (CCKD), arXiv:1904.01802, Sec. 3.
  """
  gamma = checks.positive("gamma", gamma)
  if not isinstance(order, int) or order < 1:
    raise ValueError(f"order is {order!r}; it should be an int, at least 1")
  checks.choice("kernel", kernel, "rbf", "bilinear")
  student, teacher, where = embeddings.pair(
    student_embeddings, teacher_embeddings, where
  )

  def relation(x: jax.Array) -> jax.Array:
    products = relate.gram(
      x, batch.gather(axis_name, x), cosine=kernel == "rbf"
    )
    if kernel == "bilinear":
      return products
    series = jnp.zeros_like(products)
    for n in range(order, 0, -1):  # the constant cancels between the two
      series = (series + 1.0) * 2.0 * gamma * products / n
    return jnp.exp(-2.0 * gamma) * series

  # Masked examples are 0, and so are all their products on both sides.
  gaps = jnp.sum((relation(student) - relation(teacher)) ** 2, -1)
  total = batch.count(axis_name, where, student.shape[0])
  return checks.masked(gaps / embeddings.at_least_one(total), where)


def pkt(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  *,
  form: str = "released",
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Probabilistic knowledge transfer: who is near whom, as probabilities.

    p(j | i) = k_t(i, j) / sum_j k_t(i, j),   q the same with k_s
    loss = 1/N^2 sum_ij p(j | i) log [p(j | i) / q(j | i)]    form="released"
    loss = 1/N sum_i sum_{j != i} p log (p / q)               form="paper"
    k = (1 + cosine of x(i) and x(j)) / 2

  For embeddings whose directions matter, retrieval say. In the released form
  an example is a neighbour of its own, and the mean over j makes the loss N
  times smaller; the paper leaves i = j out, also below the line, and sums over
  i, of which this takes the mean. Both have 1e-7 added to each probability in
  the logarithm, as the code does, so that opposite directions stay finite.

  Args:
    student_embeddings: [batch, ...] any float dtype, flattened per example.
    teacher_embeddings: [batch, ...] with as many axes, in which the sizes may
      differ. Gradients flow into it as well.
    form: "released" or "paper".
    axis_name: the mapped axis that the batch is split over; None: not split.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, one value per anchor i, never negative; 0 for an example
    that is alone. The cosine with an example that is 0 throughout is 0.

  Raises:
    ValueError: if the batch sizes differ, or `form` is none of the two.
    TypeError: if the embeddings are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> teacher = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> print([f"{x:.3f}" for x in pkt(student, teacher)])
    ['0.150', '0.010', '0.137']

  Reference: Passalis and Tefas 2018 (PKT), arXiv:1803.10837, Sec. 3.
  """
  checks.choice("form", form, "released", "paper")
  student, teacher, where = embeddings.pair(
    student_embeddings, teacher_embeddings, where
  )
  size = student.shape[0]
  pairs = batch.partners(axis_name, where, size)
  total = batch.count(axis_name, where, size)
  if form == "released":
    itself = batch.positions(axis_name, size)[:, None] == jnp.arange(
      pairs.shape[1]
    )
    pairs |= itself if where is None else itself & where[:, None]

  def neighbours(x: jax.Array) -> jax.Array:
    cosines = relate.gram(x, batch.gather(axis_name, x), cosine=True)
    # Rounding may put the cosine of opposite directions below -1.
    k = jnp.where(pairs, jnp.maximum((1.0 + cosines) / 2.0, 0.0), 0.0)
    mass = k.sum(-1, keepdims=True)
    return k / jnp.where(mass == 0.0, 1.0, mass)

  p, q = neighbours(teacher), neighbours(student)
  gap = (q - p) / (p + _EPSILON)
  near = jnp.abs(gap) < 0.5
  log_ratio = jnp.where(
    near,
    jnp.log1p(jnp.where(near, gap, 0.0)),
    jnp.log(q + _EPSILON) - jnp.log(p + _EPSILON),
  )
  # The 1e-7 are the same for both, so these terms still sum to the divergence.
  terms = numerics.excess(p + _EPSILON, q + _EPSILON, log_ratio)
  each = jnp.where(pairs, terms, 0.0).sum(-1)
  if form == "released":
    each = each / embeddings.at_least_one(total)
  return checks.masked(each, where)
