"""Hinton et al. 2015, Sec. 3, on the 60,000 + 10,000 digits of MNIST (TFDS).

The arguments are those of mnist5k.py; `few_labels` is 3% of the training set.
As in the paper there is one teacher, trained long: the spread over seeds is
that of the students.
"""

from configs.hinton import mnist5k


def get_config(arg="temperature"):
  """The settings of the studies in `arg`; see mnist5k.py."""
  c = mnist5k.get_config(arg, fraction=0.03, paper=True)
  c.dataset = "mnist"
  c.seeds = (0, 1, 2, 3, 4)
  c.holdout *= 10
  c.eval_every = "1200 steps"
  c.save_every = "900 steps"
  c.log_every = "120 steps"
  c.teacher.batch_size = 250
  c.teacher.steps = 13200  # 55 epochs of all examples
  c.teacher.seeds = (0,)
  c.student.batch_size = 250
  c.student.steps = 1800  # 7.5 epochs of all examples
  if "demo" in arg:
    c.seeds = (0, 1, 2)
  if "smoke" in arg:
    mnist5k.smoke(c)
  return c
