import itertools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses import relations
from kd_jax.losses._embeddings import pair
from tests import references
from tests.losses import relational
from tests.losses.relational import embeddings, pad, run

# All batches are of this size, [5, 2] and [5, 3], to be one program per form.
STUDENT, TEACHER = (5, 2), (5, 3)
THREE = np.arange(5) < 3

LOSSES = [relations.rkd_distance, relations.rkd_angle]
each = pytest.mark.parametrize("loss", LOSSES)
each_form = pytest.mark.parametrize("form", ["released", "paper"])


def huber(x):
  return x**2 / 2 if abs(x) < 1 else abs(x) - 0.5


def distance_reference(student, teacher, form="released"):
  """Over pairs; one value per anchor."""
  n = len(student)
  pairs = list(itertools.permutations(range(n), 2))
  relative = []
  for x in (student, teacher):
    d = {(i, j): np.sqrt(((x[i] - x[j]) ** 2).sum()) for i, j in pairs}
    mean = sum(d.values()) / len(pairs)
    relative.append({pair: d[pair] / mean for pair in pairs})
  values = np.zeros(n)
  for i, j in pairs:
    values[i] += huber(relative[0][i, j] - relative[1][i, j])
  return values / (n if form == "released" else n - 1)


def cosine_at(x, j, i, k):
  """By the law of cosines."""
  a, b, c = (((x[p] - x[q]) ** 2).sum() for p, q in ((i, j), (k, j), (i, k)))
  return (a + b - c) / (2 * np.sqrt(a * b))


def angle_reference(student, teacher, form="released"):
  n = len(student)
  values = np.zeros(n)
  for j, i, k in itertools.permutations(range(n), 3):
    gap = cosine_at(student, j, i, k) - cosine_at(teacher, j, i, k)
    values[j] += huber(gap)
  return values / (n**2 if form == "released" else (n - 1) * (n - 2))


REFERENCES = dict(
  zip(LOSSES, (distance_reference, angle_reference), strict=True)
)


@each
@each_form
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_values_and_both_gradients_match_float64(loss, form, scale):
  student, teacher = embeddings(0, STUDENT, scale), embeddings(1, TEACHER)
  relational.check(loss, REFERENCES[loss], student, teacher, form=form)


def test_distances_beyond_the_knee_of_the_huber_function():
  student, teacher = embeddings(0, STUDENT), embeddings(1, TEACHER)
  teacher[0] += 100.0
  relational.check(
    relations.rkd_distance, distance_reference, student, teacher, form="paper"
  )


def triangles():
  """One of sides 3, 4, 5, and one of equal sides; the others are masked."""
  student = np.float32([[0, 0], [3, 0], [0, 4]])
  teacher = np.float32([[0, 0, 0], [1, 0, 0], [0.5, np.sqrt(0.75), 0]])
  return pad(student, STUDENT), pad(teacher, TEACHER), THREE


def test_distances_by_hand():
  # Relative to the mean, 3/4 and 5/4 are a quarter off, 4/4 is not.
  expected = np.array([1, 2, 1]) / 4**2 / 2
  values, _ = run(relations.rkd_distance, *triangles(), form="paper")
  np.testing.assert_allclose(values[:3], expected / 2, rtol=1e-5)
  values, _ = run(relations.rkd_distance, *triangles(), form="released")
  np.testing.assert_allclose(values[:3], expected / 3, rtol=1e-5)


def test_angles_by_hand():
  # Cosines of 0, 3/5 and 4/5, against 1/2, in both directions.
  expected = 2 * np.array([0.5, 0.1, 0.3]) ** 2 / 2
  values, _ = run(relations.rkd_angle, *triangles(), form="paper")
  np.testing.assert_allclose(values[:3], expected / 2, rtol=1e-5)
  values, _ = run(relations.rkd_angle, *triangles(), form="released")
  np.testing.assert_allclose(values[:3], expected / 9, rtol=1e-5)


@each
@each_form
@settings(max_examples=20)
@given(
  seed=st.integers(0, 10**6),
  factor=st.floats(1e-3, 1e3),
  shift=st.floats(-10, 10),
)
def test_turned_scaled_and_shifted_is_the_same(loss, form, seed, factor, shift):
  student, teacher = embeddings(seed, STUDENT), embeddings(seed + 1, TEACHER)
  moved = student @ relational.rotation(seed, 2) + np.float32(shift)
  moved *= np.float32(factor)
  values, _ = run(loss, student, teacher, form=form)
  again, _ = run(loss, moved, teacher, form=form)
  np.testing.assert_allclose(again, values, rtol=1e-3, atol=1e-5)
  zero, _ = run(loss, moved, pad(student, TEACHER), form=form)
  np.testing.assert_allclose(zero, 0.0, atol=1e-8)


