"""What the configs of born-again networks share."""

from ml_collections import ConfigDict

from configs import _common

GENERATIONS = 3


def student(label, epochs, *, network="student", teacher="", **more):
  """A row of the table: who teaches a student, and what it is told."""
  fields = {
    "label": label,
    "network": network,
    "teacher": teacher,  # the name of a row before; '' is labels alone
    "epochs": float(epochs),
    "temperature": 1.0,
    "soft_weight": 1.0 if teacher else 0.0,  # of T^2 KL(teacher, student)
    "hard_weight": 0.0 if teacher else 1.0,  # of the cross-entropy
    "by_confidence": False,  # labels weighted by the teacher's confidence
    "target": "teacher",  # "permuted": its other classes in random order
    "offset": 0,  # added to the seed: other initial weights, other batches
    "paper": 0.0,  # the paper's number of errors
  }
  return _common.fill(fields, more)


def base(dataset, train_split="train", test_split="test"):
  """A config without networks and students."""
  c = _common.base(dataset, train_split, test_split)
  # Of how many training images; in how large a ball, in that of the weights.
  c.sharpness = ConfigDict(
    {"images": 500, "probes": 10, "radius": 0.01, "steps": 5}
  )
  # Rows that are taken from another run, the directory of which is `run`.
  c.branch = ConfigDict({"run": "", "rows": ()})
  c.students = ConfigDict()
  c.ensembles = ConfigDict()
  return c


def generations(c, epochs, network="student", twins=True):
  """Generations with and without labels, the ablations, the ensembles.

  The twin of generation k begins with its weights and sees its batches, but is
  told the labels alone.
  """
  rows, first = {}, "generation_0"

  def add(name, label, k, **more):
    rows[name] = student(
      label, epochs, network=network, offset=1000 * k, **more
    )

  add(first, "labels alone", 0)
  teacher = {"": first, "_labels": first}
  for k in range(1, GENERATIONS + 1):
    for suffix, title, hard in (("", "", 0.0), ("_labels", " + labels", 1.0)):
      name, label = f"generation_{k}{suffix}", f"generation {k}{title}"
      add(name, label, k, teacher=teacher[suffix], hard_weight=hard)
      teacher[suffix] = name
    if twins:
      add(f"twin_{k}", f"labels alone, twin of generation {k}", k)
  label = "labels, weighted by confidence (CWTM)"
  how = {"soft_weight": 0.0, "hard_weight": 1.0, "by_confidence": True}
  add("cwtm", label, 1, teacher=first, **how)
  label = "permuted predictions (DKPP)"
  add("dkpp", label, 1, teacher=first, target="permuted")
  c.students.update(ConfigDict(rows))
  c.rows += tuple(rows)

  numbers = range(1, GENERATIONS + 1)
  control = {k: f"twin_{k}" if twins else first for k in numbers}
  together = f"ensemble of generations 1-{GENERATIONS}"
  for suffix, title in (("", ""), ("_labels", " + labels")):
    members = tuple(f"generation_{k}{suffix}" for k in numbers)
    c.ensembles[together + title] = members
  than = "its twin" if twins else "labels alone"
  claims = [
    (f"generation {k}{title} makes fewer errors than {than}", name, control[k])
    for k in numbers
    for name, title in (
      (f"generation_{k}", ""),
      (f"generation_{k}_labels", " + labels"),
    )
  ]
  last = f"generation_{GENERATIONS}"
  claims += [
    (f"CWTM makes fewer errors than {than}", "cwtm", control[1]),
    (f"DKPP makes fewer errors than {than}", "dkpp", control[1]),
    ("the ensemble beats its last generation", together, last),
  ]
  if twins:
    alike = f"ensemble of {GENERATIONS} twins"
    c.ensembles[alike] = tuple(control.values())
    claims += [
      ("the ensemble of generations beats that of twins", together, alike),
      ("so does that with labels", f"{together} + labels", alike),
    ]
  c.claims += tuple((*claim, "lower") for claim in claims)


def unlike(c, epochs):
  """Students of another architecture, in both directions."""
  rows = {}
  for name, title in (("residual", "WRN"), ("dense", "DenseNet")):
    rows[name] = student(f"{title}, labels alone", epochs, network=name)
    rows[f"{name}_twin"] = student(
      f"{title}, labels alone, twin", epochs, network=name, offset=1000
    )
  for name, title, teacher, by in (
    ("residual", "WRN", "dense", "DenseNet"),
    ("dense", "DenseNet", "residual", "WRN"),
  ):
    rows[f"{name}_of_{teacher}"] = student(
      f"{title} of {by}", epochs, network=name, teacher=teacher, offset=1000
    )
  c.students.update(ConfigDict(rows))
  c.rows += tuple(rows)
  c.claims += tuple(
    (
      f"{title} of another architecture makes fewer errors than its twin",
      f"{name}_of_{teacher}",
      f"{name}_twin",
      "lower",
    )
    for name, title, teacher in (
      ("residual", "a WRN", "dense"),
      ("dense", "a DenseNet", "residual"),
    )
  )


def finish(c, smoke):
  """Leaves out networks without a row; two steps of tiny ones if `smoke`."""
  used = {c.students[name].network for name in c.rows}
  for name in set(c.networks) - used:
    del c.networks[name]
  if not smoke:
    return
  _common.tiny(
    c, ("generation_0", "generation_1", "generation_2", "dkpp", "cwtm")
  )
  c.sharpness.images, c.sharpness.probes = 16, 2
  for row in c.students.values():
    row.epochs = 1.0
  c.ensembles = ConfigDict()
  if "generation_2" in c.rows:
    c.ensembles["both"] = ("generation_1", "generation_2")
