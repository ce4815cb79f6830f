"""Distances between sets: the batch's embeddings as a distribution.

Which example is which does not count, so the value belongs to the whole batch:
each valid example has it, and its mean is the loss. Masked examples are not in
the set. With `axis_name`, the set comes from all devices.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def mmd(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  *,
  bandwidth: ArrayLike | None = None,
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared maximum mean discrepancy with a Gaussian kernel.

    loss = mean_ij [k(s(i), s(j)) + k(t(i), t(j)) - 2 k(s(i), t(j))]
    k(x, y) = exp(-||x - y||^2 / (2 bandwidth^2))

  All of the distribution, without a model of it, and bounded by 2: examples
  much further apart than the bandwidth are not seen. The mean includes i = j,
  as in the released code: the biased estimate, a distance of the two samples
  that is 0 only where they are the same. The unbiased one can be negative. The
  code's linear kernel is the squared distance of the means.

  Without a bandwidth it is the mean distance of all pairs, within each side
  and between them, as in the released code. There it is a constant for the
  gradient; here the gradient flows through it. For theirs, or to freeze it,
  give a number or `jax.lax.stop_gradient` of one.

  Args:
    student_embeddings: [batch, ...] any float dtype, flattened per example.
    teacher_embeddings: the same shape. Gradients flow into it as well.
    bandwidth: scalar > 0, may be traced; None: the mean distance.
    axis_name: the mapped axis that the batch is split over; None: not split.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, the same value for each valid example, never negative
    beyond rounding. NaN if a traced bandwidth is not positive and finite.

  Raises:
    ValueError: if the shapes differ, or `bandwidth` is not positive.
    TypeError: if the embeddings are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0], [1.0]])
    >>> print([f"{x:.3f}" for x in mmd(student, student + 1.0, bandwidth=1.0)])
    ['0.432', '0.432']

  Reference: Gretton et al. 2008, arXiv:0805.2368, Sec. 2; as a distillation
  loss, Montesuma 2025 (KD2M), arXiv:2504.01757.
  """
  if bandwidth is not None:
    bandwidth = checks.positive("bandwidth", bandwidth)
  student, teacher, where = embeddings.pair(
    student_embeddings, teacher_embeddings, where, same=True
  )
  students, teachers, valid = _everyone(student, teacher, axis_name, where)
  mask = jnp.ones(student.shape[0], bool) if where is None else where
  pairs = mask[:, None] & valid
  number = embeddings.at_least_one(jnp.sum(valid, dtype=jnp.float32))

  def mean(terms: jax.Array) -> jax.Array:
    sums = jnp.where(pairs, terms, 0.0).sum(-1)
    return batch.gather(axis_name, sums).sum() / number**2

  # Neither a shift nor a change of units matters: the examples are put around
  # 0 and at 1, so that no square overflows, vanishes or loses its digits.
  centre = lax.stop_gradient(jnp.sum(students / number, 0))
  extent = jnp.maximum(jnp.abs(students - centre), jnp.abs(teachers - centre))
  extent = jnp.max(jnp.where(valid[:, None], extent, 0.0), initial=0.0)
  extent = lax.stop_gradient(jnp.where(extent == 0.0, 1.0, extent))
  distances = [
    relate.distances(x, y) / extent
    for x in (student, teacher)
    for y in (students, teachers)
  ]
  if bandwidth is None:
    within_student, between, _, within_teacher = distances
    width = mean(within_student + between + within_teacher) / 3.0
    # All in one point: any bandwidth gives 0.
    width = jnp.where(width == 0.0, 1.0, width)
  else:
    width = bandwidth / extent
  points = [
    x / extent / width
    for x in (
      student - centre,
      students - centre,
      student - teacher,
      students - teachers,
    )
  ]
  value = mean(_kernel_differences([d / width for d in distances], *points))
  return checks.masked(jnp.broadcast_to(value, mask.shape), where)


