"""Contrast: each example's partner against many that are not."""

# Annotations are not evaluated: `banks` is built on this package, and may be
# the first to be imported.
from __future__ import annotations

import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax import banks
from kd_jax.losses import (
  _batch as batch,
  _checks as checks,
  _embeddings as embeddings,
  _numerics as numerics,
)


def crd(
  student_embeddings: ArrayLike,
  teacher_embeddings: ArrayLike,
  *,
  bank: banks.CRDBank,
  index: ArrayLike,
  negatives: ArrayLike,
  temperature: ArrayLike = 0.07,
  momentum: ArrayLike = 0.5,
  form: str = "released",
  axis_name: str | None = None,
  where: ArrayLike | None = None,
) -> tuple[jax.Array, banks.CRDBank]:
  """Contrastive representation distillation, with a memory bank.

    h(x, y) = e / (e + Z K / M),   e = exp(<x, y> / temperature)
    nce(x, bank) = -log h(x, bank(i)) - sum_k log [1 - h(x, bank(n_k))]
    loss = nce(student, teacher bank) + nce(teacher, student bank)
    M examples, K negatives n_k each; form="paper": Z = 1

  Tells examples apart in both representations at once: the student's i is to
  find the teacher's i among K others, and the other way round. Embeddings come
  from a learned projection on each side, both of which are trained, and are
  normalised here. Whom they are compared with are the banks: embeddings of
  earlier steps, also for the positive. A bank is stored data: no gradient goes
  into it, and none into the one that is returned.

  Z makes e / Z the mean over the data set, about: the released code estimates
  it in the first step, M times the mean e over that batch's positives and
  negatives, and keeps it. So it is here, one for each direction, in the bank.
  The code's 1e-7 beside K / M is left out. The temperature is that of the
  contrast; no T^2 comes with it.

  Memory is batch K dim numbers for each direction. Under `axis_name` each
  device gets the same bank and returns the same new one. An example that is
  twice in a batch puts the mean of the two into the bank.

  Args:
    student_embeddings: [batch, dim] any float dtype, any length.
    teacher_embeddings: the same shape. Gradients flow into it as well.
    bank: `kd_jax.banks.CRDBank` of [n_data, dim], from
      `kd_jax.banks.crd_bank_init` or the step before.
    index: [batch] integers from 0 to n_data - 1, the examples' places in the
      bank.
    negatives: [batch, K] integers from 0 to n_data - 1, from
      `kd_jax.banks.crd_negatives`.
    temperature: scalar > 0, may be traced.
    momentum: scalar from 0 to 1, may be traced: the share of a bank's old row
      in the new one. It does not change the value.
    form: "released" or "paper".
    axis_name: the mapped axis that the batch is split over; None: not split.
    where: [batch] bool; entries that are False are 0, get no gradient, and do
      not touch the bank; their index and negatives may be anything.

  Returns:
    ([batch] float32, never negative; the new bank, without gradient). NaN if a
    traced temperature or momentum is out of range; an example whose traced
    index or negatives are out of range gets NaN, and no row of the bank.

  Raises:
    ValueError: if the shapes do not fit, a number is out of range, or `form`
      is none of the two.
    TypeError: if the embeddings or the bank are not floating point, index or
      negatives not integers, or `where` not boolean.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import banks
    >>> rows = jnp.eye(3)
    >>> bank = banks.CRDBank(rows, rows, jnp.float32(0.0), jnp.float32(0.0))
    >>> negatives = jnp.array([[1, 2], [0, 2]])
    >>> of = {"index": jnp.array([0, 1]), "negatives": negatives}
    >>> right = 2.0 * rows[:2]  # where the bank has them
    >>> loss, bank = crd(right, right, bank=bank, **of)
    >>> print([f"{x:.1f}" for x in loss])
    ['3.7', '3.7']
    >>> loss, bank = crd(right[::-1], right, bank=bank, **of)
    >>> print([f"{x:.1f}" for x in loss])
    ['18.0', '18.0']

  Reference: Tian et al. 2020 (CRD), arXiv:1910.10699, Sec. 3.1.
  """
  checks.choice("form", form, "released", "paper")
  temperature = checks.positive("temperature", temperature)
  momentum = checks.fraction("momentum", momentum)
  (student, teacher), where = checks.examples(
    where,
    "[batch, dim]",
    student_embeddings=student_embeddings,
    teacher_embeddings=teacher_embeddings,
  )
  if not isinstance(bank, banks.CRDBank):
    raise TypeError(
      f"bank is a {type(bank).__name__}; it should be a kd_jax.banks.CRDBank"
    )
  bank = banks.CRDBank(*map(jnp.asarray, bank))  # it may come from a file
  _check_shapes(student, bank, index, negatives)
  n_data = bank.student.shape[0]
  reason = f"the bank has {n_data} rows"
  index, index_known = checks.rows("index", index, n_data, reason, where)
  negatives, negatives_known = checks.rows(
    "negatives", negatives, n_data, reason, where
  )
  candidates = jnp.concatenate([index[:, None], negatives], axis=1)
  student, teacher = numerics.unit(student), numerics.unit(teacher)

  def contrast(
    anchors: jax.Array, rows: jax.Array, log_z: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    rows = lax.stop_gradient(rows[candidates].astype(jnp.float32))
    scores = jnp.einsum(
      "nd,nkd->nk", anchors, rows, precision=lax.Precision.HIGHEST
    )
    scores /= temperature
    if form == "released":
      estimate = _log_z(scores, n_data, axis_name, where)
      log_z = jnp.where(jnp.isneginf(log_z), estimate, log_z)
    log_z = lax.stop_gradient(log_z)
    used = jnp.where(jnp.isneginf(log_z), 0.0, log_z)  # nothing to be used for
    log_odds = scores - used - math.log(negatives.shape[1] / n_data)
    # 1 - h(x) = h(-x), and -log h(x) = softplus(-x).
    loss = jax.nn.softplus(-log_odds[:, 0])
    return loss + jax.nn.softplus(log_odds[:, 1:]).sum(-1), log_z

  zero = jnp.zeros((), jnp.float32)
  released = form == "released"
  by_student, log_z_student = contrast(
    student, bank.teacher, bank.log_z_student if released else zero
  )
  by_teacher, log_z_teacher = contrast(
    teacher, bank.student, bank.log_z_teacher if released else zero
  )
  known = index_known * jnp.prod(negatives_known, 1)
  loss = checks.masked((by_student + by_teacher) * known, where)

  write = jnp.isfinite(index_known)
  write = write if where is None else write & where
  update = lambda rows, new: _write(
    rows, new, index, write, momentum, axis_name
  )
  new_bank = banks.CRDBank(
    update(bank.student, student),
    update(bank.teacher, teacher),
    log_z_student if released else bank.log_z_student,
    log_z_teacher if released else bank.log_z_teacher,
  )
  return loss, jax.tree.map(lax.stop_gradient, new_bank)


def _log_z(
  scores: jax.Array,
  n_data: int,
  axis_name: str | None,
  where: jax.Array | None,
) -> jax.Array:
  """Log of n_data times the mean exp(score) of the valid examples."""
  mask = jnp.ones(scores.shape[0], bool) if where is None else where
  rows = jnp.where(mask, jax.nn.logsumexp(scores, axis=1), -jnp.inf)
  total = jax.nn.logsumexp(batch.gather(axis_name, rows))
  count = batch.count(axis_name, where, scores.shape[0]) * scores.shape[1]
  return total - jnp.log(embeddings.at_least_one(count)) + math.log(n_data)


def _write(
  rows: jax.Array,
  new: jax.Array,
  index: jax.Array,
  write: jax.Array,
  momentum: jax.Array,
  axis_name: str | None,
) -> jax.Array:
  """The bank with the rows of this batch, on all devices, moved."""
  new, index, write = (batch.gather(axis_name, x) for x in (new, index, write))
  # Twice the same example: both write the same, whichever comes last.
  same = (index[:, None] == index) & write[:, None] & write
  share = same / embeddings.at_least_one(same.sum(1, keepdims=True))
  new = jnp.matmul(share, new, precision=lax.Precision.HIGHEST)
  old = rows[index].astype(jnp.float32)
  moved = numerics.unit(momentum * old + (1.0 - momentum) * new)
  place = jnp.where(write, index, rows.shape[0])  # beyond the end: dropped
  return rows.at[place].set(moved.astype(rows.dtype), mode="drop")


def _check_shapes(
  student: jax.Array,
  bank: banks.CRDBank,
  index: ArrayLike,
  negatives: ArrayLike,
) -> None:
  size, dim = student.shape
  for name, rows in (("student", bank.student), ("teacher", bank.teacher)):
    checks.floats(**{f"bank.{name}": rows})
    if rows.shape != (*bank.student.shape[:1], dim) or rows.shape[0] < 1:
      raise ValueError(
        f"bank.{name} has shape {rows.shape} and student_embeddings has shape "
        f"{student.shape}; the bank should be [n_data, {dim}] on both sides"
      )
  for name, shape, right in (
    ("index", jnp.shape(index), jnp.shape(index) == (size,)),
    (
      "negatives",
      jnp.shape(negatives),
      jnp.shape(negatives)[:1] == (size,)
      and len(jnp.shape(negatives)) == 2
      and jnp.shape(negatives)[1] > 0,
    ),
  ):
    if not right:
      wanted = f"({size},)" if name == "index" else f"({size}, K)"
      raise ValueError(
        f"{name} has shape {shape} and student_embeddings has shape "
        f"{student.shape}; {name} should have shape {wanted}"
      )
