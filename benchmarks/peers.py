"""A distillation step beside the same step in PyTorch, on one thread each.

The networks, weights, batch, loss and optimiser are the same, in float32: a
live teacher's inference, 0.5 cross-entropy + 0.5 T^2 KL, and an update by SGD
with momentum. Before anything is timed, both frameworks make a few steps and
their losses and weights are compared. Time is that of the processor, so that
what else the machine does matters less.

Needs PyTorch and, for torch.compile, a C++ compiler: pip install torch.
Run: NPROC=1 python -m benchmarks.run peers_mlp peers_conv peers_vit
"""

from collections.abc import Callable, Mapping, Sequence
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.run import Benchmark
from benchmarks.step_floor import CLASSES, PAIRS, TEMPERATURE
from kd_jax import losses, models, train
from kd_jax.reduce import Term

try:
  import torch
  from torch.nn import functional
except ImportError:
  raise SystemExit("This benchmark needs PyTorch: pip install torch") from None

from benchmarks import torch_twins

RATE, MOMENTUM, CHECKED_STEPS = 0.01, 0.9, 3
# XLA sizes its pool of threads by it, once, when it starts.
ENVIRONMENT = {"NPROC": "1"}

# What is known of a pair, for the reader.
_NOTES = {
  "conv": (
    "The difference is in XLA's convolutions on a CPU, the gradients of their "
    "kernels most of all. Tried for single layers, without a clear gain: "
    "products of patches or of shifted copies in their place, pairs of columns "
    "as channels, batch statistics as products, and XLA's flags for oneDNN, "
    "XNNPACK and YNNPACK."
  )
}

# name -> (name, attributes and variables of a network) of "teacher", "student".
Pair = dict[str, tuple[str, Mapping[str, Any], dict[str, Any]]]


