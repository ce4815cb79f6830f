import functools

from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.losses import mixtures
from tests import references
from tests.losses import softened
from tests.losses.softened import logits, run


def softmax(z):
  with np.errstate(divide="ignore"):
    return np.exp(references.log_softmax(z))


def kl_with_zeros(p, r):
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(p > 0, p * np.log(p / r), 0).sum(-1)


def one_sided():
  """Classes that one side alone, the other alone, and both rule out."""
  student, teacher = logits(0), logits(1)
  student[..., [0, 3]] = teacher[..., [1, 3]] = -np.inf
  return student, teacher


finite = hnp.arrays(
  np.float32, softened.SHAPE, elements=st.floats(-1e4, 1e4, width=32)
)


# Skew


def test_skew_is_the_weight_of_the_first_argument():
  p, q = [1.0, 0.0], [0.5, 0.5]
  teacher, student = (softened.of_probabilities([x] * 4) for x in (p, q))
  forward = softened.values(mixtures.skew_kl, student, teacher, skew=0.2)
  np.testing.assert_allclose(forward, -np.log(0.2 + 0.8 * 0.5), rtol=1e-6)
  m = 0.2 * np.array(q) + 0.8 * np.array(p)
  reverse = softened.values(
    mixtures.skew_reverse_kl, student, teacher, skew=0.2
  )
  np.testing.assert_allclose(reverse, (q * np.log(q / m)).sum(), rtol=1e-6)


@pytest.mark.parametrize(
  ("loss", "limit"),
  [
    (mixtures.skew_kl, losses.kl),
    (mixtures.skew_reverse_kl, losses.reverse_kl),
  ],
)
def test_skew_tends_to_kl(loss, limit):
  student, teacher = logits(0), logits(1)
  expected = softened.values(limit, student, teacher)
  first = softened.values(loss, student, teacher, skew=1e-2)
  assert np.all(first < 0.99 * expected)
  np.testing.assert_allclose(
    softened.values(loss, student, teacher, skew=1e-6), expected, rtol=2e-3
  )


def test_the_two_skews_are_one_with_the_sides_exchanged():
  student, teacher = logits(0), logits(1)
  np.testing.assert_allclose(
    softened.values(
      mixtures.skew_kl, student, teacher, skew=0.3, temperature=2
    ),
    softened.values(
      mixtures.skew_reverse_kl, teacher, student, skew=0.3, temperature=2
    ),
    rtol=1e-6,
  )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_is_made_of_the_two_skews(beta):
  student, teacher = logits(0), logits(1)
  forward = softened.values(mixtures.skew_kl, student, teacher, skew=beta)
  reverse = softened.values(
    mixtures.skew_reverse_kl, student, teacher, skew=1 - beta
  )
  np.testing.assert_allclose(
    beta * forward + (1 - beta) * reverse,
    softened.values(losses.jsd, student, teacher, beta=beta),
    rtol=2e-6,
  )


def test_skew_kl_has_the_gradient_of_the_released_cross_entropy():
  student, teacher = logits(0), logits(1)

  @jax.jit
  @jax.grad
  def released(student):
    p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
    return -(p * jnp.log(0.1 * p + 0.9 * q)).sum()

  _, grads = run(mixtures.skew_kl, student, teacher, skew=0.1)
  np.testing.assert_allclose(grads["student"], released(student), atol=1e-6)


@pytest.mark.parametrize("loss", [mixtures.skew_kl, mixtures.skew_reverse_kl])
@given(student=finite, teacher=finite, skew=st.floats(1e-4, 0.999))
@settings(max_examples=25)
def test_skew_is_bounded(loss, student, teacher, skew):
  values, grads = run(loss, student, teacher, skew=skew)
  assert np.all(values <= -np.log(skew) * (1 + 1e-5) + 1e-6)
  for grad in grads.values():
    assert np.all(np.isfinite(grad))


