import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.losses import linear_heads
from tests import references

VOCAB, WIDTH_S, WIDTH_T = 7, 4, 5
SHAPE = (8, 2)  # batch and tokens


def cubic(student, teacher, where=None):
  """No divergence, but quick to compile, and any function of logits will do."""
  return (student**2 * teacher).sum(-1)


DIVERGENCES = {
  "cubic": (cubic, cubic),
  "kl": (losses.kl, references.kl),
  "jsd": (
    functools.partial(losses.jsd, beta=0.1, temperature=2.0),
    functools.partial(references.jsd, beta=0.1, temperature=2.0),
  ),
}


def inputs(seed=0, shape=SHAPE, vocab_t=VOCAB):
  """The two hidden states and heads, then the two biases."""
  rng = np.random.default_rng(seed)
  shapes = [
    (*shape, WIDTH_S),
    (WIDTH_S, VOCAB),
    (*shape, WIDTH_T),
    (WIDTH_T, vocab_t),
    (VOCAB,),
    (vocab_t,),
  ]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def plain(*arrays, divergence, chunk_size=None, where=None):
  hidden_s, head_s, hidden_t, head_t, bias_s, bias_t = arrays
  return divergence(
    hidden_s @ head_s + bias_s, hidden_t @ head_t + bias_t, where=where
  )


def chunked(*arrays, **options):
  *arrays, bias_s, bias_t = arrays
  return linear_heads.linear_divergence(
    *arrays, student_bias=bias_s, teacher_bias=bias_t, **options
  )


def gradients(loss):
  """(values, gradients) of the summed loss of arrays, compiled."""

  @jax.jit
  def run(*arrays, **masks):
    def total(*arrays):
      values = loss(*arrays, **masks)
      return values.sum(), values

    run = jax.grad(total, argnums=range(len(arrays)), has_aux=True)
    grads, values = run(*arrays)
    return values, grads

  def call(*arrays, **masks):
    values, grads = run(*arrays, **masks)
    return np.asarray(values), [np.asarray(grad) for grad in grads]

  return call


@functools.cache
def program(chunk_size, name="kl"):
  """Shared by the tests, which spend their time on compilation."""
  loss = plain if chunk_size is None else chunked
  divergence, _ = DIVERGENCES[name]
  return gradients(
    functools.partial(loss, divergence=divergence, chunk_size=chunk_size)
  )


EVERYTHING = np.ones(SHAPE, bool)
SOME = np.random.default_rng(1).random(SHAPE) < 0.6


def assert_same(one, other, rtol=1e-5, atol=1e-6):
  values, grads = one
  expected, expected_grads = other
  np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol)
  for grad, expected in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["kl", "jsd"])
