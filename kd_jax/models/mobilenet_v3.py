"""MobileNetV3: inverted residuals with squeeze-and-excite and hard-swish.

Howard et al. 2019, "Searching for MobileNetV3", arXiv:1905.02244.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.errors import check_number
from kd_jax.models.base import Outputs
from kd_jax.models.dropout import Dropout
from kd_jax.models.layers import check_images, normalised

# Every channel number is a multiple of this, also a squeezed or a narrow one.
_DIVISOR = 8
# The decay is from Sec. 6.1.1, epsilon from the authors' release.
_DECAY = 0.99
_EPSILON = 1e-3

_kernel_init = nn.initializers.he_normal()
# A black image would be 0 in all layers of a fresh network, and each norm
# would multiply its gradient by epsilon^(-1/2): with group norms it overflows.
_stem_bias_init = nn.initializers.normal(0.1)


class _Row(NamedTuple):
  """One "bneck" row of the paper's tables, for a width multiplier of 1."""

  kernel: int
  expanded: int
  out: int
  squeeze: bool
  hard_swish: bool
  stride: int


_STEM = 16
# Table 1.
_LARGE = (
  _Row(3, 16, 16, False, False, 1),
  _Row(3, 64, 24, False, False, 2),
  _Row(3, 72, 24, False, False, 1),
  _Row(5, 72, 40, True, False, 2),
  _Row(5, 120, 40, True, False, 1),
  _Row(5, 120, 40, True, False, 1),
  _Row(3, 240, 80, False, True, 2),
  _Row(3, 200, 80, False, True, 1),
  _Row(3, 184, 80, False, True, 1),
  _Row(3, 184, 80, False, True, 1),
  _Row(3, 480, 112, True, True, 1),
  _Row(3, 672, 112, True, True, 1),
  _Row(5, 672, 160, True, True, 2),
  _Row(5, 960, 160, True, True, 1),
  _Row(5, 960, 160, True, True, 1),
)
# Table 2.
_SMALL = (
  _Row(3, 16, 16, True, False, 2),
  _Row(3, 72, 24, False, False, 2),
  _Row(3, 88, 24, False, False, 1),
  _Row(5, 96, 40, True, True, 2),
  _Row(5, 240, 40, True, True, 1),
  _Row(5, 240, 40, True, True, 1),
  _Row(5, 120, 48, True, True, 1),
  _Row(5, 144, 48, True, True, 1),
  _Row(5, 288, 96, True, True, 2),
  _Row(5, 576, 96, True, True, 1),
  _Row(5, 576, 96, True, True, 1),
)
# The rows, the channels of the last convolution and the last hidden layer.
_VARIANTS = {"large": (_LARGE, 960, 1280), "small": (_SMALL, 576, 1024)}


def _channels(wanted: float) -> int:
  """The nearest multiple of 8, one higher where that loses more than 10%."""
  nearest = max(_DIVISOR, int(wanted / _DIVISOR + 0.5) * _DIVISOR)
  return nearest + _DIVISOR if nearest < 0.9 * wanted else nearest


class ConvNorm(nn.Module):
  """A convolution without bias, a norm and an activation.

  Attributes:
    channels: number of output channels.
    kernel: side of the square kernel.
    stride: the same in both directions.
    depthwise: one kernel per input channel, `channels` of them.
    activation: what follows the norm; None is nothing.
    norm: "batch" or "group"; a group has 8 channels.
    bias_init: how the biases of the norm start.
    dtype: of the computation.
  """

  channels: int
  kernel: int = 1
  stride: int = 1
  depthwise: bool = False
  activation: Callable[[jax.Array], jax.Array] | None = None
  norm: str = "batch"
  bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, h / stride, w / stride, channels]."""
    x = nn.Conv(
      self.channels,
      (self.kernel, self.kernel),
      strides=self.stride,
      padding="SAME",
      feature_group_count=self.channels if self.depthwise else 1,
      use_bias=False,
      kernel_init=_kernel_init,
      dtype=self.dtype,
      name="conv",
    )(inputs)
    x = normalised(
      x,
      self.norm,
      train=train,
      decay=_DECAY,
      epsilon=_EPSILON,
      bias_init=self.bias_init,
      dtype=self.dtype,
    )
    return x if self.activation is None else self.activation(x)


class SqueezeExcite(nn.Module):
  """Scales each channel by a gate in [0, 1] that sees the whole image.

  Hu et al. 2018, arXiv:1709.01507, Sec. 3, with a quarter of the channels in
  the middle and a hard sigmoid as the gate (Sec. 5.3 of the MobileNetV3 paper).

  Attributes:
    dtype: of the computation.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Scales [batch, h, w, channels]."""
    channels = inputs.shape[-1]
    x = jnp.mean(inputs, axis=(1, 2), keepdims=True)
    x = nn.Dense(
      _channels(channels // 4),
      kernel_init=_kernel_init,
      dtype=self.dtype,
      name="squeeze",
    )(x)
    x = nn.Dense(
      channels, kernel_init=_kernel_init, dtype=self.dtype, name="excite"
    )(nn.relu(x))
    return inputs * nn.hard_sigmoid(x)


class InvertedResidual(nn.Module):
  """Expand, filter each channel, squeeze-and-excite, project (Fig. 4).

  The input is added to the output where the stride is 1 and the number of
  channels is the same.

  Attributes:
    kernel: side of the depthwise kernel.
    expanded: channels between the expansion and the projection; there is no
      expansion where the input has that many already.
    channels: number of output channels.
    squeeze: whether there is squeeze-and-excite.
    activation: follows the expansion and the depthwise convolution.
    stride: of the depthwise convolution.
    norm: "batch" or "group".
    dtype: of the computation.
  """

  kernel: int
  expanded: int
  channels: int
  squeeze: bool
  activation: Callable[[jax.Array], jax.Array]
  stride: int = 1
  norm: str = "batch"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, h / stride, w / stride, channels]."""
    common = {"norm": self.norm, "dtype": self.dtype}
    x = inputs
    if self.expanded != inputs.shape[-1]:
      x = ConvNorm(
        self.expanded, activation=self.activation, name="expand", **common
      )(x, train=train)
    x = ConvNorm(
      self.expanded,
      kernel=self.kernel,
      stride=self.stride,
      depthwise=True,
      activation=self.activation,
      name="depthwise",
      **common,
    )(x, train=train)
    if self.squeeze:
      x = SqueezeExcite(dtype=self.dtype, name="squeeze_excite")(x)
    x = ConvNorm(self.channels, name="project", **common)(x, train=train)
    same = self.stride == 1 and self.channels == inputs.shape[-1]
    return inputs + x if same else x


