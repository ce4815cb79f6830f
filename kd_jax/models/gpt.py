"""A language model of transformer blocks, the network of GPT-2."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.errors import check_number
from kd_jax.models.base import Outputs
from kd_jax.models.dropout import Dropout
from kd_jax.models.layers import check_tokens
from kd_jax.models.transformer import Block

_EPSILON = 1e-5


class GPT(nn.Module):
  """Predicts each next token from those before it in its window.

  The submodules are `embedding`, `positions`, `block1`, `block2`, ... (see
  `transformer.Block`) and `norm`; if the read-out is not tied, `logits`. It
  has no bias. The defaults are the smallest of the four networks of the paper,
  124,439,808 parameters with its 50,257 tokens. Its authors drop units of the
  attention weights as well; here only those that are added are dropped.

  `Outputs.features["hidden"]` is what the logits are read from, for losses of
  large vocabularies such as `losses.linear_divergence_sum`: logits = hidden @
  head, where head is the transposed `params["embedding"]["embedding"]` of a
  tied model, or `params["logits"]["kernel"]`. Logits that nobody asks for cost
  nothing in a compiled program.

  Reference: Radford et al. 2019, "Language models are unsupervised multitask
  learners", Sec. 2.3; the blocks: Vaswani et al. 2017, arXiv:1706.03762; tied
  embeddings: Press & Wolf 2017, arXiv:1608.05859.

  Attributes:
    num_classes: size of the vocabulary.
    width: features of a token.
    depth: number of blocks.
    heads: number of attention heads; they share the width.
    max_length: the longest window, as every place has an embedding.
    tied: use the embedding as the weights of the read-out as well.
    dropout: share of units dropped in training, of the embeddings and of what
      attention and MLPs add.
    dtype: of the computation. Parameters, softmax and logits are float32.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax.models.gpt import GPT
    >>> model = GPT(num_classes=50_257)
    >>> outputs, shapes = jax.eval_shape(
    ...     model.init_with_output, jax.random.key(0),
    ...     jnp.zeros((2, 35), jnp.int32))
    >>> outputs.logits.shape
    (2, 35, 50257)
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    124439808
  """

  num_classes: int
  width: int = 768
  depth: int = 12
  heads: int = 12
  max_length: int = 1024
  tied: bool = True
  dropout: float = 0.0
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
    init = nn.initializers.normal(0.02)
    embedding = nn.Embed(
      self.num_classes, self.width, embedding_init=init, name="embedding"
    )
    places = self.param(
      "positions",
      nn.initializers.normal(0.01),
      (self.max_length, self.width),
    )
    x = embedding(inputs) + places[: inputs.shape[1]]
    x = Dropout(self.dropout)(x, train=train).astype(self.dtype)
    for number in range(1, self.depth + 1):
      x = Block(
        heads=self.heads,
        hidden=4 * self.width,
        causal=True,
        kernel_init=init,
        # What 2 * depth layers add has the variance of one.
        out_init=nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5),
        activation=nn.gelu,  # by tanh, as its authors compute it
        epsilon=_EPSILON,
        dropout=self.dropout,
        dtype=self.dtype,
        name=f"block{number}",
      )(x, train=train)
    x = nn.LayerNorm(epsilon=_EPSILON, name="norm")(x.astype(jnp.float32))
    if self.tied:
      logits = embedding.attend(x)
    else:
      logits = nn.Dense(
        self.num_classes, use_bias=False, kernel_init=init, name="logits"
      )(x)
    return Outputs(logits=logits, features={"hidden": x})

  def _check(self, inputs: jax.Array) -> None:
    for field in ("num_classes", "width", "depth", "heads", "max_length"):
      check_number(field, getattr(self, field), least=1)
    if self.width % self.heads:
      raise ValueError(
        f"width is {self.width}; it should be a multiple of heads, {self.heads}"
      )
    check_tokens(inputs)
    if inputs.shape[1] > self.max_length:
      raise ValueError(
        f"inputs have {inputs.shape[1]} tokens; they should have at most "
        f"max_length, {self.max_length}"
      )
