import functools

from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses, targets
from kd_jax.losses import logits as logit_losses, ranking
from tests import references

LABELS = np.array([3, 0, 0, 4], np.int32)
kl = jax.jit(losses.kl)
cross_entropy = jax.jit(losses.cross_entropy)
compiled_sort = jax.jit(targets.sort_label_first)


def sort_label_first(teacher, labels):
  return np.asarray(compiled_sort(teacher, labels))


@jax.jit
def compiled_mix(teacher, labels, label_weight, temperature):
  return targets.mix_labels(
    teacher, labels, label_weight=label_weight, temperature=temperature
  )


def mix_labels(teacher, labels, label_weight, temperature=1.0):
  return np.asarray(compiled_mix(teacher, labels, label_weight, temperature))


@jax.jit
def compiled_virtual(labels, correct_probability, temperature):
  return targets.virtual(
    labels,
    5,
    correct_probability=correct_probability,
    temperature=temperature,
  )


def virtual(labels, correct_probability=0.99, temperature=1.0):
  return np.asarray(compiled_virtual(labels, correct_probability, temperature))


def logits(seed, scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=(4, 5))).astype(np.float32)


def softmax(z, temperature=1.0):
  return np.exp(references.log_softmax(z, temperature))


def test_mixing_goes_from_the_teacher_to_the_labels():
  student, teacher = logits(0), logits(1)
  start = mix_labels(teacher, LABELS, label_weight=0.0, temperature=3.0)
  np.testing.assert_allclose(
    kl(student, start, temperature=3.0),
    kl(student, teacher, temperature=3.0),
    rtol=1e-5,
  )
  end = mix_labels(teacher, LABELS, label_weight=1.0)
  assert np.all(end[np.arange(4), LABELS] > -1e-6)
  np.testing.assert_allclose(
    kl(student, end, temperature=1.0),
    cross_entropy(student, LABELS),
    rtol=1e-6,
  )


def test_the_loss_is_the_weighted_sum_of_soft_and_hard_loss():
  """In its gradient, softmax minus target."""
  student, teacher = logits(0), logits(1)
  target = mix_labels(teacher, LABELS, 0.3)
  hard = np.eye(5)[LABELS]
  np.testing.assert_allclose(
    softmax(student) - softmax(target),
    0.7 * (softmax(student) - softmax(teacher))
    + 0.3 * (softmax(student) - hard),
    atol=1e-6,
  )


def test_a_teacher_without_opinion_is_label_smoothing():
  student = logits(0)
  target = mix_labels(np.zeros((4, 5), np.float32), LABELS, label_weight=0.9)
  p = softmax(target)
  entropy = -(p * np.log(p)).sum(-1)
  np.testing.assert_allclose(
    kl(student, target, temperature=1.0) + entropy,
    cross_entropy(student, LABELS, smoothing=0.1),
    rtol=1e-5,
  )


def test_one_hot_labels_are_labels():
  teacher = logits(1)
  one_hot = np.eye(5, dtype=np.float32)[LABELS]
  np.testing.assert_allclose(
    mix_labels(teacher, one_hot, label_weight=0.4),
    mix_labels(teacher, LABELS, label_weight=0.4),
    rtol=1e-6,
  )


def test_a_label_beside_a_teacher_that_rules_it_out():
  teacher = np.zeros((3, 3), np.float32)
  teacher[:, 1] = [-1e4, -np.inf, -200.0]
  labels = np.full(3, 1)
  for weight in (0.25, 1e-30):
    target = mix_labels(teacher, labels, label_weight=weight)
    log_p = references.log_softmax(target)
    np.testing.assert_allclose(log_p[:, 1], np.log(weight), rtol=1e-6)
  # Without weight, the class is what it was.
  target = np.asarray(mix_labels(teacher, labels, label_weight=0.0))
  np.testing.assert_allclose(
    target[:, 1] - target[:, 0], [-1e4, -np.inf, -200.0], rtol=1e-6
  )


def test_gradient_by_the_label_weight():
  student, teacher = logits(0), logits(1)
  teacher[0, 2] = -1e4

  @jax.jit
  @jax.grad
  def gradient(w):
    target = targets.mix_labels(teacher, LABELS, label_weight=w)
    return losses.kl(student, target).sum()

  assert np.isfinite(gradient(1.0))
  p, y = softmax(teacher), np.eye(5)[LABELS]
  for weight in (0.0, 1e-6, 0.5):
    # KL(r || q) by w: sum_c (y - p) (log r - log q), where r > 0.
    r = (1 - weight) * p + weight * y
    gap = np.log(np.maximum(r, 1e-300)) - references.log_softmax(student)
    np.testing.assert_allclose(
      gradient(weight), ((y - p) * gap)[r > 0].sum(), rtol=1e-4
    )


def test_gradient_by_labels_that_are_distributions():
  teacher, soft = logits(1), softmax(logits(2)).astype(np.float32)
  soft[0, 0] = 0.0
  probe = np.random.default_rng(4).normal(size=(4, 5))

  @jax.jit
  @jax.grad
  def gradient(y):
    target = targets.mix_labels(teacher, y, label_weight=0.3)
    return jnp.sum(probe * target)

  numeric = references.gradient(
    lambda y: probe * np.log(0.7 * softmax(teacher) + 0.3 * y), soft
  )
  np.testing.assert_allclose(gradient(soft), numeric, rtol=1e-4)


