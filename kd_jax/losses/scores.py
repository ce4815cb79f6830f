"""Softened predictions compared by logit differences or by direction.

Absent classes and log 0 are as for `kl`: -inf on both sides is no class, on
one side a log-probability of -1e5.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks, _softened as softened


def concrete_score(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  weights: str = "student",
  partner_weights: str = "student",
  form: str = "released",
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Concrete score matching: all pairwise differences of the logits.

    d(c) = student_logits(c) / T - teacher_logits(c) / T_t
    loss = T^2 1/4 sum_c sum_k w(c) v(k) [d(c) - d(k)]^2    form="released"
    loss = T^2 1/2 sum_c sum_k w(c) v(k) [d(c) - d(k)]^2    form="paper"
    w, v: student's or teacher's softened probabilities, or uniform; constants

  Matches logits and yet allows what a softmax does not see, an offset common
  to all classes; `logit_mse` does not. The double sum is that of means and
  variances, so it costs no more than `kl`. With equal weights, the released
  form is half the variance of d under them; near equality and at high
  temperatures, that is `kl`.

  The pairs of the paper: student and student (S, S), the default and closest
  to the teacher; "uniform" or "teacher" with "student" for more diversity. No
  gradient flows through the weights, as in the released code; so the gradient
  is not that of the value unless both are uniform. The code returns a stand-in
  with the gradient of half the paper's loss. Its temperature softens the
  weights alone; with T^2, so does this one.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    weights: w, "student", "teacher" or "uniform".
    partner_weights: v, likewise; the order of the two does not matter.
    form: "released" or "paper".
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, never negative. NaN if a traced
    temperature is not positive and finite.

  Raises:
    ValueError: if the shapes differ, a temperature is not positive, or
      `weights`, `partner_weights` or `form` is none of those named.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[10.0, 10.0], [10.0, 10.0]])
    >>> teacher = jnp.array([[0.0, 0.0], [0.0, 4.0]])
    >>> print([f"{x:.2f}" for x in concrete_score(student, teacher)])
    ['0.00', '2.00']

  Reference: Kim et al. 2025 (CSD), arXiv:2509.25837, Eq. 8.
  """
  checks.choice("form", form, "released", "paper")
  sides = ("student", "teacher", "uniform")
  checks.choice("weights", weights, *sides)
  checks.choice("partner_weights", partner_weights, *sides)
  pair, scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  present = softened.present(pair)
  classes = jnp.maximum(present.sum(axis, keepdims=True), 1)
  choices = {
    "student": pair.q,
    "teacher": pair.p,
    "uniform": present / classes,
  }
  # log(q / p) is d but for a constant.
  d = pair.log_ratio
  means, variances = [], []
  for choice in (weights, partner_weights):
    weight = lax.stop_gradient(choices[choice])
    mean = (weight * d).sum(axis, keepdims=True)
    means.append(mean)
    variances.append((weight * (d - mean) ** 2).sum(axis, keepdims=True))
  pairs = sum(variances) + (means[0] - means[1]) ** 2
  loss = scale * pairs.squeeze(axis) / (4.0 if form == "released" else 2.0)
  return checks.masked(loss, where)


def cosine_logits(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Cosine distance of the two softened predictions of an example.

    loss = T^2 [1 - sum_c p(c) q(c) / (||p|| ||q||)]
    p = softmax(teacher_logits / T_t),   q = softmax(student_logits / T)

  Compares directions of the probability vectors: likely classes count most,
  and T^2 bounds it. For large T it tends to what `kl` tends to, half the
  variance of the logit difference.

  What is compared: the probabilities of one example. The paper measures the
  same predictions by cosine, but class by class, over the batch. For the
  cosine of the raw logits, as some libraries have it, which depends on their
  common offset but not on T, call `cosine_distance`. T^2 is ours, as in `kl`.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    temperature: scalar T > 0, may be traced.
    teacher_temperature: scalar T_t > 0, may be traced; None: T.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example, from 0 to T^2. NaN if a traced
    temperature is not positive and finite.

  Raises:
    ValueError: if the shapes differ, or a temperature is not positive.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.log(jnp.array([[0.2, 0.8]]))
    >>> teacher = jnp.log(jnp.array([[0.8, 0.2]]))
    >>> print([f"{x:.2f}" for x in cosine_logits(student, teacher)])
    ['0.53']

  Reference: after Ham et al. 2023, arXiv:2311.14307, Eq. 1.
  """
  pair, scale, where = softened.pair(
    student_logits,
    teacher_logits,
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    axis=axis,
    where=where,
  )
  p, q, *_ = pair
  total = lambda x: x.sum(axis, keepdims=True)
  # A length is 0 only where every class is absent.
  square = lambda x: jnp.where(total(x) == 0.0, 1.0, total(x**2))
  # 1 - cos = sin^2 / (1 + cos), where sin is the part of q - p across p. The
  # difference from 1 would be all rounding near equality.
  change = softened.difference(pair, axis)
  across = change - p * total(p * change) / square(p)
  cosine = total(p * q) / jnp.sqrt(square(p) * square(q))
  loss = scale * (total(across**2) / square(q) / (1.0 + cosine)).squeeze(axis)
  return checks.masked(loss, where)
