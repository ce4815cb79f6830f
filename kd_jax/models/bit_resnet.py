"""The ResNet v2 of Big Transfer: group norm and standardized weights."""

from collections.abc import Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.errors import check_number
from kd_jax.models.base import Outputs
from kd_jax.models.layers import check_images

# Units in each block: as released, and the R26 of timm and big_vision.
BLOCKS: dict[str, tuple[int, ...]] = {
  "R26": (2, 2, 2, 2),
  "R50": (3, 4, 6, 3),
  "R101": (3, 4, 23, 3),
  "R152": (3, 8, 36, 3),
}


class StdConv(nn.Module):
  """Convolution whose filters have mean 0 and variance 1.

  The parameter `kernel` [size, size, in, features] is standardized for each
  output channel before it is used, so its scale does not matter. There is no
  bias; the borders are padded with `size // 2` zeros, whatever the stride.

  Reference: Qiao et al. 2019, arXiv:1903.10520, Sec. 3; epsilon 1e-10 under
  the root as in the BiT release.

  Attributes:
    features: output channels.
    size: height and width of the filters, odd.
    stride: of both axes.
    dtype: of the convolution; the filters are standardized in float32.
  """

  features: int
  size: int = 1
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps [batch, h, w, in] to [batch, h', w', features] of the dtype."""
    shape = (self.size, self.size, inputs.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    kernel = kernel.astype(jnp.float32)
    kernel -= kernel.mean((0, 1, 2))
    kernel /= jnp.sqrt(jnp.square(kernel).mean((0, 1, 2)) + 1e-10)
    pad = self.size // 2
    return jax.lax.conv_general_dilated(
      inputs.astype(self.dtype),
      kernel.astype(self.dtype),
      window_strides=(self.stride, self.stride),
      padding=((pad, pad), (pad, pad)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _group_norm(
  name: str, channels: int, groups: int, dtype: Any
) -> nn.GroupNorm:
  count = min(groups, channels)
  if count < 1 or channels % count:
    raise ValueError(
      f"groups is {groups}; it should divide the {channels} channels of {name}"
    )
  # The variance around the mean, as in the release: E[x^2] - E[x]^2, Flax's
  # default, is less exact.
  return nn.GroupNorm(
    num_groups=count,
    epsilon=1e-5,
    use_fast_variance=False,
    dtype=dtype,
    name=name,
  )


class Root(nn.Module):
  """From the image to the first block.

  Attributes:
    features: output channels.
    kind: "imagenet" or "cifar", see `BiTResNet.root`.
    dtype: of the computation.
  """

  features: int
  kind: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, h', w', features]."""
    common = {"dtype": self.dtype, "name": "conv"}
    if self.kind == "cifar":
      return StdConv(self.features, size=3, **common)(images)
    if self.kind != "imagenet":
      raise ValueError(
        f'root is {self.kind!r}; it should be "imagenet" or "cifar"'
      )
    x = StdConv(self.features, size=7, stride=2, **common)(images)
    # Zeros, and not the -inf that pooling pads with: x has no ReLU behind it,
    # so that a border window can be negative throughout.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return nn.max_pool(x, (3, 3), strides=(2, 2))


class Unit(nn.Module):
  """Bottleneck with the activations before the convolutions.

  The shortcut is projected, after the first activation, where the shape
  changes. The stride is that of the 3x3 convolution.

  Attributes:
    features: channels of the 3x3 convolution; four times as many come out.
    stride: of both axes.
    groups: see `BiTResNet.groups`.
    dtype: of the computation.
  """

  features: int
  stride: int
  groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps [batch, h, w, in] to [batch, h', w', 4 features]."""
    channels, features = inputs.shape[-1], self.features
    conv = functools.partial(StdConv, dtype=self.dtype)

    def active(name: str, x: jax.Array) -> jax.Array:
      norm = _group_norm(name, x.shape[-1], self.groups, self.dtype)
      return nn.relu(norm(x))

    x = active("norm1", inputs)
    shortcut = inputs
    if self.stride != 1 or channels != 4 * features:
      shortcut = conv(4 * features, stride=self.stride, name="proj")(x)
    x = active("norm2", conv(features, name="conv1")(x))
    x = conv(features, size=3, stride=self.stride, name="conv2")(x)
    x = active("norm3", x)
    return shortcut + conv(4 * features, name="conv3")(x)


class Block(nn.Module):
  """Units at one resolution: `unit01`, `unit02`, ...

  Attributes:
    units: how many.
    features: of each unit.
    stride: of the first unit.
    groups: see `BiTResNet.groups`.
    dtype: of the computation.
  """

  units: int
  features: int
  stride: int
  groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [batch, h, w, in] to [batch, h', w', 4 features]."""
    for i in range(self.units):
      stride = self.stride if i == 0 else 1
      name = f"unit{i + 1:02d}"
      unit = Unit(self.features, stride, self.groups, self.dtype, name=name)
      x = unit(x)
    return x


