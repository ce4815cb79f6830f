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


@pytest.mark.parametrize("parts", [1, 2])
def test_a_sum_over_tokens_is_a_mean_over_all_of_them(same, parts):
  """On two devices; each part of the batch has another number of tokens."""
  rng = np.random.default_rng(0)
  params = {
    "student": {
      "body": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
      "head": jnp.asarray(rng.normal(size=(3, 7)), jnp.float32),
    }
  }
  frozen = {"head": jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)}
  batch = {
    "x": jnp.asarray(rng.normal(size=(8, 5, 4)), jnp.float32),
    "valid": np.arange(5) < np.array([5, 1, 2, 0, 3, 1, 4, 5])[:, None],
  }
  optimizer = optax.sgd(0.1)

  def step(per_token, **options):
    def loss_fn(params, model_state, frozen, batch, key):
      where = batch["valid"]
      kind = "linear_divergence" if per_token else "linear_divergence_sum"
      value = getattr(losses, kind)(
        batch["x"] @ params["student"]["body"],
        params["student"]["head"],
        *(batch["x"], frozen["head"]),
        divergence=losses.logit_mse,
        chunk_size=3,
        where=where,
      )
      known = {"where": where} if per_token else {"count": where.sum()}
      return {"soft": Term(value, weight=0.5, **known)}, train.Aux(model_state)

    return train.make_step(loss_fn, optimizer, **options)

  state = train.init_state(params, optimizer, jax.random.key(0))
  whole, expected = jax.jit(step(True))(state, frozen, batch)
  divided = jax.tree.map(lambda x: jnp.reshape(x, (2, 4, *x.shape[1:])), batch)
  moved, metrics = jax.jit(
    jax.vmap(
      lambda batch: step(False, microbatches=parts)(
        state, frozen, batch, axis_name="i"
      ),
      axis_name="i",
    )
  )(divided)
  on_both = jax.tree.map(lambda x: jnp.stack([x, x]), (whole.params, expected))
  same((moved.params, metrics), on_both)


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


class TestInTurn:
  """Two steps on one batch, counted as one."""

  def steps(self, problem, poison=False):
    def second(params, model_state, frozen, batch, key):
      terms, aux = problem.loss_fn(params, model_state, frozen, batch, key)
      if poison:
        terms["hard"] = Term(terms["hard"].value * jnp.nan)
      return terms, aux

    return [
      train.make_step(problem.loss_fn, problem.optimizer),
      train.make_step(second, problem.optimizer),
    ]

  def test_the_second_sees_what_the_first_has_done(self, problem, same):
    batch = rows(problem, np.arange(16))
    first, second = self.steps(problem)
    state, metrics = jax.jit(train.in_turn([first, second]))(
      problem.state(), {}, batch
    )
    one, found = jax.jit(first)(problem.state(), {}, batch)
    two, more = jax.jit(second)(one.replace(step=jnp.int32(0)), {}, batch)
    same(state.params, two.params)
    assert state.step == 1 and metrics["ok"] == 1
    for name in ("loss", "hard"):
      np.testing.assert_allclose(
        metrics[name], found[name] + more[name], rtol=1e-5
      )

  def test_none_is_made_if_one_is_not_finite(self, problem, same):
    batch = rows(problem, np.arange(16))
    step = train.in_turn(self.steps(problem, poison=True))
    start = problem.state()
    state, metrics = jax.jit(step)(start, {}, batch)
    same(state.params, start.params, exact=True)
    same(state.opt_state, start.opt_state, exact=True)
    assert state.step == 0 and state.skipped == 1 and metrics["ok"] == 0
    again, _ = jax.jit(step)(state, {}, batch)
    same(again.params, start.params, exact=True)
    leaves, found = jax.jit(step.bad_leaves)(start, {}, batch)
    assert not all(jax.tree.leaves(leaves)) and np.isnan(found["hard"])

  def test_there_is_a_step(self):
    with pytest.raises(ValueError, match="steps is empty"):
      train.in_turn([])


class TestExtras:
  """What is carried beside the parameters."""

  def run(self, problem, extra, count=5):
    """The parameters after each step, and the extra."""
    step = jax.jit(train.with_extra(problem.step(), extra.update))
    state = problem.state()
    start = extra.start(state.params, state.model_state)
    state = state.replace(extra=start)
    history, extras = [state.params], []
    for i in range(count):
      state, _ = step(state, {}, rows(problem, np.arange(16) + i))
      history.append(state.params)
      extras.append(state.extra["params"])
    return history, extras

  def test_the_mean_begins_plain_and_then_decays(self, problem, same):
    history, extras = self.run(problem, train.ema(0.7))
    mean = jax.tree.map(np.float64, history[0])
    for t, (params, found) in enumerate(zip(history[1:], extras, strict=True)):
      a = min(1 - 1 / (t + 2), 0.7)
      mean = jax.tree.map(lambda m, w, a=a: a * m + (1 - a) * w, mean, params)
      same(found, mean)
    plain = jax.tree.map(lambda *w: np.mean(w, 0), *history[:3])
    same(extras[1], plain)

  def test_copies_are_renewed_at_their_time(self, problem, same):
    history, extras = self.run(problem, train.stale(2))
    for t, found in enumerate(extras, start=1):
      same(found, history[t - t % 2], exact=True)

  def test_the_loss_finds_it_and_a_bad_step_leaves_it(self, problem, same):
    def loss_fn(params, model_state, frozen, batch, key):
      terms, aux = problem.loss_fn(params, model_state, frozen, batch, key)
      kernel = frozen["extra"]["params"]["model"]["Dense_0"]["kernel"]
      seen = jnp.full(16, jnp.sum(kernel))
      return terms, train.Aux(aux.model_state, {"seen": seen})

    extra = train.ema(0.5)
    step = train.with_extra(
      train.make_step(loss_fn, problem.optimizer), extra.update
    )
    state = problem.state()
    start = extra.start(state.params, state.model_state)
    state = state.replace(extra=start)
    batch = rows(problem, np.arange(16))
    _, metrics = jax.jit(step)(state, {}, batch)
    kernel = state.params["model"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(metrics["seen"], jnp.sum(kernel), rtol=1e-5)
    batch["x"] = batch["x"].at[0].set(jnp.nan)
    batch["valid"] = jnp.ones(16, bool)
    bad, metrics = jax.jit(step)(state, {}, batch)
    assert metrics["ok"] == 0
    same(bad.extra, state.extra, exact=True)

  @pytest.mark.parametrize(
    ("make", "message"),
    [
      (lambda: train.ema(1.0), "decay is 1.0; it should be below 1"),
      (lambda: train.ema(-0.1), "decay is -0.1"),
      (lambda: train.stale(0), "every is 0"),
    ],
  )
  def test_bad_arguments(self, make, message):
    with pytest.raises(ValueError, match=message):
      make()