def networks(
  shape: tuple[int, ...],
  teacher: tuple[str, Mapping[str, Any]],
  student: tuple[str, Mapping[str, Any]],
  seed: int = 0,
) -> Pair:
  """Both networks with random weights, of which none is 0.

  Args:
    shape: of an input.
    teacher: as `step_floor.PAIRS` has it.
    student: as `step_floor.PAIRS` has it.
    seed: draws the weights.

  Returns:
    role -> (name, attributes, variables).
  """
  rng = np.random.default_rng(seed)

  def drawn(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    last = path[-1].key
    inputs = np.prod(leaf.shape[:-1])
    scale = inputs**-0.5 if last == "kernel" else 0.05
    mean = 1.0 if last in ("scale", "var") else 0.0
    return rng.normal(mean, scale, leaf.shape).astype(np.float32)

  found = {}
  for role, (name, fields) in (("teacher", teacher), ("student", student)):
    empty = models.template(name, CLASSES, shape, **fields)
    variables = jax.tree_util.tree_map_with_path(drawn, empty)
    found[role] = name, fields, variables
  return found


def a_batch(
  shape: tuple[int, ...], size: int, seed: int = 0
) -> dict[str, np.ndarray]:
  """Random inputs and labels."""
  rng = np.random.default_rng(seed)
  return {
    "image": rng.normal(size=(size, *shape)).astype(np.float32),
    "label": rng.integers(0, CLASSES, size),
  }


def jax_step(
  pair: Pair, batch: Mapping[str, np.ndarray]
) -> Callable[[], tuple[jax.Array, Any]]:
  """kd_jax's distillation step.

  Args:
    pair: what `networks` returned.
    batch: what `a_batch` returned.

  Returns:
    A function that makes one more step on each call and waits for nothing:
    (the loss before it, the student's parameters after it).
  """
  (teacher, known), (student, start) = (
    (models.create(name, CLASSES, **fields), variables)
    for name, fields, variables in (pair["teacher"], pair["student"])
  )
  optimizer = optax.sgd(RATE, MOMENTUM)

  def loss_fn(
    params: Any, model_state: Any, frozen: Any, batch: Any, key: Any
  ) -> Any:
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = student.apply(variables, batch["image"], train=True, key=key)
    asked = teacher.apply(frozen, batch["image"])[0].logits
    asked = jax.lax.stop_gradient(asked)
    soft = losses.kl(out.logits, asked, temperature=TEMPERATURE)
    hard = losses.cross_entropy(out.logits, batch["label"])
    terms = {"soft": Term(soft, weight=0.5), "hard": Term(hard, weight=0.5)}
    return terms, train.Aux(model_state={"model": state})

  run = jax.jit(train.make_step(loss_fn, optimizer), donate_argnums=0)
  # Copies: the step gives away what it is given.
  copied = jax.tree.map(jnp.array, start)
  now = train.init_state(
    {"model": copied["params"]},
    optimizer,
    jax.random.key(0),
    model_state={"model": copied["state"]},
  )
  on_device = {key: jnp.asarray(value) for key, value in batch.items()}
  frozen = jax.tree.map(jnp.asarray, known)

  def work() -> tuple[jax.Array, Any]:
    nonlocal now
    now, metrics = run(now, frozen, on_device)
    return metrics["loss"], now.params["model"]

  return work


def torch_step(
  pair: Pair, batch: Mapping[str, np.ndarray], *, compiled: bool = False
) -> Callable[[], tuple[torch.Tensor, torch.nn.Module]]:
  """The same step in PyTorch.

  Args:
    pair: what `networks` returned.
    batch: what `a_batch` returned.
    compiled: whether forward and backward are compiled by `torch.compile`.

  Returns:
    A function that makes one more step on each call: (the loss before it, the
    student after it).
  """
  shape = batch["image"].shape[1:]
  teacher, student = (
    torch_twins.twin(name, shape, CLASSES, fields, variables)
    for name, fields, variables in (pair["teacher"], pair["student"])
  )
  teacher.eval()
  images = torch.from_numpy(batch["image"])
  if images.ndim == 4:  # channels first in name, last in memory
    images = images.permute(0, 3, 1, 2)
  labels = torch.from_numpy(batch["label"])
  optimizer = torch.optim.SGD(
    student.parameters(), lr=RATE, momentum=MOMENTUM, fused=True
  )

  def total(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
      asked = functional.log_softmax(teacher(images) / TEMPERATURE, -1)
    logits = student(images)
    own = functional.log_softmax(logits / TEMPERATURE, -1)
    soft = functional.kl_div(own, asked, log_target=True, reduction="batchmean")
    hard = functional.cross_entropy(logits, labels)
    return 0.5 * TEMPERATURE**2 * soft + 0.5 * hard

  loss_fn = torch.compile(total) if compiled else total

  def work() -> tuple[torch.Tensor, torch.nn.Module]:
    optimizer.zero_grad()
    loss = loss_fn(images, labels)
    loss.backward()
    optimizer.step()
    return loss.detach(), student

  return work


def check_same(
  ours: Sequence[tuple[jax.Array, Any]],
  theirs: Sequence[tuple[torch.Tensor, torch.nn.Module]],
  start: Mapping[str, Any],
) -> None:
  """Compares every loss and every weight after the same steps.

  Args:
    ours: what the function that `jax_step` returned has returned, step by step.
    theirs: what that of `torch_step` has returned.
    start: the student's variables before the steps.

  Raises:
    ValueError: if a loss differs by 1e-4 of it, or the weights of a leaf by
      1e-2 of how far they have moved, in norm: one ReLU that rounding switches
      is 1e-3 of a small convolution's gradient.
  """
  for step, ((loss, _), (peer, _)) in enumerate(zip(ours, theirs, strict=True)):
    if not abs(float(loss) - float(peer)) <= 1e-4 * abs(float(loss)):
      raise ValueError(
        f"the loss of step {step} is {float(loss)} here and {float(peer)} in "
        "PyTorch; they should be the same"
      )
  params, student = ours[-1][1], theirs[-1][1]
  before = torch_twins.weights(student, start)
  after = torch_twins.weights(student, {"params": params, "state": {}})
  for name, value in student.named_parameters():
    moved = torch.linalg.vector_norm(after[name] - before[name])
    apart = torch.linalg.vector_norm(after[name] - value.detach())
    rounding = 1e-6 * torch.linalg.vector_norm(after[name])
    if not apart <= 1e-2 * moved + rounding:
      raise ValueError(
        f"{name} has moved by {float(moved)} and differs by {float(apart)} "
        "from PyTorch's; they should be the same"
      )


def check_threads() -> None:
  """Gives PyTorch one thread, and stops if XLA has more."""
  for variable, value in ENVIRONMENT.items():
    known = os.environ.get(variable)
    if known != value:
      raise SystemExit(
        f"{variable} is {known!r}; it should be {value!r} before Python "
        "starts, so that XLA has one thread"
      )
  torch.set_num_threads(1)


def benchmark(name: str) -> Benchmark:
  check_threads()
  shape, size, steps, teacher, student = PAIRS[name]
  batch = a_batch(shape, size)
  pair = networks(shape, teacher, student)
  parts: dict[str, Callable[[], Any]] = {"kd_jax": jax_step(pair, batch)}
  notes = [
    f"In {CHECKED_STEPS} steps before the first block the forms had the same "
    "losses (to 1e-4) and weights (to 1e-2 of what they moved)."
  ]
  if name in _NOTES:
    notes.append(_NOTES[name])
  ours = [parts["kd_jax"]() for _ in range(CHECKED_STEPS)]
  for how, compiled in (("eager", False), ("torch.compile", True)):
    part = torch_step(pair, batch, compiled=compiled)
    try:
      theirs = [part() for _ in range(CHECKED_STEPS)]
    except torch._dynamo.exc.TorchDynamoException as error:
      first = str(error).strip().splitlines()[0]
      notes.append(f"torch.compile failed and is left out: {first}")
    else:
      check_same(ours, theirs, pair["student"][-1])
      parts[f"PyTorch {how}"] = part

  def form(part: Callable[[], Any]) -> Callable[[], None]:
    def work() -> None:
      for _ in range(steps):
        found = part()
      jax.block_until_ready(found)

    return work

  return Benchmark(
    title=f"A distillation step beside PyTorch: {name}",
    base="PyTorch eager",
    forms={key: form(part) for key, part in parts.items()},
    clock=time.process_time,
    claims=[
      (f"a step costs less than in {other}", "kd_jax", other, "lower")
      for other in list(parts)[1:]
    ],
    data={
      "teacher": f"{teacher[0]} {teacher[1]}",
      "student": f"{student[0]} {student[1]}",
      "batch size": size,
      "steps in a round": steps,
      "threads": 1,
      "torch": torch.__version__,
    },
    notes=notes,
    environment=ENVIRONMENT,
  )
