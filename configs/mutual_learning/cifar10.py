"""Mutual learning at the scale of a CPU core: 5,000 CIFAR-10 images.

Arguments, as `--config=configs/mutual_learning/cifar10.py:ARG`, joined by "+":
  peers   two and four alike, a small with a large one; each beside a cohort
          that does not listen (the default)
  family  the peers' mean as the target, stale copies, the mean of one's own
          weights, peers that take turns, gradients through the target
  smoke   two steps of tiny networks on digits that need no download
"""

from ml_collections import ConfigDict

WORDS = ("peers", "family", "smoke")


def cohort(label, peers, epochs=20.0, **more):
  """A row of the table: who learns together, and what each is told."""
  fields = {
    "label": label,
    "peers": tuple(peers),  # a network for each
    "epochs": float(epochs),
    "temperature": 1.0,
    "soft_weight": 1.0,  # of the divergences to the teachers; labels have 1
    "teach": (),  # K rows of K weights; () is the mean over all others
    "targets": "each",  # or "mean_probability", "mean_logit", "stale", "ema"
    "updates": "together",  # or "in_turn", as in the paper
    "differentiate": False,  # whether peers are pulled towards their students
    "burn_in": 0,  # steps on labels alone
    "exchange_every": 50,  # steps between new copies of "stale"
    "decay": 0.99,  # of "ema"
    "stacked": False,  # one batched program for all: good on accelerators
    "groups": 1,  # of devices, over which stacked peers are spread
  }
  unknown = set(more) - set(fields)
  assert not unknown, unknown
  return ConfigDict(fields | more)


def network(model, learning_rate=3e-3, **fields):
  """How a network looks and is trained."""
  return ConfigDict(
    {
      "model": model,
      "fields": fields,
      "size": 0,  # of its images, if not that of the views
      "batch_size": 50,
      "clip_norm": 1.0,  # of each peer; 0 does not clip
      "optimizer": {
        "name": "adam",
        "learning_rate": learning_rate,
        "weight_decay": 1e-4,
        "warmup": 0.05,  # steps; below 1, a share of them
      },
    }
  )


def peers():
  """Alone and together: two, four, and a small with a large network."""
  groups = {
    "2": ("two", ("student",) * 2),
    "4": ("four", ("student",) * 4),
    "pair": ("small and large", ("small", "student")),
  }
  rows, claims = {}, []
  for key, (title, members) in groups.items():
    alone, mutual = f"alone_{key}", f"mutual_{key}"
    rows[alone] = cohort(f"{title}, each alone", members, soft_weight=0.0)
    rows[mutual] = cohort(f"{title}, mutual", members)
    for kind in sorted(set(members)):
      part = f"/{kind}" if len(set(members)) > 1 else ""
      claims.append(
        (
          f"{title}: a {kind} network makes fewer errors than alone",
          mutual + part,
          alone + part,
          "lower",
        )
      )
    claims.append(
      (
        f"{title}: so does the ensemble",
        f"{mutual}/ensemble",
        f"{alone}/ensemble",
        "lower",
      )
    )
  claims.append(("four teach better than two", "mutual_4", "mutual_2", "lower"))
  return rows, claims


def family():
  """Other targets and other orders, for two peers."""
  two = ("student",) * 2
  rows = {
    "alone_2": cohort("two, each alone", two, soft_weight=0.0),
    "mutual_2": cohort("two, mutual", two),
    "turns": cohort("two, in turn", two, updates="in_turn"),
    "through": cohort("two, gradients through", two, differentiate=True),
    "alone_3": cohort("three, each alone", ("student",) * 3, soft_weight=0.0),
    "mutual_3": cohort("three, mutual", ("student",) * 3),
    "probability": cohort(
      "three, mean probability", ("student",) * 3, targets="mean_probability"
    ),
    "logit": cohort(
      "three, mean logit", ("student",) * 3, targets="mean_logit"
    ),
    "stale": cohort("two, codistillation", two, targets="stale", burn_in=200),
    "ema": cohort("one, mean teacher", ("student",), targets="ema"),
  }
  claims = [
    (f"{title} makes fewer errors than alone", name, "alone_2", "lower")
    for name, title in (
      ("turns", "a peer in turn"),
      ("stale", "a codistilled peer"),
      ("ema", "a network taught by its own mean"),
    )
  ]
  claims += [
    (
      "each peer teaches better than their mean",
      "mutual_3",
      "probability",
      "lower",
    ),
  ]
  return rows, claims


def get_config(arg="peers"):
  """The settings of the studies in `arg`; see the top of the file."""
  words = (arg or "peers").split("+")
  for word in words:
    if word not in WORDS:
      raise ValueError(
        f"unknown argument {word!r}; it should be one of {', '.join(WORDS)}"
      )
  c = ConfigDict()
  c.study = arg or "peers"
  c.dataset = "cifar10"
  c.train_split = "train"
  c.test_split = "test"
  c.data_dir = ""
  c.transfer = 5000  # how many training images; 0 is all
  c.seeds = (0, 1, 2, 3, 4)
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
  c.networks = ConfigDict()
  for name, width in (("student", 64), ("small", 16)):
    layers = ((width // 2, 4, 4), (width, 3, 1), (width, 3, 2))
    c.networks[name] = network("cnn", layers=layers, pool=False)
  rows, claims = {}, []
  for study in [word for word in words if word != "smoke"] or ["peers"]:
    more = {"peers": peers, "family": family}[study]()
    rows.update(more[0])
    claims += more[1]
  c.cohorts = ConfigDict(rows)
  c.rows = tuple(rows)
  c.claims = tuple(claims)
  if "smoke" in words:
    smoke(c)
  return c


def smoke(c):
  """Two steps of tiny networks."""
  c.dataset, c.view.size, c.transfer, c.seeds = "mnist5k", 28, 32, (0,)
  for settings in c.networks.values():
    settings.model, settings.fields = "mlp", ConfigDict({"hidden": (8,)})
    settings.batch_size, settings.size = 16, 8
  for row in c.cohorts.values():
    row.epochs = 1.0
  kept = ("alone_2", "mutual_2", "mutual_pair", "turns", "probability", "stale")
  c.rows = tuple(row for row in c.rows if row in (*kept, "ema"))
  c.claims = ()
