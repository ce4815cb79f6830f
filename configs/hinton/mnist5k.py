"""Hinton et al. 2015, Sec. 3, on 5,000 real MNIST digits (no download).

Arguments, as `--config=configs/hinton/mnist5k.py:ARG`:
  temperature  2x800 students, hard labels against soft targets (the default)
  missing3     the transfer set has no 3s; one bias is learned afterwards
  only78       the transfer set has only 7s and 8s
  sizes        students of 30, 300 and 800 units against temperature
  few_labels   a tenth of the training set: 300 examples
  demo         teacher, control and one student in about three minutes
  smoke        joined to others: two steps of tiny networks, to try things out

  all          the five studies in one run

Several can be joined, `temperature+sizes`: they then share their teachers.
`--config=...:demo,teacher.steps=500` is the same as `:demo` with
`--config.teacher.steps=500`.
"""

from ml_collections import ConfigDict


def student(label, **more):
  """A row of the table: how one student is trained."""
  fields = {
    "label": label,
    "hidden": (800, 800),
    "temperature": 4.0,
    "soft_weight": 0.0,  # of T^2 KL(teacher, student)
    "hard_weight": 1.0,  # of the cross-entropy with the labels
    "classes": (),  # the classes of its transfer set; () is all
    "fraction": 1.0,  # of the training set that it sees
    "learn_bias": False,  # of the absent classes, on held-out training data
    "paper": 0.0,  # test errors in the paper, 0 if it gives none
    "paper_bias": 0.0,  # the same after the bias
  }
  fields.update(more)
  return ConfigDict(fields)


def soft(label, temperature, **more):
  """A student of soft targets, with a little of the labels."""
  weights = {"soft_weight": 0.9, "hard_weight": 0.1}
  return student(label, temperature=temperature, **{**weights, **more})


def only_soft(label, **more):
  """A student that never sees a label, and learns one bias afterwards."""
  return soft(
    label, 20.0, soft_weight=1.0, hard_weight=0.0, learn_bias=True, **more
  )


def get_config(arg="temperature", fraction=0.1, paper=False):
  """The settings of the studies in `arg`; see the top of the file."""
  words = (arg or "temperature").split("+")
  studies = [word for word in words if word != "smoke"] or ["temperature"]
  if "all" in studies:
    studies = [study for study in STUDIES if study != "demo"]
  for study in studies:
    if study not in STUDIES:
      known = ", ".join([*STUDIES, "all", "smoke"])
      raise ValueError(
        f"unknown argument {study!r}; it should be one of {known}"
      )
  c = ConfigDict()
  c.study = arg
  c.dataset = "mnist5k"
  c.train_split = "train"
  c.test_split = "test"
  c.compilation_cache = "~/.cache/kd_jax/programs"  # "" keeps none
  c.data_dir = ""
  c.holdout = 0  # last training examples, set aside to learn the bias on
  c.seeds = (0, 1, 2)
  c.live_teacher = False  # True: the teacher runs inside the compiled step
  c.parallel = "jit"  # or "pmap"
  c.devices = 0  # how many to use; 0 is all
  c.steps_per_call = 10
  c.eval_every = "300 steps"
  c.save_every = "1000 steps"
  c.log_every = "50 steps"
  c.teacher = ConfigDict(
    {
      "hidden": (1200, 1200),
      "dropout": 0.5,
      "input_dropout": 0.2,
      "max_shift": 2,  # pixels
      "steps": 3000,
      "batch_size": 100,
      "learning_rate": 1e-3,
      "paper": 67.0,
      "seeds": (),  # of the teachers; () is one for each student's seed
    }
  )
  c.student = ConfigDict(
    {
      "hidden": (800, 800),  # each row of the table may say otherwise
      "dropout": 0.0,
      "input_dropout": 0.0,
      "max_shift": 0,
      "steps": 1500,
      "batch_size": 100,
      "learning_rate": 1e-3,
    }
  )
  rows = {}
  for study in studies:
    rows.update(STUDIES[study](fraction))
  c.rows = tuple(rows)  # in this order; leave some out to train fewer
  c.students = ConfigDict(rows)
  c.claims = tuple(claim for study in studies for claim in CLAIMS[study])
  if any(s.learn_bias for s in c.students.values()):
    c.holdout = 500
  if "demo" in studies:
    c.teacher.steps = 1200
    c.student.steps = 600
    c.eval_every = "150 steps"
  if "smoke" in words:
    smoke(c)
  if not paper:  # its numbers are of the full data set
    c.teacher.paper = 0.0
    for s in c.students.values():
      s.paper = s.paper_bias = 0.0
  return c


