"""Densely connected networks, for images of about 32 by 32.

Huang et al. 2017, "Densely Connected Convolutional Networks",
arXiv:1608.06993.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.errors import check_number
from kd_jax.models.base import Outputs
from kd_jax.models.dropout import Dropout
from kd_jax.models.layers import Conv, Head, NormReLU, check_images

# A bottleneck has this many times the channels that a layer adds (Sec. 3).
_BOTTLENECK = 4
# Channels of the first convolution, but for DenseNet-BC.
_STEM = 16


class DenseLayer(nn.Module):
  """Adds `growth` channels to those that are there.

  Norm, ReLU and a 3x3 convolution; before them, in a bottleneck, the same with
  a 1x1 convolution to 4 `growth` channels.

  Attributes:
    growth: number of channels to add.
    bottleneck: whether there is the 1x1 convolution.
    dropout: share of units dropped in training after each convolution.
    norm: "batch" or "group".
    dtype: of the computation.
  """

  growth: int
  bottleneck: bool = True
  dropout: float = 0.0
  norm: str = "batch"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, h, w, c + growth], the old ones first.

    `train` is positional, because `nn.remat` knows static arguments by their
    place.
    """
    dtype = self.dtype
    x = inputs
    if self.bottleneck:
      x = NormReLU(self.norm, dtype, name="norm1")(x, train=train)
      x = Conv(_BOTTLENECK * self.growth, 1, dtype=dtype, name="conv1")(x)
      x = Dropout(self.dropout)(x, train=train)
    x = NormReLU(self.norm, dtype, name="norm2")(x, train=train)
    x = Conv(self.growth, dtype=dtype, name="conv2")(x)
    x = Dropout(self.dropout)(x, train=train)
    return jnp.concatenate([inputs.astype(dtype), x], axis=-1)


class DenseBlock(nn.Module):
  """Layers at one resolution: `layer1`, `layer2`, ...

  Attributes:
    layers: how many.
    growth: see `DenseLayer`.
    bottleneck: see `DenseLayer`.
    dropout: see `DenseLayer`.
    norm: "batch" or "group".
    remat: see `DenseNet`.
    dtype: of the computation.
  """

  layers: int
  growth: int
  bottleneck: bool = True
  dropout: float = 0.0
  norm: str = "batch"
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, h, w, c + layers * growth]."""
    layer = DenseLayer
    if self.remat:
      layer = nn.remat(DenseLayer, static_argnums=(2,))
    x = inputs
    for i in range(self.layers):
      x = layer(
        self.growth,
        self.bottleneck,
        self.dropout,
        self.norm,
        self.dtype,
        name=f"layer{i + 1}",
      )(x, train)
    return x


class Transition(nn.Module):
  """Fewer channels, and half the resolution (Sec. 3, "Pooling layers").

  Attributes:
    channels: number of output channels.
    dropout: share of units dropped in training after the convolution.
    norm: "batch" or "group".
    dtype: of the computation.
  """

  channels: int
  dropout: float = 0.0
  norm: str = "batch"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, h // 2, w // 2, channels]."""
    x = NormReLU(self.norm, self.dtype, name="norm")(inputs, train=train)
    x = Conv(self.channels, 1, dtype=self.dtype, name="conv")(x)
    x = Dropout(self.dropout)(x, train=train)
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


