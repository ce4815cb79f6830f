"""Divergences of two linear heads, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _sums as sums, _tokens as tokens


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
  heads, chunks, join = tokens.prepare(
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
  heads, chunks, _ = tokens.prepare(
    *(student_hidden, student_head, teacher_hidden, teacher_head),
    divergence=divergence,
    chunk_size=chunk_size,
    teacher_index=teacher_index,
    student_bias=student_bias,
    teacher_bias=teacher_bias,
    where=where,
    weights=weights,
  )
  size, vocab = chunks.valid.shape[1], heads[0].full.shape[1]
  rows = tokens.block(size, vocab)
  # A custom derivative sees arguments alone: numbers of the divergence that
  # are traced, such as its temperature, have to be among them.
  logits = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
  converted, numbers = jax.closure_convert(
    lambda student, teacher, where: tokens.values(
      divergence, student, teacher, where
    ),
    *(logits, logits, jax.ShapeDtypeStruct((rows,), jnp.bool_)),
  )

  def of_block(numbers: Any, block: tokens.Chunk) -> jax.Array:
    loss = converted(block.student, block.teacher, block.valid, *numbers)
    return tokens.weighted(loss, block).sum()

  def of_chunk(shared: Any, chunk: tokens.Chunk) -> jax.Array:
    heads, numbers = shared
    chunk = tokens.with_logits(heads, chunk)
    if rows == size:
      return of_block(numbers, chunk)
    return sums.total(of_block, numbers, jax.tree.map(blocks, chunk))

  def blocks(x: jax.Array) -> jax.Array:
    missing = [(0, -size % rows)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, missing).reshape(-1, rows, *x.shape[1:])

  return sums.total(of_chunk, (heads, numbers), chunks)


def _of_chunk(
  divergence: Callable[..., jax.Array],
  heads: tuple[tokens.Head, tokens.Head],
  chunk: tokens.Chunk,
) -> jax.Array:
  """The values of a chunk's tokens, float32."""
  chunk = tokens.with_logits(heads, chunk)
  loss = tokens.values(divergence, chunk.student, chunk.teacher, chunk.valid)
  return tokens.weighted(loss, chunk)
