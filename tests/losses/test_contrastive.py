import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import banks
from kd_jax.losses import contrastive
from tests import references
from tests.losses.relational import embeddings

# One size for all, to be one program per form.
BATCH, DIM, N, K = 4, 3, 9, 5
INDEX = np.array([2, 7, 0, 5])
NEGATIVES = np.random.default_rng(9).integers(N, size=(BATCH, K))
UNSET = -np.inf

each_form = pytest.mark.parametrize("form", ["released", "paper"])


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def new_bank(log_z_student=1.5, log_z_teacher=2.5):
  student, teacher = (unit(embeddings(i, (N, DIM))) for i in (5, 6))
  return banks.CRDBank(
    jnp.asarray(student),
    jnp.asarray(teacher),
    jnp.float32(log_z_student),
    jnp.float32(log_z_teacher),
  )


def scores(x, rows, index, negatives, temperature):
  """exp(<x, row> / T), the positive first."""
  return np.exp(
    [
      [unit(x[n]) @ rows[i] / temperature for i in (index[n], *negatives[n])]
      for n in range(len(x))
    ]
  )


def reference(
  student,
  teacher,
  bank,
  index=INDEX,
  negatives=NEGATIVES,
  temperature=0.5,
  form="released",
):
  """With h as in the paper, in float64."""
  values = np.zeros(len(student))
  for x, rows, log_z in (
    (student, bank.teacher, bank.log_z_student),
    (teacher, bank.student, bank.log_z_teacher),
  ):
    e = scores(x, np.float64(rows), index, negatives, temperature)
    z = np.exp(np.float64(log_z)) if form == "released" else 1.0
    h = (e / z) / (e / z + negatives.shape[1] / N)
    values -= np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)
  return values


@functools.cache
def program(form, axis_name=None):
  def run(student, teacher, bank, index, negatives, where, temperature):
    def total(student, teacher, bank):
      values, new = contrastive.crd(
        student,
        teacher,
        bank=bank,
        index=index,
        negatives=negatives,
        temperature=temperature,
        momentum=0.25,
        form=form,
        axis_name=axis_name,
        where=where,
      )
      # A gradient that came back from the new bank would be seen.
      return values.sum() + new.student.sum() + new.teacher.sum(), (values, new)

    grads, (values, new) = jax.grad(total, (0, 1, 2), has_aux=True)(
      student, teacher, bank
    )
    return values, grads, new

  if axis_name is None:
    return jax.jit(run)
  axes = (0, 0, None, 0, 0, 0, None)
  return jax.pmap(run, axis_name=axis_name, in_axes=axes)


def run(
  student,
  teacher,
  bank,
  index=INDEX,
  negatives=NEGATIVES,
  where=None,
  *,
  temperature=0.5,
  form="released",
):
  if where is None:
    where = np.ones(len(student), bool)
  return program(form)(
    student, teacher, bank, index, negatives, where, temperature
  )


def batch():
  return embeddings(0, (BATCH, DIM), 3.0), embeddings(1, (BATCH, DIM))


@each_form
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_values_and_both_gradients_match_float64(form, temperature):
  student, teacher = batch()
  bank = new_bank()
  options = {"form": form, "temperature": temperature}
  values, grads, _ = run(student, teacher, bank, **options)
  s, t = np.float64(student), np.float64(teacher)
  np.testing.assert_allclose(
    values, reference(s, t, bank, **options), rtol=1e-5
  )
  wanted = (
    references.gradient(lambda x: reference(x, t, bank, **options), s),
    references.gradient(lambda x: reference(s, x, bank, **options), t),
  )
  for grad, want in zip(grads[:2], wanted, strict=True):
    np.testing.assert_allclose(grad, want, atol=2e-5 * np.abs(want).max())


def test_the_bank_gets_no_gradient():
  _, grads, _ = run(*batch(), new_bank())
  for grad in grads[2]:
    np.testing.assert_array_equal(grad, 0.0)


