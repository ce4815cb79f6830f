"""What is left of a teacher without its knowledge of the other classes."""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks, _numerics as numerics
from kd_jax.targets import _inputs as inputs


def permute_nonmax(
  teacher_logits: ArrayLike,
  key: jax.Array,
  *,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The teacher's logits, all but the largest in random order.

    target(c*) = teacher_logits(c*),   c* = argmax teacher_logits
    target(c) = teacher_logits(phi(c)),   phi a permutation of the others

  DKPP, a control: confidence and entropy stay, which of the other classes are
  alike is lost. A student that learns from this as well as from the teacher
  did not need the latter. At any temperature. The largest logit stays where
  the teacher has it, right or wrong.

  Args:
    teacher_logits: [..., classes] any float dtype, classes along `axis`.
    key: a key of `jax.random`. Each example gets its own permutation, and the
      paper new ones in each step: fold the step into the key.
    axis: the class axis.
    where: [...] bool; entries that are False get no gradient.

  Returns:
    [..., classes] float32, the target: the same values in another order.
    Absent classes stay absent, and are not part of the permutation.

  Raises:
    ValueError: if the mask has another shape.
    TypeError: if an array has the wrong dtype.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> teacher = jnp.array([3.0, 9.0, 2.0, 1.0, 0.0])
    >>> target = permute_nonmax(teacher, jax.random.key(0))
    >>> print(target[1], jnp.sort(target))
    9.0 [0. 1. 2. 3. 9.]

  Reference: Furlanello et al. 2018 (DKPP), arXiv:1805.04770, Sec. 3.2.
  """
  (teacher,), _ = inputs.logits(where, axis, teacher_logits=teacher_logits)
  z = jnp.moveaxis(teacher, axis, -1)
  here = numerics.present(z)
  classes = jnp.arange(z.shape[-1])
  largest = classes == jnp.argmax(z, -1, keepdims=True)
  free = here & ~largest
  # In random order: the largest, those that move, the absent ones.
  first = jnp.where(largest, -1.0, jnp.where(free, 0.0, 2.0))
  noise = jnp.where(free, jax.random.uniform(key, z.shape), 0.0)
  order = jnp.argsort(first + noise, -1)
  # In the order of the classes, the k-th that moves gets the k-th of those.
  place = jnp.where(free, jnp.cumsum(free, -1), 0)
  source = jnp.take_along_axis(order, place, -1)
  target = inputs.absent(jnp.take_along_axis(z, source, -1), here)
  return jnp.moveaxis(target, -1, axis)


def confidence_weights(
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """How much each example of the batch counts: the teacher's confidence.

    weight_i = n max_c p_i(c) / sum_j max_c p_j(c),   p = softmax(z / T)

  CWTM, a control: the teacher tells which examples to trust, right or wrong,
  and nothing of the other classes. The paper's loss is the sum over the batch
  of the cross-entropy with the labels, weighted by weight_i / n; so the plain
  mean of `weights * losses.cross_entropy(student_logits, labels)` is it.

  Args:
    teacher_logits: [..., classes] any float dtype, classes along `axis`.
    temperature: scalar T > 0, may be traced; 1 in the paper.
    axis: the class axis.
    where: [...] bool, the n examples that count.
    axis_name: the mapped axis of `pmap` or `shard_map`, for the sum over the
      whole batch; under `jit` arrays are global already and it stays None.

  Returns:
    [...] float32 with mean 1 over the examples that count, 0 elsewhere.

  Raises:
    ValueError: if the mask has another shape, or the temperature is not
      positive.
    TypeError: if an array has the wrong dtype.

  Example:
    >>> import jax.numpy as jnp
    >>> teacher = jnp.log(jnp.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]]))
    >>> print([f"{w:.2f}" for w in confidence_weights(teacher)])
    ['1.35', '0.90', '0.75']

  Reference: Furlanello et al. 2018 (CWTM), arXiv:1805.04770, Sec. 3.2.
  """
  (teacher,), mask = inputs.logits(where, axis, teacher_logits=teacher_logits)
  temperature = checks.positive("temperature", temperature)
  log_p = numerics.log_softmax(teacher, temperature, axis)
  confidence = checks.masked(jnp.exp(jnp.max(log_p, axis)), mask)
  total = confidence.sum()
  count = jnp.sum(jnp.ones_like(confidence, bool) if mask is None else mask)
  if axis_name is not None:
    total, count = lax.psum((total, count), axis_name)
  return confidence * (count / jnp.where(total == 0.0, 1.0, total))
