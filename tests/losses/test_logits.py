import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.losses import logits as on_logits
from tests import references


def logits(seed, shape=(4, 5), scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


@functools.cache
def with_grads(loss, arguments):
  """(values, gradients by the first `arguments` inputs) as one program."""

  @jax.jit
  def run(*inputs, **options):
    def total(*inputs):
      values = loss(*inputs, **options)
      return values.sum(), values

    grads, values = jax.grad(total, tuple(range(arguments)), has_aux=True)(
      *inputs
    )
    return values, grads

  return run


cross_entropy = with_grads(losses.cross_entropy, 1)
cross_entropy_soft = with_grads(losses.cross_entropy, 2)


# logit_mse


def test_logit_mse_by_hand():
  student = np.float32([[1, 2, 3], [0, 0, 0]])
  teacher = np.float32([[1, 4, 0], [0, 0, 0]])
  np.testing.assert_array_equal(losses.logit_mse(student, teacher), [6.5, 0])
  np.testing.assert_allclose(
    losses.logit_mse(student, teacher, form="mean"), [13 / 3, 0], rtol=1e-6
  )


@pytest.mark.parametrize("form", ["paper", "mean"])
def test_logit_mse_gradients(form):
  student, teacher = logits(0), logits(1)
  run = with_grads(functools.partial(losses.logit_mse, form=form), 2)
  values, (to_student, to_teacher) = run(student, teacher)
  gap = student.astype(np.float64) - teacher
  scale = 1.0 if form == "paper" else 2 / 5
  np.testing.assert_allclose(values, scale / 2 * (gap**2).sum(-1), rtol=1e-6)
  np.testing.assert_allclose(to_student, scale * gap, rtol=1e-6)
  np.testing.assert_allclose(to_teacher, -scale * gap, rtol=1e-6)


@pytest.mark.parametrize("form", ["paper", "mean"])
def test_logit_mse_absent_classes(form):
  student, teacher = logits(0), logits(1)
  keep = np.array([1, 1, 0, 1, 0], bool)
  values = losses.logit_mse(
    np.where(keep, student, -np.inf),
    np.where(keep, teacher, -np.inf),
    form=form,
  )
  gap = (student - teacher)[:, keep].astype(np.float64)
  expected = (gap**2).sum(-1) / (2 if form == "paper" else 3)
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  one_side = losses.logit_mse(np.where(keep, student, -np.inf), teacher)
  assert np.all(np.isfinite(one_side)) and np.all(one_side > 1e9)


def test_logit_mse_axis():
  student, teacher = logits(0, (5, 4)), logits(1, (5, 4))
  np.testing.assert_allclose(
    losses.logit_mse(student, teacher, axis=0),
    losses.logit_mse(student.T, teacher.T),
    rtol=1e-6,
  )


def test_logit_mse_form():
  with pytest.raises(ValueError, match=r"form is 'half'.*paper.*mean"):
    losses.logit_mse(logits(0), logits(1), form="half")


# cross_entropy


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_integer_labels(dtype, smoothing):
  student, labels = logits(0), np.array([0, 4, 2, 2], dtype)
  values = losses.cross_entropy(student, labels, smoothing=smoothing)
  targets = np.eye(5)[labels.astype(int)]
  expected = references.cross_entropy(student, targets, smoothing)
  np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients(smoothing):
  student, soft = logits(0), np.exp(references.log_softmax(logits(1)))
  soft = soft.astype(np.float32)
  labels = np.array([0, 4, 2, 2])
  q = np.exp(references.log_softmax(student))
  smooth = lambda y: (1 - smoothing) * y + smoothing / 5
  _, (grad,) = cross_entropy(student, labels, smoothing=smoothing)
  np.testing.assert_allclose(grad, q - smooth(np.eye(5)[labels]), atol=1e-6)
  values, grads = cross_entropy_soft(student, soft, smoothing=smoothing)
  np.testing.assert_allclose(
    values, references.cross_entropy(student, soft, smoothing), rtol=1e-6
  )
  np.testing.assert_allclose(grads[0], q - smooth(soft), atol=1e-6)
  np.testing.assert_allclose(grads[1], -(1 - smoothing) * np.log(q), rtol=1e-5)


def test_one_hot_distribution_is_the_label():
  student, labels = logits(0), np.array([1, 0, 3, 4])
  for dtype in (jnp.float32, jnp.bfloat16):
    np.testing.assert_allclose(
      losses.cross_entropy(student, jnp.eye(5, dtype=dtype)[labels]),
      losses.cross_entropy(student, labels),
      rtol=1e-6,
    )


def test_axis():
  student, labels = logits(0, (2, 5, 3)), np.array([[0, 4, 2], [1, 1, 3]])
  expected = losses.cross_entropy(np.moveaxis(student, 1, -1), labels)
  values = losses.cross_entropy(student, labels, axis=1)
  assert values.shape == (2, 3)
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  soft = np.moveaxis(np.eye(5, dtype=np.float32)[labels], -1, 1)
  values = losses.cross_entropy(student, soft, axis=1, smoothing=0.0)
  np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_saturated_logits():
  student = np.zeros((4, 5), np.float32)
  student[:, :2] = [1e4, -1e4]
  values, (grad,) = cross_entropy(student, np.array([0, 1, 2, 0]))
  np.testing.assert_array_equal(values, [0, 2e4, 1e4, 0])
  np.testing.assert_array_equal(grad[1], [1, -1, 0, 0, 0])


def test_absent_classes():
  student, labels = logits(0), np.array([0, 1, 3, 3])
  keep = np.array([1, 1, 0, 1, 0], bool)
  targets = np.eye(5)[labels][:, keep]
  values, (grad,) = cross_entropy(
    np.where(keep, student, -np.inf), labels, smoothing=0.3
  )
  np.testing.assert_allclose(
    values, references.cross_entropy(student[:, keep], targets, 0.3), rtol=1e-6
  )
  q = np.exp(references.log_softmax(student[:, keep]))
  np.testing.assert_array_equal(grad[:, ~keep], 0.0)
  np.testing.assert_allclose(grad[:, keep], q - 0.7 * targets - 0.1, atol=1e-6)
  # Distributions with nothing there, then a label there.
  soft = np.eye(5, dtype=np.float32)[labels]
  np.testing.assert_allclose(
    losses.cross_entropy(np.where(keep, student, -np.inf), soft),
    references.cross_entropy(student[:, keep], targets),
    rtol=1e-6,
  )
  values, (grad,) = cross_entropy(
    np.where(keep, student, -np.inf), np.full(4, 2), smoothing=0.0
  )
  np.testing.assert_allclose(values, 1e5)
  assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("bad", [5, -1, -100, 2**32 + 1])
def test_a_label_that_is_no_class(bad):
  student, labels = logits(0), np.array([0, 1, 2, bad])
  for known in (labels, jnp.asarray(np.clip(labels, -100, 5))):
    with pytest.raises(ValueError, match=r"labels\[3\] is .*0 to 4.*5 classes"):
      losses.cross_entropy(student, known)
  if abs(bad) < 2**31:
    values, (grad,) = cross_entropy(student, labels)
    assert np.all(np.isfinite(values[:3])) and np.isnan(values[3])
    # The gradient is poisoned as well, and only there.
    assert np.all(np.isfinite(grad[:3])) and np.all(np.isnan(grad[3]))


def test_a_single_example():
  student = logits(0, (5,))
  expected = references.cross_entropy(student, np.eye(5)[3])
  np.testing.assert_allclose(losses.cross_entropy(student, 3), expected, 1e-6)
  with pytest.raises(ValueError, match=r"^labels is 5; it should be from 0 to"):
    losses.cross_entropy(student, 5)


def test_a_label_that_is_no_class_where_masked():
  student, labels = logits(0), np.array([0, -100, 2, 99])
  where = np.array([True, False, True, False])
  expected = references.cross_entropy(student, np.eye(5)[[0, 0, 2, 0]])
  expected = np.where(where, expected, 0)
  eager = losses.cross_entropy(student, labels, where=where)
  traced, (grad,) = cross_entropy(student, labels, where=where)
  for values in (eager, traced):
    np.testing.assert_allclose(values, expected, rtol=1e-6)
  np.testing.assert_array_equal(grad[~where], 0.0)
  # Labels known, mask traced: nothing can be said while tracing.
  masked_later = jax.jit(
    lambda where: losses.cross_entropy(student, labels, where=where)
  )
  np.testing.assert_allclose(masked_later(where), expected, rtol=1e-6)
  assert np.isnan(masked_later(~where)).tolist() == [False, True, False, True]
  with pytest.raises(ValueError, match=r"labels\[1\] is -100"):
    losses.cross_entropy(student, labels, where=~where)


@pytest.mark.parametrize(
  ("labels", "error", "message"),
  [
    (np.zeros(4, np.float32), TypeError, "class numbers should be integers"),
    (np.zeros(4, bool), TypeError, "labels has dtype bool"),
    (np.zeros((4, 1), int), ValueError, r"\(4, 1\).*\(4, 5\)"),
    (np.zeros((4, 5), int), ValueError, r"should have shape \(4,\)"),
    (np.zeros(1, int), ValueError, r"labels has shape \(1,\)"),
    (np.zeros((4, 1), np.float32), ValueError, r"labels has shape \(4, 1\)"),
    (np.zeros((1, 4, 5), np.float32), ValueError, r"\(1, 4, 5\)"),
  ],
)
def test_labels_of_the_wrong_kind(labels, error, message):
  with pytest.raises(error, match=message):
    losses.cross_entropy(logits(0), labels)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, np.nan])
