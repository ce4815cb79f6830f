"""Attention maps, relations between tokens, and hidden states of transformers.

One value per query token. `where` [batch, queries] says which queries count,
`key_where` [batch, keys] which keys: a masked key is in no softmax and no mean,
and what is there, NaN included, has no effect. No padding is averaged in.
"""

from __future__ import annotations

import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks, _numerics as numerics


def attention_mse(
  student_attention: ArrayLike,
  teacher_attention: ArrayLike,
  *,
  where: ArrayLike | None = None,
  key_where: ArrayLike | None = None,
) -> jax.Array:
  """Squared distance of the attention scores before the softmax.

    loss = mean_h mean_k [a_s(h, k) - a_t(h, k)]^2,   a = q k^T / sqrt(d)

  For a student with as many heads as the teacher; `relation_kl` needs no such
  thing. Scores before the softmax are what the paper found to converge faster
  than attention maps. They are compared as they are, so they should carry the
  same scale 1 / sqrt(d) on both sides.

  A key counts if it is not masked and its score is not -inf on both sides (a
  causal mask); -inf on one side only is taken as -1e5. Scores to which a model
  has added -1e4 for padding are finite: name that padding in `key_where`. The
  released code takes all scores up to -100 for masked, sets them to 0 and
  divides by all keys and queries, padding included; without padding it agrees.

  Args:
    student_attention: [batch, heads, queries, keys] any float dtype.
    teacher_attention: the same shape. Gradients flow into it as well.
    where: [batch, queries] bool; entries that are False are 0 and get no
      gradient.
    key_where: [batch, keys] bool; None: all keys, so for self-attention over
      padded tokens give the mask twice.

  Returns:
    [batch, queries] float32; 0 for a query without any key.

  Raises:
    ValueError: if the shapes differ, or a mask does not fit.
    TypeError: if the scores are not floating point, or a mask not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[[1.0, 2.0, 9.0]]]])
    >>> teacher = jnp.array([[[[3.0, 2.0, 0.0]]]])
    >>> padding = jnp.array([[True, True, False]])
    >>> print(attention_mse(student, teacher, key_where=padding))
    [[2.]]

  Reference: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, Eq. 7.
  """
  student, teacher, where = _attention_pair(
    student_attention, teacher_attention, where, key_where
  )
  in_student, in_teacher = numerics.present(student), numerics.present(teacher)
  difference = jnp.where(in_student, student, numerics.LOG_ZERO) - jnp.where(
    in_teacher, teacher, numerics.LOG_ZERO
  )
  keys = jnp.sum(in_student | in_teacher, -1)
  by_head = jnp.sum(difference**2, -1) / jnp.maximum(keys, 1)
  return checks.masked(by_head.mean(1), where)


def attention_kl(
  student_attention: ArrayLike,
  teacher_attention: ArrayLike,
  *,
  where: ArrayLike | None = None,
  key_where: ArrayLike | None = None,
) -> jax.Array:
  """KL divergence from the teacher's to the student's attention maps.

    loss = mean_h sum_k p(h, k) [log p(h, k) - log q(h, k)]
    p = softmax_k(teacher_attention),   q = softmax_k(student_attention)

  What a query looks at, rather than the scores' size: the first half of
  MiniLM, on the last layer alone, with `value_relation` beside it; MobileBERT
  uses it on every layer. It needs as many heads in the student as in the
  teacher. MobileBERT's code leaves out the teacher's entropy, which is the
  same gradient for the student, and counts padded queries.

  Args:
    student_attention: [batch, heads, queries, keys] any float dtype, scores
      before the softmax (logarithms of attention maps will do as well).
    teacher_attention: the same shape. Gradients flow into it as well.
    where: [batch, queries] bool; entries that are False are 0 and get no
      gradient.
    key_where: [batch, keys] bool; None: all keys. Scores of -inf, or with -1e4
      added, are out of the softmax without it.

  Returns:
    [batch, queries] float32, never negative; 0 for a query without any key,
    large (log 0 is -1e5) where only the student rules a key out.

  Raises:
    ValueError: if the shapes differ, or a mask does not fit.
    TypeError: if the scores are not floating point, or a mask not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[[0.0, 0.0, 9.0]]]])
    >>> teacher = jnp.array([[[[0.0, 2.0, 0.0]]]])
    >>> padding = jnp.array([[True, True, False]])
    >>> loss = attention_kl(student, teacher, key_where=padding)
    >>> print(f"{loss[0, 0]:.3f}")
    0.328

  Reference: Wang et al. 2020 (MiniLM), arXiv:2002.10957, Sec. 3.1; Sun et al.
  2020 (MobileBERT), arXiv:2004.02984, Sec. 3.5.
  """
  student, teacher, where = _attention_pair(
    student_attention, teacher_attention, where, key_where
  )
  return checks.masked(_kl(student, teacher), where)


