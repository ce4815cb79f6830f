"""The pure step, against hand-made optimisation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import losses, train
from kd_jax.reduce import Term


def rows(problem, index):
  return {name: jnp.asarray(x[index]) for name, x in problem.data.items()}


def plain_loss(problem, params, batch, small_weight=0.1):
  """The same loss written out, with plain means."""
  hidden = batch["x"] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
  logits = jnp.maximum(hidden, 0) @ params["Dense_1"]["kernel"]
  logits = logits + params["Dense_1"]["bias"]
  log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  nll = -log_p[jnp.arange(len(logits)), batch["label"]]
  hard = jnp.sum(nll * batch["valid"]) / jnp.sum(batch["valid"])
  return hard + small_weight * jnp.mean(jnp.sum(logits**2, -1) / 2)


def test_a_step_is_adam_on_the_written_out_loss(problem, same):
  batch = rows(problem, np.arange(16))
  params = problem.variables["params"]
  loss, grads = jax.value_and_grad(lambda p: plain_loss(problem, p, batch))(
    params
  )
  updates, _ = problem.optimizer.update(grads, problem.optimizer.init(params))
  state, metrics = jax.jit(problem.step())(problem.state(), {}, batch)
  same(state.params["model"], optax.apply_updates(params, updates))
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
  np.testing.assert_allclose(
    metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5
  )
  assert state.step == 1 and metrics["ok"] == 1 and state.skipped == 0
  assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_give_the_step_of_the_whole_batch(problem, same, parts):
  # The mask leaves a different number of valid examples in each part.
  batch = rows(problem, np.arange(0, 20)[[0, 5, 10, 15, 1, 2, 3, 4]])
  whole = jax.jit(problem.step())(problem.state(), {}, batch)
  split = jax.jit(problem.step(microbatches=parts))(problem.state(), {}, batch)
  same(split[0].params, whole[0].params)
  same(split[1], whole[1])


def test_microbatches_that_do_not_divide_are_named(problem):
  with pytest.raises(ValueError, match="microbatches is 3.*16"):
    problem.step(microbatches=3)(
      problem.state(), {}, rows(problem, np.arange(16))
    )


def test_clipping_bounds_the_update(problem):
  batch = rows(problem, np.arange(16))
  sgd = optax.sgd(1.0)
  make = lambda **options: jax.jit(
    train.make_step(problem.loss_fn, sgd, **options)
  )
  before = problem.state(sgd)
  state, metrics = make(clip_norm=0.01)(before, {}, batch)
  moved = jax.tree.map(lambda a, b: a - b, state.params, before.params)
  assert metrics["grad_norm"] > 0.01
  np.testing.assert_allclose(optax.tree.norm(moved), 0.01, rtol=1e-4)
  with pytest.raises(ValueError, match="clip_norm is 0"):
    problem.step(clip_norm=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_step_leaves_the_state_as_it_was(problem, same, bad):
  step = jax.jit(problem.step())
  good = rows(problem, np.arange(16))
  poisoned = {**good, "x": good["x"].at[1, 0].set(bad)}
  state, _ = step(problem.state(), {}, good)
  after, metrics = step(state, {}, poisoned)
  assert metrics["ok"] == 0 and after.step == 1 and after.skipped == 1
  same(after.params, state.params, exact=True)
  same(after.opt_state, state.opt_state, exact=True)
  stuck, metrics = step(after, {}, good)  # what follows no longer counts
  assert metrics["ok"] == 0 and stuck.step == 1
  same(stuck.params, state.params, exact=True)


def test_skipping_is_counted_and_capped(problem, same):
  step = jax.jit(problem.step(max_skipped=1))
  good = rows(problem, np.arange(16))
  poisoned = {**good, "x": good["x"].at[1, 0].set(jnp.nan)}
  state, metrics = step(problem.state(), {}, poisoned)
  assert metrics["ok"] == 1 and state.step == 1 and state.skipped == 1
  same(state.params, problem.state().params, exact=True)
  moved, metrics = step(state, {}, good)
  assert metrics["ok"] == 1 and moved.step == 2
  assert not np.array_equal(
    moved.params["model"]["Dense_0"]["bias"],
    state.params["model"]["Dense_0"]["bias"],
  )
  _, metrics = step(moved, {}, poisoned)
  assert metrics["ok"] == 0


def test_masked_nan_does_not_stop_a_run(problem):
  batch = rows(problem, np.arange(16))
  assert not batch["valid"][0]

  def loss_fn(params, model_state, frozen, batch, key):
    del frozen, key
    logits, where = batch["x"][:, :3], batch["valid"]
    logits += params["model"]["Dense_1"]["bias"]
    value = losses.cross_entropy(logits, batch["label"], where=where)
    return {"only": Term(value, where=where)}, train.Aux(model_state)

  step = train.make_step(loss_fn, problem.optimizer)
  batch["x"] = batch["x"].at[0].set(jnp.nan)
  _, metrics = jax.jit(step)(problem.state(), {}, batch)
  assert metrics["ok"] == 1


def test_all_masked_is_a_step_of_zero_gradient(problem):
  batch = rows(problem, np.arange(16))
  batch["valid"] = jnp.zeros(16, bool)
  frozen = {"small_weight": 0.0}
  _, metrics = jax.jit(problem.step())(problem.state(), frozen, batch)
  assert metrics["loss"] == 0 and metrics["grad_norm"] == 0


def test_frozen_is_not_differentiated_and_keys_differ_by_step(problem):
  seen = []

  def loss_fn(params, model_state, frozen, batch, key):
    noise = jax.random.normal(key, batch["x"].shape[:1])
    value = noise + 0 * params["model"]["Dense_1"]["bias"][0]
    seen.append(batch["step"])
    return {"noise": Term(value)}, train.Aux(model_state)

  step = jax.jit(train.make_step(loss_fn, problem.optimizer))
  batch = rows(problem, np.arange(16))
  state, first = step(problem.state(), {"t": jnp.ones(2)}, batch)
  again = step(problem.state(), {"t": jnp.ones(2)}, batch)[1]
  second = step(state, {"t": jnp.ones(2)}, batch)[1]
  assert first["noise"] == again["noise"] != second["noise"]
  assert seen and seen[0].shape == ()


def test_metrics_may_not_shadow_terms(problem):
  def loss_fn(params, model_state, frozen, batch, key):
    value = batch["x"][:, 0]
    return {"hard": Term(value)}, train.Aux(model_state, {"hard": value})

  step = train.make_step(loss_fn, problem.optimizer)
  with pytest.raises(ValueError, match=r"repeats the names \['hard'\]"):
    step(problem.state(), {}, rows(problem, np.arange(16)))


def test_state_does_not_alias_the_callers_arrays(problem):
  step = jax.jit(problem.step(), donate_argnums=0)
  step(problem.state(), {}, rows(problem, np.arange(16)))
  np.asarray(problem.variables["params"]["Dense_0"]["bias"])  # still there
