"""What holds for every target that is logits: one table, the same tests."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses, targets
from kd_jax.losses import _numerics as numerics
from tests import references

EXAMPLES, CLASSES = 4, 5


class Case(NamedTuple):
  """A target and what it should be.

  Attributes:
    target: takes arrays [..., EXAMPLES, CLASSES], labels [EXAMPLES] if there
      are some, and by keyword the scalars, `axis` and `where`.
    reference: arrays, labels, scalars -> log-probabilities at the temperature,
      in float64.
    arrays: the leading axes of each array.
    scalars: values for the traced scalars.
    labels: whether there are labels.
  """

  target: Callable[..., jax.Array]
  reference: Callable[..., np.ndarray]
  arrays: tuple[tuple[int, ...], ...]
  scalars: dict[str, float]
  labels: bool = False


def softmax(z, temperature=1.0):
  return np.exp(references.log_softmax(z, temperature))


def ensemble(z, weights=(1, 1, 1), temperature=1.0):
  total = 0.0
  for weight, member in zip(weights, z, strict=True):
    total = total + weight * softmax(member, temperature)
  return np.log(total / sum(weights))


def geometric(z, weights=(1, 1, 1), temperature=1.0):
  product = 1.0
  for weight, member in zip(weights, z, strict=True):
    product = product * softmax(member, temperature) ** (weight / sum(weights))
  return np.log(product / product.sum(-1, keepdims=True))


def peers(z, mean=ensemble, temperature=1.0):
  others = [np.delete(z, i, axis=0) for i in range(len(z))]
  ones = np.ones(len(z) - 1)
  return np.stack([mean(other, ones, temperature) for other in others])


def mix_labels(teacher, labels, label_weight, temperature=1.0):
  p = (1 - label_weight) * softmax(teacher, temperature)
  p[np.arange(len(labels)), labels] += label_weight
  return np.log(p)


def mix_soft_labels(teacher, soft, label_weight, temperature=1.0):
  p = (1 - label_weight) * softmax(teacher, temperature)
  return np.log(p + label_weight * soft)


def sort_label_first(teacher, labels):
  result = np.empty_like(np.asarray(teacher, np.float64))
  for z, label, out in zip(teacher, labels, result, strict=True):
    others = [c for c in sorted(range(len(z)), key=lambda c: -z[c])]
    others.remove(label)
    out[[label, *others]] = sorted(z, reverse=True)
  return references.log_softmax(result)


def alpha_mixture(student, teacher, order, mixing, temperature=1.0):
  q, p = softmax(student, temperature), softmax(teacher, temperature)
  if order == 1:
    r = p**mixing * q ** (1 - mixing)
  else:
    a = (1 - order) / 2
    r = (mixing * p**a + (1 - mixing) * q**a) ** (1 / a)
  return np.log(r / r.sum(-1, keepdims=True))


def delta(tuned, base, start, strength=1.0):
  ratio = softmax(tuned) / softmax(base)
  r = softmax(start) * ratio**strength
  return np.log(r / r.sum(-1, keepdims=True))


def probabilities(soft):
  """The mixture takes distributions: these are made in float64."""
  return np.exp(soft) / np.exp(soft).sum(-1, keepdims=True)


def soft_target(teacher, soft, **kwargs):
  """Labels as logits, so that they are made like the other arrays here."""
  axis, where = kwargs.get("axis", -1), kwargs.get("where")
  if where is not None and where.shape == (EXAMPLES,):
    soft = jnp.where(where[:, None], soft, 0.0)
  if jnp.issubdtype(soft.dtype, jnp.floating):
    soft = jax.nn.softmax(soft.astype(jnp.float32), axis)
  return targets.mix_labels(teacher, soft, **kwargs)


CASES = {
  "ensemble": Case(
    lambda z, w0, w1, **kw: targets.ensemble(
      z, weights=jnp.stack([w0, w1, 0.5]), **kw
    ),
    lambda z, w0, w1, temperature: ensemble(z, (w0, w1, 0.5), temperature),
    ((3,),),
    {"w0": 0.2, "w1": 1.3, "temperature": 0.7},
  ),
  "ensemble_logit": Case(
    functools.partial(targets.ensemble, space="logit"), geometric, ((3,),), {}
  ),
  "peers": Case(targets.peers, peers, ((3,),), {"temperature": 3.0}),
  "peers_logit": Case(
    functools.partial(targets.peers, space="logit"),
    functools.partial(peers, mean=geometric),
    ((3,),),
    {},
  ),
  "mix_labels": Case(
    targets.mix_labels,
    mix_labels,
    ((),),
    {"label_weight": 0.3, "temperature": 2.0},
    labels=True,
  ),
  "mix_soft_labels": Case(
    soft_target,
    lambda teacher, soft, **kw: mix_soft_labels(
      teacher, probabilities(soft), **kw
    ),
    ((), ()),
    {"label_weight": 0.6, "temperature": 1.0},
  ),
  "sort_label_first": Case(
    targets.sort_label_first, sort_label_first, ((),), {}, labels=True
  ),
  "delta": Case(targets.delta, delta, ((), (), ()), {"strength": 0.7}),
  "calibrated": Case(
    targets.calibrated, references.log_softmax, ((),), {"temperature": 1.7}
  ),
} | {
  f"alpha_mixture_{order}": Case(
    targets.alpha_mixture,
    alpha_mixture,
    ((), ()),
    {"order": order, "mixing": 0.3, "temperature": 2.0},
  )
  for order in (-1.0, 0.3, 1.0, 3.0)
}
# `calibrated` has a temperature that is not that of the loss.
AT_TEMPERATURE = {name for name in CASES if name != "calibrated"}
every = pytest.mark.parametrize("name", CASES)
# Without those that differ only in their numbers.
every_program = pytest.mark.parametrize(
  "name", {case.target: name for name, case in CASES.items()}.values()
)
kl = jax.jit(losses.kl)
LABELS = np.array([3, 0, 0, 4], np.int32)


def draw(name, scale=2.0, seed=0) -> tuple[np.ndarray, ...]:
  rng = np.random.default_rng([seed, *name.encode()])
  return tuple(
    (scale * rng.normal(size=(*lead, EXAMPLES, CLASSES))).astype(np.float32)
    for lead in CASES[name].arrays
  )


def loss_temperature(name, scalars):
  return scalars.get("temperature", 1.0) if name in AT_TEMPERATURE else 1.0


def target_of(name, arrays, scalars, labels=None, **kwargs):
  case = CASES[name]
  extra = (LABELS if labels is None else labels,) if case.labels else ()
  return case.target(*arrays, *extra, **scalars, **kwargs)


def expected(name, arrays, scalars, labels=LABELS):
  """Log-probabilities in float64."""
  case = CASES[name]
  arrays = [np.asarray(array, np.float64) for array in arrays]
  return case.reference(*arrays, *((labels,) if case.labels else ()), **scalars)


def probe(shape):
  """What the gradients are those of: fixed numbers times log-probabilities."""
  return np.random.default_rng(7).normal(size=shape)


@functools.cache
def program(target_function, labels, at_temperature):
  """One program for the cases that differ in nothing but numbers."""

  @jax.jit
  def run(arrays, scalars, where):
    def total(arrays, scalars):
      extra = (LABELS,) if labels else ()
      target = target_function(*arrays, *extra, **scalars, where=where)
      here = target > numerics.ABSENT
      temperature = scalars.get("temperature", 1.0) if at_temperature else 1.0
      log_p = numerics.log_softmax(target, temperature, -1)
      terms = jnp.where(here, probe(target.shape) * log_p, 0.0)
      return jnp.where(where[..., None], terms, 0.0).sum(), target

    grads, target = jax.grad(total, argnums=(0, 1), has_aux=True)(
      arrays, scalars
    )
    return target, *grads

  return run


def compiled(name):
  """(target, gradients by arrays, gradients by scalars), compiled."""
  case = CASES[name]
  run = program(case.target, case.labels, name in AT_TEMPERATURE)
  everyone = np.ones(EXAMPLES, bool)
  # In NumPy, where looking at a part of an array is not a program.
  return lambda arrays, scalars=None, where=everyone: jax.device_get(
    run(arrays, case.scalars if scalars is None else scalars, where)
  )


def assert_close(actual, expected, rtol, atol=0.0):
  """Agreement relative to the largest entry of each example."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
  scale = np.abs(expected).max(-1, keepdims=True)
  worst = (np.abs(actual - expected) / (rtol * scale + atol)).max()
  assert worst <= 1.0, f"error is {worst} times the tolerance"


