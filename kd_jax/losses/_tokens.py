"""The tokens of two linear heads, some at a time: chunks, rows and logits."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kd_jax.losses import _batch as batch, _checks as checks


class Head(NamedTuple):
  """A head in the dtype of its products, and in float32 for its gradients."""

  factor: jax.Array
  full: jax.Array
  bias: jax.Array | None


class Chunk(NamedTuple):
  """The rows of a chunk; stacked along axis 0, those of all chunks."""

  student: jax.Array
  teacher: jax.Array
  valid: jax.Array
  weights: jax.Array | None


def prepare(
  student_hidden: ArrayLike,
  student_head: ArrayLike,
  teacher_hidden: ArrayLike,
  teacher_head: ArrayLike,
  *,
  divergence: Callable[..., jax.Array],
  chunk_size: int,
  teacher_index: ArrayLike | None,
  student_bias: ArrayLike | None,
  teacher_bias: ArrayLike | None,
  where: ArrayLike | None,
  weights: ArrayLike | None,
) -> tuple[tuple[Head, Head], Chunk, Callable[[jax.Array], jax.Array]]:
  """The heads, all chunks, and what joins their values; checks arguments."""
  if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
    raise TypeError(f"chunk_size is {chunk_size!r}; it should be an int")
  if chunk_size < 1:
    raise ValueError(f"chunk_size is {chunk_size}; it should be above 0")
  given = {
    "student_hidden": student_hidden,
    "student_head": student_head,
    "teacher_hidden": teacher_hidden,
    "teacher_head": teacher_head,
  }
  for name, array in given.items():
    checks.dtype(name, array)  # refuses what is no array
  named = {name: jnp.asarray(array) for name, array in given.items()}
  if not callable(divergence):
    raise TypeError(
      f"divergence is {divergence!r}; it should be a function such as kl"
    )
  _check_shapes(named, teacher_index is not None)
  hidden_s, head_s, hidden_t, head_t = named.values()
  shape = hidden_s.shape[:-1]
  mask = checks.valid(where, shape)
  hidden_s, hidden_t = checks.select(mask, hidden_s, hidden_t)
  if weights is not None:
    (weights,) = checks.floats(weights=weights)
    if weights.shape != shape:
      raise ValueError(
        f"weights has shape {weights.shape} and student_hidden has shape "
        f"{hidden_s.shape}; it should be {shape}, one weight per token"
      )
    (weights,) = checks.select(mask, weights)
  bias_s = _bias("student_bias", student_bias, head_s)
  bias_t = _bias("teacher_bias", teacher_bias, head_t)
  if teacher_index is not None:
    head_t, bias_t = _columns(teacher_index, head_s, head_t, bias_t)
  hidden_s, first = _factors(hidden_s, head_s, bias_s)
  hidden_t, second = _factors(hidden_t, head_t, bias_t)

  # At most chunk_size tokens at a time, as even as can be.
  tokens = math.prod(shape)
  chunks = max(1, -(-tokens // chunk_size))
  size = -(-tokens // chunks)

  def split(x: jax.Array) -> jax.Array:
    rows = x.reshape(tokens, *x.shape[len(shape) :])
    padding = [(0, size * chunks - tokens)] + [(0, 0)] * (rows.ndim - 1)
    rows = jnp.pad(rows, padding)
    # Every chunks-th token, not neighbours: where the tokens are divided over
    # devices, each has its share of every chunk then.
    return rows.reshape(size, chunks, *rows.shape[1:]).swapaxes(0, 1)

  def join(values: jax.Array) -> jax.Array:
    return values.swapaxes(0, 1).reshape(-1)[:tokens].reshape(shape)

  everything = jnp.ones(shape, bool) if mask is None else mask
  rows = Chunk(hidden_s, hidden_t, everything, weights)
  return (first, second), jax.tree.map(split, rows), join


def _check_shapes(named: dict[str, jax.Array], mapped: bool) -> None:
  checks.floats(**named)
  hidden_s, head_s, hidden_t, head_t = named.values()
  if not (
    hidden_s.ndim > 0
    and hidden_t.ndim > 0
    and head_s.ndim == head_t.ndim == 2
    and hidden_s.shape[:-1] == hidden_t.shape[:-1]
    and hidden_s.shape[-1] == head_s.shape[0]
    and hidden_t.shape[-1] == head_t.shape[0]
    and 0 not in (*head_s.shape, *head_t.shape)
    and (mapped or head_s.shape[1] == head_t.shape[1])
  ):
    shapes = [f"{name} has shape {x.shape}" for name, x in named.items()]
    raise ValueError(
      f"{', '.join(shapes)}; they should be [..., student_width], "
      "[student_width, vocab], [..., teacher_width], [teacher_width, vocab] "
      "(a teacher of another vocabulary needs teacher_index)"
    )


def _bias(
  name: str, bias: ArrayLike | None, head: jax.Array
) -> jax.Array | None:
  if bias is None:
    return None
  (bias,) = checks.floats(**{name: bias})
  if bias.shape != head.shape[1:]:
    raise ValueError(
      f"{name} has shape {bias.shape} and the head has shape {head.shape}; it "
      f"should be {head.shape[1:]} (nothing is broadcast)"
    )
  return bias


def _columns(
  index: ArrayLike,
  head_s: jax.Array,
  head_t: jax.Array,
  bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The teacher's head and bias with a column for each student class."""
  dtype = checks.dtype("teacher_index", index)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"teacher_index has dtype {dtype}; it should be integer")
  if jnp.shape(index) != head_s.shape[1:]:
    raise ValueError(
      f"teacher_index has shape {jnp.shape(index)} and student_head has shape "
      f"{head_s.shape}; it should be {head_s.shape[1:]}"
    )
  columns = head_t.shape[1]
  if checks.is_known(index):
    numbers = np.asarray(index)
    wrong = numbers[(numbers < -1) | (numbers >= columns)]
    if wrong.size:
      raise ValueError(
        f"teacher_index holds {wrong[0]}; it should hold numbers from -1 to "
        f"{columns - 1}, as teacher_head has shape {head_t.shape}"
      )
  index = jnp.asarray(index).astype(jnp.int32)
  usable, lacking = (index >= 0) & (index < columns), index == -1
  index = jnp.where(usable, index, 0)
  shift = jnp.zeros(columns) if bias is None else bias
  shift = jnp.where(usable, shift[index], jnp.where(lacking, -jnp.inf, jnp.nan))
  return jnp.where(usable, head_t[:, index], 0.0), shift


