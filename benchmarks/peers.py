"""A distillation step beside the same step in PyTorch, on one thread each.

The networks, weights, batch, loss and optimiser are the same, in float32: a
live teacher's inference, 0.5 cross-entropy + 0.5 T^2 KL, and an update by SGD
with momentum. Before anything is timed, both frameworks make a few steps and
their losses and weights are compared. Time is that of the processor, so that
what else the machine does matters less.

Needs PyTorch and, for torch.compile, a C++ compiler: pip install torch. Where
torchdistill is installed, its loop is measured as well.
Run: NPROC=1 python -m benchmarks.run peers_mlp peers_conv peers_vit
     NPROC=1 python -m benchmarks.run peers_resnet
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.run import Benchmark
from benchmarks.step_floor import (
  PAIRS,
  TEMPERATURE,
  Network,
  Pair,
  a_batch,
  describe,
)
from kd_jax import losses, models, train
from kd_jax.errors import BadInput
from kd_jax.reduce import Term

try:
  import torch
  from torch.nn import functional
except ImportError:
  raise BadInput("this benchmark needs PyTorch: pip install torch") from None

from benchmarks import torch_twins

RATE, MOMENTUM, CHECKED_STEPS = 0.01, 0.9, 3
# XLA sizes its pool of threads by it, once, when it starts.
ENVIRONMENT = {"NPROC": "1"}

# A call gives the teacher's outputs and parameters.
Teach = Callable[[], tuple[models.Outputs, Any]]

# What is known of pairs, for the reader.
_NOTES = dict.fromkeys(
  ("conv", "resnet"),
  "The difference is in XLA's convolutions on a CPU, those of 16 channels and "
  "the gradients of kernels most of all. Tried for single layers, without a "
  "clear gain: products of patches or of shifted copies in their place, pairs "
  "of columns as channels, batch statistics as products, and XLA's flags for "
  "oneDNN, XNNPACK and YNNPACK.",
)


def weights(pair: Pair, seed: int = 0) -> tuple[Any, Any]:
  """Random variables of teacher and student, of which none is 0."""
  rng = np.random.default_rng(seed)

  def drawn(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    last = path[-1].key
    inputs = np.prod(leaf.shape[:-1])
    scale = inputs**-0.5 if last == "kernel" else 0.05
    mean = 1.0 if last in ("scale", "var") else 0.0
    return rng.normal(mean, scale, leaf.shape).astype(np.float32)

  def of(network: Network) -> Any:
    name, fields = network
    empty = models.template(name, pair.classes, pair.shape, **fields)
    return jax.tree_util.tree_map_with_path(drawn, empty)

  return of(pair.teacher), of(pair.student)


def hinton(
  out: models.Outputs, params: Any, teach: Teach, batch: Mapping[str, jax.Array]
) -> dict[str, Term]:
  """The loss of the pairs that classify."""
  asked = jax.lax.stop_gradient(teach()[0].logits)
  soft = losses.kl(out.logits, asked, temperature=TEMPERATURE)
  hard = losses.cross_entropy(out.logits, batch["label"])
  return {"soft": Term(soft, weight=0.5), "hard": Term(hard, weight=0.5)}


def jax_step(
  pair: Pair,
  variables: tuple[Any, Any],
  batch: Mapping[str, np.ndarray],
  terms: Callable[..., dict[str, Term]] = hinton,
) -> Callable[[], tuple[jax.Array, Any]]:
  """kd_jax's distillation step.

  Args:
    pair: its networks.
    variables: what `weights` returned.
    batch: what `a_batch` returned, and what `terms` needs beside it.
    terms: see `hinton`; `teach()` gives the teacher's outputs and parameters.

  Returns:
    A function that makes one more step on each call and waits for nothing:
    (the loss before it, the student's parameters after it).
  """
  teacher, student = (
    models.create(name, pair.classes, **fields)
    for name, fields in (pair.teacher, pair.student)
  )
  known, start = variables
  optimizer = optax.sgd(RATE, MOMENTUM)

  def loss_fn(
    params: Any, model_state: Any, frozen: Any, batch: Any, key: Any
  ) -> Any:
    now = {"params": params["model"], "state": model_state["model"]}
    out, state = student.apply(now, batch["input"], train=True, key=key)

    def teach() -> Any:
      return teacher.apply(frozen, batch["input"])[0], frozen["params"]

    found = terms(out, params["model"], teach, batch)
    return found, train.Aux(model_state={"model": state})

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


def torch_hinton(
  student: torch.nn.Module,
  teacher: torch.nn.Module,
  inputs: torch.Tensor,
  labels: torch.Tensor,
) -> torch.Tensor:
  """`hinton` in PyTorch."""
  with torch.no_grad():
    asked = functional.log_softmax(teacher(inputs) / TEMPERATURE, -1)
  logits = student(inputs)
  own = functional.log_softmax(logits / TEMPERATURE, -1)
  soft = functional.kl_div(own, asked, log_target=True, reduction="batchmean")
  hard = functional.cross_entropy(logits, labels)
  return 0.5 * TEMPERATURE**2 * soft + 0.5 * hard


def twins(
  pair: Pair, variables: tuple[Any, Any], batch: Mapping[str, np.ndarray]
) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor, torch.Tensor]:
  """Teacher (in eval mode), student, inputs and labels in PyTorch."""
  teacher, student = (
    torch_twins.twin(name, pair.shape, pair.classes, fields, known)
    for (name, fields), known in zip(
      (pair.teacher, pair.student), variables, strict=True
    )
  )
  inputs, labels = (
    torch.from_numpy(np.int64(x) if x.dtype == np.int32 else x)
    for x in (batch["input"], batch["label"])
  )
  if inputs.ndim == 4:  # channels first in name, last in memory
    inputs = inputs.permute(0, 3, 1, 2)
  return teacher.eval(), student, inputs, labels


def torch_step(
  pair: Pair,
  variables: tuple[Any, Any],
  batch: Mapping[str, np.ndarray],
  total: Callable[..., torch.Tensor] = torch_hinton,
  *,
  compiled: bool = False,
) -> Callable[[], tuple[torch.Tensor, torch.nn.Module]]:
  """The same step in PyTorch.

  Args:
    pair: its networks.
    variables: what `weights` returned.
    batch: what `a_batch` returned.
    total: the loss, see `torch_hinton`.
    compiled: whether forward and backward are compiled by `torch.compile`.

  Returns:
    A function that makes one more step on each call: (the loss before it, the
    student after it).
  """
  teacher, student, inputs, labels = twins(pair, variables, batch)
  optimizer = torch.optim.SGD(
    student.parameters(), lr=RATE, momentum=MOMENTUM, fused=True
  )

  def loss_fn(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return total(student, teacher, inputs, labels)

  run = torch.compile(loss_fn) if compiled else loss_fn

  def work() -> tuple[torch.Tensor, torch.nn.Module]:
    optimizer.zero_grad()
    loss = run(inputs, labels)
    loss.backward()
    optimizer.step()
    return loss.detach(), student

  return work


def torchdistill_step(
  pair: Pair, variables: tuple[Any, Any], batch: Mapping[str, np.ndarray]
) -> Callable[[], tuple[torch.Tensor, torch.nn.Module]]:
  """The same step by the box of torchdistill, as its examples call it.

  The teacher is in eval mode before, which torchdistill leaves to its caller.
  Reference: Matsubara 2021, arXiv:2011.12913.
  """
  from torchdistill.core.distillation import DistillationBox

  teacher, student, inputs, labels = twins(pair, variables, batch)
  alone = "forward_batch_only"
  soft_and_hard = {
    "key": "KDLoss",
    "kwargs": {
      "student_module_path": ".",
      "student_module_io": "output",
      "teacher_module_path": ".",
      "teacher_module_io": "output",
      "temperature": TEMPERATURE,
      "alpha": 0.5,
    },
  }
  box = DistillationBox(
    teacher,
    student,
    {},
    {
      "num_epochs": 1,
      "teacher": {"requires_grad": False, "forward_proc": alone},
      "student": {"forward_proc": alone},
      "criterion": {
        "key": "WeightedSumLoss",
        "kwargs": {
          "sub_terms": {"kd": {"criterion": soft_and_hard, "weight": 1.0}}
        },
      },
      "optimizer": {"key": "SGD", "kwargs": {"lr": RATE, "momentum": MOMENTUM}},
    },
    torch.device("cpu"),
    None,
    False,
    1,
  )
  box.pre_epoch_process(epoch=0)

  def work() -> tuple[torch.Tensor, torch.nn.Module]:
    loss = box.forward_process(inputs, labels)
    box.post_forward_process(loss=loss)
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
      raise BadInput(
        f"{variable} is {known!r}; it should be {value!r} before Python "
        "starts, so that XLA has one thread"
      )
  torch.set_num_threads(1)


def beside(
  title: str,
  pair: Pair,
  start: Mapping[str, Any],
  ours: Mapping[str, Callable[[], Any]],
  theirs: Mapping[str, Callable[[], Any]],
  notes: Sequence[str] = (),
) -> Benchmark:
  """The first of our forms, checked, beside each of PyTorch's; the others too.

  Args:
    title: for people.
    pair: its networks.
    start: the student's variables before the steps.
    ours: name -> what `jax_step` returned.
    theirs: name -> what `torch_step` returned; the first is the base.
    notes: for the reader.
  """
  first = next(iter(ours))
  parts = dict(ours)
  found = [ours[first]() for _ in range(CHECKED_STEPS)]
  said = [
    f"In {CHECKED_STEPS} steps before the first block {first} and PyTorch's "
    "forms had the same losses (to 1e-4) and weights (to 1e-2 of what they "
    "moved).",
    *notes,
  ]
  for name, part in theirs.items():
    try:
      other = [part() for _ in range(CHECKED_STEPS)]
    except torch._dynamo.exc.TorchDynamoException as error:
      line = str(error).strip().splitlines()[0]
      said.append(f"{name} failed and is left out: {line}")
    else:
      check_same(found, other, start)
      parts[name] = part

  def form(part: Callable[[], Any]) -> Callable[[], None]:
    def work() -> None:
      for _ in range(pair.steps):
        found = part()
      jax.block_until_ready(found)

    return work

  return Benchmark(
    title=title,
    base=next(iter(theirs)),
    forms={key: form(part) for key, part in parts.items()},
    clock=time.process_time,
    claims=[
      (f"a step costs less than in {other}", first, other, "lower")
      for other in parts
      if other in theirs
    ],
    data={**describe(pair), "threads": 1, "torch": torch.__version__},
    notes=said,
    environment=ENVIRONMENT,
  )


def benchmark(name: str) -> Benchmark:
  check_threads()
  pair = PAIRS[name]
  variables, batch = weights(pair), a_batch(pair)
  theirs = {
    "PyTorch eager": torch_step(pair, variables, batch),
    "PyTorch torch.compile": torch_step(pair, variables, batch, compiled=True),
  }
  notes = [_NOTES[name]] if name in _NOTES else []
  try:
    step = torchdistill_step(pair, variables, batch)
    theirs[f"torchdistill {metadata.version('torchdistill')}"] = step
  except ImportError as error:
    notes.append(f"torchdistill is left out: {error}")
  return beside(
    f"A distillation step beside PyTorch: {name}",
    pair,
    variables[1],
    {"kd_jax": jax_step(pair, variables, batch)},
    theirs,
    notes,
  )