@every
def test_the_distribution_and_its_gradients(name):
  arrays, scalars = draw(name), CASES[name].scalars
  target, grads, scalar_grads = compiled(name)(arrays)
  want = expected(name, arrays, scalars)
  assert target.dtype == jnp.float32 and target.shape == want.shape
  log_p = references.log_softmax(target, loss_temperature(name, scalars))
  np.testing.assert_allclose(log_p, want, rtol=2e-6, atol=1e-6)
  weights = probe(want.shape)
  for i, grad in enumerate(grads):
    slots = lambda x, i=i: (*arrays[:i], x, *arrays[i + 1 :])
    numeric = references.gradient(
      lambda x, slots=slots: weights * expected(name, slots(x), scalars),
      arrays[i],
    )
    assert_close(grad, numeric, 1e-5, atol=1e-6)
  for key, grad in scalar_grads.items():
    if key == "order":
      continue  # jumps to the geometric mean in the reference; tested apart
    numeric = references.gradient(
      lambda x, key=key: (
        weights * expected(name, arrays, scalars | {key: x[0]})
      ),
      np.array([scalars[key]]),
    )
    np.testing.assert_allclose(grad, numeric[0], rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("temperature", [0.25, 1.0, 50.0])
def test_kl_at_the_temperature_is_that_to_the_distribution(name, temperature):
  scalars = dict(CASES[name].scalars)
  if "temperature" not in scalars or name not in AT_TEMPERATURE:
    temperature = 1.0
  else:
    scalars["temperature"] = temperature
  arrays = draw(name, seed=1)
  target, *_ = compiled(name)(arrays, scalars)
  want = expected(name, arrays, scalars)
  student = np.random.default_rng(3).normal(size=want.shape)
  student = student.astype(np.float32)
  log_q = references.log_softmax(student, temperature)
  np.testing.assert_allclose(
    kl(student, target, temperature=temperature),
    temperature**2 * references.kl_of_logs(want, log_q),
    rtol=2e-5 * max(temperature, 1.0),
    atol=1e-6,
  )


@every
@pytest.mark.parametrize("scale", [0.0, 1e-30, 30.0, 1e4])
def test_harsh_logits(name, scale):
  arrays = draw(name, scale)
  target, grads, scalar_grads = compiled(name)(arrays)
  for array in jax.tree.leaves((target, grads, scalar_grads)):
    assert np.all(np.isfinite(array))
  if scale <= 30.0:
    scalars = CASES[name].scalars
    want = expected(name, arrays, scalars)
    log_p = references.log_softmax(target, loss_temperature(name, scalars))
    np.testing.assert_allclose(log_p, want, rtol=1e-5, atol=1e-5)


@every
def test_an_offset_per_example_changes_nothing(name):
  arrays = tuple(np.round(16 * array) / 16 for array in draw(name))
  moved = tuple(array + 4096 * (i + 1) for i, array in enumerate(arrays))
  both = [compiled(name)(x)[0] for x in (arrays, moved)]
  temperature = loss_temperature(name, CASES[name].scalars)
  plain, shifted = (references.log_softmax(x, temperature) for x in both)
  # The mean of logits is a mean of logits, with their offset.
  atol = 2e-3 if "logit" in name or name == "calibrated" else 1e-5
  np.testing.assert_allclose(shifted, plain, atol=atol)


@every
@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min])
def test_absent_classes_stay_absent(name, lowest):
  keep = np.array([1, 0, 1, 1, 1], bool)
  arrays = draw(name)
  # Soft labels are distributions, made from logits here.
  holes = tuple(np.where(keep, array, lowest) for array in arrays)
  labels = np.array([2, 0, 0, 3])  # LABELS among the classes that are kept
  target, grads, scalar_grads = compiled(name)(holes)
  np.testing.assert_array_equal(target[..., ~keep], -np.inf)
  scalars = CASES[name].scalars
  want = expected(name, [a[..., keep] for a in arrays], scalars, labels)
  log_p = references.log_softmax(
    target[..., keep], loss_temperature(name, scalars)
  )
  np.testing.assert_allclose(log_p, want, rtol=2e-6, atol=1e-6)
  for grad in grads:
    np.testing.assert_array_equal(grad[..., ~keep], 0.0)
  for array in jax.tree.leaves((grads, scalar_grads)):
    assert np.all(np.isfinite(array))


