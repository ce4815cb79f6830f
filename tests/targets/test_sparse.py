import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses, targets
from kd_jax.losses import _numerics as numerics, sequences
from tests import references

ALL = np.ones(4, bool)
COUNT = 10_000


@functools.partial(jax.jit, static_argnums=1)
def compiled_top_k(teacher, k, temperature, where):
  return targets.top_k(teacher, k, temperature=temperature, where=where)


def top_k(teacher, k, temperature=1.0, where=ALL):
  return jax.device_get(compiled_top_k(teacher, k, temperature, where))


@jax.jit
def compiled_sample(teacher, key, temperature, proposal_temperature):
  return targets.importance_samples(
    teacher,
    key,
    COUNT,
    temperature=temperature,
    proposal_temperature=proposal_temperature,
  )


def sample(teacher, key, temperature=1.0, proposal_temperature=1.0):
  """One program: four examples, many draws."""
  return jax.device_get(
    compiled_sample(teacher, key, temperature, proposal_temperature)
  )


def logits(seed, scale=2.0, shape=(4, 6)):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_top_k(k, temperature):
  teacher = logits(0)
  kept = top_k(teacher, k, temperature=temperature)
  assert kept.indices.dtype == jnp.int32
  log_p = references.log_softmax(teacher, temperature)
  order = np.argsort(-log_p, -1)
  np.testing.assert_array_equal(kept.indices, order[:, :k])
  ranked = np.take_along_axis(log_p, order, -1)
  np.testing.assert_allclose(kept.log_probs, ranked[:, :k], rtol=1e-5)
  with np.errstate(divide="ignore"):
    tail = np.log(np.exp(ranked[:, k:]).sum(-1))
  np.testing.assert_allclose(kept.log_tail, tail, rtol=1e-5)


def test_a_tail_below_rounding():
  teacher = np.tile(np.float32([0.0, 0.1, -50, -51, -300, -300]), (4, 1))
  log_p = references.log_softmax(teacher)
  np.testing.assert_allclose(
    top_k(teacher, 2).log_tail,
    np.logaddexp(log_p[:, 2], log_p[:, 3]),
    rtol=1e-6,
  )


def test_top_k_gradients():
  teacher, probe = logits(0), np.random.default_rng(1).normal(size=(4, 3))

  def total(kept):
    return (probe[:, :2] * kept.log_probs).sum() + (
      probe[:, 2] * kept.log_tail
    ).sum()

  def reference(z):
    ranked = -np.sort(-references.log_softmax(z, 2.0), -1)
    tail = np.log(np.exp(ranked[:, 2:]).sum(-1))
    return probe[:, :2] * ranked[:, :2] + (probe[:, 2] * tail)[:, None] / 2

  gradient = jax.jit(
    jax.grad(lambda z: total(targets.top_k(z, 2, temperature=2.0)))
  )
  np.testing.assert_allclose(
    gradient(teacher), references.gradient(reference, teacher), atol=1e-5
  )

  @jax.jit
  @jax.grad
  def finite_part(z):
    kept = targets.top_k(z, 6)
    terms = jnp.concatenate([kept.log_probs, kept.log_tail[:, None]], -1)
    return jnp.where(jnp.isfinite(terms), terms, 0.0).sum()

  # With ties, without classes, without a tail.
  for z in (np.zeros((4, 6)), np.full((4, 6), -np.inf), logits(0, 1e4)):
    z = np.asarray(z, np.float32)
    assert np.all(np.isfinite(finite_part(z)))


def test_top_k_with_absent_classes():
  teacher = logits(0)
  teacher[:, [1, 4]] = -np.inf
  teacher[3, :] = -np.inf
  kept = top_k(teacher, 6)
  np.testing.assert_array_equal(kept.log_probs[:, 4:], -np.inf)
  np.testing.assert_array_equal(kept.log_tail, -np.inf)
  assert np.all(np.isfinite(kept.log_probs[:3, :4]))
  np.testing.assert_array_equal(kept.log_probs[3], -np.inf)
  # The tail has what there is.
  less = top_k(teacher, 2)
  np.testing.assert_allclose(
    np.exp(less.log_tail) + np.exp(less.log_probs).sum(-1),
    [1, 1, 1, 0],
    rtol=1e-6,
  )


def test_top_k_feeds_its_loss():
  student, teacher = logits(1), logits(0)

  @jax.jit
  def run(student, teacher):
    kept = {k: targets.top_k(teacher, k, temperature=2.0) for k in (2, 6)}
    some = [
      sequences.topk_kl(
        student, top.log_probs, indices=top.indices, temperature=2.0
      )
      for top in kept.values()
    ]
    return *some, losses.kl(student, teacher, temperature=2.0)

  two, six, full = jax.device_get(run(student, teacher))
  np.testing.assert_allclose(six, full, rtol=1e-4)
  assert np.all(two <= full) and np.all(two > 0)


