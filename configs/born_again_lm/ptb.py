"""The paper's LSTM on the Penn Treebank, for a GPU.

The text is not free to pass on: name the files of Mikolov's preparation,
`--config.text=ptb.train.txt --config.test_text=ptb.test.txt`. The network is
the "medium" LSTM of Zaremba et al. 2014, arXiv:1409.2329, on windows that
begin from zeros; the paper's numbers are 71.87 and, with the text, 68.56 for a
larger LSTM whose state is carried on. `smoke` is two steps of a tiny network.
"""

from configs._common import network, parse
from configs.born_again_lm import text


def get_config(arg=""):
  """The settings; see the top of the file."""
  words = parse(arg, ("generations", "smoke"), "generations")
  c = text.base("ptb.train.txt", "word", 70)
  c.study = "the Penn Treebank"
  c.test_text = "ptb.test.txt"
  c.network = network(
    "lstm",
    20,
    1.0,
    name="nesterov",
    momentum=0.0,
    drops=tuple(i / 39 for i in range(6, 39)),
    factor=1 / 1.2,
    clip_norm=5.0,
  )
  text.generations(c, epochs=39.0)
  c.students.generation_0.paper = 71.87
  c.students.generation_1_labels.paper = 68.56
  if "smoke" in words:
    text.smoke(c)
  return c
