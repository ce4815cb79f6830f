"""Memory banks: embeddings of a whole data set, kept between the steps.

A bank is plain data, an argument and a return value of the loss that uses it:
it belongs into the part of a training state that is not trained.

  >>> import jax, jax.numpy as jnp
  >>> from kd_jax import banks, losses
  >>> bank = banks.crd_bank_init(jax.random.key(0), n_data=50, dim=8)
  >>> index = jnp.array([4, 17])  # where the batch stands in the data set
  >>> negatives = banks.crd_negatives(jax.random.key(1), index, 10, n_data=50)
  >>> student, teacher = jax.random.normal(jax.random.key(2), (2, 2, 8))
  >>> loss, bank = losses.crd(
  ...   student, teacher, bank=bank, index=index, negatives=negatives
  ... )
  >>> loss.shape, bank.student.shape
  ((2,), (50, 8))
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kd_jax.losses import _checks as checks, _numerics as numerics


class CRDBank(NamedTuple):
  """What `kd_jax.losses.crd` remembers.

  Attributes:
    student: [n_data, dim] float, the student's directions, of length 1.
    teacher: [n_data, dim] float, the teacher's.
    log_z_student: scalar float32, log of the constant Z that divides the
      scores of a student among the teacher's bank; -inf: not estimated yet.
    log_z_teacher: scalar float32, of a teacher among the student's bank.
  """

  student: jax.Array
  teacher: jax.Array
  log_z_student: jax.Array
  log_z_teacher: jax.Array


def crd_bank_init(key: jax.Array, n_data: int, dim: int) -> CRDBank:
  """A bank of random directions, the same for all that use the key.

  Args:
    key: random key.
    n_data: the number of examples in the data set.
    dim: the width of the projected embeddings.

  Returns:
    A `CRDBank` in float32, with the two constants not estimated yet. The
    released code draws from a cube, so that lengths are 1 only on average.

  Raises:
    ValueError: if a size is not positive.

  Example:
    >>> bank = crd_bank_init(jax.random.key(0), n_data=4, dim=3)
    >>> print(jnp.round(jnp.linalg.norm(bank.student, axis=1), 3))
    [1. 1. 1. 1.]
  """
  if n_data < 1 or dim < 1:
    raise ValueError(
      f"n_data is {n_data} and dim is {dim}; they should be at least 1"
    )
  draws = jax.random.normal(key, (2, n_data, dim), jnp.float32)
  student, teacher = numerics.unit(draws)
  unset = jnp.full((), -jnp.inf, jnp.float32)
  return CRDBank(student, teacher, unset, unset)


def crd_negatives(
  key: jax.Array,
  index: ArrayLike,
  count: int,
  n_data: int,
  *,
  labels: ArrayLike | None = None,
) -> jax.Array:
  """Draws whom the examples of a batch are contrasted with.

  Uniformly and with replacement, from all other examples or, with labels, from
  those of other classes, as in the released code (which draws without
  replacement as long as there are enough). The draw of an example depends on
  the key and on its index, not on its place in the batch or on its device.

  Args:
    key: random key, a new one for each step.
    index: [batch] integers from 0 to n_data - 1, the examples.
    count: how many for each, 16384 in the paper's experiments.
    n_data: the number of examples in the data set.
    labels: [n_data] integers, the classes of the whole data set; None: each
      example is a class of its own.

  Returns:
    [batch, count] int32.

  Raises:
    ValueError: if count is not positive, the shapes do not fit, an index that
      is not traced is out of range, or labels that are not traced are all the
      same (if they are traced, every draw is the last example).
    TypeError: if index or labels are not integers.

  Example:
    >>> index = jnp.array([0, 2])
    >>> labels = jnp.array([0, 0, 0, 1])  # all but the last are of one class
    >>> print(crd_negatives(jax.random.key(0), index, 3, 4, labels=labels))
    [[3 3 3]
     [3 3 3]]

  Reference: Tian et al. 2020 (CRD), arXiv:1910.10699, Sec. 3.1.
  """
  if count < 1 or n_data < 2:
    raise ValueError(
      f"count is {count} and n_data is {n_data}; they should be at least 1 "
      "and 2"
    )
  if jnp.ndim(index) != 1:
    raise ValueError(
      f"index has shape {jnp.shape(index)}; it should be [batch]"
    )
  index, _ = checks.rows("index", index, n_data, f"n_data is {n_data}")
  if labels is None:
    # In order of class, an example's class starts at its own place.
    order, first, size = None, index, jnp.ones_like(index)
  else:
    order, first, size = _classes(labels, index, n_data)

  def draw(i: jax.Array, first: jax.Array, size: jax.Array) -> jax.Array:
    key_of_example = jax.random.fold_in(key, i)
    place = jax.random.randint(key_of_example, (count,), 0, n_data - size)
    # Past the example's own class.
    return place + jnp.where(place >= first, size, 0)

  places = jax.vmap(draw)(index, first, size)
  return places if order is None else order[places]


def _classes(
  labels: ArrayLike, index: jax.Array, n_data: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(the data set in order of class, where an example's class starts, size)."""
  dtype = checks.dtype("labels", labels)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"labels has dtype {dtype}; it should be integer")
  if jnp.shape(labels) != (n_data,):
    raise ValueError(
      f"labels has shape {jnp.shape(labels)}; it should be ({n_data},), one "
      "class for each of the n_data examples"
    )
  if not isinstance(labels, jax.core.Tracer):
    seen = np.asarray(labels)
    if (seen == seen[0]).all():
      raise ValueError(f"labels are all {seen[0]}; there are no negatives")
  labels = jnp.asarray(labels)
  order = jnp.argsort(labels)
  in_order, own = labels[order], labels[index]
  first = jnp.searchsorted(in_order, own, side="left")
  size = jnp.searchsorted(in_order, own, side="right") - first
  return order.astype(jnp.int32), first, size
