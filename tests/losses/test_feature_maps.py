import functools
import math
from typing import Any, NamedTuple

from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.losses import feature_maps
from tests import references

# References: one example, [height, width, channels], in float64


def positions(x):
  return list(np.ndindex(x.shape[:-1]))


def attention(x, p):
  squares = [sum(abs(v) ** p for v in x[place]) for place in positions(x)]
  return np.array(squares) / (np.linalg.norm(squares) or 1.0)


def attention_transfer(s, t, p):
  return np.linalg.norm(attention(s, p) - attention(t, p))


def channels(x):
  maps = [x[..., c].ravel() for c in range(x.shape[-1])]
  return [f / (np.linalg.norm(f) or 1.0) for f in maps]


def nst(s, t):
  def mean_kernel(first, second):
    return np.mean([(f @ g) ** 2 for f in first for g in second])

  s, t = channels(s), channels(t)
  return mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)


def pool(x, height, width, how):
  """PyTorch's adaptive pooling."""
  result = np.zeros((height, width, x.shape[-1]))
  for i, j in np.ndindex(height, width):
    rows = slice(
      math.floor(i * x.shape[0] / height),
      math.ceil((i + 1) * x.shape[0] / height),
    )
    columns = slice(
      math.floor(j * x.shape[1] / width),
      math.ceil((j + 1) * x.shape[1] / width),
    )
    result[i, j] = how(x[rows, columns], (0, 1))
  return result


def flow(first, second, how):
  height = min(first.shape[0], second.shape[0])
  width = min(first.shape[1], second.shape[1])
  first = pool(first, height, width, how)
  second = pool(second, height, width, how)
  matrix = np.zeros((first.shape[-1], second.shape[-1]))
  for place in positions(first):
    matrix += np.outer(first[place], second[place]) / (height * width)
  return matrix


def fsp(s, s2, t, t2, how=np.max):
  return np.linalg.norm(flow(s, s2, how) - flow(t, t2, how)) ** 2


def cwd(s, t, temperature):
  return temperature**2 * np.mean(
    [
      references.kl_of_logs(
        references.log_softmax(t[..., c].ravel(), temperature),
        references.log_softmax(s[..., c].ravel(), temperature),
      )
      for c in range(s.shape[-1])
    ]
  )


def hierarchical_context(s, t):
  mean_square = lambda a, b: np.mean((a - b) ** 2)
  weighted, weight = [(1.0, mean_square(s, t))], 1.0
  for level in (4, 2, 1):
    if level < s.shape[0]:
      weight /= 2
      pooled = (pool(x, level, level, np.mean) for x in (s, t))
      weighted.append((weight, mean_square(*pooled)))
  return sum(w * d for w, d in weighted) / sum(w for w, _ in weighted)


class Case(NamedTuple):
  loss: Any
  reference: Any  # of one example
  shapes: tuple[tuple[int, ...], ...] = ((2, 3, 4), (2, 3, 4))
  any_scale: bool = False  # whether the scale of an example does not count


def attention_case(p, form, scale=lambda x: x):
  return Case(
    functools.partial(feature_maps.attention_transfer, p=p, form=form),
    lambda s, t: scale(attention_transfer(s, t, p)),
    ((2, 3, 4), (2, 3, 2)),
    any_scale=True,
  )


def fsp_loss(s, s2, t, t2, **options):
  return feature_maps.fsp((s, s2), (t, t2), **options)


