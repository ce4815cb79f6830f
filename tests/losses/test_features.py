import functools
from typing import Any, NamedTuple

from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kd_jax.losses import features
from tests import references

LOG_SCALE = np.float32([0.5, -2.0, 3.0])


# References: one example, from the equations, in float64


def hint(s, t):
  return sum((a - b) ** 2 for a, b in zip(s.flat, t.flat, strict=True)) / 2


def direction(x):
  length = np.linalg.norm(x)
  return x / length if length else x


def cosine_distance(s, t):
  pairs = zip(
    s.reshape(-1, s.shape[-1]), t.reshape(-1, t.shape[-1]), strict=True
  )
  distances = [1 - direction(a) @ direction(b) for a, b in pairs]
  return np.reshape(distances, s.shape[:-1])


def patient_hidden(s, t):
  pairs = zip(
    s.reshape(-1, s.shape[-1]), t.reshape(-1, t.shape[-1]), strict=True
  )
  return sum(np.linalg.norm(direction(a) - direction(b)) ** 2 for a, b in pairs)


def factor_transfer(s, t, p):
  return np.linalg.norm(direction(s.ravel()) - direction(t.ravel()), ord=p)


def vid(m, t, log_scale=LOG_SCALE):
  v = np.log1p(np.exp(log_scale.astype(np.float64))) + 1e-5
  log_density = stats.norm.logpdf(t, m, np.sqrt(np.broadcast_to(v, t.shape)))
  return -log_density.sum() - t.size * np.log(2 * np.pi) / 2


class Case(NamedTuple):
  loss: Any
  reference: Any  # of one example
  zero_at_equality: bool = True
  any_scale: bool = False  # whether only directions count


SIZE = 6  # entries of an example, [2, 3]


def case(name, reference, any_scale=False, **static):
  loss = functools.partial(getattr(features, name), **static)
  return Case(loss, reference, any_scale=any_scale)


def vid_case(form, scale):
  loss = lambda s, t, **options: features.vid(
    s, LOG_SCALE, t, form=form, **options
  )
  return Case(loss, lambda s, t: scale * vid(s, t), zero_at_equality=False)


CASES = {
  "hint": case("hint", lambda s, t: hint(s, t) * 2 / SIZE),
  "hint_paper": case("hint", hint, form="paper"),
  "cosine_distance": case("cosine_distance", cosine_distance, any_scale=True),
  "patient_hidden": case(
    "patient_hidden",
    lambda s, t: patient_hidden(s, t) / SIZE,
    any_scale=True,
  ),
  "patient_hidden_paper": case(
    "patient_hidden", patient_hidden, form="paper", any_scale=True
  ),
  "factor_1": case(
    "factor_transfer",
    lambda s, t: factor_transfer(s, t, 1) / SIZE,
    any_scale=True,
  ),
  "factor_2": case(
    "factor_transfer",
    lambda s, t: factor_transfer(s, t, 2) ** 2 / SIZE,
    any_scale=True,
    p=2,
  ),
  "factor_1_paper": case(
    "factor_transfer",
    lambda s, t: factor_transfer(s, t, 1),
    any_scale=True,
    form="paper",
  ),
  "factor_2_paper": case(
    "factor_transfer",
    lambda s, t: factor_transfer(s, t, 2),
    any_scale=True,
    p=2,
    form="paper",
  ),
  "vid": vid_case("released", 1 / SIZE),
  "vid_paper": vid_case("paper", 1.0),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@functools.cache
def program(loss):
  """(values, gradients by student and teacher), compiled once for all tests."""

  @jax.jit
  def run(student, teacher, where):
    def total(student, teacher):
      values = loss(student, teacher, where=where)
      return values.sum(), values

    grads, values = jax.grad(total, (0, 1), has_aux=True)(student, teacher)
    return values, grads

  return run


@functools.cache
def output_shape(loss, shape):
  array = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(loss, array, array).shape


def run(case, student, teacher, rows=None):
  """With a mask of whole examples, of the shape of the output."""
  shape = output_shape(case.loss, student.shape)
  rows = np.ones(len(student), bool) if rows is None else rows
  where = np.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape)
  return program(case.loss)(student, teacher, where)


def examples(reference, student, teacher):
  student, teacher = np.float64(student), np.float64(teacher)
  return np.array(
    [reference(s, t) for s, t in zip(student, teacher, strict=True)]
  )


def draw(seed, scale=1.0, shape=(4, 2, 3)):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


