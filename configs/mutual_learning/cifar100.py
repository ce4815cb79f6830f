"""Deep mutual learning with the settings of the paper, CIFAR-100 on a GPU.

Arguments, as `--config=configs/mutual_learning/cifar100.py:ARG`, joined by "+":
  wrn        two WRN-28-10 (the default)
  mobilenet  two MobileNets (v3; the paper's are of the first version)
  mixed      a WRN-28-10 with a MobileNet
  turns      the peers take turns, as in the paper's algorithm
  smoke      two steps of tiny networks on digits that need no download
The paper's numbers are the errors of 10,000 of WRN-28-10, alone and as the mean
of two peers (78.69% right alone, 80.28 and 80.08 as peers). They, batch 64, the
learning rate and its steps are known from descriptions of the paper, not from
its own text; the weight decay is that of wide ResNets.
"""

from ml_collections import ConfigDict

from configs._common import base, network, parse, tiny
from configs.mutual_learning import cifar10

GROUPS = {
  "wrn": ("wrn", "wrn"),
  "mobilenet": ("mobilenet", "mobilenet"),
  "mixed": ("wrn", "mobilenet"),
}


def get_config(arg=""):
  """The settings for the groups in `arg`; see the top of the file."""
  words = parse(arg, (*GROUPS, "turns", "smoke"), "wrn")
  c = base("cifar100")
  c.study = arg or "wrn"
  c.seeds = (0, 1, 2)
  models = {
    "wrn": ("wide_resnet", {"depth": 28, "width": 10}),
    "mobilenet": ("mobilenet_v3", {"small_inputs": True}),
  }
  for name, (model, fields) in models.items():
    c.networks[name] = network(
      model,
      64,
      0.1,
      name="nesterov",
      drops=(0.3, 0.6, 0.9),
      factor=0.1,
      weight_decay=5e-4,
      clip_norm=0.0,
      fields=fields,
    )
  rows, claims = {}, []
  how = {"epochs": 200.0}
  if "turns" in words:
    how["updates"] = "in_turn"
  for key in [word for word in words if word in GROUPS] or ["wrn"]:
    members = GROUPS[key]
    alone, mutual = f"alone_{key}", f"mutual_{key}"
    rows[alone] = cifar10.cohort(
      f"{key}, each alone", members, soft_weight=0.0, **how
    )
    rows[mutual] = cifar10.cohort(f"{key}, mutual", members, **how)
    for kind in sorted(set(members)):
      part = f"/{kind}" if len(set(members)) > 1 else ""
      claim = f"{key}: a {kind} makes fewer errors than alone"
      claims.append((claim, mutual + part, alone + part, "lower"))
  if "alone_wrn" in rows:
    rows["alone_wrn"].paper, rows["mutual_wrn"].paper = 2131.0, 1982.0
  c.cohorts = ConfigDict(rows)
  c.rows, c.claims = tuple(rows), tuple(claims)
  if "smoke" in words:
    tiny(c, c.rows)
    for row in c.cohorts.values():
      row.epochs = 1.0
  return c