# The later map is smaller, by a factor and not, and in one axis only.
PAIRS = ((4, 3, 2), (2, 2, 3), (3, 2, 2), (1, 4, 3))
CASES = {
  "attention_1": attention_case(1, "released", lambda x: x**2 / 6),
  "attention_2": attention_case(2, "released", lambda x: x**2 / 6),
  "attention_4_paper": attention_case(4, "paper"),
  "nst_many_channels": Case(
    feature_maps.nst, nst, ((2, 2, 4), (2, 2, 2)), any_scale=True
  ),
  "nst_many_positions": Case(
    feature_maps.nst, nst, ((2, 4, 4), (2, 4, 2)), any_scale=True
  ),
  "fsp": Case(fsp_loss, fsp, PAIRS),
  "fsp_mean": Case(
    functools.partial(fsp_loss, form="mean"),
    lambda *maps: fsp(*maps, how=np.mean) / 6,
    PAIRS,
  ),
  "cwd": Case(
    functools.partial(feature_maps.cwd, temperature=2.0),
    functools.partial(cwd, temperature=2.0),
  ),
  "hierarchical_context": Case(
    feature_maps.hierarchical_context,
    hierarchical_context,
    ((5, 3, 2), (5, 3, 2)),
  ),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@functools.cache
def program(loss):
  """(values, gradients by all maps), compiled once for all tests."""

  @jax.jit
  def run(maps, where):
    def total(maps):
      values = loss(*maps, where=where)
      return values.sum(), values

    grads, values = jax.grad(total, has_aux=True)(maps)
    return values, grads

  return run


def run(case, maps, where=None):
  where = np.ones(len(maps[0]), bool) if where is None else where
  return program(case.loss)(tuple(maps), where)


def examples(reference, maps):
  maps = [np.float64(x) for x in maps]
  return np.array([reference(*one) for one in zip(*maps, strict=True)])


def draw(case, scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  return [
    (scale * rng.normal(size=(3, *shape))).astype(np.float32)
    for shape in case.shapes
  ]


def assert_matches(case, maps, rtol=1e-5):
  """Values and all gradients; errors relative to the example's largest."""
  values, grads = run(case, maps)
  size = np.abs(examples(case.reference, maps))
  np.testing.assert_allclose(values, size, rtol=rtol, atol=1e-6)
  for i, grad in enumerate(grads):
    replaced = lambda x, i=i: [*maps[:i], x, *maps[i + 1 :]]
    expected = references.gradient(
      lambda x, replaced=replaced: examples(case.reference, replaced(x)),
      maps[i],
    )
    scale = np.abs(expected).max((1, 2, 3), keepdims=True)
    worst = (np.abs(grad - expected) / (rtol * scale + 1e-6)).max()
    assert worst <= 1.0, f"error is {worst} times the tolerance"


@each
def test_values_and_all_gradients_match_float64(case):
  assert_matches(case, draw(case))


@each
def test_large_and_rounded_inputs(case):
  maps = [
    np.float32(jnp.asarray(x, jnp.bfloat16)) for x in draw(case, 30, seed=1)
  ]
  # Duplicate examples, and a channel that is 0 everywhere.
  for x in maps:
    x[1] = x[0]
  if case.loss is not fsp_loss:  # whose maximum would have ties there
    maps[0][2, :, :, 0] = 0.0
  student, *others = maps
  values, grads = run(case, maps)
  expected = examples(case.reference, maps)
  np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
  by_student = lambda x: examples(case.reference, [x, *others])
  expected = references.gradient(by_student, student)
  if any(case is CASES[name] for name in CASES if name.startswith("nst")):
    # The reference's direction jumps there; the library takes 0.
    np.testing.assert_array_equal(grads[0][2, :, :, 0], 0.0)
    expected[2, :, :, 0] = 0.0
  scale = np.abs(expected).max((1, 2, 3), keepdims=True)
  worst = (np.abs(grads[0] - expected) / (1e-4 * scale + 1e-6)).max()
  assert worst <= 1.0, f"error is {worst} times the tolerance"


@each
def test_masks_take_examples_out(case):
  where = np.array([True, False, True])
  maps = draw(case)
  expected = examples(case.reference, [x[where] for x in maps])
  _, whole = run(case, maps)
  for x, fill in zip(maps, (np.nan, np.inf, -np.inf, 3e38), strict=False):
    x[1] = fill
  values, grads = run(case, maps, where)
  np.testing.assert_allclose(values[where], expected, rtol=1e-5)
  assert values[1] == 0.0
  for grad, unmasked in zip(grads, whole, strict=True):
    np.testing.assert_array_equal(grad[1], 0.0)
    np.testing.assert_allclose(grad[where], unmasked[where], rtol=1e-6)


@each
@pytest.mark.parametrize("scale", [1e4, 1e-30, 0.0])
def test_extreme_scales(case, scale):
  scale = np.float32(scale)
  expected, expected_grads = run(case, draw(case))
  first, *others = draw(case)
  for maps in (
    [scale * first, *others],
    [scale * x for x in draw(case)],
    [scale * np.ones_like(x) for x in draw(case)],
  ):
    values, grads = run(case, maps)
    for array in (values, *grads):
      assert np.all(np.isfinite(array))
  if case.any_scale and scale > 0:
    values, grads = run(case, [scale * first, *others])
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    np.testing.assert_allclose(
      scale * grads[0], expected_grads[0], rtol=1e-3, atol=1e-6
    )


@each
def test_equal_maps_cost_nothing(case):
  if len(case.shapes) == 4:
    # Maps of several sizes: all of the same number.
    maps = [np.full((3, *shape), 1.5, np.float32) for shape in case.shapes]
  else:
    # With every channel twice where the student has twice as many.
    teacher = draw(case)[1]
    teacher[1] = 0.0
    copies = case.shapes[0][-1] // case.shapes[1][-1]
    maps = [np.concatenate([teacher] * copies, -1), teacher]
  values, grads = run(case, maps)
  np.testing.assert_allclose(values, 0.0, atol=1e-6)
  for grad in grads:
    assert np.all(np.isfinite(grad))


@each
def test_nan_is_not_hidden(case):
  for i in range(len(case.shapes)):
    maps = draw(case)
    maps[i][1, 0, 0, 0] = np.nan
    assert np.isnan(run(case, maps)[0]).tolist() == [False, True, False]


@pytest.mark.parametrize(
  "name", ["attention_transfer", "nst", "cwd", "hierarchical_context", "fsp"]
)
def test_one_position_and_one_channel(name):
  loss = getattr(feature_maps, name)
  if name == "fsp":
    loss = lambda s, t: feature_maps.fsp((s, s), (t, t))
  total = lambda s, t: loss(s, t).sum()
  student, teacher = np.full((2, 2, 1, 1, 1), 3.0, np.float32)
  teacher[1] = 0.0
  value, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(student, teacher)
  for array in (value, *grads):
    assert np.all(np.isfinite(array))
  if name in ("cwd", "hierarchical_context"):
    assert value == (0.0 if name == "cwd" else 9.0)


def test_layouts():
  # Sequences and volumes have positions too; vectors have none.
  for shape in [(2, 5, 3), (2, 2, 2, 2, 3)]:
    for loss in (
      feature_maps.attention_transfer,
      feature_maps.nst,
      feature_maps.cwd,
    ):
      x = jnp.ones(shape)
      assert jax.eval_shape(loss, x, x).shape == (2,)
      assert jax.eval_shape(loss, x[:0], x[:0]).shape == (0,)
      with pytest.raises(ValueError, match=r"should be \[batch, \.\.\., chan"):
        jax.eval_shape(loss, jnp.ones((2, 3)), jnp.ones((2, 3)))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda x: feature_maps.attention_transfer(x, x, form="mean"),
      'form is \'mean\'; it should be "released" or "paper"',
    ),
    (lambda x: feature_maps.attention_transfer(x, x, p=0), "p is 0"),
    (lambda x: feature_maps.attention_transfer(x, x, p=1.5), "p is 1.5"),
    (
      lambda x: feature_maps.nst(x, x[:, :2]),
      r"\(3, 4, 4, 5\) and teacher_features has shape \(3, 2, 4, 5\)",
    ),
    (lambda x: feature_maps.cwd(x, x[..., :2]), r"shape \(3, 4, 4, 2\)"),
    (lambda x: feature_maps.cwd(x, x, temperature=0.0), "temperature is 0"),
    (lambda x: feature_maps.fsp((x, x), (x, x), form="sum"), "form is 'sum'"),
    (
      lambda x: feature_maps.fsp((x, x), (x, x[..., :2])),
      r"teacher_pair has shapes \(3, 4, 4, 5\) and \(3, 4, 4, 2\)",
    ),
    (lambda x: feature_maps.fsp((x, x), (x, x[:2])), "of one batch size"),
    (lambda x: feature_maps.hierarchical_context(x[0], x[0]), "batch, height"),
  ],
)
def test_wrong_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.ones((3, 4, 4, 5), np.float32))


