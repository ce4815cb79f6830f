import math

from hypothesis import given, strategies as st
import numpy as np
import pytest

from kd_jax import calibration


def softmax(z):
  e = [math.exp(v - max(z)) for v in z]
  return [v / sum(e) for v in e]


def random_set(seed=0, n=200, classes=5, scale=2.0):
  """Logits and labels drawn from their own probabilities: calibrated."""
  rng = np.random.default_rng(seed)
  z = rng.normal(0, scale, (n, classes))
  noise = rng.gumbel(size=(n, classes))
  return z, np.argmax(z + noise, axis=1)


def test_nll_and_brier_equal_plain_python():
  z, y = random_set(n=40)
  rows = [softmax(row) for row in z.tolist()]
  nll = -sum(math.log(p[k]) for p, k in zip(rows, y, strict=True)) / 40
  brier = (
    sum(
      sum((p[c] - (c == k)) ** 2 for c in range(5))
      for p, k in zip(rows, y, strict=True)
    )
    / 40
  )
  assert calibration.nll(z, y) == pytest.approx(nll, rel=1e-12)
  assert calibration.brier(z, y) == pytest.approx(brier, rel=1e-12)


def test_ece_equals_plain_python():
  z, y = random_set(n=300)
  bins = [[] for _ in range(15)]
  for row, k in zip(z.tolist(), y, strict=True):
    p = softmax(row)
    confidence = max(p)
    bins[math.ceil(confidence * 15) - 1].append(
      (confidence, p.index(confidence) == k)
    )
  expected = 0.0
  for members in bins:
    if members:
      gap = sum(c for c, _ in members) - sum(right for _, right in members)
      expected += abs(gap) / 300
  assert calibration.ece(z, y) == pytest.approx(expected, rel=1e-9)


def test_confidence_on_an_edge_belongs_to_the_lower_bin():
  z = np.zeros((4, 2))  # confidence is exactly a half
  curve = calibration.reliability(z, np.array([0, 0, 0, 1]), bins=2)
  assert curve["upper"] == [0.5]
  assert curve["accuracy"] == [0.75]
  assert curve["confidence"] == [0.5]
  # Sure predictions belong to the last bin.
  sure = calibration.reliability([[50.0, 0.0]], np.array([0]))
  assert sure["upper"] == [1.0]
  assert sure["count"] == [1]


def test_adaptive_bins_hold_equally_many():
  z, y = random_set(n=150)
  curve = calibration.reliability(z, y, bins=15, adaptive=True)
  assert curve["count"] == [10] * 15
  # By hand: sort by confidence, cut in fifteen.
  p = np.array([softmax(row) for row in z.tolist()])
  order = np.argsort(p.max(axis=1))
  right = p.argmax(axis=1) == y
  expected = np.mean(
    [
      abs(right[part].mean() - p.max(axis=1)[part].mean())
      for part in np.split(order, 15)
    ]
  )
  found = calibration.ece(z, y, adaptive=True)
  assert found == pytest.approx(expected, rel=1e-9)


def test_adaptive_bins_keep_equal_confidences_together():
  z = np.concatenate([np.zeros((6, 2)), np.full((2, 2), [3.0, 0.0])])
  y = np.array([0, 1, 0, 1, 0, 1, 0, 0])
  one = calibration.ece(z, y, bins=4, adaptive=True)
  other = calibration.ece(z[::-1], y[::-1], bins=4, adaptive=True)
  assert one == other
  counts = calibration.reliability(z, y, bins=4, adaptive=True)["count"]
  assert counts == [6, 2]


def test_limits():
  z, y = random_set()
  right = np.where(np.arange(5) == y[:, None], 0.0, -np.inf)
  assert calibration.ece(right, y) == 0.0
  assert calibration.brier(right, y) == 0.0
  assert calibration.nll(right, y) == 0.0
  assert calibration.brier(right, (y + 1) % 5) == 2.0
  assert calibration.nll(right, (y + 1) % 5) == math.inf
  uniform = np.zeros_like(z)
  assert calibration.nll(uniform, y) == pytest.approx(math.log(5), rel=1e-14)


@given(st.integers(0, 1000), st.floats(-1e4, 1e4), st.booleans())
def test_metrics_do_not_depend_on_order_or_offset(seed, offset, adaptive):
  z, y = random_set(seed, n=40)
  order = np.random.default_rng(seed).permutation(40)
  for metric in (
    calibration.nll,
    calibration.brier,
    lambda z, y: calibration.ece(z, y, bins=7, adaptive=adaptive),
  ):
    value = metric(z, y)
    assert metric(z[order], y[order]) == pytest.approx(value, rel=1e-9)
    assert metric(z + offset, y) == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_absent_classes_do_not_count():
  z, y = random_set()
  padded = np.concatenate([z, np.full((len(z), 2), -np.inf)], axis=1)
  for metric in (calibration.nll, calibration.brier, calibration.ece):
    assert metric(padded, y) == pytest.approx(metric(z, y), rel=1e-12)
  fitted = calibration.fit_temperature(padded, y)
  assert fitted == pytest.approx(calibration.fit_temperature(z, y), rel=1e-9)


