import functools

from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from tests import references

DIVERGENCES = {
  "kl": (losses.kl, references.kl),
  "reverse_kl": (losses.reverse_kl, references.reverse_kl),
  "jsd": (losses.jsd, references.jsd),
  "jsd_0.1": (
    functools.partial(losses.jsd, beta=0.1),
    functools.partial(references.jsd, beta=0.1),
  ),
}
each = pytest.mark.parametrize(
  ("loss", "reference"), DIVERGENCES.values(), ids=DIVERGENCES
)


@functools.cache
def value_and_grads(loss):
  """(values, (student gradient, teacher gradient)) as one program.

  Compilation is most of these tests' time: they share programs, and so shapes.
  """

  @jax.jit
  def run(student, teacher, temperature, teacher_temperature=None):
    def total(student, teacher):
      values = loss(
        student,
        teacher,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
      )
      return values.sum(), values

    grads, values = jax.grad(total, argnums=(0, 1), has_aux=True)(
      student, teacher
    )
    return values, grads

  return run


def logits(seed, shape=(4, 5), scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


def assert_close(actual, expected, rtol, atol=0.0):
  """Agreement relative to the largest entry of each example."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
  scale = np.abs(expected).max(-1, keepdims=True)
  worst = (np.abs(actual - expected) / (rtol * scale + atol)).max()
  assert worst <= 1.0, f"error is {worst} times the tolerance"


@each
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_values_and_both_gradients_match_float64(loss, reference, temperature):
  student, teacher = logits(0), logits(1)
  values, (to_student, to_teacher) = value_and_grads(loss)(
    student, teacher, temperature
  )
  np.testing.assert_allclose(
    values, reference(student, teacher, temperature), rtol=2e-6
  )
  for actual, expected in (
    (
      to_student,
      references.gradient(
        lambda z: reference(z, teacher, temperature), student
      ),
    ),
    (
      to_teacher,
      references.gradient(
        lambda z: reference(student, z, temperature), teacher
      ),
    ),
  ):
    # Terms of order T cancel in examples that are nearly certain.
    assert_close(actual, expected, 1e-5, atol=1e-6 * temperature)


@each
def test_two_temperatures(loss, reference):
  run = value_and_grads(loss)
  student, teacher = logits(0), logits(1, scale=0.05)
  values, (to_student, _) = run(student, teacher, 1.5, 0.02)
  np.testing.assert_allclose(
    values, reference(student, teacher, 1.5, 0.02), rtol=1e-5
  )
  expected = references.gradient(
    lambda z: reference(z, teacher, 1.5, 0.02), student
  )
  assert_close(to_student, expected, 1e-5, atol=1e-6)
  # The same number twice is the same as naming it once.
  np.testing.assert_allclose(
    run(student, teacher, 3.0, 3.0)[0], run(student, teacher, 3.0)[0], rtol=1e-6
  )


@each
@pytest.mark.parametrize("axis", [0, -2])
def test_axis(loss, reference, axis):
  student, teacher = logits(0, (3, 5, 2)), logits(1, (3, 5, 2))
  where = np.ones(np.delete((3, 5, 2), axis), bool)
  where[0, 1] = False
  values = loss(student, teacher, axis=axis, where=where)
  expected = reference(
    np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
  )
  np.testing.assert_allclose(values, np.where(where, expected, 0), rtol=2e-6)


def accurate(student, teacher, temperature):
  """Values and gradients without T^2 and T, where the plain forms cancel.

  Float64 on top of the accurate form leaves about eight digits at a gap of
  1e-4; the plain form would leave one or two fewer than the library itself.
  """
  log_p = references.log_softmax(teacher, temperature)
  log_q = references.log_softmax(student, temperature)
  p, q, d = np.exp(log_p), np.exp(log_q), log_q - log_p
  kl = (p * (np.expm1(d) - d)).sum(-1)
  reverse = (q * (np.expm1(-d) + d)).sum(-1)
  m_p, m_q = np.log1p(np.expm1(d) / 2), np.log1p(np.expm1(-d) / 2)
  jsd = p * (np.expm1(m_p) - m_p) + q * (np.expm1(m_q) - m_q)
  difference = p * np.expm1(d)
  gradients = {
    "kl": (difference, -p * (d + kl[..., None])),
    "reverse_kl": (q * (d - reverse[..., None]), -difference),
  }
  # Derivatives by log q and log p, then through the softmax.
  to_q, to_p = -q * m_q / 2, -p * m_p / 2
  gradients["jsd"] = (
    to_q - q * to_q.sum(-1, keepdims=True),
    to_p - p * to_p.sum(-1, keepdims=True),
  )
  values = {"kl": kl, "reverse_kl": reverse, "jsd": jsd.sum(-1) / 2}
  return values, gradients


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("classes", [5, 1000])
@pytest.mark.parametrize(
  ("gap", "temperature"), [(1e-4, 1.0), (1e-3, 3.0), (3.0, 1e3), (3.0, 1e4)]
)
def test_near_equality_and_hot_keep_their_digits(
  name, classes, gap, temperature
):
  teacher = logits(0, (4, classes))
  student = teacher + logits(1, (4, classes), gap)
  values, gradients = accurate(student, teacher, temperature)
  got, (to_student, to_teacher) = value_and_grads(getattr(losses, name))(
    student, teacher, temperature
  )
  np.testing.assert_allclose(got, temperature**2 * values[name], rtol=1e-4)
  assert_close(to_student, temperature * gradients[name][0], 3e-6)
  assert_close(to_teacher, temperature * gradients[name][1], 3e-6)


@each
def test_an_offset_common_to_all_logits_costs_no_digits(loss, reference):
  # Multiples of 1/16, which stay exact beside 4096 in float32.
  student, teacher = (np.round(16 * logits(i)) / 16 for i in (0, 1))
  values, _ = value_and_grads(loss)(student + 4096, teacher - 4096, 1.0)
  np.testing.assert_allclose(values, reference(student, teacher), rtol=2e-6)


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_saturated_logits(loss, reference, dtype):
  """Gaps of 2e4: the values are right and the gradients what they should be."""
  student = np.zeros((4, 5), np.float32)
  teacher = np.zeros((4, 5), np.float32)
  student[:, :2] = [[1e4, -1e4], [-1e4, 1e4], [200, 0], [0, 0]]
  teacher[:, :2] = [[-1e4, 1e4], [-1e4, 1e4], [0, 200], [1e4, -1e4]]
  student, teacher = jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)
  values, grads = value_and_grads(loss)(student, teacher, 1.0)
  exact = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
  if loss in (losses.kl, losses.reverse_kl):
    expected = reference(*exact)
  else:
    # The reference takes log 0 here; the bounded divergence is known anyway.
    b = getattr(loss, "keywords", {}).get("beta", 0.5)
    apart = -b * np.log(b) - (1 - b) * np.log(1 - b)
    m = b * np.eye(5)[0] + (1 - b) / 5
    last = -b * np.log(m[0]) - (1 - b) * np.log(5 * m).mean()
    expected = [apart, 0.0, apart, last]
  np.testing.assert_allclose(values, expected, rtol=2e-4, atol=1e-9)
  for grad in grads:
    assert grad.dtype == dtype
    assert np.all(np.isfinite(np.asarray(grad, np.float32)))
  if loss is losses.kl:  # q - p
    np.testing.assert_allclose(
      np.asarray(grads[0], np.float32)[:, :3],
      [[1, -1, 0], [0, 0, 0], [1, -1, 0], [-0.8, 0.2, 0.2]],
      atol=1e-3,
    )


@each
@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min])
def test_classes_absent_on_both_sides(loss, reference, lowest):
  student, teacher = logits(0), logits(1)
  keep = np.array([1, 0, 1, 1, 0], bool)
  values, grads = value_and_grads(loss)(
    np.where(keep, student, lowest), np.where(keep, teacher, lowest), 2.0
  )
  student, teacher = student[:, keep], teacher[:, keep]
  np.testing.assert_allclose(
    values, reference(student, teacher, 2.0), rtol=2e-6
  )
  expected = (
    references.gradient(lambda z: reference(z, teacher, 2.0), student),
    references.gradient(lambda z: reference(student, z, 2.0), teacher),
  )
  for grad, small in zip(grads, expected, strict=True):
    np.testing.assert_array_equal(grad[:, ~keep], 0.0)
    assert_close(grad[:, keep], small, 1e-5, atol=2e-6)


@each
def test_no_class_at_all_is_zero(loss, reference):
  nothing = np.full((4, 5), -np.inf, np.float32)
  values, grads = value_and_grads(loss)(nothing, nothing, 1.0)
  for array in (values, *grads):
    np.testing.assert_array_equal(array, 0.0)


def test_kl_where_only_the_teacher_rules_a_class_out():
  """Nothing special: the class has p = 0 and q > 0."""
  student, teacher = logits(0), logits(1)
  teacher[:, 2] = -np.inf
  values, grads = value_and_grads(losses.kl)(student, teacher, 2.0)
  log_q = references.log_softmax(student, 2.0)
  with np.errstate(invalid="ignore", divide="ignore"):
    log_p = references.log_softmax(teacher, 2.0)
  p, keep = np.exp(log_p), np.isfinite(teacher)
  expected = 4 * np.where(keep, p * (np.where(keep, log_p, 0) - log_q), 0)
  np.testing.assert_allclose(values, expected.sum(-1), rtol=2e-6)
  np.testing.assert_allclose(grads[0], 2 * (np.exp(log_q) - p), atol=1e-6)
  np.testing.assert_array_equal(grads[1][:, 2], 0.0)


@pytest.mark.parametrize("loss", [losses.kl, losses.reverse_kl])
def test_infinite_divergence_is_finite_and_large(loss):
  ruled_out, full = logits(0), logits(1)
  ruled_out[:, 2] = -np.inf
  order = (ruled_out, full) if loss is losses.kl else (full, ruled_out)
  values, grads = value_and_grads(loss)(*order, 1.0)
  mass = np.exp(references.log_softmax(full))[:, 2]
  np.testing.assert_allclose(values, 1e5 * mass, rtol=2e-3)
  for grad in grads:
    assert np.all(np.isfinite(grad))
  if loss is losses.kl:
    # The student is led to the teacher's other classes, as they are.
    with np.errstate(divide="ignore"):
      q = np.exp(references.log_softmax(ruled_out))
    p = np.exp(references.log_softmax(full))
    expected = q * (1 - mass)[:, None] - p
    expected[:, 2] = 0.0
    np.testing.assert_allclose(grads[0], expected, atol=1e-6)


def test_jsd_with_classes_ruled_out_on_one_side_is_exact():
  student, teacher = logits(0), logits(1)
  student[:, 0], teacher[:, 1] = -np.inf, -np.inf
  values, grads = value_and_grads(losses.jsd)(student, teacher, 1.0)
  with np.errstate(divide="ignore", invalid="ignore"):
    p = np.exp(references.log_softmax(teacher))
    q = np.exp(references.log_softmax(student))
    m = (p + q) / 2
    terms = np.nan_to_num(p * np.log(p / m)) + np.nan_to_num(q * np.log(q / m))
  np.testing.assert_allclose(values, terms.sum(-1) / 2, rtol=1e-5)
  for grad in grads:
    assert np.all(np.isfinite(grad))


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_not_hidden(loss, reference, bad):
  good = logits(0)
  broken = good.copy()
  broken[1, 2] = bad
  for pair in ((broken, good), (good, broken), (broken, broken)):
    values = np.asarray(value_and_grads(loss)(*pair, 1.0)[0])
    assert np.isnan(values[1])
    assert np.all(np.isfinite(np.delete(values, 1)))


@each
def test_temperature_may_be_traced_and_differentiated(loss, reference):
  student, teacher = logits(0), logits(1)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def by_temperatures(temperature, teacher_temperature, student, teacher):
    return loss(
      student,
      teacher,
      temperature=temperature,
      teacher_temperature=teacher_temperature,
    ).sum()

  step = 1e-5
  expected = [
    (
      reference(student, teacher, 3.0 + a, 2.0 + b)
      - reference(student, teacher, 3.0 - a, 2.0 - b)
    ).sum()
    / (2 * step)
    for a, b in ((step, 0), (0, step))
  ]
  got = by_temperatures(3.0, 2.0, student, teacher)
  np.testing.assert_allclose(got, expected, rtol=1e-4)
  # Absent classes do not turn it into NaN.
  student[:, 1] = teacher[:, 1] = -np.inf
  assert np.all(np.isfinite(by_temperatures(3.0, 2.0, student, teacher)))


@each
@pytest.mark.parametrize("name", ["temperature", "teacher_temperature"])
@pytest.mark.parametrize(
  "bad", [0, 1e-60, -1.0, np.nan, np.inf, np.float32(-2)]
)
def test_bad_temperature(loss, reference, name, bad):
  z = logits(0)
  with pytest.raises(ValueError, match=f"^{name} is .* number above 0"):
    loss(z, z, **{name: bad})
  pair = (bad, 1.0) if name == "temperature" else (1.0, bad)
  values, _ = value_and_grads(loss)(z, z + 1, *map(float, pair))
  assert np.all(np.isnan(values))


@pytest.mark.parametrize("bad", ["hot", "4", True, 1j])
def test_temperature_of_the_wrong_kind(bad):
  z = logits(0)
  with pytest.raises(TypeError, match=r"temperature is .* number above 0"):
    losses.kl(z, z, temperature=bad)
  with pytest.raises(ValueError, match=r"temperature has shape \(4,\)"):
    losses.kl(z, z, temperature=np.ones(4))
  for good in (2, np.float64(2), jnp.bfloat16(2), jnp.asarray(2)):
    np.testing.assert_array_equal(
      losses.kl(z, z + z, temperature=good),
      losses.kl(z, z + z, temperature=2.0),
    )


@each
def test_forward_and_second_derivatives(loss, reference):
  student, teacher, tangent = logits(0), logits(1), logits(2)

  @jax.jit
  def derivatives(student):
    f = lambda z: loss(z, teacher, temperature=2.0).sum()
    _, slope = jax.jvp(f, (student,), (tangent,))
    return slope, *jax.jvp(jax.grad(f), (student,), (tangent,))

  slope, gradient, curvature = derivatives(student)
  np.testing.assert_allclose(slope, (gradient * tangent).sum(), rtol=1e-5)
  by_student = lambda z: references.gradient(
    lambda z: reference(z, teacher, 2.0), z
  )
  step = 1e-3
  expected = by_student(student + step * tangent)
  expected = (expected - by_student(student - step * tangent)) / (2 * step)
  np.testing.assert_allclose(curvature, expected, atol=2e-5)


@each
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_gradient_of_the_temperature(loss, reference, temperature):
  student, teacher = logits(0), logits(1)
  slope = jax.grad(lambda t: loss(student, teacher, temperature=t).sum())(
    temperature
  )
  at = lambda t: reference(student, teacher, t).sum()
  expected = (at(temperature + 1e-4) - at(temperature - 1e-4)) / 2e-4
  np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_kl_hessian_at_equality_is_the_fisher_matrix():
  z = logits(0, (4,))
  q = np.exp(references.log_softmax(z))
  hessian = jax.jit(jax.hessian(lambda s: losses.kl(s, z)))(z)
  np.testing.assert_allclose(hessian, np.diag(q) - np.outer(q, q), atol=1e-6)


def test_kl_tends_to_centred_logit_mse():
  """Hinton et al. 2015, Sec. 2.1: matching logits is the limit of large T."""
  student, teacher = logits(0), logits(1)
  gap = student - teacher
  gap -= gap.mean(-1, keepdims=True)
  limit = losses.logit_mse(gap, np.zeros_like(gap)) / gap.shape[-1]
  error = [
    np.abs(value_and_grads(losses.kl)(student, teacher, t)[0] - limit).max()
    for t in (10.0, 100.0, 1e3, 1e4)
  ]
  # First order in 1/T, down to rounding.
  np.testing.assert_allclose(error[1], error[0] / 10, rtol=0.2)
  np.testing.assert_allclose(error[2], error[0] / 100, rtol=0.2)
  assert error[3] < 1e-3


def test_kl_has_the_gradient_of_soft_cross_entropy():
  student, teacher = logits(0), logits(1)
  soft = jax.nn.softmax(teacher)
  np.testing.assert_allclose(
    value_and_grads(losses.kl)(student, teacher, 1.0)[1][0],
    jax.jit(jax.grad(lambda z: losses.cross_entropy(z, soft).sum()))(student),
    atol=1e-6,
  )


def test_reverse_kl_is_kl_with_the_sides_exchanged():
  student, teacher = logits(0), logits(1)
  forward, reverse = map(value_and_grads, (losses.kl, losses.reverse_kl))
  np.testing.assert_allclose(
    reverse(student, teacher, 3.0)[0], forward(teacher, student, 3.0)[0], 1e-6
  )
  # With two temperatures the factor is the student's on either side.
  np.testing.assert_allclose(
    reverse(student, teacher, 3.0, 2.0)[0] / 9,
    forward(teacher, student, 2.0, 3.0)[0] / 4,
    rtol=1e-5,
  )


@jax.jit
def jsd_of_beta(student, teacher, beta):
  return losses.jsd(student, teacher, beta=beta)


def test_jsd_beta_weights_the_teacher():
  student, teacher = logits(0), logits(1)
  np.testing.assert_allclose(
    jsd_of_beta(student, teacher, 0.2),
    jsd_of_beta(teacher, student, 0.8),
    rtol=1e-5,
  )
  # A teacher certain of the first of two classes, a student that is not.
  teacher, student = np.full((2, 4, 5), -np.inf, np.float32)
  teacher[:, 0], student[:, :2] = 0.0, 0.0
  p, q, beta = np.array([1.0, 0.0]), np.array([0.5, 0.5]), 0.2
  m = beta * p + (1 - beta) * q
  expected = beta * np.log(1 / m[0]) + (1 - beta) * (q * np.log(q / m)).sum()
  np.testing.assert_allclose(
    jsd_of_beta(student, teacher, beta), np.full(4, expected), rtol=1e-5
  )


def test_jsd_tends_to_kl_at_its_ends():
  student, teacher = logits(0), logits(1)
  for beta, scale, limit in (
    (1e-3, 1e-3, losses.kl(student, teacher)),
    (1 - 1e-3, 1e-3, losses.reverse_kl(student, teacher)),
  ):
    values = jsd_of_beta(student, teacher, beta)
    assert np.all(values < 2 * scale * limit)  # the loss itself tends to 0
    np.testing.assert_allclose(values / scale, limit, rtol=0.03)


@pytest.mark.parametrize("beta", [0, 1, 0.0, 1.0, -0.1, 1.1, np.nan])
def test_jsd_refuses_its_ends(beta):
  z = logits(0)
  with pytest.raises(ValueError, match=r"beta is .*kl.*reverse_kl"):
    losses.jsd(z, z, beta=beta)
  assert np.all(np.isnan(jsd_of_beta(z, z + 1, float(beta))))


@each
def test_offsets_of_their_own_cost_no_digits(loss, reference):
  """Rounded to the multiples of 1/64 that an offset of 4096 leaves exact."""
  student, teacher = (np.round(64 * logits(i)) / 64 for i in range(2))
  got, grads = value_and_grads(loss)(student + 4096, teacher - 4096, 2.0)
  np.testing.assert_allclose(got, reference(student, teacher, 2.0), rtol=2e-5)
  _, expected = value_and_grads(loss)(student, teacher, 2.0)
  for grad, wanted in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, wanted, atol=2e-5)


finite = hnp.arrays(np.float32, (4, 5), elements=st.floats(-1e4, 1e4, width=32))


@each
@given(student=finite, teacher=finite, temperature=st.floats(0.05, 1e3))
def test_never_negative_and_zero_only_at_equality(
  loss, reference, student, teacher, temperature
):
  run = value_and_grads(loss)
  values, grads = run(student, teacher, temperature)
  assert np.all(values >= 0)
  for grad in grads:
    assert np.all(np.isfinite(grad))
  equal, grads = run(student, student, temperature)
  for array in (equal, *grads):
    np.testing.assert_array_equal(array, 0.0)
  # An offset per example is no difference; powers of two keep it exact enough.
  shifted, _ = run(student + 64, student, temperature)
  assert np.all(shifted <= 1e-6 * (1 + np.abs(student).max()) ** 2)


@given(student=finite, teacher=finite)
def test_jsd_is_bounded(student, teacher):
  values, _ = value_and_grads(losses.jsd)(student, teacher, 1.0)
  assert np.all(values <= np.log(2) * (1 + 1e-6))
