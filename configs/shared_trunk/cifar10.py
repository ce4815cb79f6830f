"""Branches and exits at the scale of a CPU core: 5,000 CIFAR-10 images.

Arguments, as `--config=configs/shared_trunk/cifar10.py:ARG`, joined by "+":
  branches  ONE, OKDDip and FFL on three or four branches
  exits     the deepest of three exits teaches the others
  rocket    a light net beside its booster
  smoke     two steps of tiny networks on digits that need no download
All three studies by default. The settings of the losses are those of the
authors' codes: T = 3, in which the divergences of branches count after a ramp.
The exits have T = 1: their authors do not multiply by T^2, which we always do,
so that with T = 3 their 0.3 would weigh nine times what it weighs there.
"""

from ml_collections import ConfigDict

from configs._common import base, fill, network, parse, tiny

STUDIES = ("branches", "exits", "rocket")


def student(label, method, net, epochs=20.0, **more):
  """A row of the table: how the classifiers of one network are taught."""
  fields = {
    "label": label,
    "method": method,
    "network": net,
    "epochs": float(epochs),
    "temperature": 3.0,
    "soft_weight": 1.0,  # of the divergences; own_teacher: labels have the rest
    "hint_weight": 0.03,  # of squared distances of features or logits
    "ramp": 0.0,  # epochs over which soft_weight rises as exp(-5 (1 - t)^2)
  }
  return fill(fields, more)


def branched(count, combine="mean"):
  """A shared trunk, and so many branches of three quarters of its cost."""
  fields = {
    "trunk": ((32, 4, 4),),
    "branches": (((64, 3, 1), (64, 3, 2)),) * count,
    "combine": combine,
  }
  return network("branched", 50, 3e-3, weight_decay=1e-4, fields=fields)


def branches(c):
  """Three branches on labels, ONE, FFL; four for OKDDip and its control."""
  for count in (1, 3, 4):
    c.networks[f"branches_{count}"] = branched(count)
  c.networks.gated = branched(3, "gate")
  c.networks.fused = branched(3, "fusion")
  c.networks.attentive = branched(4, "attention")
  ramp = 5.0
  rows = {
    "single": student("one branch, labels", "labels", "branches_1"),
    "three": student("three branches, labels", "labels", "branches_3"),
    "four": student("four branches, labels", "labels", "branches_4"),
    "one": student("ONE", "one", "gated", ramp=ramp),
    "ffl": student("FFL", "ffl", "fused", ramp=ramp),
    "okddip": student("OKDDip", "okddip", "attentive", ramp=ramp),
  }
  claims = [
    ("a branch of ONE makes fewer errors than on labels", "one", "three"),
    ("all branches of ONE together do", "one/together", "three/together"),
    ("a branch of FFL does", "ffl", "three"),
    ("its fused classifier does", "ffl/together", "three/together"),
    ("a branch of OKDDip does", "okddip", "four"),
    ("its leader does", "okddip/together", "four"),
  ]
  return rows, claims


def exits(c):
  """Exits on labels, and taught by the deepest."""
  stages = (((32, 4, 4),), ((64, 3, 1),), ((64, 3, 2),))
  c.networks.exits = network(
    "multi_exit", 50, 3e-3, weight_decay=1e-4, fields={"stages": stages}
  )
  rows = {
    "exits": student("exits on labels", "labels", "exits"),
    "own_teacher": student(
      "its own teacher",
      "own_teacher",
      "exits",
      temperature=1.0,
      soft_weight=0.3,
    ),
  }
  claims = [
    (
      f"exit {i + 1} makes fewer errors than on labels",
      f"own_teacher/head{i}",
      f"exits/head{i}",
    )
    for i in range(3)
  ]
  return rows, claims


def rocket(c):
  """A light net, alone and beside a booster that shares its trunk."""
  light, heavy = ((16, 3, 2),), ((64, 3, 1), (64, 3, 2))
  fields = {"trunk": ((32, 4, 4),), "branches": (light,), "combine": "mean"}
  c.networks.light = network(
    "branched", 50, 3e-3, weight_decay=1e-4, fields=fields
  )
  c.networks.both = network(
    "branched",
    50,
    3e-3,
    weight_decay=1e-4,
    fields={**fields, "branches": (light, heavy)},
  )
  rows = {
    "light": student("the light net alone", "labels", "light"),
    "rocket": student("rocket launching", "rocket", "both"),
    "no_hint": student(
      "shared trunk, no hint", "rocket", "both", hint_weight=0.0
    ),
  }
  claims = [
    ("the light net makes fewer errors than alone", "rocket/head0", "light"),
    ("the hint helps beside the shared trunk", "rocket/head0", "no_hint/head0"),
  ]
  return rows, claims


def get_config(arg=""):
  """The settings of the studies in `arg`; see the top of the file."""
  words = parse(arg, (*STUDIES, "smoke"), "+".join(STUDIES))
  c = base("cifar10")
  c.study = arg or "all"
  c.transfer = 5000
  c.seeds = (0, 1, 2, 3, 4)
  rows, claims = {}, []
  for study in [word for word in words if word != "smoke"] or STUDIES:
    more = {"branches": branches, "exits": exits, "rocket": rocket}[study](c)
    rows.update(more[0])
    claims += more[1]
  c.students = ConfigDict(rows)
  c.rows = tuple(rows)
  c.claims = tuple((*claim, "lower") for claim in claims)
  if "smoke" in words:
    smoke(c)
  return c


def smoke(c):
  """Two steps of networks of a few channels."""
  before = {
    name: s.copy_and_resolve_references() for name, s in c.networks.items()
  }
  tiny(c, ("one", "own_teacher", "rocket"))
  for name, settings in c.networks.items():
    settings.model, settings.size = before[name].model, 0
    fields = before[name].fields.to_dict()
    narrow = lambda layers: tuple((8, *layer[1:]) for layer in layers)
    if "stages" in fields:
      fields["stages"] = tuple(narrow(stage) for stage in fields["stages"])
    else:
      fields["trunk"] = narrow(fields["trunk"])
      fields["branches"] = tuple(narrow(b) for b in fields["branches"])
    settings.fields = ConfigDict(fields)
  for row in c.students.values():
    row.epochs = 1.0
