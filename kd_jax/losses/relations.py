"""Distances and angles between the examples of a batch.

What is matched is how the examples stand to each other, so student and teacher
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


def rkd_distance(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  *,
  form: str = "released",
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Relational distillation of distances.

    d(i, j) = ||x(i) - x(j)|| / mean of these over all pairs i != j
    loss = 1/N^2 sum_ij h(d_s(i, j) - d_t(i, j))              form="released"
    loss = 1/(N (N - 1)) sum_{i != j} h(d_s - d_t)            form="paper"
    h(x) = x^2 / 2 where |x| < 1, else |x| - 1/2

  For embeddings, metric learning above all: the student may place its examples
  elsewhere, turned and scaled, if only their distances have the teacher's
  proportions. Gradients flow through the mean as well. The released code
  averages over all entries, also those of an example with itself, which are 0;
  the paper sums over pairs of distinct examples, of which this takes the mean,
  as everywhere for sums over the batch. Beside `rkd_angle` it has half of that
  one's weight.

  Args:
    student_embeddings: [batch, ...] any float dtype, flattened per example.
    teacher_embeddings: [batch, ...] with as many axes, in which the sizes may
      differ. Gradients flow into it as well.
    form: "released" or "paper".
    axis_name: the mapped axis that the batch is split over; None: not split.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, one value per anchor i, never negative; 0 for an example
    that is alone.

  Raises:
    ValueError: if the batch sizes differ, or `form` is none of the two.
    TypeError: if the embeddings are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> teacher = jnp.array([[0.0], [1.0], [2.0]])
    >>> print([f"{x:.3f}" for x in rkd_distance(student, teacher)])
    ['0.067', '0.043', '0.105']
    >>> print([f"{x:.3f}" for x in rkd_distance(student, 2.0 + 3.0 * student)])
    ['0.000', '0.000', '0.000']

  Reference: Park et al. 2019 (RKD), arXiv:1904.05068, Sec. 3.2.1.
  """
  checks.choice("form", form, "released", "paper")
  student, teacher, where = embeddings.pair(
    student_embeddings, teacher_embeddings, where
  )
  pairs = batch.partners(axis_name, where, student.shape[0])
  total = batch.count(axis_name, where, student.shape[0])

  def potential(x: jax.Array) -> jax.Array:
    d = relate.distances(x, batch.gather(axis_name, x))
    d = jnp.where(pairs, d, 0.0)
    # The ratio to the mean does not depend on the scale, so that one is divided
    # out: the derivative divides by the mean's square.
    top = lax.stop_gradient(batch.gather(axis_name, jnp.max(d, -1, initial=0)))
    top = jnp.max(top, initial=0.0)
    d = d / jnp.where(top == 0.0, 1.0, top)
    mean = batch.gather(axis_name, d.sum(-1)).sum() / embeddings.at_least_one(
      total * (total - 1.0)
    )
    return d / jnp.where(mean == 0.0, 1.0, mean)

  gaps = _huber(potential(student) - potential(teacher))
  others = total if form == "released" else total - 1.0
  return checks.masked(gaps.sum(-1) / embeddings.at_least_one(others), where)


def rkd_angle(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  *,
  form: str = "released",
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Relational distillation of angles.

    a(i, j, k) = cosine of the angle at x(j) between x(i) and x(k)
    loss = 1/N^3 sum_ijk h(a_s - a_t)                         form="released"
    loss = mean over distinct i, j, k of h(a_s - a_t)         form="paper"
    h(x) = x^2 / 2 where |x| < 1, else |x| - 1/2

  Beside `rkd_distance`, and usually the stronger of the two. The released code
  averages over all entries, also those where two of the three are the same
  example; the paper sums over triplets of distinct examples, of which this
  takes the mean, as everywhere for sums over the batch. Time grows with N^3,
  memory with N^2: middle examples are taken a few at a time, in a large batch
  one, and again for the gradient.

  Args:
    student_embeddings: [batch, ...] any float dtype, flattened per example.
    teacher_embeddings: [batch, ...] with as many axes, in which the sizes may
      differ. Gradients flow into it as well.
    form: "released" or "paper".
    axis_name: the mapped axis that the batch is split over; None: not split.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, one value per middle example j, never negative; 0 for an
    example that is alone.

  Raises:
    ValueError: if the batch sizes differ, or `form` is none of the two.
    TypeError: if the embeddings are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> teacher = jnp.array([[0.0], [1.0], [2.0]])
    >>> print([f"{x:.3f}" for x in rkd_angle(student, teacher)])
    ['0.111', '0.268', '0.010']

  Reference: Park et al. 2019 (RKD), arXiv:1904.05068, Sec. 3.2.2.
  """
  checks.choice("form", form, "released", "paper")
  student, teacher, where = embeddings.pair(
    student_embeddings, teacher_embeddings, where
  )
  pairs = batch.partners(axis_name, where, student.shape[0])
  total = batch.count(axis_name, where, student.shape[0])
  everyone = [batch.gather(axis_name, x) for x in (student, teacher)]
  size = pairs.shape[1]

  def of_anchor(others: jax.Array, *middle: jax.Array) -> jax.Array:
    # Those who are nobody's partner have no direction: all their gaps are 0.
    to_s, to_t = (
      jnp.where(others[:, None], numerics.unit(x - y), 0.0)
      for x, y in zip(everyone, middle, strict=True)
    )
    return _sum_of_gaps(to_s, to_t, form == "paper", max(128, -(-size // 4)))

  each = batch.by_row(of_anchor, size**2, pairs, student, teacher)
  number = total**2
  if form == "paper":
    number = (total - 1.0) * (total - 2.0)
  return checks.masked(each / embeddings.at_least_one(number), where)


def _sum_of_gaps(
  student: jax.Array, teacher: jax.Array, distinct: bool, block: int
) -> jax.Array:
  """The sum of h(a_s - a_t) over all pairs of directions.

  Args:
    student: [n, student_width] directions.
    teacher: [n, teacher_width] directions.
    distinct: whether a direction is no pair with itself.
    block: up to how many directions their pairs are computed at once.
  """

  def gaps(rows: slice, columns: slice) -> jax.Array:
    return _huber(
      relate.gram(student[rows], student[columns])
      - relate.gram(teacher[rows], teacher[columns])
    )

  n = student.shape[0]
  if n <= block:
    found = gaps(slice(n), slice(n))
    if distinct:
      found = jnp.where(jnp.eye(n, dtype=bool), 0.0, found)
    return found.sum()
  # The pairs are symmetric: those between the halves are computed once.
  first, second = slice(n // 2), slice(n // 2, n)
  within = [
    _sum_of_gaps(student[half], teacher[half], distinct, block)
    for half in (first, second)
  ]
  return 2.0 * gaps(first, second).sum() + within[0] + within[1]


def _huber(gap: jax.Array) -> jax.Array:
  size = jnp.abs(gap)
  return jnp.where(size < 1.0, gap**2 / 2.0, size - 0.5)
