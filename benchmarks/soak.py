"""Kills, signals and damage, over and over: what a run loses.

A small born-again experiment is started again and again with the same command
and does not get far: SIGKILL after a random time, SIGKILL at a random file
operation below its directory, SIGTERM after a random time, a file system that
is full; in between a bit of its newest checkpoint is flipped or the file cut.
When it has ended at last, its checkpoints, metrics and result are compared with
those of a run that was left alone, to the bit. Then the next one begins. Ctrl-C
ends it with what it has counted by then.

Run: python -m benchmarks.soak --kills 1000 --json results/benchmarks/soak.json
"""

import collections
from collections.abc import Sequence
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import Any

from absl import logging

from benchmarks import _common

KINDS = ("time", "file", "term", "full")
FULL = 27  # what a life says that met a full file system
# Python's audit events of what a run does to its files.
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
PRELOAD = ["experiments.born_again", "configs.born_again.cifar10"]


def config() -> Any:
  """Two generations of tiny networks, a save in every few steps."""
  from configs.born_again import cifar10

  c = cifar10.get_config("generations+smoke")
  c.rows = ("generation_0", "generation_1")
  c.ensembles = {}
  c.sharpness.images = 0
  for row in c.students.values():
    row.epochs = 8.0
  c.save_every, c.eval_every, c.log_every = "3 steps", "5 steps", "1 steps"
  c.devices = 1
  return c


def life(workdir: str, kind: str, seed: int) -> None:
  """Runs the experiment in this process, which dies on the way."""
  draw = random.Random(seed)
  me = os.getpid()
  # A file could not be written on a full file system.
  name = os.devnull if kind == "full" else f"{workdir}.said"
  sys.stdout = sys.stderr = open(name, "w")  # noqa: SIM115
  logging.set_verbosity(logging.FATAL)  # as the command does
  if kind in ("time", "term"):
    number = signal.SIGKILL if kind == "time" else signal.SIGTERM
    after = draw.uniform(0.0, 2.5)
    timer = threading.Timer(after, os.kill, (me, number))
    timer.daemon = True
    timer.start()
  if kind == "file":
    left = [draw.randrange(1, 250)]

    def count(event: str, args: tuple[Any, ...]) -> None:
      if event in EVENTS and args and str(args[0]).startswith(workdir):
        left[0] -= 1
        if left[0] == 0:
          os.kill(me, signal.SIGKILL)

    sys.addaudithook(count)
  if kind == "full":  # no file can grow beyond this: the system's own EFBIG
    most = int(10 ** draw.uniform(2.0, 4.3))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
  from experiments import born_again
  from kd_jax import errors

  try:
    born_again.run(config(), workdir)
  except (OSError, errors.CheckpointError):
    if kind != "full":
      raise
    sys.exit(FULL)


def damage(workdir: pathlib.Path, draw: random.Random) -> bool:
  """Flips a bit or cuts a file of a newest checkpoint that has an older."""
  stages = [
    sorted(
      (p for p in folder.iterdir() if p.name.isdecimal()),
      key=lambda p: int(p.name),
    )
    for folder in sorted(workdir.rglob("checkpoints"))
  ]
  stages = [steps for steps in stages if len(steps) > 1]
  if not stages:
    return False
  newest = draw.choice(stages)[-1]
  files = [p for p in sorted((newest / "state").rglob("*")) if p.is_file()]
  files = [p for p in files if p.stat().st_size]
  if not files:
    return False
  path = draw.choice(files)
  data = bytearray(path.read_bytes())
  if draw.random() < 0.5:
    data = data[: draw.randrange(len(data))]
  else:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
  path.write_bytes(data)
  return True


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """What must be the same in the end: weights, metrics, scores."""
  import numpy as np
  import orbax.checkpoint as ocp

  from kd_jax import errors, teachers
  from kd_jax.train.checkpoints import read_leaves
  from kd_jax.train.workdir import read_metrics

  found: dict[str, Any] = {}
  for folder in sorted(workdir.rglob("checkpoints")):
    name = str(folder.parent.relative_to(workdir))
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]
    found[f"{name} newest checkpoint"] = max(steps)
    try:
      with ocp.CheckpointManager(folder) as manager:
        stored = read_leaves(manager, max(steps))
    except errors.CheckpointError as error:
      stored = {(f"(not read: {error})",): np.zeros(0)}
    for key, leaf in stored.items():
      found[f"{name} {'/'.join(key)}"] = teachers.digest(leaf)
    found[f"{name} metrics"] = read_metrics(folder.parent / "metrics.jsonl")
  result = json.loads((workdir / "result.json").read_text())
  for row in result["rows"]:
    found[row["name"]] = [row["values"], row["details"]]
  return found


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
  """The names under which two outcomes are not the same."""
  return [
    name for name in {**wanted, **found} if wanted.get(name) != found.get(name)
  ]


