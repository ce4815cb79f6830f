"""Vision transformers, with the distillation token of DeiT as an option.

Dosovitskiy et al. 2021, "An image is worth 16x16 words", arXiv:2010.11929;
Touvron et al. 2021, "Training data-efficient image transformers &
distillation through attention", arXiv:2012.12877.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.errors import check_number
from kd_jax.models.base import Outputs
from kd_jax.models.layers import check_images
from kd_jax.models.transformer import Block

# Width, depth and heads; the hidden layer of an MLP is four times as wide.
_SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12)}
_EPSILON = 1e-6

# Of tokens and positions. A token of zeros without a position would have its
# gradient multiplied by epsilon^(-1/2) in the first norm.
_token_init = nn.initializers.normal(0.02)


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
  """Fixed positions of a grid, as sines and cosines of both coordinates.

  A quarter of the features each: sin(w_i x), cos(w_i x), sin(w_i y) and
  cos(w_i y), with w_i = 10000^(-4i / width) for i = 0 ... width / 4 - 1, of
  the column x and the row y.

  Args:
    rows: number of rows of patches.
    columns: number of columns of patches.
    width: number of features, a multiple of 4.

  Returns:
    [rows * columns, width] float32, row by row.

  Raises:
    ValueError: if `width` is not a multiple of 4.

  Reference: Chen et al. 2021, arXiv:2104.02057, Sec. 5 (the one-dimensional
  ones: Vaswani et al. 2017, arXiv:1706.03762, Sec. 3.5), in the order of the
  code of He et al. 2022, arXiv:2111.06377.
  """
  if width % 4:
    raise ValueError(f"width is {width}; it should be a multiple of 4")
  frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
  y, x = np.indices((rows, columns)).reshape(2, -1, 1) * frequencies
  features = (np.sin(x), np.cos(x), np.sin(y), np.cos(y))
  return np.concatenate(features, axis=1).astype(np.float32)


class ViT(nn.Module):
  """A vision transformer without dropout.

  The submodules are `patches`, `block1`, `block2`, ..., `norm` and `head`;
  those of a block are `norm1`, `attention`, `norm2` and `mlp`, and those of
  `attention` are `query`, `key`, `value`, `weights` (the attention maps) and
  `out`. The class token, if any, is the first token and the distillation
  token the second. Read-outs start at zero, as in the authors' release, so
  the logits of a fresh network are 0.

  Attributes:
    num_classes: number of logits.
    patch_size: side of a square patch in pixels.
    width: features of a token.
    depth: number of blocks.
    heads: number of attention heads; they share the width.
    mlp_ratio: hidden units of an MLP per feature of a token.
    pool: what is classified: "cls", a token of its own, or "gap", the mean of
      all tokens (Beyer et al. 2022, arXiv:2205.01580).
    positions: "learned", for images of one size only, or "sincos": fixed, see
      `sincos_positions`; extra tokens then have no position.
    qkv_bias: whether queries, keys and values have biases.
    distillation_token: a second token with the read-out `head_distillation`
      (Sec. 3 of arXiv:2012.12877). The logits are then the mean of those of
      the two heads, in training too; so its code evaluates, while the paper
      adds their probabilities. To train `head` on the labels and
      `head_distillation` on the teacher, read their outputs at these paths.
    dtype: of the computation. Parameters, softmax and logits are float32.
  """

  num_classes: int
  patch_size: int = 16
  width: int = 192
  depth: int = 12
  heads: int = 3
  mlp_ratio: float = 4.0
  pool: str = "cls"
  positions: str = "learned"
  qkv_bias: bool = True
  distillation_token: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> Outputs:
    """Maps [batch, height, width, channels] float images to float32 logits.

    Args:
      inputs: the images; height and width are multiples of the patch size.
      train: makes no difference.

    Returns:
      `Outputs` with [batch, num_classes] float32 logits.

    Raises:
      ValueError: if an attribute or the shape or dtype of the images is wrong.
    """
    del train
    self._check(inputs)
    size = self.patch_size
    x = nn.Conv(
      self.width,
      (size, size),
      strides=size,
      padding="VALID",
      dtype=self.dtype,
      name="patches",
    )(inputs)
    batch, *grid, _ = x.shape
    x = x.reshape(batch, -1, self.width)

    extra = []
    if self.pool == "cls":
      extra.append("class_token")
    if self.distillation_token:
      extra.append("distillation_token")
    tokens = [self._token(name, batch) for name in extra]
    x = jnp.concatenate([*tokens, x], axis=1)
    x = x + self._positions(grid, len(extra)).astype(self.dtype)

    for number in range(1, self.depth + 1):
      x = Block(
        heads=self.heads,
        hidden=round(self.width * self.mlp_ratio),
        qkv_bias=self.qkv_bias,
        epsilon=_EPSILON,
        dtype=self.dtype,
        name=f"block{number}",
      )(x)
    x = nn.LayerNorm(epsilon=_EPSILON, name="norm")(x.astype(jnp.float32))

    pooled = x[:, 0] if self.pool == "cls" else jnp.mean(x, axis=1)
    logits = self._head("head")(pooled)
    if self.distillation_token:
      logits = (logits + self._head("head_distillation")(x[:, 1])) / 2
    return Outputs(logits=logits)

  def _head(self, name: str) -> nn.Dense:
    zeros = nn.initializers.zeros_init()
    return nn.Dense(self.num_classes, kernel_init=zeros, name=name)

  def _token(self, name: str, batch: int) -> jax.Array:
    shape = (1, 1, self.width)
    token = self.param(name, _token_init, shape)
    return jnp.tile(token.astype(self.dtype), (batch, 1, 1))

  def _positions(self, grid: list[int], extra: int) -> jax.Array:
    if self.positions == "sincos":
      patches = sincos_positions(grid[0], grid[1], self.width)
      return jnp.pad(patches, ((extra, 0), (0, 0)))[None]
    shape = (1, extra + grid[0] * grid[1], self.width)
    name = "position_embedding"
    if self.has_variable("params", name):
      known: int = self.get_variable("params", name).shape[1]
      if known != shape[1]:
        raise ValueError(
          f"inputs give {shape[1]} tokens, but the learned positions are for "
          f"{known}; images should have the size that the model was "
          "initialised with"
        )
    return self.param(name, _token_init, shape)

  def _check(self, inputs: jax.Array) -> None:
    for field in ("num_classes", "patch_size", "width", "depth", "heads"):
      check_number(field, getattr(self, field), least=1)
    check_number("mlp_ratio", self.mlp_ratio, above=0)
    if self.width % self.heads:
      raise ValueError(
        f"width is {self.width}; it should be a multiple of heads, {self.heads}"
      )
    if self.pool not in ("cls", "gap"):
      raise ValueError(f'pool is {self.pool!r}; it should be "cls" or "gap"')
    if self.positions not in ("learned", "sincos"):
      raise ValueError(
        f'positions is {self.positions!r}; it should be "learned" or "sincos"'
      )
    if self.distillation_token and self.pool != "cls":
      raise ValueError(
        'distillation_token is True; it should be False with pool="gap"'
      )
    check_images(inputs)
    for name, side in zip(("height", "width"), inputs.shape[1:3], strict=True):
      if side % self.patch_size or not side:
        raise ValueError(
          f"the {name} of the inputs is {side}; it should be a multiple of "
          f"patch_size, {self.patch_size}"
        )


def vit(name: str, num_classes: int, **changes: Any) -> ViT:
  """A vision transformer by the name of its size.

  With 1000 classes, images of 224 by 224 and no changes, "Ti/16" has
  5,717,416 parameters, "S/16" 22,050,664 and "B/16" 86,567,656; with the
  distillation token 5,910,800, 22,436,432 and 87,338,192.

  Args:
    name: "Ti", "S" or "B" (Table 1 of arXiv:2012.12877, and of
      arXiv:2010.11929 for B), a slash and the patch size in pixels.
    num_classes: number of logits.
    **changes: other attributes of `ViT`.

  Returns:
    The module.

  Raises:
    ValueError: if there is no such size.

  Example:
    >>> from kd_jax.models.vit import vit
    >>> vit("S/16", num_classes=37, pool="gap").width
    384
  """
  size, _, patch = name.partition("/")
  if size not in _SIZES or not patch.isdecimal():
    raise ValueError(
      f"name is {name!r}; it should be one of {', '.join(_SIZES)}, a slash "
      'and the patch size, such as "S/16"'
    )
  width, depth, heads = _SIZES[size]
  attributes: dict[str, Any] = {
    "patch_size": int(patch),
    "width": width,
    "depth": depth,
    "heads": heads,
  }
  return ViT(num_classes=num_classes, **(attributes | changes))
