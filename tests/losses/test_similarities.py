import math

from hypothesis import assume, given, settings, strategies as st
import numpy as np
import pytest

from kd_jax.losses import similarities
from tests.losses import relational
from tests.losses.relational import embeddings, pad, run

# All batches are of this size, [5, 2] and [5, 3], to be one program per case.
STUDENT, TEACHER = (5, 2), (5, 3)

SP = similarities.similarity_preserving
CC = similarities.correlation_congruence
PKT = similarities.pkt


def sp_reference(student, teacher):
  n = len(student)
  values = np.zeros(n)
  for i in range(n):
    rows = []
    for x in (student, teacher):
      row = np.array([x[i] @ x[j] for j in range(n)])
      rows.append(direction(row))
    values[i] = ((rows[0] - rows[1]) ** 2).sum() / n
  return values


def direction(x):
  length = np.linalg.norm(x)
  return x / length if length else x


def cc_reference(student, teacher, gamma=0.4, order=2, kernel="rbf"):
  def k(a, b):
    if kernel == "bilinear":
      return a @ b
    cosine = direction(a) @ direction(b)
    return math.exp(-2 * gamma) * sum(
      (2 * gamma) ** n / math.factorial(n) * cosine**n for n in range(order + 1)
    )

  rows = range(len(student))
  gaps = [
    [k(student[i], student[j]) - k(teacher[i], teacher[j]) for j in rows]
    for i in rows
  ]
  return (np.array(gaps) ** 2).mean(1)


def pkt_reference(student, teacher, form="released"):
  n = len(student)
  values = np.zeros(n)
  for i in range(n):
    others = [j for j in range(n) if form == "released" or j != i]
    p, q = (
      np.array([(1 + direction(x[i]) @ direction(x[j])) / 2 for j in others])
      for x in (teacher, student)
    )
    p, q = p / p.sum(), q / q.sum()
    values[i] = (p * np.log((p + 1e-7) / (q + 1e-7))).sum()
  return values / n if form == "released" else values


CASES = {
  "sp": (SP, sp_reference, {}),
  "cc": (CC, cc_reference, {"gamma": 0.4}),
  "cc bilinear": (CC, cc_reference, {"kernel": "bilinear"}),
  "pkt": (PKT, pkt_reference, {}),
  "pkt of the paper": (PKT, pkt_reference, {"form": "paper"}),
}
each = pytest.mark.parametrize(
  ("loss", "reference", "options"), CASES.values(), ids=CASES
)


@each
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_values_and_both_gradients_match_float64(
  loss, reference, options, scale
):
  student, teacher = embeddings(0, STUDENT, scale), embeddings(1, TEACHER)
  relational.check(loss, reference, student, teacher, **options)


@each
def test_zero_rows_and_duplicates(loss, reference, options):
  student, teacher = embeddings(0, STUDENT), embeddings(1, TEACHER)
  student[1] = student[0]
  student[2], teacher[3] = 0.0, 0.0
  values, _ = relational.check_finite(loss, student, teacher, **options)
  expected = reference(np.float64(student), np.float64(teacher), **options)
  np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-7)
  for x in (student * 0, student * 0 + 1, student * 1e-30, student * 1e4):
    relational.check_finite(loss, x, teacher, **options)


@each
def test_near_equality(loss, reference, options):
  student = embeddings(0, STUDENT)
  same = pad(student, TEACHER)
  teacher = same + embeddings(1, TEACHER, 1e-3)
  values, _ = run(loss, student, teacher, **options)
  expected = reference(np.float64(student), np.float64(teacher), **options)
  np.testing.assert_allclose(values, expected, rtol=1e-3)
  values, grads = run(loss, student, same, **options)
  for array in (values, *grads):
    np.testing.assert_allclose(array, 0.0, atol=1e-6)


@each
def test_masked_examples_are_nobodys_partner(loss, reference, options):
  student, teacher = embeddings(0, STUDENT), embeddings(1, TEACHER)
  relational.check_mask(loss, reference, student, teacher, **options)


@each
def test_an_example_alone_is_0(loss, reference, options):
  if options.get("kernel") == "bilinear":
    return  # its length counts
  student, teacher = embeddings(0, STUDENT), embeddings(1, TEACHER)
  values, grads = run(loss, student, teacher, np.arange(5) == 3, **options)
  for array in (values, *grads):
    np.testing.assert_allclose(array, 0.0, atol=1e-12)


