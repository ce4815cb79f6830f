"""DenseNets against a float64 NumPy forward and the published numbers."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import DenseNet, count_parameters, create
from kd_jax.models.densenet import DenseBlock, DenseLayer
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


def layer(x, p, s, *, batch=False):
  y = x
  for number in "12":
    if f"conv{number}" in p:  # There is no first one without a bottleneck.
      name = f"norm{number}"
      y = norm_relu(y, p[name], s.get(name), batch=batch)
      y = conv(y, p[f"conv{number}"])
  return np.concatenate([x, y], axis=-1)


def network(x, p, s):
  x = conv(x, p["stem"])
  for number in (1, 2, 3):
    if number > 1:
      name = f"transition{number - 1}"
      x = conv(norm_relu(x, p[name]["norm"], s[name]["norm"]), p[name]["conv"])
      h, w = x.shape[1] // 2, x.shape[2] // 2
      x = x[:, : 2 * h, : 2 * w].reshape(len(x), h, 2, w, 2, -1).mean((2, 4))
    name = f"block{number}"
    for i in range(len(p[name])):
      x = layer(x, p[name][f"layer{i + 1}"], s[name][f"layer{i + 1}"])
  return head(norm_relu(x, p["norm"], s["norm"]), p["head"])


@pytest.fixture(scope="module")
def small():
  """DenseNet-BC with two layers a block, compiled once."""
  module = DenseNet(5, depth=16, growth=3)
  return compiled(module, images(3, 9, 6, 3))


def test_with_bottlenecks_it_is_what_numpy_computes(small):
  apply, variables, model, x = small
  logits = apply(model, x)[0].logits
  params, stats = doubles(variables)
  # 6 channels first, 12 after the block, halved; 13 // 2 before the last.
  widths = [
    params[name]["conv"]["conv"]["kernel"].shape[2:]
    for name in ("transition1", "transition2")
  ]
  assert widths == [(12, 6), (12, 6)]
  expected = network(np.float64(x), params, stats)
  assert logits.shape == (3, 5) and logits.dtype == jnp.float32
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_without_bottlenecks_it_is_what_numpy_computes():
  # 16 + 5 channels, of which a fraction is rounded down.
  module = DenseNet(5, depth=7, growth=5, reduction=0.6, bottleneck=False)
  x = images(2, 7, 8, 1)
  variables = random_variables(module, x)
  params, stats = doubles(variables)
  widths = [
    params[name]["conv"]["conv"]["kernel"].shape[2:]
    for name in ("transition1", "transition2")
  ]
  assert widths == [(21, 12), (17, 10)]
  logits = jax.jit(module.apply)(variables, x).logits
  expected = network(np.float64(x), params, stats)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_evaluation_changes_nothing_and_sees_one_image_at_a_time(small):
  check_evaluation(small)


def test_training_normalises_and_records_the_batch():
  module = DenseLayer(3)
  x = images(4, 6, 5, 7)
  variables = random_variables(module, x, False)
  params, stats = doubles(variables)
  y, new = jax.jit(
    lambda v, x: module.apply(v, x, True, mutable=["batch_stats"])
  )(variables, x)
  expected = layer(np.float64(x), params, {}, batch=True)
  assert y.shape == (4, 6, 5, 10)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  z = norm_relu(np.float64(x), params["norm1"], None, batch=True)
  z = conv(z, params["conv1"])
  new, old = (s["norm2"]["norm"] for s in (new["batch_stats"], stats))
  for name, value in (("mean", z.mean((0, 1, 2))), ("var", z.var((0, 1, 2)))):
    np.testing.assert_allclose(
      new[name], 0.9 * old[name] + 0.1 * value, rtol=1e-4, atol=1e-6
    )


def test_remat_has_the_same_variables_gradients_and_dropout():
  x = images(4, 4, 4, 5)
  results = []
  for remat in (False, True):
    module = DenseBlock(1, growth=3, dropout=0.2, remat=remat)
    variables = random_variables(module, x, train=False)

    def gradient(variables, module=module):
      def loss(params):
        y, new = module.apply(
          variables | {"params": params},
          x,
          train=True,
          rngs={"dropout": jax.random.key(1)},
          mutable=["batch_stats"],
        )
        return jnp.square(y).sum(), (y, new)

      return jax.grad(loss, has_aux=True)(variables["params"])

    results.append(jax.jit(gradient)(variables))
    # That it computes something twice shows in the program only.
    program = str(jax.make_jaxpr(gradient)(variables))
    assert ("checkpoint" in program or "remat" in program) == remat
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    *results,
  )


def test_group_norm_trains_without_state_and_one_image_at_a_time():
  fields = {"depth": 10, "growth": 3, "norm": "group"}
  model = create("densenet", 5, **fields)
  x = images(3, 4, 5, 3)
  variables = random_variables(DenseNet(5, **fields), x)
  assert set(variables) == {"params"}
  variables["state"] = {}
  train = jax.jit(lambda v, x: model.apply(v, x, train=True)[0].logits)
  logits = train(variables, x)
  assert np.all(np.isfinite(logits)) and np.std(logits) > 0
  again = train(variables, among_others(x))
  np.testing.assert_allclose(again[0], logits[1], rtol=1e-4, atol=1e-5)


def counted(depth, growth, compressed, classes=10):
  """Parameters, layer by layer, of DenseNet-BC or of the plain network."""
  norm = lambda c: 2 * c
  c = 2 * growth if compressed else 16
  total = 9 * 3 * c
  for block in range(3):
    for _ in range((depth - 4) // (6 if compressed else 3)):
      if compressed:
        total += norm(c) + c * 4 * growth + norm(4 * growth)
        total += 9 * 4 * growth * growth
      else:
        total += norm(c) + 9 * c * growth
      c += growth
    if block < 2:
      kept = c // 2 if compressed else c
      total += norm(c) + c * kept
      c = kept
  return total + norm(c) + (c + 1) * classes


def test_the_count_by_hand_is_the_published_one():
  # Table 2 of the paper, in millions.
  for args, millions in (
    ((40, 12, False), 1.0),
    ((100, 12, False), 7.0),
    ((100, 24, False), 27.2),
    ((100, 12, True), 0.8),
    ((250, 24, True), 15.3),
    ((190, 40, True), 25.6),
  ):
    assert round(counted(*args) / 1e6, 1) == millions
  # To a unit, as other reimplementations count.
  assert counted(100, 12, True, classes=100) == 800_032
  assert counted(190, 40, True) == 25_624_430


@pytest.mark.parametrize(
  ("depth", "growth", "compressed", "norm", "count"),
  [
    (100, 12, True, "batch", 769_162),
    (40, 12, True, "group", 176_122),
    (40, 12, False, "batch", 1_019_722),
  ],
)
def test_numbers_of_parameters_and_sizes_of_feature_maps(
  depth, growth, compressed, norm, count
):
  module = DenseNet(
    10,
    depth,
    growth,
    reduction=0.5 if compressed else 1.0,
    bottleneck=compressed,
    norm=norm,
    dtype=jnp.bfloat16,
  )
  outputs, shapes = jax.eval_shape(
    lambda: module.init_with_output(
      jax.random.key(0),
      jnp.zeros((2, 32, 32, 3)),
      capture_intermediates=lambda m, _: isinstance(m, DenseBlock),
      mutable=["params", "batch_stats", "intermediates"],
    )
  )
  assert count_parameters(shapes) == count == counted(depth, growth, compressed)
  assert ("batch_stats" in shapes) == (norm == "batch")
  for number, side in ((1, 32), (2, 16), (3, 8)):
    (out,) = shapes["intermediates"][f"block{number}"]["__call__"]
    assert out.shape[:3] == (2, side, side) and out.dtype == jnp.bfloat16
  assert outputs.logits.shape == (2, 10)
  assert outputs.logits.dtype == jnp.float32


def test_bfloat16_computes_close_to_float32(small):
  apply, variables, model, x = small
  module = DenseNet(5, depth=16, growth=3, dtype=jnp.bfloat16)
  logits = jax.jit(module.apply)(variables, x).logits
  expected = apply(model, x)[0].logits
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected, rtol=0.1, atol=0.2)


def test_dropout_follows_each_convolution_but_the_first_in_training_only():
  module = DenseNet(5, depth=10, growth=3, dropout=0.2)
  x = jnp.zeros((2, 4, 4, 3))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)

  def trace(train, rngs=None):
    def apply(v):
      return module.apply(v, x, train=train, rngs=rngs, mutable=["batch_stats"])

    return str(jax.make_jaxpr(apply)(shapes))

  assert "random" not in trace(train=False)
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    trace(train=True)
  # Two in each of three layers, one in each of two transitions.
  drawn = trace(train=True, rngs={"dropout": jax.random.key(0)})
  assert drawn.count("random_bits[") == 8


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"depth": 90}, "depth is 90; .* multiple of 6 .* is True, such as 88"),
    (
      {"depth": 12, "bottleneck": False},
      "depth is 12; .* multiple of 3 .* is False, such as 10",
    ),
    ({"depth": 4}, "depth is 4; it should be at least 10"),
    ({"growth": 0}, "growth is 0; it should be at least 1"),
    ({"reduction": 0.0}, "reduction is 0.0; it should be above 0"),
    ({"reduction": 1.5}, "reduction is 1.5; .* at most 1"),
    ({"reduction": 0.1}, "reduction is 0.1; it should keep some of 9 channels"),
    ({"norm": "layer"}, 'norm is \'layer\'; it should be "batch" or "group"'),
    ({"num_classes": 0}, "num_classes is 0; it should be at least 1"),
    ({"dropout": -0.1}, r"dropout is -0.1; it should be in \[0, 1\)"),
  ],
)
def test_bad_arguments(change, message):
  module = DenseNet(**({"num_classes": 5, "depth": 10, "growth": 3} | change))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_small_images_are_refused():
  x = jnp.zeros((1, 8, 3, 3))
  with pytest.raises(ValueError, match="inputs .* should be at least 4"):
    jax.eval_shape(DenseNet(5, 10, 3).init, jax.random.key(0), x)