def test_skew_with_classes_ruled_out_is_exact():
  student, teacher = one_sided()
  p, q = softmax(teacher), softmax(student)
  np.testing.assert_allclose(
    softened.values(mixtures.skew_kl, student, teacher, skew=0.3),
    kl_with_zeros(p, 0.3 * p + 0.7 * q),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    softened.values(mixtures.skew_reverse_kl, student, teacher, skew=0.3),
    kl_with_zeros(q, 0.3 * q + 0.7 * p),
    rtol=1e-5,
  )


# Alpha-mixtures


alpha = functools.partial(run, mixtures.alpha_mixture_kl)


def alpha_reference(student, teacher, order, mixing):
  p, q = softmax(teacher), softmax(student)
  if order == 1:
    r = p**mixing * q ** (1 - mixing)
  else:
    s = (1 - order) / 2
    r = (mixing * p**s + (1 - mixing) * q**s) ** (1 / s)
  return kl_with_zeros(p, r / r.sum(-1, keepdims=True))


@pytest.mark.parametrize("mixing", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scale", [2, 30])
def test_order_minus_1_is_skew_kl(mixing, scale):
  pair = logits(0, scale=scale), logits(1, scale=scale)
  np.testing.assert_allclose(
    alpha(*pair, order=-1, mixing=mixing)[0],
    softened.values(mixtures.skew_kl, *pair, skew=mixing),
    rtol=3e-6,
  )


@pytest.mark.parametrize("mixing", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scale", [2, 30])
def test_order_1_is_kl_to_mixed_logits(mixing, scale):
  student, teacher = logits(0, scale=scale), logits(1, scale=scale)
  mixed = mixing * teacher + (1 - mixing) * student
  np.testing.assert_allclose(
    alpha(student, teacher, order=1, mixing=mixing)[0],
    softened.values(losses.kl, mixed, teacher),
    rtol=5e-6,
  )


@pytest.mark.parametrize("order", [-3, -1, 0, 1, 3])
def test_mixing_tends_to_kl(order):
  student, teacher = logits(0, scale=1), logits(1, scale=1)
  np.testing.assert_allclose(
    alpha(student, teacher, order=order, mixing=1e-6)[0],
    softened.values(losses.kl, student, teacher),
    rtol=1e-4,
  )


@pytest.mark.parametrize("mixing", [0.1, 0.5, 0.9])
def test_orders_are_one_continuous_family(mixing):
  """One program sweeps them; the value and its slope by order are right."""
  student, teacher = logits(0, scale=4), logits(1, scale=4)
  near = [0, 1e-6, -1e-6, 1e-4, -1e-4, 1e-2, -1e-2, 0.1, -0.1, 0.3, -0.3]
  orders = [centre + x for centre in (-1, 1) for x in near]
  orders += [-20, -5, 0, 2, 3, 5, 20]
  step = 1e-4
  for order in orders:
    values, grads = alpha(student, teacher, order=order, mixing=mixing)
    exact = np.float64(np.float32(order))
    if abs(exact - 1) < 1e-4:  # float64 would not do near the exception
      exact = 1.0
    np.testing.assert_allclose(
      values,
      alpha_reference(student, teacher, exact, mixing),
      rtol=1e-5 if exact != 1 else 2e-4,
      err_msg=str(order),
    )
    slope = [
      alpha_reference(student, teacher, exact + x, mixing).sum()
      for x in (step, -step)
    ]
    np.testing.assert_allclose(
      grads["order"],
      (slope[0] - slope[1]) / (2 * step),
      rtol=2e-3,
      atol=1e-4,
      err_msg=str(order),
    )


@pytest.mark.parametrize("order", [-3, -1, 0, 0.9])
def test_below_order_1_classes_ruled_out_are_exact(order):
  student, teacher = one_sided()
  values, grads = alpha(student, teacher, order=order, mixing=0.3)
  np.testing.assert_allclose(
    values, alpha_reference(student, teacher, order, 0.3), rtol=2e-5
  )
  for grad in grads.values():
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("order", [1, 1.5, 3])
def test_from_order_1_on_classes_ruled_out_cost_much(order):
  student, teacher = one_sided()
  values, grads = alpha(student, teacher, order=order, mixing=0.3)
  mass = softmax(teacher)[..., 0]
  share = 0.7 if order == 1 else 1.0
  np.testing.assert_allclose(values, share * 1e5 * mass, rtol=2e-3)
  for grad in grads.values():
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("order", [-1, 0.5, 1, 3])
def test_no_class_at_all_has_no_part_in_any_gradient(order):
  nothing = np.full(softened.SHAPE, -np.inf)
  values, grads = alpha(nothing, nothing, order=order, mixing=0.3)
  for array in (values, *grads.values()):
    np.testing.assert_array_equal(array, 0.0)


@given(
  student=finite,
  teacher=finite,
  order=st.floats(-20, 20),
  mixing=st.floats(0.01, 0.99),
)
@settings(max_examples=40)
def test_any_order_is_finite_and_below_kl(student, teacher, order, mixing):
  """r is nearer to p than q is."""
  values, grads = alpha(student, teacher, order=order, mixing=mixing)
  limit = softened.values(losses.kl, student, teacher)
  assert np.all(values >= 0)
  assert np.all(values <= limit * (1 + 1e-5) + 1e-6)
  for grad in grads.values():
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("order", ["-1", True, 1j])
def test_an_order_that_is_no_number(order):
  with pytest.raises(TypeError, match=r"order is .*finite number"):
    mixtures.alpha_mixture_kl(logits(0), logits(1), order=order)


# Adaptive


@pytest.mark.parametrize("form", ["released", "paper"])
def test_adaptive_weights_by_hand(form):
  """The class of 0.305 crosses the mass of one half."""
  p, q = np.array([[0.305, 0.4, 0.295], [0.01, 0.3, 0.69]])
  head, tail = {
    "released": (0.1, 0.295 + 0.395),
    "paper": (0.1 + 0.295, 0.395),
  }[form]
  kl = (p * np.log(p / q)).sum()
  reverse = (q * np.log(q / p)).sum()
  teacher, student = (softened.of_probabilities([x] * 4) for x in (p, q))
  np.testing.assert_allclose(
    softened.values(mixtures.adaptive_kl, student, teacher, form=form),
    (head * kl + tail * reverse) / (head + tail),
    rtol=1e-5,
  )


def test_the_adaptive_forms_agree_where_one_class_is_the_head():
  student, teacher = logits(0), logits(1)
  teacher[..., 2] = 9
  released, paper = (
    run(mixtures.adaptive_kl, student, teacher, form=form)
    for form in ("released", "paper")
  )
  jax.tree.map(np.testing.assert_array_equal, released, paper)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_adaptive_kl_combines_values_and_gradients_with_one_weight(form):
  student, teacher = logits(0), logits(1)
  values, grads = run(mixtures.adaptive_kl, student, teacher, form=form)
  forward, to_forward = run(losses.kl, student, teacher)
  reverse, to_reverse = run(losses.reverse_kl, student, teacher)
  weight = ((values - reverse) / (forward - reverse))[..., None]
  assert np.all((weight > 0) & (weight < 1)) and np.ptp(weight) > 0.1
  for side in ("student", "teacher"):
    expected = weight * to_forward[side] + (1 - weight) * to_reverse[side]
    np.testing.assert_allclose(grads[side], expected, rtol=1e-4, atol=1e-5)


@given(student=finite, teacher=finite, head_mass=st.floats(0.01, 0.99))
@settings(max_examples=25)
def test_adaptive_kl_is_between_kl_and_reverse_kl(student, teacher, head_mass):
  values = softened.values(
    mixtures.adaptive_kl, student, teacher, head_mass=head_mass
  )
  ends = [
    softened.values(loss, student, teacher)
    for loss in (losses.kl, losses.reverse_kl)
  ]
  assert np.all(values >= np.minimum(*ends) * (1 - 1e-5))
  assert np.all(values <= np.maximum(*ends) * (1 + 1e-5))


def test_adaptive_form():
  with pytest.raises(ValueError, match=r"form is 'code'.*released.*paper"):
    mixtures.adaptive_kl(logits(0), logits(1), form="code")
