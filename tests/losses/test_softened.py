"""What all divergences of two softened predictions have in common.

`test_divergences` asks still more of kl, reverse_kl and jsd.
"""

from collections.abc import Callable, Mapping
import functools
import types
from typing import Any, NamedTuple

from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import numpy as np
import pytest

from kd_jax.losses import divergences, mixtures, scores
from tests import references
from tests.losses import softened
from tests.losses.softened import logits

# The definitions, for one pair of distributions each: p is the teacher's.


def kl(p, q):
  return (p * np.log(p / q)).sum()


def total_variation(p, q):
  return sum(max(a - b, 0) for a, b in zip(p, q, strict=True))


def alpha_mixture_kl(p, q, order, mixing):
  if order == 1:
    r = p**mixing * q ** (1 - mixing)
  else:
    s = (1 - order) / 2
    r = (mixing * p**s + (1 - mixing) * q**s) ** (1 / s)
  return kl(p, r / r.sum())


def head_weight(p, q, head_mass, form):
  head = gap = mass = 0.0
  for rank, c in enumerate(sorted(range(len(p)), key=lambda c: -p[c])):
    inside = mass < head_mass
    mass += p[c]
    if form == "released":
      inside = rank == 0 or mass <= head_mass
    gap += abs(p[c] - q[c])
    head += inside * abs(p[c] - q[c])
  return head / gap if gap else 0.5


def adaptive_kl(p, q, held, head_mass=0.5, form="released"):
  weight = head_weight(*held, head_mass, form)
  return weight * kl(p, q) + (1 - weight) * kl(q, p)


def concrete_score(p, q, held, names=("student", "student"), factor=1 / 4):
  known = {
    "teacher": held[0],
    "student": held[1],
    "uniform": 0 * p + 1 / p.size,
  }
  w, v = (known[name] for name in names)
  d = np.log(q / p)
  return factor * sum(
    w[i] * v[j] * (d[i] - d[j]) ** 2
    for i in range(p.size)
    for j in range(p.size)
  )


def cosine(p, q):
  return 1 - p @ q / np.sqrt((p @ p) * (q @ q))


class Case(NamedTuple):
  """A loss and its definition.

  Attributes:
    loss: called with `options`.
    definition: of p and q; with `held`, also of the pair (p, q) that the
      weights are taken from, which has no part in the gradient.
  """

  loss: Callable[..., jax.Array]
  definition: Callable[..., float]
  options: Mapping[str, Any] = types.MappingProxyType({})
  held: bool = False

  def probabilities(self, student, teacher, temperature=1.0, other=None):
    return [
      np.exp(references.log_softmax(z, t))
      for z, t in ((teacher, other or temperature), (student, temperature))
    ]

  def reference(self, student, teacher, temperature=1.0, other=None, at=None):
    p, q = self.probabilities(student, teacher, temperature, other)
    a, b = at or (p, q)
    values = [
      self.definition(p[i], q[i], *([(a[i], b[i])] if self.held else []))
      for i in np.ndindex(p.shape[:-1])
    ]
    return temperature**2 * np.reshape(values, p.shape[:-1])

  def gradients(self, student, teacher, temperature=1.0, other=None, step=1e-5):
    """By student, teacher, and the two temperatures."""
    other = other or temperature
    inputs = [np.asarray(x, float) for x in (student, teacher)]
    inputs += [np.float64(temperature), np.float64(other)]
    at = self.probabilities(*inputs)

    def varied(k):
      return references.gradient(
        lambda x: self.reference(*inputs[:k], x, *inputs[k + 1 :], at=at),
        inputs[k],
        step,
      )

    return [varied(k) for k in range(4)]


def alpha(order, mixing):
  return Case(
    mixtures.alpha_mixture_kl,
    functools.partial(alpha_mixture_kl, order=order, mixing=mixing),
    {"order": order, "mixing": mixing},
  )