def value_relation(
  student_values: ArrayLike,
  teacher_values: ArrayLike,
  *,
  where: ArrayLike | None = None,
  key_where: ArrayLike | None = None,
) -> jax.Array:
  """KL divergence of how the value vectors of the tokens relate.

    loss = mean_h sum_k p(h, k) [log p(h, k) - log q(h, k)]
    p = softmax_k(<v_t, v_t(k)> / sqrt(d_t)),   q the same from v_s

  The second half of MiniLM, beside `attention_kl`, on the last layer. Widths
  of a head may differ, the number of heads may not. The authors released no
  code; as they say of theirs, padding is masked in these relations too.

  Args:
    student_values: [batch, heads, tokens, student_head_dim] any float dtype.
    teacher_values: [batch, heads, tokens, teacher_head_dim] any float dtype.
      Gradients flow into it as well.
    where: [batch, tokens] bool; entries that are False are 0 and get no
      gradient.
    key_where: [batch, tokens] bool, the tokens that are related to; None:
      those of `where`, since padding is padding on both sides.

  Returns:
    [batch, tokens] float32, never negative; 0 for a token without any key.

  Raises:
    ValueError: if the shapes do not fit, or a mask does not.
    TypeError: if the values are not floating point, or a mask not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[[1.0], [1.0]]]])  # [1, 1, 2, 1]
    >>> teacher = jnp.array([[[[1.0, 0.0], [0.0, 2.0]]]])
    >>> print([f"{x:.3f}" for x in value_relation(student, teacher)[0]])
    ['0.059', '0.478']

  Reference: Wang et al. 2020 (MiniLM), arXiv:2002.10957, Sec. 3.2.
  """
  student, teacher = checks.floats(
    student_values=student_values, teacher_values=teacher_values
  )
  _same_heads(student_values=student, teacher_values=teacher)
  (student, teacher), _ = checks.examples(
    None,
    "[batch, heads, tokens, head_dim]",
    output_ndim=3,
    same=False,
    student_values=student,
    teacher_values=teacher,
  )
  return _relation_kl(student, teacher, where, key_where)


def relation_kl(
  student_vectors: ArrayLike,
  teacher_vectors: ArrayLike,
  *,
  num_heads: int,
  where: ArrayLike | None = None,
  key_where: ArrayLike | None = None,
) -> jax.Array:
  """KL divergence of how queries, keys or values relate, in equal heads.

    loss = mean_h sum_k p(h, k) [log p(h, k) - log q(h, k)]
    p = softmax_k(<x_t, x_t(k)> / sqrt(d_t)),   q the same from x_s
    x: a token's vector in head h of num_heads, d = width / num_heads wide

  MiniLMv2: call it on the queries, the keys and the values of one layer and
  add the three. The vectors of all attention heads are concatenated and cut
  anew, so widths and numbers of attention heads may differ. More relation heads
  tell more: the paper takes 48 for base-size teachers, 64 for large ones.

  Args:
    student_vectors: [batch, tokens, student_width] any float dtype.
    teacher_vectors: [batch, tokens, teacher_width] any float dtype. Gradients
      flow into it as well.
    num_heads: the number of relation heads; divides both widths.
    where: [batch, tokens] bool; entries that are False are 0 and get no
      gradient.
    key_where: [batch, tokens] bool, the tokens that are related to; None:
      those of `where`, since padding is padding on both sides.

  Returns:
    [batch, tokens] float32, never negative; 0 for a token without any key.

  Raises:
    ValueError: if the shapes do not fit, a mask does not, or num_heads does
      not divide a width.
    TypeError: if the vectors are not floating point, a mask not boolean, or
      num_heads no int.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[1.0, 1.0], [1.0, 1.0]]])  # [1, 2, 2]
    >>> teacher = jnp.array([[[1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 2.0]]])
    >>> loss = relation_kl(student, teacher, num_heads=2)
    >>> print([f"{x:.3f}" for x in loss[0]])
    ['0.059', '0.478']

  Reference: Wang et al. 2021 (MiniLMv2), arXiv:2012.15828, Sec. 3.
  """
  if not isinstance(num_heads, int) or isinstance(num_heads, bool):
    raise TypeError(f"num_heads is {num_heads!r}; it should be an int")
  (student, teacher), _ = checks.examples(
    None,
    "[batch, tokens, width]",
    output_ndim=2,
    same=False,
    student_vectors=student_vectors,
    teacher_vectors=teacher_vectors,
  )
  for name, x in (("student_vectors", student), ("teacher_vectors", teacher)):
    if num_heads < 1 or x.shape[-1] % num_heads:
      raise ValueError(
        f"num_heads is {num_heads} and {name} has shape {x.shape}; it should "
        "be above 0 and divide the last axis"
      )
  student, teacher = (
    jnp.stack(jnp.split(x, num_heads, 2), 1) for x in (student, teacher)
  )
  return _relation_kl(student, teacher, where, key_where)


