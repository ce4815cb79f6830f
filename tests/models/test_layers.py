"""What the networks for images have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import CNN, BiTResNet, DenseNet, MobileNetV3, ViT, WideResNet
from kd_jax.models.layers import Conv, NormReLU
from tests.models.networks import images


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


@pytest.mark.parametrize(
  "module",
  [
    BiTResNet(5, depth=(1,)),
    CNN(5),
    DenseNet(5, 10, 3),
    MobileNetV3(5, "small", 1 / 8),
    ViT(5, patch_size=4, width=12, depth=2, heads=3),
    WideResNet(5, 10, 1),
  ],
  ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    (
      (8, 8, 3),
      np.float32,
      r"inputs have shape \(8, 8, 3\); it should be \[batch, height, width, "
      r"channels\]",
    ),
    ((1, 8, 8, 3), np.uint8, "inputs are uint8; they should be float"),
  ],
)
def test_bad_images(module, shape, dtype, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), np.zeros(shape, dtype))
