"""What experiments on images have in common: data, networks, their checks.

The functions take the experiment's config, a mapping with the fields that
each names.
"""

from collections.abc import Callable, Mapping
import pathlib
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax import data, models, teachers
from kd_jax.data import augment
from kd_jax.errors import BadInput, check_choice, check_number, naming
from kd_jax.files import read_json
from kd_jax.train.batches import index_batches
from kd_jax.train.checks import check_periods, check_settings, check_splits
from kd_jax.train.classifier import Classifier
from kd_jax.train.images import Images
from kd_jax.train.optimizers import optimizer
from kd_jax.train.parallel import check_divides
from kd_jax.train.step import LossFn
from kd_jax.train.study import use_devices
from kd_jax.train.trained import load_teacher


class ImageData(NamedTuple):
  """The images of an experiment.

  Attributes:
    pool: all training images.
    part: those that students learn from.
    test: the test images, read by `evaluated`.
  """

  pool: Images
  part: Images
  test: Images

  @property
  def num_classes(self) -> int:
    """How many classes they have."""
    return len(self.pool.class_names)


def load_images(config: Any) -> ImageData:
  """Checks the settings that all experiments share and reads the images.

  Args:
    config: has `dataset`, `train_split`, `test_split`, `data_dir`, `transfer`
      (how many training images are the `part`, 0 is all), `view` (`crop`,
      `size`, `on_host`, `least_area`), `evaluation` and `readers` of
      `Images`, `parallel`, `devices` and the periods.

  Returns:
    The images.

  Raises:
    ValueError: naming the field that is wrong.
  """
  check_periods(config)
  check_splits(config)
  check_settings("", config)
  use_devices(config.devices)
  view = config.view
  check_choice("view.crop", view.crop, augment.CROPS)
  how: dict[str, Any] = {
    "evaluation": tuple(config.evaluation),
    "readers": config.readers,
  }
  if view.on_host:
    how["crop"] = {"size": view.size, "area": (view.least_area, 1.0)}
  source = data.load(config.dataset, config.train_split, config.data_dir)
  tested = data.load(config.dataset, config.test_split, config.data_dir)
  pool = Images(source, **how)
  check_number("transfer", config.transfer, least=0, most=pool.n)
  if pool.arrays is not None:
    side = min(pool.arrays["image"].shape[1:3])
    check_number("view.size", view.size, least=1, most=side)
  return ImageData(
    pool,
    pool.some(config.transfer) if config.transfer else pool,
    Images(tested, **how),
  )


def image_model(config: Any, settings: Any, num_classes: int) -> models.Model:
  """The network that a group of settings describes.

  Args:
    config: has `view.size`.
    settings: has `model` and `fields` of `models.create`, and `size`, to which
      it resizes its images; 0 leaves them at `view.size`.
    num_classes: of the data.

  Returns:
    A model of images of any size.

  Raises:
    ValueError: if there is no such model or field.
  """
  model = models.create(settings.model, num_classes, **settings.fields)
  return models.at_resolution(model, settings.size or config.view.size)


def image_classifier(
  config: Any,
  settings: Any,
  model: models.Model,
  loss_fn: LossFn | list[LossFn],
  moved: int
  | optax.GradientTransformation
  | list[optax.GradientTransformation],
  **more: Any,
) -> Classifier:
  """A model with its training step.

  Args:
    config: has `parallel`, `devices` and `steps_per_call`.
    settings: has `optimizer`, the arguments of `train.optimizer`, and
      `clip_norm`; 0 does not clip.
    model: from `image_model`, or made of such.
    loss_fn: see `Classifier`.
    moved: the steps of the whole training, for the optimiser of `settings`; or
      another optimiser, see `Classifier`.
    **more: further arguments of `Classifier`; some replace these.

  Returns:
    The classifier; it serves all seeds.

  Raises:
    ValueError: if a setting is wrong.
  """
  fields: dict[str, Any] = {
    "preprocess": augment.whole,
    "how": config.parallel,
    "devices": use_devices(config.devices),
    "steps_per_call": config.steps_per_call,
    "clip_norm": settings.clip_norm or None,
  }
  if isinstance(moved, int):
    moved = optimizer(moved, **settings.optimizer)
  return Classifier(model, loss_fn, moved, **{**fields, **more})


