"""Relations: what examples, positions or nodes are to each other.

A relation followed by a divergence or a distance is a distillation loss; those
of `kd_jax.losses` are made so, and a new one is a few lines. The neighbours of
each example as the teacher sees them, softly, are to be the student's:

  >>> import jax, jax.numpy as jnp
  >>> from kd_jax import losses, relate
  >>> def neighbour_kl(student, teacher, *, temperature=0.1):
  ...   itself = jnp.eye(len(student), dtype=bool)  # no neighbour of its own
  ...   rows = [relate.gram(x, cosine=True) for x in (student, teacher)]
  ...   rows = [jnp.where(itself, -jnp.inf, row) for row in rows]
  ...   return losses.kl(*rows, temperature=temperature)  # [n], one per example
  >>> key = jax.random.key(0)
  >>> student = jax.random.normal(key, (5, 8))
  >>> teacher = jnp.concatenate([2 * student, jnp.zeros((5, 3))], axis=1)
  >>> print(jnp.round(neighbour_kl(student, teacher), 3))  # directions count
  [0. 0. 0. 0. 0.]

All functions are pure and compute in float32. Their gradients are finite where
examples coincide or vanish, and accurate for examples that lie close together.
"""

from __future__ import annotations

import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import (
  _batch as batch,
  _checks as checks,
  _numerics as numerics,
)


def gram(
  x: ArrayLike, y: ArrayLike | None = None, *, cosine: bool = False
) -> jax.Array:
  """Inner products or cosines of all pairs.

    r(i, j) = <x(i), y(j)>,   with cosine=True of x / ||x|| and y / ||y||

  Args:
    x: [n, ...] any float dtype; the axes after the first are flattened.
    y: [m, ...] any float dtype, as wide as x; None: x.
    cosine: whether only directions count.

  Returns:
    [n, m] float32. The cosine with a zero vector is 0, with gradient 0.

  Raises:
    ValueError: if x and y differ beyond the first axis, or have none there.
    TypeError: if one is not floating point.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    >>> print(gram(x))
    [[9. 0. 3.]
     [0. 4. 0.]
     [3. 0. 1.]]
    >>> print(gram(x, cosine=True)[0])
    [1. 0. 1.]
  """
  x, y = _pair(x, y)
  if cosine:
    x, y = numerics.unit(x), numerics.unit(y)
  return jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)


def distances(x: ArrayLike, y: ArrayLike | None = None) -> jax.Array:
  """Euclidean distances of all pairs.

    r(i, j) = ||x(i) - y(j)||

  From the differences themselves. The shorter way over inner products subtracts
  large numbers: far from the origin, or for a near pair, nothing is left.

  Args:
    x: [n, ...] any float dtype; the axes after the first are flattened.
    y: [m, ...] any float dtype, as wide as x; None: x.

  Returns:
    [n, m] float32, never negative. The gradient is 0 where the points coincide.

  Raises:
    ValueError: if x and y differ beyond the first axis, or have none there.
    TypeError: if one is not floating point.

  Example:
    >>> import jax.numpy as jnp
    >>> print(distances(jnp.array([[1000.0, 0.0], [1003.0, 4.0]])))
    [[0. 5.]
     [5. 0.]]
  """
  x, y = _pair(x, y)
  return batch.by_row(lambda one: numerics.norm(one - y)[:, 0], y.size, x)


def angles(x: ArrayLike, y: ArrayLike | None = None) -> jax.Array:
  """Cosines of the angles at each point between all pairs of others.

    r(j, i, k) = <e(i), e(k)>,   e(i) = (y(i) - x(j)) / ||y(i) - x(j)||

  Memory: n m^2 numbers for the result, n m width for the directions.

  Args:
    x: [n, ...] any float dtype, the middle points; the axes after the first
      are flattened.
    y: [m, ...] any float dtype, as wide as x, the outer points; None: x.

  Returns:
    [n, m, m] float32, the middle point first. 0, with gradient 0, where an
    outer point coincides with the middle one.

  Raises:
    ValueError: if x and y differ beyond the first axis, or have none there.
    TypeError: if one is not floating point.

  Example:
    >>> import jax.numpy as jnp
    >>> corner = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> print(jnp.round(angles(corner)[1], 2))  # 45 degrees between 0 and 2
    [[1.   0.   0.71]
     [0.   0.   0.  ]
     [0.71 0.   1.  ]]

  Reference: Park et al. 2019 (RKD), arXiv:1904.05068, Sec. 3.2.2.
  """
  x, y = _pair(x, y)
  directions = numerics.unit(y[None, :] - x[:, None])
  return jnp.einsum(
    "jid,jkd->jik", directions, directions, precision=lax.Precision.HIGHEST
  )


