"""How far the probabilities can be trusted: exact float64 NumPy metrics.

Logits here are host arrays of a whole evaluation set, [examples, classes],
such as `evaluate.predict` returns. A class whose logit is -inf is as if it did
not exist. Anything else that is not finite is an error, never a quiet number.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from kd_jax.errors import NotFinite

# Newton with bisection as its safety net: halving alone would need about 60.
_NEWTON_STEPS = 100


def select(
  logits: ArrayLike, where: ArrayLike | None = None, *, name: str = "logits"
) -> np.ndarray:
  """The valid rows of `logits` in float64, checked.

  Args:
    logits: [examples, classes] floating point; -inf marks an absent class.
    where: [examples] bool; rows that are False are left out before anything
      is looked at, so NaN there does no harm.
    name: what error messages call `logits`.

  Returns:
    [valid examples, classes] float64.

  Raises:
    TypeError: if `logits` is not floating point or `where` is not bool.
    ValueError: if a shape is wrong, no row is valid, or a valid row holds
      NaN, +inf or nothing but -inf.
  """
  logits = np.asarray(logits)
  if logits.ndim != 2 or logits.shape[1] == 0:
    raise ValueError(
      f"{name} has shape {logits.shape}; it should be [examples, classes]"
    )
  if logits.dtype.kind != "f" and logits.dtype.name != "bfloat16":
    raise TypeError(f"{name} has dtype {logits.dtype}; it should be a float")
  kept = np.flatnonzero(_mask(where, len(logits), name))
  if not len(kept):
    raise ValueError(
      f"no example is left: {name} has {len(logits)} rows and where keeps none"
    )
  logits = logits[kept].astype(np.float64)
  top = logits.max(axis=1)
  bad = np.isnan(logits).any(axis=1) | ~np.isfinite(top)
  if bad.any():
    row = int(np.argmax(bad))
    raise NotFinite(
      f"{name}[{kept[row]}] is {logits[row]}; it should be finite, or -inf for "
      "some of the classes"
    )
  return logits


def select_labels(
  labels: ArrayLike, classes: int, examples: int, where: ArrayLike | None = None
) -> np.ndarray:
  """The valid labels as int64, checked against the number of classes.

  Args:
    labels: [examples] integers.
    classes: number of classes.
    examples: how many labels there should be.
    where: [examples] bool; labels that are False may be anything (-1, say).

  Returns:
    [valid examples] int64.

  Raises:
    TypeError: if `labels` are not integers.
    ValueError: if the shape is wrong or a valid label is outside the classes.
  """
  labels = np.asarray(labels)
  if labels.shape != (examples,):
    raise ValueError(
      f"labels has shape {labels.shape}; it should be ({examples},), one per "
      "row of logits"
    )
  if labels.dtype.kind not in "iu":
    raise TypeError(f"labels has dtype {labels.dtype}; it should be an integer")
  kept = np.flatnonzero(_mask(where, examples, "labels"))
  # Unsigned labels beyond int64 are outside any range of classes as well.
  outside = (labels[kept] < 0) | (labels[kept] >= classes)
  if outside.any():
    i = kept[int(np.argmax(outside))]
    raise ValueError(
      f"labels[{i}] is {labels[i]}; it should be in 0..{classes - 1}"
    )
  return labels[kept].astype(np.int64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """Log-probabilities of float64 `logits`, [..., classes].

  Example:
    >>> np.exp(log_softmax(np.array([0.0, 0.0, -np.inf]))).tolist()
    [0.5, 0.5, 0.0]
  """
  shifted = logits - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def nll(
  logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> float:
  """Mean negative log-likelihood, in nats.

    nll = -mean_i log p_i(y_i)

  Args:
    logits: [examples, classes] floating point.
    labels: [examples] integers.
    where: [examples] bool, the examples that count.

  Returns:
    The mean; infinite if a label's own class has logit -inf.

  Raises:
    TypeError, ValueError: see `select` and `select_labels`.
  """
  z, y = _pair(logits, labels, where)
  return float(-log_softmax(z)[np.arange(len(y)), y].mean())


def brier(
  logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> float:
  """Brier score over all classes: 0 is perfect, 2 is sure and wrong.

    brier = mean_i sum_c (p_i(c) - [c = y_i])^2

  Some authors divide by the number of classes as well; Brier (1950) does not.

  Args:
    logits: [examples, classes] floating point.
    labels: [examples] integers.
    where: [examples] bool, the examples that count.

  Returns:
    The mean, in [0, 2].

  Raises:
    TypeError, ValueError: see `select` and `select_labels`.
  """
  z, y = _pair(logits, labels, where)
  difference = np.exp(log_softmax(z))
  difference[np.arange(len(y)), y] -= 1.0
  return float(np.square(difference).sum(axis=1).mean())


def reliability(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  where: ArrayLike | None = None,
  bins: int = 15,
  adaptive: bool = False,
) -> dict[str, list[float]]:
  """The data of a reliability diagram: accuracy against confidence, by bin.

  Confidence is the probability of the predicted class. Equal-width bins are
  (0, 1/bins], ..., (1 - 1/bins, 1]. Adaptive bins hold equally many examples,
  as far as equal confidences, which stay together, allow it. Empty bins are
  left out.

  Args:
    logits: [examples, classes] floating point.
    labels: [examples] integers.
    where: [examples] bool, the examples that count.
    bins: number of bins, positive.
    adaptive: equal mass instead of equal width.

  Returns:
    Lists of one length, ready for JSON: `lower`, `upper` (the bin), `count`,
    `confidence` and `accuracy` (means in the bin).

  Raises:
    TypeError, ValueError: see `select` and `select_labels`; also if `bins` is
      not positive.

  Reference: Guo et al. 2017, arXiv:1706.04599, Sec. 2 (equal width); Nguyen
  and O'Connor 2015, arXiv:1508.05154 (equal mass).
  """
  if bins < 1:
    raise ValueError(f"bins is {bins}; it should be at least 1")
  z, y = _pair(logits, labels, where)
  confidence = np.exp(log_softmax(z).max(axis=1))
  correct = z.argmax(axis=1) == y
  if adaptive:
    # Quantiles that are data points: rows in another order, same bins.
    edges = np.quantile(
      confidence, np.linspace(0, 1, bins + 1), method="inverted_cdf"
    )
  else:
    edges = np.linspace(0, 1, bins + 1)
  index = np.searchsorted(edges[1:-1], confidence, side="left")
  curve: dict[str, list[float]] = {
    "lower": [],
    "upper": [],
    "count": [],
    "confidence": [],
    "accuracy": [],
  }
  for i in range(bins):
    inside = index == i
    if inside.any():
      curve["lower"].append(float(edges[i]))
      curve["upper"].append(float(edges[i + 1]))
      curve["count"].append(int(inside.sum()))
      curve["confidence"].append(float(confidence[inside].mean()))
      curve["accuracy"].append(float(correct[inside].mean()))
  return curve


def ece(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  where: ArrayLike | None = None,
  bins: int = 15,
  adaptive: bool = False,
) -> float:
  """Expected calibration error of the predicted class.

    ece = sum_b n_b / n |accuracy_b - confidence_b|

  With few examples it is biased upwards, more so the more bins there are.

  Args:
    logits: [examples, classes] floating point.
    labels: [examples] integers.
    where: [examples] bool, the examples that count.
    bins: number of bins, positive; 15 is the paper's.
    adaptive: bins of equal mass instead of equal width.

  Returns:
    The error, in [0, 1].

  Raises:
    TypeError, ValueError: see `reliability`.

  Example:
    >>> half_right = np.log([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1])
    >>> round(ece(*half_right), 6)
    0.25

  Reference: Guo et al. 2017, arXiv:1706.04599, eq. 3.
  """
  curve = reliability(logits, labels, where=where, bins=bins, adaptive=adaptive)
  gaps = np.abs(np.subtract(curve["accuracy"], curve["confidence"]))
  return float(np.average(gaps, weights=curve["count"]))


def fit_temperature(
  logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> float:
  """The temperature that makes held-out examples most likely.

    T = argmin_T -mean_i log softmax(z_i / T)(y_i)

  In 1 / T this is convex, so the minimum is found exactly: Newton's method on
  the derivative, kept inside a bracket. Fit it on held-out data, never on the
  data that it is then reported on. Dividing by T changes no prediction.

  Args:
    logits: [examples, classes] floating point.
    labels: [examples] integers.
    where: [examples] bool, the examples that count.

  Returns:
    The temperature: above 1 for an overconfident model.

  Raises:
    TypeError: see `select` and `select_labels`.
    ValueError: as there, and where no finite positive temperature is best:
      every example is classified right (T -> 0), the logits say nothing about
      the labels (T -> inf), or a label's own class has logit -inf.

  Reference: Guo et al. 2017, arXiv:1706.04599, Sec. 4.2.
  """
  z, y = _pair(logits, labels, where)
  rows = np.arange(len(y))
  if not np.isfinite(z[rows, y]).all():
    raise ValueError("a label's own class has logit -inf: no temperature helps")
  present = np.isfinite(z)
  z = np.where(present, z - z.max(axis=1, keepdims=True), 0.0)
  scale = float(np.abs(z).max())
  if scale > 0:
    z = z / scale

  def slope_and_curvature(beta: float) -> tuple[float, float]:
    p = np.where(present, np.exp(beta * z), 0.0)
    p /= p.sum(axis=1, keepdims=True)
    mean = (p * z).sum(axis=1, keepdims=True)
    variance = (p * np.square(z - mean)).sum(axis=1)
    return float((mean[:, 0] - z[rows, y]).mean()), float(variance.mean())

  if slope_and_curvature(0.0)[0] >= 0:
    raise ValueError(
      "the likelihood is best at an infinite temperature: the logits say "
      "nothing about the labels"
    )
  if (z[rows, y] == 0).all():
    raise ValueError(
      "the likelihood is best at temperature 0: every example is classified "
      "right; fit on held-out data that holds some errors"
    )
  low, high = 0.0, 1.0
  while slope_and_curvature(high)[0] < 0:
    low, high = high, 2 * high
    if not math.isfinite(high * scale):
      raise ValueError("no temperature is best within the range of floats")
  beta = high
  for _ in range(_NEWTON_STEPS):
    slope, curvature = slope_and_curvature(beta)
    low, high = (beta, high) if slope < 0 else (low, beta)
    step = beta - slope / curvature if curvature > 0 else math.inf
    if not low < step < high:
      step = (low + high) / 2
    done = abs(step - beta) <= 1e-14 * beta
    beta = step
    if done:
      break
  return scale / beta


def _pair(
  logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
  """The valid logits and labels, both checked."""
  z = select(logits, where)
  return z, select_labels(labels, z.shape[1], len(np.asarray(logits)), where)


def _mask(where: ArrayLike | None, examples: int, name: str) -> np.ndarray:
  """`where` as [examples] bool, checked."""
  if where is None:
    return np.ones(examples, bool)
  where = np.asarray(where)
  if where.dtype != bool:
    raise TypeError(f"where has dtype {where.dtype}; it should be bool")
  if where.shape != (examples,):
    raise ValueError(
      f"where has shape {where.shape}; it should be ({examples},), one per row "
      f"of {name}"
    )
  return where
