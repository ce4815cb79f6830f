import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses import activations
from tests import references

MARGIN = np.float32([-0.3, -1.0, -0.05])


# References: one entry, in the words of the papers, in float64


def boundary_entry(s, t, margin):
  fires = 1.0 if t > 0 else 0.0
  relu = lambda x: max(x, 0.0)
  return (fires * relu(margin - s) + (1 - fires) * relu(margin + s)) ** 2


def ofd_entry(s, t, margin):
  target = t if t > margin else margin
  if target > 0:
    return (s - target) ** 2
  return (s - target) ** 2 if s > target else 0.0


def total(entry, *arrays):
  """The sum over the entries of each example."""
  arrays = (np.asarray(x, np.float64) for x in arrays)
  terms = np.vectorize(entry, otypes=[np.float64])(*arrays)
  return terms.reshape(len(terms), -1).sum(-1)


boundary = functools.partial(total, boundary_entry)
ofd = functools.partial(total, ofd_entry)

LOSSES = {
  "activation_boundary": (activations.activation_boundary, boundary, 1.0),
  "ofd": (activations.ofd, ofd, MARGIN),
}
each = pytest.mark.parametrize(
  ("loss", "reference", "margin"), LOSSES.values(), ids=LOSSES
)


@functools.cache
def program(loss):
  @jax.jit
  def run(student, teacher, margin, where):
    def total(student, teacher, margin):
      values = loss(student, teacher, margin=margin, where=where)
      return values.sum(), values

    grads, values = jax.grad(total, (0, 1, 2), has_aux=True)(
      student, teacher, margin
    )
    return values, grads

  return run


def run(loss, student, teacher, margin, where=None):
  where = np.ones(len(student), bool) if where is None else where
  return program(loss)(student, teacher, margin, where)


def draw(seed, scale=1.0, shape=(4, 2, 3)):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


@each
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_values_and_gradients_match_float64(loss, reference, margin, scale):
  coarse = lambda x: np.float32(jnp.asarray(x, jnp.bfloat16))
  student, teacher = coarse(draw(0, scale)), coarse(draw(1, scale))
  student[1], teacher[1] = student[0], teacher[0]
  values, grads = run(loss, student, teacher, margin)
  expected = reference(student, teacher, margin)
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  for grad, expected in zip(
    grads,
    (
      references.gradient(lambda x: reference(x, teacher, margin), student),
      references.gradient(lambda x: reference(student, x, margin), teacher),
      references.gradient(lambda x: reference(student, teacher, x), margin),
    ),
    strict=True,
  ):
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6 * scale)


@each
def test_masks_take_examples_out(loss, reference, margin):
  where = np.array([True, False, True, False])
  student, teacher = draw(0), draw(1)
  short = run(loss, student[where], teacher[where], margin)
  student[1], teacher[1], teacher[3] = np.nan, np.inf, -np.inf
  values, grads = run(loss, student, teacher, margin, where)
  np.testing.assert_allclose(values[where], short[0], rtol=1e-6)
  np.testing.assert_array_equal(values[~where], 0.0)
  for grad, expected in zip(grads[:2], short[1][:2], strict=True):
    np.testing.assert_array_equal(grad[~where], 0.0)
    np.testing.assert_allclose(grad[where], expected, rtol=1e-6)
  np.testing.assert_allclose(grads[2], short[1][2], rtol=1e-5)


@each
def test_extremes_are_finite_and_nan_is_not_hidden(loss, reference, margin):
  for student, teacher in (
    (1e4 * draw(0), -1e4 * draw(0)),
    (1e-30 * draw(0), 1e-30 * draw(1)),
    (0 * draw(0), 0 * draw(0)),
  ):
    values, grads = run(loss, student, teacher, margin)
    expected = reference(student, teacher, margin)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    for grad in grads:
      assert np.all(np.isfinite(grad))
  broken = draw(0)
  broken[2, 1, 0] = np.nan
  for pair in ((broken, draw(1)), (draw(1), broken)):
    values, _ = run(loss, *pair, margin)
    assert np.isnan(values).tolist() == [False, False, True, False]


# activation_boundary


def test_only_the_signs_of_the_teacher_count():
  student, teacher = draw(0), draw(1)
  teacher[0, 0] = 0.0  # counts as off
  values, grads = run(activations.activation_boundary, student, teacher, 1.0)
  signs = np.where(teacher > 0, 1.0, -1.0).astype(np.float32)
  expected, _ = run(activations.activation_boundary, student, signs, 1.0)
  np.testing.assert_array_equal(values, expected)
  np.testing.assert_array_equal(grads[1], 0.0)


def test_activation_boundary_is_zero_beyond_the_margin():
  teacher = draw(0)
  student = np.where(teacher > 0, 1.0, -1.0).astype(np.float32)
  loss = activations.activation_boundary
  np.testing.assert_array_equal(run(loss, student, teacher, 1.0)[0], 0.0)
  # Not at equality, and not within a wider margin: 6 entries, each 0.5 short.
  assert np.all(run(loss, teacher, teacher, 1.0)[0] > 0)
  np.testing.assert_allclose(run(loss, student, teacher, 1.5)[0], 6 * 0.25)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_margin_that_is_not_positive(bad):
  loss = activations.activation_boundary
  with pytest.raises(ValueError, match="^margin is .*above 0"):
    jax.eval_shape(functools.partial(loss, margin=bad), draw(0), draw(1))
  assert np.all(np.isnan(run(loss, draw(0), draw(1), bad)[0]))


# ofd


def test_ofd_where_the_teacher_is_active_is_the_squared_distance():
  student, teacher = draw(0), np.abs(draw(1)) + 0.1
  values, _ = run(activations.ofd, student, teacher, MARGIN)
  expected = ((student - teacher) ** 2).sum((1, 2))
  np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_ofd_lets_the_student_be_lower_where_the_teacher_is_off():
  teacher = -np.abs(draw(1))
  low = np.maximum(teacher, MARGIN)
  values, grads = run(activations.ofd, low - 5, teacher, MARGIN)
  for array in (values, *grads):
    np.testing.assert_array_equal(array, 0.0)
  values, _ = run(activations.ofd, low + 2, teacher, MARGIN)
  np.testing.assert_allclose(values, 6 * 4.0, rtol=1e-5)


def test_ofd_margin_of_the_wrong_kind():
  x = draw(0)
  for bad in (np.float32(-1.0), np.zeros(1, np.float32), x[0]):
    with pytest.raises(ValueError) as error:
      activations.ofd(x, x, margin=bad)
    for text in ("margin", str(bad.shape), "student_features", "(4, 2, 3)"):
      assert text in str(error.value)
  with pytest.raises(TypeError, match="margin has dtype int"):
    activations.ofd(x, x, margin=np.array([-1, -1, -1]))