@every
def test_no_class_at_all_is_harmless(name):
  arrays = tuple(np.full_like(array, -np.inf) for array in draw(name))
  if name == "mix_soft_labels":  # needs distributions
    arrays = (arrays[0], draw(name)[1])
  target, grads, scalar_grads = compiled(name)(arrays)
  assert not np.any(np.isnan(target))
  for array in jax.tree.leaves((grads, scalar_grads)):
    assert np.all(np.isfinite(array))


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_not_hidden_and_stay_where_they_are(name, bad):
  arrays = draw(name)
  good = np.asarray(compiled(name)(arrays)[0])
  arrays[0][..., 1, 2] = bad
  target = np.asarray(compiled(name)(arrays)[0])
  rows = np.isfinite(target).all(-1).reshape(-1, EXAMPLES)
  assert not rows[:, 1].any() or name.startswith("peers")
  assert rows[:, [0, 2, 3]].all()
  np.testing.assert_array_equal(target[..., 0, :], good[..., 0, :])


@every
def test_masked_examples_do_no_harm(name):
  arrays = draw(name)
  where = np.array([True, False, True, False])
  poisoned = tuple(array.copy() for array in arrays)
  for array in poisoned:
    array[..., 1, :] = np.nan
    array[..., 3, 2] = np.inf
  target, grads, scalar_grads = compiled(name)(poisoned, where=where)
  rows = lambda x: np.asarray(x)[..., where, :]
  scalars = CASES[name].scalars
  want = expected(
    name, [rows(array) for array in arrays], scalars, LABELS[where]
  )
  log_p = references.log_softmax(rows(target), loss_temperature(name, scalars))
  np.testing.assert_allclose(log_p, want, rtol=2e-6, atol=1e-6)
  assert np.all(np.isfinite(target))
  for grad in grads:
    np.testing.assert_array_equal(grad[..., ~where, :], 0.0)
    assert np.all(np.isfinite(grad)) and np.any(rows(grad))
  for grad in scalar_grads.values():
    assert np.isfinite(grad)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].labels])
