"""Beyer et al. 2022 at the scale of a CPU core: a thousand CIFAR-10 images.

The teacher has seen all 50,000 training images; students get 1,000 of them, as
in the paper a teacher that knows more than the transfer set. Arguments, as
`--config=configs/patient_consistent/cifar10.py:ARG`, joined by "+":
  modes     the ways to teach, for short, longer and long (the default)
  ablations temperatures, and SGD (without mixup it is "the same view" above)
  bank      function matching from 1, 4 and 16 cached views of each image
  pair      labels and function matching alone, for short and longer
  vit       the student is a small ViT
  mobilenet the student is half a MobileNet v3-Small
  smoke     two steps of tiny networks on digits that need no download
"""

from ml_collections import ConfigDict

from configs._common import parse
from configs.patient_consistent import _common as common

EPOCHS = (30, 100, 300)
LONG = EPOCHS[-1]


def modes():
  return {
    f"{name}_{epochs}": common.student(name, epochs)
    for epochs in EPOCHS
    for name in common.MODES
  }


def ablations(epochs=100):
  rows = {f"function_matching_{epochs}": {}}
  for t in (2.0, 5.0, 10.0):
    rows[f"t{t:g}"] = {"label": f"function matching, T={t:g}", "temperature": t}
  rows["sgd"] = {"label": "function matching, SGD", "network": "sgd"}
  return {
    name: common.student("function_matching", epochs, **more)
    for name, more in rows.items()
  }


def bank(epochs=100):
  name = "function_matching"
  rows = {f"{name}_{epochs}": common.student(name, epochs)}
  for views in (1, 4, 16):
    label = f"function matching, {views} view{'s'[: views > 1]}"
    rows[f"bank_{views}"] = common.student(name, epochs, label, bank=views)
  return rows


def pair():
  return {
    f"{name}_{epochs}": common.student(name, epochs)
    for epochs in EPOCHS[:2]
    for name in ("labels", "function_matching")
  }


STUDIES = {"modes": modes, "ablations": ablations, "bank": bank, "pair": pair}
STUDENTS = {
  "vit": ("vit", {"patch_size": 8, "width": 64, "depth": 4, "heads": 4}),
  "mobilenet": (
    "mobilenet_v3",
    {"variant": "small", "width_multiplier": 0.5, "norm": "group"},
  ),
}
WORDS = (*STUDIES, *STUDENTS, "smoke")


def beats_labels(epochs):
  claim = "function matching makes fewer errors than labels alone"
  return claim, f"function_matching_{epochs}", f"labels_{epochs}", "lower"


def gains(epochs, before):
  claim = f"function matching gains from {before} to {epochs} epochs"
  first, second = f"function_matching_{epochs}", f"function_matching_{before}"
  return claim, first, second, "lower"


CLAIMS = {
  "modes": (
    beats_labels(LONG),
    (
      "with patience, function matching makes fewer errors than fixed targets",
      f"function_matching_{LONG}",
      f"fixed_{LONG}",
      "lower",
    ),
    (
      "with patience, the same view makes fewer errors than fixed targets",
      f"consistent_{LONG}",
      f"fixed_{LONG}",
      "lower",
    ),
    (
      "with patience, mixup helps on top of the same view",
      f"function_matching_{LONG}",
      f"consistent_{LONG}",
      "lower",
    ),
    (
      "the same view makes fewer errors than independent views",
      f"consistent_{LONG}",
      f"independent_{LONG}",
      "lower",
    ),
    gains(LONG, 100),
    (
      "fixed targets overfit: 300 epochs make more errors than 100",
      f"fixed_{LONG}",
      "fixed_100",
      "higher",
    ),
  ),
  "ablations": (),
  "pair": (beats_labels(100), gains(100, 30)),
  "bank": (
    ("16 views make fewer errors than one", "bank_16", "bank_1", "lower"),
    (
      "new views for ever make fewer errors than 16",
      "function_matching_100",
      "bank_16",
      "lower",
    ),
  ),
}


def get_config(arg="modes"):
  """The settings of the studies in `arg`; see the top of the file."""
  words = parse(arg, WORDS, "modes")
  if len(set(words) & set(STUDENTS)) > 1:
    raise ValueError(f"{arg!r} names two students; one is enough")
  studies = [word for word in words if word in STUDIES] or ["modes"]
  c = common.base("cifar10", "train", "test")
  c.study = arg
  c.transfer = 1000
  c.seeds = (0, 1, 2)
  c.view.least_area = 0.25
  c.teachers.teacher = common.network(
    "cnn",
    128,
    3e-3,
    fields={
      "layers": ((32, 3, 2), (64, 3, 2), (64, 3, 1)),
      "pool": False,
    },
    weight_decay=1e-4,
    epochs=12.0,
    seed=0,
    checkpoint="",
  )
  fields = {"layers": ((32, 4, 4), (32, 3, 1), (32, 3, 1)), "pool": False}
  model, rate = "cnn", 3e-3
  for word in words:
    if word in STUDENTS:
      (model, fields), rate = STUDENTS[word], 1e-3
  c.networks.student = common.network(
    model, 50, rate, fields=fields, weight_decay=1e-5
  )
  c.networks.sgd = c.networks.student.copy_and_resolve_references()
  c.networks.sgd.optimizer.name = "sgd"
  c.networks.sgd.optimizer.learning_rate = 0.03
  rows = {}
  for study in studies:
    rows.update(STUDIES[study]())
  c.rows = tuple(rows)
  c.students = ConfigDict(rows)
  c.claims = tuple(claim for study in studies for claim in CLAIMS[study])
  if "smoke" in words:
    common.smoke(c, ("labels_30", "function_matching_30", "bank_4", "sgd"))
  return c
