import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses import scale_free
from tests import references

forms = pytest.mark.parametrize("form", ["released", "paper"])


def logits(seed, shape=(4, 5), scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


@functools.cache
def program(loss, form):
  """(values, gradients by student and teacher), scalars and mask traced."""

  @jax.jit
  def run(student, teacher, where, **options):
    def total(student, teacher):
      values = loss(student, teacher, where=where, form=form, **options)
      return values.sum(), values

    grads, values = jax.grad(total, (0, 1), has_aux=True)(student, teacher)
    return values, grads

  return run


def standardized_kl(
  student, teacher, form, temperature=1.0, teacher_temperature=None, where=None
):
  return program(scale_free.standardized_kl, form)(
    student,
    teacher,
    np.ones(len(student), bool) if where is None else where,
    temperature=temperature,
    teacher_temperature=teacher_temperature or temperature,
  )


def dist(student, teacher, form, where=None, **options):
  options = {
    "inter_weight": 1.0,
    "intra_weight": 1.0,
    "temperature": 1.0,
  } | options
  options.setdefault("teacher_temperature", options["temperature"])
  return program(scale_free.dist, form)(
    student,
    teacher,
    np.ones(len(student), bool) if where is None else where,
    **options,
  )


def zscore(z, form):
  z = np.asarray(z, np.float64)
  rows = []
  for row in z:
    if form == "paper":
      rows.append((row - row.mean()) / row.std())
    else:
      rows.append((row - row.mean()) / (1e-7 + row.std(ddof=1)))
  return np.array(rows)


def standardized_reference(student, teacher, form, *temperatures):
  return references.kl(
    zscore(student, form), zscore(teacher, form), *temperatures
  )


def pearson(a, b, form):
  a, b = a - a.mean(), b - b.mean()
  size = np.sqrt((a**2).sum()) * np.sqrt((b**2).sum())
  if form == "released":
    return (a * b).sum() / (size + 1e-8)
  return (a * b).sum() / size


def dist_reference(
  student,
  teacher,
  form,
  temperature=1.0,
  teacher_temperature=None,
  inter_weight=1.0,
  intra_weight=1.0,
):
  q = np.exp(references.log_softmax(student, temperature))
  p = np.exp(
    references.log_softmax(teacher, teacher_temperature or temperature)
  )
  inter = [1 - pearson(a, b, form) for a, b in zip(q, p, strict=True)]
  intra = [1 - pearson(a, b, form) for a, b in zip(q.T, p.T, strict=True)]
  return temperature**2 * (
    inter_weight * np.array(inter) + intra_weight * np.mean(intra)
  )


# standardized_kl


@forms
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 2.0), (1.5, 0.5)])
@pytest.mark.parametrize("scale", [2.0, 30.0])
def test_standardized_values_and_both_gradients(form, temperatures, scale):
  student, teacher = logits(0, scale=scale), logits(1, scale=scale)
  values, grads = standardized_kl(student, teacher, form, *temperatures)
  reference = lambda s, t: standardized_reference(s, t, form, *temperatures)
  np.testing.assert_allclose(values, reference(student, teacher), rtol=2e-5)
  expected = (
    references.gradient(lambda z: reference(z, teacher), student),
    references.gradient(lambda z: reference(student, z), teacher),
  )
  for grad, right in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, right, rtol=1e-4, atol=1e-5)


@given(st.floats(0.01, 1e3), st.floats(-50, 50), st.integers(0, 100))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_standardized_ignores_scale_and_offset(scale, offset, seed):
  teacher = logits(seed)
  # The 1e-7 of the released form shows at small scales.
  values, _ = standardized_kl(
    np.float32(scale) * teacher + np.float32(offset), teacher, "paper", 2.0
  )
  np.testing.assert_allclose(values, 0.0, atol=1e-5 * max(1, 1 / scale**2))


def test_standardized_forms_are_one_at_another_temperature():
  student, teacher = logits(0), logits(1)
  temperature = 2.0
  other = temperature * np.sqrt(1 - 1 / 5)
  paper, _ = standardized_kl(student, teacher, "paper", temperature)
  released, _ = standardized_kl(student, teacher, "released", other)
  np.testing.assert_allclose(
    paper / temperature**2, released / other**2, rtol=1e-5
  )


@forms
def test_standardized_rows_of_equal_logits(form):
  """The uniform distribution, with no gradient."""
  student, teacher = logits(0), logits(1)
  student[0] = 3.0
  student[1] = -1e4
  teacher[2] = 0.1
  student[3] = teacher[3] = 7.0
  values, grads = standardized_kl(student, teacher, form)
  uniform = np.full((4, 5), -np.log(5))
  z = zscore(teacher[:2], form)
  expected = references.kl_of_logs(references.log_softmax(z), uniform[:2])
  np.testing.assert_allclose(values[:2], expected, rtol=1e-5)
  z = zscore(student[2:3], form)
  expected = references.kl_of_logs(uniform[:1], references.log_softmax(z))
  np.testing.assert_allclose(values[2:3], expected, rtol=1e-5)
  assert values[3] == 0.0
  np.testing.assert_array_equal(np.asarray(grads[0])[[0, 1, 3]], 0.0)
  np.testing.assert_array_equal(np.asarray(grads[1])[[2, 3]], 0.0)


