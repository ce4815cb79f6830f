import functools
import itertools

from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.losses import sequences
from tests import references

BATCH, CLASSES = 4, 6


def logits(seed, scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=(BATCH, CLASSES))).astype(np.float32)


def teacher_at(teacher, k, temperature=1.0):
  """(log-probabilities [batch, k], indices [batch, k]), likeliest first."""
  log_p = references.log_softmax(teacher, temperature)
  index = np.argsort(-log_p, -1)[:, :k]
  return np.take_along_axis(log_p, index, -1).astype(np.float32), index


@functools.cache
def topk_program():
  @jax.jit
  def run(student, log_p, indices, temperature, where=None):
    def total(student, log_p, temperature):
      values = sequences.topk_kl(
        student, log_p, indices=indices, temperature=temperature, where=where
      )
      return values.sum(), values

    grads, values = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(
      student, log_p, temperature
    )
    return values, grads

  return run


def topk(student, log_p, indices, temperature=1.0, where=None):
  values, grads = topk_program()(student, log_p, indices, temperature, where)
  return np.asarray(values), [np.asarray(grad) for grad in grads]


kl_program = jax.jit(
  lambda student, teacher, temperature: jax.value_and_grad(
    lambda *z: losses.kl(*z, temperature=temperature).sum(), argnums=(0, 1)
  )(student, teacher)
)


def coarse_kl(student, log_p, indices, temperature=1.0):
  """KL of the k classes and one for all others, a row at a time."""
  result = []
  for z, log_top, index in zip(student, log_p, indices, strict=True):
    q = np.exp(references.log_softmax(z, temperature))
    top = np.exp(np.asarray(log_top, np.float64))
    kl = sum(
      p * np.log(p / q[i]) for p, i in zip(top, index, strict=True) if p > 0
    )
    outside = [q[i] for i in range(len(q)) if i not in index]
    if outside:
      rest = 1 - top.sum()
      kl += rest * np.log(rest / sum(outside))
    result.append(temperature**2 * kl)
  return np.asarray(result)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_topk_matches_float64(k, temperature):
  student = logits(0)
  log_p, index = teacher_at(logits(1), k, temperature)
  values, (to_student, to_teacher, _) = topk(student, log_p, index, temperature)
  reference = functools.partial(
    coarse_kl, indices=index, temperature=temperature
  )
  # A rest of 1e-4 has few digits once the rounded probabilities are summed.
  np.testing.assert_allclose(values, reference(student, log_p), rtol=2e-5)
  np.testing.assert_allclose(
    to_student,
    references.gradient(lambda z: reference(z, log_p), student),
    atol=2e-6 * temperature,
  )
  exact = references.gradient(lambda z: reference(student, z), log_p)
  np.testing.assert_allclose(
    to_teacher, exact, rtol=1e-4, atol=1e-5 * temperature**2
  )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_topk_with_all_classes_is_kl(temperature):
  student, teacher = logits(0), logits(1)
  log_p, index = teacher_at(teacher, CLASSES, temperature)
  values, (to_student, _, _) = topk(student, log_p, index, temperature)
  np.testing.assert_allclose(
    values, references.kl(student, teacher, temperature), rtol=1e-5
  )
  _, (expected, _) = kl_program(student, teacher, temperature)
  np.testing.assert_allclose(to_student, expected, atol=2e-6 * temperature)


@given(
  st.integers(0, 10**6), st.sampled_from([1, 3, 5, 6]), st.floats(0.3, 8.0)
)
def test_topk_is_at_most_kl(seed, k, temperature):
  student, teacher = logits(seed), logits(seed + 1)
  values, _ = topk(student, *teacher_at(teacher, k, temperature), temperature)
  full = references.kl(student, teacher, temperature)
  assert np.all(values >= 0)
  assert np.all(values <= full * (1 + 1e-4) + 1e-5)


@pytest.mark.parametrize("k", [1, 3, CLASSES])
def test_topk_is_zero_at_equality(k):
  log_p, index = teacher_at(logits(0), k)
  values, (to_student, _, _) = topk(logits(0), log_p, index)
  np.testing.assert_allclose(values, 0.0, atol=1e-10)
  np.testing.assert_allclose(to_student, 0.0, atol=1e-6)
  # And nowhere else: the rest alone moves it.
  moved = logits(0)
  outside = np.ones_like(moved, bool)
  np.put_along_axis(outside, index, False, -1)
  if k < CLASSES:
    values, _ = topk(moved + 0.1 * outside, log_p, index)
    assert np.all(values > 1e-6)