def test_fsp_wants_pairs():
  x = np.ones((2, 4, 4, 5), np.float32)
  for bad in (x, (x,), (x, x, x)):
    with pytest.raises(TypeError, match="teacher_pair should be two arrays"):
      feature_maps.fsp((x, x), bad)


# What does not count


def test_attention_transfer_does_not_see_channels_signs_or_scales():
  case = CASES["attention_2"]
  student, teacher = draw(case)
  expected, _ = run(case, [student, teacher])
  changed = -7 * student[..., [2, 0, 3, 1]]
  np.testing.assert_allclose(
    run(case, [changed, teacher])[0], expected, rtol=1e-5
  )
  # Twice the channels, twice the map: nothing changes.
  twice = np.concatenate([teacher, teacher], -1)
  np.testing.assert_allclose(
    run(case, [student, twice])[0], expected, rtol=1e-5
  )


def test_attention_transfer_of_one_channel_is_a_cosine_distance():
  student, teacher = np.abs(np.random.default_rng(0).normal(size=(2, 3, 6, 1)))
  cosines = losses_of_rows(np.float32(student), np.float32(teacher))
  loss = functools.partial(feature_maps.attention_transfer, p=1, form="paper")
  values = jax.jit(loss)(np.float32(student), np.float32(teacher))
  np.testing.assert_allclose(values**2, 2 * cosines, rtol=1e-5)


