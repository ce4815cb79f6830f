"""What a distillation step costs over the work that it cannot do without.

That work is the teacher's inference and a supervised step of the student, each
compiled alone and called one after the other on the same batch. Four forms take
turns for each pair of networks: the two parts together, each of them alone, and
the distillation step. All of them are kd_jax's own step; that it is no slower
than a plain `jit` of the same loss is the form "by hand".

Run: python -m benchmarks.run floor_mlp floor_conv floor_vit floor_lm
     python -m benchmarks.run floor_resnet
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.run import Benchmark
from kd_jax import losses, models, train
from kd_jax.reduce import Term

CLASSES, TEMPERATURE = 10, 4.0

# A network: as `models.create` takes it, and its attributes.
Network = tuple[str, Mapping[str, Any]]


class Pair(NamedTuple):
  """Two networks and what they are given.

  Attributes:
    shape: of an input.
    size: examples in a batch.
    steps: in a round.
    teacher: the larger one.
    student: the smaller one.
    words: size of the vocabulary; 0 of a pair that classifies float inputs.
  """

  shape: tuple[int, ...]
  size: int
  steps: int
  teacher: Network
  student: Network
  words: int = 0

  @property
  def classes(self) -> int:
    return self.words or CLASSES


PAIRS = {
  "mlp": Pair(
    *((784,), 128, 5),
    ("mlp", {"hidden": (1200, 1200)}),
    ("mlp", {"hidden": (800, 800)}),
  ),
  "conv": Pair(
    *((32, 32, 3), 32, 1),
    ("wide_resnet", {"depth": 22, "width": 1}),
    ("wide_resnet", {"depth": 10, "width": 1}),
  ),
  # ResNet-56 and ResNet-20 in their pre-activation form.
  "resnet": Pair(
    *((32, 32, 3), 32, 1),
    ("wide_resnet", {"depth": 58, "width": 1}),
    ("wide_resnet", {"depth": 22, "width": 1}),
  ),
  "vit": Pair(
    *((32, 32, 3), 32, 1),
    ("vit", {"patch_size": 4, "width": 192, "depth": 6, "heads": 3}),
    ("vit", {"patch_size": 4, "width": 96, "depth": 6, "heads": 3}),
  ),
  "lm": Pair(
    *((128,), 4, 1),
    ("gpt", {"width": 256, "depth": 4, "heads": 4, "max_length": 128}),
    ("gpt", {"width": 128, "depth": 4, "heads": 2, "max_length": 128}),
    words=8192,
  ),
}


def a_batch(pair: Pair, seed: int = 0) -> dict[str, np.ndarray]:
  """Random inputs and labels; of words, a label for each."""
  rng = np.random.default_rng(seed)
  shape = (pair.size, *pair.shape)
  if pair.words:
    inputs = rng.integers(0, pair.words, shape).astype(np.int32)
  else:
    inputs = rng.normal(size=shape).astype(np.float32)
  labels = rng.integers(0, pair.classes, shape if pair.words else pair.size)
  return {"input": inputs, "label": labels.astype(np.int32)}


def stepping(
  start: Any, optimizer: Any, batch: Any, step: Callable[..., Any], frozen: Any
) -> Callable[[], Any]:
  """A function that makes one more step on each call; waits for nothing."""
  run = jax.jit(step, donate_argnums=0)
  # Copies: the step gives away what it is given.
  params, kept = jax.tree.map(jnp.array, (start["params"], start["state"]))
  state = train.init_state(
    {"model": params},
    optimizer,
    jax.random.key(2),
    model_state={"model": kept},
  )

  def work() -> Any:
    nonlocal state
    state, _ = run(state, frozen, batch)
    return state.step

  return work


def in_turn(steps: int, *parts: Callable[[], Any]) -> Callable[[], Any]:
  """A round: some times each of the parts, then a wait."""

  def work() -> None:
    for _ in range(steps):
      found = [part() for part in parts]
    jax.block_until_ready(found)

  return work


def describe(pair: Pair) -> dict[str, Any]:
  """For a result file."""
  found = {
    "teacher": f"{pair.teacher[0]} {pair.teacher[1]}",
    "student": f"{pair.student[0]} {pair.student[1]}",
    "batch size": pair.size,
    "steps in a round": pair.steps,
  }
  if pair.words:
    found |= {"words in an example": pair.shape[0], "vocabulary": pair.words}
  return found


def benchmark(name: str) -> Benchmark:
  pair = PAIRS[name]
  batch = jax.tree.map(jnp.asarray, a_batch(pair))
  teacher, student = (
    models.create(module, pair.classes, **fields)
    for module, fields in (pair.teacher, pair.student)
  )
  known = teacher.init(jax.random.key(0), batch["input"][:1])
  start = student.init(jax.random.key(1), batch["input"][:1])
  optimizer = optax.adam(1e-3)
  going = functools.partial(stepping, start, optimizer, batch)
  form = functools.partial(in_turn, pair.steps)

  def loss_fn(
    params: Any, model_state: Any, frozen: Any, batch: Any, key: Any
  ) -> Any:
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = student.apply(variables, batch["input"], train=True, key=key)
    terms = {"hard": Term(losses.cross_entropy(out.logits, batch["label"]))}
    if frozen is not None:
      asked = teacher.apply(frozen, batch["input"])[0].logits
      asked = jax.lax.stop_gradient(asked)
      soft = losses.kl(out.logits, asked, temperature=TEMPERATURE)
      terms["soft"] = Term(soft)
    return terms, train.Aux(model_state={"model": state})

  def by_hand(state: Any, frozen: Any, batch: Any) -> Any:
    """The same loss and optimiser, without a guard and without metrics."""

    def total(params: Any) -> Any:
      key = jax.random.fold_in(state.key, state.step)
      terms, aux = loss_fn(params, state.model_state, frozen, batch, key)
      return sum(jnp.mean(t.value) for t in terms.values()), aux.model_state

    grads, model_state = jax.grad(total, has_aux=True)(state.params)
    moved, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = state.replace(
      params=optax.apply_updates(state.params, moved),
      opt_state=opt_state,
      model_state=model_state,
      step=state.step + 1,
    )
    return new, {}

  step = train.make_step(loss_fn, optimizer)
  ask = jax.jit(lambda v, x: teacher.apply(v, x)[0].logits)

  def inference() -> Any:
    return ask(known, batch["input"])

  floor = "teacher inference, then a supervised step"
  return Benchmark(
    title=f"The floor of a distillation step: {name}",
    base=floor,
    forms={
      floor: form(inference, going(step, None)),
      "teacher inference alone": form(inference),
      "a supervised step alone": form(going(step, None)),
      "a distillation step": form(going(step, known)),
      "a distillation step by hand": form(going(by_hand, known)),
    },
    claims=(
      (
        "a distillation step costs less than its parts",
        "a distillation step",
        floor,
        "lower",
      ),
    ),
    data=describe(pair),
  )
