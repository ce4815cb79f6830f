"""From per-example losses to one scalar: terms, masked global means, weights.

A mean over devices and accumulation steps is the global sum over the global
count. A mean of local means differs from it as soon as two devices hold
different numbers of valid examples.
"""

from collections.abc import Mapping
import dataclasses
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
  """One named part of a loss, before reduction.

  Attributes:
    value: [...] float, one value per example (or token, or anchor).
    where: [...] bool of the same shape, or None for all. Entries that are
      False count neither in the sum nor in the mean's denominator.
    weight: scalar that multiplies the mean. May be traced: a schedule is a
      weight that depends on the step.
    count: scalar or None. If given, `value` is a scalar already: the sum of
      this many entries, as `losses.linear_divergence_sum` gives it. It is the
      mean's denominator, taken as a constant, and `where` stays None.
  """

  value: jax.Array
  where: jax.Array | None = None
  weight: ArrayLike = 1.0
  count: ArrayLike | None = None


def sum_and_count(
  value: jax.Array,
  where: jax.Array | None = None,
  count: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The sum of the valid entries and how many they are.

  Args:
    value: [...] float, per-example values.
    where: [...] bool of the same shape. Masked entries are selected away
      before the sum, so a NaN there reaches neither value nor gradient.
    count: scalar, if `value` is the scalar sum of so many entries already.

  Returns:
    (float32 sum, float32 count), both scalars.

  Raises:
    TypeError: if `value` is not floating point or `where` is not boolean.
    ValueError: if the shapes differ, or there is a count and `value` or it is
      no scalar, or there is a mask beside it.
  """
  value = jnp.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(f"value has dtype {value.dtype}; it should be a float")
  value = value.astype(jnp.float32)
  if count is not None:
    if where is not None:
      raise ValueError("count and where are given; it should be one of the two")
    for name, x in (("value", value), ("count", count)):
      if jnp.shape(x):
        raise ValueError(
          f"{name} has shape {jnp.shape(x)}; with a count it should be a scalar"
        )
    return value, lax.stop_gradient(jnp.asarray(count, jnp.float32))
  if where is None:
    return jnp.sum(value), jnp.asarray(value.size, jnp.float32)
  where = jnp.asarray(where)
  if where.dtype != jnp.bool_:
    raise TypeError(f"where has dtype {where.dtype}; it should be bool")
  if where.shape != value.shape:
    raise ValueError(
      f"where has shape {where.shape}; it should have the shape of value, "
      f"{value.shape}"
    )
  count = jnp.sum(where, dtype=jnp.float32)
  return jnp.sum(jnp.where(where, value, 0.0)), count


def divide(total: jax.Array, count: jax.Array) -> jax.Array:
  """`total / count`, and exactly 0 where nothing was counted."""
  none = count == 0
  return jnp.where(none, 0.0, total / jnp.where(none, 1.0, count))


def masked_mean(
  value: jax.Array,
  where: jax.Array | None = None,
  *,
  axis_name: str | None = None,
) -> jax.Array:
  """The mean over valid entries, over all devices if `axis_name` is given.

  Args:
    value: [...] float, per-example values.
    where: [...] bool of the same shape, or None.
    axis_name: the mapped axis of `pmap` or `shard_map`; under `jit` arrays are
      global already and it stays None.

  Returns:
    float32 scalar: global sum / global count, 0 if nothing is valid.

  Example:
    >>> import jax.numpy as jnp
    >>> where = jnp.array([True, True, False])
    >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), where))
    2.0
  """
  total, count = sum_and_count(value, where)
  if axis_name is not None:
    total, count = lax.psum((total, count), axis_name)
  return divide(total, count)


def total(
  terms: Mapping[str, Term], *, axis_name: str | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The weighted sum of the terms' means.

    loss = sum_k weight_k * (sum_i value_ki / count_k)

  This is what the training step computes; it is here for those who write
  their own step.

  Args:
    terms: named terms; each has its own mask, so its own count.
    axis_name: see `masked_mean`.

  Returns:
    (float32 scalar, the unweighted mean of each term by name).

  Raises:
    ValueError: if there is no term.
  """
  if not terms:
    raise ValueError("terms is empty; it should hold at least one Term")
  pairs = {
    name: sum_and_count(term.value, term.where, term.count)
    for name, term in terms.items()
  }
  if axis_name is not None:
    pairs = lax.psum(pairs, axis_name)
  means = {name: divide(*pair) for name, pair in pairs.items()}
  loss = sum(terms[name].weight * mean for name, mean in means.items())
  return jnp.asarray(loss, jnp.float32), means


def linear(
  step: ArrayLike,
  start: ArrayLike,
  end: ArrayLike,
  *,
  steps: int,
  begin: int = 0,
) -> jax.Array:
  """A weight that goes from `start` to `end` in a straight line, then stays.

  Args:
    step: the current step, scalar integer, may be traced.
    start: the weight up to step `begin`.
    end: the weight from step `begin + steps` on.
    steps: length of the ramp, positive.
    begin: the step at which the ramp begins.

  Returns:
    float32 scalar.

  Raises:
    ValueError: if `steps` is not positive.

  Example:
    >>> float(linear(5, 1.0, 0.0, steps=10))
    0.5
  """
  done = _progress(step, begin, steps)
  return _between(start, end, done)


def cosine(
  step: ArrayLike,
  start: ArrayLike,
  end: ArrayLike,
  *,
  steps: int,
  begin: int = 0,
) -> jax.Array:
  """As `linear`, along half a cosine: slow at both ends.

  Args:
    step: the current step, scalar integer, may be traced.
    start: the weight up to step `begin`.
    end: the weight from step `begin + steps` on.
    steps: length of the ramp, positive.
    begin: the step at which the ramp begins.

  Returns:
    float32 scalar.

  Raises:
    ValueError: if `steps` is not positive.

  Example:
    >>> round(float(cosine(5, 1.0, 0.0, steps=10)), 6)
    0.5
  """
  done = _progress(step, begin, steps)
  done = (1.0 - jnp.cos(math.pi * done)) / 2.0
  return _between(start, end, done)


def _between(start: ArrayLike, end: ArrayLike, done: jax.Array) -> jax.Array:
  first, last = jnp.float32(start), jnp.float32(end)
  return first + (last - first) * done


def _progress(step: ArrayLike, begin: int, steps: int) -> jax.Array:
  if steps <= 0:
    raise ValueError(f"steps is {steps}; it should be positive")
  done = (jnp.asarray(step, jnp.float32) - begin) / steps
  return jnp.clip(done, 0.0, 1.0)