@forms
def test_standardized_rounding_is_no_spread(form):
  """The mean of five equal numbers may be rounded to another number."""
  for seed in range(10):
    student = np.tile(logits(seed, (4, 1)), 5)
    values, (grad, _) = standardized_kl(student, logits(1), form)
    np.testing.assert_array_equal(grad, 0.0)
    zeros, _ = standardized_kl(0 * student, logits(1), form)
    np.testing.assert_array_equal(values, zeros)


@forms
def test_standardized_offsets_cost_no_digits(form):
  # Multiples of 1/16, which stay exact beside 4096 in float32.
  student, teacher = (np.round(16 * logits(i)) / 16 for i in (0, 1))
  values, _ = standardized_kl(student + 4096, teacher - 4096, form, 2.0)
  expected = standardized_reference(student, teacher, form, 2.0)
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_standardized_tiny_logits():
  """Beside 1e-7 in the released form, whatever the size in the paper's."""
  student, teacher = logits(0, scale=1e-7), logits(1)
  for form in ("released", "paper"):
    values, _ = standardized_kl(student, teacher, form)
    expected = standardized_reference(student, teacher, form)
    np.testing.assert_allclose(values, expected, rtol=2e-5)
  _, grads = standardized_kl(np.float32(1e-30) * logits(0), teacher, "released")
  assert np.abs(grads[0]).max() < 1e8  # the deviation's 1e-7 bounds it
  tiny, big = (
    standardized_kl(scale * logits(0), teacher, "paper")[0]
    for scale in (np.float32(1e-28), 1)
  )
  np.testing.assert_allclose(tiny, big, rtol=1e-4)


@forms
def test_standardized_absent_classes(form):
  student, teacher = logits(0), logits(1)
  keep = np.array([1, 0, 1, 1, 0], bool)
  values, grads = standardized_kl(
    np.where(keep, student, -np.inf), np.where(keep, teacher, -np.inf), form
  )
  reference = lambda s: standardized_reference(s, teacher[:, keep], form)
  np.testing.assert_allclose(values, reference(student[:, keep]), rtol=1e-5)
  for grad in grads:
    np.testing.assert_array_equal(grad[:, ~keep], 0.0)
  expected = references.gradient(reference, student[:, keep])
  np.testing.assert_allclose(grads[0][:, keep], expected, 1e-4, 1e-5)


# dist


@forms
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"inter_weight": 2.0, "intra_weight": 0.0},
    {"inter_weight": 0.0, "intra_weight": 2.0, "temperature": 4.0},
    {"temperature": 1.5, "teacher_temperature": 0.5},
  ],
)
def test_dist_values_and_both_gradients(form, options):
  student, teacher = logits(0), logits(1)
  values, grads = dist(student, teacher, form, **options)
  reference = lambda s, t: dist_reference(s, t, form, **options)
  np.testing.assert_allclose(values, reference(student, teacher), rtol=1e-5)
  expected = (
    references.gradient(lambda z: reference(z, teacher), student),
    references.gradient(lambda z: reference(student, z), teacher),
  )
  for grad, right in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, right, rtol=1e-4, atol=1e-5)


@forms
def test_dist_of_a_nearly_impossible_class(form):
  """Where the 1e-8 beside the norms decides."""
  student, teacher = logits(0), logits(1)
  student[:, 4], teacher[:, 4] = student[:, 0] - 12, teacher[:, 0] - 12
  values, _ = dist(student, teacher, form)
  expected = dist_reference(student, teacher, form)
  np.testing.assert_allclose(values, expected, rtol=2e-5)
  other = "paper" if form == "released" else "released"
  other = dist_reference(student, teacher, other)
  assert np.all(np.abs(expected - other) > 0.01)


@forms
def test_dist_of_sigma_30_and_zero_rows(form):
  student, teacher = logits(0, scale=30.0), logits(1, scale=30.0)
  student[1] = teacher[2] = 0.0
  values, grads = dist(student, teacher, form, intra_weight=0.0)
  expected = dist_reference(
    student[[0, 3]], teacher[[0, 3]], form, intra_weight=0.0
  )
  values = np.asarray(values)
  np.testing.assert_allclose(values[[0, 3]], expected, rtol=2e-5)
  np.testing.assert_array_equal(values[[1, 2]], 1.0)
  for grad in (*grads, *dist(student, teacher, form)[1]):
    assert np.all(np.isfinite(grad))