class DenseNet(nn.Module):
  """DenseNet-BC for small images, or a plain DenseNet.

  With 10 classes DenseNet-BC has 769,162 parameters for a depth of 100 and a
  growth of 12, and 25,624,430 for 190 and 40. The plain networks of the paper
  have `bottleneck=False, reduction=1.0`: 1,019,722 for 40 and 12. The
  submodules are `stem`, `block1` to `block3` with `layer1`, `layer2`, ... in
  them, `transition1`, `transition2`, `norm` and `head`.

  Reference: Huang et al. 2017, arXiv:1608.06993, Sec. 3; initial values as in
  the authors' release.

  Attributes:
    num_classes: number of logits.
    depth: number of convolutions and the read-out: 6 n + 4 with n layers in
      each of the three blocks, or 3 n + 4 without the bottlenecks.
    growth: channels that each layer adds, "k" in the paper.
    reduction: share of the channels that a transition keeps, rounded down.
    bottleneck: whether a 1x1 convolution precedes each 3x3.
    dropout: share of units dropped in training after each convolution but the
      first. The paper has 0.2 where the images are not augmented.
    norm: "batch", or "group" (groups of at least 8 channels) for a network
      without batch statistics, whose output for an image never depends on the
      others.
    remat: compute each layer again in the backward pass instead of keeping
      what is inside it. All that a layer keeps otherwise grows with the square
      of the depth (Pleiss et al. 2017, arXiv:1707.06990). The numbers are the
      same.
    dtype: of the computation. Parameters, statistics and logits are float32.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax.models.densenet import DenseNet
    >>> model = DenseNet(num_classes=10, depth=40, growth=12)
    >>> shapes = jax.eval_shape(
    ...     model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    176122
  """

  num_classes: int
  depth: int = 100
  growth: int = 12
  reduction: float = 0.5
  bottleneck: bool = True
  dropout: float = 0.0
  norm: str = "batch"
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> Outputs:
    """Maps [batch, height, width, channels] float images to float32 logits.

    Args:
      inputs: the images; height and width at least 4.
      train: whether batch norms use and record the statistics of the batch,
        and dropout (rng `dropout`) is on.

    Returns:
      `Outputs` with [batch, num_classes] float32 logits.

    Raises:
      ValueError: if an attribute or the shape or dtype of the images is wrong.
    """
    self._check(inputs)
    common = {"norm": self.norm, "dtype": self.dtype}
    # Sec. 3: "16 (or twice the growth rate for DenseNet-BC)".
    compressed = self.bottleneck and self.reduction < 1
    channels = 2 * self.growth if compressed else _STEM
    x = Conv(channels, dtype=self.dtype, name="stem")(inputs)
    for number in (1, 2, 3):
      if number > 1:
        x = Transition(
          self._kept(x.shape[-1]),
          dropout=self.dropout,
          name=f"transition{number - 1}",
          **common,
        )(x, train=train)
      x = DenseBlock(
        int(self.depth - 4) // self._unit(),
        self.growth,
        bottleneck=self.bottleneck,
        dropout=self.dropout,
        remat=self.remat,
        name=f"block{number}",
        **common,
      )(x, train=train)
    x = NormReLU(self.norm, self.dtype, name="norm")(x, train=train)
    return Outputs(logits=Head(self.num_classes, name="head")(x))

  def _unit(self) -> int:
    """The depth that one more layer in each block adds."""
    return 6 if self.bottleneck else 3

  def _kept(self, channels: int) -> int:
    kept = math.floor(channels * self.reduction)
    if not kept:
      raise ValueError(
        f"reduction is {self.reduction}; it should keep some of {channels} "
        "channels"
      )
    return kept

  def _check(self, inputs: jax.Array) -> None:
    check_number("num_classes", self.num_classes, least=1)
    check_number("growth", self.growth, least=1)
    check_number("reduction", self.reduction, above=0, most=1)
    unit = self._unit()
    check_number("depth", self.depth, least=4 + unit)
    if (self.depth - 4) % unit:
      raise ValueError(
        f"depth is {self.depth}; it should be 4 more than a multiple of {unit} "
        f"where bottleneck is {self.bottleneck}, such as "
        f"{self.depth - (self.depth - 4) % unit}"
      )
    check_images(inputs)
    if min(inputs.shape[1:3]) < 4:
      raise ValueError(
        f"inputs have shape {inputs.shape}; height and width should be at "
        "least 4"
      )
