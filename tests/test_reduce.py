"""Terms, masked global means, schedules."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import reduce
from kd_jax.reduce import Term


@hypothesis.given(
  st.lists(
    st.tuples(st.floats(-1e3, 1e3, width=32), st.booleans()),
    min_size=1,
    max_size=9,
  )
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_masked_mean_is_the_mean_of_the_valid(pairs):
  value = np.array([v for v, _ in pairs], np.float32)
  where = np.array([w for _, w in pairs])
  want = np.mean(value[where], dtype=np.float64) if where.any() else 0.0
  got = reduce.masked_mean(jnp.array(value), jnp.array(where))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_masked_nan_reaches_neither_value_nor_gradient():
  value = jnp.array([1.0, jnp.nan, 4.0])
  where = jnp.array([True, False, True])
  loss, grad = jax.value_and_grad(reduce.masked_mean)(value, where)
  assert loss == 2.5
  np.testing.assert_array_equal(grad, [0.5, 0.0, 0.5])


def test_all_masked_is_zero_with_zero_gradient():
  value, where = jnp.full(3, jnp.inf), jnp.zeros(3, bool)
  loss, grad = jax.value_and_grad(reduce.masked_mean)(value, where)
  assert loss == 0.0
  np.testing.assert_array_equal(grad, 0.0)


def test_global_mean_is_not_the_mean_of_local_means():
  value = np.arange(16, dtype=np.float32).reshape(8, 2)
  where = np.arange(16).reshape(8, 2) % 3 == 0
  mapped = jax.pmap(
    lambda v, w: reduce.masked_mean(v, w, axis_name="i"), axis_name="i"
  )(value, where)
  np.testing.assert_allclose(mapped, value[where].mean(), rtol=1e-6)
  rows = zip(value, where, strict=True)
  local = np.mean([v[w].mean() if w.any() else 0 for v, w in rows])
  assert abs(local - value[where].mean()) > 0.1


def test_total_weighs_means_that_have_their_own_counts():
  terms = {
    "a": Term(jnp.array([1.0, 3.0]), weight=2.0),
    "b": Term(jnp.array([5.0, 7.0]), where=jnp.array([False, True])),
  }
  loss, means = reduce.total(terms)
  assert loss == 2.0 * 2.0 + 7.0
  assert {k: float(v) for k, v in means.items()} == {"a": 2.0, "b": 7.0}


def test_a_sum_with_a_count_is_the_mean_of_its_entries():
  value = np.arange(16, dtype=np.float32).reshape(8, 2)
  where = np.arange(16).reshape(8, 2) % 3 == 0

  def means(value, where):
    sums = Term(jnp.sum(jnp.where(where, value, 0)), count=where.sum())
    terms = {"entries": Term(value, where=where), "sum": sums}
    return reduce.total(terms, axis_name="i")

  loss, found = jax.vmap(means, axis_name="i")(value, where)
  np.testing.assert_allclose(found["sum"], value[where].mean(), rtol=1e-6)
  np.testing.assert_allclose(found["sum"], found["entries"], rtol=1e-6)
  np.testing.assert_allclose(loss, 2 * value[where].mean(), rtol=1e-6)


def test_counts_may_be_none_at_all_or_sums_of_small_weights():
  mean = lambda total, count: reduce.divide(
    *reduce.sum_and_count(jnp.float32(total), count=count)
  )
  assert mean(1.0, 0.25) == 4.0
  assert jnp.isnan(mean(1.0, jnp.nan))  # not hidden behind a 0
  value, grad = jax.value_and_grad(mean)(3.0, 0)
  assert value == grad == 0.0


def test_wrong_terms_are_named():
  for wrong, count in ((jnp.zeros(3), 3), (jnp.zeros(()), jnp.ones(3))):
    with pytest.raises(ValueError, match=r"has shape \(3,\); with a count"):
      reduce.sum_and_count(wrong, count=count)
  with pytest.raises(ValueError, match="count and where"):
    reduce.sum_and_count(jnp.zeros(()), jnp.ones((), bool), 1)
  with pytest.raises(ValueError, match="terms is empty"):
    reduce.total({})
  with pytest.raises(ValueError, match=r"where has shape \(2,\).*\(3,\)"):
    reduce.sum_and_count(jnp.zeros(3), jnp.zeros(2, bool))
  with pytest.raises(TypeError, match="where has dtype float32"):
    reduce.sum_and_count(jnp.zeros(3), jnp.zeros(3))
  with pytest.raises(TypeError, match="value has dtype int32"):
    reduce.sum_and_count(jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize("schedule", [reduce.linear, reduce.cosine])
def test_schedules_meet_their_ends_and_stay(schedule):
  at = lambda step: float(schedule(step, 3.0, 1.0, steps=10, begin=5))
  assert at(0) == at(5) == 3.0
  assert at(15) == at(99) == 1.0
  assert at(10) == pytest.approx(2.0)
  values = [at(step) for step in range(5, 16)]
  assert values == sorted(values, reverse=True)
  traced = jax.jit(lambda s: schedule(s, 3.0, 1.0, steps=10, begin=5))
  assert float(traced(jnp.int32(7))) == pytest.approx(at(7))
  with pytest.raises(ValueError, match="steps is 0"):
    schedule(0, 1.0, 0.0, steps=0)
