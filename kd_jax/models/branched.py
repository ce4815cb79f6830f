"""Networks with several classifiers: branches on a trunk, exits on the way."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.errors import check_choice
from kd_jax.models.base import Outputs
from kd_jax.models.cnn import convolutions

Layers = Sequence[tuple[int, int, int]]
COMBINE = ("mean", "gate", "attention", "fusion")


class Branched(nn.Module):
  """Branches on a shared trunk, each a classifier of its own.

  `Outputs.heads` has the logits of the branches. `Outputs.logits` is what they
  say together, by `combine`:
    mean: the mean of their logits.
    gate: their logits weighted by a softmax over the branches, computed from
      the trunk (ONE); the weights are `features["gate"]`, [batch, branches].
    attention: the last branch, the leader; `features["attention"]`, [batch,
      branches - 1, branches - 1], says how much each of the others takes from
      each of them (OKDDip). Its queries and keys see the features as
      constants.
    fusion: a classifier of its own on all feature maps (FFL).

  Attributes:
    num_classes: number of logits.
    trunk: (channels, kernel size, stride) of each shared convolution.
    branches: the same of each branch.
    combine: see above.
    groups: of the group normalisation, which all channels divide into.

  Reference: Zhu et al. 2018 (ONE), arXiv:1806.04606; Chen et al. 2019 (OKDDip),
  arXiv:1912.00350; Kim et al. 2019 (FFL), arXiv:1904.09058.
  """

  num_classes: int
  trunk: Layers = ((32, 3, 2),)
  branches: Sequence[Layers] = (((32, 3, 2),),) * 3
  combine: str = "mean"
  groups: int = 8

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> Outputs:
    """Maps float images [batch, height, width, channels] to `Outputs`.

    Raises:
      ValueError: if `combine` is unknown, there are too few branches for it, or
        a convolution does not fit.
    """
    del train
    check_choice("combine", self.combine, COMBINE)
    least = 3 if self.combine == "attention" else 1
    if len(self.branches) < least:
      raise ValueError(
        f"branches has {len(self.branches)} branches; {self.combine} needs at "
        f"least {least}"
      )
    shared = convolutions(inputs, self.trunk, self.groups, "trunk")
    maps = [
      convolutions(shared, layers, self.groups, f"branch{i}")
      for i, layers in enumerate(self.branches)
    ]
    heads = jnp.stack(
      [
        nn.Dense(self.num_classes, name=f"head{i}")(x.mean((1, 2)))
        for i, x in enumerate(maps)
      ]
    )
    if self.combine == "mean":
      return Outputs(logits=heads.mean(0), heads=heads)
    if self.combine == "gate":
      gate = nn.softmax(nn.Dense(len(maps), name="gate")(shared.mean((1, 2))))
      logits = jnp.einsum("bk,kbc->bc", gate, heads)
      return Outputs(logits=logits, heads=heads, features={"gate": gate})
    if self.combine == "attention":
      found = self._attention([x.mean((1, 2)) for x in maps[:-1]])
      return Outputs(
        logits=heads[-1], heads=heads, features={"attention": found}
      )
    return Outputs(logits=self._fusion(maps), heads=heads)

  def _attention(self, features: list[jax.Array]) -> jax.Array:
    """[batch, peers, peers], rows sum to 1."""
    width = features[0].shape[-1]
    seen = jax.lax.stop_gradient(jnp.stack(features, 1))
    size = max(1, width // 8)
    query = nn.Dense(size, use_bias=False, name="query")(seen)
    key = nn.Dense(size, use_bias=False, name="key")(seen)
    return nn.softmax(jnp.einsum("bid,bjd->bij", query, key))

  def _fusion(self, maps: list[jax.Array]) -> jax.Array:
    """The logits of the fused classifier: depthwise, pointwise, read-out."""
    if len({x.shape[1:3] for x in maps}) > 1:
      raise ValueError(
        "branches end in maps of different sizes; fusion needs the same"
      )
    x = jnp.concatenate(maps, -1)
    width = x.shape[-1]
    x = nn.Conv(
      width, (3, 3), feature_group_count=width, use_bias=False, name="depthwise"
    )(x)
    x = nn.Conv(maps[0].shape[-1], (1, 1), use_bias=False, name="pointwise")(x)
    x = nn.relu(nn.GroupNorm(self.groups, name="fused_norm")(x))
    return nn.Dense(self.num_classes, name="fused")(x.mean((1, 2)))


class MultiExit(nn.Module):
  """A network with a classifier after each of its stages.

  `Outputs.heads` has the logits of the exits, from the shallowest to the
  deepest, which is `Outputs.logits`. `features["exits"]`, [exits, batch,
  width], are what the classifiers read: each shallow stage is brought to the
  deepest one's width by a bottleneck of its own, strided like the stages that
  it skips. A program that returns one exit alone does not compute the stages
  behind it.

  Attributes:
    num_classes: number of logits.
    stages: (channels, kernel size, stride) of each convolution of each stage.
    groups: of the group normalisation, which all channels divide into.

  Reference: Zhang et al. 2019 (Be Your Own Teacher), arXiv:1905.08094, Sec. 3.
  """

  num_classes: int
  stages: Sequence[Layers] = (((16, 3, 2),), ((32, 3, 2),), ((64, 3, 2),))
  groups: int = 8

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> Outputs:
    """Maps float images [batch, height, width, channels] to `Outputs`.

    Raises:
      ValueError: if there are fewer than two stages, or a convolution does not
        fit.
    """
    del train
    if len(self.stages) < 2:
      raise ValueError(
        f"stages has {len(self.stages)}; there should be at least 2"
      )
    width = self.stages[-1][-1][0]
    x, read = inputs, []
    for i, layers in enumerate(self.stages):
      x = convolutions(x, layers, self.groups, f"stage{i}")
      y = x
      for j, skipped in enumerate(self.stages[i + 1 :]):
        stride = 1
        for layer in skipped:
          stride *= layer[2]
        last = i + j + 2 == len(self.stages)
        channels = width if last else x.shape[-1]
        y = convolutions(
          y, ((channels, 3, stride),), self.groups, f"exit{i}_{j}"
        )
      read.append(y.mean((1, 2)))
    heads = jnp.stack(
      [
        nn.Dense(self.num_classes, name=f"head{i}")(y)
        for i, y in enumerate(read)
      ]
    )
    features: dict[str, Any] = {"exits": jnp.stack(read)}
    return Outputs(logits=heads[-1], heads=heads, features=features)