def test_mass_outside_is_not_free():
  """Renormalised within the k classes, this student would cost nothing."""
  teacher = np.log([[0.6, 0.3, 0.025, 0.025, 0.025, 0.025]] * BATCH)
  log_p, index = teacher_at(teacher, 2)
  student = (teacher + 3.0 * (np.arange(CLASSES) >= 2)).astype(np.float32)
  values, (to_student, _, _) = topk(student, log_p, index)
  q = np.exp(references.log_softmax(student))
  assert np.all(values > 0.1)
  # Down with what is outside, in proportion; up with the rest. In total the
  # outside gets q_rest - p_rest, as in the full divergence.
  assert np.all(to_student[:, 2:] > 0.05) and np.all(to_student[:, :2] < 0)
  np.testing.assert_allclose(
    to_student[:, 2:].sum(-1), q[:, 2:].sum(-1) - 0.1, rtol=1e-5
  )


@pytest.mark.parametrize("excess", [1e-7, 1e-6, 1e-3, 0.02])
def test_topk_probabilities_that_round_to_more_than_one(excess):
  student = logits(0)
  log_p, index = teacher_at(logits(1, scale=8.0), 3)
  log_p += np.log1p(excess) - np.log(np.exp(log_p).sum(-1, keepdims=True))
  values, grads = topk(student, log_p.astype(np.float32), index)
  assert np.all(np.isfinite(values))
  for grad in grads:
    assert np.all(np.isfinite(grad))
  # The classes outside are then worth nothing: pushed down, never up.
  outside = np.ones_like(student, bool)
  np.put_along_axis(outside, index, False, -1)
  assert np.all(grads[0][outside] >= 0)


def test_topk_refuses_what_are_no_log_probabilities():
  student, (log_p, index) = logits(0), teacher_at(logits(1), 3)
  log_p[1] += 1.0  # for example not normalised
  log_p[2, 0] = 200.0
  values, _ = topk(student, log_p, index)
  np.testing.assert_array_equal(np.isnan(values), [False, True, True, False])
  where = np.array([True, False, False, True])
  values, grads = topk(student, log_p, index, where=where)
  for array in (values, *grads):
    assert np.all(np.isfinite(array))


def test_topk_small_rests_keep_their_digits():
  """1 - p from a log-probability of -1e-9 is 1e-9, not 0."""
  rest = np.array([1e-3, 1e-6, 1e-9, 1e-12])
  log_p = np.log1p(-rest)[:, None].astype(np.float32)
  student = np.zeros((BATCH, CLASSES), np.float32)
  student[:, 0] = -np.log(rest) - np.log(100)  # gives about 500 times the rest
  index = np.zeros((BATCH, 1), int)
  values, (to_student, _, _) = topk(student, log_p, index)
  q_rest = np.exp(references.log_softmax(student)[:, 1:]).sum(-1)
  np.testing.assert_allclose(to_student[:, 0], rest - q_rest, rtol=1e-5)
  # KL of two classes, without its cancellation: q - p - p log(q / p) dominates.
  exact = q_rest - rest - rest * np.log(q_rest / rest)
  np.testing.assert_allclose(values[1:], exact[1:], rtol=1e-3)


def test_topk_absent_classes():
  student, teacher = logits(0), logits(1)
  keep = np.array([1, 1, 0, 1, 0, 1], bool)
  student[:, ~keep] = teacher[:, ~keep] = -np.inf
  with np.errstate(divide="ignore"):
    log_p, index = teacher_at(teacher, 3)
  values, grads = topk(student, log_p, index)
  order = np.cumsum(keep) - 1
  expected = coarse_kl(student[:, keep], log_p, order[index])
  np.testing.assert_allclose(values, expected, rtol=2e-5)
  np.testing.assert_array_equal(grads[0][:, ~keep], 0.0)
  # All that exist are named: nothing is left outside.
  log_p, index = teacher_at(teacher, 5)
  assert np.all(np.isinf(log_p[:, 4]))
  values, grads = topk(student, log_p, index)
  np.testing.assert_allclose(
    values, references.kl(student[:, keep], teacher[:, keep]), rtol=1e-5
  )
  for grad in grads:
    assert np.all(np.isfinite(grad))
  # Only the student rules a likely class out.
  student[0, index[0, 0]] = -np.inf
  values, grads = topk(student, log_p, index)
  assert values[0] > 1e3
  for array in (values, *grads):
    assert np.all(np.isfinite(array))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_topk_harsh_inputs(dtype):
  student = jnp.asarray(logits(0, scale=30.0), dtype)
  log_p, index = teacher_at(logits(1, scale=30.0), 3)
  log_p = jnp.asarray(log_p, dtype)
  values, grads = topk(student, log_p, index)
  # Of the other examples, rounding has left no rest to compare with.
  whole = np.exp(np.asarray(log_p, np.float64)).sum(-1) < 1
  assert whole.any()
  expected = coarse_kl(
    np.asarray(student, np.float64)[whole], log_p[whole], index[whole]
  )
  np.testing.assert_allclose(values[whole], expected, rtol=1e-3)
  assert np.all(np.isfinite(values)) and values.dtype == np.float32
  for grad in grads[:2]:
    assert grad.dtype == dtype
    assert np.all(np.isfinite(grad.astype(np.float32)))


