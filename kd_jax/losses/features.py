"""Hidden features, compared entry by entry or by their direction.

Student and teacher have the same shape here: where their widths differ, a
learned projection of the student's features comes first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import _checks as checks, _numerics as numerics


def hint(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  *,
  form: str = "mean",
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared distance of hidden features.

    loss = mean (s - t)^2        form="mean"
    loss = 1/2 sum (s - t)^2     form="paper"

  The plainest loss on features, for any layer: the mean or sum is over all
  entries of an example. Libraries agree on the mean, whose size does not
  depend on the layer; the paper has half the squared norm. It also asks for
  the features' scale, so let a projection or normalisation go before it.

  Args:
    student_features: [batch, ...] any float dtype.
    teacher_features: the same shape. Gradients flow into it as well.
    form: "mean" or "paper".
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, never negative.

  Raises:
    ValueError: if the shapes differ, or `form` is none of the two.
    TypeError: if the features are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 2.0]])
    >>> print(hint(student, teacher), hint(student, teacher, form="paper"))
    [2.] [2.]

  Reference: Romero et al. 2015 (FitNets), arXiv:1412.6550, Sec. 2.2.
  """
  checks.choice("form", form, "mean", "paper")
  (student, teacher), where = checks.examples(
    where,
    "[batch, ...]",
    student_features=student_features,
    teacher_features=teacher_features,
  )
  squares = (student - teacher) ** 2
  axes = tuple(range(1, squares.ndim))
  loss = squares.mean(axes) if form == "mean" else squares.sum(axes) / 2.0
  return checks.masked(loss, where)