@each
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100))
def test_rotations_and_lengths(loss, reference, options, seed, factor):
  """What each relation does not see."""
  student, teacher = embeddings(seed, STUDENT), embeddings(seed + 1, TEACHER)
  cosines = [direction(a) @ direction(b) for a in student for b in student]
  assume(min(cosines) > -0.99)  # 1 + cosine would be all rounding in pkt
  moved = student @ relational.rotation(seed, 2)
  if loss is SP:  # one scale for all
    moved *= np.float32(factor)
  elif options.get("kernel") != "bilinear":  # a scale for each
    moved *= (
      np.float32(factor) ** np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    )
  values, _ = run(loss, student, teacher, **options)
  again, _ = run(loss, moved, teacher, **options)
  np.testing.assert_allclose(again, values, rtol=1e-3, atol=1e-5)


def test_sp_by_hand():
  """Two orthogonal examples, against the same example twice."""
  where = np.arange(5) < 2
  student = pad(7 * np.eye(2, dtype=np.float32), STUDENT)
  values, _ = run(SP, student, np.ones(TEACHER, np.float32), where)
  # Rows (1, 0) and (1, 1) / sqrt 2.
  np.testing.assert_allclose(values[:2], (2 - np.sqrt(2)) / 2, rtol=1e-6)


def test_sp_sees_lengths():
  student = embeddings(0, STUDENT)
  longer = student * np.float32([[1], [1], [5], [1], [1]])
  values, _ = run(SP, longer, pad(student, TEACHER))
  assert np.all(values > 1e-3)


def test_cc_tends_to_the_gaussian_kernel():
  student, teacher = embeddings(0, STUDENT), embeddings(1, TEACHER)
  gamma, k = 0.7, []
  for x in (np.float64(student), np.float64(teacher)):
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    k.append(np.exp(-gamma * ((u[:, None] - u[None]) ** 2).sum(-1)))
  expected = ((k[0] - k[1]) ** 2).mean(1)
  values, _ = run(CC, student, teacher, order=14, gamma=gamma)
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_pkt_by_hand():
  """Three neighbours: alike, at a right angle, opposite."""
  where = np.arange(5) < 4
  first = pad(np.float32([[1, 0], [2, 0], [0, 1], [-1, 0]]), STUDENT)
  second = pad(np.float32([[1, 0], [0, 1], [0, 3], [0, -1]]), STUDENT)
  p, q = np.array([2, 1, 0]) / 3, np.array([1, 1, 1]) / 3
  values, _ = run(PKT, second, pad(first, TEACHER), where, form="paper")
  expected = (p[:2] * np.log(p[:2] / q[:2])).sum()
  np.testing.assert_allclose(values[0], expected, rtol=1e-5)
  # With the sides exchanged, a share of 1/3 meets none: large, and finite.
  values, grads = run(PKT, first, pad(second, TEACHER), where, form="paper")
  expected = (q[:2] * np.log(q[:2] / p[:2])).sum() + np.log(1e7 / 3) / 3
  np.testing.assert_allclose(values[0], expected, rtol=1e-3)
  assert all(np.all(np.isfinite(grad)) for grad in grads)
  # An example is its own neighbour in the released form.
  p, q = np.array([2, 2, 1, 0]) / 5, np.array([2, 1, 1, 1]) / 5
  values, _ = run(PKT, second, pad(first, TEACHER), where)
  expected = (p[:3] * np.log(p[:3] / q[:3])).sum() / 4
  np.testing.assert_allclose(values[0], expected, rtol=1e-5)


def test_arguments():
  x = embeddings(0, STUDENT)
  with pytest.raises(ValueError, match="^gamma is 0; .* above 0"):
    CC(x, x, gamma=0)
  with pytest.raises(
    ValueError, match="^order is 0; it should be an int, at least 1"
  ):
    CC(x, x, order=0)
  with pytest.raises(ValueError, match="^kernel is 'linear'; it should be"):
    CC(x, x, kernel="linear")
  with pytest.raises(ValueError, match="^form is 'mean'; it should be"):
    PKT(x, x, form="mean")
  values, _ = run(CC, x, pad(x, TEACHER), gamma=-1.0)
  assert np.all(np.isnan(values))
