"""Prints what a cached bank of views saves in the time of a step.

The student of a config of patient and consistent teaching, with a teacher of
the same config, on made-up images: one step on labels alone, one of function
matching that asks the teacher, one of function matching that reads a bank. The
forms take turns, so that a busy moment of the machine hits all of them.

Run: python -m benchmarks.view_bank
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np

from configs.patient_consistent import cifar10
from experiments import patient_consistent
from kd_jax import train


def images_of(n: int, side: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    "id": np.arange(n, dtype=np.int32),
    "image": rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
    "label": rng.integers(0, 10, n).astype(np.int32),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--views", type=int, default=16)
  parser.add_argument("--images", type=int, default=1000)
  parser.add_argument("--rounds", type=int, default=20)
  parser.add_argument("--steps", type=int, default=10, help="in each round")
  options = parser.parse_args()

  config = cifar10.get_config("modes+bank")
  student, side = config.networks.student, config.view.size
  data = images_of(options.images, side)
  first = data["image"][:1]
  bare = functools.partial(patient_consistent.network, config, num_classes=10)
  labels = config.students.labels_30.to_dict()
  matching = config.students.function_matching_30.to_dict()
  teacher = bare(config.teachers.teacher, labels, 1)
  variables = teacher.model.init(
    jax.random.key(0), patient_consistent.whole(first)
  )
  logits = np.random.default_rng(1).normal(
    size=(options.images, options.views, 10)
  )
  forms = {
    "labels alone": (labels, {}, data),
    "live teacher": (matching, {"teacher": variables}, data),
    "bank": (
      {**matching, "bank": options.views},
      {},
      {**data, "teacher_logits": logits.astype(np.float32)},
    ),
  }
  runs = {}
  for name, (row, frozen, columns) in forms.items():
    net = bare(student, row, 1000, teacher=teacher.model)
    start = net.model.init(jax.random.key(1), patient_consistent.whole(first))
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
      options.images,
      views=row["bank"] or None,
      partners=row["mode"] == "function_matching",
    )
    both = net.runner.replicate(state), net.runner.replicate(frozen)
    runs[name] = [net.runner, *both, batches, 0]

  def seconds(run: list) -> float:
    runner, state, frozen, batches, step = run
    begin = time.perf_counter()
    for _ in range(options.steps):
      state, metrics = runner(state, frozen, runner.shard(batches(step)))
      step += 1
    jax.block_until_ready(metrics)
    run[1], run[4] = state, step
    return (time.perf_counter() - begin) / options.steps

  times: dict[str, list[float]] = {name: [] for name in runs}
  for round_number in range(options.rounds + 1):
    for name, run in runs.items():
      taken = seconds(run)
      if round_number:  # the first one compiles
        times[name].append(taken)
  base = statistics.median(times["labels alone"])
  size = logits.astype(np.float32).nbytes / 2**20
  print(
    f"batches of {student.batch_size} on {jax.devices()[0].device_kind}; the "
    f"bank of {options.views} views of {options.images} images has "
    f"{size:.1f} MiB"
  )
  print(f"{'':14} {'a step':>10} {'quartiles':>18} {'of labels alone':>16}")
  for name, taken in times.items():
    low, middle, high = statistics.quantiles(taken, n=4)
    print(
      f"{name:14} {1e3 * middle:7.2f} ms {1e3 * low:7.2f} to {1e3 * high:.2f} "
      f"{middle / base:14.2f}"
    )


if __name__ == "__main__":
  main()