def test_float_class_numbers_are_refused():
  with pytest.raises(TypeError, match="class numbers should be integers"):
    targets.mix_labels(logits(1), LABELS.astype(np.float32), label_weight=0.1)
  with pytest.raises(ValueError, match=r"labels has shape \(4, 3\)"):
    targets.mix_labels(logits(1), np.ones((4, 3), np.float32), label_weight=0.1)


def test_sorting_by_hand():
  teacher = np.array([[5.0, 1.0, 4.0, 2.0, 3.0]] * 5, np.float32)
  want = [
    [5.0, 1.0, 4.0, 2.0, 3.0],
    [4.0, 5.0, 3.0, 1.0, 2.0],
    [4.0, 1.0, 5.0, 2.0, 3.0],
    [4.0, 1.0, 3.0, 5.0, 2.0],
    [4.0, 1.0, 3.0, 2.0, 5.0],
  ]
  np.testing.assert_array_equal(sort_label_first(teacher, np.arange(5)), want)


def test_sorting_is_that_of_the_loss():
  student, teacher = logits(0), logits(1)
  np.testing.assert_allclose(
    kl(student, sort_label_first(teacher, LABELS), temperature=2.0),
    jax.jit(ranking.sorted_kl)(student, teacher, LABELS, temperature=2.0),
    rtol=1e-6,
  )


@given(
  teacher=hnp.arrays(
    np.float32, (4, 5), elements=st.integers(-3, 3).map(float)
  ),
  labels=hnp.arrays(np.int32, 4, elements=st.integers(0, 4)),
)
def test_sorting_keeps_values_and_the_order_of_the_others(teacher, labels):
  target = np.asarray(sort_label_first(teacher, labels))
  for z, y, out in zip(teacher, labels, target, strict=True):
    np.testing.assert_array_equal(np.sort(z), np.sort(out))
    assert out[y] == z.max()
    others = np.arange(5) != y
    # Equal logits are ranked by the number of the class.
    before = np.argsort(-z[others], kind="stable")
    assert np.all(np.diff(out[others][before]) <= 0)
    if z[y] == z.max():
      np.testing.assert_array_equal(out, z)


def test_virtual_teacher():
  target = virtual(LABELS, correct_probability=0.9, temperature=4.0)
  want = np.full((4, 5), 0.1 / 4)
  want[np.arange(4), LABELS] = 0.9
  np.testing.assert_allclose(softmax(target, 4.0), want, rtol=1e-6)


def test_virtual_teacher_is_that_of_the_loss():
  student = logits(0)
  target = virtual(LABELS, correct_probability=0.95)
  np.testing.assert_allclose(
    kl(student, target, temperature=20.0),
    jax.jit(logit_losses.virtual_teacher, static_argnames="form")(
      student,
      LABELS,
      correct_probability=0.95,
      form="paper",
      temperature=20.0,
      teacher_temperature=20.0,
    ),
    rtol=1e-5,
  )


def test_virtual_teacher_at_its_ends_is_finite():
  sure = virtual(LABELS, correct_probability=1.0)
  np.testing.assert_allclose(
    kl(logits(0), sure, temperature=1.0),
    cross_entropy(logits(0), LABELS),
    rtol=1e-6,
  )
  never = virtual(LABELS, correct_probability=0.0)
  assert np.all(np.isfinite(never))
  np.testing.assert_array_equal(softmax(never)[np.arange(4), LABELS], 0.0)
  loss = lambda a: losses.kl(
    logits(0), targets.virtual(LABELS, 5, correct_probability=a)
  ).sum()
  gradient = jax.jit(jax.grad(loss))
  assert all(np.isfinite(gradient(a)) for a in (0.0, 0.5, 1.0))


def test_virtual_teacher_with_wrong_arguments():
  bad = np.array([3, -1, 0, 4])
  with pytest.raises(
    ValueError, match=r"^labels\[1\] is -1; it should be from"
  ):
    targets.virtual(bad, 5)
  where = bad >= 0
  target = np.asarray(targets.virtual(bad, 5, where=where))
  np.testing.assert_allclose(
    target[where], virtual(LABELS)[where], rtol=1e-6, atol=1e-6
  )
  assert np.all(np.isfinite(target))
  np.testing.assert_array_equal(np.isnan(virtual(bad)).all(-1), ~where)
  make = functools.partial(targets.virtual, LABELS)
  with pytest.raises(ValueError, match=r"^classes is 1; it should be at least"):
    make(1)
  with pytest.raises(TypeError, match=r"^classes is 2.5; it should be a whole"):
    make(2.5)
  with pytest.raises(ValueError, match=r"^correct_probability is 1.1"):
    make(5, correct_probability=1.1)
  with pytest.raises(ValueError, match=r"^temperature is 0; it should be"):
    make(5, temperature=0)
  with pytest.raises(TypeError, match="labels has dtype float32"):
    targets.virtual(LABELS.astype(np.float32), 5)
  with pytest.raises(ValueError, match=r"where has shape \(3,\)"):
    make(5, where=np.ones(3, bool))
  assert np.all(np.isnan(virtual(LABELS, correct_probability=1.1)))
