"""A step of a language model's distillation beside PyTorch, on one thread each.

The loss is the divergence KL(teacher || student) of every next word, at a
temperature of 1. From the logits of all words; some words at a time, with each
part's gradients computed along with its loss; and, without a live teacher, from
its likeliest words as a cache keeps them. In PyTorch eager, compiled, and in
parts by an autograd function of the same kind. Weights, optimiser and checks
are those of `benchmarks.peers`.

Needs PyTorch and, for torch.compile, a C++ compiler: pip install torch.
Run: NPROC=1 python -m benchmarks.run peers_lm
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import peers
from benchmarks.peers import functional, torch
from benchmarks.run import Benchmark
from benchmarks.step_floor import PAIRS, Pair, a_batch
from kd_jax import losses, models
from kd_jax.reduce import Term

CHUNK, KEPT = 128, 50


def all_logits(
  out: models.Outputs, params: Any, teach: peers.Teach, batch: Any
) -> dict[str, Term]:
  asked = jax.lax.stop_gradient(teach()[0].logits)
  return {"soft": Term(losses.kl(out.logits, asked))}


def in_chunks(
  out: models.Outputs, params: Any, teach: peers.Teach, batch: Any
) -> dict[str, Term]:
  known, frozen = jax.lax.stop_gradient(teach())
  total = losses.linear_divergence_sum(
    out.features["hidden"],
    params["embedding"]["embedding"].T,
    known.features["hidden"],
    frozen["embedding"]["embedding"].T,
    divergence=losses.kl,
    chunk_size=CHUNK,
  )
  return {"soft": Term(total, count=batch["label"].size)}


def from_cache(
  out: models.Outputs, params: Any, teach: peers.Teach, batch: Any
) -> dict[str, Term]:
  kept = batch["kept_log_probs"]
  return {"soft": Term(losses.topk_kl(out.logits, kept, indices=batch["kept"]))}


def likeliest(
  pair: Pair, known: Any, batch: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """What a cache would hold of the teacher for this batch."""
  name, fields = pair.teacher
  apply = jax.jit(models.create(name, pair.classes, **fields).apply)
  log_probs = jax.nn.log_softmax(apply(known, batch["input"])[0].logits)
  values, places = jax.lax.top_k(log_probs, KEPT)
  return {
    "kept_log_probs": np.asarray(values),
    "kept": np.asarray(places, np.int32),
  }


class Chunked(torch.autograd.Function):
  """The sum of KL(teacher || student) of words, gradients with the loss."""

  @staticmethod
  def forward(
    ctx: Any,
    hidden: torch.Tensor,
    head: torch.Tensor,
    known: torch.Tensor,
    known_head: torch.Tensor,
  ) -> torch.Tensor:
    total = hidden.new_zeros(())
    to_hidden, to_head = torch.empty_like(hidden), torch.zeros_like(head)
    for begin in range(0, len(hidden), CHUNK):
      part = slice(begin, begin + CHUNK)
      own = functional.log_softmax(hidden[part] @ head.T, -1)
      asked = functional.log_softmax(known[part] @ known_head.T, -1)
      total += functional.kl_div(own, asked, log_target=True, reduction="sum")
      slope = own.exp_().sub_(asked.exp_())
      to_hidden[part] = slope @ head
      to_head.addmm_(slope.T, hidden[part])
    ctx.save_for_backward(to_hidden, to_head)
    return total

  @staticmethod
  def backward(ctx: Any, outward: torch.Tensor) -> tuple[Any, ...]:
    to_hidden, to_head = ctx.saved_tensors
    return to_hidden * outward, to_head * outward, None, None


def torch_all_logits(
  student: Any, teacher: Any, inputs: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
  with torch.no_grad():
    asked = functional.log_softmax(teacher(inputs), -1)
  own = functional.log_softmax(student(inputs), -1)
  total = functional.kl_div(own, asked, log_target=True, reduction="sum")
  return total / labels.numel()


def torch_in_chunks(
  student: Any, teacher: Any, inputs: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
  with torch.no_grad():
    known = teacher.hidden(inputs).flatten(0, 1)
  hidden = student.hidden(inputs).flatten(0, 1)
  heads = student.embedding.weight, teacher.embedding.weight
  return Chunked.apply(hidden, heads[0], known, heads[1]) / labels.numel()


def forms(
  pair: Pair, variables: tuple[Any, Any], batch: Mapping[str, np.ndarray]
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
  """Ours and PyTorch's, by name."""
  cached = {**batch, **likeliest(pair, variables[0], batch)}
  ours = {
    "kd_jax, in chunks": peers.jax_step(pair, variables, batch, in_chunks),
    "kd_jax, all logits": peers.jax_step(pair, variables, batch, all_logits),
    f"kd_jax, a cache of {KEPT} words": peers.jax_step(
      pair, variables, cached, from_cache
    ),
  }
  theirs = {
    "PyTorch eager": peers.torch_step(pair, variables, batch, torch_all_logits),
    "PyTorch torch.compile": peers.torch_step(
      pair, variables, batch, torch_all_logits, compiled=True
    ),
    "PyTorch eager, in chunks": peers.torch_step(
      pair, variables, batch, torch_in_chunks
    ),
  }
  return ours, theirs


def benchmark() -> Benchmark:
  peers.check_threads()
  pair = PAIRS["lm"]
  variables, batch = peers.weights(pair), a_batch(pair)
  return peers.beside(
    "A step of a language model's distillation beside PyTorch",
    pair,
    variables[1],
    *forms(pair, variables, batch),
    notes=[
      "PyTorch's chunks are an autograd function of the kind of Liger's (Hsu "
      "et al. 2024, arXiv:2410.10989), written for this benchmark: Liger's own "
      "needs a GPU."
    ],
  )
