"""Beyer et al. 2022 on ImageNet: BiT R152x2 teaches BiT R50x1.

ILSVRC-2012 is read from TFDS, prepared as ArrayRecord; the last 2% of the
training images are for choosing settings. The teachers come from files in the
published `.npz` layout of BiT (R152x2_T_224.npz and R152x2_T_384.npz):

  python -m experiments.patient_consistent \
    --config=configs/patient_consistent/imagenet2012.py:medium \
    --config.teachers.t224.checkpoint=R152x2_T_224.npz --workdir=runs/imagenet

Arguments, joined by "+": short, medium, long or longest (300, 1,200, 4,800 or
9,600 epochs); ensemble (a second teacher, of 384 x 384 images, that sees the
same crop); modes (all ways to teach); vit or mobilenet (another student);
smoke.

  python -m configs.patient_consistent.imagenet2012

prints the flags of each run of a grid, a line for each.
"""

from configs.patient_consistent import _common as common

# Epochs, temperature, learning rate, weight decay.
BUDGETS = {
  "short": (300.0, 1.0, 0.03, 3e-4),
  "medium": (1_200.0, 1.0, 0.03, 3e-4),
  "long": (4_800.0, 1.0, 0.03, 3e-4),
  "longest": (9_600.0, 1.0, 0.03, 3e-4),
}


def get_config(arg="medium"):
  """The paper's settings; see the top of the file."""
  words = (arg or "medium").split("+")
  both = "ensemble" in words
  size = 384 if both else 224
  c = common.paper(
    "+".join(word for word in words if word != "ensemble") or "medium",
    "imagenet2012",
    "train[:98%]",
    "validation",
    BUDGETS,
    {"t224": 224, "t384": 384} if both else {"t224": 224},
    {
      "size": size,
      "resize": size * 8 // 7,
      "batch_size": 4096,
      "warmup": 5000,
    },
  )
  c.study = arg or "medium"
  c.eval_every = "1 epoch"
  return c


def sweep():
  """Around the paper's setting."""
  return common.grid(
    epochs=[300.0, 1_200.0],
    learning_rate=[0.01, 0.03],
    weight_decay=[1e-4, 3e-4],
    temperature=[1.0, 2.0],
  )


if __name__ == "__main__":
  common.main(sweep)
