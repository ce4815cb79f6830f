import functools
import itertools

from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.losses import scores
from tests import references


def logits(seed, shape=(4, 5), scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


@functools.cache
def program(loss, static=()):
  """(values, gradients by student and teacher)."""

  @jax.jit
  def run(student, teacher, temperature):
    def total(student, teacher):
      values = loss(student, teacher, temperature=temperature, **dict(static))
      return values.sum(), values

    grads, values = jax.grad(total, (0, 1), has_aux=True)(student, teacher)
    return values, grads

  return run


def run(loss, student, teacher, temperature=1.0, **static):
  return program(loss, tuple(sorted(static.items())))(
    student, teacher, temperature
  )


def softmax(z, temperature=1.0):
  return np.exp(references.log_softmax(z, temperature))


concrete_score = functools.partial(run, scores.concrete_score)
cosine_logits = functools.partial(run, scores.cosine_logits)
finite = hnp.arrays(np.float32, (4, 5), elements=st.floats(-1e4, 1e4, width=32))


# Concrete score


def pairwise(student, teacher, w, v):
  """The double sum as it stands."""
  d = student.astype(np.float64) - teacher
  gaps = (d[..., :, None] - d[..., None, :]) ** 2
  return (w[..., :, None] * v[..., None, :] * gaps).sum((-1, -2))


NAMES = ("student", "teacher", "uniform")


@pytest.mark.parametrize(
  "names", list(itertools.combinations_with_replacement(NAMES, 2))
)
def test_all_weights_in_either_order(names):
  student, teacher = logits(0), logits(1)
  known = {
    "student": softmax(student, 1.5),
    "teacher": softmax(teacher, 1.5),
    "uniform": np.full((4, 5), 0.2),
  }
  w, v = (known[name] for name in names)
  expected = pairwise(student, teacher, w, v)
  for weights, partner_weights in (names, names[::-1]):
    values = scores.concrete_score(
      student,
      teacher,
      weights=weights,
      partner_weights=partner_weights,
      temperature=1.5,
    )
    np.testing.assert_allclose(values, expected / 4, rtol=3e-6)


@pytest.mark.parametrize(
  "names", [("student", "student"), ("teacher", "student")]
)
def test_the_gradients_are_those_of_the_released_code(names):
  """There, the value is a stand-in made to have this gradient."""
  student, teacher = logits(0), logits(1)
  d = student.astype(np.float64) - teacher
  known = {"student": softmax(student, 1.5), "teacher": softmax(teacher, 1.5)}
  w, v = (known[name] for name in names)
  centred = lambda weight: d - (weight * d).sum(-1, keepdims=True)
  expected = (centred(w) * v + centred(v) * w) / 2
  _, grads = concrete_score(
    student, teacher, 1.5, weights=names[0], partner_weights=names[1]
  )
  np.testing.assert_allclose(grads[0], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(grads[1], -expected, rtol=1e-5, atol=1e-6)


def test_the_paper_has_twice_the_released_loss():
  student, teacher = logits(0), logits(1)
  released = concrete_score(student, teacher)
  paper = concrete_score(student, teacher, form="paper")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-6),
    released,
    paper,
  )


def test_concrete_score_does_not_see_an_offset():
  student, teacher = (np.round(16 * logits(i)) / 16 for i in (0, 1))
  offset = np.float32([[1], [-20], [300], [0]])
  for a, b in zip(
    jax.tree.leaves(concrete_score(student, teacher)),
    jax.tree.leaves(concrete_score(student + offset, teacher)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_uniform_weights_are_the_centred_logit_mse():
  student, teacher = logits(0), logits(1)
  gap = student - teacher
  gap -= gap.mean(-1, keepdims=True)
  uniform = {"weights": "uniform", "partner_weights": "uniform"}
  # For any temperature: it softens the weights alone.
  for temperature in (1.0, 7.0):
    values, _ = concrete_score(student, teacher, temperature, **uniform)
    np.testing.assert_allclose(
      values, losses.logit_mse(gap, np.zeros_like(gap)) / 5, rtol=1e-5
    )


@pytest.mark.parametrize(
  ("gap", "temperature", "rtol"), [(1e-3, 1.0, 5e-3), (3.0, 1e4, 2e-3)]
)
def test_concrete_score_tends_to_kl(gap, temperature, rtol):
  teacher = logits(0)
  student = teacher + logits(1, scale=gap)
  np.testing.assert_allclose(
    concrete_score(student, teacher, temperature)[0],
    run(losses.kl, student, teacher, temperature)[0],
    rtol=rtol,
  )


def test_concrete_score_with_classes_ruled_out():
  student, teacher = logits(0), logits(1)
  student[:, 0] = teacher[:, 0] = -np.inf
  uniform = {"weights": "uniform", "partner_weights": "uniform"}
  values, _ = concrete_score(student, teacher, **uniform)
  expected, _ = concrete_score(student[:, 1:], teacher[:, 1:], **uniform)
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  student[:, 1] = -np.inf  # which the teacher does not
  for static in ({}, uniform, {"weights": "teacher"}):
    values, grads = concrete_score(student, teacher, **static)
    assert np.all(values >= 0) and np.all(np.isfinite(values))
    for grad in grads:
      assert np.all(np.isfinite(grad))
  assert np.all(values > 1e8)  # log 0 is -1e5; the student's weight there 0


@pytest.mark.parametrize(
  ("name", "wanted"),
  [
    ("form", "released.*paper"),
    ("weights", "student.*teacher.*uniform"),
    ("partner_weights", "student.*teacher.*uniform"),
  ],
)
def test_concrete_score_choices(name, wanted):
  with pytest.raises(ValueError, match=f"^{name} is 'x'; .*{wanted}"):
    scores.concrete_score(logits(0), logits(1), **{name: "x"})


# Cosine


def test_cosine_logits_by_hand():
  p = np.float32([[0.8, 0.2], [0.5, 0.5], [1, 0], [1, 0]])
  q = np.float32([[0.2, 0.8], [1, 0], [0, 1], [1, 0]])
  expected = [1 - 0.32 / 0.68, 1 - np.sqrt(0.5), 1, 0]
  with np.errstate(divide="ignore"):
    student, teacher = np.log(q), np.log(p)
  for pair in ((student, teacher), (teacher, student)):
    values = scores.cosine_logits(*pair)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)


def test_cosine_logits_tends_to_what_kl_tends_to():
  student, teacher = logits(0), logits(1)
  np.testing.assert_allclose(
    cosine_logits(student, teacher, 1e4)[0],
    run(losses.kl, student, teacher, 1e4)[0],
    rtol=2e-3,
  )


@given(student=finite, teacher=finite, temperature=st.floats(0.05, 100))
@settings(max_examples=25)
def test_cosine_logits_is_symmetric_and_bounded(student, teacher, temperature):
  values, _ = cosine_logits(student, teacher, temperature)
  assert np.all(values <= temperature**2 * (1 + 1e-6))
  other, _ = cosine_logits(teacher, student, temperature)
  np.testing.assert_allclose(
    values, other, rtol=1e-4, atol=1e-6 * temperature**2
  )
