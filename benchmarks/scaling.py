"""What more devices cost: CPU-seconds of a step of one global batch on 1 to 8.

The devices are simulated: they share the cores of this machine, so a step
takes the more CPU-seconds the more is done twice or sent. With perfect scaling
the number stays that of one device. What grows is the optimiser's update,
which each device makes for itself, the all-reduce, and the dispatch. The
CPU-seconds are those of all threads of the process, so they do not depend on
how many cores there are. Beside them stand the compiler's count of floating
point operations on each device and the bytes that one sends.

Each count of devices is a process of its own, as it cannot change in one.

Run: python -m benchmarks.scaling --json results/benchmarks/scaling.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import _common

TEACHER, STUDENT, BATCH = (800, 800), (300, 300), 1024
HOWS, COUNTS = ("jit", "pmap"), (1, 2, 4, 8)


def measure(how: str, blocks: int, steps: int) -> dict[str, Any]:
  """CPU-seconds a step, by block, and counts, on this process's devices."""
  import jax

  from kd_jax import train

  run = _common.mlp_pair(TEACHER, STUDENT, how=how, batch_size=BATCH)
  runner = run.runner
  state, frozen = runner.replicate(run.state), runner.replicate(run.frozen)
  compiled = runner.lower(state, frozen, runner.shard(run.batches(0))).compile()
  cost = compiled.cost_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  sent = train.collectives(compiled.as_text())
  seconds = []
  for block in range(blocks + 1):  # the first compiles
    begin = time.process_time()
    for i in range(steps):
      batch = runner.shard(run.batches(block * steps + i))
      state, metrics = runner(state, frozen, batch)
    jax.block_until_ready((state, metrics))
    seconds.append((time.process_time() - begin) / steps)
  return {
    "seconds": seconds[1:],
    "flops": cost["flops"],
    "exchanges": len(sent),
    "bytes": sum(found.bytes for found in sent),
  }


def in_process(how: str, count: int, blocks: int, steps: int) -> dict[str, Any]:
  """`measure` in a fresh process with `count` simulated devices."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "NPROC": "16",  # threads: a collective waits for all devices at once
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={count} "
    "--xla_cpu_multi_thread_eigen=false",
  }
  command = [
    *(sys.executable, "-m", "benchmarks.scaling", "--one", how),
    *("--blocks", str(blocks), "--steps", str(steps)),
  ]
  done = subprocess.run(
    command, env=environment, stdout=subprocess.PIPE, text=True, check=True
  )
  return json.loads(done.stdout.splitlines()[-1])


def result(
  found: dict[tuple[str, int], dict[str, Any]], seconds: float
) -> dict[str, Any]:
  """The result file's content, see `kd_jax.result_file`."""
  base = {how: found[how, COUNTS[0]] for how in HOWS}
  one = {how: statistics.median(base[how]["seconds"]) for how in HOWS}
  blocks = len(base["jit"]["seconds"])
  rows = [
    {
      "name": f"{how}, {count} device{'s'[: count > 1]}",
      "values": [s / one[how] for s in row["seconds"]],
      "details": {
        "CPU milliseconds": [1e3 * s for s in row["seconds"]],
        "FLOPs on each device, of those on one": [
          row["flops"] / base[how]["flops"]
        ]
        * blocks,
        "all-reduces": [row["exchanges"]] * blocks,
        "bytes sent": [row["bytes"]] * blocks,
      },
    }
    for (how, count), row in found.items()
  ]
  return _common.result(
    title="One global batch on 1 to 8 simulated devices",
    command="python -m benchmarks.scaling",
    data={
      "teacher": f"MLP {TEACHER}",
      "student": f"MLP {STUDENT}",
      "batch size": BATCH,
    },
    seeds=list(range(blocks)),
    metric={
      "name": "CPU-seconds of a step",
      "unit": "in those of one device",
      "better": "lower",
    },
    rows=rows,
    wall_seconds=seconds,
    notes=[
      'Each "seed" is a block of steps. Simulated devices share the cores of '
      "one machine, so 1 would be perfect scaling; this is no measurement of "
      "an accelerator or a network."
    ],
  )


def main() -> None:
  parser = _common.parser(__doc__, blocks=5, steps=8)
  parser.add_argument("--one", choices=HOWS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.one:
    from kd_jax import memory

    memory.keep()  # as the commands do
    print(json.dumps(measure(options.one, options.blocks, options.steps)))
    return
  begin = time.time()
  found = {}
  for how in HOWS:
    for count in COUNTS:
      found[how, count] = in_process(how, count, options.blocks, options.steps)
      print(f"{how}, {count} devices", file=sys.stderr, flush=True)
  _common.show(result(found, time.time() - begin), options.json)


if __name__ == "__main__":
  main()