def gaussian_wasserstein(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  *,
  form: str = "released",
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared Wasserstein distance of Gaussians fitted to the two sides.

    loss = ||m_s - m_t||^2 + ||d_s - d_t||^2                  form="released"
    loss = ||m_s - m_t||^2 + B                                form="paper"
    B = tr(S_s + S_t - 2 (S_s^1/2 S_t S_s^1/2)^1/2)
    m, S, d: mean, covariance and deviations of each coordinate (over N)

  Mean and spread, and nothing finer; quadratic, so that sides far apart still
  feel each other, where `mmd` goes flat. B is the squared Bures distance of the
  covariances, which needs a singular value decomposition of a batch by batch
  matrix. The released code takes the coordinates as independent, which is
  cheaper, and its value is the same for diagonal covariances.

  Args:
    student_embeddings: [batch, ...] any float dtype, flattened per example.
    teacher_embeddings: the same shape. Gradients flow into it as well.
    form: "released" or "paper".
    axis_name: the mapped axis that the batch is split over; None: not split.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, the same value for each valid example, never negative.
    First derivatives are right, also where covariances are singular; second
    ones are so for form="released" only.

  Raises:
    ValueError: if the shapes differ, or `form` is none of the two.
    TypeError: if the embeddings are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 0.0], [2.0, 0.0]])
    >>> teacher = jnp.array([[0.0, 3.0], [6.0, 3.0]])  # mean and spread differ
    >>> print([f"{x:.1f}" for x in gaussian_wasserstein(student, teacher)])
    ['17.0', '17.0']

  Reference: Bhatia et al. 2017, arXiv:1712.01504, Sec. 1, for the distance; as
  a distillation loss, Montesuma 2025 (KD2M), arXiv:2504.01757.
  """
  checks.choice("form", form, "released", "paper")
  student, teacher, where = embeddings.pair(
    student_embeddings, teacher_embeddings, where, same=True
  )
  students, teachers, mask = _everyone(student, teacher, axis_name, where)
  number = embeddings.at_least_one(jnp.sum(mask, dtype=jnp.float32))
  shift = jnp.sum((students - teachers) / number, 0)
  a, b = _centred(students, mask), _centred(teachers, mask)
  if form == "released":
    gap = (numerics.norm(a, 0) - numerics.norm(b, 0))[0]
    spread = jnp.sum(gap**2)
  else:
    # tr (S_s^1/2 S_t S_s^1/2)^1/2 is the nuclear norm of a b^T / N.
    spread = _up_to_rotation(a.T, b.T)
  value = jnp.sum(shift**2) + spread / number
  return checks.masked(jnp.broadcast_to(value, student.shape[:1]), where)


def procrustes(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  *,
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared orthogonal Procrustes distance.

    loss = min_Q ||A Q - B||_F^2 = 2 - 2 ||A^T B||_*
    A, B: student, teacher, centred and divided by their Frobenius norm

  The embeddings as they are, up to a shift, a rotation and a scale: unlike a
  learned projection, and unlike CKA, it is 0 only where all distances have the
  teacher's proportions. Here examples do keep their identity: i is compared
  with i. A narrower student counts as one with zeros added. Needs a singular
  value decomposition, batch by batch where both widths are larger than that.

  Args:
    student_embeddings: [batch, ...] any float dtype, flattened per example.
    teacher_embeddings: [batch, ...] with as many axes, in which the sizes may
      differ. Gradients flow into it as well.
    axis_name: the mapped axis that the batch is split over; None: not split.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, the same value for each valid example, from 0 to 2. A side
    whose examples are all equal has A = 0. First derivatives are right, second
    ones are not.

  Raises:
    ValueError: if the batch sizes differ.
    TypeError: if the embeddings are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> turned = 5.0 * student[:, ::-1] + 7.0
    >>> print([f"{x:.3f}" for x in procrustes(student, turned)])
    ['0.000', '0.000', '0.000']
    >>> print([f"{x:.3f}" for x in procrustes(student, turned[::-1])])
    ['0.558', '0.558', '0.558']

  Reference: Ding et al. 2021, arXiv:2108.01661, Sec. 2, for the distance and
  its normalisation; as a distillation loss, Bhattarai et al. 2025,
  arXiv:2509.25253.
  """
  student, teacher, where = embeddings.pair(
    student_embeddings, teacher_embeddings, where
  )
  students, teachers, mask = _everyone(student, teacher, axis_name, where)
  a = numerics.unit(_centred(students, mask), (0, 1))
  b = numerics.unit(_centred(teachers, mask), (0, 1))
  value = _up_to_rotation(a, b)
  return checks.masked(jnp.broadcast_to(value, student.shape[:1]), where)


