"""Feature maps of convolutional networks, by what they say about space.

Channels come last. Where student and teacher differ in height and width, the
caller resizes one of them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks, _numerics as numerics


def attention_transfer(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  *,
  p: int = 2,
  form: str = "released",
  where: ArrayLike | None = None,
) -> jax.Array:
  """Distance of the maps of where the channels are active.

    a(x) = sum_c |s(x, c)|^p / ||sum_c |s(c)|^p||,   b(x) the same of t
    loss = mean_x [a(x) - b(x)]^2            form="released"
    loss = sqrt(sum_x [a(x) - b(x)]^2)       form="paper"

  What the student does with its channels is left to it, even how many there
  are. The released code takes the mean over the positions x of the squared
  difference; the paper the norm itself, with a weight of beta / 2. Weights for
  the one do not fit the other.

  Args:
    student_features: [batch, ..., channels] any float dtype; positions
      between batch and channels.
    teacher_features: the same shape except for the channels. Gradients flow
      into it as well.
    p: exponent, a static integer of at least 1. 2 in released code.
    form: "released" or "paper".
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, never negative. A map that is 0 everywhere stays 0,
    without gradient.

  Raises:
    ValueError: if the shapes do not fit, or `p` or `form` is none of these.
    TypeError: if the features are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[1.0, 1.0], [0.0, 0.0]]])  # 2 positions
    >>> teacher = jnp.array([[[0.0], [3.0]]])
    >>> print(attention_transfer(student, teacher))
    [1.]

  Reference: Zagoruyko and Komodakis 2017 (AT), arXiv:1612.03928, Sec. 3.1.
  """
  if not isinstance(p, int) or p < 1:
    raise ValueError(f"p is {p!r}; it should be an integer of at least 1")
  checks.choice("form", form, "released", "paper")
  student, teacher, where = _maps(student_features, teacher_features, where)
  gap = _attention(student, p) - _attention(teacher, p)
  if form == "released":
    loss = jnp.mean(gap**2, 1)
  else:
    loss = jnp.squeeze(numerics.norm(gap, 1), 1)
  return checks.masked(loss, where)


def nst(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  *,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Neuron selectivity transfer: the channels' maps as two sets.

    k(f, g) = (sum_x f(x) g(x))^2,   f, g: maps of one channel, ||f|| = 1
    loss = mean_cd k(s_c, s_d) + mean_cd k(t_c, t_d) - 2 mean_cd k(s_c, t_d)

  The squared maximum mean discrepancy, with the polynomial kernel of the
  released code (degree 2, offset 0), between the sets of places that the
  student's and the teacher's channels select. No channel needs a counterpart,
  and their numbers may differ. The released code leaves out the teacher's
  term, which is a constant to the student. The paper's factor lambda / 2 is
  the caller's. Takes memory for min(positions, channels of both)^2 numbers an
  example.

  Args:
    student_features: [batch, ..., channels] any float dtype; positions
      between batch and channels.
    teacher_features: the same shape except for the channels. Gradients flow
      into it as well.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, not negative up to rounding. A channel that is 0
    everywhere stays 0, without gradient.

  Raises:
    ValueError: if the shapes do not fit.
    TypeError: if the features are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[1.0], [0.0]]])  # 2 positions
    >>> teacher = jnp.array([[[5.0, 0.0], [0.0, 5.0]]])
    >>> loss = nst(student, teacher)
    >>> print([f"{x:.2f}" for x in loss])  # 1 + 1/2 - 2 * 1/2
    ['0.50']

  Reference: Huang and Wang 2017 (NST), arXiv:1707.01219, Sec. 4.
  """
  student, teacher, where = _maps(student_features, teacher_features, where)
  s, t = (
    numerics.unit(maps, 1) / math.sqrt(maps.shape[-1])
    for maps in (student, teacher)
  )
  positions, channels = student.shape[1], s.shape[-1] + t.shape[-1]
  if positions <= channels:
    # The kernel is the scalar product of f f^T and g g^T.
    gap = _product("nxc,nyc->nxy", s, s) - _product("nxc,nyc->nxy", t, t)
    return checks.masked(jnp.sum(gap**2, (1, 2)), where)
  both = jnp.concatenate([s, t], -1)
  sign = jnp.where(jnp.arange(channels) < s.shape[-1], 1.0, -1.0)
  kernel = _product("nxc,nxd->ncd", both, both) ** 2
  loss = jnp.sum(kernel * sign[:, None] * sign, (1, 2))
  return checks.masked(loss, where)


