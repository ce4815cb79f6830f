"""Fully connected network: the model of Hinton et al. 2015, Sec. 3."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from kd_jax.models.base import Outputs
from kd_jax.models.dropout import Dropout


class MLP(nn.Module):
  """ReLU layers and a linear read-out.

  Attributes:
    hidden: units of each hidden layer.
    num_classes: number of logits.
    dropout: share of hidden units dropped in training.
    input_dropout: share of inputs dropped in training.
  """

  hidden: Sequence[int]
  num_classes: int
  dropout: float = 0.0
  input_dropout: float = 0.0

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> Outputs:
    """Maps [batch, ...] float inputs to `Outputs` with float32 logits."""
    x = inputs.reshape(inputs.shape[0], -1)
    x = Dropout(self.input_dropout)(x, train=train)
    for units in self.hidden:
      x = nn.relu(nn.Dense(units, kernel_init=nn.initializers.he_normal())(x))
      x = Dropout(self.dropout)(x, train=train)
    return Outputs(logits=nn.Dense(self.num_classes)(x))
