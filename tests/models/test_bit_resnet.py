"""The ResNet v2 of Big Transfer: sizes, layers, training, refusals."""

import math

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models
from kd_jax.models.bit_resnet import BiTResNet, StdConv
from tests.models.networks import images, random_variables


def abstract_params(model, image=(32, 32, 3)):
  images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


# What timm 1.0.29 counts in its resnetv2_*_bit, with the released classes of
# ImageNet and, the last row, of ImageNet-21k.
@pytest.mark.parametrize(
  "depth, width, num_classes, parameters",
  [
    ("R50", 1, 1000, 25_549_352),
    ("R101", 3, 1000, 387_934_888),
    ("R152", 2, 1000, 236_335_208),
    ("R152", 4, 1000, 936_533_224),
    ("R50", 1, 21_843, 68_256_659),
  ],
)
def test_parameters_of_the_published_models(
  depth, width, num_classes, parameters
):
  model = BiTResNet(num_classes, depth=depth, width=width)
  leaves = jax.tree.leaves(abstract_params(model))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


def test_parameters_of_r26_by_hand():
  count = 7 * 7 * 3 * 64
  before = 64
  for mid in (64, 128, 256, 512):
    for unit in range(2):
      count += before * mid + 9 * mid * mid + mid * 4 * mid  # Convolutions.
      count += before * 4 * mid if unit == 0 else 0  # Projection.
      count += 2 * (before + mid + mid)  # Group norms.
      before = 4 * mid
  count += 2 * before + before * 10 + 10
  leaves = jax.tree.leaves(abstract_params(BiTResNet(10, depth="R26")))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == count


@pytest.mark.parametrize(
  "image, root, shapes",
  [
    ((224, 224, 3), "imagenet", [56, 56, 28, 14, 7]),
    ((33, 33, 3), "imagenet", [9, 9, 5, 3, 2]),
    ((32, 32, 1), "cifar", [32, 32, 16, 8, 4]),
  ],
)
def test_resolutions_and_capture_by_name(image, root, shapes):
  model = BiTResNet(5, depth=(1, 1, 2, 1), width=0.125, root=root)
  images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
  _, state = jax.eval_shape(
    lambda x: model.init_with_output(
      jax.random.key(0), x, capture_intermediates=True
    ),
    images,
  )
  seen = state["intermediates"]
  names = ["root", "block1", "block2", "block3", "block4"]
  channels = [8, 32, 64, 128, 256]
  for name, side, features in zip(names, shapes, channels, strict=True):
    output = seen[name]["__call__"][0]
    assert output.shape == (2, side, side, features), name
  assert seen["block3"]["unit02"]["__call__"][0].shape[-1] == 128


def test_std_conv_ignores_the_scale_and_shift_of_its_filters():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 7, 6, 3)).astype(np.float32)
  conv = jax.jit(StdConv(5, size=3, stride=2).apply)
  kernel = rng.normal(size=(3, 3, 3, 5)).astype(np.float32)
  scale = rng.uniform(0.5, 2.0, size=5).astype(np.float32)
  y = conv({"params": {"kernel": kernel}}, x)
  assert y.shape == (2, 4, 3, 5)
  moved = conv({"params": {"kernel": kernel * scale + 0.3}}, x)
  np.testing.assert_allclose(moved, y, rtol=1e-4, atol=1e-4)
  # The plain convolution with filters standardised in float64.
  w = np.float64(kernel)
  w = (w - w.mean((0, 1, 2))) / w.std((0, 1, 2))
  plain = nn.Conv(5, (3, 3), 2, padding=1, use_bias=False)
  expected = plain.apply({"params": {"kernel": jnp.float32(w)}}, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_learns_from_a_zero_head():
  module = BiTResNet(3, depth=(1, 1), base_width=8, groups=4, root="cifar")
  rng = np.random.default_rng(0)
  labels = np.arange(12) % 3
  x = rng.normal(size=(12, 8, 8, 1)).astype(np.float32)
  x[..., 0] += np.cos(np.arange(8) * (labels[:, None, None] + 1.0))

  # Only what is asked for is compiled: drawing the kernels takes long.
  affine = jax.jit(lambda key: _without_convolutions(module.init(key, x)))
  init = affine(jax.random.key(0))
  assert not np.any(init["head/kernel"])
  assert not any(np.any(v) for k, v in init.items() if k.endswith("/bias"))
  assert all(np.all(v == 1) for k, v in init.items() if k.endswith("/scale"))
  params = {
    k: init[k] if k in init else rng.normal(0, 0.1, v.shape)
    for k, v in flatten_dict(
      abstract_params(module, (8, 8, 1)), sep="/"
    ).items()
  }
  params = jax.tree.map(jnp.float32, unflatten_dict(params, sep="/"))

  model = models.from_linen(module)

  def loss_fn(params, train):
    outputs, state = model.apply(
      {"params": params, "state": {}}, x, train=train
    )
    assert state == {}
    log_p = jax.nn.log_softmax(outputs.logits)
    return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()

  @jax.jit
  def step(params):
    loss, grads = jax.value_and_grad(loss_fn)(params, True)
    return loss, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

  trained, evaluated = (
    str(jax.make_jaxpr(loss_fn, static_argnums=1)(params, train))
    for train in (True, False)
  )
  assert trained == evaluated
  losses = []
  for _ in range(20):
    loss, params = step(params)
    losses.append(float(loss))
  assert losses[0] == pytest.approx(np.log(3), abs=1e-6)
  assert losses[-1] < 0.3 * losses[0]


def _without_convolutions(variables):
  params = flatten_dict(variables["params"], sep="/")
  return {k: v for k, v in params.items() if v.ndim < 4}


def test_logits_are_float32_for_half_precision_images():
  model = BiTResNet(3, depth=(1,), base_width=4, root="cifar")
  x = jnp.ones((1, 4, 4, 3), jnp.bfloat16)
  shape = jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0]
  assert shape.logits.dtype == jnp.float32


def test_bfloat16_computes_close_to_float32():
  module = BiTResNet(3, depth=(1, 1), base_width=8, groups=4)
  x = images(2, 32, 32, 3)
  variables = random_variables(module, x)
  half = module.clone(dtype=jnp.bfloat16)
  run = jax.jit(lambda m, v, x: m.apply(v, x).logits, static_argnums=0)
  want, found = run(module, variables, x), run(half, variables, x)
  assert found.dtype == jnp.float32
  distance = np.abs(found - want).max() / np.abs(want).max()
  assert 0 < distance < 0.1


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"depth": "R18"}, r"depth is 'R18'; it should be one of R26, R50, R101"),
    ({"depth": ()}, r"depth is \(\); it should be one of"),
    ({"depth": (1, 0)}, r"depth is \(1, 0\); it should be one of"),
    ({"root": "svhn"}, r"root is 'svhn'; it should be \"imagenet\" or"),
    ({"width": 0.3}, r"width is 0\.3; 64 \(base_width\) times it should be a"),
    ({"width": 0}, r"width is 0; 64 \(base_width\) times it should be a whole"),
    (
      {"width": 0.75},
      r"groups is 32; it should divide the 48 channels of norm",
    ),
    ({"groups": 0}, r"groups is 0; it should divide the 64 channels of norm1"),
    ({"num_classes": 0}, r"num_classes is 0; it should be at least 1"),
  ],
)
def test_bad_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    abstract_params(BiTResNet(**{"num_classes": 3, "depth": (1,)} | fields))
  assert "\n" not in str(error.value)
