"""Layers that several of the networks for images have in common."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Those of Torch, which the releases of Wide ResNet and DenseNet leave as they
# are. Torch's momentum of 0.1 is the share of the new statistics, this decay
# that of the old.
_DECAY = 0.9
_EPSILON = 1e-5
# The least number of channels in a group.
_GROUP = 8
# Normal with the variance 2 / (kernel area * output channels).
_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Torch's default for linear layers, without its random biases.
_head_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def normalised(
  inputs: jax.Array, kind: str, *, train: bool, decay: float, **common: Any
) -> jax.Array:
  """A norm with scale and bias, the submodule `norm` of a compact module.

  Args:
    inputs: [batch, h, w, c].
    kind: "batch" or "group". A group has 8 channels, or the next larger number
      that divides them; fewer than 8 channels are one group.
    train: whether a batch norm uses and records the statistics of the batch.
    decay: share of the old statistics that a batch norm keeps.
    **common: attributes of both norms, such as `epsilon` and `dtype`.

  Returns:
    As many, of the `dtype` in `common`.

  Raises:
    ValueError: if there is no such kind.
  """
  norm: nn.Module
  if kind == "batch":
    norm = nn.BatchNorm(
      use_running_average=not train, momentum=decay, name="norm", **common
    )
  elif kind == "group":
    channels = inputs.shape[-1]
    size = min(_GROUP, channels)
    while channels % size:
      size += 1
    norm = nn.GroupNorm(num_groups=None, group_size=size, name="norm", **common)
  else:
    raise ValueError(f'norm is {kind!r}; it should be "batch" or "group"')
  return norm(inputs)


class Conv(nn.Module):
  """A convolution without bias, its borders padded with `kernel // 2` zeros.

  Attributes:
    channels: number of output channels.
    kernel: side of the square kernel, odd.
    stride: the same in both directions.
    dtype: of the computation.
  """

  channels: int
  kernel: int = 3
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, h / stride, w / stride, channels]."""
    # Not "SAME", which pads an even image less where the stride is 2.
    pad = self.kernel // 2
    return nn.Conv(
      self.channels,
      (self.kernel, self.kernel),
      strides=self.stride,
      padding=pad,
      use_bias=False,
      kernel_init=_kernel_init,
      dtype=self.dtype,
      name="conv",
    )(inputs)


class NormReLU(nn.Module):
  """A norm with scale and bias, and a ReLU: what precedes a convolution.

  Attributes:
    norm: "batch" or "group", see `normalised`.
    dtype: of the computation.
  """

  norm: str = "batch"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Maps [batch, h, w, c] to as many."""
    x = normalised(
      inputs,
      self.norm,
      train=train,
      decay=_DECAY,
      epsilon=_EPSILON,
      dtype=self.dtype,
    )
    return nn.relu(x)


class Head(nn.Module):
  """Mean over all places and a linear read-out, in float32.

  Attributes:
    num_classes: number of logits.
  """

  num_classes: int

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps [batch, h, w, c] to [batch, num_classes] float32."""
    x = jnp.mean(inputs.astype(jnp.float32), axis=(1, 2))
    return nn.Dense(self.num_classes, kernel_init=_head_init, name="dense")(x)


def check_images(inputs: jax.Array) -> None:
  """Raises ValueError unless these are float [batch, height, width, channels].

  Args:
    inputs: what a network was given.
  """
  if inputs.ndim != 4:
    raise ValueError(
      f"inputs have shape {inputs.shape}; it should be [batch, height, "
      "width, channels]"
    )
  if not jnp.issubdtype(inputs.dtype, jnp.floating):
    raise ValueError(f"inputs are {inputs.dtype}; they should be float")


def check_tokens(inputs: jax.Array) -> None:
  """Raises ValueError unless these are integer [batch, time].

  Args:
    inputs: what a network was given.
  """
  if inputs.ndim != 2:
    raise ValueError(
      f"inputs have shape {inputs.shape}; it should be [batch, time]"
    )
  if not jnp.issubdtype(inputs.dtype, jnp.integer):
    raise ValueError(f"inputs are {inputs.dtype}; they should be integers")
