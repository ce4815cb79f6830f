"""How closely a student follows its teacher, apart from how good it is.

A student can be accurate and unfaithful, or faithful to a poor teacher, so
both are reported. Exact float64 NumPy over a whole evaluation set.

References: Stanton et al. 2021, arXiv:2106.05945, Sec. 3 (agreement and
average predictive KL); Xu et al. 2021, arXiv:2109.03228 (probability loyalty).
"""

import itertools

import numpy as np
from numpy.typing import ArrayLike

from kd_jax import calibration


def measure(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  where: ArrayLike | None = None,
) -> dict[str, float]:
  """Agreement and divergences between two sets of predictions.

    agreement          = mean_i [argmax p_s = argmax p_t]
    kl_teacher_student = mean_i sum_c p_t (log p_t - log p_s)
    kl_student_teacher = mean_i sum_c p_s (log p_s - log p_t)
    kl_symmetric       = half the sum of these two
    jsd                = mean_i (KL(p_t, m) + KL(p_s, m)) / 2,
                         m = (p_t + p_s) / 2
    loyalty            = mean_i 1 - sqrt(JSD_i in bits)

  All at temperature 1. Divergences are in nats, so `jsd` is at most log 2;
  the base-2 logarithm in `loyalty` puts it in [0, 1], 1 being a perfect copy.

  Args:
    student_logits: [examples, classes] floating point; -inf marks an absent
      class.
    teacher_logits: the same shape.
    where: [examples] bool, the examples that count; the rest may be NaN.

  Returns:
    The six numbers above and `count`, the number of examples that counted. A
    KL is infinite where one side rules out a class that the other does not.

  Raises:
    TypeError: if the logits are not floating point or `where` is not bool.
    ValueError: if the shapes differ, no example is valid, or a valid row is
      not finite (see `calibration.select`).

  Example:
    >>> z = np.array([[2.0, 0.0, -1.0]])
    >>> same = measure(z, z)
    >>> same["agreement"], same["kl_teacher_student"], same["loyalty"]
    (1.0, 0.0, 1.0)
  """
  shapes = np.shape(student_logits), np.shape(teacher_logits)
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"student_logits has shape {shapes[0]} and teacher_logits {shapes[1]}; "
      "they should be the same"
    )
  student = calibration.select(student_logits, where, name="student_logits")
  teacher = calibration.select(teacher_logits, where, name="teacher_logits")
  log_s = calibration.log_softmax(student)
  log_t = calibration.log_softmax(teacher)
  forward = kl(log_t, log_s).mean()
  backward = kl(log_s, log_t).mean()
  log_m = np.logaddexp(log_t, log_s) - np.log(2)
  jsd = (kl(log_t, log_m) + kl(log_s, log_m)) / 2
  # Rounding may lift a JSD above its largest value by an ulp.
  bits = np.minimum(jsd / np.log(2), 1.0)
  agreement = student.argmax(axis=1) == teacher.argmax(axis=1)
  return {
    "agreement": float(agreement.mean()),
    "kl_teacher_student": float(forward),
    "kl_student_teacher": float(backward),
    "kl_symmetric": float((forward + backward) / 2),
    "jsd": float(jsd.mean()),
    "loyalty": float((1 - np.sqrt(bits)).mean()),
    "count": len(student),
  }


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
  """KL divergence from log-probabilities, one value per example.

    KL(p, q) = sum_c p (log p - log q) = sum_c q - p - p d,  d = log q - log p

  The second form has no negative term. Near equality it is computed as
  p (expm1(d) - d), which keeps the digits that the first form cancels.

  Args:
    log_p: [..., classes] float64, normalised; -inf for probability 0.
    log_q: the same shape.

  Returns:
    [...] float64, never negative; inf where q rules out what p allows.
  """
  p, q = np.exp(log_p), np.exp(log_q)
  both = np.isfinite(log_p) & np.isfinite(log_q)
  d = np.where(both, log_q, 0.0) - np.where(both, log_p, 0.0)
  near = np.abs(d) < 1.0
  d_near = np.where(near, d, 0.0)
  terms = np.where(near, p * (np.expm1(d_near) - d_near), q - p - p * d)
  terms = np.where(both, terms, np.where(np.isfinite(log_p), np.inf, q))
  return terms.sum(axis=-1)


def peer_agreement(logits: ArrayLike) -> float:
  """How often two peers predict the same class, the mean over all pairs.

  Args:
    logits: [peers, n, classes] float, at least two peers.

  Returns:
    Between 0 and 1.

  Raises:
    ValueError: if there are fewer than two peers.

  Example:
    >>> peer_agreement([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    0.5
  """
  predicted = np.asarray(logits).argmax(-1)
  if predicted.ndim != 2 or len(predicted) < 2:
    raise ValueError(
      f"logits has shape {np.shape(logits)}; it should be [peers, n, classes] "
      "with at least two peers"
    )
  pairs = itertools.combinations(predicted, 2)
  return float(np.mean([np.mean(a == b) for a, b in pairs]))