def check_network(
  config: Any, where: str, settings: Any, images: Images, num_classes: int
) -> None:
  """Refuses settings of a network with which no training could begin.

  Args:
    config: as for `image_classifier`.
    where: the field's name, for the message.
    settings: see `image_model` and `image_classifier`.
    images: what it will be trained on.
    num_classes: of the data.

  Raises:
    BadInput: naming the field.
  """
  with naming(where):
    check_divides(settings.batch_size, len(use_devices(config.devices)))
    index_batches(0, settings.batch_size, images.n)  # raises if too few
    model = image_model(config, settings, num_classes)
    shape = (1, config.view.size, config.view.size, images.channels)
    try:
      jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    except (TypeError, ValueError) as error:
      line = str(error).strip().splitlines()[0]
      raise ValueError(f"fields make no {settings.model}: {line}") from None
    optimizer(1, **settings.optimizer)


def check_networks(
  config: Any, used: Mapping[str, str], images: ImageData
) -> None:
  """Refuses networks of students that are not there or could not be trained.

  Args:
    config: has `networks`, groups of settings; else as for `check_network`.
    used: for each field that names a network, the name.
    images: of which the students learn `part`.

  Raises:
    BadInput: naming the field.
  """
  for field, name in used.items():
    check_choice(field, name, tuple(config.networks))
  for name in dict.fromkeys(used.values()):
    settings, where = config.networks[name], f"networks.{name}"
    check_network(config, where, settings, images.part, images.num_classes)


def image_teacher(
  config: Any, settings: Any, images: ImageData, path: str, few: Any
) -> dict[str, Any]:
  """The variables of a trained network, see `load_teacher`; it is tried out.

  Args:
    config: has `view.size`.
    settings: of the network, see `image_model`.
    images: whose classes and channels it should have.
    path: of the file, or of the stage of another run.
    few: uint8 [at least 2, H, W, C], images on which it is asked.

  Returns:
    {"params", "state"}.

  Raises:
    BadInput: if it cannot be read, is of another architecture, or was trained
      by a run on classes of other names or in another order, or holds numbers
      that are not finite, or does not pass `teachers.check`.
  """
  names = images.pool.class_names
  run = pathlib.Path(path).absolute().parent.parent  # of RUN/seed0/NAME
  stored = run / "inputs.json"  # not there for a file of weights
  inputs = read_json(stored) if stored.exists() else {}
  learned = inputs.get("classes", ", ".join(names))
  if learned != ", ".join(names):
    short = lambda text: textwrap.shorten(text, 60, placeholder=" ...")
    raise BadInput(
      f"{path} has learned other classes: {short(learned)}; it should be "
      f"{short(', '.join(names))}"
    )
  side = settings.size or config.view.size
  variables = load_teacher(
    path,
    settings.model,
    images.num_classes,
    (side, side, images.part.channels),
    **settings.fields,
  )
  for key, leaf in jax.tree_util.tree_leaves_with_path(variables):
    if not np.isfinite(leaf).all():
      name = jax.tree_util.keystr(key, simple=True, separator="/")
      raise BadInput(f"{path} is not finite: {name} holds NaN or inf")
  classes = images.num_classes
  model = image_model(config, settings, classes)
  shown = augment.whole(few)
  teachers.check(model, variables, shown, classes=classes, name=path)
  return variables


def steps_of(epochs: float, batch_size: int, n: int) -> int:
  """How many updates that many epochs are; whole batches only, at least one."""
  return max(1, round(epochs * (n // batch_size)))


def random_views(
  view: Mapping[str, Any],
) -> Callable[..., Any]:
  """`look(key, rows, image="image")`: the views that settings describe.

  Args:
    view: `crop`, `size`, `padding`, `least_area`, `flip` of `augment.view`,
      and `on_host`: the images are cropped already.

  Returns:
    A function of the run's key and rows with `id`, `epoch` and the images.
  """
  how = {k: view[k] for k in ("size", "padding", "least_area", "flip")}
  crop = "none" if view["on_host"] else view["crop"]

  def look(key: Any, rows: Mapping[str, Any], image: str = "image") -> Any:
    return augment.view(
      key, rows["id"], rows["epoch"], rows[image], crop=crop, **how
    )

  return look
