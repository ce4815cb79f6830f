"""Times several forms of one thing in turns, and keeps what was measured.

A benchmark is a module of this folder with a function `benchmark`, which
returns a `Benchmark`. Its forms take turns, round for round, so that a busy
moment of the machine hits all of them. The rounds are cut into blocks; in each
the median time of a form is divided by that of the base form, and these ratios
are what a result file holds: one for each block, in place of seeds.

Run: python -m benchmarks.run view_bank --json results/benchmarks/view_bank.json
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib
import statistics
import sys
import time
from typing import Any

from benchmarks import _common
from kd_jax import memory
from kd_jax.errors import BadInput

# name -> (module, arguments of its `benchmark`)
NAMES: dict[str, tuple[str, ...]] = {
  "view_bank": ("view_bank",),
  "floor_mlp": ("step_floor", "mlp"),
  "floor_conv": ("step_floor", "conv"),
  "floor_resnet": ("step_floor", "resnet"),
  "floor_vit": ("step_floor", "vit"),
  "floor_lm": ("step_floor", "lm"),
  "floor_mutual": ("other_floors", "mutual"),
  "floor_taps": ("other_floors", "taps"),
  "teacher_wide_resnet": ("teacher_forms", "wide_resnet"),
  "teacher_mobilenet_v3": ("teacher_forms", "mobilenet_v3"),
  "sweep_tiny": ("sweep", "tiny"),
  "sweep_small": ("sweep", "small"),
  "sweep_mlp": ("sweep", "mlp"),
  "loop_small": ("loop", "small"),
  "loop": ("loop", "large"),
  "cache": ("cache",),
  "rkd_angle": ("relations",),
  "rkd_angle_4096": ("relations", "4096"),
  "peers_mlp": ("peers", "mlp"),
  "peers_conv": ("peers", "conv"),
  "peers_resnet": ("peers", "resnet"),
  "peers_vit": ("peers", "vit"),
  "peers_lm": ("peers_lm",),
  "peers_sweep_tiny": ("sweep", "tiny", "PyTorch"),
  "peers_sweep_small": ("sweep", "small", "PyTorch"),
  "peers_sweep_mlp": ("sweep", "mlp", "PyTorch"),
  "linear_kl": ("linear_divergence", "kl"),
  "linear_reverse_kl": ("linear_divergence", "reverse_kl"),
  "linear_jsd": ("linear_divergence", "jsd"),
  "linear_kl_128k": ("linear_divergence", "kl", "128k"),
  "linear_reverse_kl_128k": ("linear_divergence", "reverse_kl", "128k"),
  "linear_jsd_128k": ("linear_divergence", "jsd", "128k_2048"),
}
NOTE = (
  'Each "seed" is a block of {rounds} rounds in which the forms take turns: '
  "the ratio of their median times. One round that compiles is left out."
)


@dataclasses.dataclass
class Benchmark:
  """What is compared.

  Attributes:
    title: for people.
    base: the form that the others are divided by.
    forms: name -> a function that does the work once and waits for its end.
    claims: (claim, form a, form b, "lower" or "higher"), stated beforehand.
    data: what was worked on, shown as it is.
    bytes: form -> temporary memory that its program asks for, where known.
    source: where the claim comes from.
    notes: for the reader.
    clock: gives seconds; `time.process_time` those of the processor alone.
    environment: what has to be set when Python starts.
  """

  title: str
  base: str
  forms: Mapping[str, Callable[[], Any]]
  claims: Sequence[tuple[str, str, str, str]] = ()
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  source: str = "kd_jax"
  notes: Sequence[str] = ()
  clock: Callable[[], float] = time.perf_counter
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def take_turns(
  forms: Mapping[str, Callable[[], Any]],
  blocks: int,
  rounds: int,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """The median seconds of each form in each block."""
  for work in forms.values():
    work()
  medians: dict[str, list[float]] = {name: [] for name in forms}
  for block in range(blocks):
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
      for name, work in forms.items():
        begin = clock()
        work()
        seconds[name].append(clock() - begin)
    for name, taken in seconds.items():
      medians[name].append(statistics.median(taken))
    print(f"block {block + 1}/{blocks}", file=sys.stderr, flush=True)
  return medians


def result(
  name: str,
  bench: Benchmark,
  medians: Mapping[str, Sequence[float]],
  rounds: int,
  wall_seconds: float,
) -> dict[str, Any]:
  """The result file's content, see `kd_jax.result_file`."""
  from kd_jax import comparison

  base = medians[bench.base]
  ratios = {
    form: [t / b for t, b in zip(taken, base, strict=True)]
    for form, taken in medians.items()
  }

  def sizes(form: str, times: int) -> dict[str, list[float]]:
    if form not in bench.bytes:
      return {}
    return {"temporary MiB": [bench.bytes[form] / 2**20] * times}

  how = {time.process_time: "processor "}.get(bench.clock, "")
  metric = {"name": f"{how}time", "unit": f"in that of: {bench.base}"}
  settings = _common.settings(bench.environment)

  return _common.result(
    title=bench.title,
    command=f"{settings}python -m benchmarks.run {name}"
    + f" --blocks {len(base)} --rounds {rounds}"
    + " --processor" * bool(how),
    source=bench.source,
    config={"blocks": len(base), "rounds": rounds},
    data=dict(bench.data),
    seeds=list(range(len(base))),
    metric={**metric, "better": "lower"},
    rows=[
      {
        "name": form,
        "values": ratios[form],
        "details": {
          "milliseconds": [1e3 * t for t in taken],
          **sizes(form, len(taken)),
        },
      }
      for form, taken in medians.items()
    ],
    comparisons=[
      comparison.compare(claim, ratios[a], ratios[b], expected, a=a, b=b)
      for claim, a, b, expected in bench.claims
    ],
    wall_seconds=wall_seconds,
    notes=[NOTE.format(rounds=rounds), *bench.notes],
  )


def main() -> None:
  parser = _common.parser(__doc__, blocks=5, rounds=9)
  parser.add_argument(
    "names",
    nargs="*",
    metavar="NAME",
    help=f"{', '.join(NAMES)}; all but peers_, _128k, _4096 by default",
  )
  parser.add_argument(
    "--processor",
    action="store_true",
    help="processor time of all threads: where others use the same CPU",
  )
  options = parser.parse_args()
  unknown = sorted(set(options.names) - set(NAMES))
  if unknown:
    parser.error(f"no benchmark {unknown[0]!r}: there are {', '.join(NAMES)}")
  # Peers need what is not installed and a setting that changes the others;
  # the largest vocabulary and batch need memory and patience.
  names = options.names or [
    name
    for name in NAMES
    if not name.startswith("peers_") and not name.endswith(("_128k", "_4096"))
  ]
  if options.json and len(names) > 1:
    parser.error("--json keeps one result: give one NAME")

  memory.keep()  # for every form, PyTorch's as well
  for name in names:
    begin = time.time()
    module, *args = NAMES[name]
    try:
      bench = importlib.import_module(f"benchmarks.{module}").benchmark(*args)
    except BadInput as error:
      parser.error(str(error))
    if options.processor:
      bench = dataclasses.replace(bench, clock=time.process_time)
    medians = take_turns(
      bench.forms, options.blocks, options.rounds, bench.clock
    )
    found = result(name, bench, medians, options.rounds, time.time() - begin)
    _common.show(found, options.json)
    for form, count in bench.bytes.items():
      print(f"{form}: {count / 2**20:,.0f} MiB of temporary memory")


if __name__ == "__main__":
  main()
