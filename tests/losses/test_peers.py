import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses import peers
from tests import references


def logits(seed, shape=(4, 5), scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


def mutual_reference(student, teacher, *temperatures, form="released"):
  total = sum(references.kl(student, peer, *temperatures) for peer in teacher)
  return total / (len(teacher) if form == "paper" else 1)


def early_exit_reference(student, teacher, *temperatures):
  return sum(references.kl(one, teacher, *temperatures) for one in student)


STACK = (3, 4, 5)
CASES = {
  "released": (peers.mutual_kl, mutual_reference, (4, 5), STACK),
  "paper": (
    functools.partial(peers.mutual_kl, form="paper"),
    functools.partial(mutual_reference, form="paper"),
    (4, 5),
    STACK,
  ),
  "exits": (peers.early_exit_kl, early_exit_reference, STACK, (4, 5)),
}
each = pytest.mark.parametrize(
  ("loss", "reference", "student", "teacher"), CASES.values(), ids=CASES
)


@functools.cache
def program(loss):
  """(values, gradients by student and teacher), everything traced."""

  @jax.jit
  def run(student, teacher, temperature, teacher_temperature, where):
    def total(student, teacher):
      values = loss(
        student,
        teacher,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        where=where,
      )
      return values.sum(), values

    grads, values = jax.grad(total, (0, 1), has_aux=True)(student, teacher)
    return values, grads

  return run


ALL = np.ones(4, bool)


@each
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (3.0, 3.0), (1.5, 0.5)])
def test_values_and_both_gradients(
  loss, reference, student, teacher, temperatures
):
  student, teacher = logits(0, student), logits(1, teacher)
  values, grads = program(loss)(student, teacher, *temperatures, ALL)
  np.testing.assert_allclose(
    values, reference(student, teacher, *temperatures), rtol=1e-5
  )
  expected = (
    references.gradient(
      lambda z: reference(z, teacher, *temperatures), student
    ),
    references.gradient(
      lambda z: reference(student, z, *temperatures), teacher
    ),
  )
  for grad, right in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, right, rtol=1e-4, atol=1e-5)


@each
def test_sigma_30_and_zero_rows(loss, reference, student, teacher):
  student, teacher = logits(0, student, 30.0), logits(1, teacher, 30.0)
  student[..., 1, :] = 0.0
  teacher[..., 2, :] = 0.0
  values, grads = program(loss)(student, teacher, 1.0, 1.0, ALL)
  np.testing.assert_allclose(values, reference(student, teacher), rtol=1e-5)
  for grad in grads:
    assert np.all(np.isfinite(grad))


@each
def test_absent_classes_and_masked_examples(loss, reference, student, teacher):
  student, teacher = logits(0, student), logits(1, teacher)
  keep, where = np.array([1, 0, 1, 1, 0], bool), np.array([1, 0, 1, 1], bool)
  expected = reference(student[..., keep], teacher[..., keep], 2.0)
  student, teacher = (
    np.where(keep, z, np.float32(-np.inf)) for z in (student, teacher)
  )
  # NaN for all exits of an example, and for one peer only.
  student[..., 1, :] = np.nan
  (teacher[0] if teacher.ndim == 3 else teacher)[1] = np.nan
  values, grads = program(loss)(student, teacher, 2.0, 2.0, where)
  np.testing.assert_allclose(values, np.where(where, expected, 0), rtol=1e-5)
  for grad in grads:
    np.testing.assert_array_equal(grad[..., ~keep], 0.0)
    np.testing.assert_array_equal(grad[..., 1, :], 0.0)
    assert np.all(np.isfinite(grad))


@each
def test_equal_predictions_are_zero(loss, reference, student, teacher):
  one = logits(0)
  student, teacher = (
    np.broadcast_to(one, shape) for shape in (student, teacher)
  )
  values, grads = program(loss)(student, teacher, 2.0, 2.0, ALL)
  for array in (values, *grads):
    np.testing.assert_array_equal(array, 0.0)


def test_two_networks_need_no_form():
  student, teacher = logits(0), logits(1)
  for form in ("released", "paper"):
    loss = jax.jit(functools.partial(peers.mutual_kl, form=form))
    np.testing.assert_allclose(
      loss(student, teacher[None]), references.kl(student, teacher), rtol=1e-5
    )


@pytest.mark.parametrize("axis", [0, -2])
def test_axis_is_that_of_one_network(axis):
  student, stack = logits(0, (5, 2)), logits(1, (3, 5, 2))
  values = jax.jit(functools.partial(peers.mutual_kl, axis=axis))(
    student, stack
  )
  assert values.shape == (2,)
  expected = mutual_reference(student.T, stack.swapaxes(1, 2))
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  values = jax.jit(functools.partial(peers.early_exit_kl, axis=axis))(
    stack, student
  )
  expected = early_exit_reference(stack.swapaxes(1, 2), student.T)
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_bfloat16_is_computed_in_float32():
  student, teacher = (
    jnp.asarray(logits(i, shape), jnp.bfloat16)
    for i, shape in enumerate([(4, 5), STACK])
  )
  values = jax.jit(peers.mutual_kl)(student, teacher)
  expected = mutual_reference(np.float64(student), np.float64(teacher))
  np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4), (0, 4, 5), (1, 3, 4, 5), ()])
def test_stacks_of_another_shape(shape):
  one, stack = np.zeros((4, 5), np.float32), np.zeros(shape, np.float32)
  with pytest.raises(ValueError) as error:
    peers.mutual_kl(one, stack)
  for text in (f"teacher_logits has shape {shape}", "(4, 5)", "or more peers"):
    assert text in str(error.value)
  with pytest.raises(ValueError) as error:
    peers.early_exit_kl(stack, one)
  for text in (f"student_logits has shape {shape}", "(4, 5)", "or more exits"):
    assert text in str(error.value)


def test_form():
  with pytest.raises(ValueError, match=r"form is 'mean'.*released.*paper"):
    peers.mutual_kl(logits(0), logits(1, STACK), form="mean")
