"""Beyer et al. 2022 on SUN397: BiT R152x2 teaches BiT R50x1.

The split `validation` is for choosing settings. The data set is read from
TFDS, prepared as ArrayRecord:

  tfds build sun397/tfds --file_format=array_record

The teacher comes from a file in the published `.npz` layout of BiT, fine-tuned
on 397 classes:

  python -m experiments.patient_consistent \
    --config=configs/patient_consistent/sun397.py:fast \
    --config.teachers.teacher.checkpoint=R152x2.npz --workdir=runs/sun397

Arguments, joined by "+": fast, medium or long (the budget); modes (all ways to
teach); vit or mobilenet (another student); smoke.

  python -m configs.patient_consistent.sun397

prints the flags of each run of the paper's grid, a line for each.
"""

from configs.patient_consistent import _common as common

# Epochs, temperature, learning rate, weight decay.
BUDGETS = {
  "fast": (100.0, 10.0, 0.01, 0.001),
  "medium": (1_000.0, 10.0, 0.001, 0.0001),
  "long": (3_000.0, 10.0, 0.01, 3e-05),
}


def get_config(arg="medium"):
  """The paper's settings; see the top of the file."""
  return common.paper(
    arg,
    "sun397/tfds",
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
    learning_rate=[0.001, 0.003, 0.01],
    weight_decay=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3],
    temperature=[1.0, 2.0, 5.0, 10.0],
  )


if __name__ == "__main__":
  common.main(sweep)