def smoke(c):
  c.seeds = (0,)
  for settings in (c.teacher, c.student):
    settings.steps = 2
    settings.batch_size = 16
  for settings in (c.teacher, *c.students.values()):
    settings.hidden = (8, 8)


def demo(fraction):
  return {
    "hard": student("hard labels", paper=146.0),
    "soft_t4": soft("soft targets, T=4", 4.0),
  }


def temperature(fraction):
  rows = {"hard": student("hard labels", paper=146.0)}
  for t in (1, 2, 4, 8, 20):
    paper = 74.0 if t == 20 else 0.0
    rows[f"soft_t{t}"] = soft(f"soft targets, T={t}", float(t), paper=paper)
  return rows


def missing3(fraction):
  no3 = {"classes": (0, 1, 2, 4, 5, 6, 7, 8, 9)}
  return {
    "hard_no3": student("hard labels, no 3s", **no3),
    "soft_no3": only_soft(
      "soft targets, no 3s", paper=206.0, paper_bias=109.0, **no3
    ),
  }


def only78(fraction):
  return {
    "hard_only78": student("hard labels, only 7s and 8s", classes=(7, 8)),
    "soft_only78": only_soft(
      "soft targets, only 7s and 8s",
      paper=4730.0,
      paper_bias=1320.0,
      classes=(7, 8),
    ),
  }


def sizes(fraction):
  rows = {}
  for units in (30, 300):
    size = {"hidden": (units, units)}
    rows[f"hard_{units}"] = student(f"2x{units}, hard labels", **size)
    for t in (1, 2, 4, 8, 20):
      rows[f"soft_{units}_t{t}"] = soft(
        f"2x{units}, soft targets, T={t}", float(t), **size
      )
  return rows | temperature(fraction)  # these are the 2x800


def few_labels(fraction):
  some = f"{100 * fraction:g}% of the examples"
  few = {"fraction": fraction}
  return {
    "hard_few": student(f"hard labels, {some}", **few),
    "soft_few": soft(
      f"soft targets, T=4, {some}", 4.0, soft_weight=1.0, hard_weight=0.0, **few
    ),
  }


STUDIES = {
  f.__name__: f
  for f in (temperature, missing3, only78, sizes, few_labels, demo)
}

# (claim, row a, row b, is a expected "lower" or "higher" than b), in errors.
SOFT_T4 = (
  "soft targets at T=4 make fewer errors than hard labels",
  "soft_t4",
  "hard",
  "lower",
)
SOFT_T20 = (
  "soft targets at T=20, as in the paper, make fewer errors than hard labels",
  "soft_t20",
  "hard",
  "lower",
)
CLAIMS = {
  "demo": (SOFT_T4,),
  "temperature": (SOFT_T4, SOFT_T20),
  "missing3": (
    (
      "soft targets teach a class that the student never sees",
      "soft_no3",
      "hard_no3",
      "lower",
    ),
    (
      "one bias, learned on held-out training data, mends most of the rest",
      "soft_no3+bias",
      "soft_no3",
      "lower",
    ),
  ),
  "only78": (
    (
      "7s and 8s alone teach something about all ten digits",
      "soft_only78",
      "hard_only78",
      "lower",
    ),
    (
      "one bias, learned on held-out training data, mends much of the rest",
      "soft_only78+bias",
      "soft_only78",
      "lower",
    ),
  ),
  "sizes": (
    (
      "at 30 units a low temperature (4) beats a high one (20)",
      "soft_30_t4",
      "soft_30_t20",
      "lower",
    ),
    (
      "at 800 units a high temperature (20) beats T=1",
      "soft_t20",
      "soft_t1",
      "lower",
    ),
  ),
  "few_labels": (
    (
      "with few examples soft targets make fewer errors than hard labels",
      "soft_few",
      "hard_few",
      "lower",
    ),
  ),
}