def test_smoothing_out_of_range(smoothing):
  student, labels = logits(0), np.array([0, 1, 2, 3])
  with pytest.raises(ValueError, match=r"smoothing is .*from 0 to 1"):
    losses.cross_entropy(student, labels, smoothing=smoothing)
  values, _ = cross_entropy(student, labels, smoothing=smoothing)
  assert np.all(np.isnan(values))


# virtual_teacher

LABELS = np.array([0, 4, 2, 2])
virtual_teacher = {
  form: with_grads(functools.partial(on_logits.virtual_teacher, form=form), 1)
  for form in ("released", "paper")
}
both_forms = pytest.mark.parametrize("form", ["released", "paper"])


def virtual_reference(student, labels, form, a, temperature, softness):
  """One example at a time; `softness` is the virtual teacher's temperature."""
  result = []
  for z, y in zip(student, labels, strict=True):
    classes = len(z)
    v = np.full(classes, (1 - a) / (classes - 1))
    v[y] = a
    if form == "paper":
      p = v ** (1 / softness) / (v ** (1 / softness)).sum()
    else:
      p = np.exp(v / softness) / np.exp(v / softness).sum()
    log_q = references.log_softmax(z, temperature)
    loss = temperature**2 * (p * (np.log(p) - log_q)).sum()
    result.append(loss / classes if form == "released" else loss)
  return np.array(result)