def losses_of_rows(student, teacher):
  flat = [x[..., 0].astype(np.float64) for x in (student, teacher)]
  lengths = [np.linalg.norm(x, axis=-1) for x in flat]
  return 1 - (flat[0] * flat[1]).sum(-1) / (lengths[0] * lengths[1])


@pytest.mark.parametrize("name", ["nst_many_channels", "nst_many_positions"])
def test_nst_compares_sets(name):
  student, teacher = draw(CASES[name])
  expected, _ = run(CASES[name], [student, teacher])
  order = np.random.default_rng(1).permutation(student.shape[-1])
  values, _ = run(CASES[name], [-3 * student[..., order], teacher])
  np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
  # A set with every member twice is the same distribution.
  twice = np.concatenate([teacher, 2 * teacher], -1)
  values, _ = run(CASES[name], [twice, teacher])
  np.testing.assert_allclose(values, 0, atol=1e-6)


@pytest.mark.parametrize("name", ["nst_many_channels", "nst_many_positions"])
def test_nst_has_the_gradient_of_the_released_code(name):
  """Which leaves out the teacher's term."""
  student, teacher = draw(CASES[name])

  def released(s):
    s, t = channels(s[0]), channels(np.float64(teacher[0]))
    own = np.mean([(f @ g) ** 2 for f in s for g in s])
    return np.array(own - 2 * np.mean([(f @ g) ** 2 for f in s for g in t]))

  expected = references.gradient(released, student[:1])
  _, grads = run(CASES[name], [student, teacher])
  np.testing.assert_allclose(grads[0][:1], expected, rtol=1e-4, atol=1e-6)