def test_masked_labels_may_be_anything(name):
  arrays, scalars = draw(name), CASES[name].scalars
  where = np.array([True, False, True, True])
  labels = np.array([3, -100, 0, 4])
  plain = np.asarray(compiled(name)(arrays)[0])
  run = jax.jit(
    lambda y, where: target_of(name, arrays, scalars, y, where=where)
  )
  masked = np.asarray(run(labels, where))
  np.testing.assert_allclose(masked[where], plain[where], rtol=1e-6, atol=1e-6)
  assert np.all(np.isfinite(masked))
  with pytest.raises(ValueError, match=r"^labels\[1\] is -100; it should be"):
    target_of(name, arrays, scalars, labels)
  # Traced ones cannot be seen.
  traced = np.asarray(run(labels, np.ones(EXAMPLES, bool)))
  np.testing.assert_array_equal(np.isnan(traced).all(-1), labels < 0)
  assert not np.isnan(traced[where]).any()


@every_program
def test_axis_vmap_and_bfloat16(name):
  arrays, scalars = draw(name), CASES[name].scalars
  half = tuple(jnp.asarray(array, jnp.bfloat16) for array in arrays)

  @jax.jit
  def run(arrays, half):
    batch = target_of(name, arrays, scalars)
    moved = [jnp.moveaxis(array, -1, -2) for array in arrays]
    axis = jnp.moveaxis(target_of(name, moved, scalars, axis=-2), -2, -1)
    one = lambda label, *arrays: target_of(name, arrays, scalars, label)
    axes = (0, *(array.ndim - 2 for array in arrays))
    rows = jax.vmap(one, axes, batch.ndim - 2)(LABELS, *arrays)
    return batch, axis, rows, target_of(name, half, scalars)

  *same, low = jax.device_get(run(arrays, half))
  for target in same:
    np.testing.assert_allclose(
      target, compiled(name)(arrays)[0], rtol=1e-6, atol=1e-6
    )
  exact = tuple(np.asarray(array, np.float32) for array in half)
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(
    low, compiled(name)(exact)[0], rtol=1e-6, atol=1e-6
  )


