"""Born-again networks with the paper's settings on CIFAR-100, for a TPU or GPU.

Arguments, as `--config=configs/born_again/cifar100.py:ARG`, joined by "+":
  wrn28-1, wrn28-2, wrn28-5, wrn28-10  wide residual networks (default: 28-10)
  densenet112-33                       DenseNet-BC
  twins     beside each generation one like it on labels alone, the control
  smoke     two steps of tiny networks on digits that need no download
Training is that of wide residual networks (arXiv:1605.07146), which the paper
took over: SGD, 200 epochs, batches of 128. The paper's numbers are those of its
Table 2 (DenseNet) and Table 3 (WRN), in errors of 10,000.
"""

from configs._common import network, parse
from configs.born_again import _common as common

# Errors of the teacher, a born-again student, and for DenseNet more.
PAPER = {
  "wrn28-1": {"generation_0": 3005, "generation_1": 2943},
  "wrn28-2": {"generation_0": 2532, "generation_1": 2438},
  "wrn28-5": {"generation_0": 2088, "generation_1": 2093},
  "wrn28-10": {"generation_0": 1908, "generation_1": 1825},
  "densenet112-33": {
    "generation_0": 1825,
    "generation_1": 1761,
    "generation_2": 1722,
    "generation_3": 1659,
    "generation_1_labels": 1768,
    "cwtm": 1784,
    "dkpp": 1784,
  },
}


def get_config(arg=""):
  """The settings for one network; see the top of the file."""
  words = parse(arg, (*PAPER, "twins", "smoke"), "wrn28-10")
  names = [word for word in words if word in PAPER] or ["wrn28-10"]
  if len(names) > 1:
    raise ValueError(f"{arg!r} names two networks; one is enough")
  kind, size = names[0].removeprefix("wrn"), names[0].startswith("wrn")
  depth, width = map(int, kind.removeprefix("densenet").split("-"))
  c = common.base("cifar100")
  c.study = names[0]
  c.seeds = (0, 1, 2)
  c.networks.student = network(
    "wide_resnet" if size else "densenet",
    128,
    0.1,
    name="nesterov",
    weight_decay=5e-4,
    clip_norm=0.0,
    fields={"depth": depth, "width" if size else "growth": width},
  )
  common.generations(c, epochs=200.0, twins="twins" in words)
  for name, errors in PAPER[names[0]].items():
    c.students[name].paper = float(errors)
  c.sharpness.images = 5000
  common.finish(c, smoke="smoke" in words)
  return c
