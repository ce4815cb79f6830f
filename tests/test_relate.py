import functools
import itertools
import subprocess
import sys

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import relate
from tests import references


def points(seed, shape=(4, 3), scale=1.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


@functools.cache
def value_and_grad(relation):
  """(values, gradient of their sum weighted by w)."""

  @jax.jit
  def run(x, w):
    def total(x):
      values = relation(x)
      return (w * values).sum(), values

    grad, values = jax.grad(total, has_aux=True)(x)
    return values, grad

  return run


def gram(x):
  return np.array([[a.ravel() @ b.ravel() for b in x] for a in x])


def cosines(x):
  with np.errstate(invalid="ignore"):
    lengths = np.sqrt(np.diag(gram(x)))
    return np.nan_to_num(gram(x) / np.outer(lengths, lengths))


def distances(x):
  return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])


def angles(x):
  """By the law of cosines."""
  n, d = len(x), distances(x)
  result = np.zeros((n, n, n))
  for j, i, k in itertools.product(range(n), repeat=3):
    if d[j, i] and d[j, k]:
      squares = d[j, i] ** 2 + d[j, k] ** 2 - d[i, k] ** 2
      result[j, i, k] = squares / (2 * d[j, i] * d[j, k])
  return result


RELATIONS = {
  "gram": (relate.gram, gram),
  "cosine": (functools.partial(relate.gram, cosine=True), cosines),
  "distances": (relate.distances, distances),
  "angles": (relate.angles, angles),
}
each = pytest.mark.parametrize(
  ("relation", "reference"), RELATIONS.values(), ids=RELATIONS
)


@each
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_values_and_gradients_match_float64(relation, reference, scale):
  x = points(0, scale=scale)
  shape = reference(x).shape
  w = np.random.default_rng(1).normal(size=shape)
  # Of a point with itself, the reference has no derivative.
  w *= np.array([len({*i}) == len(i) for i in np.ndindex(shape)]).reshape(shape)
  values, grad = value_and_grad(relation)(x, w)
  exact = np.float64(x)
  np.testing.assert_allclose(
    values, reference(exact), rtol=1e-6, atol=1e-6 * np.abs(values).max()
  )
  want = references.gradient(lambda x: w * reference(x), exact)
  np.testing.assert_allclose(grad, want, atol=1e-5 * np.abs(want).max())


@each
def test_points_that_coincide_or_vanish(relation, reference):
  x = points(0)
  x[1] = x[0]
  x[2] = 0.0
  w = np.ones(reference(x).shape)
  for z in (x, x * 0, x * 1e-30, x * 1e4, x * 0 + 1):
    values, grad = value_and_grad(relation)(z, w)
    expected = reference(np.float64(z))
    np.testing.assert_allclose(
      values, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max() + 1e-37
    )
    assert np.all(np.isfinite(grad))
  if reference in (distances, angles):
    # Equal points attract nothing, and are not torn apart.
    np.testing.assert_array_equal(value_and_grad(relation)(x * 0, w)[1], 0.0)


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("name", ["distances", "angles"])
def test_near_pairs(name, offset, gap):
  relation, reference = RELATIONS[name]
  x = points(0) + np.float32(offset)
  x[1] = x[0] + gap * points(1, (3,))  # in float32, which is then the truth
  if np.array_equal(x[0], x[1]):
    x[1, 0] = np.nextafter(x[0, 0], np.float32(np.inf))
  exact = np.float64(x)
  shape = reference(exact).shape
  w = np.array([len({*i}) == len(i) for i in np.ndindex(shape)]).reshape(shape)
  w = w * np.random.default_rng(2).normal(size=shape)
  values, grad = value_and_grad(relation)(x, w)
  np.testing.assert_allclose(
    values * (w != 0), reference(exact) * (w != 0), 1e-5, 1e-6
  )
  # From the differences of longer numbers: the law of cosines cancels as well.
  want = exact_gradient(name, exact, w)
  assert np.abs(grad - want).max() < 2e-6 * np.abs(want).max()


def exact_gradient(name, x, w):
  """By hand, in float64."""
  grad = np.zeros_like(x)
  for i in np.ndindex(w.shape):
    if not w[i]:
      continue
    if name == "distances":
      a, b = i
      e = (x[a] - x[b]) / np.linalg.norm(x[a] - x[b])
      grad[a] += w[i] * e
      grad[b] -= w[i] * e
      continue
    j, a, b = i
    lengths = [np.linalg.norm(x[p] - x[j]) for p in (a, b)]
    e, f = (x[a] - x[j]) / lengths[0], (x[b] - x[j]) / lengths[1]
    to_a = w[i] * (f - (e @ f) * e) / lengths[0]
    to_b = w[i] * (e - (e @ f) * f) / lengths[1]
    grad[a] += to_a
    grad[b] += to_b
    grad[j] -= to_a + to_b
  return grad


