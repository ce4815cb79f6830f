import functools

from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses import transformers
from tests import references

BATCH, HEADS, TOKENS = 2, 2, 3
SHAPES = {
  "attention_mse": ((BATCH, HEADS, TOKENS, 4),) * 2,
  "attention_kl": ((BATCH, HEADS, TOKENS, 4),) * 2,
  "value_relation": ((BATCH, HEADS, TOKENS, 2), (BATCH, HEADS, TOKENS, 3)),
  "relation_kl": ((BATCH, TOKENS, 4), (BATCH, TOKENS, 6)),
  "hidden_mse": ((BATCH, TOKENS, 4),) * 2,
}
ATTENTION = ("attention_mse", "attention_kl")
RELATIONS = ("value_relation", "relation_kl")
every_loss = pytest.mark.parametrize("name", SHAPES)
attention = pytest.mark.parametrize("name", ATTENTION)
relations = pytest.mark.parametrize("name", RELATIONS)


# References: one query of one head at a time, over lists of its keys.


def mean_square(student, teacher):
  return np.mean((student - teacher) ** 2) if len(student) else 0.0


def kl(student, teacher):
  if not len(student):
    return 0.0
  return references.kl_of_logs(
    references.log_softmax(teacher), references.log_softmax(student)
  )


def over_keys(distance, student, teacher, where, key_where):
  """The mean over heads of a distance of [batch, heads, queries, keys]."""
  batch, heads, queries, keys = student.shape
  result = np.zeros((batch, queries))
  for b, q in np.ndindex(batch, queries):
    if not where[b, q]:
      continue
    for h in range(heads):
      keep = [
        k
        for k in range(keys)
        if key_where[b, k]
        and np.isfinite([student[b, h, q, k], teacher[b, h, q, k]]).any()
      ]
      result[b, q] += distance(student[b, h, q, keep], teacher[b, h, q, keep])
  return result / heads


def scores(vectors):
  """[batch, heads, tokens, tokens] of [batch, heads, tokens, width]."""
  batch, heads, tokens, width = vectors.shape
  result = np.zeros((batch, heads, tokens, tokens))
  for b, h, i, j in np.ndindex(result.shape):
    result[b, h, i, j] = np.dot(vectors[b, h, i], vectors[b, h, j])
  return result / np.sqrt(width)


def cut(vectors, num_heads):
  return np.stack(np.split(vectors, num_heads, -1), 1)


def reference(name, student, teacher, where, key_where=None):
  if name == "hidden_mse":
    return np.where(where, ((student - teacher) ** 2).mean(-1), 0.0)
  if name == "relation_kl":
    student, teacher = cut(student, 2), cut(teacher, 2)
  if name in RELATIONS:
    student, teacher = scores(student), scores(teacher)
    key_where = where if key_where is None else key_where
  distance = mean_square if name == "attention_mse" else kl
  return over_keys(distance, student, teacher, where, key_where)


def loss_of(name):
  loss = getattr(transformers, name)
  return functools.partial(loss, num_heads=2) if name == "relation_kl" else loss


@functools.cache
def program(name):
  """(values, gradients): the tests share one program for each loss."""

  @jax.jit
  def run(student, teacher, where, key_where=None):
    masks = {} if key_where is None else {"key_where": key_where}

    def total(student, teacher):
      values = loss_of(name)(student, teacher, where=where, **masks)
      return values.sum(), values

    grads, values = jax.grad(total, argnums=(0, 1), has_aux=True)(
      student, teacher
    )
    return values, grads

  return run


def value(name, *arrays, **options):
  """As one program: op by op, most of the time is compilation."""
  return np.asarray(
    jax.jit(functools.partial(loss_of(name), **options))(*arrays)
  )


