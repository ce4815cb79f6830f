import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses, targets
from tests import references

permute = jax.jit(targets.permute_nonmax)
MANY = 3000  # one shape for one program


@functools.partial(jax.jit, static_argnames="axis")
def compiled_weights(teacher, temperature, where, axis):
  return targets.confidence_weights(
    teacher, temperature=temperature, where=where, axis=axis
  )


def weigh(teacher, temperature=1.0, where=None, axis=-1):
  n = teacher.shape[1 + axis]
  where = np.ones(n, bool) if where is None else where
  return np.asarray(compiled_weights(teacher, temperature, where, axis))


def logits(seed, scale=2.0, shape=(4, 5)):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


def test_values_stay_and_so_does_the_largest():
  teacher = logits(0, shape=(MANY, 5))
  target = np.asarray(permute(teacher, jax.random.key(0)))
  np.testing.assert_array_equal(np.sort(target, -1), np.sort(teacher, -1))
  np.testing.assert_array_equal(target.argmax(-1), teacher.argmax(-1))
  # One in four of the others stays by chance.
  assert abs((target == teacher).mean() - (1 + 1) / 5) < 0.02


def test_all_orders_are_equally_likely_and_absent_classes_stay():
  row = np.float32([1.0, 9.0, 2.0, -np.inf, 3.0])
  target = np.asarray(permute(np.tile(row, (MANY, 1)), jax.random.key(3)))
  np.testing.assert_array_equal(target[:, [1, 3]], [[9.0, -np.inf]] * MANY)
  orders = [tuple(row) for row in target[:, [0, 2, 4]].astype(int)]
  for order in itertools.permutations((1, 2, 3)):
    assert abs(orders.count(order) - MANY / 6) < 5 * np.sqrt(MANY * 5 / 36)
  # Examples are independent: two in a row have the same order by chance.
  same = np.mean([a == b for a, b in itertools.pairwise(orders)])
  assert abs(same - 1 / 6) < 5 * np.sqrt(5 / 36 / MANY)


def test_few_classes():
  teacher = np.full((MANY, 5), -np.inf, np.float32)
  teacher[1, 2], teacher[2, :2] = 3.0, (1.0, 2.0)
  target = permute(teacher, jax.random.key(0))
  np.testing.assert_array_equal(target, teacher)


def test_permutation_masks_and_gradients():
  teacher = logits(0)
  probe = np.random.default_rng(0).normal(size=teacher.shape)
  where = np.array([True, True, False, True])
  broken = teacher.copy()
  broken[2] = np.nan

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(z):
    target = targets.permute_nonmax(z, jax.random.key(1), where=where)
    masked = jnp.where(where[:, None], probe * target, 0.0)
    return masked.sum(), target

  grads, target = jax.device_get(run(broken))
  np.testing.assert_array_equal(grads[2], 0.0)
  for z, p, t, grad in zip(
    *(x[where] for x in (teacher, probe, target, grads)),
    strict=True,
  ):
    source = [list(z).index(x) for x in t]
    np.testing.assert_allclose(grad[np.array(source)], p, rtol=1e-6)


def test_permutation_axis_vmap_and_bfloat16():
  teacher = jnp.asarray(logits(0, shape=(2, 5, 4)), jnp.bfloat16)
  keys = jax.random.split(jax.random.key(0), 2)
  run = functools.partial(targets.permute_nonmax, axis=0)
  target = jax.device_get(jax.jit(jax.vmap(run))(teacher, keys))
  assert target.dtype == jnp.float32
  exact = np.asarray(teacher, np.float32)
  np.testing.assert_array_equal(np.sort(target, 1), np.sort(exact, 1))
  np.testing.assert_array_equal(target.argmax(1), exact.argmax(1))
  assert np.any(target != exact)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_weights_are_the_papers(temperature):
  teacher = logits(0)
  best = np.exp(references.log_softmax(teacher, temperature)).max(-1)
  weights = weigh(teacher, temperature=temperature)
  np.testing.assert_allclose(weights, 4 * best / best.sum(), rtol=1e-5)
  student, labels = logits(1), np.array([0, 1, 2, 3])
  hard = np.asarray(jax.jit(losses.cross_entropy)(student, labels))
  np.testing.assert_allclose(
    np.mean(weights * hard), (best / best.sum() * hard).sum(), rtol=1e-5
  )


def test_equally_sure_means_weight_one():
  same = np.eye(5, dtype=np.float32)[:4]
  np.testing.assert_allclose(weigh(same), 1.0, rtol=1e-6)
  np.testing.assert_allclose(weigh(logits(0)[:1]), 1.0, rtol=1e-6)


def test_weights_with_a_mask_are_those_of_the_others():
  teacher = logits(0)
  where = np.array([True, False, True, True])
  alone = weigh(teacher[where])
  teacher[1] = np.nan
  weights = weigh(teacher, where=where)
  np.testing.assert_allclose(weights[where], alone, rtol=1e-6)
  assert weights[1] == 0.0
  nobody = weigh(teacher, where=np.zeros(4, bool))
  np.testing.assert_array_equal(nobody, 0.0)
  total = lambda z: (targets.confidence_weights(z, where=where) ** 2).sum()
  gradient = np.asarray(jax.jit(jax.grad(total))(teacher))
  np.testing.assert_array_equal(gradient[1], 0.0)
  assert np.all(np.isfinite(gradient)) and np.any(gradient)


def test_weights_see_the_whole_batch():
  teacher = logits(0, shape=(8, 5))
  where = np.arange(8) != 3

  def local(z, where):
    return targets.confidence_weights(z, where=where, axis_name="devices")

  split = lambda x: x.reshape(8, 1, *x.shape[1:])
  weights = jax.pmap(local, axis_name="devices")(split(teacher), split(where))
  np.testing.assert_allclose(
    weights.ravel(), weigh(teacher, where=where), rtol=1e-6
  )


def test_weights_gradient_axis_and_harsh_logits():
  teacher, probe = logits(0), np.array([1.0, -2.0, 0.5, 3.0])

  def reference(z):
    best = np.exp(references.log_softmax(z)).max(-1)
    return (probe * 4 * best / best.sum()).sum()

  total = lambda z: jnp.sum(probe * targets.confidence_weights(z))
  gradient = jax.jit(jax.grad(total))
  np.testing.assert_allclose(
    gradient(teacher), references.gradient(reference, teacher), atol=2e-6
  )
  np.testing.assert_allclose(
    weigh(teacher.T, axis=0), weigh(teacher), rtol=1e-6
  )
  for z in (logits(0, 1e4), np.zeros((4, 5)), np.full((4, 5), -np.inf)):
    z = np.asarray(z, np.float32)
    assert np.all(np.isfinite(gradient(z))) and np.all(np.isfinite(weigh(z)))
  teacher[1, 2] = np.nan
  assert np.all(np.isnan(weigh(teacher)))
  assert np.all(np.isnan(weigh(logits(0), temperature=-1.0)))


def test_wrong_arguments():
  for call in (
    lambda z, **kw: targets.permute_nonmax(z, jax.random.key(0), **kw),
    targets.confidence_weights,
  ):
    with pytest.raises(TypeError, match="teacher_logits has dtype int"):
      call(logits(0).astype(int))
    with pytest.raises(ValueError, match="axis is 2"):
      call(logits(0), axis=2)
    with pytest.raises(ValueError, match=r"where has shape \(5,\)"):
      call(logits(0), where=np.ones(5, bool))
  with pytest.raises(ValueError, match=r"^temperature is 0"):
    targets.confidence_weights(logits(0), temperature=0)
