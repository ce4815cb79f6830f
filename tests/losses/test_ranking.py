import functools
import itertools

from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses import divergences, logits as on_logits, ranking
from tests import references

LABELS = np.array([0, 4, 2, 2])


def logits(seed, shape=(4, 5), scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


@functools.cache
def program(loss):
  """(values, gradients by student and teacher), scalars traced."""

  @jax.jit
  def run(student, teacher, labels, **options):
    def total(student, teacher):
      values = loss(student, teacher, labels, **options)
      return values.sum(), values

    grads, values = jax.grad(total, (0, 1), has_aux=True)(student, teacher)
    return values, grads

  return run


plackett_luce = program(ranking.plackett_luce)
sorted_kl = program(ranking.sorted_kl)


def order_of(teacher, label):
  others = [c for c in range(len(teacher)) if c != label]
  return [label, *sorted(others, key=lambda c: (-teacher[c], c))]


def plackett_luce_reference(student, teacher, labels, temperature=1.0):
  """Draw by draw, without replacement."""
  result = []
  p = np.exp(references.log_softmax(teacher, temperature))
  for s, t, p_row, y in zip(student, teacher, p, labels, strict=True):
    loss, order = 0.0, order_of(t, y)
    for k, c in enumerate(order):
      left = np.asarray([s[j] for j in order[k:]], np.float64)
      loss -= p_row[c] * references.log_softmax(left)[0]
    result.append(loss)
  return np.array(result)


def resorted(teacher, label):
  """The values from the largest down, to the classes in their new order."""
  result = np.array(teacher)
  result[order_of(teacher, label)] = sorted(teacher, reverse=True)
  return result


def sorted_kl_reference(student, teacher, labels, *temperatures):
  teacher = [resorted(t, y) for t, y in zip(teacher, labels, strict=True)]
  return references.kl(student, np.array(teacher), *temperatures)


# plackett_luce


def test_plackett_luce_by_hand():
  """Two classes: the first draw is all there is."""
  student = np.float32([[0, np.log(3)], [0, np.log(3)]])
  teacher = np.float32([[np.log(4), 0], [np.log(4), 0]])
  values = jax.jit(ranking.plackett_luce)(student, teacher, np.array([0, 1]))
  expected = [0.8 * np.log(4), 0.2 * np.log(4 / 3)]
  np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_plackett_luce_values_and_both_gradients(temperature):
  student, teacher = logits(0), logits(1)
  values, grads = plackett_luce(
    student, teacher, LABELS, teacher_temperature=temperature
  )
  reference = functools.partial(
    plackett_luce_reference, labels=LABELS, temperature=temperature
  )
  np.testing.assert_allclose(values, reference(student, teacher), rtol=1e-5)
  expected = (
    references.gradient(lambda z: reference(z, teacher), student),
    references.gradient(lambda z: reference(student, z), teacher),
  )
  for grad, right in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("student", "teacher"),
  [
    (logits(0, scale=30.0), logits(1, scale=30.0)),
    (np.sign(logits(0)) * np.float32(9984), logits(1)),
    (np.zeros((4, 5), np.float32), logits(1)),
    # Ties go by class number.
    (logits(0), np.zeros((4, 5), np.float32)),
    (logits(0), np.round(logits(1) / 2)),
    (logits(0)[[0, 0, 0, 0]], logits(1)[[1, 1, 1, 1]]),
    (np.round(16 * logits(0)) / 16 + 4096, logits(1) - 4096),
  ],
  ids=["sigma 30", "1e4", "zeros", "all tied", "ties", "duplicates", "offset"],
)
def test_plackett_luce_harsh_inputs(student, teacher):
  values, grads = plackett_luce(
    student, teacher, LABELS, teacher_temperature=1.0
  )
  expected = plackett_luce_reference(student, teacher, LABELS)
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
  expected = references.gradient(
    lambda z: plackett_luce_reference(z, teacher, LABELS), student
  )
  # Sums of logits around 1e4 are rounded to 1e-3.
  np.testing.assert_allclose(grads[0], expected, rtol=1e-4, atol=5e-4)
  assert np.all(np.isfinite(grads[1]))


