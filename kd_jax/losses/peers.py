"""Losses between networks, or exits of one network, that learn together."""

from __future__ import annotations

import functools

import jax
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks, divergences


def mutual_kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  form: str = "released",
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Mutual learning: KL divergence to one network from each of its peers.

    loss = T^2 sum_j KL(p_j || q)              form="released"
    loss = T^2 1/J sum_j KL(p_j || q)          form="paper"
    p_j = softmax(teacher_logits[j] / T_t),   q = softmax(student_logits / T)

  For a cohort of networks that train together, each with its hard-label loss
  and this one towards the J others. The paper divides by their number, so that
  the labels stay the main teacher; the authors' code takes the sum, and for
  two networks there is no difference. To learn from the peers' mean
  prediction instead, give that to `kl`.

  Wrap the peers in `jax.lax.stop_gradient`, as the paper does: each network
  follows the others and does not pull them towards itself. Paper and code use
  temperature 1; T^2 is that of `kl`.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`; one
      network's.
    teacher_logits: [peers, ..., classes] the other networks'. Gradients flow
      into it as well.
    form: "released" or "paper".
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis of `student_logits`.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature is not positive and finite.

  Raises:
    ValueError: if the shapes do not fit, there is no peer, a temperature is
      not positive, or `form` is none of the two.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 0.0]])
    >>> peers = jnp.array([[[0.0, 0.0]], [[9.0, 0.0]]])
    >>> print([f"{x:.2f}" for x in mutual_kl(student, peers)])
    ['0.69']

  Reference: Zhang et al. 2017 (DML), arXiv:1706.00384, Sec. 2.3.
  """
  checks.choice("form", form, "released", "paper")
  student, teacher = checks.floats(
    student_logits=student_logits, teacher_logits=teacher_logits
  )
  _check_stack("teacher_logits", teacher, "peers", "student_logits", student)
  each = functools.partial(
    divergences.kl,
    student,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  losses = jax.vmap(each)(teacher)
  return losses.sum(0) if form == "released" else losses.mean(0)


def early_exit_kl(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Self-distillation: KL divergence to each early exit from the deepest one.

    loss = T^2 sum_i KL(p || q_i)
    p = softmax(teacher_logits / T_t),   q_i = softmax(student_logits[i] / T)

  For a network with classifiers at several depths that all learn from the last
  one while it learns from the labels. The published total adds cross-entropy
  with the labels, weighted 1 - w for the early exits, w for this loss and 1
  for the last classifier (w = 0.3 in the authors' later code), and a feature
  hint. Wrap the deepest classifier in `jax.lax.stop_gradient`, as they do.
  That code (T = 3) has no T^2, and takes the cross-entropy in place of the
  divergence, which has the same gradient.

  Args:
    student_logits: [exits, ..., classes] any float dtype, those of the early
      exits.
    teacher_logits: [..., classes] those of the deepest classifier, classes
      along `axis`. Gradients flow into it as well.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis of `teacher_logits`.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature is not positive and finite.

  Raises:
    ValueError: if the shapes do not fit, there is no exit, or a temperature
      is not positive.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> exits = jnp.array([[[0.0, 0.0]], [[9.0, 0.0]]])
    >>> deepest = jnp.array([[9.0, 0.0]])
    >>> print([f"{x:.2f}" for x in early_exit_kl(exits, deepest)])
    ['0.69']

  Reference: Zhang et al. 2019 (Be Your Own Teacher), arXiv:1905.08094, Sec. 3.
  """
  student, teacher = checks.floats(
    student_logits=student_logits, teacher_logits=teacher_logits
  )
  _check_stack("student_logits", student, "exits", "teacher_logits", teacher)
  losses = jax.vmap(
    lambda exit_logits: divergences.kl(
      exit_logits,
      teacher,
      temperature=temperature,
      teacher_temperature=teacher_temperature,
      axis=axis,
      where=where,
    )
  )(student)
  return losses.sum(0)


def _check_stack(
  name: str, stack: jax.Array, things: str, other: str, one: jax.Array
) -> None:
  """ValueError unless `stack` is one or more arrays of the shape of `one`."""
  if stack.ndim == 0 or stack.shape[1:] != one.shape or len(stack) == 0:
    raise ValueError(
      f"{name} has shape {stack.shape} and {other} has shape {one.shape}; "
      f"{name} should be [{things}, ...] with one or more {things}, each of "
      f"the shape of {other}"
    )
