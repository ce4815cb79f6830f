"""Reference models and the adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models


class WithStatistics(nn.Module):
  """Batch statistics and dropout: what a teacher must not be caught with."""

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
    x = models.Dropout(0.5)(x, train=train)
    return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def inputs():
  return np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def test_mlp_is_what_numpy_computes(inputs):
  model = models.from_linen(models.MLP(hidden=(5, 7), num_classes=3))
  variables = model.init(jax.random.key(0), inputs[:1])
  x = inputs.astype(np.float64)
  layers = [variables["params"][f"Dense_{i}"] for i in range(3)]
  for i, layer in enumerate(layers):
    x = x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    x = np.maximum(x, 0) if i < 2 else x
  outputs, state = model.apply(variables, inputs)
  np.testing.assert_allclose(outputs.logits, x, rtol=1e-5, atol=1e-6)
  assert state == {}
  count = 4 * 5 + 5 + 5 * 7 + 7 + 7 * 3 + 3
  assert models.count_parameters(variables) == count


def test_evaluation_changes_nothing_and_training_does(inputs):
  model = models.from_linen(WithStatistics())
  variables = model.init(jax.random.key(0), inputs[:1])
  key = jax.random.key(1)
  once, state = model.apply(variables, inputs)
  again, _ = model.apply(variables, inputs, key=key)
  np.testing.assert_array_equal(once.logits, again.logits)
  jax.tree.map(np.testing.assert_array_equal, state, variables["state"])
  alone = model.apply(variables, inputs[2:3])[0].logits
  np.testing.assert_allclose(alone, once.logits[2:3], rtol=1e-6)
  trained, state = model.apply(variables, inputs, train=True, key=key)
  assert not np.allclose(trained.logits, once.logits)
  mean = state["batch_stats"]["BatchNorm_0"]["mean"]
  assert not np.allclose(mean, 0.0)


def test_a_function_is_a_model(inputs):
  model = models.from_function(
    lambda key, x: jax.random.normal(key, (x.shape[-1], 3)),
    lambda weights, x: x @ weights,
  )
  variables = model.init(jax.random.key(0), inputs)
  outputs, state = model.apply(variables, inputs, train=True)
  np.testing.assert_allclose(
    outputs.logits, inputs @ variables["params"], rtol=1e-5
  )
  assert state == {}


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_keeps_the_expectation_and_the_share(rate):
  module = models.Dropout(rate)
  x = jnp.full((400, 501), 3.0)
  rngs = {"dropout": jax.random.key(0)}
  y = np.asarray(module.apply({}, x, train=True, rngs=rngs))
  dropped = round(rate * 256) / 256
  spread = 4 * np.sqrt(dropped * (1 - dropped) / y.size)
  assert abs(np.mean(y == 0) - dropped) < spread
  assert abs(dropped - rate) < 1 / 512
  kept = y[y != 0]
  np.testing.assert_allclose(kept, 3.0 / (1 - dropped), rtol=1e-6)
  # Units that share a word are independent of each other.
  pairs = (y[:, 0:500:4] == 0) & (y[:, 1:500:4] == 0)
  assert abs(pairs.mean() - dropped**2) < 0.01


def test_dropout_is_off_in_evaluation_and_refuses_nonsense():
  x = jnp.ones((2, 3))
  np.testing.assert_array_equal(
    models.Dropout(0.5).apply({}, x, train=False), x
  )
  with pytest.raises(ValueError, match=r"dropout is 1\.5"):
    models.Dropout(1.5).apply({}, x, train=False)


HALF = {
  "bit_resnet": {"depth": (1,), "base_width": 4},
  "densenet": {"depth": 10, "growth": 4},
  "gpt": {"width": 8, "depth": 1, "heads": 2, "max_length": 4},
  "lstm": {"width": 8, "depth": 1},
  "mobilenet_v3": {},
  "vit": {"patch_size": 8, "width": 16, "depth": 1, "heads": 2},
  "wide_resnet": {"depth": 10, "width": 1},
}


@pytest.mark.parametrize("name", HALF)
def test_a_network_in_bfloat16_has_logits_and_weights_in_float32(name):
  """As a config says it: by a word. Its shapes alone: the values have tests."""
  tokens = name in ("gpt", "lstm")
  shape, dtype = ((4,), jnp.int32) if tokens else ((16, 16, 3), jnp.float32)
  model = models.create(name, 5, **HALF[name], dtype="bfloat16")
  known = models.template(name, 5, shape, **HALF[name], dtype="bfloat16")
  inputs = jax.ShapeDtypeStruct((2, *shape), dtype)
  lowered = jax.jit(model.apply).lower(known, inputs)
  assert lowered.out_info[0].logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(known)} == {jnp.dtype("float32")}
  assert "bf16" in lowered.as_text()


@pytest.mark.parametrize("dtype", ["float99", "int8", None, jnp.int32])
def test_another_dtype(dtype):
  with pytest.raises(ValueError, match="dtype is .* one of float32, bfloat16"):
    models.create("vit", 5, **HALF["vit"], dtype=dtype)