@each
def test_two_sets(relation, reference):
  """Between x and y it is a block of the relation within both."""
  x, y = points(0, (2, 3)), points(1, (3, 3))
  whole = np.asarray(jax.jit(relation)(np.concatenate([x, y])))
  between = jax.jit(relation)(x, y)
  block = whole[:2, 2:] if whole.ndim == 2 else whole[:2, 2:, 2:]
  np.testing.assert_allclose(between, block, rtol=1e-6, atol=1e-7)


def test_feature_maps_are_flattened_and_low_precision_is_not_kept():
  x = jnp.asarray(points(0, (4, 2, 3)), jnp.bfloat16)
  got = relate.gram(x)
  assert got.dtype == jnp.float32 and got.shape == (4, 4)
  np.testing.assert_allclose(got, gram(np.float64(x)), rtol=1e-6, atol=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_angles_of_a_triangle(seed):
  """They sum to 180 degrees, and the middle one is read from the first axis."""
  x = points(seed, (4, 3))
  values, _ = value_and_grad(relate.angles)(x, np.zeros((4, 4, 4)))
  corners = np.arccos(np.clip(values, -1, 1))
  total = corners[0, 1, 2] + corners[1, 0, 2] + corners[2, 0, 1]
  np.testing.assert_allclose(total, np.pi, atol=2e-3)
  np.testing.assert_allclose(values, np.swapaxes(values, 1, 2), atol=1e-6)


@pytest.mark.parametrize(
  ("x", "y"),
  [
    (np.ones((2, 3)), np.ones((2, 4))),
    (np.ones((2, 3)), np.ones((3,))),
    (np.ones(3), None),
    (np.ones((2, 0)), None),
    (np.ones((2, 3)), np.ones((2, 3, 1))),
  ],
)
def test_shapes(x, y):
  for relation in (relate.gram, relate.distances, relate.angles):
    with pytest.raises(ValueError, match=r"^x has shape .* and y has shape .*"):
      relation(np.float32(x), None if y is None else np.float32(y))


def test_dtypes():
  x = np.ones((2, 3), np.float32)
  for relation in (relate.gram, relate.distances, relate.angles):
    with pytest.raises(TypeError, match="^x has dtype int"):
      relation(np.ones((2, 3), int))
    with pytest.raises(TypeError, match="^y has dtype bool"):
      relation(x, np.ones((2, 3), bool))
  with pytest.raises(TypeError, match="^features has dtype int"):
    relate.attention_map(np.ones((1, 2, 3), int))
  with pytest.raises(TypeError, match="^scores has dtype int"):
    relate.segment_softmax(np.ones(2, int), np.zeros(2, int), 1)


# Attention maps


def attention(features, p=2.0):
  maps = [
    np.array([sum(abs(v) ** p for v in position) for position in example])
    for example in features.reshape(len(features), -1, features.shape[-1])
  ]
  return np.array([m / np.linalg.norm(m) for m in maps])


attention_and_grad = jax.jit(
  lambda x, p, w: (
    relate.attention_map(x, p),
    jax.grad(lambda *a: (w * relate.attention_map(*a)).sum(), (0, 1))(x, p),
  )
)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_attention_map(p):
  x, w = points(0, (2, 2, 2, 3)), points(1, (2, 4))
  values, (grad, to_p) = attention_and_grad(x, p, w)
  exact = np.float64(x)
  np.testing.assert_allclose(values, attention(exact, p), rtol=1e-6)
  want = references.gradient(lambda x: w * attention(x, p), exact)
  np.testing.assert_allclose(grad, want, atol=1e-5)
  want = references.gradient(lambda p: w * attention(exact, p), np.float64(p))
  np.testing.assert_allclose(to_p, want, rtol=1e-4)
  # Neither overflow nor underflow: the scale does not matter.
  for scale in (1e-30, 1e15):
    scaled, (grad, _) = attention_and_grad(scale * x, p, w)
    np.testing.assert_allclose(scaled, values, rtol=1e-5)
    assert np.all(np.isfinite(grad))


def test_attention_map_of_nothing():
  x, w = points(0, (2, 2, 2, 3)), points(1, (2, 4))
  x[0] = 0.0
  x[1, 0] = 0.0
  for p in (1.0, 2.0):
    values, grads = attention_and_grad(x, p, w)
    np.testing.assert_array_equal(values[0], 0.0)
    assert all(np.all(np.isfinite(grad)) for grad in grads)
  values, _ = attention_and_grad(x, -1.0, w)
  assert np.all(np.isnan(values))
  with pytest.raises(ValueError, match="^p is 0; .* above 0"):
    relate.attention_map(x, 0)
  with pytest.raises(ValueError, match=r"^features has shape \(2, 3\)"):
    relate.attention_map(x[0, 0])
  x[1, 1] = np.nan
  assert np.all(np.isnan(attention_and_grad(x, 2.0, w)[0][1]))


# Segments


def segments(scores, ids):
  result = np.zeros_like(scores)
  for i in set(ids.tolist()):
    part = np.exp(scores[ids == i])
    result[ids == i] = part / part.sum(0)
  return result


softmax_and_grad = jax.jit(
  lambda scores, ids, w: (
    relate.segment_softmax(scores, ids, 5),
    jax.grad(lambda s: (w * relate.segment_softmax(s, ids, 5)).sum())(scores),
  )
)


def test_segment_softmax():
  """Unsorted, with a segment of one edge and one of none; two heads."""
  ids = np.array([4, 0, 0, 2, 4, 0])
  scores, w = points(0, (6, 2), 2.0), points(1, (6, 2))
  values, grad = softmax_and_grad(scores, ids, w)
  exact = np.float64(scores)
  np.testing.assert_allclose(values, segments(exact, ids), rtol=1e-6)
  want = references.gradient(lambda s: w * segments(s, ids), exact)
  np.testing.assert_allclose(grad, want, atol=1e-6)
  # A shift of a segment does not matter, however large.
  shifted, _ = softmax_and_grad(scores + 4096 * (ids == 4)[:, None], ids, w)
  np.testing.assert_allclose(shifted, values, rtol=2e-3)
  for scale in (1e4, 1e-30):
    values, grad = softmax_and_grad(scale * scores, ids, w)
    assert np.all(np.isfinite(values)) and np.all(np.isfinite(grad))
    np.testing.assert_allclose(values[ids == 0].sum(0), 1.0, rtol=1e-6)


def test_edges_that_do_not_exist():
  ids = np.array([4, 0, 0, 2, 4, 0])
  scores, w = points(0, (6, 2), 2.0), points(1, (6, 2))
  here = np.array([True, True, False, False, True, True])
  scores[~here] = -np.inf
  values, grad = softmax_and_grad(scores, ids, w)
  np.testing.assert_array_equal(values[~here], 0.0)
  np.testing.assert_array_equal(grad[~here], 0.0)
  expected = segments(np.float64(scores[here]), ids[here])
  np.testing.assert_allclose(values[here], expected, rtol=1e-6)
  scores[0, 1] = np.nan
  values, _ = softmax_and_grad(scores, ids, w)
  assert np.isnan(values)[ids == 4, 1].all()
  assert not np.isnan(values)[ids != 4].any()


def test_segments_out_of_range():
  scores = points(0, (3,))
  for bad in (-1, 5, 2**32):
    ids = np.array([0, bad, 1])
    with pytest.raises(ValueError, match=rf"^segment_ids\[1\] is {bad}; .* 4"):
      relate.segment_softmax(scores, ids, 5)
    if abs(bad) < 2**31:
      values = jax.jit(relate.segment_softmax, static_argnums=2)(scores, ids, 5)
      assert np.all(np.isnan(values))
  with pytest.raises(ValueError, match=r"\(2,\).*\(3,\).*\[edges\]"):
    relate.segment_softmax(scores, ids[:2], 5)
  with pytest.raises(TypeError, match="^segment_ids has dtype float"):
    relate.segment_softmax(scores, scores, 5)


def test_nothing_is_related_to_nothing():
  x = np.zeros((0, 3), np.float32)
  assert relate.gram(x).shape == relate.distances(x).shape == (0, 0)
  assert relate.angles(x).shape == (0, 0, 0)
  assert relate.attention_map(np.zeros((0, 2, 2, 3), np.float32)).shape == (
    0,
    4,
  )
  edges = relate.segment_softmax(x[:, 0], np.zeros(0, int), 4)
  assert edges.shape == (0,)


def test_it_can_be_imported_first():
  """It is built on the numerics of the losses, which are built on it."""
  code = """
import sys
for name in ("kd_jax.relate", "kd_jax.banks", "kd_jax.losses"):
  for loaded in [m for m in sys.modules if m.startswith("kd_jax")]:
    del sys.modules[loaded]
  __import__(name)
  assert "flax" not in sys.modules
  assert sys.modules["kd_jax.losses"].kl and sys.modules["kd_jax.relate"].gram
"""
  subprocess.run([sys.executable, "-c", code], check=True)
