"""One device, 8 simulated devices, jit and pmap: the same numbers."""

import jax
import numpy as np
import pytest

from kd_jax import train


@pytest.fixture(scope="module")
def alone(problem):
  return problem.fit()


@pytest.mark.parametrize(
  "how,devices,per_call,parts",
  [
    ("jit", 8, 1, 1),
    ("jit", 4, 5, 2),
    ("pmap", 8, 1, 1),
    ("pmap", 4, 5, 2),
  ],
)
def test_devices_agree(problem, same, alone, how, devices, per_call, parts):
  state = problem.fit(
    problem.step(microbatches=parts),
    how=how,
    devices=devices,
    per_call=per_call,
  )
  assert state.step == alone.step == 12
  same(state.params, alone.params)
  same(state.opt_state, alone.opt_state)


def test_a_scanned_call_is_bit_equal_to_single_steps(problem, same, alone):
  same(problem.fit(per_call=5).params, alone.params, exact=True)


@pytest.mark.parametrize("how", ["jit", "pmap"])
def test_metrics_are_those_of_the_global_batch(problem, how, tmp_path):
  runner = train.compile(
    train.gather_batch(problem.step()), how=how, devices=jax.devices()
  )
  one = train.compile(
    train.gather_batch(problem.step()), devices=jax.devices()[:1]
  )
  batch = problem.batches()(0)
  found = []
  for r in (runner, one):
    state = r.replicate(problem.state())
    frozen = r.replicate({"data": problem.data})
    found.append(r(state, frozen, r.shard(batch))[1])
  for name in found[1]:
    np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)
    assert np.shape(found[0][name]) == ()


def test_one_all_reduce_per_step_and_no_gather_of_parameters(problem):
  runner = train.compile(train.gather_batch(problem.step()))
  state = runner.replicate(problem.state())
  frozen = runner.replicate({"data": problem.data})
  batch = runner.shard(problem.batches()(0))
  text = runner._run.lower(state, frozen, batch).compile().as_text()
  assert "all-reduce" in text
  assert "all-gather" not in text


def test_unreplicate_inverts_replicate(problem, same):
  for how in ("jit", "pmap"):
    runner = train.compile(problem.step(), how=how)
    state = problem.state()
    back = runner.unreplicate(runner.replicate(state))
    same(back.params, state.params, exact=True)
    assert jax.random.key_data(back.key).tolist() == [0, 1]


def test_bad_settings_are_named(problem):
  with pytest.raises(ValueError, match="how is 'threads'"):
    train.compile(problem.step(), how="threads")
  with pytest.raises(ValueError, match="steps_per_call is 0"):
    train.compile(problem.step(), steps_per_call=0)
  runner = train.compile(problem.step())
  with pytest.raises(ValueError, match="is 12;.* 8: .* 8 and 16"):
    runner.shard({"x": np.zeros((12, 2))})