@each
@each_form
def test_masked_examples_are_nobodys_partner(loss, form):
  student, teacher = embeddings(0, STUDENT), embeddings(1, TEACHER)
  relational.check_mask(loss, REFERENCES[loss], student, teacher, form=form)


@each
@each_form
@pytest.mark.parametrize("valid", [0, 1, 2])
def test_too_few_for_a_relation(loss, form, valid):
  student, teacher = embeddings(0, STUDENT), embeddings(1, TEACHER)
  values, grads = run(loss, student, teacher, np.arange(5) < valid, form=form)
  # Two examples have a distance, which is its own mean, and no angle.
  for array in (values, *grads):
    np.testing.assert_allclose(array, 0.0, atol=1e-12)


@each
@each_form
def test_duplicates_and_zeros(loss, form):
  student, teacher = embeddings(0, STUDENT), embeddings(1, TEACHER)
  student[1] = student[0]
  student[2] = 0.0
  values, _ = relational.check_finite(loss, student, teacher, form=form)
  if loss is relations.rkd_distance:
    expected = distance_reference(np.float64(student), teacher, form)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
  for x in (student * 0, student * 0 + 1, student * 1e-30, student * 1e4):
    relational.check_finite(loss, x, teacher, form=form)
    relational.check_finite(loss, x, teacher * 0, form=form)
  # The same duplicates on both sides are no difference.
  values, grads = run(loss, student, 2 * pad(student, TEACHER), form=form)
  np.testing.assert_allclose(values, 0.0, atol=1e-12)
  np.testing.assert_allclose(grads[0], 0.0, atol=1e-6)


def test_one_sided_duplicates_count_in_the_released_angle():
  """Two of the same: no direction between them, where the other side has one.

  The entry of an example with itself, 1 on the other side, is then off by 1:
  part of the mean over all entries, and no triplet of the paper.
  """
  student = pad(np.float32([[0, 0], [0, 0], [0, 1]]), STUDENT)
  teacher = pad(np.float32([[0, 0], [1, 0], [0, 1]]), TEACHER)
  cosine = np.sqrt(0.5)
  # At 0: the 1 of example 1 with itself is gone, its angle to 2 was 0 anyway.
  # At 1: the same for 0, and the angle to 2. At 2: 0 degrees instead of 45.
  expected = [0.5, 0.5 + cosine**2, (1 - cosine) ** 2]
  values, _ = run(relations.rkd_angle, student, teacher, THREE, form="released")
  np.testing.assert_allclose(values[:3], np.array(expected) / 9, rtol=1e-5)
  expected = [0.0, cosine**2 / 2, (1 - cosine) ** 2 / 2]
  values, _ = run(relations.rkd_angle, student, teacher, THREE, form="paper")
  np.testing.assert_allclose(values[:3], expected, rtol=1e-5, atol=1e-7)


@each
def test_near_pairs_far_from_the_origin(loss):
  """A gap of 1e-3 at 1e3, where inner products have nothing left."""
  student, teacher = embeddings(0, STUDENT) + 1000, embeddings(1, TEACHER)
  student[1] = student[0] + np.float32(2.0**-10)
  # What float32 makes of it is the truth.
  exact = np.float64(student), np.float64(teacher)
  values, grads = run(loss, student, teacher, form="released")
  np.testing.assert_allclose(values, REFERENCES[loss](*exact), rtol=1e-5)
  want = references.gradient(
    lambda x: REFERENCES[loss](x, exact[1]), exact[0], 1e-7
  )
  assert relational.relative_error(grads[0], want) < 1e-4


@each
def test_near_equality(loss):
  """The loss is a sum of squares of small gaps there."""
  student = embeddings(0, STUDENT)
  teacher = pad(student, TEACHER) + embeddings(1, TEACHER, 1e-3)
  values, _ = run(loss, student, teacher, form="released")
  expected = REFERENCES[loss](np.float64(student), np.float64(teacher))
  np.testing.assert_allclose(values, expected, rtol=2e-3)