def test_top_k_masks_vmap_and_dtypes():
  teacher = logits(0)
  plain = top_k(teacher, 2)
  rows = jax.jit(jax.vmap(lambda z: targets.top_k(z, 2)))(teacher)
  for row, batch in zip(rows, plain, strict=True):
    np.testing.assert_allclose(row, batch, rtol=1e-6)
  where = np.array([True, False, True, True])
  teacher[1] = np.nan
  masked = top_k(teacher, 2, where=where)
  for row, batch in zip(masked, plain, strict=True):
    np.testing.assert_allclose(row[where], batch[where], rtol=1e-6)
    assert np.all(np.isfinite(row))
  log_p = lambda z: targets.top_k(z, 2, where=where).log_probs.sum()
  gradient = jax.jit(jax.grad(log_p))(np.asarray(teacher, jnp.bfloat16))
  assert gradient.dtype == jnp.bfloat16
  gradient = np.asarray(gradient, np.float32)
  assert np.all(np.isfinite(gradient)) and not np.any(gradient[1])
  assert plain.log_probs.dtype == plain.log_tail.dtype == jnp.float32


@jax.jit
@jax.value_and_grad
def expected_loss(student, outcomes, log_probs, weights, chances, temperature):
  """The mean of the loss over outcomes of one draw, by enumeration."""
  one = lambda c, log_p, weight: sequences.sampled_kl(
    student,
    log_p[None],
    indices=c[None],
    weights=weight[None],
    temperature=temperature,
  )
  return jnp.dot(jax.vmap(one)(outcomes, log_probs, weights), chances)


