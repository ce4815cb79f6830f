import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import calibration, losses, targets
from kd_jax.losses import mixtures
from tests import references

kl = jax.jit(losses.kl)
compiled_delta = jax.jit(targets.delta)


@jax.jit
def compiled_mixture(student, teacher, order, mixing, temperature):
  return targets.alpha_mixture(
    student, teacher, order=order, mixing=mixing, temperature=temperature
  )


def alpha_mixture(student, teacher, order, mixing, temperature=1.0):
  """One compiled program."""
  return np.asarray(
    compiled_mixture(student, teacher, order, mixing, temperature)
  )


def delta(tuned, base, start, strength=1.0, where=None):
  where = np.ones(4, bool) if where is None else where
  return np.asarray(
    compiled_delta(tuned, base, start, strength=strength, where=where)
  )


ORDERS = (-3.0, -1.0, 0.0, 0.9, 1.0, 1.1, 3.0)


def logits(seed, scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=(4, 5))).astype(np.float32)


def softmax(z, temperature=1.0):
  return np.exp(references.log_softmax(z, temperature))


@pytest.mark.parametrize("order", ORDERS)
def test_the_path_goes_from_student_to_teacher(order):
  student, teacher = logits(0), logits(1)
  for mixing, end in ((0.0, student), (1.0, teacher)):
    target = alpha_mixture(
      student, teacher, order=order, mixing=mixing, temperature=2.0
    )
    np.testing.assert_allclose(
      softmax(target, 2.0), softmax(end, 2.0), rtol=1e-5
    )
  between = [
    kl(alpha_mixture(student, teacher, order=order, mixing=m), teacher)
    for m in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
  ]
  assert np.all(np.diff(between, axis=0) < 0)


mixture_kl = jax.jit(mixtures.alpha_mixture_kl)


@pytest.mark.parametrize("order", ORDERS)
def test_kl_to_it_is_the_loss_of_the_method(order):
  student, teacher = logits(0), logits(1)
  target = alpha_mixture(student, teacher, order=order, mixing=0.3)
  np.testing.assert_allclose(
    kl(target, teacher),
    mixture_kl(student, teacher, order=order, mixing=0.3),
    rtol=1e-4,
  )


def test_the_geometric_mean_is_a_mean_of_logits():
  student, teacher = logits(0), logits(1)
  target = alpha_mixture(student, teacher, order=1.0, mixing=0.3)
  pair = np.stack([student, teacher])
  ensemble = jax.jit(targets.ensemble, static_argnames="space")
  weights = np.float32([0.7, 0.3])
  np.testing.assert_allclose(
    softmax(target),
    softmax(ensemble(pair, weights=weights, space="logit")),
    rtol=1e-5,
  )
  target = alpha_mixture(student, teacher, order=-1.0, mixing=0.3)
  np.testing.assert_allclose(
    softmax(target), softmax(ensemble(pair, weights=weights)), rtol=1e-5
  )


def test_orders_are_one_smooth_family():
  student, teacher = logits(0), logits(1)
  probe = np.random.default_rng(2).normal(size=(4, 5))

  @jax.jit
  @jax.value_and_grad
  def run(order):
    target = targets.alpha_mixture(student, teacher, order=order, mixing=0.3)
    return jnp.sum(probe * jax.nn.log_softmax(target))

  p, q = softmax(teacher), softmax(student)

  def reference(order):
    a = (1 - order) / 2
    r = (0.3 * p**a + 0.7 * q**a) ** (1 / a)
    return (probe * np.log(r / r.sum(-1, keepdims=True))).sum()

  step = 1e-3
  for order in (-4.0, 0.3, 0.95, 1.0, 1.0001, 2.5):
    value, slope = run(order)
    low, high = reference(order - step - 1e-9), reference(order + step)
    np.testing.assert_allclose(value, (low + high) / 2, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
      slope, (high - low) / (2 * step), rtol=2e-3, atol=2e-3
    )


