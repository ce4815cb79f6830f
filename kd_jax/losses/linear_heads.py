"""Divergences of two linear heads, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

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
  computed once more for the gradient; `linear_divergence_sum` need not do so.
  Reverse-mode derivatives only.

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
  heads, chunks, join = _prepare(
    *(student_hidden, student_head, teacher_hidden, teacher_head),
    divergence=divergence,
    chunk_size=chunk_size,
    teacher_index=teacher_index,
    student_bias=student_bias,
    teacher_bias=teacher_bias,
    where=where,
    weights=None,
  )
  # Without its checkpoint, the scan would keep the logits of all chunks.
  of_chunk = jax.checkpoint(
    functools.partial(_of_chunk, divergence, heads), prevent_cse=False
  )
  return join(lax.map(of_chunk, chunks))


def linear_divergence_sum(
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
  weights: ArrayLike | None = None,
) -> jax.Array:
  """The sum of `linear_divergence` over tokens, which costs no second pass.

    loss = sum_i weights_i divergence(h_s(i) W_s + b_s, h_t(i) W_t + b_t)

  The same sum and the same gradients, in as little memory. What each token
  counts in the sum is known beforehand, so each chunk's gradients are computed
  together with its loss, from the same logits; all that is left to do later is
  to scale them. They are computed for those arrays alone that are being
  differentiated: of a teacher behind `jax.lax.stop_gradient`, or outside the
  arguments of `jax.grad`, none are, and of a call that is not differentiated
  none at all. Reverse-mode derivatives only.

  For the exact mean over devices and microbatches, give the training step the
  number of the tokens, or the sum of their weights, as well:
  `reduce.Term(total, count=where.sum())`.

  Args:
    student_hidden: [..., student_width] any float dtype, one row per token.
    student_head: [student_width, vocab] any float dtype.
    teacher_hidden: [..., teacher_width] any float dtype.
    teacher_head: [teacher_width, vocab] any float dtype.
    divergence: as for `linear_divergence`: one value per token.
    chunk_size: the largest number of tokens at a time, an int. Each chunk adds
      its part to the gradients of the heads, so small chunks cost time.
    teacher_index: [vocab] integers or None, see `linear_divergence`.
    student_bias: [vocab] float or None. -inf for padding of the vocabulary.
    teacher_bias: as wide as teacher_head; float or None.
    where: [...] bool; tokens that are False add nothing and get no gradient.
    weights: [...] float or None, what each token's value is multiplied by.

  Returns:
    float32 scalar.

  Raises:
    ValueError: as `linear_divergence`, or if weights has not one entry a token.
    TypeError: if a dtype is wrong, or chunk_size is no int.

  Example:
    >>> import jax.numpy as jnp
    >>> from kd_jax import losses
    >>> total = linear_divergence_sum(
    ...   jnp.ones((2, 3, 4)),  # [batch, tokens, student_width]
    ...   jnp.ones((4, 7)),
    ...   jnp.ones((2, 3, 5)),
    ...   jnp.ones((5, 7)),
    ...   divergence=losses.logit_mse,
    ...   chunk_size=2,
    ... )
    >>> print(total)  # 7 / 2 from each of six tokens, with logits of 4 and 5
    21.0

  Reference: gradients with the loss, some tokens at a time: Hsu et al. 2024
  (Liger Kernel), arXiv:2410.10989, Sec. 3.2.
  """
  heads, chunks, _ = _prepare(
    *(student_hidden, student_head, teacher_hidden, teacher_head),
    divergence=divergence,
    chunk_size=chunk_size,
    teacher_index=teacher_index,
    student_bias=student_bias,
    teacher_bias=teacher_bias,
    where=where,
    weights=weights,
  )
  # A custom derivative sees arguments alone: numbers of the divergence that
  # are traced, such as its temperature, have to be among them.
  size, vocab = chunks.valid.shape[1], heads[0].full.shape[1]
  logits = jax.ShapeDtypeStruct((size, vocab), jnp.float32)
  converted, numbers = jax.closure_convert(
    lambda student, teacher, where: divergence(student, teacher, where=where),
    *(logits, logits, jax.ShapeDtypeStruct((size,), jnp.bool_)),
  )

  def of_chunk(shared: Any, chunk: _Chunk) -> jax.Array:
    heads, numbers = shared
    divergence = lambda *logits, where: converted(*logits, where, *numbers)
    return _of_chunk(divergence, heads, chunk).sum()

  return _total(of_chunk, (heads, numbers), chunks)


class _Head(NamedTuple):
  """A head in the dtype of its products, and in float32 for its gradients."""

  factor: jax.Array
  full: jax.Array
  bias: jax.Array | None


class _Chunk(NamedTuple):
  """The rows of a chunk; stacked along axis 0, those of all chunks."""

  student: jax.Array
  teacher: jax.Array
  valid: jax.Array
  weights: jax.Array | None


def _prepare(
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
) -> tuple[tuple[_Head, _Head], _Chunk, Callable[[jax.Array], jax.Array]]:
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
  rows = _Chunk(hidden_s, hidden_t, everything, weights)
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
) -> tuple[jax.Array, _Head]:
  """Hidden states and head in the dtype in which they are multiplied."""
  low = hidden.dtype == head.dtype == jnp.bfloat16
  dtype = jnp.bfloat16 if low else jnp.float32
  full = head.astype(jnp.float32)
  factor = lax.stop_gradient(head.astype(dtype))
  return hidden.astype(dtype), _Head(factor, full, bias)


def _of_chunk(
  divergence: Callable[..., jax.Array],
  heads: tuple[_Head, _Head],
  chunk: _Chunk,
) -> jax.Array:
  """The values of a chunk's tokens, float32."""
  valid = chunk.valid
  student = _logits(chunk.student, heads[0])
  teacher = _logits(chunk.teacher, heads[1])
  loss = jnp.asarray(divergence(student, teacher, where=valid), jnp.float32)
  if loss.shape != valid.shape:
    raise ValueError(
      f"divergence gives shape {loss.shape} for logits of {valid.shape[0]} "
      f"tokens; it should give one value per token, {valid.shape}"
    )
  loss = checks.masked(loss, valid)
  return loss if chunk.weights is None else chunk.weights * loss


