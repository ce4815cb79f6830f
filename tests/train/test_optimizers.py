"""The optimiser against its equations in NumPy."""

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