def test_topk_gradient_of_the_temperature():
  student, (log_p, index) = logits(0), teacher_at(logits(1), 3, 2.0)
  _, (_, _, slope) = topk(student, log_p, index, 2.0)
  step = 1e-4
  sides = [
    coarse_kl(student, log_p, index, 2.0 + s).sum() for s in (step, -step)
  ]
  np.testing.assert_allclose(slope, (sides[0] - sides[1]) / 2 / step, rtol=1e-4)


# Importance samples


@functools.cache
def sampled_program():
  @jax.jit
  def run(student, log_p, indices, weights, temperature, where=None):
    def total(student, log_p, weights):
      values = sequences.sampled_kl(
        student,
        log_p,
        indices=indices,
        weights=weights,
        temperature=temperature,
        where=where,
      )
      return values.sum(), values

    grads, values = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(
      student, log_p, weights
    )
    return values, grads

  return run


def all_draws(teacher, proposal, draws, temperature):
  """Every tuple of classes, its probability, and what would be stored of it."""
  log_p = references.log_softmax(teacher, temperature)
  tuples = np.array(list(itertools.product(range(len(teacher)), repeat=draws)))
  chance = np.exp(proposal[tuples].sum(-1))
  weights = np.exp(log_p[tuples] - proposal[tuples]) / draws
  return tuples, chance, log_p[tuples], weights


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_sampled_is_unbiased(power, temperature):
  """Value and gradient, over all 3^3 draws from r = p^power / sum."""
  student, teacher = logits(0)[0, :3], logits(1)[0, :3]
  proposal = references.log_softmax(teacher / temperature * power)
  tuples, chance, log_p, weights = all_draws(teacher, proposal, 3, temperature)
  np.testing.assert_allclose(chance.sum(), 1.0)
  many = np.tile(student, (len(tuples), 1))
  values, (to_student, _, _) = sampled_program()(
    many, log_p, tuples, weights, temperature
  )
  np.testing.assert_allclose(
    chance @ values, references.kl(student, teacher, temperature), rtol=1e-5
  )
  p, q = (
    np.exp(references.log_softmax(z, temperature)) for z in (teacher, student)
  )
  np.testing.assert_allclose(
    chance @ np.asarray(to_student), temperature * (q - p), atol=1e-6
  )
  # What dividing the weights by their sum does: nothing for r = p, else a bias.
  normalised = weights / weights.sum(-1, keepdims=True)
  _, (to_student, _, _) = sampled_program()(
    many, log_p, tuples, normalised, temperature
  )
  bias = np.abs(chance @ np.asarray(to_student) - temperature * (q - p)).max()
  assert bias < 1e-6 if power == 1.0 else bias > 1e-3


def draws(seed, n=3):
  rng = np.random.default_rng(seed)
  log_p, index = teacher_at(logits(seed), CLASSES)
  picks = rng.integers(CLASSES, size=(BATCH, n))
  return (
    np.take_along_axis(log_p, picks, -1),
    np.take_along_axis(index, picks, -1),
    rng.uniform(0.1, 1.0, size=(BATCH, n)).astype(np.float32),
  )


@pytest.mark.parametrize("scale", [2.0, 30.0])
def test_sampled_matches_float64(scale):
  student = logits(5, scale)
  log_p, index, weights = draws(1)

  def reference(student, log_p, weights):
    log_q = references.log_softmax(student, 2.0)
    return 4 * np.array(
      [
        sum(w * (a - row[i]) for w, a, i in zip(*of_row, strict=True))
        for row, *of_row in zip(log_q, weights, log_p, index, strict=True)
      ]
    )

  values, grads = sampled_program()(student, log_p, index, weights, 2.0)
  np.testing.assert_allclose(
    values, reference(student, log_p, weights), rtol=1e-5
  )
  arguments = [student, log_p, weights]
  for i, grad in enumerate(grads):
    moved = lambda x, i=i: reference(*arguments[:i], x, *arguments[i + 1 :])
    np.testing.assert_allclose(
      grad, references.gradient(moved, arguments[i]), rtol=1e-4, atol=1e-5
    )


