import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses import decoupled, divergences
from tests import references

LABELS = np.array([0, 4, 2, 2])


def logits(seed, shape=(4, 5), scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


@functools.cache
def program(loss):
  """(values, gradients by student and teacher), scalars traced."""

  @jax.jit
  def run(student, teacher, labels, **options):
    def total(student, teacher):
      values = loss(student, teacher, labels, **options)
      return values.sum(), values

    grads, values = jax.grad(total, (0, 1), has_aux=True)(student, teacher)
    return values, grads

  return run


dkd, nkd = program(decoupled.dkd), program(decoupled.nkd)


def softmax(z):
  e = [np.exp(x - max(z)) for x in z]
  return [x / sum(e) for x in e]


def parts(z, label, temperature):
  """(true class against the rest, the others among themselves)."""
  p = softmax(np.asarray(z, np.float64) / temperature)
  others = [x for c, x in enumerate(p) if c != label]
  return [p[label], sum(others)], [x / sum(others) for x in others]


def kl(p, q):
  return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def dkd_reference(
  student,
  teacher,
  labels,
  temperature=1.0,
  teacher_temperature=None,
  target_weight=1.0,
  nontarget_weight=8.0,
):
  result = []
  for s, t, y in zip(student, teacher, labels, strict=True):
    q = parts(s, y, temperature)
    p = parts(t, y, teacher_temperature or temperature)
    loss = target_weight * kl(p[0], q[0]) + nontarget_weight * kl(p[1], q[1])
    result.append(temperature**2 * loss)
  return np.array(result)


def nkd_reference(
  student,
  teacher,
  labels,
  temperature=1.0,
  teacher_temperature=None,
  gamma=1.5,
):
  result = []
  for s, t, y in zip(student, teacher, labels, strict=True):
    _, q = parts(s, y, temperature)
    _, p = parts(t, y, teacher_temperature or temperature)
    (p_true, _), _ = parts(t, y, 1.0)
    (q_true, _), _ = parts(s, y, 1.0)
    others = -sum(a * np.log(b) for a, b in zip(p, q, strict=True))
    result.append(-p_true * np.log(q_true) + gamma * temperature**2 * others)
  return np.array(result)


each = pytest.mark.parametrize(
  ("run", "reference", "weights"),
  [
    (dkd, dkd_reference, {"target_weight": 0.5, "nontarget_weight": 3.0}),
    (nkd, nkd_reference, {"gamma": 0.7}),
  ],
  ids=["dkd", "nkd"],
)


def sixteenths(z):
  return np.round(16 * z) / 16


DEFAULTS = {
  dkd: {"target_weight": 1.0, "nontarget_weight": 8.0},
  nkd: {"gamma": 1.5},
}


def zero_row(z):
  return z * np.float32([[1], [0], [1], [0]])


@each
@pytest.mark.parametrize(
  "options",
  [{}, {"temperature": 4.0}, {"temperature": 1.5, "teacher_temperature": 0.5}],
)
def test_values_and_both_gradients(run, reference, weights, options):
  student, teacher = logits(0), logits(1)
  # The reference's defaults are the library's; one program for all.
  for given in (DEFAULTS[run], weights):
    given = given | options
    traced = {"temperature": 1.0} | given
    traced.setdefault("teacher_temperature", traced["temperature"])
    values, grads = run(student, teacher, LABELS, **traced)
    np.testing.assert_allclose(
      values, reference(student, teacher, LABELS, **given), rtol=1e-5
    )
    expected = (
      references.gradient(
        lambda z, given=given: reference(z, teacher, LABELS, **given), student
      ),
      references.gradient(
        lambda z, given=given: reference(student, z, LABELS, **given), teacher
      ),
    )
    for grad, right in zip(grads, expected, strict=True):
      np.testing.assert_allclose(grad, right, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize(
  ("student", "teacher"),
  [
    (logits(0, scale=30.0), logits(1, scale=30.0)),
    (zero_row(logits(0)), logits(1)),
    (logits(0), zero_row(logits(1))),
    (logits(0)[[0, 0, 0, 0]], logits(1)[[1, 1, 1, 1]]),
    # Multiples of 1/16, which stay exact beside 4096 in float32.
    (sixteenths(logits(0)) + 4096, sixteenths(logits(1)) - 4096),
  ],
  ids=["sigma 30", "zero student", "zero teacher", "duplicates", "offsets"],
)
def test_harsh_inputs(run, reference, weights, student, teacher):
  options = {"temperature": 2.0, "teacher_temperature": 2.0, **weights}
  values, grads = run(student, teacher, LABELS, **options)
  np.testing.assert_allclose(
    values, reference(student, teacher, LABELS, **options), rtol=1e-5, atol=1e-6
  )
  expected = references.gradient(
    lambda z: reference(z, teacher, LABELS, **options), student
  )
  np.testing.assert_allclose(grads[0], expected, rtol=1e-4, atol=1e-4)
  assert np.all(np.isfinite(grads[1]))


@pytest.mark.parametrize("loss", [decoupled.dkd, decoupled.nkd])
def test_bfloat16_is_computed_in_float32(loss):
  student, teacher = (jnp.asarray(logits(i), jnp.bfloat16) for i in (0, 1))
  reference = dkd_reference if loss is decoupled.dkd else nkd_reference
  exact = np.float64(student), np.float64(teacher)
  np.testing.assert_allclose(
    jax.jit(loss)(student, teacher, LABELS),
    reference(*exact, LABELS),
    rtol=1e-5,
  )


# dkd


def test_dkd_with_the_weights_1_and_1_minus_p_is_kl():
  student, teacher, temperature = logits(0), logits(1), 4.0
  p = np.exp(references.log_softmax(teacher, temperature))
  weights = (1 - p[np.arange(4), LABELS]).astype(np.float32)

  @jax.jit
  @jax.vmap
  def per_example(student, teacher, label, weight):
    return decoupled.dkd(
      student,
      teacher,
      label,
      nontarget_weight=weight,
      temperature=temperature,
    )

  np.testing.assert_allclose(
    per_example(student, teacher, LABELS, weights),
    references.kl(student, teacher, temperature),
    rtol=1e-5,
  )


def test_dkd_of_two_classes_has_only_its_target_part():
  student, teacher = logits(0, (4, 2)), logits(1, (4, 2))
  values = jax.jit(decoupled.dkd)(student, teacher, LABELS % 2)
  np.testing.assert_allclose(values, references.kl(student, teacher), rtol=1e-5)


def test_dkd_nontarget_part_is_kl_of_the_other_classes():
  student, teacher = logits(0), logits(1)
  others = np.arange(5) != LABELS[:, None]
  options = {"temperature": 3.0, "teacher_temperature": 3.0}
  weights = {"target_weight": 0.0, "nontarget_weight": 1.0}
  values, grads = dkd(student, teacher, LABELS, **options, **weights)
  short = (z[others].reshape(4, 4) for z in (student, teacher))
  np.testing.assert_allclose(values, references.kl(*short, 3.0), rtol=1e-5)
  for grad in grads:
    np.testing.assert_array_equal(grad[~others], 0.0)


@pytest.mark.parametrize("gap", [200.0, 1e4])
def test_dkd_of_confident_teacher_and_student(gap):
  """The others' part does not drown, and nothing overflows."""
  student, teacher = logits(0), logits(1)
  rows = np.arange(4)
  teacher[rows, LABELS] += gap
  student[rows[:2], LABELS[:2]] += gap
  student[rows[2:], LABELS[2:]] -= gap
  options = {"temperature": 1.0, "teacher_temperature": 1.0}
  nontarget = {"target_weight": 0.0, "nontarget_weight": 1.0}
  values, grads = dkd(student, teacher, LABELS, **options, **nontarget)
  others = np.arange(5) != LABELS[:, None]
  short = [z[others].reshape(4, 4) for z in (student, teacher)]
  np.testing.assert_allclose(values, references.kl(*short), rtol=1e-4)
  q, p = (np.exp(references.log_softmax(z)) for z in short)
  np.testing.assert_allclose(
    np.asarray(grads[0])[others].reshape(4, 4), q - p, atol=1e-5
  )
  target = {"target_weight": 1.0, "nontarget_weight": 0.0}
  values, grads = dkd(student, teacher, LABELS, **options, **target)
  np.testing.assert_allclose(values[:2], 0.0, atol=1e-12)
  np.testing.assert_allclose(
    values[2:], -references.log_softmax(student)[rows[2:], 2], rtol=1e-5
  )
  for grad in grads:
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("confidence", [0.0, 8.0])
@pytest.mark.parametrize("classes", [5, 300])
def test_dkd_near_equality_keeps_its_digits(classes, confidence):
  teacher = logits(0, (4, classes))
  teacher[np.arange(4), LABELS] += np.float32(confidence)
  student = teacher + logits(1, (4, classes), 1e-4)
  log_p = references.log_softmax(teacher)
  d = references.log_softmax(student) - log_p
  for weights in ((1.0, 0.0), (0.0, 1.0)):
    values, (grad, _) = dkd(
      student,
      teacher,
      LABELS,
      temperature=1.0,
      teacher_temperature=1.0,
      target_weight=weights[0],
      nontarget_weight=weights[1],
    )
    for i, y in enumerate(LABELS):
      p, r = np.exp(log_p[i]), d[i]
      others = np.arange(classes) != y
      share = p[others] / p[others].sum()
      rest = np.log1p((share * np.expm1(r[others])).sum())
      if weights[0]:
        p, r = np.array([p[y], p[others].sum()]), np.array([r[y], rest])
        got = np.asarray(grad)[i, y]
      else:
        p, r = share, r[others] - rest
        got = np.asarray(grad)[i, others]
      expected = (p * (np.expm1(r) - r)).sum()
      np.testing.assert_allclose(values[i], expected, rtol=1e-4)
      slope = p * np.expm1(r)  # q - p
      if weights[0]:
        slope = slope[0]
      np.testing.assert_allclose(
        got, slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max()
      )


def test_dkd_is_zero_at_equality():
  student = logits(0)
  values, grads = dkd(
    student,
    student,
    LABELS,
    temperature=3.0,
    teacher_temperature=3.0,
    target_weight=1.0,
    nontarget_weight=8.0,
  )
  for array in (values, *grads):
    np.testing.assert_allclose(array, 0.0, atol=1e-6)


def test_defaults():
  student, teacher = logits(0), logits(1)
  for loss, run in ((decoupled.dkd, dkd), (decoupled.nkd, nkd)):
    expected, _ = run(
      student,
      teacher,
      LABELS,
      temperature=1.0,
      teacher_temperature=1.0,
      **DEFAULTS[run],
    )
    np.testing.assert_allclose(
      jax.jit(loss)(student, teacher, LABELS), expected, rtol=1e-6
    )


# Labels and classes


@each
def test_absent_classes_do_not_exist(run, reference, weights):
  student, teacher = logits(0), logits(1)
  keep = np.array([1, 0, 1, 0, 1], bool)
  options = {"temperature": 2.0, "teacher_temperature": 1.5, **weights}
  labels = np.array([0, 4, 2, 2])
  short = np.array([0, 2, 1, 1])
  values, grads = run(
    np.where(keep, student, -np.inf),
    np.where(keep, teacher, -np.inf),
    labels,
    **options,
  )
  expected = reference(student[:, keep], teacher[:, keep], short, **options)
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  for grad in grads:
    np.testing.assert_array_equal(grad[:, ~keep], 0.0)
    assert np.all(np.isfinite(grad))


@each
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_no_class_but_the_true_one(run, reference, weights, side):
  """Finite, with finite gradients; 0 where both sides agree."""
  student, teacher = logits(0), logits(1)
  alone = np.arange(5) == LABELS[:, None]
  if side != "teacher":
    student = np.where(alone, student, -np.inf)
  if side != "student":
    teacher = np.where(alone, teacher, -np.inf)
  options = {"temperature": 2.0, "teacher_temperature": 2.0, **weights}
  values, grads = run(student, teacher, LABELS, **options)
  for array in (values, *grads):
    assert np.all(np.isfinite(array))
  if side == "both":
    for array in (values, *grads):
      np.testing.assert_array_equal(array, 0.0)


@each
def test_labels(run, reference, weights):
  student, teacher = logits(0), logits(1)
  loss = decoupled.dkd if run is dkd else decoupled.nkd
  with pytest.raises(ValueError, match=r"labels\[1\] is 5; it should be from"):
    loss(student, teacher, np.array([0, 5, 2, 2]))
  with pytest.raises(ValueError, match=r"labels has shape \(4, 1\).*\(4, 5\)"):
    loss(student, teacher, LABELS[:, None])
  with pytest.raises(TypeError, match="labels has dtype float32; .*integer"):
    loss(student, teacher, LABELS.astype(np.float32))
  options = {"temperature": 2.0, "teacher_temperature": 2.0, **weights}
  values, (grad, _) = run(student, teacher, np.array([0, 5, 2, -1]), **options)
  assert np.isnan(values).tolist() == [False, True, False, True]
  assert np.isnan(grad).any(-1).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
  ("loss", "name"),
  [
    (decoupled.dkd, "target_weight"),
    (decoupled.dkd, "nontarget_weight"),
    (decoupled.nkd, "gamma"),
  ],
)
@pytest.mark.parametrize("bad", [-1.0, np.inf, np.nan])
def test_weights_out_of_range(loss, name, bad):
  with pytest.raises(ValueError, match=f"^{name} is .*finite number, 0 or mo"):
    loss(logits(0), logits(1), LABELS, **{name: bad})


def test_axis():
  student, teacher = logits(0, (2, 5, 3)), logits(1, (2, 5, 3))
  labels = np.array([[0, 4, 2], [1, 1, 3]])
  flat = [np.moveaxis(z, 1, -1).reshape(-1, 5) for z in (student, teacher)]
  for loss, reference in (
    (decoupled.dkd, dkd_reference),
    (decoupled.nkd, nkd_reference),
  ):
    values = jax.jit(functools.partial(loss, axis=1))(student, teacher, labels)
    assert values.shape == (2, 3)
    np.testing.assert_allclose(
      values.ravel(), reference(*flat, labels.ravel()), rtol=1e-5
    )


# nkd


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nkd_others_part_is_that_of_dkd_and_an_entropy(temperature):
  student, teacher = logits(0), logits(1)
  options = {"temperature": temperature, "teacher_temperature": temperature}
  one, (one_grad, _) = nkd(student, teacher, LABELS, gamma=1.0, **options)
  two, (two_grad, _) = nkd(student, teacher, LABELS, gamma=2.0, **options)
  weights = {"target_weight": 0.0, "nontarget_weight": 1.0}
  part, (part_grad, _) = dkd(student, teacher, LABELS, **options, **weights)
  entropy = [
    -sum(x * np.log(x) for x in parts(t, y, temperature)[1])
    for t, y in zip(teacher, LABELS, strict=True)
  ]
  np.testing.assert_allclose(
    two - one, part + temperature**2 * np.array(entropy), rtol=1e-4
  )
  np.testing.assert_allclose(two_grad - one_grad, part_grad, atol=1e-5)


def test_nkd_without_the_others_is_weighted_cross_entropy():
  student, teacher = logits(0), logits(1)
  rows = np.arange(4)
  options = {"temperature": 7.0, "teacher_temperature": 7.0}
  values, _ = nkd(student, teacher, LABELS, gamma=0.0, **options)
  p = np.exp(references.log_softmax(teacher))[rows, LABELS]
  log_q = references.log_softmax(student)[rows, LABELS]
  np.testing.assert_allclose(values, -p * log_q, rtol=1e-5)


def test_dkd_with_unit_weights_bounds_kl_from_above():
  """kl weights the others' part by 1 - p(y), dkd by 1."""
  student, teacher = logits(0), logits(1)
  unit = {"target_weight": 1.0, "nontarget_weight": 1.0}
  options = {"temperature": 2.0, "teacher_temperature": 2.0}
  values, _ = dkd(student, teacher, LABELS, **unit, **options)
  below = jax.jit(divergences.kl)(student, teacher, temperature=2.0)
  assert np.all(np.asarray(values) > np.asarray(below))
