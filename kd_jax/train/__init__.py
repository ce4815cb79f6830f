"""Training: state, step, many devices, loop, checkpoints."""

from kd_jax.errors import CheckpointError as CheckpointError
from kd_jax.train.batches import (
  gather_batch as gather_batch,
  index_batches as index_batches,
)
from kd_jax.train.checkpoints import Checkpoints as Checkpoints
from kd_jax.train.checks import (
  check_comparison as check_comparison,
  check_ensembles as check_ensembles,
  check_periods as check_periods,
  check_seeds as check_seeds,
  check_settings as check_settings,
  check_splits as check_splits,
  check_student as check_student,
)
from kd_jax.train.classifier import (
  Classifier as Classifier,
  view_key as view_key,
)
from kd_jax.train.extras import (
  Extra as Extra,
  ema as ema,
  stale as stale,
  with_extra as with_extra,
)
from kd_jax.train.images import Images as Images
from kd_jax.train.loop import fit as fit
from kd_jax.train.optimizers import (
  OPTIMIZERS as OPTIMIZERS,
  by_peer as by_peer,
  decoupled as decoupled,
  optimizer as optimizer,
  staircase as staircase,
)
from kd_jax.train.parallel import (
  AXIS as AXIS,
  check_divides as check_divides,
  compile as compile,
  split_bytes as split_bytes,
  split_specs as split_specs,
)
from kd_jax.train.period import Period as Period
from kd_jax.train.record import (
  execute as execute,
  record as record,
)
from kd_jax.train.setup import (
  ImageData as ImageData,
  check_network as check_network,
  check_networks as check_networks,
  image_classifier as image_classifier,
  image_model as image_model,
  image_teacher as image_teacher,
  load_images as load_images,
  random_views as random_views,
  steps_of as steps_of,
)
from kd_jax.train.stages import Stages as Stages
from kd_jax.train.state import (
  TrainState as TrainState,
  init_state as init_state,
)
from kd_jax.train.step import (
  Aux as Aux,
  in_turn as in_turn,
  make_step as make_step,
)
from kd_jax.train.study import (
  Study as Study,
  use_devices as use_devices,
)
from kd_jax.train.sweeps import (
  grid as grid,
  setting as setting,
  sweep as sweep,
  sweep_state as sweep_state,
)
from kd_jax.train.traffic import (
  Collective as Collective,
  collectives as collectives,
)
from kd_jax.train.trained import (
  load_teacher as load_teacher,
  load_trained as load_trained,
)
from kd_jax.train.workdir import (
  check_branch as check_branch,
  check_workdir as check_workdir,
  open_workdir as open_workdir,
)