def test_z_is_estimated_once():
  """M times the mean score, positives included, in each direction."""
  student, teacher = batch()
  bank = new_bank(UNSET, UNSET)
  values, grads, new = run(student, teacher, bank)
  z = [
    N * scores(x, np.float64(rows), INDEX, NEGATIVES, 0.5).mean()
    for x, rows in ((student, bank.teacher), (teacher, bank.student))
  ]
  np.testing.assert_allclose(new.log_z_student, np.log(z[0]), rtol=1e-5)
  np.testing.assert_allclose(new.log_z_teacher, np.log(z[1]), rtol=1e-5)
  # The first step uses it as well, as a constant.
  known = bank._replace(
    log_z_student=new.log_z_student, log_z_teacher=new.log_z_teacher
  )
  again, same_grads, kept = run(student, teacher, known)
  np.testing.assert_allclose(values, again, rtol=1e-6)
  np.testing.assert_allclose(grads[0], same_grads[0], atol=1e-6)
  # Later steps keep it.
  _, _, kept = run(2 * student[::-1], teacher, new)
  np.testing.assert_array_equal(kept.log_z_student, new.log_z_student)
  # The paper has none.
  _, _, kept = run(student, teacher, bank, form="paper")
  assert np.isneginf(kept.log_z_student) and np.isneginf(kept.log_z_teacher)
  np.testing.assert_allclose(
    run(student, teacher, new_bank(0.0, 0.0))[0],
    run(student, teacher, bank, form="paper")[0],
    rtol=1e-6,
  )


def test_at_random_h_tells_nothing():
  """All scores equal: with Z estimated, h is 1 / (1 + K) for every pair."""
  same = np.tile(np.float32([1, 0, 0]), (N, 1))
  bank = banks.CRDBank(same, same, jnp.float32(UNSET), jnp.float32(UNSET))
  values, _, _ = run(same[:BATCH], same[:BATCH], bank)
  h = 1 / (1 + K)
  expected = -2 * (np.log(h) + K * np.log(1 - h))
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_the_new_bank():
  student, teacher = batch()
  bank = new_bank()
  _, _, new = run(student, teacher, bank)
  for rows, old, x in (
    (new.student, bank.student, student),
    (new.teacher, bank.teacher, teacher),
  ):
    expected = np.array(old)
    for n, i in enumerate(INDEX):
      expected[i] = unit(0.25 * expected[i] + 0.75 * unit(x[n]))
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    untouched = np.delete(np.arange(N), INDEX)
    np.testing.assert_array_equal(rows[untouched], old[untouched])


def test_an_example_twice_in_a_batch():
  student, teacher = batch()
  index = np.array([2, 7, 2, 5])
  bank = new_bank()
  _, _, new = run(student, teacher, bank, index)
  mean = (unit(student[0]) + unit(student[2])) / 2
  expected = unit(0.25 * np.asarray(bank.student[2]) + 0.75 * mean)
  np.testing.assert_allclose(new.student[2], expected, atol=1e-6)
  np.testing.assert_array_equal(new.student[0], bank.student[0])


@pytest.mark.parametrize("log_z", [1.5, UNSET])
def test_masked_examples_do_not_touch_the_bank(log_z):
  student, teacher = batch()
  where = np.array([True, False, True, False])
  kept_index = INDEX[where]
  # Padding that names another's row, and none at all.
  index, negatives = INDEX.copy(), NEGATIVES.copy()
  index[~where], negatives[~where] = [INDEX[0], -100], 10**6
  student[~where], teacher[~where] = np.nan, np.inf
  bank = new_bank(log_z, log_z)
  values, grads, new = run(student, teacher, bank, index, negatives, where)
  s, t = np.float64(student)[where], np.float64(teacher)[where]
  options = {"index": index[where], "negatives": negatives[where]}
  if log_z == UNSET:
    z = [
      N * scores(x, np.float64(rows), *options.values(), 0.5).mean()
      for x, rows in ((s, bank.teacher), (t, bank.student))
    ]
    bank = new_bank(*np.log(z))
  expected = reference(s, t, bank, **options)
  np.testing.assert_array_equal(values[~where], 0.0)
  np.testing.assert_allclose(values[where], expected, rtol=1e-5)
  want = references.gradient(lambda x: reference(x, t, bank, **options), s)
  np.testing.assert_array_equal(grads[0][~where], 0.0)
  np.testing.assert_allclose(grads[0][where], want, rtol=1e-4, atol=1e-5)
  rows = np.array(bank.student)
  rows[kept_index] = unit(0.25 * rows[kept_index] + 0.75 * unit(s))
  np.testing.assert_allclose(new.student, rows, atol=1e-6)
  np.testing.assert_allclose(new[2:], bank[2:], rtol=1e-5)
  # Nobody is there: nothing is learned and nothing is written.
  values, grads, new = run(
    student, teacher, bank, index, negatives, np.zeros(BATCH, bool)
  )
  for array in (values, *grads[:2]):
    np.testing.assert_array_equal(array, 0.0)
  for got, want in zip(new, bank, strict=True):
    np.testing.assert_array_equal(got, want)


