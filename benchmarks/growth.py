"""How cost grows: with the batch, the classes, the taps, the peers, ...

Each row is one program, a loss with its gradient or a whole step, at several
sizes of one thing. The sizes take turns, so that a busy moment of the machine
hits all of them. What is told is the exponent b in cost = a size^b: the slope
of log cost over log size, fitted to the larger half of the sizes, where what a
call costs anyway no longer counts. Beside it stand the exponents of the
program's temporary bytes and of its FLOPs, both as XLA counts them, and in
place of a paper's number the exponent that the algorithm has for large sizes.

Run: python -m benchmarks.growth --json results/benchmarks/growth.json
"""

from collections.abc import Callable, Sequence
import functools
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _common, run
from kd_jax import losses, memory, models, train
from kd_jax.reduce import Term

NOTES = (
  'Each "seed" is a block of {rounds} rounds in which the sizes take turns: '
  "the slope through their median times. One round that compiles is left out.",
  "XLA counts the body of a loop once, so there are no FLOPs of programs with "
  "loops.",
)

# A function and its arguments: at a size, what is measured.
Program = tuple[Callable[..., Any], tuple[Any, ...]]


class Axis(NamedTuple):
  """One thing that grows.

  Attributes:
    sizes: from small to large.
    expected: the exponent that the algorithm has for large sizes.
    make: the program at a size.
    note: what stays as it is.
  """

  sizes: Sequence[int]
  expected: float
  make: Callable[[int], Program]
  note: str


