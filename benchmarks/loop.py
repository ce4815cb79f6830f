"""What the training loop adds to its compiled step.

The step alone is called with one batch that is on the device already, and
nobody waits for its metrics. `train.fit` makes the batches, fetches and logs
the metrics of every tenth step, shows progress, and saves once, at the end.

Run: python -m benchmarks.run loop_small loop
"""

from collections.abc import Callable
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import _common
from benchmarks.run import Benchmark
from kd_jax import train

# name -> (teacher's hidden layers, student's, steps in a round)
SIZES: dict[str, Any] = {
  "small": ((300, 300), (100, 100), 2000),
  "large": ((1200, 1200), (800, 800), 300),
}

BASE = "the compiled step alone"


def copied(state: Any) -> Any:
  """A state that can be donated."""
  return jax.tree.map(lambda x: x.copy(), state)


def forms(
  teacher: tuple[int, ...], student: tuple[int, ...], steps: int
) -> dict[str, Callable[[], Any]]:
  """So many steps of this pair, with the loop and without."""

  def alone(per_call: int) -> Callable[[], Any]:
    run = _common.mlp_pair(teacher, student, per_call)
    frozen, rows = run.runner.replicate(run.frozen), run.batches(0)
    if per_call > 1:
      rows = {k: np.stack([v] * per_call) for k, v in rows.items()}
    batch = run.runner.shard(rows)

    def work() -> None:
      state = run.runner.replicate(copied(run.state))
      for _ in range(steps // per_call):
        state, _ = run.runner(state, frozen, batch)
      jax.block_until_ready(state.params)

    return work

  def whole(per_call: int) -> Callable[[], Any]:
    run = _common.mlp_pair(teacher, student, per_call)

    def work() -> None:
      with tempfile.TemporaryDirectory() as folder:
        train.fit(
          *run._replace(state=copied(run.state)),
          num_steps=steps,
          workdir=pathlib.Path(folder) / "run",
          log_every="10 steps",
          progress=False,
        )

    return work

  return {
    BASE: alone(1),
    "train.fit": whole(1),
    "ten steps a call, alone": alone(10),
    "train.fit, ten steps a call": whole(10),
  }


def benchmark(size: str) -> Benchmark:
  teacher, student, steps = SIZES[size]
  return Benchmark(
    title=f"What the loop adds: {size} MLP",
    base=BASE,
    forms=forms(teacher, student, steps),
    data={
      "teacher": "-".join(map(str, teacher)),
      "student": "-".join(map(str, student)),
      "steps in a round": steps,
    },
  )