def inputs(name, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return [
    (scale * rng.normal(size=shape)).astype(np.float32)
    for shape in SHAPES[name]
  ]


def masks(name, full=False):
  """(where, key_where), or (where,) for a loss without keys."""
  where = np.array([[1, 1, 0], [0, 1, 1]], bool) | full
  keys = np.array([[1, 0, 1, 1], [1, 1, 1, 0]], bool) | full
  if name in ATTENTION:
    return where, keys
  if name in RELATIONS:
    return where, keys[:, :TOKENS]
  return (where,)


def run(name, student, teacher, *masks):
  values, grads = program(name)(student, teacher, *masks)
  return np.asarray(values), [np.asarray(grad) for grad in grads]


@every_loss
@pytest.mark.parametrize("full", [False, True], ids=["masked", "full"])
def test_values_and_both_gradients_match_float64(name, full):
  student, teacher = inputs(name)
  some = masks(name, full)
  values, grads = run(name, student, teacher, *some)
  np.testing.assert_allclose(
    values, reference(name, student, teacher, *some), rtol=3e-6, atol=1e-7
  )
  assert np.all((values != 0) == some[0])
  expected = (
    references.gradient(lambda x: reference(name, x, teacher, *some), student),
    references.gradient(lambda x: reference(name, student, x, *some), teacher),
  )
  for grad, exact in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, exact, rtol=1e-4, atol=1e-6)
    assert np.any(exact != 0)


@every_loss
@pytest.mark.parametrize(
  "harsh", ["sigma 30", "bfloat16", "duplicates", "zeros"]
)
def test_harsh_inputs_match_float64(name, harsh):
  student, teacher = inputs(name, scale=30.0 if harsh == "sigma 30" else 1.0)
  if harsh == "bfloat16":
    student, teacher = (
      jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)
    )
  if harsh == "duplicates":
    student[..., 1, :], teacher[..., 1, :] = student[..., 0, :], 0.5
  if harsh == "zeros":
    student[..., 0, :] = 0.0
  some = masks(name, full=True)
  values, grads = run(name, student, teacher, *some)
  exact = (np.asarray(x, np.float64) for x in (student, teacher))
  np.testing.assert_allclose(
    values, reference(name, *exact, *some), rtol=2e-5, atol=1e-6
  )
  assert values.dtype == np.float32
  for grad, x in zip(grads, (student, teacher), strict=True):
    assert grad.dtype == x.dtype
    assert np.all(np.isfinite(grad.astype(np.float32)))


@every_loss
def test_what_is_masked_has_no_effect(name):
  """Also as if it had been cut out; NaN in the values and in the gradients."""
  student, teacher = inputs(name)
  some = masks(name)
  values, grads = run(name, student, teacher, *some)
  where, keys = some[0], some[-1]
  broken = [student.copy(), teacher.copy()]
  for x, grad in zip(broken, grads, strict=True):
    if name in ATTENTION:
      out = ~(where[:, None, :, None] & keys[:, None, None, :])
      out = np.broadcast_to(out, x.shape)
    else:
      # A token that is either a query or a key has its say.
      out = ~(where | keys) if name in RELATIONS else ~where
      out = out[:, None] if x.ndim == 4 else out
      out = np.broadcast_to(out[..., None], x.shape)
    x[out] = np.nan
    np.testing.assert_array_equal(grad[out], 0.0)
  again, grads_again = run(name, *broken, *some)
  np.testing.assert_array_equal(again, values)
  for grad, expected in zip(grads_again, grads, strict=True):
    np.testing.assert_array_equal(grad, expected)


@relations
def test_padding_is_masked_on_both_sides_by_default(name):
  student, teacher = inputs(name)
  where = np.array([[1, 1, 0], [1, 1, 0]], bool)
  short = [np.delete(x, 2, axis=-2) for x in (student, teacher)]
  expected = value(name, *short)
  student[..., 2, :] = teacher[..., 2, :] = np.nan
  values, grads = run(name, student, teacher, where)
  np.testing.assert_allclose(values[:, :2], expected, rtol=1e-6)
  np.testing.assert_array_equal(values[:, 2], 0.0)
  for grad in grads:
    assert np.all(np.isfinite(grad))
  # Naming the keys makes it another loss.
  everything = np.ones_like(where)
  student, teacher = inputs(name)
  values, _ = run(name, student, teacher, where, everything)
  full, _ = run(name, student, teacher, everything, everything)
  np.testing.assert_array_equal(values[:, :2], full[:, :2])
  assert np.all(np.abs(values[:, :2] - expected) > 1e-3)