def test_sampled_is_zero_at_equality_whatever_was_drawn():
  log_p, index, weights = draws(1)
  values, _ = sampled_program()(logits(1), log_p, index, weights, 1.0)
  np.testing.assert_allclose(values, 0.0, atol=1e-5)
  values, _ = sampled_program()(logits(0), log_p, index, weights, 1.0)
  assert np.any(values < -0.1)  # a single draw may be, its mean may not


def test_sampled_counts_may_be_merged_and_padded():
  log_p, index, weights = draws(1)
  index[:, 1], log_p[:, 1] = index[:, 0], log_p[:, 0]
  expected, _ = sampled_program()(logits(0), log_p, index, weights, 1.0)
  weights[:, 0] += weights[:, 1]
  weights[:, 1], index[:, 1], log_p[:, 1] = 0.0, 0, -np.inf
  values, grads = sampled_program()(logits(0), log_p, index, weights, 1.0)
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
  for grad in grads:
    assert np.all(np.isfinite(grad))


def test_sampled_absent_classes():
  log_p, index, weights = draws(1)
  student = logits(0)
  student[0, index[0, 0]] = -np.inf
  values, grads = sampled_program()(student, log_p, index, weights, 1.0)
  assert values[0] > 1e3
  for array in (values, *grads):
    assert np.all(np.isfinite(array))


# Both


def topk_call(log_p, index, compiled=True):
  """The loss of student logits; the teacher's arrays are seen by it."""
  call = functools.partial(
    sequences.topk_kl, teacher_log_probs=log_p, indices=index
  )
  return jax.jit(call) if compiled else call


def sampled_call(log_p, index, compiled=True):
  call = functools.partial(
    sequences.sampled_kl,
    teacher_log_probs=log_p,
    indices=index,
    weights=np.ones_like(log_p),
  )
  return jax.jit(call) if compiled else call


both = pytest.mark.parametrize("call", [topk_call, sampled_call])


@both
@pytest.mark.parametrize("wrong", [-1, CLASSES, 2**40])
def test_indices_that_are_no_classes(call, wrong):
  student, (log_p, index) = logits(0), teacher_at(logits(1), 3)
  index[1, 2] = wrong
  with pytest.raises(ValueError, match=rf"indices holds {wrong}; .* 0 to 5"):
    call(log_p, index)(student)
  with pytest.raises(ValueError, match=rf"indices holds {wrong}"):
    call(log_p, index, compiled=False)(student)
  where = np.arange(BATCH) != 1
  values = call(log_p, index, compiled=False)(student, where=where)
  assert np.all(np.isfinite(values))
  # Not seen while tracing, they show in the loss, of their example alone.
  index[1, 2] = min(wrong, CLASSES)
  values = jax.jit(lambda index: call(log_p, index)(student))(index)
  np.testing.assert_array_equal(np.isnan(values), ~where)


def test_repeated_indices():
  student, (log_p, index) = logits(0), teacher_at(logits(1), 3)
  index[1, 2] = index[1, 0]
  with pytest.raises(ValueError, match=rf"indices holds {index[1, 0]} twice"):
    sequences.topk_kl(student, log_p, indices=index)
  values, _ = topk(student, log_p, index)
  np.testing.assert_array_equal(np.isnan(values), np.arange(BATCH) == 1)


@both
def test_leading_axes_and_masks_of_tokens(call):
  student, (log_p, index) = logits(0), teacher_at(logits(1), 3)
  expected = np.asarray(call(log_p, index)(student))
  tokens = lambda x: x.reshape(2, 2, -1)
  where = np.array([[True, False], [True, True]])
  student[1] = np.nan
  log_p[1] = np.nan
  index[1] = -100
  values = call(tokens(log_p), tokens(index))(tokens(student), where=where)
  np.testing.assert_allclose(
    values, np.where(where, expected.reshape(2, 2), 0), rtol=1e-6
  )
  # One token without any axis of a batch.
  np.testing.assert_allclose(
    call(log_p[0], index[0])(student[0]), expected[0], rtol=1e-6
  )


@both
def test_wrong_kinds_and_shapes(call):
  student, (log_p, index) = logits(0), teacher_at(logits(1), 3)
  with pytest.raises(TypeError, match="indices has dtype float"):
    call(log_p, index.astype(np.float32))(student)
  for wrong in (index[:2], index[:, :2], index[0], index[:, :0]):
    with pytest.raises(ValueError, match=r"indices has shape"):
      call(log_p, wrong)(student)


def test_more_indices_than_classes():
  index = np.zeros((BATCH, CLASSES + 1), int)
  log_p = np.full(index.shape, -3.0, np.float32)
  with pytest.raises(ValueError, match=r"indices has shape \(4, 7\)"):
    sequences.topk_kl(logits(0), log_p, indices=index)
  assert np.all(np.isfinite(sampled_call(log_p, index)(logits(0))))
