import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import banks

KEY = jax.random.key(0)


def test_a_new_bank():
  init = jax.jit(lambda key: banks.crd_bank_init(key, 400, 8))
  bank = init(KEY)
  for rows in (bank.student, bank.teacher):
    assert rows.shape == (400, 8) and rows.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-6)
    # No direction is preferred: each coordinate has mean 0 and variance 1/8.
    assert np.abs(rows.mean(0)).max() < 4 / np.sqrt(8 * 400)
  assert np.abs((bank.student * bank.teacher).sum(1)).mean() < 0.5
  assert np.isneginf(bank.log_z_student) and np.isneginf(bank.log_z_teacher)
  again = init(KEY)
  np.testing.assert_array_equal(again.student, bank.student)


def test_negatives_are_all_the_others_alike():
  index = np.array([0, 3, 5, 3])
  draw = jax.jit(lambda index: banks.crd_negatives(KEY, index, 6000, 6))
  draws = np.asarray(draw(index))
  assert draws.shape == (4, 6000) and draws.dtype == np.int32
  for i, row in zip(index, draws, strict=True):
    counts = np.bincount(row, minlength=6)
    assert counts[i] == 0
    # 1200 of each are expected, with a deviation of 31.
    assert np.abs(np.delete(counts, i) - 1200).max() < 5 * 31


def test_negatives_of_other_classes():
  labels = np.array([2, 0, 1, 2, 0, 2, 1, 7])
  index = np.arange(8)
  draw = jax.jit(
    lambda index, labels: banks.crd_negatives(
      KEY, index, 4000, 8, labels=labels
    )
  )
  draws = np.asarray(draw(index, labels))
  for i, row in zip(index, draws, strict=True):
    counts = np.bincount(row, minlength=8)
    others = labels != labels[i]
    np.testing.assert_array_equal(counts[~others], 0)
    mean = 4000 / others.sum()
    assert np.abs(counts[others] - mean).max() < 5 * np.sqrt(mean)


def test_a_draw_belongs_to_key_and_example():
  """And not to the place in the batch."""
  draw = jax.jit(lambda key, index: banks.crd_negatives(key, index, 50, 90))
  first = np.asarray(draw(KEY, np.array([7, 2, 40])))
  np.testing.assert_array_equal(
    draw(KEY, np.array([40, 7, 2])), first[[2, 0, 1]]
  )
  other = draw(jax.random.key(1), np.array([7, 2, 40]))
  assert np.mean(other == first) < 0.1
  assert np.mean(first[0] == first[1]) < 0.1


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda: banks.crd_bank_init(KEY, 0, 3), ValueError, "n_data is 0"),
    (lambda: banks.crd_bank_init(KEY, 3, 0), ValueError, "dim is 0"),
    (lambda: negatives([0], count=0), ValueError, "count is 0"),
    (lambda: negatives([0], n_data=1), ValueError, "n_data is 1"),
    (lambda: negatives([0, 9]), ValueError, r"^index\[1\] is 9; .* 0 to 4"),
    (lambda: negatives([0.0]), TypeError, "^index has dtype float"),
    (lambda: negatives([[0]]), ValueError, r"^index has shape \(1, 1\)"),
    (lambda: negatives([0], labels=[1] * 5), ValueError, "all 1"),
    (lambda: negatives([0], labels=[1, 2]), ValueError, r"\(2,\).*\(5,\)"),
    (lambda: negatives([0], labels=[1.0] * 5), TypeError, "labels has dtype"),
  ],
)
def test_errors(call, error, message):
  with pytest.raises(error, match=message):
    call()


def negatives(index, count=2, n_data=5, labels=None):
  labels = None if labels is None else np.array(labels)
  return banks.crd_negatives(KEY, np.array(index), count, n_data, labels=labels)