@attention
def test_masked_keys_are_as_if_cut_out(name):
  student, teacher = inputs(name)
  where = np.ones((BATCH, TOKENS), bool)
  keys = np.array([[1, 1, 0, 1]] * BATCH, bool)
  expected = value(name, student[..., keys[0]], teacher[..., keys[0]])
  values, _ = run(name, student, teacher, where, keys)
  np.testing.assert_allclose(values, expected, rtol=1e-6)


@attention
def test_causal_scores_of_minus_infinity(name):
  student, teacher = inputs(name)
  future = np.triu(np.ones((TOKENS, 4), bool), 1)
  student[..., future] = teacher[..., future] = -np.inf
  some = masks(name, full=True)
  values, grads = run(name, student, teacher, *some)
  np.testing.assert_allclose(
    values, reference(name, student, teacher, *some), rtol=3e-6, atol=1e-7
  )
  for grad in grads:
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(grad[..., future], 0.0)


@attention
def test_a_key_that_one_side_rules_out_is_dear(name):
  student, teacher = inputs(name)
  student[..., 0] = -np.inf
  values, grads = run(name, student, teacher, *masks(name, full=True))
  assert np.all(np.isfinite(values)) and np.all(values > 1e3)
  for grad in grads:
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("name", ATTENTION + RELATIONS)
def test_a_query_without_any_key_is_zero(name):
  student, teacher = inputs(name)
  where, keys = masks(name, full=True)
  keys = keys & np.array([[False], [True]])
  values, grads = run(name, student, teacher, where, keys)
  np.testing.assert_array_equal(values[0], 0.0)
  assert np.all(values[1] > 0)
  for grad in grads:
    np.testing.assert_array_equal(grad[0], 0.0)
    assert np.all(np.isfinite(grad))


@every_loss
def test_zero_at_equality(name):
  shape = SHAPES[name][0]
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  values = value(name, x, x)
  np.testing.assert_array_equal(values, 0.0)


def test_tinybert_takes_the_mean_of_all_entries():
  student, teacher = inputs("attention_mse")
  values, _ = run(
    "attention_mse", student, teacher, *masks("attention_mse", full=True)
  )
  np.testing.assert_allclose(
    values.mean(), np.mean((student - teacher) ** 2), rtol=1e-6
  )


def test_minilm_divides_by_heads_and_tokens():
  """Its double sum, for one sequence of the batch at a time."""
  student, teacher = inputs("attention_kl")
  values, _ = run(
    "attention_kl", student, teacher, *masks("attention_kl", full=True)
  )
  total = sum(
    kl(student[0, a, t], teacher[0, a, t])
    for a in range(HEADS)
    for t in range(TOKENS)
  )
  np.testing.assert_allclose(
    values[0].mean(), total / (HEADS * TOKENS), rtol=1e-5
  )


def test_mobilebert_code_has_the_same_student_gradient():
  student, teacher = inputs("attention_kl")
  _, (grad, _) = run(
    "attention_kl", student, teacher, *masks("attention_kl", full=True)
  )
  log_q, p = jax.nn.log_softmax, jax.nn.softmax(teacher)
  cross_entropy = lambda x: -(p * log_q(x)).sum() / HEADS
  expected = jax.jit(jax.grad(cross_entropy))(student)
  np.testing.assert_allclose(grad, expected, atol=1e-6)


@given(
  st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=3),
  st.integers(0, 1000),
)
def test_attention_kl_ignores_a_shift_of_a_query(shift, seed):
  student, teacher = inputs("attention_kl", seed)
  some = masks("attention_kl")
  values, _ = run("attention_kl", student, teacher, *some)
  shift = np.asarray(shift, np.float32)[:, None]
  moved, _ = run("attention_kl", student + shift, teacher, *some)
  np.testing.assert_allclose(moved, values, rtol=1e-3, atol=1e-5)
  assert np.all(values >= 0)