@both_forms
@pytest.mark.parametrize(
  ("a", "temperature", "softness"),
  [(0.99, 1.0, 20.0), (0.9, 20.0, 20.0), (0.2, 0.5, 0.7)],
)
def test_virtual_teacher(form, a, temperature, softness):
  student = logits(0)
  reference = lambda z: virtual_reference(
    z, LABELS, form, a, temperature, softness
  )
  values, (grad,) = virtual_teacher[form](
    student,
    LABELS,
    correct_probability=a,
    temperature=temperature,
    teacher_temperature=softness,
  )
  np.testing.assert_allclose(values, reference(student), rtol=1e-5)
  expected = references.gradient(reference, student)
  np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_virtual_teacher_defaults():
  student = jnp.asarray(logits(0), jnp.bfloat16)
  values = jax.jit(on_logits.virtual_teacher)(student, LABELS)
  expected = virtual_reference(
    np.float64(student), LABELS, "released", 0.99, 1.0, 20.0
  )
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_virtual_teacher_unsoftened_is_label_smoothing():
  """To the virtual teacher's entropy, a constant."""
  student, a = logits(0), 0.9
  smoothing = (1 - a) * 5 / 4
  values, (grad,) = virtual_teacher["paper"](
    student,
    LABELS,
    correct_probability=a,
    temperature=1.0,
    teacher_temperature=1.0,
  )
  expected, (right,) = cross_entropy(student, LABELS, smoothing=smoothing)
  entropy = -a * np.log(a) - (1 - a) * np.log((1 - a) / 4)
  np.testing.assert_allclose(values, expected - entropy, rtol=1e-5)
  np.testing.assert_allclose(grad, right, atol=1e-6)