@forms
def test_dist_leaves_masked_examples_out_of_the_classes(form):
  student, teacher = logits(0), logits(1)
  where = np.array([1, 0, 1, 1], bool)
  expected = dist_reference(student[where], teacher[where], form)
  student[~where], teacher[~where] = np.nan, np.inf
  values, grads = dist(student, teacher, form, where=where)
  np.testing.assert_allclose(values[where], expected, rtol=1e-5)
  np.testing.assert_array_equal(values[~where], 0.0)
  for grad in grads:
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(grad[~where], 0.0)


def test_dist_at_equality():
  teacher = logits(1)
  values, grads = dist(teacher, teacher, "paper")
  for array in (values, *grads):
    np.testing.assert_allclose(array, 0.0, atol=1e-6)
  # In the released form 1e-8 is left of the norms.
  values, _ = dist(teacher, teacher, "released")
  expected = dist_reference(teacher, teacher, "released")
  np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-12)
  assert np.all(np.asarray(values) > 0.0)


def test_dist_near_equality_keeps_its_digits():
  teacher = logits(1)
  student = teacher + logits(0, scale=1e-3)
  values, _ = dist(student, teacher, "paper")
  expected = dist_reference(student, teacher, "paper")
  assert np.all(expected < 1e-5)
  np.testing.assert_allclose(values, expected, rtol=5e-3)


def test_dist_of_two_classes_is_0_or_4():
  """Two points correlate fully, one way or the other; here both parts do."""
  sign = np.full((4, 5), -np.inf, np.float32)
  sign[:, 1] = [1, 2, -1, -3]
  sign[:, 3] = -sign[:, 1]
  opposite = sign[:, [0, 3, 2, 1, 4]]
  for form in ("released", "paper"):
    values, _ = dist(3 * sign, sign, form, intra_weight=0.0)
    np.testing.assert_allclose(values, 0.0, atol=1e-6)
    values, _ = dist(opposite, sign, form, temperature=2.0)
    np.testing.assert_allclose(values, 16.0, rtol=1e-5)


@forms
def test_dist_of_constant_predictions(form):
  student, teacher = logits(0), logits(1)
  # One example: no classes to correlate over the batch.
  alone = np.array([False, True, False, False])
  values, grads = dist(student, teacher, form, where=alone, inter_weight=0.0)
  np.testing.assert_array_equal(values, [0, 1, 0, 0])
  for grad in grads:
    np.testing.assert_array_equal(grad, 0.0)
  # A student that does not know yet: nothing correlates.
  values, (grad, _) = dist(np.zeros((4, 5), np.float32), teacher, form)
  np.testing.assert_array_equal(values, 2.0)
  np.testing.assert_array_equal(grad, 0.0)
  # Equal examples.
  values, (grad, _) = dist(
    student[[0, 0, 0, 0]], teacher, form, inter_weight=0.0
  )
  np.testing.assert_array_equal(values, 1.0)
  np.testing.assert_array_equal(grad, 0.0)


@forms
def test_dist_absent_classes(form):
  student, teacher = logits(0), logits(1)
  keep = np.array([1, 0, 1, 1, 0], bool)
  values, grads = dist(
    np.where(keep, student, -np.inf), np.where(keep, teacher, -np.inf), form
  )
  expected = dist_reference(student[:, keep], teacher[:, keep], form)
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  for grad in grads:
    np.testing.assert_array_equal(grad[:, ~keep], 0.0)


def test_dist_of_pixels():
  """All axes but that of the classes hold examples."""
  student, teacher = logits(0, (2, 5, 3)), logits(1, (2, 5, 3))
  values = jax.jit(functools.partial(scale_free.dist, axis=1))(student, teacher)
  flat = (np.moveaxis(z, 1, -1).reshape(6, 5) for z in (student, teacher))
  expected = dist_reference(*flat, "released").reshape(2, 3)
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_dist_on_devices_is_dist_of_the_batch():
  """Two examples on each of two devices; the contract has one on each."""
  student, teacher = logits(0), logits(1)
  loss = lambda s, t: scale_free.dist(s, t, axis_name="batch")
  values = jax.pmap(loss, axis_name="batch", devices=jax.devices()[:2])(
    student.reshape(2, 2, 5), teacher.reshape(2, 2, 5)
  )
  expected = dist_reference(student, teacher, "released")
  np.testing.assert_allclose(np.ravel(values), expected, rtol=1e-5)


# Both


@pytest.mark.parametrize("loss", [scale_free.standardized_kl, scale_free.dist])
def test_form(loss):
  with pytest.raises(ValueError, match=r"form is 'mean'.*released.*paper"):
    loss(logits(0), logits(1), form="mean")


@pytest.mark.parametrize(
  ("loss", "reference"),
  [
    (scale_free.standardized_kl, standardized_reference),
    (scale_free.dist, dist_reference),
  ],
)
def test_bfloat16_and_the_default_form(loss, reference):
  student, teacher = (jnp.asarray(logits(i), jnp.bfloat16) for i in (0, 1))
  exact = np.float64(student), np.float64(teacher)
  np.testing.assert_allclose(
    jax.jit(loss)(student, teacher), reference(*exact, "released"), rtol=2e-5
  )
