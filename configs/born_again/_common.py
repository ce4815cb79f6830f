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
    "offset": 0,  # added to the seed: a twin
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


def generations(c, epochs, network="student", twins=GENERATIONS - 1):
  """Generations with and without labels, the ablations, the ensembles."""
  like = {"epochs": epochs, "network": network}
  rows, first = {}, "generation_0"
  rows[first] = student("labels alone", **like)
  teacher = {"": first, "_labels": first}
  for k in range(1, GENERATIONS + 1):
    for suffix, title, hard in (("", "", 0.0), ("_labels", " + labels", 1.0)):
      name = f"generation_{k}{suffix}"
      rows[name] = student(
        f"generation {k}{title}",
        teacher=teacher[suffix],
        hard_weight=hard,
        **like,
      )
      teacher[suffix] = name
  rows["cwtm"] = student(
    "labels, weighted by confidence (CWTM)",
    teacher=first,
    soft_weight=0.0,
    hard_weight=1.0,
    by_confidence=True,
    **like,
  )
  rows["dkpp"] = student(
    "permuted predictions (DKPP)", teacher=first, target="permuted", **like
  )
  for k in range(1, twins + 1):
    label = f"labels alone, twin {k}"
    rows[f"twin_{k}"] = student(label, offset=1000 * k, **like)
  c.students.update(ConfigDict(rows))
  c.rows += tuple(rows)
  for suffix, title in (("", ""), ("_labels", " + labels")):
    members = [f"generation_{k}{suffix}" for k in range(1, GENERATIONS + 1)]
    c.ensembles[f"ensemble of generations 1-{GENERATIONS}{title}"] = tuple(
      members
    )
  both = f"ensemble of generations 1-{GENERATIONS}"
  claims = [
    (f"generation {k} makes fewer errors than labels alone", name, first)
    for k in range(1, GENERATIONS + 1)
    for name in (f"generation_{k}",)
  ]
  claims += [
    ("with labels, too, generation 1 does", "generation_1_labels", first),
    ("weights by confidence do", "cwtm", first),
    ("permuted predictions do", "dkpp", first),
    (
      "the ensemble beats its last generation",
      both,
      f"generation_{GENERATIONS}",
    ),
  ]
  if twins:
    alike = f"ensemble of {twins + 1} twins"
    c.ensembles[alike] = (first, *(f"twin_{k + 1}" for k in range(twins)))
    claims.append(
      ("the ensemble of generations beats that of twins", both, alike)
    )
  c.claims += tuple((*claim, "lower") for claim in claims)


def unlike(c, epochs):
  """Students of another architecture, in both directions."""
  rows = {}
  for name, title in (("residual", "WRN"), ("dense", "DenseNet")):
    rows[name] = student(f"{title}, labels alone", epochs, network=name)
  for name, title, teacher, by in (
    ("residual", "WRN", "dense", "DenseNet"),
    ("dense", "DenseNet", "residual", "WRN"),
  ):
    rows[f"{name}_of_{teacher}"] = student(
      f"{title} of {by}", epochs, network=name, teacher=teacher
    )
  c.students.update(ConfigDict(rows))
  c.rows += tuple(rows)
  c.claims += tuple(
    (
      f"{title} of another architecture makes fewer errors than on labels",
      f"{name}_of_{teacher}",
      name,
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
