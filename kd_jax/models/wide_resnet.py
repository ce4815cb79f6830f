"""Wide residual networks, for images of about 32 by 32.

Zagoruyko & Komodakis 2016, "Wide Residual Networks", arXiv:1605.07146.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.errors import check_number
from kd_jax.models.base import Outputs
from kd_jax.models.dropout import Dropout
from kd_jax.models.layers import Conv, Head, NormReLU, check_images

# Channels of the first convolution, and for a width of 1 of the first group.
_STEM = 16


class Block(nn.Module):
  """Two 3x3 convolutions, each after its norm and ReLU (Fig. 1 (a) and (d)).

  Where the number of channels or the resolution changes, the shortcut is a 1x1
  convolution of the activations that the first convolution sees, too.

  Attributes:
    channels: number of output channels.
    stride: of the first convolution.
    dropout: share of units dropped in training between the convolutions.
    norm: "batch" or "group".
    dtype: of the computation.
  """

  channels: int
  stride: int = 1
  dropout: float = 0.0
  norm: str = "batch"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, h / stride, w / stride, channels]."""
    channels, stride, dtype = self.channels, self.stride, self.dtype
    x = NormReLU(self.norm, dtype, name="norm1")(inputs, train=train)
    shortcut = inputs
    if stride != 1 or channels != inputs.shape[-1]:
      shortcut = Conv(channels, 1, stride, dtype, name="shortcut")(x)
    x = Conv(channels, 3, stride, dtype, name="conv1")(x)
    x = NormReLU(self.norm, dtype, name="norm2")(x, train=train)
    x = Dropout(self.dropout)(x, train=train)
    return shortcut + Conv(channels, dtype=dtype, name="conv2")(x)


class Group(nn.Module):
  """Blocks at one resolution: `block1`, `block2`, ...

  Attributes:
    blocks: how many.
    channels: of each block.
    stride: of the first block.
    dropout: see `Block`.
    norm: "batch" or "group".
    dtype: of the computation.
  """

  blocks: int
  channels: int
  stride: int = 1
  dropout: float = 0.0
  norm: str = "batch"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, h / stride, w / stride, channels]."""
    x = inputs
    for i in range(self.blocks):
      x = Block(
        self.channels,
        self.stride if i == 0 else 1,
        self.dropout,
        self.norm,
        self.dtype,
        name=f"block{i + 1}",
      )(x, train=train)
    return x


class WideResNet(nn.Module):
  """Wide ResNet: few pre-activation blocks of many channels (Table 1).

  With 10 classes WRN-28-10 has 36,479,194 parameters, WRN-16-4 2,748,890 and
  WRN-28-1 369,498. The submodules are `stem`, `group1` to `group3` with
  `block1`, `block2`, ... in them, `norm` and `head`; the outputs of the three
  groups are what attention transfer and its kind compare. The second and the
  third group halve the resolution.

  Reference: Zagoruyko & Komodakis 2016, arXiv:1605.07146, Sec. 2; initial
  values, dropout after the second ReLU and the shortcuts are those of the
  authors' release.

  Attributes:
    num_classes: number of logits.
    depth: number of convolutions, 6 n + 4 with n blocks in each group.
    width: multiplies the 16, 32 and 64 channels of the groups. Fractions are
      fine where the channels are whole.
    dropout: share of units dropped in training between the convolutions of a
      block. The paper has 0.3 with CIFAR, 0.4 with SVHN.
    norm: "batch", or "group" (groups of at least 8 channels) for a network
      without batch statistics, whose output for an image never depends on the
      others.
    dtype: of the computation. Parameters, statistics and logits are float32.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax.models.wide_resnet import WideResNet
    >>> model = WideResNet(num_classes=10, depth=28, width=10)
    >>> shapes = jax.eval_shape(
    ...     model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    36479194
  """

  num_classes: int
  depth: int = 28
  width: float = 10
  dropout: float = 0.0
  norm: str = "batch"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> Outputs:
    """Maps [batch, height, width, channels] float images to float32 logits.

    Args:
      inputs: the images; any height and width.
      train: whether batch norms use and record the statistics of the batch,
        and dropout (rng `dropout`) is on.

    Returns:
      `Outputs` with [batch, num_classes] float32 logits.

    Raises:
      ValueError: if an attribute or the shape or dtype of the images is wrong.
    """
    self._check(inputs)
    channels = int(_STEM * self.width)
    x = Conv(_STEM, dtype=self.dtype, name="stem")(inputs)
    for i in range(3):
      x = Group(
        int(self.depth - 4) // 6,
        channels * 2**i,
        stride=1 if i == 0 else 2,
        dropout=self.dropout,
        norm=self.norm,
        dtype=self.dtype,
        name=f"group{i + 1}",
      )(x, train=train)
    x = NormReLU(self.norm, self.dtype, name="norm")(x, train=train)
    return Outputs(logits=Head(self.num_classes, name="head")(x))

  def _check(self, inputs: jax.Array) -> None:
    check_number("num_classes", self.num_classes, least=1)
    check_number("depth", self.depth, least=10)
    check_number("width", self.width, above=0)
    if (self.depth - 4) % 6:
      raise ValueError(
        f"depth is {self.depth}; it should be 4 more than a multiple of 6"
      )
    if _STEM * self.width % 1:
      raise ValueError(
        f"width is {self.width}; {_STEM} times it should be a whole number of "
        "channels"
      )
    check_images(inputs)
