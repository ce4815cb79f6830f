"""A small convolutional network that trains on a CPU in minutes."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from kd_jax.models.base import Outputs
from kd_jax.models.layers import check_images


def convolutions(
  inputs: jax.Array,
  layers: Sequence[tuple[int, int, int]],
  groups: int,
  name: str | None = None,
) -> jax.Array:
  """Convolutions with group normalisation and ReLU, within a compact module.

  Args:
    inputs: [batch, height, width, channels].
    layers: (channels, kernel size, stride) of each.
    groups: of the normalisation.
    name: the submodules are `{name}_conv{i}` and `{name}_norm{i}`; None leaves
      their names to Flax.

  Returns:
    The last feature map.

  Raises:
    ValueError: if the channels do not divide into the groups.
  """
  x = inputs
  for i, (channels, kernel, stride) in enumerate(layers):
    if channels % groups:
      raise ValueError(
        f"layers has {channels} channels; they should be a multiple of "
        f"groups, {groups}"
      )
    x = nn.Conv(
      channels,
      (kernel, kernel),
      (stride, stride),
      use_bias=False,
      kernel_init=nn.initializers.he_normal(),
      name=name and f"{name}_conv{i}",
    )(x)
    norm = nn.GroupNorm(num_groups=groups, name=name and f"{name}_norm{i}")
    x = nn.relu(norm(x))
  return x


class CNN(nn.Module):
  """Convolutions with group normalisation and ReLU, and a linear read-out.

  Nothing depends on the batch, and nothing changes between training and use.

  Attributes:
    num_classes: number of logits.
    layers: (channels, kernel size, stride) of each convolution; the channels
      are multiples of `groups`.
    groups: of the normalisation.
    pool: read out the mean over all places, instead of every place.
  """

  num_classes: int
  layers: Sequence[tuple[int, int, int]] = ((16, 3, 2), (32, 3, 2), (64, 3, 2))
  groups: int = 8
  pool: bool = True

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> Outputs:
    """Maps float images [batch, height, width, channels] to `Outputs`.

    Raises:
      ValueError: if the channels do not divide into the groups, or the inputs
        are no float images.
    """
    del train
    check_images(inputs)
    x = convolutions(inputs, self.layers, self.groups)
    x = x.mean((1, 2)) if self.pool else x.reshape(x.shape[0], -1)
    return Outputs(logits=nn.Dense(self.num_classes)(x))