def fsp(
  student_pair: tuple[ArrayLike, ArrayLike],
  teacher_pair: tuple[ArrayLike, ArrayLike],
  *,
  form: str = "paper",
  where: ArrayLike | None = None,
) -> jax.Array:
  """Flow of solution procedure: how one layer's channels go with another's.

    G(i, j) = mean_x f(x, i) g(x, j),   f, g: the earlier and the later map
    loss = sum_ij [G_s(i, j) - G_t(i, j)]^2       form="paper"
    loss = mean_ij [G_s(i, j) - G_t(i, j)]^2      form="mean"

  For the first and last map of a stage, in a stage of training of its own
  before the labels are used. If the two maps of a network differ in height or
  width, the larger is pooled to the size of the smaller: by maxima for "paper",
  by means for "mean", which is RepDistiller's form. There is no released code;
  another library sums the norms of the columns of G_s - G_t.

  Args:
    student_pair: two arrays, the earlier and the later map,
      [batch, height, width, channels] any float dtype.
    teacher_pair: two arrays with the student's channels, map by map; height
      and width may be others. Gradients flow into them as well.
    form: "paper" or "mean".
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, never negative.

  Raises:
    ValueError: if the shapes do not fit, or `form` is none of the two.
    TypeError: if an argument is no pair, an array is not floating point, or
      `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 2, 2, 1))
    >>> print(fsp((ones, 3 * ones), (ones, ones)))
    [4.]

  Reference: Yim et al. 2017, A Gift from Knowledge Distillation (CVPR), Sec.
  3.2 to 4; summarised in Gou et al. 2020, arXiv:2006.05525, Sec. 2.3.
  """
  checks.choice("form", form, "paper", "mean")
  named: dict[str, ArrayLike] = {}
  pairs = {"student_pair": student_pair, "teacher_pair": teacher_pair}
  for name, pair in pairs.items():
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
      raise TypeError(
        f"{name} should be two arrays, the earlier and the later map"
      )
    named |= {f"{name}[{i}]": x for i, x in enumerate(pair)}
  arrays = checks.floats(**named)
  shapes = [x.shape for x in arrays]
  if not (
    all(len(shape) == 4 and 0 not in shape[1:] for shape in shapes)
    and len({shape[0] for shape in shapes}) == 1
    and [shape[3] for shape in shapes[:2]] == [shape[3] for shape in shapes[2:]]
  ):
    raise ValueError(
      f"student_pair has shapes {shapes[0]} and {shapes[1]}, and teacher_pair "
      f"has shapes {shapes[2]} and {shapes[3]}; they should be [batch, height, "
      "width, channels], of one batch size, and the teacher's channels should "
      "equal the student's, map by map"
    )
  where = checks.valid(where, shapes[0][:1])
  arrays = checks.select(where, *arrays)
  reduce = jnp.max if form == "paper" else jnp.mean
  gap = _flow(arrays[:2], reduce) - _flow(arrays[2:], reduce)
  loss = (jnp.sum if form == "paper" else jnp.mean)(gap**2, (1, 2))
  return checks.masked(loss, where)