class BiTResNet(nn.Module):
  """ResNet v2 with group norm and standardized weights, as in Big Transfer.

  No batch statistics and no dropout: training and evaluation compute the same.
  The sub-modules are `root`, `block1`, ... with `unit01`, ... in them, `norm`
  and `head`; `models.bit_npz` reads the released weights into them. Those
  expect images of 3 channels in [-1, 1].

  Reference: Kolesnikov et al. 2020, arXiv:1912.11370, Sec. 3.1; the block is
  that of He et al. 2016, arXiv:1603.05027, with the stride on the 3x3.

  Attributes:
    num_classes: number of logits.
    depth: "R26", "R50", "R101", "R152", or the number of units in each block,
      such as (1, 1, 1). Every block but the first halves the resolution and
      doubles the channels.
    width: multiplies `base_width`: R152x4 is `depth="R152", width=4`.
    root: "imagenet" (7x7 convolution with stride 2, then 3x3 max pooling with
      stride 2) or "cifar" (3x3 convolution with stride 1) for small images.
    base_width: channels of the root and of the first block's 3x3 convolutions.
    groups: of each group norm; one per channel where the channels are fewer.
      Such a group has nothing but its image to normalise over, so take fewer
      groups for a narrow network that shrinks images to one pixel.
    dtype: of the computation; weights, means, variances and the head are in
      float32.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax.models.bit_resnet import BiTResNet
    >>> model = BiTResNet(10, depth=(1, 1, 1), base_width=16, root="cifar")
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> init = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    >>> init[0].logits.shape
    (2, 10)
  """

  num_classes: int
  depth: str | Sequence[int] = "R50"
  width: float = 1
  root: str = "imagenet"
  base_width: int = 64
  groups: int = 32
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> Outputs:
    """Maps [batch, h, w, c] float images to `Outputs`, all in float32."""
    del train  # The same either way.
    check_number("num_classes", self.num_classes, least=1)
    check_images(inputs)
    features = self._features()
    groups, dtype = self.groups, self.dtype
    x = Root(features, self.root, dtype, name="root")(inputs)
    for i, units in enumerate(self._blocks()):
      stride = 1 if i == 0 else 2
      name = f"block{i + 1}"
      block = Block(units, features * 2**i, stride, groups, dtype, name=name)
      x = block(x)
    x = nn.relu(_group_norm("norm", x.shape[-1], groups, jnp.float32)(x))
    head = nn.Dense(
      self.num_classes, kernel_init=nn.initializers.zeros, name="head"
    )
    return Outputs(logits=head(x.mean((1, 2))))

  def _blocks(self) -> tuple[int, ...]:
    if isinstance(self.depth, str):
      blocks = BLOCKS.get(self.depth, ())
    else:
      blocks = tuple(self.depth)
    if not blocks or any(units < 1 for units in blocks):
      raise ValueError(
        f"depth is {self.depth!r}; it should be one of {', '.join(BLOCKS)}, or "
        "the number of units in each block, at least 1"
      )
    return blocks

  def _features(self) -> int:
    features = round(self.base_width * self.width)
    if features < 1 or features != self.base_width * self.width:
      raise ValueError(
        f"width is {self.width}; {self.base_width} (base_width) times it "
        "should be a whole number of channels"
      )
    return features