@both_forms
def test_virtual_teacher_is_zero_where_the_student_agrees(form):
  a, softness = 0.7, 3.0
  v = np.where(np.arange(5) == LABELS[:, None], a, (1 - a) / 4)
  student = np.float32(v if form == "released" else np.log(v))
  values, (grad,) = virtual_teacher[form](
    student,
    LABELS,
    correct_probability=a,
    temperature=softness,
    teacher_temperature=softness,
  )
  np.testing.assert_allclose(values, 0.0, atol=1e-9)
  np.testing.assert_allclose(grad, 0.0, atol=1e-6)


@both_forms
def test_virtual_teacher_absent_classes(form):
  student = logits(0)
  keep = np.array([1, 0, 1, 0, 1], bool)
  options = {
    "correct_probability": 0.9,
    "temperature": 2.0,
    "teacher_temperature": 2.0,
  }
  values, (grad,) = virtual_teacher[form](
    np.where(keep, student, -np.inf), LABELS, **options
  )
  expected = virtual_reference(
    student[:, keep], np.array([0, 2, 1, 1]), form, 0.9, 2.0, 2.0
  )
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  np.testing.assert_array_equal(grad[:, ~keep], 0.0)
  # The label itself: large, not infinite. The only class: nothing to learn.
  student[:3] = np.where(keep, student, -np.inf)[:3]
  student[3] = np.where(np.arange(5) == 2, 1.0, -np.inf)
  values, (grad,) = virtual_teacher[form](
    student, np.array([1, 1, 1, 2]), **options
  )
  assert np.all(np.asarray(values)[:3] > 1e4) and values[3] == 0.0
  assert np.all(np.isfinite(grad)) and np.all(np.isfinite(values))


@both_forms
@pytest.mark.parametrize("scale", [30.0, 5000.0, 0.0])
def test_virtual_teacher_harsh_students(form, scale):
  student = logits(0, scale=scale)
  values, (grad,) = virtual_teacher[form](
    student,
    LABELS,
    correct_probability=0.99,
    temperature=1.0,
    teacher_temperature=20.0,
  )
  expected = virtual_reference(student, LABELS, form, 0.99, 1.0, 20.0)
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  assert np.all(np.isfinite(grad))


def test_virtual_teacher_arguments():
  loss, student = on_logits.virtual_teacher, logits(0)
  with pytest.raises(ValueError, match=r"form is 'mean'.*released.*paper"):
    loss(student, LABELS, form="mean")
  with pytest.raises(ValueError, match="correct_probability is 1.1"):
    loss(student, LABELS, correct_probability=1.1)
  with pytest.raises(ValueError, match=r"correct_probability is 1\.0.*log 0"):
    loss(student, LABELS, correct_probability=1.0, form="paper")
  with pytest.raises(ValueError, match="teacher_temperature is 0"):
    loss(student, LABELS, teacher_temperature=0)
  with pytest.raises(ValueError, match=r"labels\[1\] is 5"):
    loss(student, np.array([0, 5, 2, 2]))
  with pytest.raises(TypeError, match="labels has dtype float32"):
    loss(student, LABELS.astype(np.float32))
  for form, run in virtual_teacher.items():
    values, _ = run(
      student,
      np.array([0, 5, 2, -1]),
      correct_probability=0.9,
      temperature=1.0,
      teacher_temperature=20.0,
    )
    assert np.isnan(values).tolist() == [False, True, False, True], form


# What all losses on logits share


@pytest.mark.parametrize(
  "call",
  [
    lambda z, **options: losses.kl(z, z, **options),
    lambda z, **options: losses.logit_mse(z, z, **options),
    lambda z, **options: losses.cross_entropy(
      z, np.zeros(z.shape[1:], int), **options
    ),
  ],
)
def test_the_class_axis_must_exist(call):
  with pytest.raises(ValueError, match=r"axis is 2, but student_logits"):
    call(logits(0), axis=2)
  with pytest.raises(ValueError, match="axis is -1, but student_logits"):
    call(np.float32(1.0))
  with pytest.raises(ValueError, match="at least one class"):
    call(np.zeros((0, 4), np.float32), axis=0)