def assert_matches(case, student, teacher, rtol=1e-5):
  """Values and both gradients; errors relative to the example's largest."""
  values, grads = run(case, student, teacher)
  expected = examples(case.reference, student, teacher)
  np.testing.assert_allclose(values, expected, rtol=rtol, atol=1e-6)
  by_student = lambda s: examples(case.reference, s, teacher)
  by_teacher = lambda t: examples(case.reference, student, t)
  for grad, expected in (
    (grads[0], references.gradient(by_student, student)),
    (grads[1], references.gradient(by_teacher, teacher)),
  ):
    scale = np.abs(expected).max((1, 2), keepdims=True)
    worst = (np.abs(grad - expected) / (rtol * scale + 1e-6)).max()
    assert worst <= 1.0, f"error is {worst} times the tolerance"


@each
def test_values_and_both_gradients_match_float64(case):
  assert_matches(case, draw(0), draw(1))


@each
def test_large_and_rounded_inputs(case):
  coarse = lambda x: np.float32(jnp.asarray(x, jnp.bfloat16))
  student, teacher = coarse(draw(0, 30)), coarse(draw(1, 30))
  # Duplicate examples, and one that is a multiple of its teacher.
  student[1], teacher[1] = student[0], teacher[0]
  student[2] = 2 * teacher[2] + coarse(draw(2, 0.5))[2]
  assert_matches(case, student, teacher)


@each
def test_masks_take_examples_out(case):
  rows = np.array([True, False, True, False])
  student, teacher = draw(0), draw(1)
  short = examples(case.reference, student[rows], teacher[rows])
  _, whole = run(case, student, teacher)
  student[1], teacher[3] = np.nan, np.inf
  values, grads = run(case, student, teacher, rows)
  np.testing.assert_allclose(values[rows], short, rtol=1e-5)
  np.testing.assert_array_equal(values[~rows], 0.0)
  for grad, unmasked in zip(grads, whole, strict=True):
    np.testing.assert_array_equal(grad[~rows], 0.0)
    np.testing.assert_allclose(grad[rows], unmasked[rows], rtol=1e-6)


@pytest.mark.parametrize("name", ["factor_1", "factor_1_paper"])
def test_equal_entries_have_no_sign(name):
  """|x| has the gradient 0 at 0, not the 1 that jnp.abs has."""
  student, teacher = np.zeros((2, 4, 2, 3), np.float32)
  student[:, 0, 0], teacher[:, 1, 1] = 2.0, 3.0
  _, grads = run(CASES[name], student, teacher)
  for grad in grads:
    np.testing.assert_array_equal(grad[:, 0, 1:], 0.0)


@each
def test_equality_and_zeros(case):
  student = draw(0)
  student[1] = 0.0
  values, grads = run(case, student, student)
  for grad in grads:
    np.testing.assert_array_equal(np.isfinite(grad), True)
  if case.zero_at_equality:
    zero_vectors = case is CASES["cosine_distance"]
    np.testing.assert_allclose(np.delete(values, 1, 0), 0.0, atol=1e-6)
    np.testing.assert_array_equal(values[1], float(zero_vectors))
  else:
    assert np.all(values != 0)
  # A zero vector on one side only.
  values, grads = run(case, student, draw(1))
  expected = examples(case.reference, student, draw(1))
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  for grad in grads:
    assert np.all(np.isfinite(grad))


@each
@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_extreme_scales(case, scale):
  scale = np.float32(scale)
  expected, expected_grads = run(case, draw(0), draw(1))
  for pair in (
    (scale * draw(0), draw(1)),
    (draw(0), scale * draw(1)),
    (scale * draw(0), -scale * draw(0)),
  ):
    values, grads = run(case, *pair)
    for array in (values, *grads):
      assert np.all(np.isfinite(array))
  if case.any_scale:
    values, grads = run(case, scale * draw(0), draw(1))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    for grad, other, factor in zip(
      grads, expected_grads, (scale, 1), strict=True
    ):
      np.testing.assert_allclose(grad * factor, other, rtol=1e-4, atol=1e-6)


@each
def test_nan_is_not_hidden(case):
  broken = draw(0)
  broken[2, 1, 0] = np.nan
  for pair in ((broken, draw(1)), (draw(1), broken)):
    values, _ = run(case, *pair)
    assert np.any(np.isnan(values[2]))
    assert np.all(np.isfinite(np.delete(values, 2, 0)))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda x: features.hint(x, x, form="sum"), "form is 'sum'.*mean.*paper"),
    (lambda x: features.patient_hidden(x, x, form="mean"), "form is 'mean'"),
    (lambda x: features.factor_transfer(x, x, form=""), "form is ''"),
    (
      lambda x: features.factor_transfer(x, x, p=3),
      "p is 3; it should be 1 or",
    ),
    (lambda x: features.vid(x, x[0, 0], x, form="sum"), "form is 'sum'"),
    (
      lambda x: features.vid(x, x[0], x),
      r"log_scale has shape \(2, 3\) and student_mean has shape \(4, 2, 3\)",
    ),
    (lambda x: features.cosine_distance(x, x, axis=3), "axis is 3"),
  ],
)
def test_wrong_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call(draw(0))


