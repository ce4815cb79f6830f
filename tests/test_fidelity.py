import math

from hypothesis import given, strategies as st
import numpy as np
import pytest

from kd_jax import fidelity


def pair(seed=0, n=30, classes=4, scale=2.0):
  rng = np.random.default_rng(seed)
  teacher = rng.normal(0, scale, (n, classes))
  return teacher + rng.normal(0, 1, (n, classes)), teacher


def softmax(z):
  e = [math.exp(v - max(z)) for v in z]
  return [v / sum(e) for v in e]


def kl(p, q):
  return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_measure_equals_plain_python():
  student, teacher = pair()
  rows = [
    (softmax(s), softmax(t))
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
  ]
  middle = [[(a + b) / 2 for a, b in zip(s, t, strict=True)] for s, t in rows]
  jsd = [
    (kl(s, m) + kl(t, m)) / 2 for (s, t), m in zip(rows, middle, strict=True)
  ]
  n = len(rows)
  forward = sum(kl(t, s) for s, t in rows) / n
  backward = sum(kl(s, t) for s, t in rows) / n
  expected = {
    "agreement": sum(s.index(max(s)) == t.index(max(t)) for s, t in rows) / n,
    "kl_teacher_student": forward,
    "kl_student_teacher": backward,
    "kl_symmetric": (forward + backward) / 2,
    "jsd": sum(jsd) / n,
    "loyalty": sum(1 - math.sqrt(d / math.log(2)) for d in jsd) / n,
    "count": n,
  }
  found = fidelity.measure(student, teacher)
  assert found == pytest.approx(expected, rel=1e-10)
  assert 0 < found["agreement"] < 1


def test_agreement_with_scipy():
  distance = pytest.importorskip("scipy.spatial.distance")
  student, teacher = pair(1)
  s, t = (
    np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (student, teacher)
  )
  loyalty = 1 - distance.jensenshannon(s, t, base=2, axis=1)
  found = fidelity.measure(student, teacher)["loyalty"]
  assert found == pytest.approx(loyalty.mean(), rel=1e-9)


def test_a_copy_is_perfect_and_opposites_are_not():
  _, teacher = pair()
  copy = fidelity.measure(teacher + 3.0, teacher)
  assert copy["agreement"] == 1.0
  assert copy["kl_teacher_student"] == pytest.approx(0, abs=1e-25)
  assert copy["loyalty"] == pytest.approx(1, abs=1e-12)
  one = np.array([[0.0, -np.inf]])
  two = np.array([[-np.inf, 0.0]])
  opposite = fidelity.measure(one, two)
  assert opposite["agreement"] == 0.0
  assert opposite["kl_teacher_student"] == math.inf
  assert opposite["jsd"] == pytest.approx(math.log(2), rel=1e-14)
  assert opposite["loyalty"] == pytest.approx(0.0, abs=1e-7)


@given(st.integers(0, 1000), st.floats(0.01, 50.0))
def test_bounds_and_symmetries(seed, scale):
  student, teacher = pair(seed, n=8, scale=scale)
  one = fidelity.measure(student, teacher)
  other = fidelity.measure(teacher, student)
  assert one["kl_teacher_student"] == other["kl_student_teacher"] >= 0
  for name in ("agreement", "kl_symmetric", "jsd", "loyalty"):
    assert one[name] == pytest.approx(other[name], rel=1e-12, abs=1e-15)
  assert 0 <= one["jsd"] <= math.log(2) + 1e-12
  assert 0 <= one["loyalty"] <= 1
  assert one["jsd"] <= one["kl_symmetric"] / 2 + 1e-12


def test_small_differences_keep_their_digits():
  _, teacher = pair(2, scale=1.0)
  direction = np.random.default_rng(3).normal(size=teacher.shape)
  p = np.exp(teacher) / np.exp(teacher).sum(1, keepdims=True)
  mean = (p * direction).sum(1, keepdims=True)
  variance = (p * (direction - mean) ** 2).sum(1).mean()
  for step in (1e-3, 1e-6):
    found = fidelity.measure(teacher + step * direction, teacher)
    # KL is step^2 / 2 times the variance, but for terms in step^3.
    expected = step**2 / 2 * variance
    kl_value = found["kl_teacher_student"]
    assert kl_value == pytest.approx(expected, rel=max(10 * step, 1e-3))


def test_extreme_logits_stay_finite():
  one, two = np.array([[1e4, -1e4, 0.0]]), np.array([[-1e4, 1e4, 0.0]])
  found = fidelity.measure(one, two)
  assert found["kl_teacher_student"] == pytest.approx(2e4)
  assert all(math.isfinite(value) for value in found.values())


def test_absent_classes_and_masked_rows_do_not_count():
  student, teacher = pair()
  plain = fidelity.measure(student, teacher)
  pad = np.full((len(student), 2), -np.inf)
  padded = fidelity.measure(
    np.hstack([student, pad]), np.hstack([teacher, pad])
  )
  assert padded == pytest.approx(plain, rel=1e-12)
  where = np.arange(len(student)) < 10
  dirty = np.where(where[:, None], student, np.nan)
  masked = fidelity.measure(dirty, teacher, where=where)
  assert masked == fidelity.measure(student[:10], teacher[:10])
  assert masked["count"] == 10


def test_wrong_arguments_are_named():
  student, teacher = pair(n=5)
  with pytest.raises(ValueError, match=r"student_logits.*teacher_logits"):
    fidelity.measure(student, teacher[:, :3])
  with pytest.raises(ValueError, match=r"teacher_logits\[2\]"):
    fidelity.measure(
      student, np.where(np.arange(5)[:, None] == 2, np.nan, teacher)
    )
  with pytest.raises(TypeError, match="student_logits has dtype"):
    fidelity.measure(student.astype(int), teacher)
  with pytest.raises(ValueError, match="no example"):
    fidelity.measure(student, teacher, where=np.zeros(5, bool))


def test_agreement_of_peers_is_the_mean_over_pairs():
  best = np.array([[0, 1, 2, 0], [0, 1, 0, 0], [1, 1, 2, 0]])
  logits = np.eye(3)[best]
  pairs = [np.mean(best[i] == best[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
  assert fidelity.peer_agreement(logits) == pytest.approx(np.mean(pairs))
  with pytest.raises(ValueError, match="at least two peers"):
    fidelity.peer_agreement(logits[:1])