def cosine_distance(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  *,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """One minus the cosine of the angle between the features.

    loss = 1 - sum_i s(i) t(i) / (||s|| ||t||)

  For directions that matter and lengths that do not; DistilBERT has it on the
  hidden state of every token that is not padding. From 0 to 2. A zero vector
  has no direction: its cosine with anything counts as 0, as in PyTorch, and
  it gets no gradient.

  Args:
    student_features: [..., width] any float dtype, vectors along `axis`.
    teacher_features: the same shape. Gradients flow into it as well.
    axis: the axis of the vectors.
    where: [...] bool, the shape without `axis`; entries that are False are 0
      and get no gradient.

  Returns:
    [...] float32, one value per vector.

  Raises:
    ValueError: if the shapes differ.
    TypeError: if the features are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> teacher = jnp.array([[1.0, 0.0], [5.0, 0.0], [-1.0, -1.0]])
    >>> print([f"{x:.2f}" for x in cosine_distance(student, teacher)])
    ['0.00', '1.00', '2.00']

  Reference: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, Sec. 2.
  """
  student, teacher = checks.floats(
    student_features=student_features, teacher_features=teacher_features
  )
  checks.same_shape(student_features=student, teacher_features=teacher)
  shape = checks.example_shape("student_features", student, axis)
  where = checks.valid(where, shape)
  student, teacher = checks.select(where, student, teacher, axis=axis)
  u, v = numerics.unit(student, axis), numerics.unit(teacher, axis)
  # Half the squared chord keeps its digits where 1 - cos would cancel. It
  # takes a zero vector's missing length for closeness, 1/2 for each of them.
  loss = jnp.sum((u - v) ** 2, axis) / 2.0
  for direction in (u, v):
    loss += jnp.where(jnp.any(direction != 0.0, axis), 0.0, 0.5)
  return checks.masked(loss, where)


def patient_hidden(
  student_hidden: ArrayLike,
  teacher_hidden: ArrayLike,
  *,
  form: str = "released",
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared distance of hidden states scaled to length 1.

    u = s / ||s||,   v = t / ||t||
    loss = mean (u - v)^2        form="released"
    loss = sum (u - v)^2         form="paper"

  For the states of the [CLS] token in several layers of student and teacher,
  stacked along the second axis; vectors are scaled along the last one. The
  released code takes the mean over layers and width, the paper sums over both,
  and their weights beta (500 in the code) belong to the one or the other.

  Args:
    student_hidden: [batch, ..., width] any float dtype.
    teacher_hidden: the same shape. Gradients flow into it as well.
    form: "released" or "paper".
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, never negative. A zero vector stays 0, without gradient.

  Raises:
    ValueError: if the shapes differ, or `form` is none of the two.
    TypeError: if the states are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[3.0, 4.0], [0.0, 2.0]]])
    >>> teacher = jnp.array([[[4.0, 3.0], [0.0, 1.0]]])
    >>> loss = patient_hidden(student, teacher, form="paper")
    >>> print([f"{x:.3f}" for x in loss])
    ['0.080']

  Reference: Sun et al. 2019 (PKD), arXiv:1908.09355, Sec. 3.2.
  """
  checks.choice("form", form, "released", "paper")
  (student, teacher), where = checks.examples(
    where,
    "[batch, ...]",
    student_hidden=student_hidden,
    teacher_hidden=teacher_hidden,
  )
  squares = (numerics.unit(student) - numerics.unit(teacher)) ** 2
  axes = tuple(range(1, squares.ndim))
  loss = squares.mean(axes) if form == "released" else squares.sum(axes)
  return checks.masked(loss, where)


def factor_transfer(
  student_factor: ArrayLike,
  teacher_factor: ArrayLike,
  *,
  p: int = 1,
  form: str = "released",
  where: ArrayLike | None = None,
) -> jax.Array:
  """Distance of paraphrased features, each example scaled to length 1.

    u = s / ||s||_2,   v = t / ||t||_2
    loss = mean |u - v|^p        form="released"
    loss = ||u - v||_p           form="paper"

  The teacher's factor comes from a paraphraser, an autoencoder trained on its
  features beforehand, the student's from a translator trained along with the
  student; both networks are the caller's. Norms and mean are over all entries
  of an example. The released code has p = 1 only, the paper p = 1 and 2.

  Args:
    student_factor: [batch, ...] any float dtype.
    teacher_factor: the same shape. Gradients flow into it as well.
    p: 1 or 2, static.
    form: "released" or "paper".
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32, never negative. A zero factor stays 0, without gradient.

  Raises:
    ValueError: if the shapes differ, or `p` or `form` is none of the two.
    TypeError: if the factors are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[3.0, 4.0]]), jnp.array([[8.0, 6.0]])
    >>> print([f"{x:.2f}" for x in factor_transfer(student, teacher)])
    ['0.20']

  Reference: Kim et al. 2018, arXiv:1802.04977, Sec. 3.
  """
  if p not in (1, 2):
    raise ValueError(f"p is {p!r}; it should be 1 or 2")
  checks.choice("form", form, "released", "paper")
  (student, teacher), where = checks.examples(
    where,
    "[batch, ...]",
    student_factor=student_factor,
    teacher_factor=teacher_factor,
  )
  axes = tuple(range(1, student.ndim))
  gap = numerics.unit(student, axes) - numerics.unit(teacher, axes)
  gap = gap * jnp.sign(gap)  # |x| with gradient 0 at 0; jnp.abs has 1
  if form == "released":
    loss = jnp.mean(gap**p, axes)
  elif p == 1:
    loss = jnp.sum(gap, axes)
  else:
    loss = jnp.squeeze(numerics.norm(gap, axes), axes)
  return checks.masked(loss, where)


def vid(
  student_mean: ArrayLike,
  log_scale: ArrayLike,
  teacher_features: ArrayLike,
  *,
  form: str = "released",
  where: ArrayLike | None = None,
) -> jax.Array:
  """Negative log-likelihood of the teacher's features given the student's.

    v(c) = log(1 + exp(log_scale(c))) + 1e-5
    loss = 1/2 mean [(t - m)^2 / v + log v]      form="released"
    loss = 1/2 sum [(t - m)^2 / v + log v]       form="paper"

  A bound on the mutual information of teacher and student: m, a learned
  function of the student's features, predicts the teacher's with a variance
  v(c) learned for each channel, so that channels out of reach cost little.
  Without the constant log(2 pi) / 2. Not 0 at equality, and it may be negative.

  Args:
    student_mean: [batch, ..., channels] any float dtype, the prediction m.
    log_scale: [channels] any float dtype, trained with the student. The
      released code begins with v = 5: log_scale = log(exp(5 - 1e-5) - 1).
    teacher_features: the shape of `student_mean`. Gradients flow into it too.
    form: "released" (the mean over all entries of an example) or "paper".
    where: [batch] bool; entries that are False are 0 and get no gradient.

  Returns:
    [batch] float32.

  Raises:
    ValueError: if the shapes do not fit, or `form` is none of the two.
    TypeError: if an array is not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> mean, teacher = jnp.zeros((1, 2)), jnp.array([[1.0, 2.0]])
    >>> log_scale = jnp.full(2, jnp.log(jnp.exp(5.0) - 1.0))
    >>> print([f"{x:.2f}" for x in vid(mean, log_scale, teacher)])
    ['1.05']

  Reference: Ahn et al. 2019 (VID), arXiv:1904.05835, Sec. 2; the authors' code
  as RepDistiller has it.
  """
  checks.choice("form", form, "released", "paper")
  (mean, teacher), where = checks.examples(
    where,
    "[batch, ...]",
    student_mean=student_mean,
    teacher_features=teacher_features,
  )
  (log_scale,) = checks.floats(log_scale=log_scale)
  if log_scale.shape != mean.shape[-1:]:
    raise ValueError(
      f"log_scale has shape {log_scale.shape} and student_mean has shape "
      f"{mean.shape}; log_scale should have shape {mean.shape[-1:]}, one "
      "number per channel"
    )
  variance = jax.nn.softplus(log_scale) + 1e-5
  terms = ((teacher - mean) ** 2 / variance + jnp.log(variance)) / 2.0
  axes = tuple(range(1, terms.ndim))
  loss = terms.mean(axes) if form == "released" else terms.sum(axes)
  return checks.masked(loss, where)