@jax.jit
@jax.value_and_grad
def full_loss(student, teacher, temperature):
  return losses.kl(student, teacher, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("proposal", [1.0, 2.0, 0.7])
def test_the_estimate_is_unbiased(temperature, proposal):
  student, teacher = logits(1), logits(0, 1.0)
  drawn = sample(teacher, jax.random.key(0), temperature, proposal)
  outcomes, first = np.unique(drawn.indices[0], return_index=True)
  assert len(outcomes) == 6, "all classes have been drawn"
  r = np.exp(references.log_softmax(teacher[0], temperature * proposal))
  # The weight of a single draw is COUNT times as much.
  mean = expected_loss(
    student[0],
    outcomes,
    drawn.log_probs[0, first],
    COUNT * drawn.weights[0, first],
    r[outcomes].astype(np.float32),
    temperature,
  )
  want = full_loss(student[0], teacher[0], temperature)
  for got, exact in zip(mean, want, strict=True):
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


STEPS = np.arange(0.5, 1000.0, dtype=np.float32) / 1000


def draw_with(monkeypatch, log_r, coarse, fine):
  """The classes for given random numbers, in order."""
  numbers = iter([coarse, fine])
  monkeypatch.setattr(
    jax.random, "uniform", lambda key, shape: jnp.asarray(next(numbers))
  )
  draw = targets.sparse._draw
  return np.asarray(draw(jnp.asarray(log_r), jax.random.key(0), len(coarse)))


def test_the_draws_have_the_proposals_probabilities(monkeypatch):
  """By enumeration of the random numbers, a thousand equal steps."""
  log_r = references.log_softmax(logits(3)[0]).astype(np.float32)
  drawn = draw_with(monkeypatch, log_r, STEPS, np.zeros_like(STEPS))
  counts = np.bincount(drawn, minlength=6)
  np.testing.assert_allclose(counts, 1000 * np.exp(log_r), atol=1.01)


def test_rare_classes_are_drawn_as_often_as_they_should(monkeypatch):
  """Two classes far below the resolution of a float32 random number."""
  r = np.float32([3e-9, 1.0, 1e-8, 0.0, 0.0, 0.0])
  with np.errstate(divide="ignore"):
    log_r = np.maximum(np.log(r), numerics.LOG_ZERO)
  drawn = draw_with(monkeypatch, log_r, np.zeros_like(STEPS), STEPS)
  counts = np.bincount(drawn, minlength=6)
  share = np.array([3e-9, 2.0**-23 - 1.3e-8, 1e-8, 0, 0, 0]) / 2.0**-23
  np.testing.assert_allclose(counts, 1000 * share, atol=1.01)
  # The ends of the random numbers stay within the classes.
  most = np.full_like(STEPS, 1 - 2.0**-24)
  assert np.all(draw_with(monkeypatch, log_r, most, most) == 1)
  least = np.zeros_like(STEPS)
  assert np.all(draw_with(monkeypatch, log_r, least, least) == 0)


def test_the_draws_are_random_and_independent():
  teacher = np.tile(logits(0, 1.0)[:1], (4, 1))
  drawn = sample(teacher, jax.random.key(1))
  assert drawn.indices.dtype == jnp.int32
  p = np.exp(references.log_softmax(teacher[0]))
  for row in drawn.indices:
    counts = np.bincount(row, minlength=6)
    error = np.abs(counts - COUNT * p)
    assert np.all(error < 5 * np.sqrt(COUNT * p * (1 - p)))
  np.testing.assert_allclose(drawn.weights, 1 / COUNT, rtol=1e-5)
  # Two examples, and two draws after one another, do not know of each other.
  agree, (a, b, *_) = (p**2).sum(), drawn.indices
  for one, other in ((a, b), (a[:-1], a[1:])):
    assert abs(np.mean(one == other) - agree) < 5 * np.sqrt(agree / COUNT)
  again, other = (sample(teacher, jax.random.key(i)) for i in (1, 2))
  np.testing.assert_array_equal(again.indices, drawn.indices)
  assert np.any(other.indices != drawn.indices)


def test_absent_classes_are_not_drawn():
  teacher = logits(0)
  teacher[:, [0, 2, 5]] = -np.inf
  teacher[3] = -np.inf
  drawn = sample(teacher, jax.random.key(0), proposal_temperature=5.0)
  assert set(np.unique(drawn.indices[:3])) == {1, 3, 4}
  assert np.all(np.isfinite(drawn.log_probs[:3]))
  np.testing.assert_array_equal(drawn.weights[3], 0.0)
  np.testing.assert_array_equal(drawn.log_probs[3], -np.inf)


def test_samples_masks_gradients_and_dtypes():
  teacher = logits(0)
  teacher[1] = np.nan
  where = np.array([True, False, True, True])

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(z):
    drawn = targets.importance_samples(
      z, jax.random.key(0), 3, proposal_temperature=2.0, where=where
    )
    return (drawn.weights * drawn.log_probs).sum(), drawn

  half = np.asarray(teacher, jnp.bfloat16)
  gradient, drawn = jax.device_get(run(half))
  assert gradient.dtype == jnp.bfloat16
  gradient = np.asarray(gradient, np.float32)
  assert all(np.all(np.isfinite(field)) for field in drawn)
  assert np.all(np.isfinite(gradient)) and np.any(gradient[0])
  np.testing.assert_array_equal(gradient[1], 0.0)
  assert drawn.weights.dtype == drawn.log_probs.dtype == jnp.float32
  log_p = references.log_softmax(np.asarray(half[0], np.float32))
  np.testing.assert_allclose(
    drawn.log_probs[0], log_p[drawn.indices[0]], rtol=1e-5
  )
  for z in (logits(0, 1e4), np.zeros((4, 6)), np.full((4, 6), -np.inf)):
    gradient, drawn = jax.device_get(run(np.asarray(z, jnp.bfloat16)))
    assert np.all(np.isfinite(np.asarray(gradient, np.float32)) | (z < -1e9))
    assert np.all(np.isfinite(drawn.weights))


def test_samples_vmap_over_examples_and_keys():
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda z, key: targets.importance_samples(z, key, 20).indices
  rows = np.asarray(jax.jit(jax.vmap(draw))(np.zeros((4, 6), "f4"), keys))
  assert rows.shape == (4, 20)
  assert len({tuple(row) for row in rows}) == 4


def test_wrong_arguments():
  teacher, key = logits(0), jax.random.key(0)
  for k, error, text in (
    (0, ValueError, r"^k is 0; it should be from 1 to 6"),
    (7, ValueError, r"^k is 7; it should be from 1 to 6"),
    (2.0, TypeError, r"^k is 2.0; it should be a whole number, from 1 to 6"),
  ):
    with pytest.raises(error, match=text):
      targets.top_k(teacher, k)
  with pytest.raises(ValueError, match=r"^count is 0; it should be at least 1"):
    targets.importance_samples(teacher, key, 0)
  with pytest.raises(ValueError, match=r"^proposal_temperature is -1"):
    targets.importance_samples(teacher, key, 2, proposal_temperature=-1)
  for call in (
    lambda z, **kw: targets.top_k(z, 2, **kw),
    lambda z, **kw: targets.importance_samples(z, key, 2, **kw),
  ):
    with pytest.raises(TypeError, match="teacher_logits has dtype int"):
      call(teacher.astype(int))
    with pytest.raises(ValueError, match=r"^temperature is 0"):
      call(teacher, temperature=0)
    with pytest.raises(ValueError, match=r"where has shape \(6,\)"):
      call(teacher, where=np.ones(6, bool))
  assert np.all(np.isnan(top_k(teacher, 2, temperature=-1.0).log_probs))
  assert np.all(np.isnan(sample(teacher, key, temperature=-1.0).weights))