def _logits(rows: jax.Array, head: _Head) -> jax.Array:
  logits = _matmul(rows, head.factor, head.full)
  return logits if head.bias is None else logits + head.bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
  of_chunk: Callable[[Any, _Chunk], jax.Array], shared: Any, chunks: _Chunk
) -> jax.Array:
  """The sum of of_chunk(shared, chunk), scalars, over the chunks.

  Differentiated, it computes the gradients along with it: those of what the
  chunks share add up, in the dtype of that, those of the chunks are stacked.
  """
  return lax.map(functools.partial(of_chunk, shared), chunks).sum()


def _total_forward(
  of_chunk: Callable[[Any, _Chunk], jax.Array], shared: Any, chunks: Any
) -> tuple[jax.Array, Any]:
  def take(tree: Any, asked: bool) -> Any:
    """The arrays whose gradients are asked for, or the others; else None."""
    return jax.tree.map(
      lambda x: x.value if x.perturbed == asked else None, tree
    )

  def join(tree: Any, moved: Any, fixed: Any) -> Any:
    return jax.tree.map(
      lambda x, m, f: m if x.perturbed else f, tree, moved, fixed
    )

  def add(grads: Any, chunk: tuple[Any, Any]) -> tuple[Any, Any]:
    moved, fixed = chunk

    def loss(of_all: Any, own: Any) -> jax.Array:
      return of_chunk(
        join(shared, of_all, take(shared, False)), join(chunks, own, fixed)
      )

    value, (to_shared, to_chunk) = jax.value_and_grad(loss, argnums=(0, 1))(
      take(shared, True), moved
    )
    return jax.tree.map(jnp.add, grads, to_shared), (value, to_chunk)

  to_shared, (values, to_chunks) = lax.scan(
    add,
    jax.tree.map(jnp.zeros_like, take(shared, True)),
    (take(chunks, True), take(chunks, False)),
  )
  # What is saved has to be the same tree whatever is asked for, so what is not
  # is saved as well, without entries.
  saved = jax.tree.map(
    lambda x, grad: (
      grad[..., None]
      if x.perturbed
      else jnp.zeros((*x.value.shape, 0), x.value.dtype)
    ),
    (shared, chunks),
    (to_shared, to_chunks),
  )
  return values.sum(), saved


def _total_backward(
  of_chunk: Callable[[Any, _Chunk], jax.Array], saved: Any, gradient: jax.Array
) -> Any:
  def scaled(grad: jax.Array) -> jax.Array | None:
    if not jnp.issubdtype(grad.dtype, jnp.floating):
      return None
    if not grad.shape[-1]:
      return jnp.zeros(grad.shape[:-1], grad.dtype)
    return (gradient * grad[..., 0]).astype(grad.dtype)

  return jax.tree.map(scaled, saved)


_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)


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
