from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from kd_jax.losses import distributions
from tests import references
from tests.losses import relational
from tests.losses.relational import embeddings, pad, run

# Batches are of this size throughout, to be one program per case.
SHAPE, WIDER = (6, 3), (6, 5)

MMD = distributions.mmd
W2 = distributions.gaussian_wasserstein
PROCRUSTES = distributions.procrustes


def mmd_reference(student, teacher, bandwidth=None):
  sides = [(student, student), (teacher, teacher), (student, teacher)]
  distances = [
    [np.sqrt(((x - y) ** 2).sum()) for x in a for y in b] for a, b in sides
  ]
  if bandwidth is None:
    bandwidth = np.mean(distances)
  means = [
    np.mean([np.exp(-(d**2) / (2 * bandwidth**2)) for d in side])
    for side in distances
  ]
  return np.full(len(student), means[0] + means[1] - 2 * means[2])


def root_of(matrix):
  """The symmetric square root."""
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def w2_reference(student, teacher, form="released"):
  shift = ((student.mean(0) - teacher.mean(0)) ** 2).sum()
  if form == "released":
    spread = ((student.std(0) - teacher.std(0)) ** 2).sum()
  else:
    s, t = (np.cov(x.T, bias=True) for x in (student, teacher))
    half = root_of(s)
    spread = np.trace(s + t) - 2 * np.trace(root_of(half @ t @ half))
  return np.full(len(student), shift + spread)


def procrustes_reference(student, teacher):
  a, b = (x - x.mean(0) for x in (student, teacher))
  a, b = a / np.sqrt((a**2).sum()), b / np.sqrt((b**2).sum())
  return np.full(len(student), 2 - 2 * np.linalg.norm(a.T @ b, "nuc"))


CASES = {
  "mmd": (MMD, mmd_reference, SHAPE, {}),
  "mmd with a bandwidth": (MMD, mmd_reference, SHAPE, {"bandwidth": 0.7}),
  "w2": (W2, w2_reference, SHAPE, {}),
  "w2 of the paper": (W2, w2_reference, SHAPE, {"form": "paper"}),
  "procrustes": (PROCRUSTES, procrustes_reference, WIDER, {}),
}
each = pytest.mark.parametrize(
  ("loss", "reference", "shape", "options"), CASES.values(), ids=CASES
)


@each
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_values_and_both_gradients_match_float64(
  loss, reference, shape, options, scale
):
  student = embeddings(0, SHAPE, scale)
  teacher = scale * embeddings(1, shape) + np.float32(0.5)
  relational.check(loss, reference, student, teacher, **options)


@each
def test_masked_examples_are_not_in_the_set(loss, reference, shape, options):
  student, teacher = embeddings(0, SHAPE), embeddings(1, shape)
  relational.check_mask(loss, reference, student, teacher, **options)


def test_eight_devices_are_one():
  """The contract asks it of the defaults."""
  relational.check_pmap(W2, w2_reference, 3, 3, form="paper")


@each
@pytest.mark.parametrize(("gap", "offset"), [(1e-2, 1e4), (1e-4, 10)])
def test_near_equality(loss, reference, shape, options, gap, offset):
  """The value is of the order of the gap's square, far from the origin too."""
  # What float32 makes of it is the truth.
  student = embeddings(0, SHAPE) + np.float32(offset)
  same = pad(student, shape)
  teacher = same + embeddings(1, shape, gap)
  values, grads = run(loss, student, teacher, **options)
  exact = np.float64(student), np.float64(teacher)
  # The float64 reference itself loses digits: 2 - 2 * 1.
  np.testing.assert_allclose(
    values, reference(*exact, **options), rtol=2e-6 / gap, atol=3e-15
  )
  want = references.gradient(
    lambda x: reference(x, exact[1], **options), exact[0]
  )
  assert relational.relative_error(grads[0], want) < 1e-5 / gap
  values, grads = run(loss, student, same, **options)
  for array in (values, *grads):
    np.testing.assert_allclose(array, 0.0, atol=2e-6)


@each
def test_degenerate_sets(loss, reference, shape, options):
  student, teacher = embeddings(0, SHAPE), embeddings(1, shape)
  duplicated = student[[0, 0, 0, 1, 1, 2]]
  flat = student * np.float32([1, 0, 0])
  tiny, one = student * 1e-30, student * 0 + 1
  for x in (duplicated, flat, student * 0, one, tiny):
    for y in (teacher, teacher * 0, teacher[[0, 1] * 3], pad(x, shape)):
      values, _ = relational.check_finite(loss, x, y, **options)
      if loss is PROCRUSTES and not (np.ptp(x, 0).any() and np.ptp(y, 0).any()):
        continue  # the reference divides by 0
      if loss is MMD and not options and np.array_equal(pad(x, shape), y):
        continue
      expected = reference(np.float64(x), np.float64(y), **options)
      np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)


def test_fewer_examples_than_coordinates():
  """Covariances are singular; the decomposition is of the smaller side."""
  student, teacher = embeddings(0, (4, 9)), embeddings(1, (4, 9))
  relational.check(PROCRUSTES, procrustes_reference, student, teacher)
  values, (grad, _) = run(W2, student, teacher, form="paper")
  expected = w2_reference(np.float64(student), np.float64(teacher), "paper")
  np.testing.assert_allclose(values, expected, rtol=1e-4)
  # The root of a singular matrix is not smooth, as the distance is, so by hand.
  a, b = (np.float64(x - x.mean(0)) for x in (student, teacher))
  u, _, vt = np.linalg.svd(a @ b.T)
  want = student.mean(0) - teacher.mean(0) + a - u @ vt @ b
  assert relational.relative_error(grad, 2 * want) < 1e-5


