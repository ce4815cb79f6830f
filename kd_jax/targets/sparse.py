"""The teacher at a few classes: what is worth storing of a large vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks, _numerics as numerics
from kd_jax.targets import _inputs as inputs


class TopK(NamedTuple):
  """The teacher's likeliest classes.

  Attributes:
    indices: [..., k] int32, the classes, the likeliest first.
    log_probs: [..., k] float32, their log-probabilities at the temperature.
    log_tail: [...] float32, log of the probability of all other classes.
  """

  indices: jax.Array
  log_probs: jax.Array
  log_tail: jax.Array


class Samples(NamedTuple):
  """Classes drawn for the teacher.

  Attributes:
    indices: [..., count] int32, the classes, with repetitions.
    log_probs: [..., count] float32, the teacher's log-probabilities there.
    weights: [..., count] float32: the sum of weights * f(indices) has the
      mean of f over the teacher's distribution as its expectation.
  """

  indices: jax.Array
  log_probs: jax.Array
  weights: jax.Array


def top_k(
  teacher_logits: ArrayLike,
  k: int,
  *,
  temperature: ArrayLike = 1.0,
  where: ArrayLike | None = None,
) -> TopK:
  """The teacher's k likeliest classes and what is left for the others.

    log_probs = the k largest log p(c),   p = softmax(teacher_logits / T)
    log_tail = log(1 - sum of the k largest p(c))

  For a teacher whose outputs are stored. Keep the tail, or at least do not
  divide the k by their sum: that calls the other classes impossible, and a
  student learns to be too sure. The tail is summed from its own classes, so it
  is right where the k leave less than rounding. Log-probabilities at one
  temperature give no others, unless k is the number of classes: store those
  that will be asked for.

  Args:
    teacher_logits: [..., classes] any float dtype, classes last.
    k: how many, from 1 to the number of classes.
    temperature: scalar T > 0, may be traced.
    where: [...] bool; entries that are False get no gradient.

  Returns:
    `TopK`, for `losses.topk_kl`. Where there are less than k classes, the
    missing ones have -inf, and so has a tail without classes.

  Raises:
    ValueError: if k or the temperature is out of range, or the mask has
      another shape.
    TypeError: if an array has the wrong dtype, or k is not a whole number.

  Example:
    >>> import jax.numpy as jnp
    >>> teacher = jnp.log(jnp.array([0.1, 0.6, 0.05, 0.25]))
    >>> kept = top_k(teacher, 2)
    >>> print(kept.indices, [f"{p:.2f}" for p in jnp.exp(kept.log_probs)])
    [1 3] ['0.60', '0.25']
    >>> print(f"{jnp.exp(kept.log_tail):.2f}")  # topk_kl sums it anew
    0.15
    >>> from kd_jax import losses
    >>> loss = losses.topk_kl(teacher, kept.log_probs, indices=kept.indices)
    >>> print(f"{loss:.2f}")
    0.00

  Reference: Anshumann et al. 2025, arXiv:2503.16870 (what is wrong with the
  top k alone).
  """
  (teacher,), _ = inputs.logits(where, -1, teacher_logits=teacher_logits)
  k = inputs.count("k", k, teacher.shape[-1])
  temperature = checks.positive("temperature", temperature)
  here = numerics.present(teacher)
  log_p = numerics.log_softmax(teacher, temperature, -1)
  _, indices = lax.top_k(teacher, k)
  kept = inputs.absent(
    jnp.take_along_axis(log_p, indices, -1),
    jnp.take_along_axis(here, indices, -1),
  )
  taken = jnp.put_along_axis(
    jnp.zeros(teacher.shape, bool), indices, True, -1, inplace=False
  )
  tail = here & ~taken
  best = jnp.max(jnp.where(tail, log_p, -jnp.inf), -1)
  some = best != -jnp.inf
  best = lax.stop_gradient(jnp.where(some, best, 0.0))
  gap = jnp.where(tail, log_p - best[..., None], 0.0)
  rest = jnp.where(tail, jnp.exp(gap), 0.0).sum(-1)
  log_tail = inputs.absent(best + jnp.log(jnp.where(some, rest, 1.0)), some)
  return TopK(indices, kept, log_tail)


def importance_samples(
  teacher_logits: ArrayLike,
  key: jax.Array,
  count: int,
  *,
  temperature: ArrayLike = 1.0,
  proposal_temperature: ArrayLike = 1.0,
  where: ArrayLike | None = None,
) -> Samples:
  """Classes drawn at random, weighted so that expectations are the teacher's.

    p = softmax(teacher_logits / T),   r = softmax(teacher_logits / (T P))
    indices ~ r, independently
    weights = p(indices) / (count r(indices))

  For a teacher whose outputs are stored: a dozen classes out of a vocabulary
  give the gradient of the full loss in expectation, which no number of top
  classes does. P, the proposal's temperature, is 1 over the power t of the
  paper's proposal p^t: with P > 1 rare classes are drawn more often, and weigh
  less. With P = 1 all weights are 1 / count. The weights are not divided by
  their sum: that would bring a bias, of order 1 / count, for P other than 1.

  Args:
    teacher_logits: [..., classes] any float dtype, classes last.
    key: a key of `jax.random`. Each example gets its own draws.
    count: how many draws for each example, at least 1.
    temperature: scalar T > 0, may be traced.
    proposal_temperature: scalar P > 0, may be traced.
    where: [...] bool; entries that are False get no gradient.

  Returns:
    `Samples`, for `losses.sampled_kl`. Gradients flow into the log-
    probabilities and weights of the classes that were drawn. Absent classes
    are not drawn; where all are absent, the weights are 0.

  Raises:
    ValueError: if `count` or a temperature is out of range, or the mask has
      another shape.
    TypeError: if an array has the wrong dtype, or `count` is not a whole
      number.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> teacher = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> drawn = importance_samples(teacher, jax.random.key(0), 5000)
    >>> estimate = jnp.bincount(drawn.indices, drawn.weights, length=3)
    >>> bool(jnp.all(jnp.abs(estimate - jnp.exp(teacher)) < 0.03))
    True

  Reference: Anshumann et al. 2025 (random sampling KD), arXiv:2503.16870.
  """
  (teacher,), _ = inputs.logits(where, -1, teacher_logits=teacher_logits)
  count = inputs.count("count", count)
  temperature = checks.positive("temperature", temperature)
  proposal_temperature = checks.positive(
    "proposal_temperature", proposal_temperature
  )
  here = numerics.present(teacher)
  log_p = numerics.log_softmax(teacher, temperature, -1)
  log_r = numerics.log_softmax(teacher, temperature * proposal_temperature, -1)
  indices = _draw(lax.stop_gradient(log_r), key, count)
  drawn = jnp.take_along_axis(here, indices, -1)
  at = lambda array: jnp.take_along_axis(array, indices, -1)
  weights = jnp.exp(at(log_p) - at(log_r)) / count
  return Samples(
    indices,
    inputs.absent(at(log_p), drawn),
    jnp.where(drawn, weights, 0.0),
  )


def _draw(log_r: jax.Array, key: jax.Array, count: int) -> jax.Array:
  """[..., count] int32 classes, drawn from exp(log_r).

  Inverts the distribution function. It is summed from the rarest class up, so
  that rare classes are not lost in the rounding of the sum, and classes
  without mass come before everything that can be drawn. Gumbel noise would
  need a random number for each class and draw, and in float32 never draws a
  class with a probability below 1e-7.
  """
  order = jnp.argsort(log_r, -1)
  mass = jnp.exp(jnp.take_along_axis(log_r, order, -1))
  edges = jnp.cumsum(mass, -1)
  shape = (*log_r.shape[:-1], count)
  coarse, fine = (jax.random.uniform(k, shape) for k in jax.random.split(key))
  # `uniform` has 23 bits; near 0 that is not enough for rare classes.
  u = (coarse + 2.0**-23 * fine) * edges[..., -1:]
  find = lambda edges, u: jnp.searchsorted(edges, u, side="right")
  classes = log_r.shape[-1]
  place = jax.vmap(find)(edges.reshape(-1, classes), u.reshape(-1, count))
  place = jnp.minimum(place, classes - 1).reshape(shape)
  return jnp.take_along_axis(order, place, -1)