def cwd(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Channel-wise distillation: KL divergence of each channel over space.

    p(x, c) = exp(t(x, c) / T) / sum_y exp(t(y, c) / T),   q the same of s
    loss = T^2 mean_c sum_x p(x, c) [log p(x, c) - log q(x, c)]

  For dense prediction: every channel, of a hidden layer or of the logits, is a
  distribution over the positions x, and the student learns where the teacher's
  peaks are. The offset of a channel does not count.

  Args:
    student_features: [batch, ..., channels] any float dtype; positions
      between batch and channels.
    teacher_features: the same shape. Gradients flow into it as well.
    temperature: scalar T > 0, may be traced.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, never negative. NaN if a traced temperature is not
    positive and finite.

  Raises:
    ValueError: if the shapes differ, or the temperature is not positive.
    TypeError: if the features are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.zeros((1, 2, 2, 1))
    >>> teacher = jnp.array([9.0, 0.0, 0.0, 0.0]).reshape(1, 2, 2, 1)
    >>> print([f"{x:.2f}" for x in cwd(student, teacher, temperature=3.0)])
    ['7.72']

  Reference: Shu et al. 2021 (CWD), arXiv:2011.13256, Sec. 3.2.
  """
  student, teacher, where = _maps(
    student_features, teacher_features, where, same=True
  )
  temperature = checks.positive("temperature", temperature)
  p, q, _, _, log_ratio = numerics.softmax_pair(
    student, teacher, temperature, None, axis=1
  )
  terms = numerics.excess(p, q, log_ratio)
  loss = temperature**2 * jnp.mean(terms.sum(1), -1)
  return checks.masked(loss, where)


def hierarchical_context(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  *,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared distance of two maps on several scales at once.

    d_l = mean [pool_l(s) - pool_l(t)]^2,   pool_l: means over an l x l grid
    loss = (d + d_4 / 2 + d_2 / 4 + d_1 / 8) / (1 + 1/2 + 1/4 + 1/8)

  ReviewKD's distance, for fused maps that hold both detail and context; d is
  that of the maps as they are. As in the released code, a grid is left out
  unless l < height, and the weights halve over those that remain: with height
  4, (d + d_2 / 2 + d_1 / 4) / (1 + 1/2 + 1/4). The paper names the pyramid,
  the code its weights.

  Args:
    student_features: [batch, height, width, channels] any float dtype.
    teacher_features: the same shape. Gradients flow into it as well.
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, never negative.

  Raises:
    ValueError: if the shapes differ.
    TypeError: if the features are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([2.0, -2.0, 2.0, -2.0]).reshape(1, 2, 2, 1)
    >>> teacher = jnp.zeros((1, 2, 2, 1))
    >>> loss = hierarchical_context(student, teacher)
    >>> print([f"{x:.2f}" for x in loss])  # (4 + 0 / 2) / (1 + 1/2)
    ['2.67']

  Reference: Chen et al. 2021 (ReviewKD), arXiv:2104.09044, Sec. 3.3.
  """
  (student, teacher), where = checks.examples(
    where,
    "[batch, height, width, channels]",
    student_features=student_features,
    teacher_features=teacher_features,
  )
  gap = student - teacher
  total, weight, weights = jnp.mean(gap**2, (1, 2, 3)), 1.0, 1.0
  for level in (4, 2, 1):
    if level < gap.shape[1]:
      weight /= 2.0
      pooled = _pool(gap, (level, level), jnp.mean)
      total += weight * jnp.mean(pooled**2, (1, 2, 3))
      weights += weight
  return checks.masked(total / weights, where)


def _maps(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  where: ArrayLike | None,
  *,
  same: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Checked, masked, and with all positions in one axis.

  Returns:
    ([batch, positions, channels], the same of the teacher, mask). The
    channels may differ in number unless `same` is True.
  """
  (student, teacher), where = checks.examples(
    where,
    "[batch, ..., channels]",
    same=same,
    student_features=student_features,
    teacher_features=teacher_features,
  )
  if student.shape[:-1] != teacher.shape[:-1]:
    raise ValueError(
      f"student_features has shape {student.shape} and teacher_features has "
      f"shape {teacher.shape}; they should be [batch, ..., channels], equal in "
      "all axes but the last"
    )
  shape = (student.shape[0], math.prod(student.shape[1:-1]))
  student = student.reshape(*shape, student.shape[-1])
  return student, teacher.reshape(*shape, teacher.shape[-1]), where


def _attention(maps: jax.Array, p: int) -> jax.Array:
  """[batch, positions, channels] to [batch, positions], of length 1."""
  # The length does not depend on the scale, so it is divided out before:
  # powers then neither overflow nor vanish.
  top = lax.stop_gradient(jnp.max(jnp.abs(maps), (1, 2), keepdims=True))
  maps = maps / jnp.where(top == 0.0, 1.0, top)
  size = maps * jnp.sign(maps)  # |x| with gradient 0 at 0; jnp.abs has 1
  return numerics.unit(jnp.mean(size**p, -1), 1)


def _flow(
  pair: Sequence[jax.Array], reduce: Callable[..., jax.Array]
) -> jax.Array:
  """The FSP matrix, [batch, channels of the first, of the second]."""
  size = min(x.shape[1] for x in pair), min(x.shape[2] for x in pair)
  first, second = (_pool(x, size, reduce) for x in pair)
  return _product("nhwi,nhwj->nij", first, second) / math.prod(size)


def _pool(
  maps: jax.Array, size: tuple[int, int], reduce: Callable[..., jax.Array]
) -> jax.Array:
  """Adaptive pooling of [batch, height, width, channels] to a height and width.

  Window i of n reaches from floor(i N / n) to ceil((i + 1) N / n): equal parts
  if n divides N, overlapping ones if not.
  """
  for axis, n in zip((1, 2), size, strict=True):
    old = maps.shape[axis]
    if n == old:
      continue
    windows = [
      lax.slice_in_dim(maps, i * old // n, -(-(i + 1) * old // n), axis=axis)
      for i in range(n)
    ]
    maps = jnp.stack([reduce(window, axis) for window in windows], axis)
  return maps


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """A sum of products in full float32; accelerators round to fewer bits."""
  return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)