def test_classes_that_one_side_rules_out():
  student, teacher = logits(0), logits(1)
  teacher[:, 1] = -np.inf
  keep = np.arange(5) != 1
  p = np.zeros((4, 5))
  p[:, keep] = softmax(teacher[:, keep])
  mixture = alpha_mixture(student, teacher, order=-1.0, mixing=0.3)
  np.testing.assert_allclose(
    softmax(mixture), 0.3 * p + 0.7 * softmax(student), rtol=1e-5
  )
  for order in (1.0, 3.0):
    target = alpha_mixture(student, teacher, order=order, mixing=0.3)
    assert np.all(np.isfinite(target))
    np.testing.assert_array_equal(softmax(target)[:, 1], 0.0)
    q, a = softmax(student), (1 - order) / 2
    with np.errstate(divide="ignore"):
      r = (0.3 * p**a + 0.7 * q**a) ** (1 / a) if a else p**0.3 * q**0.7
    np.testing.assert_allclose(
      softmax(target), r / r.sum(-1, keepdims=True), rtol=1e-5
    )
  probe = np.random.default_rng(2).normal(size=(4, 5))
  total = lambda s, t, o, m: jnp.sum(
    probe * targets.alpha_mixture(s, t, order=o, mixing=m)
  )
  gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))
  for order in ORDERS:
    for mixing in (0.0, 0.3, 1.0):
      for grad in gradients(student, teacher, order, mixing):
        assert np.all(np.isfinite(grad)), (order, mixing)


def test_delta_from_one_base_runs_through_the_tuned_model():
  tuned, base = logits(0), logits(1)
  for strength, end in ((0.0, base), (1.0, tuned)):
    target = delta(tuned, base, base, strength=strength)
    np.testing.assert_allclose(softmax(target), softmax(end), rtol=1e-5)
  beyond = delta(tuned, base, base, strength=3.0)
  np.testing.assert_allclose(
    softmax(beyond), softmax(base + 3 * (tuned - base)), rtol=1e-5
  )
  # From a uniform base, it is a temperature.
  flat = np.zeros((4, 5), np.float32)
  np.testing.assert_allclose(
    softmax(delta(tuned, flat, flat, strength=0.25)),
    softmax(tuned, 4.0),
    rtol=1e-5,
  )


def test_delta_is_a_parallelogram():
  """Without a change of the teacher none is asked of the student."""
  tuned, base, start = logits(0), logits(1), logits(2)
  np.testing.assert_allclose(
    softmax(delta(base, base, start, strength=5.0)), softmax(start), rtol=1e-5
  )
  forth = delta(tuned, base, start)
  np.testing.assert_allclose(
    softmax(delta(base, tuned, forth)), softmax(start), rtol=1e-5
  )


def test_delta_with_a_strength_for_each_example():
  tuned, base, start = logits(0), logits(1), logits(2)
  strength = np.float32([0.5, -1.0, 0.0, 2.0])
  target = delta(tuned, base, start, strength=strength)
  for i in range(4):
    row = delta(tuned, base, start, strength=strength[i])[i]
    np.testing.assert_allclose(target[i], row, rtol=1e-6, atol=1e-6)
  strength[1] = np.nan
  where = np.arange(4) != 1
  masked = delta(tuned, base, start, strength=strength, where=where)
  np.testing.assert_allclose(masked[where], target[where], rtol=1e-6)
  assert np.all(np.isfinite(masked))
  with pytest.raises(ValueError, match=r"strength has shape \(3,\)"):
    targets.delta(tuned, base, start, strength=strength[:3])
  with pytest.raises(TypeError, match="strength has dtype int"):
    targets.delta(tuned, base, start, strength=np.ones(4, int))


@pytest.mark.parametrize("lacking", range(3))
def test_delta_where_one_of_the_three_lacks_a_class(lacking):
  arrays = [logits(i) for i in range(3)]
  holes = [array.copy() for array in arrays]
  holes[lacking][:, 2] = -np.inf
  keep = np.arange(5) != 2
  target = delta(*holes)
  np.testing.assert_array_equal(target[:, 2], -np.inf)
  np.testing.assert_allclose(
    softmax(target[:, keep]),
    softmax((arrays[2] + arrays[0] - arrays[1])[:, keep]),
    rtol=1e-5,
  )


def test_calibration_comes_before_the_temperature_of_the_loss():
  student, teacher = logits(0), logits(1)
  target = targets.calibrated(teacher, temperature=3.0)
  np.testing.assert_allclose(target, teacher / 3.0, rtol=1e-6)
  np.testing.assert_allclose(
    kl(student, target, temperature=2.0),
    kl(student, teacher, temperature=2.0, teacher_temperature=6.0),
    rtol=1e-5,
  )


def test_a_fitted_teacher_is_as_sure_as_it_is_right():
  rng = np.random.default_rng(0)
  truth = rng.normal(size=(4000, 3))
  p = softmax(truth)
  labels = (rng.uniform(size=(4000, 1)) > p.cumsum(-1)).sum(-1)
  overconfident = (3 * truth).astype(np.float32)
  fitted = calibration.fit_temperature(overconfident, labels)
  target = targets.calibrated(overconfident, temperature=fitted)
  before, after = (
    calibration.ece(np.asarray(z), labels) for z in (overconfident, target)
  )
  assert before > 0.1 and after < 0.03
