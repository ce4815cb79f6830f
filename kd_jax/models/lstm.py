"""A recurrent language model: stacked LSTMs with dropout between them.

Zaremba et al. 2014, "Recurrent Neural Network Regularization",
arXiv:1409.2329.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.errors import check_number
from kd_jax.models.base import Outputs
from kd_jax.models.dropout import Dropout
from kd_jax.models.layers import check_tokens


def _uniform(scale: float) -> nn.initializers.Initializer:
  """Initial values in [-scale, scale); JAX's `uniform` has none below 0."""

  def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -scale, scale)

  return init


class LSTMLanguageModel(nn.Module):
  """Predicts each next token from those before it in its window.

  Every window starts from a state of zeros: there is no carry to pass from one
  window to the next, as the paper has it, so that a batch is a function of its
  tokens alone and windows may be shuffled. Tokens at the start of a window
  have little to go by; score the later ones, or take longer windows.

  Dropout is on the connections between layers: the inputs of every LSTM and of
  the read-out, new masks at each step, never on the path through time (Sec.
  3.2). The gates have one bias each, without a constant added to the one that
  forgets. All parameters start uniformly in [-init_scale, init_scale].

  The defaults are the "medium" network of the paper, 19,775,200 parameters
  with the 10,000 words of the Penn Treebank. "Large" is `width=1500,
  dropout=0.65, init_scale=0.04`, 66,022,000. The submodules are `embedding`,
  `lstm1`, `lstm2`, ... with the kernels in `cell`, and `logits`.

  Reference: Zaremba et al. 2014, arXiv:1409.2329, Sec. 3 and 4.1; tied
  embeddings: Press & Wolf 2017, arXiv:1608.05859, Inan et al. 2017,
  arXiv:1611.01462.

  Attributes:
    num_classes: size of the vocabulary.
    width: units of the embedding and of each LSTM.
    depth: number of LSTMs.
    dropout: share of units dropped in training.
    tied: use the embedding as the weights of the read-out as well. There is a
      bias either way.
    init_scale: bound of the initial values.
    dtype: of the matrix products and gates of the LSTMs. Parameters, the state
      that is carried through time, and logits are float32.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax.models.lstm import LSTMLanguageModel
    >>> model = LSTMLanguageModel(num_classes=10_000)
    >>> outputs, shapes = jax.eval_shape(
    ...     model.init_with_output, jax.random.key(0),
    ...     jnp.zeros((20, 35), jnp.int32))
    >>> outputs.logits.shape
    (20, 35, 10000)
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    19775200
  """

  num_classes: int
  width: int = 650
  depth: int = 2
  dropout: float = 0.5
  tied: bool = False
  init_scale: float = 0.05
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> Outputs:
    """Maps [batch, time] integer tokens to float32 logits of the next ones.

    Args:
      inputs: the tokens, in [0, num_classes). One above is NaN in the logits
        from its place on.
      train: whether dropout (rng `dropout`) is on.

    Returns:
      `Outputs` with [batch, time, num_classes] float32 logits; those at a time
      depend on the tokens up to it.

    Raises:
      ValueError: if an attribute or the shape or dtype of the tokens is wrong.
    """
    self._check(inputs)
    init = _uniform(self.init_scale)
    embedding = nn.Embed(
      self.num_classes, self.width, embedding_init=init, name="embedding"
    )
    x = embedding(inputs)
    # A carry of our own: the cell would split a key to make its zeros.
    zeros = jnp.zeros((inputs.shape[0], self.width), jnp.float32)
    for number in range(1, self.depth + 1):
      x = Dropout(self.dropout)(x, train=train)
      cell = nn.OptimizedLSTMCell(
        self.width,
        kernel_init=init,
        recurrent_kernel_init=init,
        bias_init=init,
        dtype=self.dtype,
        parent=None,  # `RNN` is, so that its name leads to the parameters.
      )
      x = nn.RNN(cell, name=f"lstm{number}")(x, initial_carry=(zeros, zeros))
    x = Dropout(self.dropout)(x, train=train)
    if self.tied:
      bias = self.param("bias", init, (self.num_classes,))
      return Outputs(logits=embedding.attend(x) + bias)
    read_out = nn.Dense(
      self.num_classes, kernel_init=init, bias_init=init, name="logits"
    )
    return Outputs(logits=read_out(x))

  def _check(self, inputs: jax.Array) -> None:
    for field in ("num_classes", "width", "depth"):
      check_number(field, getattr(self, field), least=1)
    check_number("init_scale", self.init_scale, above=0)
    check_tokens(inputs)