def test_nothing_is_turned_into_an_arbitrary_direction():
  """A flat student: its gradient stays in its plane, the smallest there is."""
  student = embeddings(0, SHAPE) * np.float32([1, 1, 0])
  _, grads = run(PROCRUSTES, student, embeddings(1, WIDER))
  np.testing.assert_allclose(grads[0][:, 2], 0.0, atol=1e-6)
  assert np.abs(grads[0][:, :2]).min() > 1e-4
  # Equal examples on one side: nothing to match, but much to come down to.
  flat = np.ones(SHAPE, np.float32)
  _, grads = run(W2, flat, embeddings(1, SHAPE), form="paper")
  centred = embeddings(1, SHAPE) - embeddings(1, SHAPE).mean(0)
  np.testing.assert_allclose(
    grads[1] - grads[1].mean(0), 2 * centred, atol=1e-5
  )
  np.testing.assert_allclose(grads[0] - grads[0].mean(0), 0.0, atol=1e-5)


def test_procrustes_is_the_best_of_all_rotations():
  """In a plane they can be tried, reflections included."""
  student, teacher = (pad(embeddings(i, (6, 2)), SHAPE) for i in (0, 1))
  a, b = (x[:, :2] - x[:, :2].mean(0) for x in (student, teacher))
  a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
  best = np.inf
  for t in np.linspace(0, 2 * np.pi, 5001):
    for flip in (1, -1):
      c, s = np.cos(t), np.sin(t)
      q = np.array([[c, -flip * s], [s, flip * c]])
      best = min(best, ((a @ q - b) ** 2).sum())
  values, _ = run(PROCRUSTES, student, pad(teacher, WIDER))
  np.testing.assert_allclose(values, best, rtol=1e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100))
def test_procrustes_invariances(seed, factor):
  student, teacher = embeddings(seed, SHAPE), embeddings(seed + 1, WIDER)
  turned = student @ relational.rotation(seed, 3) + 2
  turned *= np.float32(factor)
  values, _ = run(PROCRUSTES, student, teacher)
  assert np.all((values >= 0) & (values <= 2))
  again, _ = run(PROCRUSTES, turned, teacher)
  np.testing.assert_allclose(again, values, rtol=1e-3)
  zero, _ = run(PROCRUSTES, turned, pad(student, WIDER))
  np.testing.assert_allclose(zero, 0.0, atol=1e-9)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_w2_by_hand(form):
  """A grid with these moments exactly: both forms are the textbook formula."""
  grid = np.float32([(a, b, 0) for a in (-1, 1) for b in (-1, 1)])
  student = pad(grid * np.float32([2, 3, 0]) + np.float32([1, 0, 0]), SHAPE)
  teacher = pad(grid * np.float32([5, 1, 0]) + np.float32([1, 4, 0]), SHAPE)
  values, _ = run(W2, student, teacher, np.arange(6) < 4, form=form)
  np.testing.assert_allclose(values[:4], 4**2 + 3**2 + 2**2, rtol=1e-6)


def test_w2_forms_differ_by_correlation():
  """Equal deviations, correlated the other way: only the paper's sees it."""
  x = np.linspace(-1, 1, 6, dtype=np.float32)
  student, teacher = np.stack([x, x, 0 * x], 1), np.stack([x, -x, 0 * x], 1)
  values, _ = run(W2, student, teacher, form="released")
  np.testing.assert_allclose(values, 0.0, atol=1e-12)
  values, _ = run(W2, student, teacher, form="paper")
  # Rank one each, and orthogonal: nothing can be matched.
  np.testing.assert_allclose(values, 4 * x.var(), rtol=1e-5)


@pytest.mark.parametrize("case", ["mmd", "w2", "w2 of the paper"])
def test_which_example_is_which_does_not_count(case):
  loss, _, _, options = CASES[case]
  student, teacher = embeddings(0, SHAPE), embeddings(1, SHAPE)
  values, _ = run(loss, student, teacher, **options)
  shuffled = student[[3, 1, 5, 0, 2, 4]]
  again, _ = run(loss, shuffled, teacher, **options)
  np.testing.assert_allclose(again, values, rtol=1e-5)
  zero, _ = run(loss, shuffled, student, **options)
  np.testing.assert_allclose(zero, 0.0, atol=1e-6)


def test_mmd_bounds_and_bandwidth():
  student, teacher = embeddings(0, SHAPE), embeddings(1, SHAPE)
  # Far apart, and all in one point each: the bound.
  values, _ = run(MMD, student * 0, teacher * 0 + 9, bandwidth=0.1)
  np.testing.assert_allclose(values, 2.0, rtol=1e-6)
  # Units do not matter without a bandwidth.
  values, _ = run(MMD, student, teacher)
  scaled, _ = run(MMD, 1e-20 * student, 1e-20 * teacher)
  np.testing.assert_allclose(scaled, values, rtol=1e-5)
  # For a large one it is the distance of the means.
  values, _ = run(MMD, student, teacher, bandwidth=1e3)
  shift = ((student.mean(0) - teacher.mean(0)) ** 2).sum()
  np.testing.assert_allclose(values * 1e6, shift, rtol=1e-3)


def test_arguments():
  x = embeddings(0, SHAPE)
  with pytest.raises(ValueError, match="^bandwidth is 0; .* above 0"):
    MMD(x, x, bandwidth=0)
  with pytest.raises(ValueError, match="^form is 'full'; it should be"):
    W2(x, x, form="full")
  for loss in (MMD, W2):
    with pytest.raises(ValueError, match=r"\(6, 3\).*\(6, 2\).*equal"):
      loss(x, x[:, :2])
  values, _ = run(MMD, x, x + 1, bandwidth=-1.0)
  assert np.all(np.isnan(values))