def attention_map(features: ArrayLike, p: ArrayLike = 2.0) -> jax.Array:
  """Where a CNN looks: the spatial attention of a feature map.

    r = a / ||a||,   a(position) = sum_c |features(position, c)|^p

  Args:
    features: [batch, ..., channels] any float dtype, with at least one axis
      of positions between the two, [batch, height, width, channels] say.
    p: scalar > 0, may be traced. A higher one looks at the peaks.

  Returns:
    [batch, positions] float32, rows of length 1; 0, with gradient 0, for an
    example that is 0 throughout. NaN if a traced p is not positive and finite.

  Raises:
    ValueError: if there is no axis of positions, or p is not positive.
    TypeError: if the features are not floating point.

  Example:
    >>> import jax.numpy as jnp
    >>> features = jnp.array([[[[1.0, 1.0], [2.0, 0.0]]]])  # one row of two
    >>> print(jnp.round(attention_map(features), 2))
    [[0.45 0.89]]

  Reference: Zagoruyko and Komodakis 2017 (AT), arXiv:1612.03928, Sec. 3.1.
  """
  (features,) = checks.floats(features=features)
  if features.ndim < 3 or 0 in features.shape[1:]:
    raise ValueError(
      f"features has shape {features.shape}; it should be [batch, ..., "
      "channels] with at least one axis of positions, and not empty"
    )
  p = checks.positive("p", p)
  positions = math.prod(features.shape[1:-1])
  x = features.reshape(features.shape[0], positions, features.shape[-1])
  # The map does not depend on the scale of its example, so that one cannot
  # overflow or vanish in the power.
  top = lax.stop_gradient(jnp.max(jnp.abs(x), (1, 2), keepdims=True))
  size = jnp.abs(x) / jnp.where(top == 0.0, 1.0, top)
  zero = size == 0.0
  powers = jnp.where(zero, 0.0, jnp.where(zero, 1.0, size) ** p)
  return numerics.unit(powers.sum(-1)) * (p / p)  # NaN for a p that is none


def segment_softmax(
  scores: ArrayLike, segment_ids: ArrayLike, num_segments: int
) -> jax.Array:
  """Softmax of the edges of a graph, over those of each node.

    r(e) = exp(s(e)) / sum over e' with the segment of e of exp(s(e'))

  The local structure of a graph: with a score per edge, how near a node is to
  each of its neighbours. Nodes may have any number of edges, and none.

  Args:
    scores: [edges, ...] any float dtype. An edge with -inf does not exist, for
      padding: it gets 0.
    segment_ids: [edges] integers from 0 to num_segments - 1, the node whose
      neighbourhood the edge belongs to, in any order.
    num_segments: the number of nodes.

  Returns:
    [edges, ...] float32; the edges of a segment sum to 1. NaN throughout if a
    traced id is out of range.

  Raises:
    ValueError: if the shapes do not fit, or an id that is not traced is out of
      range.
    TypeError: if the scores are not floating point, or the ids not integers.

  Example:
    >>> import jax.numpy as jnp
    >>> scores = jnp.log(jnp.array([1.0, 3.0, 7.0]))
    >>> print(jnp.round(segment_softmax(scores, jnp.array([0, 0, 2]), 3), 2))
    [0.25 0.75 1.  ]

  Reference: Yang et al. 2020 (LSP), arXiv:2003.10477, Sec. 3.
  """
  (scores,) = checks.floats(scores=scores)
  if scores.ndim < 1 or jnp.shape(segment_ids) != scores.shape[:1]:
    raise ValueError(
      f"segment_ids has shape {jnp.shape(segment_ids)} and scores has shape "
      f"{scores.shape}; they should be [edges] and [edges, ...]"
    )
  ids, known = checks.rows(
    "segment_ids", segment_ids, num_segments, f"num_segments is {num_segments}"
  )
  here = numerics.present(scores)
  # A softmax does not depend on the shift, nor does its gradient.
  top = jax.ops.segment_max(
    lax.stop_gradient(jnp.where(here, scores, numerics.ABSENT)),
    ids,
    num_segments,
  )
  shifted = jnp.where(here, scores - top[ids], 0.0)
  weights = jnp.where(here, jnp.exp(shifted), 0.0)
  total = jax.ops.segment_sum(weights, ids, num_segments)
  # 0 only where no edge exists.
  total = jnp.where(total == 0.0, 1.0, total)
  return weights / total[ids] * jnp.prod(known)


def _pair(x: ArrayLike, y: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
  """Both as [examples, width] float32."""
  (x,) = checks.floats(x=x)
  y = x if y is None else checks.floats(y=y)[0]
  if min(x.ndim, y.ndim) < 2 or x.shape[1:] != y.shape[1:] or 0 in x.shape[1:]:
    raise ValueError(
      f"x has shape {x.shape} and y has shape {y.shape}; they should be "
      "[n, ...] and [m, ...], equal and not empty beyond axis 0"
    )
  width = math.prod(x.shape[1:])
  return x.reshape(x.shape[0], width), y.reshape(y.shape[0], width)