class MobileNetV3(nn.Module):
  """MobileNetV3-Large or -Small: Tables 1 and 2 of arXiv:1905.02244.

  With 1000 classes "large" has 5,483,032 parameters and "small" 2,542,856.
  Convolutions pad as the paper's release does ("SAME"). The submodules are
  `stem`, `block1` to `block15` (`block11` if small), `last`, `hidden` and
  `logits`; those of a block are `expand`, `depthwise`, `squeeze_excite` and
  `project`.

  Attributes:
    num_classes: number of logits.
    variant: "large" or "small".
    width_multiplier: scales all channels, rounded to multiples of 8. An
      expansion keeps its ratio to the block's input.
    hidden_units: units of the layer before the logits. None is 1280 (large)
      or 1024 (small), scaled only by a multiplier above 1: the narrow
      published models keep it whole.
    norm: "batch", or "group" (groups of 8 channels) for a network without
      batch statistics, whose output for an image never depends on the others.
    small_inputs: for images of about 32 by 32: the first two strides of 2
      become 1, so the last feature map is an eighth of the image's side
      instead of a thirty-second.
    dropout: share of hidden units dropped in training. The paper has 0.2.
    dtype: of the computation. Parameters, statistics and logits are float32.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax.models.mobilenet_v3 import MobileNetV3
    >>> model = MobileNetV3(num_classes=1000, variant="small")
    >>> shapes = jax.eval_shape(
    ...     model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    2542856
  """

  num_classes: int
  variant: str = "large"
  width_multiplier: float = 1.0
  hidden_units: int | None = None
  norm: str = "batch"
  small_inputs: bool = False
  dropout: float = 0.0
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
    rows, last, hidden = _VARIANTS[self.variant]
    common = {"norm": self.norm, "dtype": self.dtype}
    multiplier = self.width_multiplier
    strides = [2, *(row.stride for row in rows)]
    if self.small_inputs:
      for _ in range(2):
        strides[strides.index(2)] = 1

    x = ConvNorm(
      _channels(_STEM * multiplier),
      kernel=3,
      stride=strides[0],
      activation=nn.hard_swish,
      bias_init=_stem_bias_init,
      name="stem",
      **common,
    )(inputs, train=train)
    before = _STEM  # channels of the input where the multiplier is 1
    for number, row in enumerate(rows, start=1):
      x = InvertedResidual(
        kernel=row.kernel,
        expanded=_channels(x.shape[-1] * row.expanded / before),
        channels=_channels(row.out * multiplier),
        squeeze=row.squeeze,
        activation=nn.hard_swish if row.hard_swish else nn.relu,
        stride=strides[number],
        name=f"block{number}",
        **common,
      )(x, train=train)
      before = row.out
    x = ConvNorm(
      _channels(last * multiplier),
      activation=nn.hard_swish,
      name="last",
      **common,
    )(x, train=train)

    x = jnp.mean(x, axis=(1, 2))
    if self.hidden_units is None:
      units = _channels(hidden * max(1.0, multiplier))
    else:
      units = self.hidden_units
    x = nn.Dense(
      units, kernel_init=_kernel_init, dtype=self.dtype, name="hidden"
    )(x)
    x = Dropout(self.dropout)(nn.hard_swish(x), train=train)
    x = nn.Dense(self.num_classes, name="logits")(x.astype(jnp.float32))
    return Outputs(logits=x)

  def _check(self, inputs: jax.Array) -> None:
    if self.variant not in _VARIANTS:
      raise ValueError(
        f'variant is {self.variant!r}; it should be "large" or "small"'
      )
    check_number("num_classes", self.num_classes, least=1)
    check_number("width_multiplier", self.width_multiplier, above=0)
    if self.hidden_units is not None:
      check_number("hidden_units", self.hidden_units, least=1)
    check_images(inputs)