def test_plackett_luce_of_a_certain_teacher_is_cross_entropy():
  """All the weight is on the first draw, if the teacher is right."""
  student, teacher = logits(0), logits(1)
  teacher[np.arange(4), LABELS] += 1000
  values, (grad, _) = plackett_luce(
    student, teacher, LABELS, teacher_temperature=1.0
  )
  loss = lambda z: on_logits.cross_entropy(z, LABELS)
  expected, vjp = jax.vjp(jax.jit(loss), student)
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  np.testing.assert_allclose(grad, vjp(jnp.ones(4))[0], atol=1e-6)


def test_plackett_luce_likelihoods_of_all_orders_sum_to_1():
  """With equal weights, 1/C, the loss is the order's log-likelihood over C."""
  orders = np.array(list(itertools.permutations(range(4))))
  teacher = np.zeros((24, 4), np.float32)
  np.put_along_axis(teacher, orders, np.float32([3, 2, 1, 0]), 1)
  student = np.tile(logits(0, (1, 4)), (24, 1))
  values = jax.jit(ranking.plackett_luce)(
    student, teacher, orders[:, 0], teacher_temperature=1e7
  )
  likelihoods = np.exp(-4 * np.asarray(values, np.float64))
  np.testing.assert_allclose(likelihoods.sum(), 1.0, rtol=1e-5)


def test_plackett_luce_is_convex_in_the_student():
  teacher = logits(2)
  run = lambda z: plackett_luce(z, teacher, LABELS, teacher_temperature=2.0)[0]
  for seed in range(10):
    a, b = logits(3 * seed), logits(3 * seed + 1)
    assert np.all(run((a + b) / 2) < (run(a) + run(b)) / 2)


def test_plackett_luce_absent_classes():
  student, teacher = logits(0), logits(1)
  keep = np.array([1, 0, 1, 0, 1], bool)
  short = np.array([0, 2, 1, 1])
  values, grads = plackett_luce(
    np.where(keep, student, -np.inf),
    np.where(keep, teacher, -np.inf),
    LABELS,
    teacher_temperature=2.0,
  )
  expected = plackett_luce_reference(
    student[:, keep], teacher[:, keep], short, 2.0
  )
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  for grad in grads:
    np.testing.assert_array_equal(grad[:, ~keep], 0.0)


def test_plackett_luce_of_a_class_that_only_the_student_rules_out():
  student, teacher = logits(0), logits(1)
  student[:, 1] = -np.inf
  values, grads = plackett_luce(
    student, teacher, LABELS, teacher_temperature=1.0
  )
  p = np.exp(references.log_softmax(teacher))[:, 1]
  last = teacher[:, 1] == teacher.min(-1)
  np.testing.assert_allclose(values[~last], 1e5 * p[~last], rtol=2e-3)
  for array in (values, *grads):
    assert np.all(np.isfinite(array))


def test_plackett_luce_axis():
  student, teacher = logits(0, (2, 5, 3)), logits(1, (2, 5, 3))
  labels = np.array([[0, 4, 2], [1, 1, 3]])
  flat = [np.moveaxis(z, 1, -1).reshape(-1, 5) for z in (student, teacher)]
  values = jax.jit(functools.partial(ranking.plackett_luce, axis=-2))(
    student, teacher, labels
  )
  assert values.shape == (2, 3)
  np.testing.assert_allclose(
    values.ravel(), plackett_luce_reference(*flat, labels.ravel()), rtol=1e-5
  )


# sorted_kl


def test_sorted_kl_by_hand():
  """The true class takes the top, what was above it moves down a place."""
  teacher = np.float32([[5, 3, 4, 1, 2]])
  right = np.float32([[4, 5, 3, 1, 2]])
  np.testing.assert_array_equal(resorted(teacher[0], 1), right[0])
  student = logits(0)[:1]
  values = jax.jit(ranking.sorted_kl)(student, teacher, np.array([1]))
  np.testing.assert_allclose(values, references.kl(student, right), rtol=1e-5)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (4.0, 4.0), (1.5, 0.5)])
def test_sorted_kl_values_and_both_gradients(temperatures):
  student, teacher = logits(0), logits(1)
  options = dict(
    zip(("temperature", "teacher_temperature"), temperatures, strict=True)
  )
  values, grads = sorted_kl(student, teacher, LABELS, **options)
  reference = lambda s, t: sorted_kl_reference(s, t, LABELS, *temperatures)
  np.testing.assert_allclose(values, reference(student, teacher), rtol=1e-5)
  assert np.any(teacher.argmax(-1) != LABELS)
  expected = (
    references.gradient(lambda z: reference(z, teacher), student),
    references.gradient(lambda z: reference(student, z), teacher),
  )
  for grad, right in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0, 30.0])