def test_values_and_all_gradients_match_float64(name):
  """Chunks of 3 do not divide the 16 tokens."""
  arrays = inputs()
  values, grads = program(3, name)(*arrays, where=SOME)

  def reference(*arrays):
    _, divergence = DIVERGENCES[name]
    return plain(
      *arrays,
      divergence=lambda *logits, where: SOME * divergence(*logits),
    )

  wide = [np.asarray(x, np.float64) for x in arrays]
  np.testing.assert_allclose(values, reference(*wide), rtol=1e-5, atol=1e-7)
  for i, grad in enumerate(grads):
    moved = lambda x, i=i: reference(*wide[:i], x, *wide[i + 1 :])
    np.testing.assert_allclose(
      grad, references.gradient(moved, wide[i]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("chunk_size", [1, 8, 1000])
def test_any_chunk_size_is_the_plain_formula(chunk_size):
  arrays = inputs()
  assert_same(
    program(chunk_size, "cubic")(*arrays, where=EVERYTHING),
    program(None, "cubic")(*arrays, where=EVERYTHING),
  )


@pytest.mark.parametrize("shape", [(), (2, 2, 3), (0,)])
def test_any_leading_axes(shape):
  *arrays, _, _ = inputs(shape=shape)
  run = functools.partial(
    linear_heads.linear_divergence, divergence=cubic, chunk_size=2
  )
  values = jax.jit(run)(*arrays)
  assert values.shape == shape
  expected = cubic(arrays[0] @ arrays[1], arrays[2] @ arrays[3])
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_masked_tokens_may_hold_anything():
  arrays = inputs()
  expected = program(3)(*arrays, where=SOME)
  arrays[0][~SOME], arrays[2][~SOME] = np.nan, np.inf
  values, grads = program(3)(*arrays, where=SOME)
  assert_same((values, grads), expected, rtol=0, atol=0)
  np.testing.assert_array_equal(values[~SOME], 0.0)
  for hidden in (grads[0], grads[2]):
    np.testing.assert_array_equal(hidden[~SOME], 0.0)
  # Nothing at all is left of a batch of padding.
  values, grads = program(3)(*arrays, where=~EVERYTHING)
  for array in (values, *grads):
    np.testing.assert_array_equal(array, 0.0)


def test_a_divergence_that_forgets_the_mask_is_masked_all_the_same():
  arrays = inputs()
  run = program(8, "cubic")
  expected, _ = run(*arrays, where=EVERYTHING)
  arrays[0][~SOME], arrays[2][~SOME] = np.nan, np.inf
  values, grads = run(*arrays, where=SOME)
  np.testing.assert_array_equal(values, np.where(SOME, expected, 0.0))
  for grad in grads:
    assert np.all(np.isfinite(grad))


def test_broken_tokens_are_not_hidden():
  arrays = inputs()
  arrays[0][5, 1, 0] = np.nan
  values, _ = program(3)(*arrays, where=EVERYTHING)
  expected = ~EVERYTHING
  expected[5, 1] = True
  np.testing.assert_array_equal(np.isnan(values), expected)


# Another vocabulary


def test_teacher_index_names_the_columns():
  """Of nine teacher classes, three are not asked for; one is lacking."""
  index = np.array([8, 7, -1, 3, 2, 5, 6])
  arrays = inputs(vocab_t=9)

  def expected(hidden_s, head_s, hidden_t, head_t, bias_s, bias_t):
    teacher = hidden_t @ head_t + bias_t
    teacher = jnp.where(index < 0, -jnp.inf, teacher[..., index])
    return losses.kl(hidden_s @ head_s + bias_s, teacher)

  run = gradients(
    functools.partial(
      chunked, divergence=losses.kl, chunk_size=4, teacher_index=index
    )
  )
  values, grads = run(*arrays)
  assert_same((values, grads), gradients(expected)(*arrays))
  for grad in (grads[3], grads[5]):
    np.testing.assert_array_equal(grad[..., [0, 1, 4]], 0.0)
  # What stands in columns that nobody asks for has no effect.
  arrays[3][:, [0, 1, 4]] = np.nan
  assert_same(run(*arrays), (values, grads), rtol=0, atol=0)


def test_a_lacking_class_is_not_a_logit_of_zero():
  *arrays, _, _ = inputs()
  index = np.array([0, 1, 2, 3, 4, 5, -1])
  run = functools.partial(
    linear_heads.linear_divergence, divergence=losses.kl, chunk_size=4
  )
  values = jax.jit(functools.partial(run, teacher_index=index))(*arrays)
  # A student that rules it out too agrees with the smaller vocabulary.
  bias = np.where(index < 0, -np.inf, 0.0).astype(np.float32)
  ruled_out = jax.jit(
    functools.partial(run, teacher_index=index, student_bias=bias)
  )(*arrays)
  small = jax.jit(run)(arrays[0], arrays[1][:, :6], arrays[2], arrays[3][:, :6])
  np.testing.assert_allclose(ruled_out, small, rtol=1e-5)
  # One that does not pays for its mass there: -log(1 - q) more.
  q = np.exp(references.log_softmax(arrays[0] @ arrays[1]))[..., -1]
  np.testing.assert_allclose(values, small - np.log1p(-q), rtol=1e-5)


def test_wrong_teacher_index():
  *arrays, _, _ = inputs(vocab_t=9)
  run = functools.partial(
    linear_heads.linear_divergence, *arrays, divergence=losses.kl, chunk_size=4
  )
  with pytest.raises(ValueError, match=r"\(5, 9\).*needs teacher_index"):
    run()
  right = np.arange(VOCAB)
  with pytest.raises(TypeError, match="teacher_index has dtype float"):
    run(teacher_index=right.astype(np.float32))
  with pytest.raises(ValueError, match=r"teacher_index has shape \(9,\)"):
    run(teacher_index=np.arange(9))
  for wrong in (-2, 9, 2**40):
    index = right.copy()
    index[2] = wrong
    with pytest.raises(ValueError, match=rf"teacher_index holds {wrong}; .* 8"):
      run(teacher_index=index)
    index[2] = min(wrong, 9)
    values = jax.jit(lambda index: run(teacher_index=index))(index)
    assert np.all(np.isnan(values))


# Precision


def cubic_gradients(hidden_s, head_s, hidden_t, head_t):
  """In float64, from those by the logits."""
  s, t = hidden_s @ head_s, hidden_t @ head_t
  grads = []
  for hidden, head, by_logits in (
    (hidden_s, head_s, 2 * s * t),
    (hidden_t, head_t, s**2),
  ):
    grads.append(by_logits @ head.T)
    products = hidden[..., :, None] * by_logits[..., None, :]
    grads.append(products.reshape(-1, *head.shape).sum(0))
  return grads


def test_bfloat16_is_multiplied_as_it_is_and_summed_in_float32():
  """In 512 chunks: sums in bfloat16 stop growing at 256 times a term."""
  arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(shape=(512,))[:4]]
  # The same token each time, so that every chunk's part has the same sign.
  arrays[0], arrays[2] = (
    jnp.broadcast_to(x[:1], x.shape) for x in (arrays[0], arrays[2])
  )
  run = functools.partial(
    linear_heads.linear_divergence, divergence=cubic, chunk_size=1
  )
  values, grads = gradients(run)(*arrays)
  wide = [np.asarray(x, np.float64) for x in arrays]
  # The factors are exact in float32, so the logits keep its digits.
  np.testing.assert_allclose(
    values, cubic(wide[0] @ wide[1], wide[2] @ wide[3]), rtol=1e-5
  )
  for grad, expected in zip(grads, cubic_gradients(*wide), strict=True):
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      grad.astype(np.float64), expected, atol=0.01 * np.abs(expected).max()
    )


