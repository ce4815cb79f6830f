"""The optimiser against its equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import train

STEPS, RATE, DECAY = 20, 0.03, 0.1


def schedule(step, warmup):
  if step < warmup:
    return step / warmup
  return 0.5 * (1 + np.cos(np.pi * (step - warmup) / (STEPS - warmup)))


def reference(name, grads, kernel, warmup, decay):
  x, m, v = np.float64(kernel), 0.0, 0.0
  for step, g in enumerate(np.float64(grads)):
    if name == "adam":
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      t = step + 1
      direction = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    else:
      m = 0.9 * m + g
      direction = m
    x = x - schedule(step, warmup) * (RATE * direction + decay * x)
  return x


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize(("warmup", "rising"), [(0.25, 5), (4, 4), (0, 0)])
def test_decay_has_no_factor_of_the_learning_rate(name, warmup, rising):
  grads = np.random.default_rng(0).normal(size=(STEPS, 3)).astype(np.float32)
  start = np.array([1.0, -2.0, 0.5], np.float32)
  params = {"a": {"kernel": jnp.asarray(start), "bias": jnp.asarray(start)}}
  optimizer = train.decoupled(
    STEPS, name=name, learning_rate=RATE, weight_decay=DECAY, warmup=warmup
  )
  state = optimizer.init(params)
  for g in grads:
    both = {"a": {"kernel": jnp.asarray(g), "bias": jnp.asarray(g)}}
    updates, state = optimizer.update(both, state, params)
    params = optax.apply_updates(params, updates)
  for leaf, decay in (("kernel", DECAY), ("bias", 0.0)):
    expected = reference(name, grads, start, rising, decay)
    np.testing.assert_allclose(params["a"][leaf], expected, rtol=2e-5)


def test_the_first_moment_can_be_smaller():
  optimizer = train.decoupled(9, learning_rate=0.1, momentum_dtype="bfloat16")
  state = optimizer.init({"kernel": jnp.zeros(3)})
  assert state[0].mu["kernel"].dtype == jnp.bfloat16
  assert state[0].nu["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"name": "adamm"}, "optimizer is 'adamm'"),
    ({"learning_rate": 0}, "learning_rate is 0"),
    ({"weight_decay": -1}, "weight_decay is -1"),
    ({"warmup": -1}, "warmup is -1"),
    ({"steps": 0}, "steps is 0"),
    ({"momentum_dtype": "int8"}, "momentum_dtype is 'int8'"),
  ],
)
def test_bad_settings(change, message):
  with pytest.raises(ValueError, match=message):
    train.decoupled(**{"steps": 5, "learning_rate": 0.1, **change})


def test_the_staircase_is_nesterov_with_drops():
  grads = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
  params = {"bias": jnp.array([1.0, -2.0, 0.5])}
  optimizer = train.optimizer(
    10,
    name="nesterov",
    learning_rate=0.1,
    weight_decay=0.01,
    drops=(0.3, 0.6),
    factor=0.2,
  )
  state, x, m = optimizer.init(params), np.float64(params["bias"]), 0.0
  for step, g in enumerate(grads):
    updates, state = optimizer.update({"bias": g}, state, params)
    params = optax.apply_updates(params, updates)
    rate = 0.1 * 0.2 ** ((step >= 3) + (step >= 6))
    g = g + 0.01 * x
    m = 0.9 * m + g
    x = x - rate * (g + 0.9 * m)
  np.testing.assert_allclose(params["bias"], x, rtol=1e-5)


def test_settings_of_another_optimizer_are_named():
  with pytest.raises(ValueError, match="nesterov has no setting warmup"):
    train.optimizer(9, name="nesterov", learning_rate=0.1, warmup=0.1)
  with pytest.raises(ValueError, match="drops is 1.5"):
    train.optimizer(9, name="nesterov", learning_rate=0.1, drops=(1.5,))
  with pytest.raises(ValueError, match="optimizer is 'adagrad'"):
    train.optimizer(9, name="adagrad", learning_rate=0.1)


class TestByPeer:
  """Each peer's optimiser is that of a network trained alone."""

  def setup_method(self):
    rng = np.random.default_rng(1)
    draw = lambda: {"kernel": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)}
    self.params = {"model": {"a": draw(), "b": draw()}}
    self.grads = {"model": {"a": draw(), "b": draw()}}
    self.inner = train.decoupled(9, learning_rate=0.1, weight_decay=0.01)

  def alone(self, name, clip=0.5):
    one = optax.chain(optax.clip_by_global_norm(clip), self.inner)
    grad, param = self.grads["model"][name], self.params["model"][name]
    return one.update(grad, one.init(param), param)[0]

  def test_all_move_each_with_its_own_clip(self):
    both = train.by_peer(self.inner, clip_norm=0.5)
    updates, _ = both.update(self.grads, both.init(self.params), self.params)
    for name in ("a", "b"):
      np.testing.assert_allclose(
        updates["model"][name]["kernel"], self.alone(name)["kernel"], rtol=1e-6
      )

  def test_one_moves_and_the_other_keeps_its_state(self):
    one = train.by_peer(self.inner, clip_norm=0.5, active="b")
    state = one.init(self.params)
    updates, new = one.update(self.grads, state, self.params)
    assert not np.any(updates["model"]["a"]["kernel"])
    np.testing.assert_allclose(
      updates["model"]["b"]["kernel"], self.alone("b")["kernel"], rtol=1e-6
    )
    kept = jax.tree.map(
      lambda x, y: bool(jnp.array_equal(x, y)),
      new["model"]["a"],
      state["model"]["a"],
    )
    assert all(jax.tree.leaves(kept))

  def test_stacked_is_the_same(self):
    stack = lambda tree: {
      "model": jax.tree.map(lambda *x: jnp.stack(x), *tree["model"].values())
    }
    both = train.by_peer(self.inner, clip_norm=0.5, stacked=True)
    params = stack(self.params)
    updates, _ = both.update(stack(self.grads), both.init(params), params)
    for i, name in enumerate(("a", "b")):
      np.testing.assert_allclose(
        updates["model"]["kernel"][i], self.alone(name)["kernel"], rtol=1e-5
      )

  def test_who_is_active_is_there(self):
    with pytest.raises(ValueError, match="stacked peers move together"):
      train.by_peer(self.inner, active="a", stacked=True)
    one = train.by_peer(self.inner, active="c")
    with pytest.raises(ValueError, match="active is 'c'"):
      one.update(self.grads, one.init(self.params), self.params)
