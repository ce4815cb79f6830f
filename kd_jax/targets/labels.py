"""Targets that know the right answer: mixed with labels, or made from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import (
  _arguments as arguments,
  _checks as checks,
  _numerics as numerics,
)
from kd_jax.targets import _inputs as inputs

# exp(-this) and its inverse are still within float32.
_FAR = 80.0


def mix_labels(
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  *,
  label_weight: ArrayLike,
  temperature: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The teacher's distribution mixed with the labels.

    softmax(target / T) = (1 - w) softmax(teacher_logits / T) + w y
    y = one-hot(labels), or labels

  With w going from 0 to 1 over the training, teacher annealing: from
  distillation to supervised learning, with one loss. (The paper has T = 1; it
  writes the teacher's weight.) The cross-entropy with this target is
  the sum of the soft and the hard loss with weights 1 - w and w, at one
  temperature. A teacher with all logits equal gives label smoothing: w is then
  1 minus the smoothing.

  Args:
    teacher_logits: [..., classes] any float dtype, classes along `axis`.
    labels: [...] integers from 0 to classes - 1; or [..., classes] float,
      rows that sum to 1 (which is not checked).
    label_weight: scalar w, 0 <= w <= 1, may be traced.
    temperature: scalar T > 0, may be traced.
    axis: the class axis.
    where: [...] bool; entries that are False get no gradient, and their labels
      may be anything.

  Returns:
    [..., classes] float32, the target. With w = 1 the other classes get -1e5 T
    instead of log 0. NaN for a traced label that is no class, and for a traced
    number out of range. A label gives its class a probability even if the
    teacher has no such class.

  Raises:
    ValueError: if the shapes do not fit, a label that is not traced is no
      class, or a number is out of range.
    TypeError: if an array has the wrong dtype.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import reduce
    >>> teacher, labels = jnp.zeros((1, 2)), jnp.array([1])
    >>> for step in (0, 50, 100):
    ...   weight = reduce.linear(step, 0.0, 1.0, steps=100)
    ...   target = mix_labels(teacher, labels, label_weight=weight)
    ...   print([f"{p:.2f}" for p in jax.nn.softmax(target)[0]])
    ['0.50', '0.50']
    ['0.25', '0.75']
    ['0.00', '1.00']

  Reference: Clark et al. 2019 (BAM), arXiv:1907.04829 (teacher annealing).
  """
  (teacher,), mask = inputs.logits(where, axis, teacher_logits=teacher_logits)
  temperature = checks.positive("temperature", temperature)
  w = checks.fraction("label_weight", label_weight)
  y = _distribution(labels, teacher, axis, mask)
  log_p = numerics.log_softmax(teacher, temperature, axis)
  # Log 0 as everywhere: finite, so that the gradient by w is.
  log_rest = jnp.where(
    w == 1.0, numerics.LOG_ZERO, jnp.log1p(-jnp.where(w == 1.0, 0.0, w))
  )
  mixed = _log_sum(log_p + log_rest, w * y)
  here = numerics.present(teacher) | (w * y != 0.0)
  return inputs.absent(temperature * mixed, here)


def virtual(
  labels: ArrayLike,
  classes: int,
  *,
  correct_probability: ArrayLike = 0.99,
  temperature: ArrayLike = 1.0,
  where: ArrayLike | None = None,
) -> jax.Array:
  """A teacher without a network: sure of the label, and of nothing else.

    softmax(target / T)(c) = a                     for the labelled class
    softmax(target / T)(c) = (1 - a) / (C - 1)     for the C - 1 others

  A regulariser, or a stand-in where a loss wants a teacher. The paper softens
  this distribution as that of any teacher: leave T at 1 here and give 20 or
  more to the loss. The released code does something else, which
  `losses.virtual_teacher` has. Label smoothing with s is a = 1 - s + s / C,
  without softening.

  Args:
    labels: [...] integers from 0 to classes - 1.
    classes: their number C, at least 2.
    correct_probability: scalar a, 0 <= a <= 1, may be traced.
    temperature: scalar T > 0, may be traced.
    where: [...] bool; where it is False, the label may be anything.

  Returns:
    [..., classes] float32, the target; T log p, where log 0 is taken as -1e5.
    NaN for a traced label that is no class, and for a traced number out of
    range.

  Raises:
    ValueError: if a label that is not traced is no class, there are less than
      2 classes, the mask has another shape, or a number is out of range.
    TypeError: if the labels are not integers, or `where` is not boolean.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> target = virtual(jnp.array([0]), 4, correct_probability=0.7)
    >>> print([f"{p:.2f}" for p in jax.nn.softmax(target)[0]])
    ['0.70', '0.10', '0.10', '0.10']

  Reference: Yuan et al. 2019 (Tf-KD), arXiv:1909.11723, Eq. 8.
  """
  dtype = checks.dtype("labels", labels)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"labels has dtype {dtype}; it should be an integer dtype")
  classes = inputs.count("classes", classes)
  if classes < 2:
    raise ValueError(f"classes is {classes}; it should be at least 2")
  mask = checks.valid(where, jnp.shape(labels))
  a = checks.fraction("correct_probability", correct_probability)
  temperature = checks.positive("temperature", temperature)
  index, known = checks.class_labels(labels, classes, mask)
  correct = index[..., None] == jnp.arange(classes)
  log_p = jnp.where(correct, _log(a), _log((1.0 - a) / (classes - 1)))
  return jnp.where(known[..., None] == 1.0, temperature * log_p, jnp.nan)