def test_feature_maps_are_flattened():
  student, teacher = embeddings(0, (5, 2, 1, 3)), embeddings(1, (5, 1, 1, 4))
  flat_student, flat_teacher, _ = pair(student, teacher, None)
  np.testing.assert_array_equal(flat_student, student.reshape(5, 6))
  np.testing.assert_array_equal(flat_teacher, teacher.reshape(5, 4))
  with pytest.raises(ValueError, match=r"\(5, 2, 1, 3\).*\(5, 4\).*many axes"):
    relations.rkd_distance(student, teacher.reshape(5, 4))


def angles_at_once(student, teacher, form="released"):
  """Values and both gradients of their sum in float64, by hand."""
  sides = [np.asarray(x, np.float64) for x in (student, teacher)]
  n = len(student)
  number = n**2 if form == "released" else (n - 1) * (n - 2)
  values, grads = np.zeros(n), [np.zeros_like(x) for x in sides]
  for j in range(n):
    lengths, directions = [], []
    for x in sides:
      length = np.linalg.norm(x - x[j], axis=1, keepdims=True)
      lengths.append(np.where(length == 0, np.inf, length))
      directions.append((x - x[j]) / lengths[-1])
    gap = np.subtract(*(e @ e.T for e in directions))
    if form == "paper":
      np.fill_diagonal(gap, 0.0)
    inside = np.clip(gap, -1, 1)
    values[j] = (inside * (gap - inside / 2)).sum() / number
    for grad, e, length, sign in zip(
      grads, directions, lengths, (1, -1), strict=True
    ):
      slope = 2 * sign * inside @ e / number
      moved = (slope - e * (slope * e).sum(1, keepdims=True)) / length
      grad += moved
      grad[j] -= moved.sum(0)
  return values, grads


@each_form
def test_two_float64_references_agree(form):
  student, teacher = embeddings(0, STUDENT), embeddings(1, TEACHER)
  exact = np.float64(student), np.float64(teacher)
  values, grads = angles_at_once(*exact, form)
  np.testing.assert_allclose(values, angle_reference(*exact, form))
  want = references.gradient(
    lambda x: angle_reference(x, exact[1], form), exact[0]
  )
  np.testing.assert_allclose(grads[0], want, rtol=1e-5, atol=1e-8)


@each_form
def test_angles_of_a_batch_of_many_blocks(form):
  """Some anchors at a time, and the pairs of each in blocks: neither shows."""
  student, teacher = embeddings(0, (147, 3)), embeddings(1, (147, 4))
  student[5] = student[4]  # gaps beyond 1
  where = np.arange(147) % 7 != 2
  values, grads = run(relations.rkd_angle, student, teacher, where, form=form)
  expected, slopes = angles_at_once(student[where], teacher[where], form)
  np.testing.assert_allclose(values[where], expected, rtol=1e-6)
  np.testing.assert_array_equal(values[~where], 0.0)
  for got, want in zip(grads, slopes, strict=True):
    np.testing.assert_array_equal(got[~where], 0.0)
    assert relational.relative_error(got[where], want) < 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_angles_keep_their_digits_for_near_pairs(seed):
  """A gap of 1e-4 beside distances of 10, of which 1e-8 is nothing left."""
  student, teacher = embeddings(seed, (48, 64)), embeddings(seed + 9, (48, 64))
  step = embeddings(seed + 7, 64)
  student[1] = student[0] + 1e-4 * step / np.linalg.norm(step)
  _, grads = run(relations.rkd_angle, student, teacher, form="released")
  _, slopes = angles_at_once(student, teacher)
  # What the two say of each other is 1e4 times larger than the rest, and part
  # of it cancels.
  assert relational.relative_error(grads[0][:2], slopes[0][:2]) < 1e-5
  assert relational.relative_error(grads[0][2:], slopes[0][2:]) < 1e-6
  assert relational.relative_error(grads[1], slopes[1]) < 1e-6


@pytest.mark.parametrize(
  ("loss", "numbers"),
  [
    (relations.rkd_distance, 256**2 * 64),
    (relations.rkd_angle, 256**3),
  ],
)
def test_memory(loss, numbers):
  """No array with a number for all that is computed, gradients included."""
  x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
  total = lambda s, t: loss(s, t).sum()
  compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, x).compile()
  used = compiled.memory_analysis().temp_size_in_bytes
  assert used < 4 * numbers / 6


@each
def test_form(loss):
  x = embeddings(0, STUDENT)
  with pytest.raises(ValueError, match="^form is 'mean'; it should be"):
    loss(x, x, form="mean")
