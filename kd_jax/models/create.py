"""Models by name, for configs."""

import dataclasses
import os
from typing import Any

import flax.linen as nn

from kd_jax.models import bit_npz
from kd_jax.models.base import Model, from_linen
from kd_jax.models.bit_resnet import BiTResNet
from kd_jax.models.branched import Branched, MultiExit
from kd_jax.models.cnn import CNN
from kd_jax.models.densenet import DenseNet
from kd_jax.models.lstm import LSTMLanguageModel
from kd_jax.models.mlp import MLP
from kd_jax.models.mobilenet_v3 import MobileNetV3
from kd_jax.models.vit import ViT
from kd_jax.models.wide_resnet import WideResNet

MODULES: dict[str, type[nn.Module]] = {
  "mlp": MLP,
  "cnn": CNN,
  "branched": Branched,
  "multi_exit": MultiExit,
  "bit_resnet": BiTResNet,
  "mobilenet_v3": MobileNetV3,
  "vit": ViT,
  "wide_resnet": WideResNet,
  "densenet": DenseNet,
  "lstm": LSTMLanguageModel,
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
  return from_linen(_module(name, num_classes, fields))


def load(
  path: str | os.PathLike[str], name: str, num_classes: int, **fields: Any
) -> dict[str, Any]:
  """The variables of a reference model, from a file.

  Args:
    path: the published `.npz` layout of Big Transfer, see `bit_npz`.
    name: "bit_resnet"; no other model has files yet.
    num_classes: as for `create`; the file must have as many.
    **fields: as for `create`.

  Returns:
    {"params", "state"}.

  Raises:
    BadInput: if the file cannot be read or is of another architecture.
    ValueError: if the model has no files, or as `create`.
  """
  module = _module(name, num_classes, fields)
  if not isinstance(module, BiTResNet):
    raise ValueError(
      f"model name is {name!r}; files can be read for bit_resnet only"
    )
  return {"params": bit_npz.load(path, module), "state": {}}


def _module(name: str, num_classes: int, fields: dict[str, Any]) -> nn.Module:
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
  return module(num_classes=num_classes, **fields)