CASES = {
  "total_variation": Case(divergences.total_variation, total_variation),
  "skew_kl": Case(
    mixtures.skew_kl,
    lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    {"skew": 0.1},
  ),
  "skew_reverse_kl": Case(
    mixtures.skew_reverse_kl,
    lambda p, q: kl(q, 0.3 * q + 0.7 * p),
    {"skew": 0.3},
  ),
  "alpha_mixture_0.5": alpha(0.5, 0.5),
  "alpha_mixture_1": alpha(1.0, 0.1),
  "alpha_mixture_3": alpha(3.0, 0.3),
  "alpha_mixture_-4": alpha(-4.0, 0.7),
  "adaptive_kl": Case(
    mixtures.adaptive_kl, adaptive_kl, {"head_mass": 0.5}, held=True
  ),
  "adaptive_kl_paper": Case(
    mixtures.adaptive_kl,
    functools.partial(adaptive_kl, head_mass=0.8, form="paper"),
    {"head_mass": 0.8, "form": "paper"},
    held=True,
  ),
  "concrete_score": Case(scores.concrete_score, concrete_score, held=True),
  "concrete_score_paper": Case(
    scores.concrete_score,
    functools.partial(
      concrete_score, names=("teacher", "uniform"), factor=1 / 2
    ),
    {"form": "paper", "weights": "teacher", "partner_weights": "uniform"},
    held=True,
  ),
  "cosine_logits": Case(scores.cosine_logits, cosine),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(case, student, teacher, temperature=1.0, other=None, **more):
  values, grads = softened.run(
    case.loss,
    student,
    teacher,
    temperature=temperature,
    teacher_temperature=other or temperature,
    **case.options,
    **more,
  )
  names = ("student", "teacher", "temperature", "teacher_temperature")
  return values, [grads[name] for name in names]


def assert_close(actual, expected, rtol, atol=0.0):
  """Agreement relative to the largest entry of each example."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
  scale = np.abs(expected).max(-1, keepdims=True)
  worst = (np.abs(actual - expected) / (rtol * scale + atol)).max()
  assert worst <= 1.0, f"error is {worst} times the tolerance"


@each
@pytest.mark.parametrize(
  ("scale", "temperature", "other"),
  [
    (2, 0.25, None),
    (2, 1.0, None),
    (2, 4.0, None),
    (1, 1.5, 0.1),
    (30, 1.0, None),
  ],
)
def test_values_and_gradients_match_float64(case, scale, temperature, other):
  student, teacher = logits(0, scale=scale), logits(1, scale=scale)
  if other:
    teacher *= 0.1
  values, grads = run(case, student, teacher, temperature, other)
  expected = case.reference(student, teacher, temperature, other)
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  exact = case.gradients(student, teacher, temperature, other)
  for grad, other_grad in zip(grads[:2], exact[:2], strict=True):
    assert_close(grad, other_grad, 2e-5, atol=3e-6 * max(temperature, 1))
  np.testing.assert_allclose(grads[2:], exact[2:], rtol=1e-4, atol=1e-3)


@each
@pytest.mark.parametrize(
  ("gap", "temperature"), [(1e-4, 1.0), (3.0, 1e2), (3.0, 1e3), (3.0, 1e4)]
)
def test_near_equality_and_hot_keep_their_digits(case, gap, temperature):
  teacher = logits(0)
  student = teacher + logits(1, scale=gap)
  values, (to_student, to_teacher, *_) = run(
    case, student, teacher, temperature
  )
  np.testing.assert_allclose(
    values, case.reference(student, teacher, temperature), rtol=2e-4
  )
  # Large enough for the rounding of the differences, except where a step must
  # not cross a kink.
  step = 1e-7 if case.definition is total_variation else 2e-6
  exact = case.gradients(student, teacher, temperature, step=step * temperature)
  assert_close(to_student, exact[0], 2e-4)
  assert_close(to_teacher, exact[1], 2e-4)


@each
def test_an_offset_common_to_all_logits_costs_no_digits(case):
  # Multiples of 1/16, which stay exact beside 4096 in float32.
  student, teacher = (np.round(16 * logits(i)) / 16 for i in (0, 1))
  values, _ = run(case, student + 4096, teacher - 4096)
  np.testing.assert_allclose(values, case.reference(student, teacher), 1e-5)


@each
@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min])
def test_classes_absent_on_both_sides(case, lowest):
  student, teacher = logits(0), logits(1)
  keep = np.array([1, 0, 1, 1, 0], bool)
  values, grads = run(
    case,
    np.where(keep, student, lowest),
    np.where(keep, teacher, lowest),
    2.0,
  )
  student, teacher = student[..., keep], teacher[..., keep]
  np.testing.assert_allclose(
    values, case.reference(student, teacher, 2.0), 1e-5
  )
  exact = case.gradients(student, teacher, 2.0)
  for grad, small in zip(grads[:2], exact[:2], strict=True):
    np.testing.assert_array_equal(grad[..., ~keep], 0.0)
    assert_close(grad[..., keep], small, 2e-5, atol=3e-6)


@each
def test_no_class_at_all_is_zero(case):
  nothing = np.full(softened.SHAPE, -np.inf)
  values, grads = run(case, nothing, nothing)
  for array in (values, *grads):
    np.testing.assert_array_equal(array, 0.0)


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_not_hidden(case, bad):
  good = logits(0)
  broken = good.copy()
  broken[0, 1, 2] = bad
  for pair in ((broken, good), (good, broken), (broken, broken)):
    values, _ = run(case, *pair)
    assert np.isnan(values).tolist() == [[False, True], [False, False]]


@each
@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_scalars_out_of_range(case, bad):
  z = logits(0)
  options = {**case.options, "temperature": 1.0}
  for name, value in options.items():
    if isinstance(value, str) or (name == "order" and abs(bad) <= 1):
      continue
    with pytest.raises(ValueError, match=f"^{name} is .*; it should be "):
      case.loss(z, z, **(options | {name: bad}))
    values, _ = softened.run(case.loss, z, z + 1, **(options | {name: bad}))
    assert np.all(np.isnan(values)), name


finite = hnp.arrays(
  np.float32, softened.SHAPE, elements=st.floats(-1e4, 1e4, width=32)
)


@each
@given(student=finite, teacher=finite, temperature=st.floats(0.05, 1e3))
@settings(max_examples=25)
def test_never_negative_and_zero_at_equality(
  case, student, teacher, temperature
):
  values, grads = run(case, student, teacher, temperature)
  assert np.all(values >= 0)
  for array in (values, *grads):
    assert np.all(np.isfinite(array))
  equal, grads = run(case, student, student, temperature)
  for array in (equal, *grads):
    np.testing.assert_array_equal(array, 0.0)


# One value per token


EVERY = CASES | {
  "kl": Case(divergences.kl, kl),
  "reverse_kl": Case(divergences.reverse_kl, lambda p, q: kl(q, p)),
  "jsd": Case(
    divergences.jsd,
    lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
  ),
}


every = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)


@every
def test_masked_tokens(case):
  student, teacher = logits(0), logits(1)
  where = np.array([[True, False], [True, True]])
  expected = np.where(where, case.reference(student, teacher), 0)
  exact = case.gradients(student[where], teacher[where])
  student[~where] = np.nan
  teacher[~where] = np.inf
  values, grads = run(case, student, teacher, where=where)
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  for grad, valid in zip(grads[:2], exact[:2], strict=True):
    np.testing.assert_array_equal(grad[~where], 0.0)
    assert_close(grad[where], valid, 2e-5, atol=2e-6)


@every
def test_any_axis_may_be_that_of_the_classes(case):
  student, teacher = logits(0, (2, 3, 5)), logits(1, (2, 3, 5))
  where = np.array([[True, True, False], [True, False, False]])
  expected = np.where(where, case.reference(student, teacher), 0)
  student[~where] = np.nan
  values = jax.jit(functools.partial(case.loss, axis=1, **case.options))(
    np.moveaxis(student, -1, 1), np.moveaxis(teacher, -1, 1), where=where
  )
  np.testing.assert_allclose(values, expected, rtol=1e-5)