def sort_label_first(
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  *,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The teacher's logits, dealt out so that the label comes first.

    order = the label, then the other classes as the teacher ranks them
    target(order_k) = the k-th largest of teacher_logits

  A teacher that is right stays as it is. One that is wrong keeps its values,
  so its confidence and entropy, and its ranking of the other classes: each
  class that stood above the label goes down by one place. At any temperature.

  Args:
    teacher_logits: [..., classes] any float dtype, classes along `axis`.
    labels: [...] integers from 0 to classes - 1.
    axis: the class axis.
    where: [...] bool; entries that are False get no gradient, and their labels
      may be anything.

  Returns:
    [..., classes] float32, the target: the same values in another order. Of
    equal logits, the label's counts as larger, then that of the smaller class
    number. NaN for a traced label that
    is no class. A label that the teacher has no class for makes the teacher's
    last class absent instead.

  Raises:
    ValueError: if the shapes do not fit, or a label that is not traced is no
      class.
    TypeError: if an array has the wrong dtype.

  Example:
    >>> import jax.numpy as jnp
    >>> teacher = jnp.array([[4.0, 3.0, 2.0, 1.0]])
    >>> print(sort_label_first(teacher, jnp.array([2])))
    [[3. 2. 4. 1.]]

  Reference: Limantoro 2025, arXiv:2508.16544.
  """
  (teacher,), mask = inputs.logits(where, axis, teacher_logits=teacher_logits)
  index, known = _classes(labels, teacher, axis, mask)
  is_true = jax.nn.one_hot(index, teacher.shape[axis], dtype=bool, axis=axis)
  target = arguments.label_first(teacher, is_true, axis)
  target = inputs.absent(target, numerics.present(target))
  return jnp.where(jnp.expand_dims(known == 1.0, axis), target, jnp.nan)


def _log(p: jax.Array) -> jax.Array:
  """The logarithm of a probability, `LOG_ZERO` for 0."""
  zero = p == 0.0
  return jnp.where(zero, numerics.LOG_ZERO, jnp.log(jnp.where(zero, 1.0, p)))


def _log_sum(log_p: jax.Array, mass: jax.Array) -> jax.Array:
  """log(exp(log_p) + mass): exact without mass, any mass beside any log_p."""
  near = log_p > -_FAR
  safe = jnp.where(near, log_p, 0.0)
  direct = safe + jnp.log1p(jnp.where(near, mass, 0.0) * jnp.exp(-safe))
  some = mass != 0.0  # so also where it is NaN
  log_mass = jnp.log(jnp.where(some, mass, 1.0))
  far = jnp.where(some, jnp.logaddexp(log_p, log_mass), log_p)
  return jnp.where(near, direct, far)


def _classes(
  labels: ArrayLike, logits: jax.Array, axis: int, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Checks integer labels: ([...] int32, [...] 1 or NaN)."""
  dtype = checks.dtype("labels", labels)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"labels has dtype {dtype}; it should be an integer dtype")
  shape = checks.example_shape("teacher_logits", logits, axis)
  if jnp.shape(labels) != shape:
    raise ValueError(
      f"labels has shape {jnp.shape(labels)} and teacher_logits has shape "
      f"{logits.shape}; integer labels should have shape {shape}"
    )
  return checks.class_labels(labels, logits.shape[axis], mask)


def _distribution(
  labels: ArrayLike, logits: jax.Array, axis: int, mask: jax.Array | None
) -> jax.Array:
  """The labels as distributions of the logits' shape."""
  dtype = checks.dtype("labels", labels)
  if not jnp.issubdtype(dtype, jnp.floating):
    index, known = _classes(labels, logits, axis, mask)
    one_hot = jax.nn.one_hot(index, logits.shape[axis], axis=axis)
    return jnp.where(jnp.expand_dims(known == 1.0, axis), one_hot, jnp.nan)
  if jnp.shape(labels) == checks.example_shape("teacher_logits", logits, axis):
    raise TypeError(
      f"labels has dtype {dtype} and the shape of class numbers, "
      f"{jnp.shape(labels)}; class numbers should be integers"
    )
  (y,) = checks.floats(labels=labels)
  checks.same_shape(teacher_logits=logits, labels=y)
  return checks.select(mask, y, axis=axis)[0]
