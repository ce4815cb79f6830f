"""The blocks of transformers: attention and an MLP, each after a norm.

Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762, with the
norms before the layers: Dosovitskiy et al. 2021, arXiv:2010.11929, Radford et
al. 2019, "Language models are unsupervised multitask learners", Sec. 2.3.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.models.dropout import Dropout

_xavier = nn.initializers.xavier_uniform()


class AttentionWeights(nn.Module):
  """Softmax of the scaled products of queries and keys, always in float32.

  A module of its own, without parameters, so that the attention maps can be
  read by its path.

  Attributes:
    causal: whether a token looks only at itself and those before it; the
      weights of all others are 0.
  """

  causal: bool = False

  @nn.compact
  def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Maps two [batch, tokens, heads, d] to [batch, heads, tokens, tokens].

    Args:
      queries: the tokens that look.
      keys: the tokens that are looked at: the last axis of the result.

    Returns:
      float32 weights that sum to 1 over the last axis.
    """
    scores = jnp.einsum(
      "bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32
    )
    if self.causal:
      queries_at, keys_at = scores.shape[-2:]
      seen = jnp.tri(queries_at, keys_at, dtype=bool)
      scores = jnp.where(seen, scores, -jnp.inf)
    return nn.softmax(scores / np.sqrt(queries.shape[-1]))


class Attention(nn.Module):
  """Multi-head self-attention (Appendix A of arXiv:2010.11929).

  Attributes:
    heads: number of heads; each has a share of the features.
    qkv_bias: whether queries, keys and values have biases.
    causal: see `AttentionWeights`.
    kernel_init: of queries, keys and values.
    out_init: of the kernel of the output.
    dtype: of the computation but for the softmax.
  """

  heads: int
  qkv_bias: bool = True
  causal: bool = False
  kernel_init: Any = _xavier
  out_init: Any = _xavier
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps [batch, tokens, width] to the same shape."""
    width = inputs.shape[-1]

    def project(name: str) -> jax.Array:
      return nn.DenseGeneral(
        (self.heads, width // self.heads),
        use_bias=self.qkv_bias,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        name=name,
      )(inputs)

    queries, keys, values = map(project, ("query", "key", "value"))
    weights = AttentionWeights(self.causal, name="weights")(queries, keys)
    x = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(self.dtype), values)
    return nn.DenseGeneral(
      width,
      axis=(-2, -1),
      kernel_init=self.out_init,
      dtype=self.dtype,
      name="out",
    )(x)


def gelu(x: jax.Array) -> jax.Array:
  """The GELU itself, not its approximation by tanh; float32 inside.

  By erf: `nn.gelu` takes erfc, which is slower on a CPU.

  Reference: Hendrycks and Gimpel 2016, arXiv:1606.08415.
  """
  y = x.astype(jnp.float32)
  return (y * (1 + jax.lax.erf(y * 0.5**0.5)) / 2).astype(x.dtype)


class MLP(nn.Module):
  """Two dense layers with a GELU between them.

  Attributes:
    hidden: units of the first layer.
    kernel_init: of the first layer.
    out_init: of the second.
    activation: between the layers, or its approximation.
    dtype: of the computation.
  """

  hidden: int
  kernel_init: Any = _xavier
  out_init: Any = _xavier
  activation: Callable[[jax.Array], jax.Array] = gelu
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps [batch, tokens, width] to the same shape."""
    x = nn.Dense(
      self.hidden, kernel_init=self.kernel_init, dtype=self.dtype, name="fc1"
    )(inputs)
    return nn.Dense(
      inputs.shape[-1],
      kernel_init=self.out_init,
      dtype=self.dtype,
      name="fc2",
    )(self.activation(x))


class Block(nn.Module):
  """Attention and an MLP, each after a norm and added to its input.

  Equations 2 and 3 of arXiv:2010.11929.

  Attributes:
    heads: number of heads.
    hidden: units of the hidden layer of the MLP.
    qkv_bias: whether queries, keys and values have biases.
    causal: see `AttentionWeights`.
    kernel_init: of the kernels, but for those whose outputs are added.
    out_init: of those whose outputs are added.
    activation: of the MLP.
    epsilon: of the norms.
    dropout: share of the units of what is added that is dropped in training.
    dtype: of the computation.
  """

  heads: int
  hidden: int
  qkv_bias: bool = True
  causal: bool = False
  kernel_init: Any = _xavier
  out_init: Any = _xavier
  activation: Callable[[jax.Array], jax.Array] = gelu
  epsilon: float = 1e-6
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [batch, tokens, width] to the same shape."""
    options = {
      "kernel_init": self.kernel_init,
      "out_init": self.out_init,
      "dtype": self.dtype,
    }

    def norm(x: jax.Array, name: str) -> jax.Array:
      return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)(x)

    attention = Attention(
      self.heads, self.qkv_bias, self.causal, name="attention", **options
    )
    mlp = MLP(self.hidden, activation=self.activation, name="mlp", **options)
    drop = Dropout(self.dropout)
    x = inputs
    x = x + drop(attention(norm(x, "norm1")), train=train)
    return x + drop(mlp(norm(x, "norm2")), train=train)
