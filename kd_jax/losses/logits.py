"""Losses on logits, or labels, that are not divergences of two predictions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kd_jax.losses import (
  _arguments as arguments,
  _checks as checks,
  _numerics as numerics,
  divergences,
)


def logit_mse(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  form: str = "paper",
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared distance of the logits.

    loss = 1/2 sum_c [z_s(c) - z_t(c)]^2        form="paper"
    loss = 1/C sum_c [z_s(c) - z_t(c)]^2        form="mean"

  Needs no temperature and asks for more than `kl`: also the logits' common
  offset, and the differences between unlikely classes. For logits with mean 0,
  `kl` tends to 1/C times form="paper" as the temperature grows. There is no
  released code of the paper; libraries take the mean over the C classes.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    teacher_logits: the same shape. Gradients flow into it as well.
    form: "paper" or "mean".
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient.

  Returns:
    [...] float32, one value per example. Classes that are -inf on both sides
    count as absent; -inf on one side only is taken as -1e5.

  Raises:
    ValueError: if the shapes differ, or `form` is none of the two.
    TypeError: if the logits are not floating point, or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 2.0]])
    >>> print(logit_mse(student, teacher))
    [2.]

  Reference: Ba and Caruana 2014, arXiv:1312.6184, Sec. 2.2; after Bucila,
  Caruana and Niculescu-Mizil 2006, Model Compression (KDD).
  """
  checks.choice("form", form, "paper", "mean")
  student, teacher, where = checks.logit_pair(
    student_logits, teacher_logits, axis=axis, where=where
  )
  in_student, in_teacher = numerics.present(student), numerics.present(teacher)
  difference = jnp.where(in_student, student, numerics.LOG_ZERO) - jnp.where(
    in_teacher, teacher, numerics.LOG_ZERO
  )
  total = jnp.sum(difference**2, axis)
  if form == "paper":
    loss = total / 2.0
  else:
    classes = jnp.sum(in_student | in_teacher, axis)
    loss = total / jnp.maximum(classes, 1)
  return checks.masked(loss, where)