def _everyone(
  student: jax.Array,
  teacher: jax.Array,
  axis_name: str | None,
  where: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(student, teacher, mask) of the whole batch."""
  mask = jnp.ones(student.shape[0], bool) if where is None else where
  return (
    batch.gather(axis_name, student),
    batch.gather(axis_name, teacher),
    batch.gather(axis_name, mask),
  )


def _centred(x: jax.Array, mask: jax.Array) -> jax.Array:
  """[n, width] without the mean of the valid examples; 0 where masked."""
  number = embeddings.at_least_one(jnp.sum(mask, dtype=jnp.float32))
  valid = mask[:, None]
  # The second time takes off the rounding of a mean that is far from 0.
  for _ in range(2):
    x = jnp.where(valid, x - jnp.sum(x / number, 0), 0.0)
  return x


def _kernel_differences(
  distances: Sequence[jax.Array],
  x: jax.Array,
  xs: jax.Array,
  gap: jax.Array,
  gaps: jax.Array,
) -> jax.Array:
  """[n, m] k(x, xs) - k(x, ys) - k(y, xs) + k(y, ys) of a unit Gaussian kernel.

  Where x is near y, and xs near ys, the four terms cancel. Their exponents
  differ by the small numbers u, v and u + v + w, which are known without
  cancellation, and so then is the result.

  Args:
    distances: the four [n, m], in this order.
    x: [n, width] float32; its partner is y.
    xs: [m, width] float32.
    gap: [n, width] float32, x - y.
    gaps: [m, width] float32, xs - ys.
  """
  first, *others = (jnp.exp(-(d**2) / 2.0) for d in distances)
  plain = first - others[0] - others[1] + others[2]
  u = relate.gram(x, gaps) - jnp.sum(xs * gaps - gaps**2 / 2.0, -1)
  v = relate.gram(gap, xs) - jnp.sum(x * gap - gap**2 / 2.0, -1, keepdims=True)
  w = -relate.gram(gap, gaps)
  near = jnp.maximum(jnp.maximum(jnp.abs(u), jnp.abs(v)), jnp.abs(w)) < 0.5
  u, v, w = (jnp.where(near, exponent, 0.0) for exponent in (u, v, w))
  exact = jnp.expm1(-u) * jnp.expm1(-v) + jnp.exp(-u - v) * jnp.expm1(-w)
  return jnp.where(near, first * exact, plain)


def _up_to_rotation(a: jax.Array, b: jax.Array) -> jax.Array:
  """The squared distance of a and b with the best rotation of a's last axis.

    min_Q ||a Q - b||^2 = ||a||^2 + ||b||^2 - 2 ||a^T b||_*

  for [n, width] and [n, other width], the narrower filled up with zeros. The
  derivative of a minimum is that of the function at the minimum: Q counts as a
  constant, and no singular vector is differentiated, whose derivatives are
  infinite where singular values coincide. The first form is a sum of squares,
  which keeps its digits where a and b are nearly equal.
  """
  q = lax.stop_gradient(_best_rotation(a, b))
  turned = jnp.matmul(a, q, precision=lax.Precision.HIGHEST)
  back = jnp.matmul(turned, q.T, precision=lax.Precision.HIGHEST)
  # The second term is the part of a that has no counterpart in b.
  return jnp.sum((turned - b) ** 2) + jnp.sum((a - back) ** 2)


def _best_rotation(a: jax.Array, b: jax.Array) -> jax.Array:
  """U V^T of a^T b = U S V^T, over the singular values that are not 0.

  They are rarely all positive: centring takes one away, and so does each
  duplicate. What lies in their directions is not turned at all, so that the
  gradient is the smallest of those that fit, and not arbitrary.
  """
  a, b = numerics.unit(a, (0, 1)), numerics.unit(b, (0, 1))
  if a.shape[0] < min(a.shape[1], b.shape[1]):
    # The same in the few dimensions that the examples span.
    basis_a, rest_a = jnp.linalg.qr(a.T)
    basis_b, rest_b = jnp.linalg.qr(b.T)
    cross = jnp.matmul(rest_a, rest_b.T, precision=lax.Precision.HIGHEST)
  else:
    cross = jnp.matmul(a.T, b, precision=lax.Precision.HIGHEST)
  u, s, vt = jnp.linalg.svd(cross, full_matrices=False)
  # Ten units of rounding.
  kept = s > 10 * jnp.finfo(s.dtype).eps * jnp.max(s, initial=0.0)
  q = jnp.matmul(jnp.where(kept, u, 0.0), vt, precision=lax.Precision.HIGHEST)
  if a.shape[0] < min(a.shape[1], b.shape[1]):
    q = jnp.matmul(basis_a, q, precision=lax.Precision.HIGHEST)
    q = jnp.matmul(q, basis_b.T, precision=lax.Precision.HIGHEST)
  return q