def test_other_dtypes_are_raised_to_float32():
  """float16 would lose gradients of 1e-9 on their way to bfloat16 states."""
  arrays = [jnp.asarray(x, jnp.float16) for x in inputs()[:4]]
  arrays[0] = arrays[0].astype(jnp.bfloat16)
  run = lambda *arrays: (
    1e-9
    * linear_heads.linear_divergence(*arrays, divergence=cubic, chunk_size=4)
  )
  _, grads = gradients(run)(*arrays)
  expected = cubic_gradients(*(np.asarray(x, np.float64) for x in arrays))
  assert grads[0].dtype == jnp.bfloat16
  assert all(grad.dtype == np.float16 for grad in grads[1:])
  np.testing.assert_allclose(
    1e9 * grads[0].astype(np.float64), expected[0], rtol=0.01, atol=1e-3
  )


# Memory


def sizes(jaxpr):
  """The sizes of all arrays in a program, those of its loops included."""
  for equation in jaxpr.eqns:
    for variable in (*equation.invars, *equation.outvars):
      yield math.prod(getattr(variable.aval, "shape", ()))
    for parameter in jax.tree.leaves(tuple(equation.params.values())):
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        yield from sizes(inner)


def test_the_logits_never_exist_at_once():
  tokens, vocab, chunk = 2048, 512, 64
  shapes = [(tokens, 8), (8, vocab), (tokens, 16), (16, vocab)]
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  full = 4 * tokens * vocab  # bytes of the logits of one model

  def program(loss):
    run = lambda *arrays: loss(*arrays).mean()
    return jax.jit(jax.value_and_grad(run, argnums=range(4)))

  one = program(
    functools.partial(
      linear_heads.linear_divergence, divergence=losses.kl, chunk_size=chunk
    )
  )
  other = program(lambda a, b, c, d: losses.kl(a @ b, c @ d))
  temporary = [
    run.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    for run in (one, other)
  ]
  assert temporary[1] > 2 * full  # what it is worth
  assert temporary[0] < full / 2
  assert max(sizes(jax.make_jaxpr(other)(*arrays).jaxpr)) >= tokens * vocab
  assert max(sizes(jax.make_jaxpr(one)(*arrays).jaxpr)) <= max(
    chunk * vocab, tokens * 16
  )