def exponent(
  sizes: Sequence[float], costs: Sequence[float | None]
) -> float | None:
  """The slope of log cost over log size, over the larger half of the sizes.

  Args:
    sizes: ascending, at least two.
    costs: as many; None where it is not known.

  Returns:
    The slope by least squares; None if a cost that counts is none or 0.

  Example:
    >>> exponent([1, 10, 20, 40], [7.0, 7.0, 28.0, 112.0])
    2.0
  """
  first = min(len(sizes) // 2, len(sizes) - 2)
  x, y = list(sizes[first:]), list(costs[first:])
  if not all(y):
    return None
  slope = np.polyfit(np.log(x), np.log(np.asarray(y, float)), 1)[0]
  return round(float(slope), 12)


def normal(*shapes: tuple[int, ...]) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def with_gradient(loss: Callable[..., jax.Array], *arrays: Any) -> Program:
  """The mean loss and its gradient for what comes first."""
  return jax.value_and_grad(lambda *x: loss(*x).mean()), arrays


def on_logits(loss: Callable[..., jax.Array], batch: int, n: int) -> Program:
  labels = [jnp.zeros(batch, jnp.int32)] if loss is losses.dkd else []
  return with_gradient(loss, *normal((batch, n), (batch, n)), *labels)


def on_embeddings(loss: Callable[..., jax.Array], batch: int) -> Program:
  return with_gradient(loss, *normal((batch, 64), (batch, 64)))


def on_taps(count: int) -> Program:
  """Attention transfer at so many layers."""
  shape = (16, 16, 16, 32)
  maps = normal(*[shape] * (2 * count))

  def loss(student: Any, teacher: Any) -> jax.Array:
    pairs = zip(student, teacher, strict=True)
    return sum(losses.attention_transfer(s, t) for s, t in pairs)

  return with_gradient(loss, maps[:count], maps[count:])


def on_heads(count: int) -> Program:
  """Every peer's loss towards all others."""

  def loss(heads: jax.Array) -> jax.Array:
    others = [jnp.delete(heads, i, axis=0) for i in range(count)]
    return sum(
      losses.mutual_kl(own, jax.lax.stop_gradient(other))
      for own, other in zip(heads, others, strict=True)
    )

  return with_gradient(loss, *normal((count, 64, 100)))


def on_vocabulary(size: int) -> Program:
  arrays = normal((64, 64), (64, size), (64, 128), (128, size))
  loss = functools.partial(
    losses.linear_divergence, divergence=losses.kl, chunk_size=16
  )
  return with_gradient(loss, *(x / x.shape[0] ** 0.5 for x in arrays))


def step(model: Any, loss_fn: Any, frozen: Any, batch: Any) -> Program:
  """A whole training step, with its optimiser."""
  start = model.init(jax.random.key(0), batch["image"][:1])
  optimizer = optax.adam(1e-3)
  state = train.init_state(
    {"model": start["params"]},
    optimizer,
    jax.random.key(1),
    model_state={"model": start["state"]},
  )
  return train.make_step(loss_fn, optimizer), (state, frozen, batch)


def distillation_step(size: int) -> Program:
  """Hinton's, with a live teacher."""
  teacher = models.create("mlp", 10, hidden=(600, 600))
  student = models.create("mlp", 10, hidden=(300, 300))
  batch = {"image": normal((size, 784))[0], "label": jnp.zeros(size, jnp.int32)}

  def loss_fn(
    params: Any, model_state: Any, frozen: Any, batch: Any, key: Any
  ) -> Any:
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = student.apply(variables, batch["image"], train=True, key=key)
    asked = jax.lax.stop_gradient(teacher.apply(frozen, batch["image"])[0])
    terms = {
      "hard": Term(losses.cross_entropy(out.logits, batch["label"])),
      "soft": Term(losses.kl(out.logits, asked.logits, temperature=4.0)),
    }
    return terms, train.Aux(model_state={"model": state})

  known = teacher.init(jax.random.key(2), batch["image"][:1])
  return step(student, loss_fn, known, batch)


def mutual_step(count: int) -> Program:
  """Mutual learning's, on digits."""
  from configs.mutual_learning import cifar10
  from experiments import mutual_learning

  size = 64
  names = [f"peer_{i}" for i in range(count)]
  network = models.create("mlp", 10, hidden=(300, 300))
  model = models.cohort(dict.fromkeys(names, network))
  row = cifar10.cohort("", names).to_dict()
  view = {"crop": "none", "size": 28, "padding": 0, "least_area": 1.0}
  view |= {"flip": False, "on_host": False}
  loss_fn = mutual_learning.make_loss(model, view, row)
  hparams = {key: row[key] for key in ("temperature", "soft_weight", "burn_in")}
  frozen = {"view_key": train.view_key(0), "hparams": hparams, "extra": None}
  batch = {
    "id": jnp.arange(size),
    "image": jnp.zeros((size, 28, 28, 1), jnp.uint8),
    "label": jnp.zeros(size, jnp.int32),
    "epoch": jnp.zeros(size, jnp.int32),
    "step": jnp.int32(0),
  }
  return step(model, loss_fn, frozen, batch)


CLASSES = (10, 100, 1000, 4000, 16000, 64000, 128000)
AXES: dict[str, Axis] = {
  "kl, batch": Axis(
    (32, 128, 512, 1024, 2048, 4096, 8192),
    1,
    lambda n: on_logits(losses.kl, n, 100),
    "100 classes",
  ),
  "distillation step, batch": Axis(
    (16, 32, 64, 128, 256, 512, 1024),
    1,
    distillation_step,
    "MLPs 784-600-600-10 and 784-300-300-10, Adam",
  ),
  **{
    f"{name}, classes": Axis(
      CLASSES,
      1,
      functools.partial(on_logits, getattr(losses, name), 8),
      "8 examples",
    )
    for name in ("kl", "dkd", "dist")
  },
  "linear_divergence, vocabulary": Axis(
    (256, 1024, 2048, 4096, 8192, 16384),
    1,
    on_vocabulary,
    "64 tokens, 16 at a time, hidden states of width 64 and 128",
  ),
  "attention_transfer, taps": Axis(
    (1, 2, 3, 4, 6, 8), 1, on_taps, "maps of 16 x 16 x 16 x 32"
  ),
  "mutual_kl of all peers, peers": Axis(
    (2, 4, 6, 8, 12, 16), 2, on_heads, "64 examples, 100 classes"
  ),
  "mutual learning step, peers": Axis(
    (2, 3, 4, 6, 8),
    1,
    mutual_step,
    "MLPs 784-300-300-10, batch 64; the peers' networks cost more than their "
    "divergences, which grow with the square",
  ),
  "rkd_distance, batch": Axis(
    (16, 32, 64, 128, 256, 512),
    2,
    functools.partial(on_embeddings, losses.rkd_distance),
    "width 64",
  ),
  "rkd_angle, batch": Axis(
    (16, 32, 64, 128, 192, 256),
    3,
    functools.partial(on_embeddings, losses.rkd_angle),
    "width 64",
  ),
  "similarity_preserving, batch": Axis(
    (32, 64, 128, 256, 512, 1024),
    2,
    functools.partial(on_embeddings, losses.similarity_preserving),
    "width 64",
  ),
}


def flops(program: Any) -> float | None:
  """As XLA counts them; None for a program with loops."""
  if " while(" in program.as_text():
    return None
  return (program.cost_analysis() or {}).get("flops")


def measure(name: str, axis: Axis, blocks: int, rounds: int) -> dict[str, Any]:
  """The row of a result file."""
  programs, forms = [], {}
  for size in axis.sizes:
    function, arguments = axis.make(size)
    program = jax.jit(function).lower(*arguments).compile()
    programs.append(program)
    forms[str(size)] = lambda program=program, arguments=arguments: (
      jax.block_until_ready(program(*arguments))
    )
  medians = run.take_turns(forms, blocks, rounds, time.process_time)
  seconds = [[medians[form][i] for form in forms] for i in range(blocks)]
  used = [p.memory_analysis().temp_size_in_bytes for p in programs]
  counted = [flops(program) for program in programs]
  half = axis.sizes[min(len(axis.sizes) // 2, len(axis.sizes) - 2)]
  return {
    "name": name,
    "paper": axis.expected,
    "values": [exponent(axis.sizes, taken) for taken in seconds],
    "details": {
      "exponent of temporary bytes": [exponent(axis.sizes, used)] * blocks,
      "exponent of FLOPs": [exponent(axis.sizes, counted)] * blocks,
      "milliseconds at the largest": [1e3 * taken[-1] for taken in seconds],
      "temporary bytes at the largest": [used[-1]] * blocks,
    },
    "note": f"sizes {half:,} to {axis.sizes[-1]:,}; {axis.note}",
  }


def result(
  rows: Sequence[dict[str, Any]], blocks: int, rounds: int, seconds: float
) -> dict[str, Any]:
  """The result file's content, see `kd_jax.result_file`."""
  return _common.result(
    title="How cost grows",
    command=f"{_common.settings()}python -m benchmarks.growth "
    f"--blocks {blocks} --rounds {rounds}",
    config={"blocks": blocks, "rounds": rounds},
    seeds=list(range(blocks)),
    data={name: list(axis.sizes) for name, axis in AXES.items()},
    metric={
      "name": "exponent of processor time",
      "unit": "",
      "better": "lower",
    },
    rows=list(rows),
    wall_seconds=seconds,
    notes=[note.format(rounds=rounds) for note in NOTES],
  )


def main() -> None:
  parser = _common.parser(__doc__, blocks=5, rounds=3)
  options = parser.parse_args()
  memory.keep()
  begin = time.time()
  rows = []
  for name, axis in AXES.items():
    print(name, file=sys.stderr, flush=True)
    rows.append(measure(name, axis, options.blocks, options.rounds))
  seconds = time.time() - begin
  found = result(rows, options.blocks, options.rounds, seconds)
  _common.show(found, options.json)


if __name__ == "__main__":
  main()
