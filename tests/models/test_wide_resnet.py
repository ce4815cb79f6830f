"""Wide ResNets against a float64 NumPy forward and the published numbers."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import WideResNet, count_parameters, create, from_linen
from kd_jax.models.wide_resnet import Block
from tests.models.networks import (
  among_others,
  check_evaluation,
  compiled,
  conv,
  doubles,
  head,
  images,
  norm_relu,
  random_variables,
)


def block(x, p, s, stride, *, batch=False):
  y = norm_relu(x, p["norm1"], s.get("norm1"), batch=batch)
  if "shortcut" in p:
    x = conv(y, p["shortcut"], stride)
  y = conv(y, p["conv1"], stride)
  y = norm_relu(y, p["norm2"], s.get("norm2"), batch=batch)
  return x + conv(y, p["conv2"])


def network(x, p, s):
  x = conv(x, p["stem"])
  for group, stride in (("group1", 1), ("group2", 2), ("group3", 2)):
    for name in sorted(p[group]):
      first = name == "block1"
      statistics = s.get(group, {}).get(name, {})
      x = block(x, p[group][name], statistics, stride if first else 1)
  return head(norm_relu(x, p["norm"], s.get("norm")), p["head"])


@pytest.fixture(scope="module")
def narrow():
  """WRN-10-1 with batch norms, compiled once."""
  module = WideResNet(5, depth=10, width=1)
  return compiled(module, images(3, 9, 6, 3))


def test_with_batch_norm_it_is_what_numpy_computes(narrow):
  apply, variables, model, x = narrow
  logits = apply(model, x)[0].logits
  expected = network(np.float64(x), *doubles(variables))
  assert logits.shape == (3, 5) and logits.dtype == jnp.float32
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_evaluation_changes_nothing_and_sees_one_image_at_a_time(narrow):
  check_evaluation(narrow)


def test_two_blocks_a_group_are_what_numpy_computes_with_group_norm():
  module = WideResNet(5, depth=16, width=0.5, norm="group")
  x = images(2, 8, 7, 1)
  variables = random_variables(module, x)
  assert set(variables) == {"params"}
  params, _ = doubles(variables)
  blocks = [params[f"group{i}"][f"block{j}"] for i in (1, 2, 3) for j in (1, 2)]
  assert ["shortcut" in p for p in blocks] == [True, False] * 3
  logits = jax.jit(module.apply)(variables, x).logits
  expected = network(np.float64(x), params, {})
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_training_normalises_records_and_drops_between_the_convolutions():
  module = Block(16, stride=2, dropout=0.25)
  x = images(4, 6, 5, 8)
  variables = random_variables(module, x, train=False)
  params, stats = doubles(variables)
  y, new = jax.jit(
    lambda v, x: module.apply(
      v,
      x,
      train=True,
      rngs={"dropout": jax.random.key(0)},
      capture_intermediates=True,
      mutable=["batch_stats", "intermediates"],
    )
  )(variables, x)

  seen = norm_relu(np.float64(x), params["norm1"], None, batch=True)
  first = conv(seen, params["conv1"], 2)
  second = norm_relu(first, params["norm2"], None, batch=True)
  dropped = np.float64(new["intermediates"]["Dropout_0"]["__call__"][0])
  gone = (dropped == 0) & (second > 1e-3)
  assert 0.15 < gone.sum() / (second > 1e-3).sum() < 0.35
  np.testing.assert_allclose(
    dropped, np.where(dropped == 0, 0, second / 0.75), rtol=1e-4, atol=1e-5
  )
  expected = conv(seen, params["shortcut"], 2)
  expected += conv(dropped, params["conv2"])
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

  new, old = (s["norm2"]["norm"] for s in (new["batch_stats"], stats))
  moments = {"mean": first.mean((0, 1, 2)), "var": first.var((0, 1, 2))}
  for name, value in moments.items():
    np.testing.assert_allclose(
      new[name], 0.9 * old[name] + 0.1 * value, rtol=1e-4, atol=1e-6
    )


def test_group_norm_trains_without_state_and_one_image_at_a_time():
  module = WideResNet(5, depth=10, width=0.5, norm="group")
  model = from_linen(module)
  x = images(3, 8, 8, 3)
  x[0] = 0  # Nothing to normalise.
  variables = random_variables(module, x)
  assert set(variables) == {"params"}
  # As fresh ones: the black image is 0 in all layers.
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * (path[-1].key != "bias"), variables["params"]
  )

  @jax.jit
  def gradient(params, x):
    def loss(params):
      out, state = model.apply({"params": params, "state": {}}, x, train=True)
      assert state == {}
      return jnp.mean(nn.log_softmax(out.logits)[:, 0]), out.logits

    return jax.grad(loss, has_aux=True)(params)

  grads, logits = gradient(params, x)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert 0 < np.abs(leaf).max() < 10, path
  _, again = gradient(params, among_others(x))
  np.testing.assert_allclose(again[0], logits[1], rtol=1e-4, atol=1e-5)


def counted(depth, width, classes):
  """Parameters, layer by layer, by Table 1 and with norms of scale and bias."""
  norm = lambda c: 2 * c
  total, before = 9 * 3 * 16, 16
  for channels in (16 * width, 32 * width, 64 * width):
    for _ in range((depth - 4) // 6):
      total += norm(before) + 9 * before * channels
      total += norm(channels) + 9 * channels * channels
      total += before * channels if before != channels else 0
      before = channels
  return total + norm(before) + (before + 1) * classes


@pytest.mark.parametrize(
  ("depth", "width", "millions", "classes"),
  [
    # Table 4 of the paper.
    (40, 1, 0.6, 10),
    (40, 2, 2.2, 10),
    (40, 8, 35.7, 10),
    (28, 10, 36.5, 10),
    (16, 8, 11.0, 10),
    (22, 8, 17.2, 100),
  ],
)
def test_the_count_by_hand_is_the_published_one(
  depth, width, millions, classes
):
  assert abs(counted(depth, width, classes) / 1e6 - millions) < 0.06


@pytest.mark.parametrize(
  ("depth", "width", "norm", "count"),
  [
    (28, 10, "batch", 36_479_194),
    (16, 4, "group", 2_748_890),
    (28, 1, "batch", 369_498),
    (16, 10, "group", 17_116_634),
  ],
)
def test_numbers_of_parameters_and_sizes_of_feature_maps(
  depth, width, norm, count
):
  module = WideResNet(10, depth, width, norm=norm, dtype=jnp.bfloat16)
  outputs, shapes = jax.eval_shape(
    lambda: module.init_with_output(
      jax.random.key(0),
      jnp.zeros((2, 32, 32, 3)),
      capture_intermediates=True,
      mutable=["params", "batch_stats", "intermediates"],
    )
  )
  assert count_parameters(shapes) == count == counted(depth, width, 10)
  assert ("batch_stats" in shapes) == (norm == "batch")
  for i, side in enumerate((32, 16, 8)):
    (out,) = shapes["intermediates"][f"group{i + 1}"]["__call__"]
    assert out.shape == (2, side, side, 16 * 2**i * width)
    assert out.dtype == jnp.bfloat16
  assert outputs.logits.shape == (2, 10)
  assert outputs.logits.dtype == jnp.float32


def test_bfloat16_computes_close_to_float32():
  module = WideResNet(5, 10, 0.5, norm="group", dtype=jnp.bfloat16)
  x = images(2, 8, 8, 3)
  variables = random_variables(module, x)
  logits = jax.jit(module.apply)(variables, x).logits
  expected = network(np.float64(x), *doubles(variables))
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected, rtol=0.1, atol=0.2)


def test_by_name_and_dropout_is_for_training():
  model = create("wide_resnet", 5, depth=10, width=0.5, dropout=0.3)
  x = jnp.zeros((2, 8, 8, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)

  def trace(**kwargs):
    jax.eval_shape(lambda v: model.apply(v, x, **kwargs), shapes)

  trace(train=False)
  trace(train=True, key=jax.random.key(0))
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    trace(train=True)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"depth": 12}, "depth is 12; it should be 4 more than a multiple of 6"),
    ({"depth": 4}, "depth is 4; it should be at least 10"),
    ({"width": 0}, "width is 0; it should be above 0"),
    ({"width": 1.3}, "width is 1.3; 16 times it should be a whole number"),
    ({"norm": "layer"}, 'norm is \'layer\'; it should be "batch" or "group"'),
    ({"num_classes": 0}, "num_classes is 0; it should be at least 1"),
    ({"dropout": 1.0}, r"dropout is 1.0; it should be in \[0, 1\)"),
    ({"dropout": np.nan}, "dropout is nan"),
  ],
)
def test_bad_arguments(change, message):
  module = WideResNet(**({"num_classes": 5, "depth": 10, "width": 1} | change))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
