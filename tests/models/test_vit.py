"""Vision transformers against a float64 NumPy forward and published sizes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import count_parameters, from_linen
from kd_jax.models.transformer import AttentionWeights, gelu
from kd_jax.models.vit import ViT, sincos_positions, vit
from tests.models.networks import among_others, images, random_variables

TINY = {"num_classes": 5, "patch_size": 4, "width": 12, "depth": 2, "heads": 3}
erf = np.vectorize(math.erf)


def norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x * p["scale"] + p["bias"]


def dense(x, p):
  return x @ p["kernel"] + p.get("bias", 0.0)


def attention(x, p, heads):
  """One head after the other, one image after the other."""
  width = x.shape[-1]
  d = width // heads
  flat = {
    name: {"kernel": p[name]["kernel"].reshape(width, width)}
    | ({"bias": p[name]["bias"].ravel()} if "bias" in p[name] else {})
    for name in ("query", "key", "value", "out")
  }
  out = np.zeros_like(x)
  for b, tokens in enumerate(x):
    q, k, v = (dense(tokens, flat[name]) for name in ("query", "key", "value"))
    mixed = np.zeros_like(tokens)
    for h in range(heads):
      part = slice(h * d, (h + 1) * d)
      scores = np.exp(q[:, part] @ k[:, part].T / d**0.5)
      mixed[:, part] = scores / scores.sum(-1, keepdims=True) @ v[:, part]
    out[b] = dense(mixed, flat["out"])
  return out


def mlp(x, p):
  x = dense(x, p["fc1"])
  return dense(x * (1 + erf(x / 2**0.5)) / 2, p["fc2"])


def positions(rows, columns, width):
  """sin x, cos x, sin y, cos y, each at width / 4 frequencies."""
  quarter = width // 4
  table = []
  for y in range(rows):
    for x in range(columns):
      rates = [10000 ** (-i / quarter) for i in range(quarter)]
      table.append(
        [
          f(at * rate)
          for at in (x, y)
          for f in (math.sin, math.cos)
          for rate in rates
        ]
      )
  return np.array(table)


def network(x, p, *, heads, patch, pool, sincos):
  batch, h, w, _ = x.shape
  kernel = p["patches"]["kernel"]
  patches = [
    np.tensordot(x[:, i : i + patch, j : j + patch], kernel, axes=3)
    for i in range(0, h, patch)
    for j in range(0, w, patch)
  ]
  x = np.stack(patches, axis=1) + p["patches"]["bias"]
  width = x.shape[-1]
  if sincos:
    x = x + positions(h // patch, w // patch, width)
  for name in ("distillation_token", "class_token"):
    if name in p:
      token = np.broadcast_to(p[name], (batch, 1, width))
      x = np.concatenate([token, x], axis=1)
  if not sincos:
    x = x + p["position_embedding"]
  for name in sorted(name for name in p if name.startswith("block")):
    q = p[name]
    x = x + attention(norm(x, q["norm1"]), q["attention"], heads)
    x = x + mlp(norm(x, q["norm2"]), q["mlp"])
  x = norm(x, p["norm"])
  if pool == "gap":
    return dense(x.mean(1), p["head"])
  logits = dense(x[:, 0], p["head"])
  if "head_distillation" in p:
    logits = (logits + dense(x[:, 1], p["head_distillation"])) / 2
  return logits


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"pool": "gap", "positions": "sincos", "qkv_bias": False, "mlp_ratio": 2.5},
    {"distillation_token": True, "positions": "sincos"},
  ],
)
def test_is_what_numpy_computes(change):
  module = ViT(**TINY, **change)
  x = images(3, 8, 12, 3)
  params = random_variables(module, x)["params"]
  logits = jax.jit(module.apply)({"params": params}, x).logits
  expected = network(
    np.float64(x),
    jax.tree.map(np.float64, params),
    heads=3,
    patch=4,
    pool=module.pool,
    sincos=module.positions == "sincos",
  )
  assert logits.shape == (3, 5) and logits.dtype == jnp.float32
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  assert ("bias" in params["block1"]["attention"]["query"]) == module.qkv_bias


@pytest.mark.parametrize(
  "dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2**-8)]
)
def test_gelu(dtype, tolerance):
  x = jnp.linspace(-8, 8, 161).astype(dtype)
  wide = np.asarray(x, np.float64)
  exact = wide * (1 + erf(wide / math.sqrt(2))) / 2
  found = gelu(x)
  assert found.dtype == x.dtype
  np.testing.assert_allclose(
    np.asarray(found, np.float64), exact, rtol=tolerance, atol=1e-6
  )


def test_sincos_positions():
  np.testing.assert_allclose(
    sincos_positions(3, 5, 16), positions(3, 5, 16), rtol=1e-6, atol=1e-7
  )


@pytest.mark.parametrize(
  ("name", "distillation_token", "count"),
  [
    ("Ti/16", False, 5_717_416),
    ("S/16", False, 22_050_664),
    ("B/16", False, 86_567_656),
    ("Ti/16", True, 5_910_800),
  ],
)
def test_published_numbers_of_parameters(name, distillation_token, count):
  module = vit(name, 1000, distillation_token=distillation_token)
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
  )
  assert count_parameters(shapes) == count


@pytest.fixture(scope="module")
def fresh():
  """A network of one block as it is initialised."""
  model = from_linen(ViT(**(TINY | {"depth": 1}), distillation_token=True))
  x = images(3, 8, 8, 3)
  # A kind of key that compiles fast.
  variables = model.init(jax.random.key(0, impl="unsafe_rbg"), x)
  return jax.jit(model.apply, static_argnames="train"), variables, x


@pytest.fixture(scope="module")
def tiny(fresh):
  """The same with heads that say something."""
  apply, variables, x = fresh
  kernels = np.random.default_rng(2).normal(size=(2, 12, 5)).astype(np.float32)
  params = dict(variables["params"])
  for name, kernel in zip(("head", "head_distillation"), kernels, strict=True):
    params[name] = params[name] | {"kernel": kernel}
  return apply, {"params": params, "state": {}}, x


def test_a_fresh_network_says_nothing(fresh):
  apply, variables, x = fresh
  assert variables["state"] == {}
  outputs, state = apply(variables, x)
  np.testing.assert_array_equal(outputs.logits, 0)
  assert state == {}


def test_training_is_evaluation_and_sees_one_image_at_a_time(tiny):
  apply, variables, x = tiny
  outputs, _ = apply(variables, x)
  again = apply(variables, among_others(x))[0].logits
  np.testing.assert_allclose(again[0], outputs.logits[1], rtol=1e-5, atol=1e-6)
  assert not np.allclose(outputs.logits[1], outputs.logits[2])
  trained, _ = apply(variables, x, train=True)
  np.testing.assert_array_equal(trained.logits, outputs.logits)


def test_gradients_are_finite_and_reach_everything(tiny):
  apply, variables, x = tiny
  x = x.copy()
  x[0] = 0

  @jax.jit
  def gradient(params, x):
    def loss(params):
      out, _ = apply({"params": params, "state": {}}, x, train=True)
      return jnp.mean(nn.log_softmax(out.logits)[:, 0])

    return jax.grad(loss)(params)

  for path, leaf in jax.tree_util.tree_leaves_with_path(
    gradient(variables["params"], x)
  ):
    assert np.isfinite(leaf).all(), path
    # Softmax does not see what a query has in common with all keys.
    if "key']['bias" not in jax.tree_util.keystr(path):
      assert np.abs(leaf).max() > 1e-6, path


def test_both_heads_and_the_attention_maps_can_be_read(tiny):
  _, variables, x = tiny
  module = ViT(
    **(TINY | {"depth": 1}), distillation_token=True, dtype=jnp.bfloat16
  )
  outputs, captured = jax.jit(
    lambda params, x: module.apply(
      {"params": params}, x, capture_intermediates=True
    )
  )(variables["params"], x)
  captured = captured["intermediates"]
  heads = [captured[n]["__call__"][0] for n in ("head", "head_distillation")]
  np.testing.assert_allclose(outputs.logits, (heads[0] + heads[1]) / 2)
  assert outputs.logits.dtype == heads[0].dtype == jnp.float32
  assert not np.allclose(heads[0], heads[1])
  (maps,) = captured["block1"]["attention"]["weights"]["__call__"]
  assert maps.shape == (3, 3, 6, 6) and maps.dtype == jnp.float32
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-6)
  (tokens,) = captured["block1"]["__call__"]
  assert tokens.shape == (3, 6, 12) and tokens.dtype == jnp.bfloat16


@pytest.mark.parametrize(("shift", "spread"), [(0, 100), (10, 0.3)])
def test_softmax_sees_float32_scores_of_bfloat16_tokens(shift, spread):
  draws = shift + spread * images(2, 1, 4, 2, 8)
  q, k = jnp.bfloat16(draws)
  weights = AttentionWeights().apply({}, q, k)
  scores = np.einsum("bqhd,bkhd->bhqk", np.float64(q), np.float64(k)) / 8**0.5
  assert np.abs(scores).max() > 250  # bfloat16 has steps of 1 or more there.
  expected = np.exp(scores - scores.max(-1, keepdims=True))
  expected /= expected.sum(-1, keepdims=True)
  assert weights.dtype == jnp.float32
  np.testing.assert_allclose(weights, expected, rtol=1e-2, atol=1e-6)


def test_fixed_positions_take_images_of_any_size_and_learned_do_not():
  key, x, larger = jax.random.key(0), images(1, 8, 8, 3), images(1, 8, 16, 3)
  module = ViT(**TINY, positions="sincos")
  shapes = jax.eval_shape(module.init, key, x)
  outputs = jax.eval_shape(module.apply, shapes, larger)
  assert outputs.logits.shape == (1, 5)
  module = ViT(**TINY)
  shapes = jax.eval_shape(module.init, key, x)
  with pytest.raises(
    ValueError,
    match="inputs give 9 tokens, but the learned positions are for 5",
  ):
    jax.eval_shape(module.apply, shapes, larger)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_classes": 0}, "num_classes is 0; it should be at least 1"),
    ({"patch_size": 0}, "patch_size is 0; it should be at least 1"),
    ({"depth": 0}, "depth is 0; it should be at least 1"),
    ({"heads": 5}, "width is 12; it should be a multiple of heads, 5"),
    ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0; it should be above 0"),
    ({"pool": "map"}, 'pool is \'map\'; it should be "cls" or "gap"'),
    ({"positions": "none"}, "positions is 'none'; it should be \"learned\""),
    ({"pool": "gap", "distillation_token": True}, "distillation_token is True"),
    (
      {"width": 6, "positions": "sincos"},
      "width is 6; it should be a multiple of 4",
    ),
  ],
)
def test_bad_arguments(change, message):
  module = ViT(**(TINY | change))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(
  ("inputs", "message"),
  [
    (
      np.zeros((1, 8, 10, 3), np.float32),
      "the width of the inputs is 10; it should be a multiple of patch_size, 4",
    ),
    (np.zeros((1, 0, 8, 3), np.float32), "the height of the inputs is 0"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(inputs, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(ViT(**TINY).init, jax.random.key(0), inputs)


@pytest.mark.parametrize("name", ["L/16", "Ti", "S/", "S/x", "S/-16", "s/16"])
def test_unknown_sizes(name):
  with pytest.raises(
    ValueError, match=f"name is '{name}'; it should be one of"
  ):
    vit(name, 10)


def test_sizes_can_be_changed():
  module = vit("S/32", 10, depth=3, pool="gap")
  assert (module.width, module.heads) == (384, 6)
  assert (module.depth, module.patch_size, module.pool) == (3, 32, "gap")
