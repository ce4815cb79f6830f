"""Beyer et al. 2022 at the scale of two CPU cores: a part of CIFAR-10.

The teacher has seen all 50,000 training images; students get 2,000 of them, as
in the paper a teacher that knows more than the transfer set. Arguments, as
`--config=configs/patient_consistent/cifar10.py:ARG`:
  modes     the ways to teach, for a short and a longer time (the default)
  bank      function matching from 1, 4 and 16 cached views of each image
  smoke     joined to another: a few steps of tiny networks, to try things out
"""

from ml_collections import ConfigDict

MODES = {
  "labels": "labels alone",
  "hinton": "fixed targets, and a little of the labels",
  "fixed": "fixed targets",
  "independent": "independent views",
  "consistent": "the same view",
  "function_matching": "function matching",
}


def student(label, mode, epochs, **more):
  """A row of the table: how one student is taught."""
  fields = {
    "label": f"{label}, {epochs:g} epochs",
    "mode": mode,
    "epochs": float(epochs),
    "temperature": 1.0,
    "soft_weight": 1.0,  # of T^2 KL(teacher, student)
    "hard_weight": 0.0,  # of the cross-entropy with the labels
    "mixup": 1.0,  # the ratio is Beta(mixup, mixup); 1 is uniform
    "same_ratio": False,  # one ratio for a batch, as in the authors' code
    "bank": 0,  # views of each image that are cached; 0: new ones for ever
  }
  fields.update(more)
  return ConfigDict(fields)


def modes(epochs=(30, 300)):
  rows = {}
  for count in epochs:
    for name, label in MODES.items():
      more = {}
      if name == "labels":
        more = {"soft_weight": 0.0, "hard_weight": 1.0}
      elif name == "hinton":
        more = {"soft_weight": 0.9, "hard_weight": 0.1, "temperature": 4.0}
      mode = "fixed" if name == "hinton" else name
      rows[f"{name}_{count}"] = student(label, mode, count, **more)
  return rows


def bank(epochs=300):
  rows = {}
  for views in (1, 4, 16):
    rows[f"bank_{views}"] = student(
      f"function matching, {views} views",
      "function_matching",
      epochs,
      bank=views,
    )
  rows[f"function_matching_{epochs}"] = student(
    MODES["function_matching"], "function_matching", epochs
  )
  return rows


STUDIES = {"modes": modes, "bank": bank}
CLAIMS = {
  "modes": (
    (
      "with patience, function matching makes fewer errors than fixed targets",
      "function_matching_300",
      "fixed_300",
      "lower",
    ),
    (
      "the same view makes fewer errors than independent views",
      "consistent_300",
      "independent_300",
      "lower",
    ),
    (
      "patience helps function matching",
      "function_matching_300",
      "function_matching_30",
      "lower",
    ),
    (
      "function matching makes fewer errors than labels alone",
      "function_matching_300",
      "labels_300",
      "lower",
    ),
  ),
  "bank": (
    (
      "16 views make fewer errors than one",
      "bank_16",
      "bank_1",
      "lower",
    ),
  ),
}


def get_config(arg="modes"):
  """The settings of the studies in `arg`; see the top of the file."""
  words = (arg or "modes").split("+")
  studies = [word for word in words if word != "smoke"] or ["modes"]
  for study in studies:
    if study not in STUDIES:
      known = ", ".join([*STUDIES, "smoke"])
      raise ValueError(
        f"unknown argument {study!r}; it should be one of {known}"
      )
  c = ConfigDict()
  c.study = arg
  c.dataset = "cifar10"
  c.train_split = "train"
  c.test_split = "test"
  c.data_dir = ""
  c.transfer = 2000  # training images that the students get
  c.seeds = (0, 1, 2)
  c.parallel = "jit"  # or "pmap"
  c.devices = 0  # how many to use; 0 is all
  c.steps_per_call = 1  # convolutions inside a scan are slow on CPUs
  c.eval_every = 500
  c.save_every = 500
  c.log_every = 50
  c.view = ConfigDict(
    {
      "crop": "inception",  # or "shift": whole pixels
      "size": 32,
      "padding": 4,  # of "shift"
      "least_area": 0.25,  # of "inception"
      "flip": True,
    }
  )
  common = {
    "model": "bit_resnet",
    "optimizer": "adam",
    "clip_norm": 1.0,
    "warmup": 0.05,  # share of the steps
  }
  c.teacher = ConfigDict(
    {
      **common,
      "fields": {
        "depth": (1, 1, 1),
        "base_width": 32,
        "groups": 8,
        "root": "imagenet",
      },
      "epochs": 20.0,
      "batch_size": 128,
      "learning_rate": 3e-3,
      "weight_decay": 1e-4,
      "seed": 0,
    }
  )
  c.student = ConfigDict(
    {
      **common,
      "fields": {
        "depth": (1, 1, 1),
        "base_width": 16,
        "groups": 8,
        "root": "imagenet",
      },
      "batch_size": 128,
      "learning_rate": 3e-3,
      "weight_decay": 1e-4,
    }
  )
  rows = {}
  for study in studies:
    rows.update(STUDIES[study]())
  c.rows = tuple(rows)
  c.students = ConfigDict(rows)
  c.claims = tuple(claim for study in studies for claim in CLAIMS[study])
  if "smoke" in words:
    smoke(c)
  return c


def smoke(c):
  """Two steps each, on the digits that need no download."""
  c.dataset = "mnist5k"
  c.view.size = 28
  c.seeds = (0,)
  c.transfer = 40
  c.teacher.epochs = 0.011
  for settings in (c.teacher, c.student):
    settings.batch_size = 16
    settings.model = "mlp"
    settings.fields = {"hidden": (8,)}
  for row in c.students.values():
    row.epochs = 1.0
  kept = ("labels_30", "function_matching_30", "bank_4")
  c.rows = tuple(row for row in c.rows if row in kept)
  c.claims = ()