def test_fsp_does_not_see_where_things_are():
  case = CASES["fsp"]._replace(shapes=((2, 3, 2), (2, 3, 3)) * 2)
  s, s2, t, t2 = draw(case)
  expected, _ = run(case, [s, s2, t, t2])
  values, _ = run(case, [s[:, ::-1], s2[:, ::-1], t, t2])
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  # Without pooling, "mean" only divides by the entries.
  mean, _ = run(CASES["fsp_mean"], [s, s2, t, t2])
  np.testing.assert_allclose(mean, expected / 6, rtol=1e-5)


def test_cwd_is_kl_over_space():
  case = CASES["cwd"]
  maps = [100 + x for x in draw(case)]
  channels_first = [np.moveaxis(x, -1, 1).reshape(3, 4, 6) for x in draw(case)]
  loss = functools.partial(losses.kl, temperature=2.0)
  expected = jax.jit(loss)(*channels_first).mean(-1)
  np.testing.assert_allclose(run(case, maps)[0], expected, rtol=1e-4)


def test_cwd_keeps_its_digits_near_equality():
  case = CASES["cwd"]
  teacher = draw(case)[1]
  gap = draw(case, 1e-4, seed=1)[0]
  student = teacher + gap
  gap = np.float64(student) - teacher
  # To second order, half the variance of the gap under the teacher.
  p = np.exp(teacher / 2.0)
  p /= p.sum((1, 2), keepdims=True)
  mean = (p * gap).sum((1, 2), keepdims=True)
  expected = (p * (gap - mean) ** 2).sum((1, 2)).mean(-1) / 2
  values, _ = run(case, [student, teacher])
  np.testing.assert_allclose(values, expected, rtol=1e-3)


# hierarchical_context


@pytest.mark.parametrize("height", [1, 2, 3, 4, 6])
def test_hierarchical_context_levels(height):
  rng = np.random.default_rng(height)
  student, teacher = rng.normal(size=(2, 2, height, 4, 2)).astype(np.float32)
  values = jax.jit(feature_maps.hierarchical_context)(student, teacher)
  expected = examples(hierarchical_context, [student, teacher])
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_hierarchical_context_by_hand():
  # A gap of 2 everywhere is 2 on every scale.
  student = np.full((1, 8, 8, 3), 2.0, np.float32)
  loss = jax.jit(feature_maps.hierarchical_context)
  np.testing.assert_allclose(loss(student, 0 * student), 4.0, rtol=1e-6)
  # Stripes cancel in every pool: only the full map counts, 8 parts of 15.
  student[:, ::2] = -2.0
  np.testing.assert_allclose(loss(student, 0 * student), 4 * 8 / 15, rtol=1e-6)


# Properties


def test_adaptive_pooling():
  x = np.random.default_rng(0).normal(size=(7, 5, 2)).astype(np.float32)
  sizes = [(7, 5), (1, 1), (3, 4), (6, 2), (9, 5)]

  @jax.jit
  def pooled(x):
    return [
      [feature_maps._pool(x[None], size, how)[0] for size in sizes]
      for how in (jnp.mean, jnp.max)
    ]

  for got, how in zip(pooled(x), (np.mean, np.max), strict=True):
    for one, size in zip(got, sizes, strict=True):
      np.testing.assert_allclose(one, pool(x, *size, how), atol=1e-6)


def maps_of(*shape):
  elements = st.floats(-(2.0**40), 2.0**40, width=32)
  return hnp.arrays(np.float32, (3, *shape), elements=elements)


@settings(max_examples=30)
@given(maps_of(2, 3, 4), maps_of(2, 3, 2))
def test_attention_transfer_is_a_distance_of_unit_vectors(student, teacher):
  values, _ = run(CASES["attention_4_paper"], [student, teacher])
  # None of whose coordinates is negative.
  assert np.all((values >= 0) & (values <= np.sqrt(2) + 1e-6))
