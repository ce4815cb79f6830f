"""What the configs of patient and consistent teaching share."""

import itertools
import signal

from ml_collections import ConfigDict

from configs import _common
from configs._common import network

# The checkpoint of a teacher that nobody can train in passing.
REQUIRED = "BiT-R152x2.npz"
# How each mode is called, and which terms its loss has.
MODES = {
  "labels": {
    "label": "labels alone",
    "mode": "labels",
    "soft_weight": 0.0,
    "hard_weight": 1.0,
  },
  "hinton": {
    "label": "fixed targets and labels",
    "mode": "fixed",
    "soft_weight": 0.9,
    "hard_weight": 0.1,
    "temperature": 4.0,
  },
  "fixed": {"label": "fixed targets", "mode": "fixed"},
  "independent": {"label": "independent views", "mode": "independent"},
  "consistent": {"label": "the same view", "mode": "consistent"},
  "function_matching": {
    "label": "function matching",
    "mode": "function_matching",
  },
}


def student(name, epochs, label="", **more):
  """A row of the table: how one student is taught."""
  fields = {
    "label": "",
    "mode": "",
    "network": "student",
    "epochs": float(epochs),
    "temperature": 1.0,
    "soft_weight": 1.0,  # of T^2 KL(teacher, student)
    "hard_weight": 0.0,  # of the cross-entropy with the labels
    "mixup": 1.0,  # the ratio is Beta(mixup, mixup); 1 is uniform
    "same_ratio": False,  # one ratio for a batch, as in the authors' code
    "bank": 0,  # views of each image that are cached; 0: new ones for ever
  }
  fields.update(MODES[name])
  row = _common.fill(fields, more)
  row.label = label or row.label
  return row


def base(dataset, train_split, test_split):
  """A config without teachers, students and views."""
  c = _common.base(
    dataset, train_split, test_split, crop="inception", least_area=0.08
  )
  c.eval_every = "500 steps"
  c.teachers = ConfigDict()
  c.students = ConfigDict()
  return c


def smoke(c, rows=("labels", "function_matching")):
  """Two steps of tiny networks; on digits, unless images vary in size."""
  if c.view.on_host:
    c.view.size, c.evaluation = 12, (16, 12)
  else:
    c.dataset, c.view.size = "mnist5k", 28
  c.seeds = (0,)
  c.transfer = 32
  c.readers = 0
  for settings in [*c.teachers.values(), *c.networks.values()]:
    settings.batch_size = 16
    settings.model = "mlp"
    settings.fields = ConfigDict({"hidden": (8,)})
    settings.size = min(settings.size or 8, 8)
  for teacher in c.teachers.values():
    teacher.checkpoint = ""
    teacher.epochs = 1.0 if c.view.on_host else 0.011
  for row in c.students.values():
    row.epochs = 1.0
  kept = [row for row in c.rows if row in rows]
  c.rows = tuple(kept or c.rows[:1])
  c.claims = ()


def paper(arg, dataset, train_split, test_split, budgets, teacher, images):
  """The settings of the paper for one data set.

  BiT R152x2 teaches BiT R50x1; the images are decoded and cropped on the host.

  Args:
    arg: words joined by "+": a budget ("medium" if none is named), "modes" for
      all ways to teach in place of function matching alone, "vit" or
      "mobilenet" for another student, "smoke".
    dataset: name in TFDS.
    train_split: of the teachers and the students.
    test_split: what is evaluated.
    budgets: name -> (epochs, temperature, learning rate, weight decay).
    teacher: {name: side of its images}, one for each teacher.
    images: {"size", "resize", "batch_size", "warmup"}.

  Returns:
    The config.
  """
  others = {
    "vit": ("vit", {"patch_size": 16, "width": 384, "depth": 12, "heads": 6}),
    "mobilenet": ("mobilenet_v3", {}),
  }
  words = _common.parse(arg, [*budgets, "modes", *others, "smoke"], "medium")
  budget = next((word for word in words if word in budgets), "medium")
  epochs, temperature, learning_rate, weight_decay = budgets[budget]
  c = base(dataset, train_split, test_split)
  c.study = arg or "medium"
  c.view.size = images["size"]
  c.view.on_host = True
  c.evaluation = (images["resize"], images["size"])
  c.readers = 16
  c.eval_every = "10 minutes"
  for name, size in teacher.items():
    c.teachers[name] = network(
      "bit_resnet",
      images["batch_size"],
      3e-3,
      fields={"depth": "R152", "width": 2},
      size=size,
      epochs=1.0,  # of a teacher without a checkpoint
      seed=0,
      checkpoint=REQUIRED,
    )
  model, fields = "bit_resnet", {"depth": "R50", "width": 1}
  for word in words:
    model, fields = others.get(word, (model, fields))
  c.networks.student = network(
    model,
    images["batch_size"],
    learning_rate,
    fields=fields,
    weight_decay=weight_decay,
    warmup=float(images["warmup"]),
    size=min(images["size"], 224),
  )
  c.networks.student.optimizer.momentum_dtype = "bfloat16"
  names = MODES if "modes" in words else ("function_matching",)
  c.students = ConfigDict(
    {name: student(name, epochs, same_ratio=True) for name in names}
  )
  for row in c.students.values():
    if row.hard_weight == 0:
      row.temperature = temperature
  c.rows = tuple(c.students)
  if "smoke" in words:
    smoke(c)
  return c


def grid(**values):
  """Every combination of some settings, as a sweep yields them.

  Args:
    **values: `learning_rate`, `weight_decay`, `temperature`, `epochs`: lists.

  Yields:
    {config field: value}.
  """
  paths = {
    "learning_rate": "networks.student.optimizer.learning_rate",
    "weight_decay": "networks.student.optimizer.weight_decay",
    "temperature": "students.function_matching.temperature",
    "epochs": "students.function_matching.epochs",
  }
  for chosen in itertools.product(*values.values()):
    yield {paths[k]: v for k, v in zip(values, chosen, strict=True)}


def main(sweep):
  """Prints the sweep, the flags of one run on each line."""
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` is silent
  for settings in sweep():
    print(*(f"--config.{name}={value}" for name, value in settings.items()))
