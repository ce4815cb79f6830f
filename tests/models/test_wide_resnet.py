"""Wide ResNets against a float64 NumPy forward and the published numbers."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import WideResNet, count_parameters, create, from_linen
from kd_jax.models.wide_resnet import Block, Conv, NormReLU


def conv(x, kernel, stride=1):
  """Padded with `side // 2` zeros on all sides, whatever the stride."""
  side = kernel.shape[0]
  pad = (side // 2, side // 2)
  x = np.pad(x, [(0, 0), pad, pad, (0, 0)])
  x = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
  x = x[:, ::stride, ::stride]
  return np.einsum("bhwcij,ijco->bhwo", x, kernel)


def norm_relu(x, p, s, *, batch=False):
  """`s` holds running statistics; without any, groups of 8 are normalised."""
  if batch:
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  elif s:
    mean, var = s["norm"]["mean"], s["norm"]["var"]
  else:
    groups = x.reshape(*x.shape[:3], -1, 8)
    mean, var = (
      np.repeat(f((1, 2, 4), keepdims=True)[..., 0], 8, axis=-1)
      for f in (groups.mean, groups.var)
    )
  x = (x - mean) / np.sqrt(var + 1e-5)
  return np.maximum(x * p["norm"]["scale"] + p["norm"]["bias"], 0)


def block(x, p, s, stride, *, batch=False):
  y = norm_relu(x, p["norm1"], s.get("norm1"), batch=batch)
  if "shortcut" in p:
    x = conv(y, p["shortcut"]["conv"]["kernel"], stride)
  y = conv(y, p["conv1"]["conv"]["kernel"], stride)
  y = norm_relu(y, p["norm2"], s.get("norm2"), batch=batch)
  return x + conv(y, p["conv2"]["conv"]["kernel"])


def network(x, p, s):
  x = conv(x, p["stem"]["conv"]["kernel"])
  for group, stride in (("group1", 1), ("group2", 2), ("group3", 2)):
    for name in sorted(p[group]):
      first = name == "block1"
      statistics = s.get(group, {}).get(name, {})
      x = block(x, p[group][name], statistics, stride if first else 1)
  x = norm_relu(x, p["norm"], s.get("norm")).mean((1, 2))
  return x @ p["head"]["dense"]["kernel"] + p["head"]["dense"]["bias"]


def random_variables(module, inputs, **kwargs):
  """Numbers that make every part of the network count."""
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    name, noise = path[-1].key, rng.normal(size=leaf.shape)
    if name == "kernel":
      return noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
    if name in ("bias", "mean"):
      return 0.3 * noise
    return np.exp(0.3 * noise)  # scale, var

  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), jnp.asarray(inputs), **kwargs)
  )
  drawn = jax.tree_util.tree_map_with_path(draw, shapes)
  return jax.tree.map(np.float32, drawn)


def doubles(variables):
  double = jax.tree.map(np.float64, variables)
  return double["params"], double.get("batch_stats", {})


def images(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def narrow():
  """WRN-10-1 with batch norms, compiled once."""
  module = WideResNet(5, depth=10, width=1)
  x = images(3, 9, 6, 3)
  variables = random_variables(module, x)
  model = {"params": variables["params"]}
  model["state"] = {"batch_stats": variables["batch_stats"]}
  return jax.jit(from_linen(module).apply), variables, model, x


def test_with_batch_norm_it_is_what_numpy_computes(narrow):
  apply, variables, model, x = narrow
  logits = apply(model, x)[0].logits
  expected = network(np.float64(x), *doubles(variables))
  assert logits.shape == (3, 5) and logits.dtype == jnp.float32
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_evaluation_changes_nothing_and_sees_one_image_at_a_time(narrow):
  apply, _, model, x = narrow
  outputs, after = apply(model, x)
  jax.tree.map(np.testing.assert_array_equal, after, model["state"])
  others = np.concatenate([x[1:2], 5 * x[::-1][:2]])
  again, _ = apply(model, others)
  np.testing.assert_allclose(
    again.logits[0], outputs.logits[1], rtol=1e-5, atol=1e-6
  )


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
  first = conv(seen, params["conv1"]["conv"]["kernel"], 2)
  second = norm_relu(first, params["norm2"], None, batch=True)
  dropped = np.float64(new["intermediates"]["Dropout_0"]["__call__"][0])
  gone = (dropped == 0) & (second > 1e-3)
  assert 0.15 < gone.sum() / (second > 1e-3).sum() < 0.35
  np.testing.assert_allclose(
    dropped, np.where(dropped == 0, 0, second / 0.75), rtol=1e-4, atol=1e-5
  )
  expected = conv(seen, params["shortcut"]["conv"]["kernel"], 2)
  expected += conv(dropped, params["conv2"]["conv"]["kernel"])
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
  others = np.concatenate([x[1:2], 5 * x[::-1][:2]])
  _, again = gradient(params, others)
  np.testing.assert_allclose(again[0], logits[1], rtol=1e-4, atol=1e-5)


def test_a_group_has_at_least_eight_channels():
  for channels, size in ((6, 6), (36, 9), (13, 13)):
    x = images(2, 3, 4, channels)
    norm = {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}
    variables = {"params": {"norm": norm}}
    y = NormReLU("group").apply(variables, x, train=False)
    groups = np.float64(x).reshape(2, 12, -1, size)
    groups = groups - groups.mean((1, 3), keepdims=True)
    groups /= np.sqrt((groups**2).mean((1, 3), keepdims=True) + 1e-5)
    expected = np.maximum(groups, 0).reshape(x.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_kernels_start_with_the_variance_of_the_release():
  variables = Conv(128).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))
  kernel = variables["params"]["conv"]["kernel"]
  assert kernel.shape == (3, 3, 32, 128)
  np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / 9 / 128), rtol=0.02)
  assert np.abs(kernel).max() > 3 * np.std(kernel)  # Not truncated at 2.


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


@pytest.mark.parametrize(
  ("inputs", "message"),
  [
    (np.zeros((8, 8, 3), np.float32), r"inputs have shape \(8, 8, 3\)"),
    (np.zeros((1, 8, 8, 3), np.uint8), "inputs are uint8; they should be"),
  ],
)
def test_bad_images(inputs, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(WideResNet(5, 10, 1).init, jax.random.key(0), inputs)