def soak(
  kills: int,
  seed: int = 0,
  say: Any = lambda line: None,
  kinds: Sequence[str] = KINDS,
) -> tuple[collections.Counter[str], list[str]]:
  """Runs until so many lives were cut short.

  Args:
    kills: how many.
    seed: of the times, the places and the damage.
    say: called with a line for people after each run.
    kinds: of `KINDS`, drawn with the same chance; one named twice with twice.

  Returns:
    (counts of what was done, what differed from the run left alone).
  """
  draw = random.Random(seed)
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(PRELOAD)
  counts: collections.Counter[str] = collections.Counter()
  faults: list[str] = []

  def live(workdir: pathlib.Path, kind: str) -> int:
    number = draw.randrange(2**31)
    process = context.Process(target=life, args=(str(workdir), kind, number))
    process.start()
    process.join(300)
    if process.exitcode is None:
      process.kill()
      process.join()
      faults.append(f"a life of kind {kind}, number {number}, did not end")
    return process.exitcode or 0

  with (
    tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    contextlib.suppress(KeyboardInterrupt),  # what was counted is the result
  ):
    root = pathlib.Path(folder)
    # Else a life is over before it has compiled anything.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    assert live(root / "alone", "none") == 0, "the run left alone has failed"
    wanted = outcome(root / "alone")
    while sum(counts[kind] for kind in KINDS) < kills:
      workdir = root / "run"
      code = -1
      while code != 0:
        kind = draw.choice(kinds)
        if sum(counts[k] for k in KINDS) >= kills:
          kind = "none"  # let it end
        code = live(workdir, kind)
        if code in (-signal.SIGKILL, -signal.SIGTERM, 143, FULL):
          counts[kind] += 1
        elif code != 0:
          said = pathlib.Path(f"{workdir}.said")
          faults.append(
            f"a life of kind {kind} ended with exit code {code}"
            + (kind != "full") * f": {said.read_text()[-2000:]}"
          )
          break
        # A finished run reads no checkpoint any more, so it cannot mend one.
        going_on = code and not (workdir / "result.json").exists()
        if going_on and workdir.exists() and draw.random() < 0.2:
          counts["damage"] += damage(workdir, draw)
      if code == 0:
        counts["runs"] += 1
        faults += [
          f"run {counts['runs']}: {name} differs"
          for name in differences(wanted, outcome(workdir))
        ]
      shutil.rmtree(workdir)
      say(f"{dict(counts)}, {len(faults)} faults")
  return counts, faults


def result(
  kills: int,
  seed: int,
  counts: collections.Counter[str],
  faults: list[str],
  seconds: float,
) -> dict[str, Any]:
  """The result file's content, see `kd_jax.result_file`."""
  titles = {
    "runs": "runs that ended",
    "time": "SIGKILL after a random time",
    "file": "SIGKILL at a random file operation",
    "term": "SIGTERM after a random time",
    "full": "a full file system",
    "damage": "newest checkpoint damaged",
  }
  rows = [
    {"name": title, "values": [counts[kind]]} for kind, title in titles.items()
  ]
  rows.append(
    {"name": "differences from a run left alone", "values": [len(faults)]}
  )
  return _common.result(
    title="Soak: kills, signals and damage",
    command=f"python -m benchmarks.soak --kills {kills} --seed {seed}",
    data={"experiment": "born_again, two generations on mnist5k"},
    metric={"name": "count", "unit": "times", "better": "lower"},
    rows=rows,
    wall_seconds=seconds,
    notes=faults[:20],
  )


def main() -> None:
  parser = _common.parser(__doc__, kills=100)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  # A shell that starts it in the background would have it ignore that.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  begin = time.time()
  show = lambda line: print(line, file=sys.stderr, flush=True)
  asked = options.kills, options.seed
  counts, faults = soak(*asked, show)
  found = result(*asked, counts, faults, time.time() - begin)
  _common.show(found, options.json)
  print(*faults, sep="\n")
  sys.exit(1 if faults else 0)


if __name__ == "__main__":
  main()
