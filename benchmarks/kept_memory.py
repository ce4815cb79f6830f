"""What `kd_jax.memory.keep` saves: a step with and without it.

Each form runs in two processes, one of which keeps its freed memory. They take
turns; what is told is the ratio of their times, how much of these the processor
had, and how many pages the system had to clear for one step of either. A
training with the smallest steps is there for what it may cost: nothing of it
needs much memory, and Python no longer works beside its steps.

Run: NPROC=1 python -m benchmarks.kept_memory --json FILE
     python -m benchmarks.kept_memory --json FILE
"""

from collections.abc import Callable
import multiprocessing
import os
import resource
import statistics
import time
from typing import Any

from benchmarks import _common

PAIRS = ("mlp", "conv", "vit", "lm")
DIVERGENCE, ROWS, CLASSES = "kl and its gradient", 512, 8192
TRAINING, STEPS = "train.fit with small steps", 300


def divergence() -> Callable[[], Any]:
  import jax

  from kd_jax import losses

  student, teacher = jax.random.normal(jax.random.key(0), (2, ROWS, CLASSES))
  total = lambda s, t: losses.kl(s, t).sum()
  run = jax.jit(jax.value_and_grad(total))
  return lambda: jax.block_until_ready(run(student, teacher))


def step(name: str) -> Callable[[], Any]:
  from benchmarks import step_floor

  return step_floor.benchmark(name).forms["a distillation step"]


def training() -> Callable[[], Any]:
  from benchmarks import loop

  *pair, _ = loop.SIZES["small"]
  return loop.forms(*pair, STEPS)["train.fit"]


def serve(pipe: Any, name: str, keep: bool) -> None:
  """Tells, when asked, a round's seconds, processor seconds, page faults."""
  from kd_jax import memory

  if keep and not memory.keep():
    raise RuntimeError("memory cannot be kept here: see kd_jax.memory.keep")
  others = {DIVERGENCE: divergence, TRAINING: training}
  work = others[name]() if name in others else step(name)
  for _ in range(3):
    work()
  while pipe.recv():
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    begin, used = time.perf_counter(), time.process_time()
    work()
    seconds = time.perf_counter() - begin, time.process_time() - used
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pipe.send((*seconds, found - faults))


def measure(name: str, blocks: int, rounds: int) -> dict[str, list[float]]:
  """Ratios of times, milliseconds and pages of each block."""
  context = multiprocessing.get_context("spawn")
  asked = {}
  for keep in (False, True):
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, name, keep))
    process.start()
    theirs.close()  # so that a process that fails is noticed
    asked[keep] = ours
  found: dict[str, list[float]] = {}
  for _ in range(blocks):
    taken: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
    for _ in range(rounds):
      for keep, pipe in asked.items():
        pipe.send(True)
        taken[keep].append(pipe.recv())
    medians = {
      how: list(map(statistics.median, zip(*taken[keep], strict=True)))
      for keep, how in ((False, "given back"), (True, "kept"))
    }
    kept, given = medians["kept"], medians["given back"]
    values = {
      "ratio": kept[0] / given[0],
      "ratio of processor times": kept[1] / given[1],
    }
    for how, (seconds, _, pages) in medians.items():
      values |= {f"{how}, milliseconds": 1e3 * seconds, f"{how}, pages": pages}
    for key, value in values.items():
      found.setdefault(key, []).append(value)
  for pipe in asked.values():
    pipe.send(False)
  return found


def main() -> None:
  parser = _common.parser(__doc__, blocks=5, rounds=9)
  options = parser.parse_args()
  begin = time.time()
  threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
  rows = []
  for name in (*PAIRS, DIVERGENCE, TRAINING):
    found = measure(name, options.blocks, options.rounds)
    title = f"a distillation step: {name}" if name in PAIRS else name
    rows.append({"name": title, "values": found.pop("ratio"), "details": found})
  _common.show(
    _common.result(
      title=f"Memory that is kept for the next step, {threads} threads"
      if threads > 1
      else "Memory that is kept for the next step",
      command=f"{_common.settings()}python -m benchmarks.kept_memory "
      f"--blocks {options.blocks} --rounds {options.rounds}",
      data={
        "pairs": "those of the floors",
        DIVERGENCE: f"{ROWS} examples of {CLASSES:,} classes",
        TRAINING: f"{STEPS} steps of the MLP of loop_small",
        "threads": threads,
      },
      seeds=list(range(options.blocks)),
      metric={
        "name": "time",
        "unit": "in that without memory.keep",
        "better": "lower",
      },
      rows=rows,
      wall_seconds=time.time() - begin,
      notes=[
        f'Each "seed" is a block of {options.rounds} rounds in which the two '
        "processes take turns: the ratio of their median times."
      ],
    ),
    options.json,
  )


if __name__ == "__main__":
  main()