def _factors(
  hidden: jax.Array, head: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, Head]:
  """Hidden states and head in the dtype in which they are multiplied."""
  low = hidden.dtype == head.dtype == jnp.bfloat16
  dtype = jnp.bfloat16 if low else jnp.float32
  full = head.astype(jnp.float32)
  factor = lax.stop_gradient(head.astype(dtype))
  return hidden.astype(dtype), Head(factor, full, bias)


def values(
  divergence: Callable[..., jax.Array],
  student: jax.Array,
  teacher: jax.Array,
  valid: jax.Array,
) -> jax.Array:
  loss = jnp.asarray(divergence(student, teacher, where=valid), jnp.float32)
  if loss.shape != valid.shape:
    raise ValueError(
      f"divergence gives shape {loss.shape} for logits of {valid.shape[0]} "
      f"tokens; it should give one value per token, {valid.shape}"
    )
  return loss


def weighted(loss: jax.Array, chunk: Chunk) -> jax.Array:
  loss = checks.masked(loss, chunk.valid)
  return loss if chunk.weights is None else chunk.weights * loss


def with_logits(heads: tuple[Head, Head], chunk: Chunk) -> Chunk:
  """The chunk with logits in the place of hidden states."""
  return chunk._replace(
    student=_logits(chunk.student, heads[0]),
    teacher=_logits(chunk.teacher, heads[1]),
  )


def block(size: int, vocab: int) -> int:
  """How many of a chunk's rows of logits go through the divergence at a time.

  A few on a CPU, see `batch.CACHE`. Accelerators have all at a time, and so
  have several devices, among which the rows may be divided.
  """
  if jax.default_backend() != "cpu" or jax.device_count() > 1:
    return size
  count = -(-size // max(1, batch.CACHE // vocab))
  return -(-size // max(1, count))


def _logits(rows: jax.Array, head: Head) -> jax.Array:
  logits = _matmul(rows, head.factor, head.full)
  return logits if head.bias is None else logits + head.bias


@jax.custom_vjp
def _matmul(a: jax.Array, b: jax.Array, full: jax.Array) -> jax.Array:
  """The product a b in float32; the gradient of b goes to `full` instead.

  `full` is b in float32. A loop adds up gradients in the dtype of what they
  belong to, which may be too short for b's.
  """
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _matmul_forward(
  a: jax.Array, b: jax.Array, full: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _matmul(a, b, full), (a, b, full)


def _matmul_backward(
  saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
  a, b, full = saved
  gradient = gradient.astype(a.dtype)
  to_a = _matmul(gradient, b.T, full.T).astype(a.dtype)
  to_b = jnp.matmul(a.T, gradient, preferred_element_type=jnp.float32)
  return to_a, None, to_b


_matmul.defvjp(_matmul_forward, _matmul_backward)