# Transformations


def test_traced_numbers_of_the_divergence_are_differentiated():
  *arrays, _, _ = inputs()

  def total(temperature):
    return linear_heads.linear_divergence(
      *arrays,
      divergence=functools.partial(losses.kl, temperature=temperature),
      chunk_size=3,
    ).sum()

  exact = lambda temperature: references.kl(
    arrays[0] @ arrays[1], arrays[2] @ arrays[3], temperature
  ).sum()
  value, slope = jax.jit(jax.value_and_grad(total))(2.0)
  np.testing.assert_allclose(value, exact(2.0), rtol=1e-5)
  expected = (exact(2.001) - exact(1.999)) / 0.002
  np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_second_derivatives():
  """Of a penalty on the gradient: through the heads' own rule as well."""
  *arrays, _, _ = inputs(shape=(2,))

  def penalty(loss):
    total = lambda *arrays: loss(*arrays).sum()

    def of(*arrays):
      grads = jax.grad(total, argnums=(0, 1))(*arrays)
      return sum(jnp.sum(grad**2) for grad in grads)

    return jax.jit(jax.grad(of, argnums=(0, 1)))

  run = functools.partial(
    linear_heads.linear_divergence, divergence=cubic, chunk_size=1
  )
  exact = lambda a, b, c, d: cubic(a @ b, c @ d)
  for grad, expected in zip(
    penalty(run)(*arrays), penalty(exact)(*arrays), strict=True
  ):
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_sharded_tokens_are_one_device():
  """Global arrays, the batch divided over 8 devices, heads everywhere."""
  arrays = inputs()
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  placed = [
    jax.device_put(
      x,
      jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*["data"] * (x.ndim == 3))
      ),
    )
    for x in arrays
  ]
  assert_same(
    program(8, "cubic")(*placed, where=EVERYTHING),
    program(None, "cubic")(*arrays, where=EVERYTHING),
  )


# What is refused


def test_wrong_chunk_sizes_and_divergences():
  *arrays, _, _ = inputs()
  run = functools.partial(linear_heads.linear_divergence, *arrays)
  for wrong in (0, -1):
    with pytest.raises(ValueError, match=f"chunk_size is {wrong}; .* above 0"):
      run(divergence=losses.kl, chunk_size=wrong)
  for wrong in (2.0, "2", True, None):
    with pytest.raises(TypeError, match=r"chunk_size is .*should be an int"):
      run(divergence=losses.kl, chunk_size=wrong)
  mean = lambda *logits, where: losses.kl(*logits, where=where).mean()
  with pytest.raises(ValueError, match=r"divergence gives shape \(\) .*\(4,\)"):
    run(divergence=mean, chunk_size=4)


def test_wrong_biases():
  *arrays, bias, _ = inputs()
  run = functools.partial(
    linear_heads.linear_divergence, *arrays, divergence=losses.kl, chunk_size=4
  )
  for name in ("student_bias", "teacher_bias"):
    with pytest.raises(TypeError, match=f"{name} has dtype int"):
      run(**{name: bias.astype(np.int32)})
    with pytest.raises(ValueError, match=rf"{name} has shape \(6,\)"):
      run(**{name: bias[:-1]})
