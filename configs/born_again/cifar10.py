"""Born-again networks at the scale of a CPU core: 5,000 CIFAR-10 images.

Arguments, as `--config=configs/born_again/cifar10.py:ARG`, joined by "+":
  generations three generations with and without labels, twins, ensembles, and
              the two ablations (the default)
  unlike      a wide residual network teaches a DenseNet, and back (on images
              of 16 by 16)
  smoke       two steps of tiny networks on digits that need no download
"""

from configs._common import network, parse
from configs.born_again import _common as common

STUDIES = {"generations": common.generations, "unlike": common.unlike}
WORDS = (*STUDIES, "smoke")


def get_config(arg="generations"):
  """The settings of the studies in `arg`; see the top of the file."""
  words = parse(arg, WORDS, "generations")
  c = common.base("cifar10", "train", "test")
  c.study = arg or "generations"
  c.transfer = 5000
  c.seeds = (0, 1, 2, 3, 4)
  layers = ((32, 4, 4), (64, 3, 1), (64, 3, 2))
  c.networks.student = network(
    "cnn", 50, 3e-3, weight_decay=1e-4, fields={"layers": layers, "pool": False}
  )
  c.networks.residual = network(
    "wide_resnet",
    50,
    3e-3,
    weight_decay=1e-4,
    size=16,
    fields={"depth": 10, "width": 1, "norm": "group"},
  )
  c.networks.dense = network(
    "densenet",
    50,
    3e-3,
    weight_decay=1e-4,
    size=16,
    fields={"depth": 10, "growth": 16, "norm": "group"},
  )
  studies = [word for word in words if word in STUDIES] or ["generations"]
  for study in studies:
    STUDIES[study](c, epochs=20.0)
  common.finish(c, smoke="smoke" in words)
  return c
