"""Models by name, for configs."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.errors import BadInput
from kd_jax.models import bit_npz, weights
from kd_jax.models.base import Model, from_linen
from kd_jax.models.bit_resnet import BiTResNet
from kd_jax.models.branched import Branched, MultiExit
from kd_jax.models.cnn import CNN
from kd_jax.models.densenet import DenseNet
from kd_jax.models.gpt import GPT
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
  "gpt": GPT,
}
# Their inputs are [batch, time] integers.
_OF_TOKENS = ("lstm", "gpt")
# In which those that have a `dtype` can compute.
_DTYPES = ("float32", "bfloat16", "float16")


def create(name: str, num_classes: int, **fields: Any) -> Model:
  """The reference model of that name.

  Args:
    name: a key of `MODULES`.
    num_classes: number of logits.
    **fields: attributes of the module. Networks with a `dtype` ("float32",
      "bfloat16", "float16") compute in it; their variables, statistics and
      logits stay in float32.

  Returns:
    The model.

  Raises:
    ValueError: if there is no such model, it has no such field, or the dtype
      is another.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model = create("mlp", 10, hidden=(8,))
    >>> sorted(model.init(jax.random.key(0), jnp.zeros((1, 4)))["params"])
    ['Dense_0', 'Dense_1']
  """
  return from_linen(_module(name, num_classes, fields))


def template(
  name: str, num_classes: int, shape: Sequence[int], **fields: Any
) -> dict[str, Any]:
  """The variables of a reference model without their numbers.

  Args:
    name: as for `create`.
    num_classes: as for `create`.
    shape: of one input, without the batch.
    **fields: as for `create`.

  Returns:
    {"params", "state"} of `jax.ShapeDtypeStruct`; nothing is computed.

  Raises:
    ValueError: as `create`, or if the model takes no such inputs.

  Example:
    >>> template("mlp", 3, (2,), hidden=())["params"]["Dense_0"]["kernel"]
    ShapeDtypeStruct(shape=(2, 3), dtype=float32)
  """
  model = create(name, num_classes, **fields)
  dtype = jnp.int32 if name in _OF_TOKENS else jnp.float32
  inputs = jax.ShapeDtypeStruct((1, *shape), dtype)
  return jax.eval_shape(model.init, jax.random.key(0), inputs)


def load(
  path: str | os.PathLike[str],
  name: str,
  num_classes: int,
  *,
  shape: Sequence[int] = (32, 32, 3),
  **fields: Any,
) -> dict[str, Any]:
  """The variables of a reference model, from a file.

  Files of other programs have to be converted where they were made: to
  `.safetensors`, under the names of the model here (see `weights`), and to its
  shapes, as [in, out] for the kernel of a `Dense` and [height, width, in, out]
  for that of a convolution.

  Args:
    path: a `.safetensors` file or the `.safetensors.index.json` of several, see
      `weights`; or, for "bit_resnet", the published `.npz` layout of Big
      Transfer, see `bit_npz`. Whatever may hold a pickle is refused unread.
    name: as for `create`.
    num_classes: as for `create`; the file must have as many.
    shape: of one input, without the batch; of the parameters of some models
      it decides the shape.
    **fields: as for `create`.

  Returns:
    {"params", "state"}, of NumPy arrays.

  Raises:
    BadInput: if the file cannot be read or is of another architecture.
    ValueError: if the model has no such files, or as `create`.
  """
  npz = os.fspath(path).endswith(".npz")
  if npz and name != "bit_resnet":
    raise ValueError(
      f"model name is {name!r}; files in .npz can be read for bit_resnet only"
    )
  weights.refuse_pickle(path, archive=npz)
  if not npz and not os.fspath(path).endswith((weights.SUFFIX, weights.INDEX)):
    raise BadInput(
      f"{path} should be called *{weights.SUFFIX}, *{weights.INDEX} or *.npz"
    )
  like = template(name, num_classes, shape, **fields)
  if npz:
    return {"params": bit_npz.load(path, like), "state": {}}
  return weights.load(path, like)


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
  dtype = fields.get("dtype", "float32")
  if (dtype if isinstance(dtype, str) else np.dtype(dtype).name) not in _DTYPES:
    raise ValueError(
      f"dtype is {dtype!r}; it should be one of {', '.join(_DTYPES)}"
    )
  return module(num_classes=num_classes, **fields)
