"""The networks of `benchmarks.step_floor` in PyTorch, with the same weights.

Their submodules have the names that those of kd_jax have, so the weights find
their places by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np
import torch
from torch import nn
from torch.nn import functional

# kd_jax's names of parameters and statistics -> PyTorch's.
_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_NAMES |= {"mean": "running_mean", "var": "running_var"}


class MLP(nn.Module):
  """`kd_jax.models.mlp.MLP`."""

  def __init__(self, shape: Sequence[int], classes: int, hidden: Sequence[int]):
    super().__init__()
    sizes = (int(np.prod(shape)), *hidden, classes)
    for i in range(len(sizes) - 1):
      self.add_module(f"Dense_{i}", nn.Linear(sizes[i], sizes[i + 1]))

  def forward(self, inputs: torch.Tensor) -> torch.Tensor:
    *hidden, last = self.children()
    x = inputs.flatten(1)
    for layer in hidden:
      x = torch.relu(layer(x))
    return last(x)


class Conv(nn.Module):
  """`kd_jax.models.layers.Conv`."""

  def __init__(self, inputs: int, channels: int, kernel: int, stride: int = 1):
    super().__init__()
    pad = kernel // 2
    self.conv = nn.Conv2d(inputs, channels, kernel, stride, pad, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.conv(x)


class NormReLU(nn.Module):
  """`kd_jax.models.layers.NormReLU`."""

  def __init__(self, channels: int):
    super().__init__()
    self.norm = nn.BatchNorm2d(channels)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(self.norm(x))


class ResBlock(nn.Module):
  """`kd_jax.models.wide_resnet.Block`."""

  def __init__(self, inputs: int, channels: int, stride: int):
    super().__init__()
    self.norm1 = NormReLU(inputs)
    self.conv1 = Conv(inputs, channels, 3, stride)
    self.norm2 = NormReLU(channels)
    self.conv2 = Conv(channels, channels, 3)
    if stride != 1 or inputs != channels:
      self.shortcut = Conv(inputs, channels, 1, stride)

  def forward(self, inputs: torch.Tensor) -> torch.Tensor:
    x = self.norm1(inputs)
    kept = self.shortcut(x) if hasattr(self, "shortcut") else inputs
    return kept + self.conv2(self.norm2(self.conv1(x)))


class WideResNet(nn.Module):
  """`kd_jax.models.wide_resnet.WideResNet`."""

  def __init__(
    self, shape: Sequence[int], classes: int, depth: int, width: int
  ):
    super().__init__()
    self.stem, inputs = Conv(shape[-1], 16, 3), 16
    for i in range(3):
      group = nn.Sequential()
      for j in range((depth - 4) // 6):
        channels, stride = 16 * width * 2**i, 2 if i and not j else 1
        group.add_module(f"block{j + 1}", ResBlock(inputs, channels, stride))
        inputs = channels
      self.add_module(f"group{i + 1}", group)
    self.norm = NormReLU(inputs)
    self.head = nn.ModuleDict({"dense": nn.Linear(inputs, classes)})

  def forward(self, inputs: torch.Tensor) -> torch.Tensor:
    x = self.stem(inputs)
    x = self.norm(self.group3(self.group2(self.group1(x))))
    return self.head["dense"](x.mean((2, 3)))


class Attention(nn.Module):
  """`kd_jax.models.transformer.Attention`."""

  def __init__(self, width: int, heads: int, causal: bool):
    super().__init__()
    self.heads, self.causal = heads, causal
    for name in ("query", "key", "value", "out"):
      self.add_module(name, nn.Linear(width, width))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    asked = (split(f(x)) for f in (self.query, self.key, self.value))
    found = functional.scaled_dot_product_attention(
      *asked, is_causal=self.causal
    )
    return self.out(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
  """`kd_jax.models.transformer.Block`, as a ViT has it or as a GPT."""

  def __init__(self, width: int, heads: int, causal: bool = False):
    super().__init__()
    epsilon = 1e-5 if causal else 1e-6
    self.approximate = "tanh" if causal else "none"
    self.norm1 = nn.LayerNorm(width, eps=epsilon)
    self.attention = Attention(width, heads, causal)
    self.norm2 = nn.LayerNorm(width, eps=epsilon)
    layers = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    self.mlp = nn.ModuleDict(dict(zip(("fc1", "fc2"), layers, strict=True)))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = x + self.attention(self.norm1(x))
    hidden = self.mlp["fc1"](self.norm2(x))
    hidden = functional.gelu(hidden, approximate=self.approximate)
    return x + self.mlp["fc2"](hidden)


class ViT(nn.Module):
  """`kd_jax.models.vit.ViT` with a class token and learned positions."""

  def __init__(
    self,
    shape: Sequence[int],
    classes: int,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
  ):
    super().__init__()
    tokens = 1 + (shape[0] // patch_size) * (shape[1] // patch_size)
    self.patches = nn.Conv2d(shape[-1], width, patch_size, patch_size)
    self.class_token = nn.Parameter(torch.zeros(1, 1, width))
    self.position_embedding = nn.Parameter(torch.zeros(1, tokens, width))
    self.blocks = [f"block{i + 1}" for i in range(depth)]
    for name in self.blocks:
      self.add_module(name, Block(width, heads))
    self.norm = nn.LayerNorm(width, eps=1e-6)
    self.head = nn.Linear(width, classes)

  def forward(self, inputs: torch.Tensor) -> torch.Tensor:
    x = self.patches(inputs).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
    x = x + self.position_embedding
    for name in self.blocks:
      x = getattr(self, name)(x)
    return self.head(self.norm(x)[:, 0])


class GPT(nn.Module):
  """`kd_jax.models.gpt.GPT`, tied."""

  def __init__(
    self,
    shape: Sequence[int],
    classes: int,
    width: int,
    depth: int,
    heads: int,
    max_length: int,
  ):
    super().__init__()
    self.embedding = nn.Embedding(classes, width)
    self.positions = nn.Parameter(torch.zeros(max_length, width))
    self.blocks = [f"block{i + 1}" for i in range(depth)]
    for name in self.blocks:
      self.add_module(name, Block(width, heads, causal=True))
    self.norm = nn.LayerNorm(width, eps=1e-5)

  def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
    """What the logits are read from."""
    x = self.embedding(inputs) + self.positions[: inputs.shape[1]]
    for name in self.blocks:
      x = getattr(self, name)(x)
    return self.norm(x)

  def forward(self, inputs: torch.Tensor) -> torch.Tensor:
    return functional.linear(self.hidden(inputs), self.embedding.weight)


_TWINS = {"mlp": MLP, "wide_resnet": WideResNet, "vit": ViT, "gpt": GPT}


def twin(
  name: str,
  shape: Sequence[int],
  classes: int,
  fields: Mapping[str, Any],
  variables: Mapping[str, Any],
) -> nn.Module:
  """The network of that name with these weights, images channels-last.

  Args:
    name: as `kd_jax.models.create` takes it.
    shape: of an input, as kd_jax takes it.
    classes: number of logits.
    fields: attributes of the module.
    variables: `{"params": ..., "state": ...}` of kd_jax's model.

  Returns:
    The module, in training mode.
  """
  model = _TWINS[name](shape, classes, **fields)
  model.load_state_dict(weights(model, variables))
  return model.to(memory_format=torch.channels_last)


def weights(
  model: nn.Module, variables: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
  """Copies of kd_jax's weights by the names that they have in a twin.

  Args:
    model: the twin.
    variables: `{"params": ..., "state": ...}` of kd_jax's model.

  Returns:
    A `state_dict`.
  """
  found = dict(model.state_dict())
  trees = (variables["params"], variables["state"].get("batch_stats", {}))
  for tree in trees:
    for path, leaf in flax.traverse_util.flatten_dict(tree).items():
      name = ".".join((*path[:-1], _NAMES.get(path[-1], path[-1])))
      array = np.array(leaf)
      if path[-1] == "kernel" and array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
      elif path[-1] == "kernel":  # those of attention have an axis of heads
        array = array.reshape(*_matrix(found[name].shape)).T
      else:
        array = array.reshape(found[name].shape)
      found[name] = torch.from_numpy(np.ascontiguousarray(array))
  return found


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
  """The shape of a kernel, inputs first, of that of a linear layer."""
  outputs, inputs = shape
  return inputs, outputs
