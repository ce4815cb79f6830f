"""Divergences of two linear heads, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kd_jax.losses import _checks as checks


def linear_divergence(
  student_hidden: ArrayLike,
  student_head: ArrayLike,
  teacher_hidden: ArrayLike,
  teacher_head: ArrayLike,
  *,
  divergence: Callable[..., jax.Array],
  chunk_size: int,
  teacher_index: ArrayLike | None = None,
  student_bias: ArrayLike | None = None,
  teacher_bias: ArrayLike | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """A divergence of the logits of two linear heads, some tokens at a time.

    loss = divergence(h_s W_s + b_s, h_t W_t + b_t)

  The same value and the same gradients, in all arrays, as from the logits over
  the vocabulary, which never exist for more than chunk_size tokens: with
  128,000 classes, a batch of 8,192 tokens has 4 GB of them in float32, for each
  model, and their gradients as much again. The price is that the logits are
  computed once more for the gradient. Reverse-mode derivatives only.

  Two bfloat16 factors are multiplied as they are (and by the gradients of the
  logits in bfloat16), anything else in float32, at JAX's default precision. The
  sums are kept in float32: so are the logits, and the gradients of the heads
  while the chunks add to them.

  Args:
    student_hidden: [..., student_width] any float dtype, one row per token.
    student_head: [student_width, vocab] any float dtype; for tied embeddings,
      their transpose.
    teacher_hidden: [..., teacher_width] any float dtype.
    teacher_head: [teacher_width, vocab] any float dtype. Gradients flow into
      the teacher's arrays as well.
    divergence: a loss such as `kl` or `functools.partial(jsd, beta=0.1,
      temperature=2.0)`: called as divergence(student_logits, teacher_logits,
      where=mask) on [chunk, vocab] logits, it should give one value per token,
      each from its own logits alone (`dist`, which relates the tokens of a
      batch, would relate those of a chunk).
    chunk_size: the largest number of tokens at a time, an int.
    teacher_index: [vocab] integers or None, the column of the teacher's head
      for each of the student's classes, -1 where the teacher has no such class
      (-inf, not 0, is its logit). The vocabularies may then differ; columns
      that are not named are left out of the teacher's softmax.
    student_bias: [vocab] float or None. -inf for padding of the vocabulary.
    teacher_bias: as wide as teacher_head; float or None.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per token.

  Raises:
    ValueError: if shapes do not fit, a teacher_index that is not traced is no
      column, or chunk_size is below 1. (Traced, it gives NaN.)
    TypeError: if a dtype is wrong, or chunk_size is no int.

  Example:
    >>> import functools
    >>> import jax.numpy as jnp
    >>> from kd_jax import losses
    >>> loss = linear_divergence(
    ...   jnp.ones((2, 3, 4)),  # [batch, tokens, student_width]
    ...   jnp.ones((4, 7)),
    ...   jnp.ones((2, 3, 5)),
    ...   jnp.ones((5, 7)),
    ...   divergence=functools.partial(losses.kl, temperature=2.0),
    ...   chunk_size=2,
    ... )
    >>> print(loss.shape, loss.max())
    (2, 3) 0.0

  Reference: chunks of tokens: Hsu et al. 2024 (Liger Kernel),
  arXiv:2410.10989, Sec. 3.2.
  """
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
  bias_s = _bias("student_bias", student_bias, head_s)
  bias_t = _bias("teacher_bias", teacher_bias, head_t)
  if teacher_index is not None:
    head_t, bias_t = _columns(teacher_index, head_s, head_t, bias_t)
  project_s = _projection(hidden_s, head_s, bias_s)
  project_t = _projection(hidden_t, head_t, bias_t)

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

  # Without its checkpoint, the scan would keep the logits of all chunks.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def of_chunk(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    student, teacher, valid = chunk
    loss = jnp.asarray(
      divergence(project_s(student), project_t(teacher), where=valid),
      jnp.float32,
    )
    if loss.shape != valid.shape:
      raise ValueError(
        f"divergence gives shape {loss.shape} for logits of {valid.shape[0]} "
        f"tokens; it should give one value per token, {valid.shape}"
      )
    return checks.masked(loss, valid)

  everything = jnp.ones(shape, bool) if mask is None else mask
  loss = lax.map(of_chunk, tuple(map(split, (hidden_s, hidden_t, everything))))
  return loss.swapaxes(0, 1).reshape(-1)[:tokens].reshape(shape)


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


def _projection(
  hidden: jax.Array, head: jax.Array, bias: jax.Array | None
) -> Callable[[jax.Array], jax.Array]:
  """From rows of `hidden` to float32 logits."""
  low = hidden.dtype == head.dtype == jnp.bfloat16
  dtype = jnp.bfloat16 if low else jnp.float32
  full = head.astype(jnp.float32)
  factor = lax.stop_gradient(head.astype(dtype))

  def project(rows: jax.Array) -> jax.Array:
    logits = _matmul(rows.astype(dtype), factor, full)
    return logits if bias is None else logits + bias

  return project


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
