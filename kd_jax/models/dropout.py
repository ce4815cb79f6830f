"""Dropout with a quarter of the random words."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dropout(nn.Module):
  """Sets units to 0 at random and scales the others up.

  Threefry spends a whole 32-bit word on each unit that `nn.Dropout` looks at,
  which costs more than the matrix products of a small network on a CPU. Here
  four units share a word, so the rate is a multiple of 1/256 (the nearest),
  and the scale is exact for it: the expectation is that of the input.

  Attributes:
    rate: share of the units to drop, in [0, 1).
  """

  rate: float

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Drops units of [..., units] inputs when `train`; rng `dropout`."""
    if not 0 <= self.rate < 1:
      raise ValueError(f"dropout is {self.rate}; it should be in [0, 1)")
    dropped = min(round(self.rate * 256), 255)
    if not train or dropped == 0:
      return inputs
    *lead, units = inputs.shape
    words = jax.random.bits(
      self.make_rng("dropout"), (*lead, -(-units // 4)), jnp.uint32
    )
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8)
    keep = octets.reshape(*lead, -1)[..., :units] >= dropped
    return jnp.where(keep, inputs * (256 / (256 - dropped)), 0)