BAD = {
  "temperature": 0.0,
  "label_weight": 1.5,
  "mixing": -0.1,
  "order": np.inf,
  "strength": np.nan,
  "w0": -1.0,
}


@every
def test_bad_numbers(name):
  arrays, scalars = draw(name), CASES[name].scalars
  for key in scalars.keys() & BAD.keys():
    bad = scalars | {key: BAD[key]}
    with pytest.raises(ValueError, match="it should be|should be finite"):
      target_of(name, arrays, bad)
    assert np.all(np.isnan(compiled(name)(arrays, bad)[0])), key
  if "temperature" in scalars:
    with pytest.raises(TypeError, match=r"^temperature is 'hot'; it should be"):
      target_of(name, arrays, scalars | {"temperature": "hot"})


@every_program
def test_wrong_arrays(name):
  arrays, scalars = draw(name), CASES[name].scalars
  function = lambda *arrays, **kw: target_of(name, arrays, scalars, **kw)
  for i in range(len(arrays)):
    integers = [*arrays[:i], arrays[i].astype(int), *arrays[i + 1 :]]
    if name != "mix_soft_labels" or i == 0:
      with pytest.raises(TypeError, match="has dtype int.*should be a float"):
        function(*integers)
    shorter = [*arrays[:i], arrays[i][..., :-1, :], *arrays[i + 1 :]]
    if len(arrays) > 1:
      with pytest.raises(
        ValueError,
        match=r"has shape \(4, 5\) and .*\(3, 5\)"
        if i
        else r"has shape \(3, 5\) and .*\(4, 5\)",
      ):
        function(*shorter)
  with pytest.raises(ValueError, match=r"where has shape \(3,\)"):
    function(*arrays, where=np.ones(3, bool))
  with pytest.raises(TypeError, match="where has dtype float32"):
    function(*arrays, where=np.ones(4, np.float32))
  if name != "mix_soft_labels":
    with pytest.raises(ValueError, match="axis is 3"):
      function(*arrays, axis=3)
  if CASES[name].labels:
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
      function(*arrays, labels=LABELS[:3])
    with pytest.raises(TypeError, match="labels has dtype float32"):
      function(*arrays, labels=LABELS.astype(np.float32))


def test_the_table_holds_every_target():
  elsewhere = {
    "confidence_weights",
    "importance_samples",
    "ofd_margin",
    "permute_nonmax",
    "top_k",
    "virtual",
  }
  functions = {
    name
    for name, value in vars(targets).items()
    if callable(value) and not isinstance(value, type)
  }
  here: set[Any] = {
    name for name in functions if any(case.startswith(name) for case in CASES)
  }
  here.add("mix_labels")
  assert functions == here | elsewhere