def test_four_devices_are_one():
  """The same values, gradients, and new bank everywhere."""
  student, teacher = batch()
  where = np.array([True, True, False, True])
  bank = new_bank(UNSET, 2.5)
  index = np.array([2, 7, 0, 7])  # twice the same, on two devices
  values, grads, new = run(student, teacher, bank, index, NEGATIVES, where)
  parts = [x[:, None] for x in (student, teacher, index, NEGATIVES, where)]
  several = program("released", "i")(*parts[:2], bank, *parts[2:], 0.5)
  np.testing.assert_allclose(several[0][:, 0], values, rtol=1e-5)
  for got, want in zip(several[1][:2], grads[:2], strict=True):
    np.testing.assert_allclose(got[:, 0], want, rtol=1e-4, atol=1e-6)
  for got, want in zip(several[2], new, strict=True):
    for device in range(BATCH):
      np.testing.assert_allclose(got[device], want, rtol=1e-6)


@each_form
def test_harsh_embeddings(form):
  student, teacher = batch()
  for scale in (0.0, 1e-30, 1e4):
    for temperature in (1e-3, 0.07, 1e3):
      for bank in (new_bank(), new_bank(UNSET, UNSET)):
        values, grads, new = run(
          scale * student, teacher, bank, temperature=temperature, form=form
        )
        for array in (values, *grads[:2], *new[:2]):
          assert np.all(np.isfinite(array))
  student[1, 0] = np.nan
  values, _, _ = run(student, teacher, new_bank(), form=form)
  assert np.isnan(values).tolist() == [False, True, False, False]


def test_training_brings_student_and_teacher_together():
  """Gradient descent on embeddings, with the bank of each step."""
  student, teacher = batch()
  bank = new_bank(UNSET, UNSET)
  others = np.setdiff1d(np.arange(N), INDEX)
  cosine = lambda x: (unit(np.asarray(x)) * unit(teacher)).sum(1).mean()
  assert cosine(student) < 0.4
  for _ in range(40):
    _, grads, bank = run(
      student, teacher, bank, negatives=np.tile(others, (BATCH, 1))
    )
    student = student - 0.5 * np.asarray(grads[0])
  assert cosine(student) > 0.7


def test_numbers_that_are_no_rows():
  student, teacher = batch()
  bank = new_bank()
  for index, negatives, message in (
    (
      [2, 9, 0, 5],
      NEGATIVES,
      r"^index\[1\] is 9; .* 0 to 8, as the bank has 9",
    ),
    (INDEX, NEGATIVES - 9, r"^negatives\[0, 0\] is -\d; .* 0 to 8"),
  ):
    with pytest.raises(ValueError, match=message):
      contrastive.crd(
        student, teacher, bank=bank, index=np.array(index), negatives=negatives
      )
  negatives = NEGATIVES.copy()
  negatives[2, 1] = N
  values, _, new = run(
    student, teacher, bank, np.array([2, 9, 0, 5]), negatives
  )
  assert np.isnan(values).tolist() == [False, True, True, False]
  # The unknown row is not written, the example with wrong negatives is.
  np.testing.assert_array_equal(new.student[8], bank.student[8])
  assert np.all(new.student[0] != bank.student[0])


def test_arguments():
  student, teacher = batch()
  right = {"bank": new_bank(), "index": INDEX, "negatives": NEGATIVES}
  flat = right["bank"]._replace(teacher=jnp.ones((N, 2)))
  whole = right["bank"]._replace(student=jnp.ones((N, DIM), int))
  for wrong, error, message in (
    ({"bank": flat}, ValueError, r"^bank.teacher has shape \(9, 2\).*\[n_data"),
    ({"bank": whole}, TypeError, "^bank.student has dtype int"),
    ({"index": INDEX[:3]}, ValueError, r"^index has shape \(3,\).*\(4,\)"),
    ({"index": INDEX * 1.0}, TypeError, "^index has dtype float"),
    (
      {"negatives": INDEX},
      ValueError,
      r"^negatives has shape \(4,\).*\(4, K\)",
    ),
    ({"temperature": 0.0}, ValueError, "^temperature is 0.0"),
    ({"momentum": 1.5}, ValueError, "^momentum is 1.5; .* from 0 to 1"),
    ({"form": "mean"}, ValueError, "^form is 'mean'"),
  ):
    with pytest.raises(error, match=message):
      contrastive.crd(student, teacher, **(right | wrong))
