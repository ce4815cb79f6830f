"""Losses that treat the true class apart from the other classes.

Absent classes (logits of -inf) are treated as in `divergences`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import (
  _arguments as arguments,
  _checks as checks,
  _numerics as numerics,
)


def dkd(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  *,
  target_weight: ArrayLike = 1.0,
  nontarget_weight: ArrayLike = 8.0,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Decoupled distillation: the true class, and the others among themselves.

    loss = T^2 [w_t KL(b_p || b_q) + w_n KL(p' || q')]
    b_p = (p(y), 1 - p(y)),   p'(c) = p(c) / (1 - p(y)) for c other than y
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  `kl` is the case w_t = 1, w_n = 1 - p(y): it hides what a confident teacher
  knows about the other classes, the more so the better it fits the training
  set. Here that part has a weight of its own, which the paper tunes for each
  pair of networks. Used beside a hard-label loss, its weight warmed up over
  the first epochs. T^2 is in the authors' code, not in the paper. The code
  hides the true class by taking 1000 off its logit; here it is left out.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    labels: [...] integers from 0 to classes - 1, the true classes y.
    target_weight: scalar w_t >= 0, may be traced.
    nontarget_weight: scalar w_n >= 0, may be traced. Weights that differ
      between examples: `jax.vmap`.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient, and
      their labels may be anything, for example -100.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature or weight is out of range, or a traced label no class.

  Raises:
    ValueError: if the shapes do not fit, a label that is not traced is no
      class, a temperature is not positive, or a weight is negative.
    TypeError: if the logits are not floating point, the labels not integer,
      or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[2.0, 0.0, 0.0]])
    >>> teacher = jnp.array([[9.0, 1.0, 0.0]])
    >>> loss = dkd(student, teacher, jnp.array([0]), temperature=4.0)
    >>> print([f"{x:.2f}" for x in loss])
    ['5.23']

  Reference: Zhao et al. 2022 (DKD), arXiv:2203.08679, Sec. 3.
  """
  student, teacher, where = checks.logit_pair(
    student_logits, teacher_logits, axis=axis, where=where
  )
  is_true, known = arguments.true_class(labels, student, axis, where)
  temperature, teacher_temperature = arguments.temperatures(
    temperature, teacher_temperature
  )
  target_weight = checks.weight("target_weight", target_weight)
  nontarget_weight = checks.weight("nontarget_weight", nontarget_weight)
  every = numerics.softmax_pair(
    student, teacher, temperature, teacher_temperature, axis
  )
  others = numerics.softmax_pair(
    _without(is_true, student),
    _without(is_true, teacher),
    temperature,
    teacher_temperature,
    axis,
  )
  true, rest = _true_and_rest(is_true, every, others, axis)
  target = _excess(true) + _excess(rest)
  nontarget = _excess(others).sum(axis)
  loss = target_weight * target + nontarget_weight * nontarget
  return checks.masked(temperature**2 * loss * known, where)


def nkd(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  *,
  gamma: ArrayLike = 1.5,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Normalised distillation: the other classes are compared as shares.

    loss = -p_1(y) log q_1(y) - gamma T^2 sum_{c != y} p'(c) log q'(c)
    p_1 = softmax(teacher_logits),   q_1 = softmax(student_logits)
    p' = softmax(teacher_logits / T_t), q' = softmax(student_logits / T),
    both over the classes other than y

  Close to `dkd` with fewer settings: the soft label of the true class scales a
  cross-entropy, without temperature, and the others are normalised to sum to 1
  on both sides before they are compared. Both parts are cross-entropies, so
  the loss is not 0 at equality. To be added to the hard-label loss.

  The authors' code is the paper's equation, with the teacher detached. For
  some time it left the true class among the others (a mask of ones only),
  which made the second part that of `kl`; the form before and after is here.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    labels: [...] integers from 0 to classes - 1, the true classes y.
    gamma: scalar >= 0, the weight of the other classes; may be traced.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient, and
      their labels may be anything, for example -100.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature or gamma is out of range, or a traced label no class.

  Raises:
    ValueError: if the shapes do not fit, a label that is not traced is no
      class, a temperature is not positive, or gamma is negative.
    TypeError: if the logits are not floating point, the labels not integer,
      or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[2.0, 0.0, 0.0]])
    >>> teacher = jnp.array([[9.0, 1.0, 0.0]])
    >>> loss = nkd(student, teacher, jnp.array([0]))
    >>> print([f"{x:.2f}" for x in loss])
    ['1.28']

  Reference: Yang et al. 2023 (NKD), arXiv:2303.13005, Sec. 3.
  """
  student, teacher, where = checks.logit_pair(
    student_logits, teacher_logits, axis=axis, where=where
  )
  is_true, known = arguments.true_class(labels, student, axis, where)
  temperature, teacher_temperature = arguments.temperatures(
    temperature, teacher_temperature
  )
  gamma = checks.weight("gamma", gamma)
  soft_label = jnp.exp(numerics.log_softmax(teacher, 1.0, axis))
  target = jnp.where(
    is_true, soft_label * numerics.log_softmax(student, 1.0, axis), 0.0
  )
  p = jnp.exp(
    numerics.log_softmax(_without(is_true, teacher), teacher_temperature, axis)
  )
  log_q = numerics.log_softmax(_without(is_true, student), temperature, axis)
  loss = -target.sum(axis) - gamma * temperature**2 * (p * log_q).sum(axis)
  return checks.masked(loss * known, where)


def _without(is_true: jax.Array, logits: jax.Array) -> jax.Array:
  """The logits of the other classes; the true class does not exist."""
  return jnp.where(is_true, -jnp.inf, logits)


def _excess(pair: numerics.Pair) -> jax.Array:
  return numerics.excess(pair.p, pair.q, pair.log_ratio)


def _true_and_rest(
  is_true: jax.Array,
  every: numerics.Pair,
  others: numerics.Pair,
  axis: int,
) -> tuple[numerics.Pair, numerics.Pair]:
  """The true class and the other classes taken together, [...] each.

  Args:
    is_true: [..., classes] bool.
    every: over all classes.
    others: over the other classes only, which do sum to 1.
    axis: the class axis.
  """
  true = numerics.Pair(
    *(jnp.sum(jnp.where(is_true, x, 0.0), axis) for x in every)
  )
  log_p, log_q = (
    jax.nn.logsumexp(jnp.where(is_true, numerics.LOG_ZERO, x), axis)
    for x in (every.log_p, every.log_q)
  )
  log_ratio = log_q - log_p
  # How the odds of the true class change. Near equality this difference is
  # all rounding; summed over the classes' own odds against it, it is not.
  odds = true.log_ratio - log_ratio
  near = jnp.abs(odds) < 1.0
  own = every.log_ratio - jnp.expand_dims(true.log_ratio, axis)
  small = jnp.abs(own) < 1.0
  bounded = jnp.expand_dims(jnp.where(near, odds, 0.0), axis)
  change = jnp.where(
    small,
    others.p * jnp.expm1(jnp.where(small, own, 0.0)),
    jnp.exp(others.log_q - bounded) - others.p,
  ).sum(axis)
  odds = -jnp.log1p(jnp.where(near, change, 0.0))
  total = jnp.log1p(true.p * jnp.expm1(odds))
  return (
    true._replace(log_ratio=jnp.where(near, odds - total, true.log_ratio)),
    numerics.Pair(
      *(jnp.exp(log_p), jnp.exp(log_q), log_p, log_q),
      log_ratio=jnp.where(near, -total, log_ratio),
    ),
  )
