"""A small convolutional network that trains on a CPU in minutes."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from kd_jax.models.base import Outputs


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
        are no images.
    """
    del train
    if inputs.ndim != 4:
      raise ValueError(
        f"inputs has shape {inputs.shape}; it should be "
        "[batch, height, width, channels]"
      )
    x = inputs
    for channels, kernel, stride in self.layers:
      if channels % self.groups:
        raise ValueError(
          f"layers has {channels} channels; they should be a multiple of "
          f"groups, {self.groups}"
        )
      x = nn.Conv(
        channels,
        (kernel, kernel),
        (stride, stride),
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
      )(x)
      x = nn.relu(nn.GroupNorm(num_groups=self.groups)(x))
    x = x.mean((1, 2)) if self.pool else x.reshape(x.shape[0], -1)
    return Outputs(logits=nn.Dense(self.num_classes)(x))
