"""What the configs of patient and consistent teaching share."""

import itertools
import signal

from ml_collections import ConfigDict

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
  fields.update(more)
  fields["label"] = label or fields["label"]
  return ConfigDict(fields)


def network(model, batch_size, learning_rate, *, fields=(), **more):
  """How a network looks and is trained."""
  return ConfigDict(
    {
      "model": model,
      "fields": dict(fields),
      "size": 0,  # of its images, if not that of the views
      "batch_size": batch_size,
      "clip_norm": 1.0,
      "optimizer": {
        "name": "adam",  # or "sgd"
        "learning_rate": learning_rate,
        "weight_decay": more.pop("weight_decay", 0.0),
        "warmup": more.pop("warmup", 0.05),  # steps; below 1, a share of them
        "momentum_dtype": "float32",  # or "bfloat16"
      },
      **more,
    }
  )


def base(dataset, train_split, test_split):
  """A config without teachers, students and views."""
  c = ConfigDict()
  c.dataset = dataset
  c.train_split = train_split
  c.test_split = test_split
  c.data_dir = ""
  c.transfer = 0  # training images that the students get; 0 is all
  c.seeds = (0,)
  c.parallel = "jit"  # or "pmap"
  c.devices = 0  # how many to use; 0 is all
  c.steps_per_call = 1
  c.readers = 4  # threads that read images on the host
  c.eval_every = "500 steps"  # or epochs, or minutes
  c.save_every = "10 minutes"
  c.log_every = "50 steps"
  c.view = ConfigDict(
    {
      "crop": "inception",  # a random rectangle, resized; "shift": a window
      "size": 32,
      "padding": 4,  # of "shift"
      "least_area": 0.08,  # of "inception"
      "flip": True,
      "on_host": False,  # where images come in many sizes
    }
  )
  c.evaluation = ()  # (shorter side, central crop); () is the whole image
  c.teachers = ConfigDict()
  c.networks = ConfigDict()
  c.students = ConfigDict()
  c.rows = ()
  c.claims = ()
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
  words = (arg or "medium").split("+")
  known = [*budgets, "modes", *others, "smoke"]
  for word in words:
    if word not in known:
      raise ValueError(
        f"unknown argument {word!r}; it should be one of {', '.join(known)}"
      )
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