def cross_entropy(
  student_logits: ArrayLike,
  labels: ArrayLike,
  *,
  smoothing: ArrayLike = 0.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Cross-entropy with class numbers or class distributions.

    loss = -sum_c [(1 - s) y(c) + s / C] log q(c)
    q = softmax(student_logits),   y = one-hot(labels), or labels

  The hard-label term beside a distillation loss, and the loss of the control.
  With s > 0, label smoothing. Soft targets at a temperature are better given
  to `kl`: same gradient, but accurate, 0 at equality and with its T^2.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    labels: [...] integers from 0 to classes - 1; or [..., classes] float,
      probabilities (logits there are refused if they can be seen to be none,
      that is outside `jit`). Gradients flow into the latter.
    smoothing: scalar s, 0 <= s <= 1, may be traced.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient, and
      their labels may be anything, for example -100.

  Returns:
    [...] float32, one value per example. NaN for a traced label that is no
    class, and for a traced smoothing out of range. Classes with a logit of
    -inf count as absent; a label there costs 1e5, not infinity.

  Raises:
    ValueError: if the shapes do not fit, a label that is not traced is no
      class, or `smoothing` is not from 0 to 1.
    TypeError: if the logits are not floating point, the labels are class
      numbers in a dtype that is not integer, or `where` is not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> logits, labels = jnp.zeros((2, 4)), jnp.array([3, -100])
    >>> loss = cross_entropy(logits, labels, where=labels >= 0)
    >>> print([f"{x:.2f}" for x in loss])
    ['1.39', '0.00']

  Reference: label smoothing: Szegedy et al. 2015, arXiv:1512.00567, Sec. 7.
  """
  (student,) = checks.floats(student_logits=student_logits)
  shape = checks.example_shape("student_logits", student, axis)
  where = checks.valid(where, shape)
  smoothing = checks.fraction("smoothing", smoothing)
  (student,) = checks.select(where, student, axis=axis)
  log_q = numerics.log_softmax(student, 1.0, axis)

  dtype = checks.dtype("labels", labels)
  if jnp.issubdtype(dtype, jnp.integer):
    if jnp.shape(labels) != shape:
      raise ValueError(
        f"labels has shape {jnp.shape(labels)} and student_logits has shape "
        f"{student.shape}; integer labels should have shape {shape}"
      )
    index, known = checks.class_labels(labels, student.shape[axis], where)
    index = jnp.expand_dims(index, axis)
    hard = -jnp.take_along_axis(log_q, index, axis).squeeze(axis) * known
  elif jnp.issubdtype(dtype, jnp.floating):
    if jnp.shape(labels) == shape:
      raise TypeError(
        f"labels has dtype {dtype} and the shape of class numbers, {shape}; "
        "class numbers should be integers"
      )
    (labels,) = checks.floats(labels=labels)
    checks.same_shape(student_logits=student, labels=labels)
    (labels,) = checks.select(where, labels, axis=axis)
    if checks.is_known(labels) and np.any(np.asarray(labels) < 0.0):
      raise ValueError(
        f"labels holds {np.asarray(labels).min():g}; it should hold "
        "probabilities (of logits, take jax.nn.softmax first, or call kl)"
      )
    hard = -jnp.sum(labels * log_q, axis)
  else:
    raise TypeError(
      f"labels has dtype {dtype}; it should be integer (class numbers) or "
      "float (class distributions)"
    )

  here = numerics.present(student)
  classes = jnp.maximum(jnp.sum(here, axis), 1)
  uniform = -jnp.sum(jnp.where(here, log_q, 0.0), axis) / classes
  return checks.masked((1.0 - smoothing) * hard + smoothing * uniform, where)


def virtual_teacher(
  student_logits: ArrayLike,
  labels: ArrayLike,
  *,
  correct_probability: ArrayLike = 0.99,
  form: str = "released",
  temperature: ArrayLike = 1.0,
  teacher_temperature: ArrayLike = 20.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Teacher-free distillation: a made-up teacher that is right and soft.

    loss = T^2 1/C sum_c p(c) [log p(c) - log q(c)]      form="released"
           with p = softmax(v / T_t)
    loss = T^2 sum_c p(c) [log p(c) - log q(c)]          form="paper"
           with p = softmax(log v / T_t)
    v(y) = a, v(c) = (1 - a) / (C - 1) for c other than y
    q = softmax(student_logits / T)

  A regulariser for networks without a teacher, beside the hard-label loss;
  label smoothing is the case T = T_t = 1 of form="paper", to a constant.

  Code and paper are further apart than by a factor. The authors' code softens
  probabilities as if they were logits, so that at T_t = 20 its teacher is
  nearly uniform, leaves the student at T = 1, and takes the mean over classes
  (times a multiplier, 100 for the 100 classes of CIFAR-100). The paper softens
  student and teacher alike, T = T_t = 20, and has no T^2: divide the weight by
  400 for its equation.

  Args:
    student_logits: [..., classes] any float dtype, classes along `axis`.
    labels: [...] integers from 0 to classes - 1, the true classes y.
    correct_probability: scalar a, the virtual teacher's probability of the
      true class before softening; from 0 to 1, in form="paper" without the
      ends; may be traced.
    form: "released" or "paper".
    temperature: scalar T > 0, the student's; may be traced.
    teacher_temperature: scalar T_t > 0, may be traced.
    axis: the class axis.
    where: [...] bool; entries that are False are 0 and get no gradient, and
      their labels may be anything, for example -100.

  Returns:
    [...] float32, one value per example, never negative. Classes with a logit
    of -inf are not counted in C, unless they are the label. NaN if a traced
    scalar is out of range, or a traced label no class.

  Raises:
    ValueError: if the shapes do not fit, a label that is not traced is no
      class, a scalar is out of range, or `form` is none of the two.
    TypeError: if the logits are not floating point, the labels not integer,
      or `where` not boolean.

  Example:
    >>> import jax.numpy as jnp
    >>> logits, labels = jnp.array([[4.0, 0.0, 0.0]]), jnp.array([0])
    >>> loss = virtual_teacher(
    ...   logits, labels, form="paper", temperature=20.0
    ... )
    >>> print([f"{x:.2f}" for x in loss])
    ['0.20']

  Reference: Yuan et al. 2020 (Tf-KD), arXiv:1909.11723, Sec. 4.
  """
  checks.choice("form", form, "released", "paper")
  (student,) = checks.floats(student_logits=student_logits)
  shape = checks.example_shape("student_logits", student, axis)
  where = checks.valid(where, shape)
  (student,) = checks.select(where, student, axis=axis)
  is_true, known = arguments.true_class(labels, student, axis, where)
  if form == "paper":
    correct = checks.open_fraction(
      "correct_probability", correct_probability, "log 0 cannot be softened"
    )
  else:
    correct = checks.fraction("correct_probability", correct_probability)
  here = numerics.present(student) | is_true
  classes = here.sum(axis, keepdims=True)
  others = (1.0 - correct) / jnp.maximum(classes - 1, 1)
  teacher = jnp.where(is_true, correct, others)
  if form == "paper":
    teacher = jnp.log(teacher)
  loss = divergences.kl(
    student,
    jnp.where(here, teacher, -jnp.inf),
    temperature=temperature,
    teacher_temperature=checks.positive(
      "teacher_temperature", teacher_temperature
    ),
    axis=axis,
    where=where,
  )
  if form == "released":
    loss /= classes.squeeze(axis)
  return loss * known
