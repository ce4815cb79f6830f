"""Reference models, and the two functions by which any other model joins."""

from kd_jax.models import bit_npz as bit_npz, weights as weights
from kd_jax.models.base import (
  Model as Model,
  Outputs as Outputs,
  count_parameters as count_parameters,
  from_function as from_function,
  from_linen as from_linen,
)
from kd_jax.models.bit_resnet import BiTResNet as BiTResNet
from kd_jax.models.branched import (
  Branched as Branched,
  MultiExit as MultiExit,
)
from kd_jax.models.cnn import CNN as CNN
from kd_jax.models.combine import (
  at_resolution as at_resolution,
  cohort as cohort,
  ensemble as ensemble,
  stacked as stacked,
)
from kd_jax.models.create import (
  create as create,
  load as load,
  template as template,
)
from kd_jax.models.densenet import DenseNet as DenseNet
from kd_jax.models.dropout import Dropout as Dropout
from kd_jax.models.gpt import GPT as GPT
from kd_jax.models.lstm import LSTMLanguageModel as LSTMLanguageModel
from kd_jax.models.mlp import MLP as MLP
from kd_jax.models.mobilenet_v3 import MobileNetV3 as MobileNetV3
from kd_jax.models.programs import (
  load_program as load_program,
  save_program as save_program,
)
from kd_jax.models.vit import ViT as ViT
from kd_jax.models.weights import save as save
from kd_jax.models.wide_resnet import WideResNet as WideResNet
