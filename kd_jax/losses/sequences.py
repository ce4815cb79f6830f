"""Losses for a teacher that is known at a few classes of a large vocabulary.

Where all logits are at hand, the divergences do for tokens as they are: logits
are [batch, tokens, vocab] then, and `where` is [batch, tokens].
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kd_jax.losses import _checks as checks, _numerics as numerics

# How far the teacher's probabilities may sum to above 1, as a logarithm: more
# than bfloat16 log-probabilities are rounded by, less than a mistake.
_MASS_SLACK = 0.05


def topk_kl(
  student_logits: ArrayLike,
  teacher_log_probs: ArrayLike,
  *,
  indices: ArrayLike,
  temperature: ArrayLike = 1.0,
  where: ArrayLike | None = None,
) -> jax.Array:
  """KL divergence from a teacher that is known at its k likeliest classes.

    loss = T^2 [sum_i p(i) log(p(i) / q(i)) + p_rest log(p_rest / q_rest)]
    p_rest = 1 - sum_i p(i),   q_rest = sum of q outside,   i: the k classes
    q = softmax(student_logits / T),   p = exp(teacher_log_probs), made at T

  For cached teachers. The mass outside the k classes is one class more, so it
  has its price: renormalised within the k classes, as often done, students may
  put any mass outside. The loss is `kl` of distributions that are equal in
  what is not told apart, so at most `kl`, and `kl` itself if k is the number
  of classes. How the student spreads the rest is not judged: for that,
  `sampled_kl`. The paper adds a second term for it, which needs all logits,
  and has T = 1.

  Args:
    student_logits: [..., classes] any float dtype.
    teacher_log_probs: [..., k] any float dtype, log-probabilities of the
      classes in `indices`, at the temperature T and normalised over all
      classes. Gradients flow into it as well.
    indices: [..., k] integers from 0 to classes - 1, all different in a row.
    temperature: scalar T > 0, may be traced; the one of the log-probabilities.
    where: [...] bool; entries that are False are 0 and get no gradient, and
      their indices may be anything.

  Returns:
    [...] float32, one value per example, never negative. NaN for traced
    indices that are no classes or repeat, and for probabilities that sum to
    more than 1 by more than rounding (logits in their place, say). Classes with
    a logit of -inf count as absent; where the student has none outside, nor
    has the teacher.

  Raises:
    ValueError: if the shapes do not fit, T is not positive, or indices that
      are not traced are no classes or repeat.
    TypeError: if the dtypes are not float, float, integer and bool.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([0.0, 0.0, 0.0, 0.0])
    >>> teacher = jnp.log(jnp.array([0.5, 0.3]))
    >>> print(f"{topk_kl(student, teacher, indices=jnp.array([2, 0])):.4f}")
    0.2180

  Reference: Dasgupta et al. 2026, arXiv:2602.20816, Sec. 2, the first of two
  terms.
  """
  student, (log_p,), index, fits, where = _sparse(
    student_logits, indices, where, True, teacher_log_probs=teacher_log_probs
  )
  temperature = checks.positive("temperature", temperature)
  log_p = jnp.where(numerics.present(log_p), log_p, numerics.LOG_ZERO)
  log_q = numerics.log_softmax(student, temperature, -1)
  outside = jnp.put_along_axis(
    numerics.present(student), index, False, axis=-1, inplace=False
  )
  log_q_rest = _log_sum(log_q, outside)
  log_q = jnp.take_along_axis(log_q, index, -1)
  log_mass = _log_mass(log_p)
  p_rest = -jnp.expm1(jnp.minimum(log_mass, 0.0))
  some = p_rest >= np.finfo(np.float32).tiny
  log_p_rest = jnp.where(
    some, jnp.log(jnp.where(some, p_rest, 1.0)), numerics.LOG_ZERO
  )
  terms = numerics.excess(jnp.exp(log_p), jnp.exp(log_q), log_q - log_p)
  rest = numerics.excess(p_rest, jnp.exp(log_q_rest), log_q_rest - log_p_rest)
  loss = terms.sum(-1) + jnp.where(outside.any(-1), rest, 0.0)
  fits &= log_mass <= _MASS_SLACK
  if where is not None:
    fits |= ~where
  loss *= jnp.where(fits, 1.0, jnp.nan)
  return checks.masked(temperature**2 * loss, where)


def sampled_kl(
  student_logits: ArrayLike,
  teacher_log_probs: ArrayLike,
  *,
  indices: ArrayLike,
  weights: ArrayLike,
  temperature: ArrayLike = 1.0,
  where: ArrayLike | None = None,
) -> jax.Array:
  """KL divergence from a teacher that is known at sampled classes, unbiased.

    loss = T^2 sum_i w(i) [log p(x_i) - log q(x_i)],   x_1 .. x_n drawn from r
    q = softmax(student_logits / T),   w(i) = p(x_i) / (n r(x_i))

  For cached teachers: over the draws, the mean of the loss is `kl` and that of
  its gradient is the gradient of `kl`, the tail included, as long as r > 0
  wherever p > 0. A single value may be negative, but is 0 where the student
  equals the teacher, whatever was drawn.

  The paper draws n = 50 or so with replacement from r = p^t / sum p^t, at its
  best for t near 1: with t = 1, all weights are 1/n. For other t, public code
  divides the weights by their sum, which brings a bias back; here they are
  used as they are. A class that was drawn m times may also be given once, with
  m times its weight.

  Args:
    student_logits: [..., classes] any float dtype.
    teacher_log_probs: [..., n] any float dtype, the drawn classes'
      log-probabilities at the temperature T, normalised over all classes.
      Gradients flow into it as well.
    indices: [..., n] integers, the drawn classes, from 0 to classes - 1.
    weights: [..., n] any float dtype, w above; 0 for padding. Gradients flow
      into it as well.
    temperature: scalar T > 0, may be traced; the one of the log-probabilities.
    where: [...] bool; entries that are False are 0 and get no gradient, and
      their indices may be anything.

  Returns:
    [...] float32, one value per example. NaN for traced indices that are no
    classes. A drawn class that the student rules out with -inf costs 1e5.

  Raises:
    ValueError: if the shapes do not fit, T is not positive, or an index that
      is not traced is no class.
    TypeError: if the dtypes are not float, float, integer, float and bool.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([0.0, 0.0, 0.0, 0.0])
    >>> teacher = jnp.log(jnp.array([0.5, 0.5, 0.3]))
    >>> draws = {"indices": jnp.array([2, 2, 0]), "weights": jnp.full(3, 1 / 3)}
    >>> print(f"{sampled_kl(student, teacher, **draws):.4f}")
    0.5229

  Reference: Anshumann et al. 2025 (RS-KD), arXiv:2503.16870, Sec. "Random
  Sampling Knowledge Distillation".
  """
  student, (log_p, weights), index, fits, where = _sparse(
    student_logits,
    indices,
    where,
    False,
    teacher_log_probs=teacher_log_probs,
    weights=weights,
  )
  temperature = checks.positive("temperature", temperature)
  log_p = jnp.where(numerics.present(log_p), log_p, numerics.LOG_ZERO)
  log_q = numerics.log_softmax(student, temperature, -1)
  log_q = jnp.take_along_axis(log_q, index, -1)
  loss = jnp.sum(weights * (log_p - log_q), -1)
  loss *= jnp.where(fits, 1.0, jnp.nan)
  return checks.masked(temperature**2 * loss, where)


def _sparse(
  student_logits: ArrayLike,
  indices: ArrayLike,
  where: ArrayLike | None,
  distinct: bool,
  **at_indices: ArrayLike,
) -> tuple[jax.Array, list[jax.Array], jax.Array, jax.Array, jax.Array | None]:
  """Checks logits, and arrays that go with some of their classes.

  Returns:
    (logits [..., classes], the arrays [..., k], indices [..., k] int32, all of
    them usable, [...] bool, False where they were not, mask).
  """
  student, *arrays = checks.floats(student_logits=student_logits, **at_indices)
  dtype = checks.dtype("indices", indices)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"indices has dtype {dtype}; it should be integer")
  shape = jnp.shape(indices)
  fits = student.ndim > 0 and len(shape) == student.ndim
  fits = fits and shape[:-1] == student.shape[:-1]
  fits = fits and (not distinct or shape[-1] <= student.shape[-1])
  if 0 in (*student.shape[-1:], *shape[-1:]):
    fits = False
  if not fits or any(array.shape != shape for array in arrays):
    others = dict(zip(at_indices, (x.shape for x in arrays), strict=True))
    others["indices"] = shape
    raise ValueError(
      f"student_logits has shape {student.shape}, "
      + " and ".join(f"{key} has shape {x}" for key, x in others.items())
      + "; they should be [..., classes] and, the others, [..., k] (nothing is "
      "broadcast)"
    )
  mask = checks.valid(where, shape[:-1])
  classes = student.shape[-1]
  _check_indices(indices, classes, mask, distinct)
  student, *arrays = checks.select(mask, student, *arrays)
  index = jnp.asarray(indices).astype(jnp.int32)
  if mask is not None:
    index = jnp.where(mask[..., None], index, jnp.arange(shape[-1]) % classes)
  usable = (index >= 0) & (index < classes)
  valid = usable.all(-1)
  if distinct:
    valid &= jnp.all(jnp.diff(jnp.sort(index, -1), axis=-1) > 0, -1)
  return student, arrays, jnp.where(usable, index, 0), valid, mask


def _check_indices(
  indices: ArrayLike, classes: int, where: jax.Array | None, distinct: bool
) -> None:
  """ValueError for indices that can be seen now and are wrong."""
  if not checks.is_known(indices):
    return
  if where is not None and not checks.is_known(where):
    return
  # In NumPy, so that 64-bit indices are compared before they are cut to 32.
  numbers = np.asarray(indices)
  if where is not None:
    numbers = numbers[np.asarray(where)]
  wrong = numbers[(numbers < 0) | (numbers >= classes)]
  if wrong.size:
    raise ValueError(
      f"indices holds {wrong[0]}; it should hold numbers from 0 to "
      f"{classes - 1}, as there are {classes} classes (leave padding out with "
      "where)"
    )
  ordered = np.sort(numbers, -1)
  repeated = ordered[..., 1:][np.diff(ordered, axis=-1) == 0]
  if distinct and repeated.size:
    raise ValueError(
      f"indices holds {repeated[0]} twice for one example; its classes should "
      "all be different"
    )


def _log_mass(log_p: jax.Array) -> jax.Array:
  """[...] log sum exp of [..., k] log-probabilities, accurate near 0."""
  top = jnp.argmax(log_p, -1, keepdims=True)
  largest = jnp.take_along_axis(log_p, top, -1)
  others = jnp.arange(log_p.shape[-1]) != top
  rest = jnp.where(others, jnp.exp(log_p - largest), 0.0).sum(-1)
  return largest.squeeze(-1) + jnp.log1p(rest)


def _log_sum(log_q: jax.Array, keep: jax.Array) -> jax.Array:
  """[...] log sum exp of the kept of [..., classes]; `LOG_ZERO` for none."""
  kept = jnp.where(keep, log_q, numerics.LOG_ZERO)
  top = lax.stop_gradient(jnp.max(kept, -1, keepdims=True))
  total = jnp.where(keep, jnp.exp(kept - top), 0.0).sum(-1)
  return jnp.log(jnp.where(total == 0.0, 1.0, total)) + top.squeeze(-1)