def test_empty_batches():
  for case in CASES.values():
    assert output_shape(case.loss, (0, 2, 3))[0] == 0


# cosine_distance


def test_cosine_distance_of_known_angles():
  # Down to angles whose cosine is 1 in float32.
  angles = np.array([np.pi, np.pi / 3, 1e-2, 1e-3, 2e-4])
  student = np.stack([np.cos(angles), np.sin(angles)], -1)
  teacher = np.broadcast_to(np.array([7.0, 0.0]), student.shape)
  loss = jax.jit(features.cosine_distance)
  values = loss(np.float32(student), np.float32(teacher))
  expected = 2 * np.sin(angles / 2) ** 2
  np.testing.assert_allclose(values, expected, rtol=1e-3)


def test_cosine_distance_axis_and_token_mask():
  student, teacher = draw(0), draw(1)
  where = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0]], bool)
  loss = jax.jit(features.cosine_distance, static_argnames="axis")
  values = loss(student, teacher, axis=1, where=where)
  expected = examples(
    cosine_distance, student.swapaxes(1, 2), teacher.swapaxes(1, 2)
  )
  np.testing.assert_allclose(values, np.where(where, expected, 0), rtol=1e-5)


vectors = hnp.arrays(
  np.float32, (4, 2, 3), elements=st.floats(-(2.0**60), 2.0**60, width=32)
)


@settings(max_examples=30)
@given(vectors, vectors)
def test_cosine_distance_is_symmetric_and_bounded(student, teacher):
  values, _ = run(CASES["cosine_distance"], student, teacher)
  swapped, _ = run(CASES["cosine_distance"], teacher, student)
  assert np.all((values >= 0) & (values <= 2 + 1e-6))
  np.testing.assert_allclose(values, swapped, atol=1e-6)


# Relations between the losses


def test_patient_hidden_is_twice_the_cosine_distance():
  student, teacher = draw(0), draw(1)
  values, _ = run(CASES["patient_hidden_paper"], student, teacher)
  cosines, _ = run(CASES["cosine_distance"], student, teacher)
  np.testing.assert_allclose(values, 2 * cosines.sum(-1), rtol=1e-5)


def test_factor_transfer_of_whole_vectors_is_patient_hidden():
  student, teacher = draw(0), draw(1)
  flat = [x.reshape(4, 6) for x in (student, teacher)]
  np.testing.assert_allclose(
    run(CASES["factor_2"], student, teacher)[0],
    jax.jit(features.patient_hidden)(*flat),
    rtol=1e-5,
  )


# vid


def test_vid_by_hand():
  # Variance 5, as the released code begins: log(exp(5 - 1e-5) - 1).
  log_scale = np.full(1, np.log(np.exp(5 - 1e-5) - 1), np.float32)
  mean, teacher = np.zeros((2, 3, 1)), np.full((2, 3, 1), 2.0)
  mean, teacher = np.float32(mean), np.float32(teacher)
  expected = (4 / 5 + np.log(5)) / 2
  loss = jax.jit(features.vid, static_argnames="form")
  values = loss(mean, log_scale, teacher)
  np.testing.assert_allclose(values, [expected] * 2, rtol=1e-5)
  values = loss(mean, log_scale, teacher, form="paper")
  np.testing.assert_allclose(values, [3 * expected] * 2, rtol=1e-5)


@jax.jit
def by_log_scale(log_scale, mean, teacher):
  loss = lambda x: features.vid(mean, x, teacher, form="paper").sum()
  return jax.grad(loss)(log_scale)


def test_vid_gradient_of_the_scale():
  mean, teacher = draw(0), draw(1)
  total = lambda a: examples(lambda m, t: vid(m, t, a), mean, teacher)
  expected = references.gradient(total, LOG_SCALE)
  np.testing.assert_allclose(
    by_log_scale(LOG_SCALE, mean, teacher), expected, rtol=1e-5
  )
  # At the best variance, which is the mean squared error, it is 0.
  best = ((teacher - mean) ** 2).mean((0, 1))
  best = np.float32(np.log(np.expm1(best - 1e-5)))
  np.testing.assert_allclose(by_log_scale(best, mean, teacher), 0, atol=1e-4)
  for extreme in (-1e4, 1e4):
    scale = np.full(3, extreme, np.float32)
    assert np.all(np.isfinite(by_log_scale(scale, 1e4 * mean, teacher)))


def test_vid_with_one_variance_is_hint():
  student, teacher = draw(0), draw(1)
  variance = np.log(2) + 1e-5
  hints, _ = run(CASES["hint"], student, teacher)
  np.testing.assert_allclose(
    jax.jit(features.vid)(student, np.zeros(3, np.float32), teacher),
    (hints / variance + np.log(variance)) / 2,
    rtol=1e-5,
    atol=1e-6,
  )
