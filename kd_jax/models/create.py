"""Models by name, for configs."""

import dataclasses
from typing import Any

import flax.linen as nn

from kd_jax.models.base import Model, from_linen
from kd_jax.models.bit_resnet import BiTResNet
from kd_jax.models.mlp import MLP
from kd_jax.models.mobilenet_v3 import MobileNetV3
from kd_jax.models.vit import ViT

MODULES: dict[str, type[nn.Module]] = {
  "mlp": MLP,
  "bit_resnet": BiTResNet,
  "mobilenet_v3": MobileNetV3,
  "vit": ViT,
}


def create(name: str, num_classes: int, **fields: Any) -> Model:
  """The reference model of that name.

  Args:
    name: a key of `MODULES`.
    num_classes: number of logits.
    **fields: attributes of the module.

  Returns:
    The model.

  Raises:
    ValueError: if there is no such model, or it has no such field.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model = create("mlp", 10, hidden=(8,))
    >>> sorted(model.init(jax.random.key(0), jnp.zeros((1, 4)))["params"])
    ['Dense_0', 'Dense_1']
  """
  if name not in MODULES:
    raise ValueError(
      f"model name is {name!r}; it should be one of {', '.join(MODULES)}"
    )
  module = MODULES[name]
  known = {field.name for field in dataclasses.fields(module)}
  known -= {"parent", "name", "num_classes"}
  unknown = sorted(set(fields) - known)
  if unknown:
    raise ValueError(
      f"model {name} has no field {', '.join(unknown)}; it should be one of "
      f"{', '.join(sorted(known))}"
    )
  return from_linen(module(num_classes=num_classes, **fields))