def hidden_mse(
  student_hidden: ArrayLike,
  teacher_hidden: ArrayLike,
  *,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared distance of the hidden states of each token.

    loss = 1/d sum_i [h_s(i) - h_t(i)]^2

  TinyBERT's loss on embeddings and on the outputs of layers, MobileBERT's
  feature-map transfer. A student of another width is projected first, by a
  learned matrix that belongs to the training and is not kept. MobileBERT's
  code normalises both states to mean 0 and variance 1 before: do so to have
  its form. Both codes count padded tokens; here `where` leaves them out.

  Args:
    student_hidden: [batch, tokens, width] any float dtype.
    teacher_hidden: the same shape. Gradients flow into it as well.
    where: [batch, tokens] bool; entries that are False are 0 and get no
      gradient.

  Returns:
    [batch, tokens] float32, one value per token.

  Raises:
    ValueError: if the shapes differ, or the mask does not fit.
    TypeError: if the states are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[1.0, 2.0], [5.0, 5.0]]])
    >>> teacher = jnp.array([[[3.0, 2.0], [0.0, 0.0]]])
    >>> print(hidden_mse(student, teacher, where=jnp.array([[True, False]])))
    [[2. 0.]]

  Reference: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, Eq. 8; Sun et al.
  2020 (MobileBERT), arXiv:2004.02984, Sec. 3.5.
  """
  (student, teacher), where = checks.examples(
    where,
    "[batch, tokens, width]",
    output_ndim=2,
    student_hidden=student_hidden,
    teacher_hidden=teacher_hidden,
  )
  return checks.masked(jnp.mean((student - teacher) ** 2, -1), where)


def _attention_pair(
  student_attention: ArrayLike,
  teacher_attention: ArrayLike,
  where: ArrayLike | None,
  key_where: ArrayLike | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Checked scores in float32: masked queries at 0, masked keys at -inf."""
  student, teacher = checks.floats(
    student_attention=student_attention, teacher_attention=teacher_attention
  )
  _same_heads(student_attention=student, teacher_attention=teacher)
  (student, teacher), _ = checks.examples(
    None,
    "[batch, heads, queries, keys]",
    student_attention=student,
    teacher_attention=teacher,
  )
  batch, _, queries, keys = student.shape
  mask = checks.valid(where, (batch, queries))
  key_mask = _key_mask(key_where, (batch, keys))
  if mask is not None:
    valid = mask[:, None, :, None]
    student, teacher = (jnp.where(valid, x, 0.0) for x in (student, teacher))
  student, teacher = (_mask_keys(x, key_mask) for x in (student, teacher))
  return student, teacher, mask


def _same_heads(**arrays: jax.Array) -> None:
  """ValueError, with advice, if [batch, heads, ...] differ in their heads."""
  (first, student), (second, teacher) = arrays.items()
  if student.ndim == teacher.ndim == 4 and student.shape[1] != teacher.shape[1]:
    raise ValueError(
      f"{first} has shape {student.shape} and {second} has shape "
      f"{teacher.shape}; their heads, axis 1, should be as many: for others "
      "use relation_kl on the queries, keys and values"
    )


def _key_mask(
  key_where: ArrayLike | None, shape: tuple[int, int]
) -> jax.Array | None:
  if key_where is None:
    return None
  mask = jnp.asarray(key_where)
  if mask.dtype != jnp.bool_:
    raise TypeError(f"key_where has dtype {mask.dtype}; it should be bool")
  if mask.shape != shape:
    raise ValueError(
      f"key_where has shape {mask.shape}; it should be [batch, keys], {shape} "
      "(nothing is broadcast)"
    )
  return mask


def _mask_keys(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
  """[batch, heads, queries, keys] scores, at -inf for masked keys."""
  if mask is None:
    return scores
  return jnp.where(mask[:, None, None], scores, -jnp.inf)


def _relation_kl(
  student: jax.Array,
  teacher: jax.Array,
  where: ArrayLike | None,
  key_where: ArrayLike | None,
) -> jax.Array:
  """The loss of [batch, heads, tokens, head_dim] vectors of two widths."""
  batch, _, tokens, _ = student.shape
  mask = checks.valid(where, (batch, tokens))
  key_mask = _key_mask(key_where, (batch, tokens))
  if key_where is None:
    key_mask = mask

  def scores(x: jax.Array) -> jax.Array:
    # Queries and keys are selected apart: a token may be one and not the other.
    a, b = (
      x if m is None else jnp.where(m[:, None, :, None], x, 0.0)
      for m in (mask, key_mask)
    )
    # Accelerators would round float32 factors to 8 or 11 bits by default.
    products = jnp.matmul(a, b.swapaxes(2, 3), precision=lax.Precision.HIGHEST)
    return _mask_keys(products / math.sqrt(x.shape[-1]), key_mask)

  return checks.masked(_kl(scores(student), scores(teacher)), mask)


def _kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """[batch, queries]: KL over keys of [batch, heads, queries, keys] scores."""
  p, q, _, _, log_ratio = numerics.softmax_pair(
    student, teacher, jnp.ones(()), None, -1
  )
  terms = numerics.excess(p, q, log_ratio)
  return terms.sum(-1).mean(1)
