"""Beyer et al. 2022 on Oxford Flowers 102: BiT R152x2 teaches BiT R50x1.

1,020 training images, and up to a million epochs. The data set is read from
TFDS, prepared as ArrayRecord:

  tfds build oxford_flowers102 --file_format=array_record

The teacher comes from a file in the published `.npz` layout of BiT, fine-tuned
on 102 classes:

  python -m experiments.patient_consistent \
    --config=configs/patient_consistent/flowers102.py:fast \
    --config.teachers.teacher.checkpoint=R152x2.npz --workdir=runs/flowers102

Arguments, joined by "+": fast, medium or long (the budget); modes (all ways to
teach); vit or mobilenet (another student); smoke.

  python -m configs.patient_consistent.flowers102

prints the flags of each run of the paper's grid, a line for each.
"""

from configs.patient_consistent import _common as common

# Epochs, temperature, learning rate, weight decay.
BUDGETS = {
  "fast": (10_000.0, 10.0, 0.003, 0.0003),
  "medium": (100_000.0, 1.0, 0.001, 0.0001),
  "long": (1_000_000.0, 1.0, 0.0003, 1e-05),
}


def get_config(arg="medium"):
  """The paper's settings; see the top of the file."""
  return common.paper(
    arg,
    "oxford_flowers102",
    "train",
    "test",
    BUDGETS,
    {"teacher": 128},
    {"size": 128, "resize": 160, "batch_size": 512, "warmup": 1500},
  )


def sweep():
  """The grid from which the budgets' settings were chosen."""
  return common.grid(
    epochs=[epochs for epochs, *_ in BUDGETS.values()],
    learning_rate=[0.0003, 0.001, 0.003, 0.01],
    weight_decay=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3],
    temperature=[1.0, 2.0, 5.0, 10.0],
  )


if __name__ == "__main__":
  common.main(sweep)