def test_sorted_kl_of_a_right_teacher_is_kl(scale):
  student, teacher = logits(0, scale=scale), logits(1, scale=scale)
  options = {"temperature": 2.0, "teacher_temperature": 2.0}
  values, grads = sorted_kl(student, teacher, teacher.argmax(-1), **options)
  kl = program(lambda s, t, labels, **options: divergences.kl(s, t, **options))
  expected, expected_grads = kl(student, teacher, LABELS, **options)
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  for grad, right in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, right, rtol=1e-6)


@given(
  hnp.arrays(np.float32, (4, 5), elements=st.integers(-3, 3)),
  hnp.arrays(np.int32, 4, elements=st.integers(0, 4)),
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_sorted_kl_is_zero_for_the_resorted_teacher(teacher, labels):
  """Ties as well: whoever is first among equals, the values are the same."""
  student = [resorted(t, y) for t, y in zip(teacher, labels, strict=True)]
  values, (grad, _) = sorted_kl(
    np.array(student),
    teacher,
    labels,
    temperature=1.0,
    teacher_temperature=1.0,
  )
  np.testing.assert_array_equal(values, 0.0)
  np.testing.assert_array_equal(grad, 0.0)


def test_sorted_kl_leaves_a_true_class_that_is_tied_for_the_top():
  """Its gradient is that of kl, class by class."""
  student = logits(0)
  teacher = np.tile(np.float32([2, 1, 2, 2, 0]), (4, 1))
  options = {"temperature": 1.0, "teacher_temperature": 1.0}
  labels = np.array([0, 2, 3, 2])
  _, grads = sorted_kl(student, teacher, labels, **options)
  kl = program(lambda s, t, labels, **options: divergences.kl(s, t, **options))
  _, expected = kl(student, teacher, labels, **options)
  for grad, right in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, right, rtol=1e-6)


def test_sorted_kl_absent_classes():
  student, teacher = logits(0), logits(1)
  keep = np.array([1, 0, 1, 0, 1], bool)
  values, grads = sorted_kl(
    np.where(keep, student, -np.inf),
    np.where(keep, teacher, -np.inf),
    LABELS,
    temperature=2.0,
    teacher_temperature=2.0,
  )
  short = np.array([0, 2, 1, 1])
  expected = sorted_kl_reference(student[:, keep], teacher[:, keep], short, 2.0)
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  for grad in grads:
    np.testing.assert_array_equal(grad[:, ~keep], 0.0)


def test_sorted_kl_axis():
  student, teacher = logits(0, (5, 4)), logits(1, (5, 4))
  values = jax.jit(functools.partial(ranking.sorted_kl, axis=0))(
    student, teacher, LABELS
  )
  np.testing.assert_allclose(
    values, sorted_kl_reference(student.T, teacher.T, LABELS), rtol=1e-5
  )


# Both


@pytest.mark.parametrize("loss", [ranking.plackett_luce, ranking.sorted_kl])
def test_labels(loss):
  student, teacher = logits(0), logits(1)
  with pytest.raises(ValueError, match=r"labels\[1\] is 5; it should be from"):
    loss(student, teacher, np.array([0, 5, 2, 2]))
  with pytest.raises(ValueError, match=r"labels has shape \(1,\).*\(4, 5\)"):
    loss(student, teacher, LABELS[:1])
  with pytest.raises(TypeError, match="labels has dtype float32; .*integer"):
    loss(student, teacher, LABELS.astype(np.float32))
  run = program(loss)
  options = {"teacher_temperature": 1.0}
  if loss is ranking.sorted_kl:
    options["temperature"] = 1.0
  values, (grad, _) = run(student, teacher, np.array([0, 5, 2, -1]), **options)
  assert np.isnan(values).tolist() == [False, True, False, True]
  assert np.isnan(grad).any(-1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("loss", [ranking.plackett_luce, ranking.sorted_kl])
def test_bfloat16_is_computed_in_float32(loss):
  student, teacher = (jnp.asarray(logits(i), jnp.bfloat16) for i in (0, 1))
  reference = (
    sorted_kl_reference
    if loss is ranking.sorted_kl
    else plackett_luce_reference
  )
  np.testing.assert_allclose(
    jax.jit(loss)(student, teacher, LABELS),
    reference(np.float64(student), np.float64(teacher), LABELS),
    rtol=1e-5,
  )