def test_masked_rows_do_not_count():
  z, y = random_set(n=20)
  where = np.arange(20) % 3 != 0
  dirty, labels = z.copy(), y.copy()
  dirty[~where], labels[~where] = np.nan, -1
  for metric in (calibration.nll, calibration.brier, calibration.ece):
    assert metric(dirty, labels, where=where) == metric(z[where], y[where])


@pytest.mark.parametrize("true", [0.25, 1.0, 1.7, 30.0])
def test_fit_temperature_finds_the_one_that_was_applied(true):
  z, y = random_set(n=20000, scale=1.5)
  fitted = calibration.fit_temperature(z * true, y)
  # The fit on the calibrated logits is near 1; scaling scales it exactly.
  assert fitted / true == pytest.approx(1.0, abs=0.05)
  base = calibration.fit_temperature(z, y)
  assert fitted == pytest.approx(base * true, rel=1e-9)


def test_fit_temperature_is_the_minimum():
  z, y = random_set(seed=3, scale=4.0)
  best = calibration.fit_temperature(z, y)
  lowest = calibration.nll(z / best, y)
  grid = best * np.geomspace(0.1, 10, 401)
  assert lowest <= min(calibration.nll(z / t, y) for t in grid) + 1e-12
  for t in (best * 0.99, best * 1.01):
    assert calibration.nll(z / t, y) > lowest


def test_fit_temperature_agrees_with_scipy():
  optimize = pytest.importorskip("scipy.optimize")
  z, y = random_set(seed=5, scale=3.0)
  found = optimize.minimize_scalar(
    lambda t: calibration.nll(z / t, y),
    bounds=(0.05, 20),
    method="bounded",
    options={"xatol": 1e-9},
  )
  assert calibration.fit_temperature(z, y) == pytest.approx(found.x, rel=1e-6)


def test_fit_temperature_says_when_there_is_none():
  z, y = random_set(n=20)
  with pytest.raises(ValueError, match="temperature 0"):
    calibration.fit_temperature(z, z.argmax(axis=1))
  with pytest.raises(ValueError, match="infinite temperature"):
    calibration.fit_temperature(z, z.argmin(axis=1))
  with pytest.raises(ValueError, match="infinite temperature"):
    calibration.fit_temperature(np.zeros((3, 2)), np.array([0, 1, 1]))
  z[0, y[0]] = -np.inf
  with pytest.raises(ValueError, match="-inf"):
    calibration.fit_temperature(z, y)


def test_wrong_arguments_are_named():
  z, y = random_set(n=6)
  every = [
    calibration.nll,
    calibration.brier,
    calibration.ece,
    calibration.fit_temperature,
  ]
  for metric in every:
    with pytest.raises(ValueError, match=r"logits has shape \(6,\)"):
      metric(z[:, 0], y)
    with pytest.raises(ValueError, match=r"labels has shape \(6, 1\)"):
      metric(z, y[:, None])
    with pytest.raises(ValueError, match=r"labels has shape \(5,\)"):
      metric(z, y[:5])
    with pytest.raises(TypeError, match="labels has dtype float64"):
      metric(z, y.astype(float))
    with pytest.raises(TypeError, match="logits has dtype int64"):
      metric(z.astype(np.int64), y)
    with pytest.raises(ValueError, match=r"labels\[2\] is 5"):
      metric(z, np.array([0, 1, 5, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"labels\[0\] is -1"):
      metric(z, np.array([-1, 1, 5, 0, 0, 0]))
    with pytest.raises(ValueError, match="no example is left"):
      metric(z, y, where=np.zeros(6, bool))
    with pytest.raises(ValueError, match="no example is left"):
      metric(z[:0], y[:0])
    with pytest.raises(TypeError, match="where has dtype"):
      metric(z, y, where=np.ones(6))
    with pytest.raises(ValueError, match="where has shape"):
      metric(z, y, where=np.ones((6, 1), bool))
    for bad in (np.nan, np.inf):
      broken = z.copy()
      broken[4, 1] = bad
      with pytest.raises(ValueError, match=r"logits\[4\]"):
        metric(broken, y)
    with pytest.raises(ValueError, match=r"logits\[0\]"):
      metric(np.full((6, 5), -np.inf), y)
  with pytest.raises(ValueError, match="bins is 0"):
    calibration.ece(z, y, bins=0)
