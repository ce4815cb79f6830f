from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np

from kd_jax import losses
from tests import references
from tests.losses import softened
from tests.losses.softened import logits


def total_variation(student, teacher):
  values, grads = softened.run(losses.total_variation, student, teacher)
  return values, (grads["student"], grads["teacher"])


def test_by_hand():
  p = [[0.2, 0.6, 0.2], [1], [0.5, 0.5], [0.9, 0.1]]
  q = [[0.5, 0.25, 0.25], [0, 1], [0.5, 0.5], [0.1, 0.9]]
  teacher, student = map(softened.of_probabilities, (p, q))
  for pair in ((student, teacher), (teacher, student)):
    values, _ = total_variation(*pair)
    np.testing.assert_allclose(values.ravel(), [0.35, 1, 0, 0.8], rtol=1e-6)


def test_where_classes_are_ruled_out_it_is_exact():
  student, teacher = logits(0), logits(1)
  student[..., [0, 3]] = teacher[..., [1, 3]] = -np.inf
  with np.errstate(divide="ignore"):
    p, q = (np.exp(references.log_softmax(z)) for z in (teacher, student))
  values, grads = total_variation(student, teacher)
  np.testing.assert_allclose(values, np.abs(p - q).sum(-1) / 2, rtol=2e-6)
  for grad in grads:
    assert np.all(np.isfinite(grad))


def test_the_gradient_keeps_its_size_up_to_equality():
  teacher, step = logits(0), logits(1)
  far, near = (
    total_variation(teacher + t * step, teacher) for t in (1e-3, 1e-4)
  )
  np.testing.assert_allclose(near[0], far[0] / 10, rtol=1e-2)
  np.testing.assert_allclose(near[1][0], far[1][0], atol=2e-3)
  assert np.all(np.abs(near[1][0]).max(-1) > 0.05)
  for grad in total_variation(teacher, teacher)[1]:
    np.testing.assert_array_equal(grad, 0.0)


ordinary = hnp.arrays(
  np.float32, softened.SHAPE, elements=st.floats(-50, 50, width=32)
)


@given(student=ordinary, teacher=ordinary, other=ordinary)
@settings(max_examples=40)
def test_it_is_a_metric_below_pinskers_bound(student, teacher, other):
  distance = lambda a, b: total_variation(a, b)[0].astype(np.float64)
  direct = distance(student, teacher)
  assert np.all(direct <= 1 + 1e-6)
  np.testing.assert_allclose(
    direct, distance(teacher, student), rtol=2e-5, atol=1e-6
  )
  detour = distance(student, other) + distance(other, teacher)
  assert np.all(direct <= detour + 1e-5)
  divergence = softened.values(losses.kl, student, teacher)
  assert np.all(direct**2 <= divergence / 2 * (1 + 1e-4) + 1e-9)
