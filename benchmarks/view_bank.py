"""What a cached bank of views saves in the time of a step.

The student of a config of patient and consistent teaching, with a teacher of
the same config, on made-up images: steps on labels alone, of function matching
that asks the teacher, of function matching that reads a bank.

Run: python -m benchmarks.run view_bank
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

from benchmarks.run import Benchmark
from configs.patient_consistent import cifar10
from experiments import patient_consistent
from kd_jax import train
from kd_jax.data import augment

IMAGES, SIDE, VIEWS, STEPS = 1000, 32, 16, 10


def images() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    "id": np.arange(IMAGES, dtype=np.int32),
    "image": rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8),
    "label": rng.integers(0, 10, IMAGES).astype(np.int32),
  }


def benchmark() -> Benchmark:
  config = cifar10.get_config("modes+bank")
  student, data = config.networks.student, images()
  first = augment.whole(data["image"][:1])
  bare = functools.partial(patient_consistent.network, config, num_classes=10)
  labels = config.students.labels_30.to_dict()
  matching = config.students.function_matching_30.to_dict()
  teacher = bare(config.teachers.teacher, labels, 1)
  variables = teacher.model.init(jax.random.key(0), first)
  logits = np.random.default_rng(1).normal(size=(IMAGES, VIEWS, 10))
  logits = logits.astype(np.float32)

  def form(row: dict, frozen: dict, columns: dict) -> Callable[[], Any]:
    """Ten steps; the next call goes on from where they ended."""
    net = bare(student, row, 1000, teacher=teacher.model)
    start = net.model.init(jax.random.key(1), first)
    state = train.init_state(
      {"model": start["params"]},
      net.optimizer,
      jax.random.key(2),
      model_state={"model": start["state"]},
    )
    weights = ("temperature", "soft_weight", "hard_weight")
    frozen = {
      **frozen,
      "hparams": {key: row[key] for key in weights},
      "data": columns,
      "view_key": train.view_key(0),
    }
    batches = train.index_batches(
      0,
      student.batch_size,
      IMAGES,
      views=row["bank"] or None,
      partners=row["mode"] == "function_matching",
    )
    runner = net.runner
    now = {"state": runner.replicate(state), "step": 0}
    frozen = runner.replicate(frozen)

    def work() -> None:
      for _ in range(STEPS):
        batch = runner.shard(batches(now["step"]))
        now["state"], metrics = runner(now["state"], frozen, batch)
        now["step"] += 1
      jax.block_until_ready(metrics)

    return work

  banked = {**data, "teacher_logits": logits}
  return Benchmark(
    title="A cached bank of views: the time of a step",
    base="labels alone",
    forms={
      "labels alone": form(labels, {}, data),
      "a live teacher": form(matching, {"teacher": variables}, data),
      "a bank of views": form({**matching, "bank": VIEWS}, {}, banked),
    },
    claims=(
      (
        "a bank makes the step of function matching faster",
        "a bank of views",
        "a live teacher",
        "lower",
      ),
    ),
    data={
      "student and teacher": "configs/patient_consistent/cifar10.py",
      "batch size": student.batch_size,
      "images": IMAGES,
      "views": VIEWS,
      "bank": f"{logits.nbytes / 2**20:.2f} MiB",
    },
    source="Beyer et al. 2022, arXiv:2106.05237",
  )
