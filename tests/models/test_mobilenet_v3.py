"""MobileNetV3 against a float64 NumPy forward and the published numbers."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import count_parameters, from_linen, mobilenet_v3
from kd_jax.models.mobilenet_v3 import InvertedResidual, MobileNetV3
from tests.models.networks import (
  among_others,
  check_evaluation,
  compiled,
  doubles,
  images,
  normalised,
  random_variables,
)

# Tables 1 and 2 of arXiv:1905.02244, the "bneck" rows: kernel, expansion,
# channels, squeeze-and-excite, non-linearity, stride.
TABLES = {
  "large": """3 16 16 - RE 1, 3 64 24 - RE 2, 3 72 24 - RE 1, 5 72 40 SE RE 2,
    5 120 40 SE RE 1, 5 120 40 SE RE 1, 3 240 80 - HS 2, 3 200 80 - HS 1,
    3 184 80 - HS 1, 3 184 80 - HS 1, 3 480 112 SE HS 1, 3 672 112 SE HS 1,
    5 672 160 SE HS 2, 5 960 160 SE HS 1, 5 960 160 SE HS 1""",
  "small": """3 16 16 SE RE 2, 3 72 24 - RE 2, 3 88 24 - RE 1, 5 96 40 SE HS 2,
    5 240 40 SE HS 1, 5 240 40 SE HS 1, 5 120 48 SE HS 1, 5 144 48 SE HS 1,
    5 288 96 SE HS 2, 5 576 96 SE HS 1, 5 576 96 SE HS 1""",
}
WIDTH = 1 / 8


def rows(variant):
  table = [row.split() for row in TABLES[variant].split(",")]
  return [
    (int(k), int(e), int(c), se == "SE", act, int(s))
    for k, e, c, se, act, s in table
  ]


def relu(x):
  return np.maximum(x, 0)


def hard_sigmoid(x):
  return np.minimum(relu(x + 3), 6) / 6


def hard_swish(x):
  return x * hard_sigmoid(x)


def conv(x, kernel, stride, depthwise=False):
  """Padded so that the side becomes ceil(side / stride), more at the end."""
  side = kernel.shape[0]
  pads = [(0, 0)]
  for n in x.shape[1:3]:
    total = max((-(-n // stride) - 1) * stride + side - n, 0)
    pads.append((total // 2, total - total // 2))
  x = np.pad(x, [*pads, (0, 0)])
  x = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
  x = x[:, ::stride, ::stride]
  if depthwise:
    return np.einsum("bhwcij,ijc->bhwc", x, kernel[:, :, 0])
  return np.einsum("bhwcij,ijco->bhwo", x, kernel)


def conv_norm(x, p, s, *, stride=1, depthwise=False, batch=False):
  x = conv(x, p["conv"]["kernel"], stride, depthwise)
  return normalised(x, p, s, 1e-3, batch=batch)


def dense(x, p):
  return x @ p["kernel"] + p["bias"]


def block(x, p, s, squeeze, act, stride, batch=False):
  act = {"RE": relu, "HS": hard_swish}[act]
  y = x
  if "expand" in p:
    y = act(conv_norm(y, p["expand"], s.get("expand"), batch=batch))
  y = conv_norm(
    y,
    p["depthwise"],
    s.get("depthwise"),
    stride=stride,
    depthwise=True,
    batch=batch,
  )
  y = act(y)
  if squeeze:
    z = relu(dense(y.mean((1, 2)), p["squeeze_excite"]["squeeze"]))
    z = hard_sigmoid(dense(z, p["squeeze_excite"]["excite"]))
    y = y * z[:, None, None]
  y = conv_norm(y, p["project"], s.get("project"), batch=batch)
  return x + y if stride == 1 and x.shape[-1] == y.shape[-1] else y


def network(x, p, s, variant, small_inputs):
  strides = [2] + [row[-1] for row in rows(variant)]
  if small_inputs:
    first, second = np.flatnonzero(np.equal(strides, 2))[:2]
    strides[first] = strides[second] = 1
  x = hard_swish(conv_norm(x, p["stem"], s.get("stem"), stride=strides[0]))
  for i, row in enumerate(rows(variant), start=1):
    name = f"block{i}"
    x = block(x, p[name], s.get(name, {}), *row[3:5], strides[i])
  x = hard_swish(conv_norm(x, p["last"], s.get("last")))
  return dense(hard_swish(dense(x.mean((1, 2)), p["hidden"])), p["logits"])


@pytest.fixture(scope="module")
def small():
  """A narrow network with batch norms, compiled once."""
  module = MobileNetV3(5, "small", WIDTH, hidden_units=16, small_inputs=True)
  return compiled(module, images(3, 18, 13, 3))


def test_small_with_batch_norm_is_what_numpy_computes(small):
  apply, variables, model, x = small
  logits = apply(model, x)[0].logits
  expected = network(np.float64(x), *doubles(variables), "small", True)
  assert logits.shape == (3, 5) and logits.dtype == jnp.float32
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_large_with_group_norm_is_what_numpy_computes():
  module = MobileNetV3(5, "large", WIDTH, hidden_units=16, norm="group")
  x = images(2, 30, 37, 3)
  variables = random_variables(module, x)
  assert set(variables) == {"params"}
  logits = jax.jit(module.apply)(variables, x).logits
  expected = network(np.float64(x), *doubles(variables), "large", False)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_a_stride_has_no_shortcut_even_where_the_shape_stays():
  module = InvertedResidual(3, 16, 16, False, nn.relu, stride=2, norm="group")
  x = images(2, 1, 1, 16)
  variables = random_variables(module, x, train=False)
  y = module.apply(variables, x, train=False)
  expected = block(np.float64(x), doubles(variables)[0], {}, False, "RE", 2)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_training_normalises_and_records_the_batch():
  module = InvertedResidual(5, 24, 16, True, nn.hard_swish)
  x = images(4, 6, 5, 16)
  variables = random_variables(module, x, train=False)
  params, stats = doubles(variables)
  y, new = jax.jit(
    lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"])
  )(variables, x)
  expected = block(np.float64(x), params, {}, True, "HS", 1, batch=True)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  z = conv(np.float64(x), params["expand"]["conv"]["kernel"], 1)
  new, old = (s["expand"]["norm"] for s in (new["batch_stats"], stats))
  for name, value in (("mean", z.mean((0, 1, 2))), ("var", z.var((0, 1, 2)))):
    np.testing.assert_allclose(
      new[name], 0.99 * old[name] + 0.01 * value, rtol=1e-4, atol=1e-6
    )


def test_evaluation_changes_nothing_and_sees_one_image_at_a_time(small):
  check_evaluation(small)


def test_group_norm_trains_without_state_and_with_finite_gradients(monkeypatch):
  # Two of the eleven blocks: the whole network takes long to compile.
  table, last, hidden = mobilenet_v3._VARIANTS["small"]
  monkeypatch.setitem(
    mobilenet_v3._VARIANTS, "small", (table[2:4], last, hidden)
  )
  module = MobileNetV3(5, "small", WIDTH, hidden_units=16, norm="group")
  model = from_linen(module)
  x = images(3, 16, 16, 3)
  variables = random_variables(module, x)
  assert set(variables) == {"params"}
  # The black image is the same everywhere but for the biases of the stem.
  x[0] = 0
  stem = jax.jit(lambda key: module.init(key, x)["params"]["stem"])
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * (path[-1].key != "bias"), variables["params"]
  ) | {"stem": stem(jax.random.key(0))}

  @jax.jit
  def gradient(params, x):
    def loss(params):
      out, state = model.apply({"params": params, "state": {}}, x, train=True)
      assert state == {}
      return jnp.mean(nn.log_softmax(out.logits)[:, 0]), out.logits

    return jax.grad(loss, has_aux=True)(params)

  grads, logits = gradient(params, x)
  grads = jax.tree.map(np.asarray, grads)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert 0 < np.abs(leaf).max() < 10, path
  _, again = gradient(params, among_others(x))
  np.testing.assert_allclose(again[0], logits[1], rtol=1e-4, atol=1e-5)
  assert not np.allclose(logits[1], logits[2])


@pytest.mark.parametrize(
  ("variant", "width", "norm", "count", "small_inputs", "size", "sides"),
  [
    # The numbers of parameters are torchvision's.
    (
      *("large", 1.0, "batch", 5_483_032, False),
      *(224, "112 56 56 28 28 28 14 14 14 14 14 14 7 7 7"),
    ),
    (
      *("small", 1.0, "group", 2_542_856, False),
      *(224, "56 28 28 14 14 14 14 14 7 7 7"),
    ),
    # The authors' narrow models: 3.99 M and 2.04 M, as timm lists them.
    (
      *("large", 0.75, "group", 3_993_528, True),
      *(32, "32 32 32 16 16 16 8 8 8 8 8 8 4 4 4"),
    ),
    (
      *("small", 0.75, "batch", 2_041_872, True),
      *(32, "32 16 16 8 8 8 8 8 4 4 4"),
    ),
  ],
)
def test_published_numbers_of_parameters_and_sizes_of_feature_maps(
  variant, width, norm, count, small_inputs, size, sides
):
  module = MobileNetV3(
    1000,
    variant,
    width,
    norm=norm,
    small_inputs=small_inputs,
    dtype=jnp.bfloat16,
  )
  outputs, shapes = jax.eval_shape(
    lambda: module.init_with_output(
      jax.random.key(0),
      jnp.zeros((2, size, size, 3)),
      capture_intermediates=True,
      mutable=["params", "batch_stats", "intermediates"],
    )
  )
  assert count_parameters(shapes) == count
  assert ("batch_stats" in shapes) == (norm == "batch")
  captured = shapes["intermediates"]
  expected = zip(rows(variant), map(int, sides.split()), strict=True)
  for i, (row, side) in enumerate(expected, start=1):
    (out,) = captured[f"block{i}"]["__call__"]
    (inner,) = captured[f"block{i}"]["depthwise"]["__call__"]
    assert out.shape[:3] == (2, side, side) and out.dtype == jnp.bfloat16
    if width == 1:
      assert (inner.shape[-1], out.shape[-1]) == row[1:3]
  assert outputs.logits.shape == (2, 1000)
  assert outputs.logits.dtype == jnp.float32


def test_bfloat16_computes_close_to_float32():
  module = InvertedResidual(5, 24, 16, True, nn.hard_swish, norm="group")
  x = jnp.bfloat16(images(2, 6, 5, 16))
  variables = random_variables(module, x, train=False)
  half = module.clone(dtype=jnp.bfloat16)
  y = jax.jit(lambda v, x: half.apply(v, x, train=False))(variables, x)
  params, _ = doubles(variables)
  expected = block(np.float64(x), params, {}, True, "HS", 1)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(y), expected, rtol=0.05, atol=0.1)


def test_dropout_is_for_training():
  module = MobileNetV3(5, "small", WIDTH, norm="group", dropout=0.2)
  x = jnp.zeros((2, 8, 8, 3))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)

  def trace(train):
    jax.eval_shape(lambda v: module.apply(v, x, train=train), shapes)

  trace(train=False)
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    trace(train=True)  # It asks for a key.


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"variant": "tiny"}, "variant is 'tiny'; it should be \"large\" or"),
    ({"norm": "layer"}, 'norm is \'layer\'; it should be "batch" or "group"'),
    ({"width_multiplier": 0.0}, "width_multiplier is 0.0; it should be above"),
    ({"width_multiplier": np.nan}, "width_multiplier is nan"),
    ({"num_classes": 0}, "num_classes is 0; it should be at least 1"),
    ({"hidden_units": 0}, "hidden_units is 0; it should be at least 1"),
    ({"dropout": 1.0}, r"dropout is 1.0; it should be in \[0, 1\)"),
  ],
)
def test_bad_arguments(change, message):
  module = MobileNetV3(**({"num_classes": 5, "variant": "small"} | change))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
