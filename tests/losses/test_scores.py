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
from tests.losses import softened
from tests.losses.softened import logits, run


def softmax(z, temperature=1.0):
  return np.exp(references.log_softmax(z, temperature))


concrete_score = functools.partial(run, scores.concrete_score)
cosine_logits = functools.partial(run, scores.cosine_logits)
finite = hnp.arrays(
  np.float32, softened.SHAPE, elements=st.floats(-1e4, 1e4, width=32)
)


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
    "uniform": np.full(softened.SHAPE, 0.2),
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
    student,
    teacher,
    temperature=1.5,
    weights=names[0],
    partner_weights=names[1],
  )
  for side, sign in (("student", 1), ("teacher", -1)):
    np.testing.assert_allclose(grads[side], sign * expected, 1e-5, atol=1e-6)


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
  offset = np.float32([[[1], [-20]], [[300], [0]]])
  values, grads = concrete_score(student, teacher)
  moved, moved_grads = concrete_score(student + offset, teacher)
  np.testing.assert_allclose(moved, values, rtol=1e-5)
  for side in ("student", "teacher"):
    np.testing.assert_allclose(moved_grads[side], grads[side], atol=1e-5)


def test_uniform_weights_are_the_centred_logit_mse():
  student, teacher = logits(0), logits(1)
  gap = student - teacher
  gap -= gap.mean(-1, keepdims=True)
  uniform = {"weights": "uniform", "partner_weights": "uniform"}
  # For any temperature: it softens the weights alone.
  for temperature in (1.0, 7.0):
    values, _ = concrete_score(
      student, teacher, temperature=temperature, **uniform
    )
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
    concrete_score(student, teacher, temperature=temperature)[0],
    softened.values(losses.kl, student, teacher, temperature=temperature),
    rtol=rtol,
  )


def test_concrete_score_where_only_the_student_rules_a_class_out():
  student, teacher = logits(0), logits(1)
  student[..., 1] = -np.inf
  for weights in ("student", "teacher"):
    values, grads = concrete_score(
      student, teacher, weights=weights, partner_weights="student"
    )
    for array in (values, *grads.values()):
      assert np.all(np.isfinite(array))
    # log 0 is -1e5, which the student's own weights do not see.
    expected = 1e10 / 4 * softmax(teacher)[..., 1]
    if weights == "teacher":
      np.testing.assert_allclose(values, expected, rtol=2e-3)
    else:
      assert np.all(values < 100)


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
  p = [[0.8, 0.2], [0.5, 0.5], [1, 0], [1, 0]]
  q = [[0.2, 0.8], [1, 0], [0, 1], [1, 0]]
  expected = [1 - 0.32 / 0.68, 1 - np.sqrt(0.5), 1, 0]
  teacher, student = map(softened.of_probabilities, (p, q))
  for pair in ((student, teacher), (teacher, student)):
    values, _ = cosine_logits(*pair)
    np.testing.assert_allclose(values.ravel(), expected, rtol=1e-5, atol=1e-7)


def test_cosine_logits_tends_to_what_kl_tends_to():
  student, teacher = logits(0), logits(1)
  np.testing.assert_allclose(
    cosine_logits(student, teacher, temperature=1e4)[0],
    softened.values(losses.kl, student, teacher, temperature=1e4),
    rtol=2e-3,
  )


@given(student=finite, teacher=finite, temperature=st.floats(0.05, 100))
@settings(max_examples=25)
def test_cosine_logits_is_symmetric_and_bounded(student, teacher, temperature):
  values, _ = cosine_logits(student, teacher, temperature=temperature)
  assert np.all(values <= temperature**2 * (1 + 1e-6))
  other, _ = cosine_logits(teacher, student, temperature=temperature)
  np.testing.assert_allclose(
    values, other, rtol=1e-4, atol=1e-6 * temperature**2
  )
