"""One target from several models: ensembles of teachers, and of peers."""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kd_jax.losses import _checks as checks, _numerics as numerics
from kd_jax.targets import _inputs as inputs


def ensemble(
  teacher_logits: ArrayLike,
  *,
  weights: ArrayLike | None = None,
  space: str = "probability",
  temperature: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The mean of several teachers, as the logits of one.

    softmax(target / T) = sum_m w_m softmax(z_m / T)     space="probability"
    target = sum_m w_m z_m                               space="logit"

  The arithmetic mean is what an ensemble predicts, and what the born-again
  ensemble averages. The mean of logits is the geometric mean of the
  probabilities, normalised again, at whatever temperature: a class has to be
  likely for every member. (The mean of log-probabilities differs from it by a
  constant for each example, that is not at all.) Codes of online distillation
  mix logits where the papers mix probabilities: ONE weights logits by a gate,
  `space="logit", weights=gate`.

  A class that some members lack has probability 0 for these: it exists for the
  arithmetic mean if any member of positive weight has it, for the geometric
  mean if all of these have it.

  Args:
    teacher_logits: [members, ..., classes] any float dtype, classes along
      `axis`, which is not the first.
    weights: [members], or [members, ...] for weights that depend on the
      example; float, not negative. They are divided by their sum. None: equal.
    space: "probability" or "logit".
    temperature: scalar T > 0, may be traced; space="logit" does not need it.
    axis: the class axis of `teacher_logits`.
    where: [...] bool; entries that are False get no gradient.

  Returns:
    [..., classes] float32, the target. NaN if a traced temperature is not
    positive and finite, or traced weights are negative or all 0.

  Raises:
    ValueError: if a shape does not fit, weights are negative or all 0, `space`
      is none of the two, or the temperature is not positive.
    TypeError: if an array has the wrong dtype.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> teachers = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
    >>> for space in ("probability", "logit"):
    ...   target = ensemble(teachers, space=space)
    ...   print([f"{p:.2f}" for p in jax.nn.softmax(target)])
    ['0.70', '0.30']
    ['0.75', '0.25']

  Reference: Hinton et al. 2015, arXiv:1503.02531, Sec. 1 (both means);
  Furlanello et al. 2018 (born-again ensembles), arXiv:1805.04770, Sec. 3.1;
  Zhu et al. 2018 (ONE), arXiv:1806.04606.
  """
  z, mask, axis = _members("teacher_logits", teacher_logits, axis, where)
  temperature = _space_and_temperature(space, temperature)
  if weights is None:
    weights = jnp.ones(z.shape[0])
  w = _shares("teacher_logits", z, weights, axis, mask)
  return _mean(z, jnp.expand_dims(w, axis), space, temperature, axis)


def peers(
  logits: ArrayLike,
  *,
  weights: ArrayLike | None = None,
  space: str = "probability",
  temperature: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """For each of several students, the mean of the others.

    softmax(target_i / T) = sum_m w_im softmax(z_m / T)  space="probability"
    target_i = sum_m w_im z_m                            space="logit"
    w_im = [m != i] / (members - 1)                      unless given

  The teacher of a student in online distillation. Deep mutual learning has two
  forms: the mean of the divergences to each peer, which is `kl` for each pair,
  and the divergence to the mean of the peers, which is this. Peers are held
  fixed there: wrap the target in `jax.lax.stop_gradient`. With all weights
  equal, `jnp.ones((members, members))`, every student gets the same ensemble,
  itself included. OKDDip's weights are attention from student i to m; its
  paper mixes probabilities, its code logits.

  Args:
    logits: [members, ..., classes] any float dtype, classes along `axis`,
      which is not the first; one set of logits for each student.
    weights: [members, members], row i what student i takes from each, or
      [members, members, ...] if that depends on the example; float, not
      negative. Rows are divided by their sum. None: equal among the others.
    space: "probability" or "logit".
    temperature: scalar T > 0, may be traced; space="logit" does not need it.
    axis: the class axis of `logits`.
    where: [...] bool; entries that are False get no gradient.

  Returns:
    [members, ..., classes] float32: target i is for student i.

  Raises:
    ValueError: if a shape does not fit, there is only one member, weights are
      negative or a row of them is all 0, `space` is none of the two, or the
      temperature is not positive.
    TypeError: if an array has the wrong dtype.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> students = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]]))
    >>> targets = jax.lax.stop_gradient(peers(students))
    >>> print([f"{p:.2f}" for p in jax.nn.softmax(targets)[:, 0]])
    ['0.60', '0.80', '0.70']

  Reference: Zhang et al. 2017 (DML), arXiv:1706.00384, Sec. 2.3; Chen et al.
  2019 (OKDDip), arXiv:1912.00350.
  """
  z, mask, axis = _members("logits", logits, axis, where)
  temperature = _space_and_temperature(space, temperature)
  members = z.shape[0]
  if members < 2:
    raise ValueError(
      f"logits has shape {z.shape}; it should hold at least two members along "
      "axis 0"
    )
  if weights is None:
    weights = 1.0 - np.eye(members, dtype=np.float32)
  w = _shares("logits", z, weights, axis, mask, receivers=(members,))
  mean = lambda row: _mean(
    z, jnp.expand_dims(row, axis), space, temperature, axis
  )
  return jax.vmap(mean)(w)


def _members(
  name: str, array: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None, int]:
  """Checks [members, ..., classes]; (array, mask, positive class axis)."""
  (z,) = checks.floats(**{name: array})
  shape = checks.example_shape(name, z, axis)
  axis %= z.ndim
  if axis == 0 or z.shape[0] == 0:
    raise ValueError(
      f"{name} has shape {z.shape}, and axis is {axis}; axis 0 should be the "
      "members, at least one, and axis another"
    )
  mask = checks.valid(where, shape[1:])
  if mask is not None:
    (z,) = checks.select(mask[None], z, axis=axis)
  return z, mask, axis


def _space_and_temperature(space: str, temperature: ArrayLike) -> jax.Array:
  if space not in ("probability", "logit"):
    raise ValueError(
      f'space is {space!r}; it should be "probability" or "logit"'
    )
  return checks.positive("temperature", temperature)


def _shares(
  name: str,
  z: jax.Array,
  weights: ArrayLike,
  axis: int,
  mask: jax.Array | None,
  receivers: tuple[int, ...] = (),
) -> jax.Array:
  """The weights divided by their sum over members: [receivers, members, ...].

  The axes of the examples have size 1 where the weights do not depend on them.
  """
  examples = z.shape[1:axis] + z.shape[axis + 1 :]
  short = (*receivers, z.shape[0])
  (w,) = checks.floats(weights=weights)
  if w.shape not in (short, short + examples):
    shapes = " or ".join(
      f"{s}" for s in dict.fromkeys((short, short + examples))
    )
    raise ValueError(
      f"weights has shape {w.shape} and {name} has shape {z.shape}; weights "
      f"should have shape {shapes}"
    )
  if w.shape == short:
    w = w.reshape(short + (1,) * len(examples))
  elif mask is not None:
    w = jnp.where(mask, w, 1.0)
  over = len(receivers)
  total = w.sum(over, keepdims=True)
  fits = ((w >= 0.0) & (w < jnp.inf)).all(over, keepdims=True) & (total > 0.0)
  if checks.is_known(fits) and not fits.all():
    raise ValueError(
      "weights should be finite, not negative, and not all 0 over the members; "
      f"they are from {w.min()} to {w.max()}"
    )
  return jnp.where(fits, w / jnp.where(total == 0.0, 1.0, total), jnp.nan)


def _mean(
  z: jax.Array,
  w: jax.Array,
  space: str,
  temperature: jax.Array,
  axis: int,
) -> jax.Array:
  """The weighted mean over axis 0; `w` sums to 1 there."""
  here = numerics.present(z)
  counts = w != 0.0
  if space == "logit":
    mean = (w * jnp.where(here, z, 0.0)).sum(0)
    return inputs.absent(mean, ~(counts & ~here).any(0))
  # As in softmax, whose value does not depend on the shift.
  top = lax.stop_gradient(
    jnp.max(jnp.where(here, z, numerics.ABSENT), axis, keepdims=True)
  )
  gap = jnp.where(here, z - top, 0.0) / temperature
  total = jnp.where(here, jnp.exp(gap), 0.0).sum(axis, keepdims=True)
  # Member m has p_m = exp(gap) / total. The sum of the shares w / total does
  # not depend on the class: dividing by it only adds a constant to the target.
  share = w / jnp.where(total == 0.0, 1.0, total)
  share = share / share.sum(0)
  # At high temperatures all gaps are small, and the logarithm of a sum that
  # is nearly 1 keeps its digits only if the 1 is never added.
  excess = (share * jnp.where(here, jnp.expm1(gap), -1.0)).sum(0)
  near = excess > -0.5
  log_near = jnp.log1p(jnp.where(near, excess, 0.0))
  best = jnp.max(jnp.where(here & counts, gap, -jnp.inf), 0)
  exists = best != -jnp.inf  # so also where it is NaN
  best = lax.stop_gradient(jnp.where(exists, best, 0.0))
  # A member of weight 0 may be above the best of the others, by so much that
  # the exponential overflows, and with it the gradient by the weight.
  below = jnp.where(counts, gap - best, jnp.minimum(gap - best, 40.0))
  rest = (share * jnp.where(here, jnp.exp(below), 0.0)).sum(0)
  log_far = best + jnp.log(jnp.where(exists & ~near, rest, 1.0))
  return inputs.absent(temperature * jnp.where(near, log_near, log_far), exists)