@pytest.mark.parametrize("gap", [1e-3, 1e-4])
def test_attention_kl_keeps_its_digits_near_equality(gap):
  _, teacher = inputs("attention_kl")
  student = teacher + gap * inputs("attention_kl", seed=1)[0]
  some = masks("attention_kl", full=True)
  values, _ = run("attention_kl", student, teacher, *some)
  log_p, log_q = (
    references.log_softmax(teacher),
    references.log_softmax(student),
  )
  d = log_q - log_p
  exact = (np.exp(log_p) * (np.expm1(d) - d)).sum(-1).mean(1)
  np.testing.assert_allclose(values, exact, rtol=1e-4)


def test_relation_heads_are_cut_from_the_concatenated_vectors():
  """With its own heads, relation_kl on values is value_relation."""
  student, teacher = inputs("relation_kl")
  some = masks("relation_kl")
  expected = value(
    "value_relation",
    cut(student, 2),
    cut(teacher, 2),
    where=some[0],
    key_where=some[1],
  )
  values, _ = run("relation_kl", student, teacher, *some)
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  one_head = value("relation_kl", student, teacher, num_heads=1)
  two_heads, _ = run(
    "relation_kl", student, teacher, *masks("relation_kl", True)
  )
  assert np.all(np.abs(one_head - two_heads) > 1e-3)


@relations
def test_relations_do_not_see_a_rotation_of_a_head(name):
  student, teacher = inputs(name)
  width = 2  # of the student's heads
  turn, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(width, width)))
  if name == "relation_kl":
    turn = np.kron(np.eye(2), turn)
  some = masks(name, full=True)
  values, _ = run(name, student, teacher, *some)
  turned, _ = run(name, (student @ turn).astype(np.float32), teacher, *some)
  np.testing.assert_allclose(turned, values, rtol=1e-5)


def test_relations_of_a_wider_student_can_equal_the_teachers():
  """Twice the width, the same products: what is left is sqrt(2) by sqrt(d)."""
  rng = np.random.default_rng(0)
  teacher = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
  student = np.concatenate([teacher, 0 * teacher], -1) * np.float32(2**0.25)
  compare = jax.jit(transformers.value_relation)
  np.testing.assert_allclose(compare(student, teacher), 0.0, atol=1e-10)
  assert np.all(compare(2 * student, teacher) > 1e-3)


@pytest.mark.parametrize("name", (*ATTENTION, "value_relation"))
def test_other_numbers_of_heads_are_sent_to_relation_kl(name):
  student, teacher = (jnp.zeros(shape) for shape in SHAPES[name])
  teacher = jnp.concatenate([teacher, teacher], 1)
  with pytest.raises(ValueError, match=r"\(2, 4, .*heads.*relation_kl"):
    loss_of(name)(student, teacher)


@pytest.mark.parametrize(
  ("num_heads", "error", "message"),
  [
    (
      4,
      ValueError,
      r"num_heads is 4 and teacher_vectors has shape \(2, 3, 6\)",
    ),
    (
      3,
      ValueError,
      r"num_heads is 3 and student_vectors has shape \(2, 3, 4\)",
    ),
    (0, ValueError, "num_heads is 0 .* above 0"),
    (-2, ValueError, "num_heads is -2 .* above 0"),
    (2.0, TypeError, "num_heads is 2.0; it should be an int"),
    (True, TypeError, "num_heads is True; it should be an int"),
  ],
)
def test_wrong_num_heads(num_heads, error, message):
  student, teacher = inputs("relation_kl")
  with pytest.raises(error, match=message):
    transformers.relation_kl(student, teacher, num_heads=num_heads)


@pytest.mark.parametrize("name", ATTENTION + RELATIONS)
def test_wrong_key_masks(name):
  student, teacher = inputs(name)
  _, keys = masks(name)
  with pytest.raises(TypeError, match="key_where has dtype int"):
    loss_of(name)(student, teacher, key_where=keys.astype(np.int32))
  for wrong in (keys[:1], keys[:, :1], keys[0], keys[..., None]):
    with pytest.raises(ValueError, match=r"key_where has shape .*\(2, [34]\)"):
      loss_of(name)(student, teacher, key_where=wrong)
