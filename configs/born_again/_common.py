"""What the configs of born-again networks share."""

from ml_collections import ConfigDict

GENERATIONS = 3


def words(arg, known):
  """The words of an argument, each one of those that are known."""
  found = arg.split("+")
  for word in found:
    if word not in known:
      raise ValueError(
        f"unknown argument {word!r}; it should be one of {', '.join(known)}"
      )
  return found


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
  unknown = set(more) - set(fields)
  assert not unknown, unknown
  return ConfigDict(fields | more)


def network(model, *, fields, batch_size=50, learning_rate=3e-3, **more):
  """How a network looks and is trained."""
  return ConfigDict(
    {
      "model": model,
      "fields": dict(fields),
      "size": 0,  # of its images, if not that of the views
      "batch_size": batch_size,
      "clip_norm": more.pop("clip_norm", 1.0),
      "optimizer": {
        "name": more.pop("name", "adam"),  # or "sgd"
        "learning_rate": learning_rate,
        "weight_decay": more.pop("weight_decay", 1e-4),
        "warmup": more.pop("warmup", 0.05),  # steps; below 1, a share of them
        "momentum_dtype": "float32",
        **more,
      },
    }
  )


def base(dataset, train_split, test_split):
  """A config without networks and students."""
  c = ConfigDict()
  c.dataset = dataset
  c.train_split = train_split
  c.test_split = test_split
  c.data_dir = ""
  c.transfer = 0  # how many training images; 0 is all
  c.seeds = (0,)
  c.parallel = "jit"  # or "pmap"
  c.devices = 0  # how many to use; 0 is all
  c.steps_per_call = 1
  c.readers = 4  # threads that read images on the host
  c.evaluation = ()  # (shorter side, central crop); () is the whole image
  c.eval_every = "5 epochs"  # or steps, or minutes
  c.save_every = "10 minutes"
  c.log_every = "50 steps"
  c.view = ConfigDict(
    {
      "crop": "shift",  # a window of the padded image
      "size": 32,
      "padding": 4,
      "least_area": 0.25,
      "flip": True,
      "on_host": False,
    }
  )
  # Of how many training images; in how large a ball, in that of the weights.
  c.sharpness = ConfigDict(
    {"images": 500, "probes": 10, "radius": 0.01, "steps": 5}
  )
  # Rows that are taken from another run, the directory of which is `run`.
  c.branch = ConfigDict({"run": "", "rows": ()})
  c.networks = ConfigDict()
  c.students = ConfigDict()
  c.ensembles = ConfigDict()
  c.rows = ()
  c.claims = ()
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
  c.dataset, c.view.size, c.transfer = "mnist5k", 28, 32
  c.seeds = (0,)
  c.sharpness.images, c.sharpness.probes = 16, 2
  for settings in c.networks.values():
    settings.model = "mlp"
    settings.fields = ConfigDict({"hidden": (8,)})
    settings.batch_size, settings.size = 16, 8
  kept = {"generation_0", "generation_1", "generation_2", "dkpp", "cwtm"}
  c.rows = tuple(row for row in c.rows if row in kept) or c.rows
  for row in c.students.values():
    row.epochs = 1.0
  c.ensembles = ConfigDict()
  if "generation_2" in c.rows:
    c.ensembles["both"] = ("generation_1", "generation_2")
  c.claims = ()
