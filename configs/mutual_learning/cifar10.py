"""Mutual learning at the scale of a CPU core: 5,000 CIFAR-10 images.

Arguments, as `--config=configs/mutual_learning/cifar10.py:ARG`, joined by "+":
  peers   two and four alike, a small with a large one; each beside a cohort
          that does not listen (the default)
  family  the peers' mean as the target, stale copies, the mean of one's own
          weights, peers that take turns, gradients through the target
  smoke   two steps of tiny networks on digits that need no download
"""

from ml_collections import ConfigDict

from configs._common import base, fill, network, parse, tiny

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
    "paper": 0.0,  # the paper's number of errors, the mean of the peers
  }
  return fill(fields, more)


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
  words = parse(arg, WORDS, "peers")
  c = base("cifar10")
  c.study = arg or "peers"
  c.transfer = 5000
  c.seeds = (0, 1, 2, 3, 4)
  for name, width in (("student", 64), ("small", 16)):
    layers = ((width // 2, 4, 4), (width, 3, 1), (width, 3, 2))
    fields = {"layers": layers, "pool": False}
    c.networks[name] = network(
      "cnn", 50, 3e-3, weight_decay=1e-4, fields=fields
    )
  rows, claims = {}, []
  for study in [word for word in words if word != "smoke"] or ["peers"]:
    more = {"peers": peers, "family": family}[study]()
    rows.update(more[0])
    claims += more[1]
  c.cohorts = ConfigDict(rows)
  c.rows = tuple(rows)
  c.claims = tuple(claims)
  if "smoke" in words:
    kept = ("alone_2", "mutual_2", "mutual_pair")
    tiny(c, (*kept, "turns", "probability", "stale", "ema"))
    for row in c.cohorts.values():
      row.epochs = 1.0
  return c
