"""`linear_divergence_sum`, whose gradients are computed with its value."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.losses import _batch as batch, _tokens as tokens
from tests import references
from tests.losses.test_linear_heads import (
  EVERYTHING,
  SOME,
  assert_same,
  cubic,
  cubic_gradients,
  inputs,
  plain,
)

WEIGHTS = np.random.default_rng(2).normal(size=SOME.shape).astype(np.float32)
STUDENT, TEACHER, BOTH = (0, 1), (2, 3), (0, 1, 2, 3)


def total(*arrays, **options):
  """Of the arrays of `inputs` and, if there is a seventh, weights."""
  arrays, (bias_s, bias_t), weights = arrays[:4], arrays[4:6], arrays[6:]
  options |= dict(zip(["weights"], weights, strict=False))
  return losses.linear_divergence_sum(
    *arrays, student_bias=bias_s, teacher_bias=bias_t, **options
  )


def summed(*arrays, **options):
  """The same from one value per token."""
  *arrays, bias_s, bias_t, weights = arrays
  values = losses.linear_divergence(
    *arrays, student_bias=bias_s, teacher_bias=bias_t, **options
  )
  return jnp.sum(weights * values)


def value_and_grads(loss, **options):
  """Of all arrays, compiled; the mask is traced."""

  @jax.jit
  def run(arrays, where):
    # A cotangent other than 1.
    scaled = lambda *arrays: 0.3 * loss(*arrays, where=where, **options)
    return jax.value_and_grad(scaled, argnums=range(len(arrays)))(*arrays)

  return lambda *arrays, where=EVERYTHING: run(arrays, where)


@functools.cache
def program(loss, chunk_size, divergence=cubic):
  return value_and_grads(loss, chunk_size=chunk_size, divergence=divergence)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
def test_value_and_all_gradients_match_float64(name):
  """Chunks of 3 do not divide the 16 tokens."""
  arrays = [*inputs(), WEIGHTS]
  run = program(total, 3, getattr(losses, name))
  value, grads = run(*arrays, where=SOME)

  def reference(*arrays):
    *arrays, weights = arrays
    divergence = lambda *logits, where: getattr(references, name)(*logits)
    return 0.3 * np.sum(SOME * weights * plain(*arrays, divergence=divergence))

  wide = [np.asarray(x, np.float64) for x in arrays]
  assert value.dtype == np.float32 and value.shape == ()
  np.testing.assert_allclose(value, reference(*wide), rtol=1e-5)
  for i, grad in enumerate(grads):
    moved = lambda x, i=i: reference(*wide[:i], x, *wide[i + 1 :])
    np.testing.assert_allclose(
      grad, references.gradient(moved, wide[i]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_any_chunk_size_is_the_sum_over_tokens(chunk_size):
  arrays = [*inputs(), WEIGHTS]
  assert_same(
    program(total, chunk_size)(*arrays, where=SOME),
    program(summed, 4)(*arrays, where=SOME),
  )


def test_without_weights_each_token_counts_once():
  arrays = inputs()
  ones = np.ones_like(WEIGHTS)
  value, grads = program(total, 7)(*arrays)
  expected, expected_grads = program(total, 7)(*arrays, ones)
  assert_same((value, grads), (expected, expected_grads[:-1]))


@pytest.mark.parametrize("shape", [(), (2, 2, 3), (0,)])
def test_any_leading_axes(shape):
  *arrays, _, _ = inputs(shape=shape)
  run = functools.partial(
    losses.linear_divergence_sum, divergence=cubic, chunk_size=2
  )
  value, grads = jax.jit(jax.value_and_grad(run, argnums=BOTH))(*arrays)
  exact = lambda a, b, c, d: cubic(a @ b, c @ d).sum()
  expected = jax.value_and_grad(exact, argnums=BOTH)(*arrays)
  assert_same((value, grads), expected, atol=1e-5)


def test_masked_tokens_may_hold_anything():
  run = program(total, 7)
  arrays = [*inputs(), WEIGHTS.copy()]
  expected = run(*arrays, where=SOME)
  arrays[0][~SOME], arrays[2][~SOME], arrays[6][~SOME] = np.nan, np.inf, np.nan
  value, grads = run(*arrays, where=SOME)
  assert_same((value, grads), expected, rtol=0, atol=0)
  for i in (0, 2, 6):
    np.testing.assert_array_equal(grads[i][~SOME], 0.0)
  value, grads = run(*arrays, where=~EVERYTHING)
  for array in (value, *grads):
    np.testing.assert_array_equal(array, 0.0)
  arrays = inputs()
  arrays[0][5, 1, 0] = np.nan
  assert np.isnan(run(*arrays, WEIGHTS)[0])  # a token that counts


def test_other_vocabularies_and_padded_ones():
  """A class that the teacher lacks, one that both heads rule out."""
  arrays = [*inputs(vocab_t=9), WEIGHTS]
  arrays[4][2] = arrays[5][5] = -np.inf  # bias of class 2, of its column
  options = {
    "divergence": losses.kl,
    "teacher_index": np.array([8, 7, 5, 3, -1, 0, 6]),
  }
  value, grads = value_and_grads(total, chunk_size=3, **options)(*arrays)
  assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads)
  assert_same(
    (value, grads),
    value_and_grads(summed, chunk_size=16, **options)(*arrays),
  )


# Precision


def test_bfloat16_is_summed_in_float32():
  """In 512 chunks: sums in bfloat16 stop growing at 256 times a term."""
  arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(shape=(512,))[:4]]
  arrays[0], arrays[2] = (
    jnp.broadcast_to(x[:1], x.shape) for x in (arrays[0], arrays[2])
  )
  run = functools.partial(
    losses.linear_divergence_sum, divergence=cubic, chunk_size=1
  )
  value, grads = jax.jit(jax.value_and_grad(run, argnums=BOTH))(*arrays)
  wide = [np.asarray(x, np.float64) for x in arrays]
  expected = cubic(wide[0] @ wide[1], wide[2] @ wide[3]).sum()
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for grad, expected in zip(grads, cubic_gradients(*wide), strict=True):
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      np.asarray(grad, np.float64), expected, atol=0.01 * np.abs(expected).max()
    )


def test_float16_is_scaled_in_float32():
  """The gradients before the scale would be infinite in float16."""
  arrays = [jnp.asarray(x, jnp.float16) for x in inputs()[:4]]

  def run(*arrays):
    huge = lambda student, teacher, where: 1e9 * cubic(student, teacher)
    return 1e-9 * losses.linear_divergence_sum(
      *arrays, divergence=huge, chunk_size=4
    )

  grads = jax.jit(jax.grad(run, argnums=BOTH))(*arrays)
  expected = cubic_gradients(*(np.asarray(x, np.float64) for x in arrays))
  for grad, exact in zip(grads, expected, strict=True):
    assert grad.dtype == jnp.float16
    np.testing.assert_allclose(
      np.asarray(grad, np.float64), exact, rtol=2e-3, atol=1e-2
    )


# Costs


def from_all(*arrays):
  hidden_s, head_s, hidden_t, head_t = arrays
  return losses.kl(hidden_s @ head_s, hidden_t @ head_t).sum()


def in_chunks(*arrays, chunk_size):
  return losses.linear_divergence_sum(
    *arrays, divergence=losses.kl, chunk_size=chunk_size
  )


def lowered(loss, argnums=STUDENT, tokens=1024, vocab=512):
  shapes = [(tokens, 32), (32, vocab), (tokens, 64), (64, vocab)]
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  run = jax.value_and_grad(loss, argnums=argnums) if argnums else loss
  return jax.jit(run).lower(*arrays)


def test_memory_is_that_of_a_chunk():
  one, other = (
    lowered(loss).compile().memory_analysis().temp_size_in_bytes
    for loss in (functools.partial(in_chunks, chunk_size=64), from_all)
  )
  assert one < other / 4


@pytest.mark.parametrize("argnums", [(), STUDENT, TEACHER, BOTH])
def test_nothing_is_computed_twice_or_for_nobody(argnums):
  """Counted for one chunk of all tokens: a loop's body is counted once."""
  one, other = (
    lowered(loss, argnums).cost_analysis()["flops"]
    for loss in (functools.partial(in_chunks, chunk_size=1024), from_all)
  )
  assert abs(one / other - 1) < 0.1


def test_a_stopped_gradient_costs_nothing():
  run = functools.partial(in_chunks, chunk_size=1024)
  stopped = lambda a, b, *teacher: run(
    a, b, *map(jax.lax.stop_gradient, teacher)
  )
  one, other = (
    lowered(loss, argnums).cost_analysis()["flops"]
    for loss, argnums in ((stopped, BOTH), (run, STUDENT))
  )
  assert one <= 1.01 * other


# Rows of a chunk at a time


@pytest.fixture
def in_pairs(monkeypatch):
  """The divergence of two rows of a chunk at a time."""
  monkeypatch.setattr(tokens, "block", lambda size, vocab: min(size, 2))


@pytest.mark.parametrize("name", ["kl", "jsd"])
def test_rows_of_a_chunk_at_a_time_give_the_same(name, in_pairs):
  """Pairs do not divide the chunks of 3, so a row of padding is among them."""
  divergence = getattr(losses, name)
  run = value_and_grads(total, chunk_size=3, divergence=divergence)
  arrays = [*inputs(), WEIGHTS]
  assert_same(
    run(*arrays, where=SOME), program(total, 3, divergence)(*arrays, where=SOME)
  )


def test_how_many_rows_at_a_time(monkeypatch):
  """Few on one CPU, all where rows may be divided over devices."""
  monkeypatch.setattr(batch, "CACHE", 2**15)
  assert jax.device_count() > 1 and tokens.block(128, 8192) == 128
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert tokens.block(128, 8192) == 4
  assert tokens.block(5, 8192) == 3  # as even as can be
  assert tokens.block(4, 7) == 4
  assert tokens.block(4, 10**6) == 1
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert tokens.block(128, 8192) == 128


# Transformations


RUN = functools.partial(
  losses.linear_divergence_sum, divergence=cubic, chunk_size=5
)
EXACT = lambda a, b, c, d: cubic(a @ b, c @ d).sum()


@pytest.mark.parametrize(
  "transformed",
  {
    "jit of jit": lambda f: jax.grad(jax.jit(jax.jit(f)), BOTH),
    "remat": lambda f: jax.grad(jax.checkpoint(f), STUDENT),
    "vmap of grad": lambda f: (
      lambda *arrays: jax.vmap(jax.grad(f, STUDENT), (0, None, 0, None))(
        *(x if i % 2 else jnp.stack([x, 2 * x]) for i, x in enumerate(arrays))
      )
    ),
    "grad of vmap": lambda f: jax.grad(
      lambda a, b, c, d: (
        jax.vmap(f, (None, 0, None, None))(a, jnp.stack([b, 2 * b]), c, d)
        @ jnp.arange(1.0, 3.0)
      ),
      BOTH,
    ),
    "scan": lambda f: jax.grad(
      lambda a, b, c, d: jax.lax.scan(
        lambda carry, x: (carry + f(x, carry * b, c, d), None),
        1.0,
        jnp.stack([a, 2 * a]) / 20,
      )[0],
      STUDENT,
    ),
    "not used": lambda f: jax.grad(
      lambda a, b, c, d: (f(a, b, c, d), jnp.sum(a**2))[1]
    ),
    "part of the outputs": lambda f: (
      lambda *arrays: jax.vjp(
        lambda a, b, c, d: (f(a, b, c, d), jnp.sum(a**2)), *arrays
      )[1]((jnp.float32(0.0), jnp.float32(1.0)))
    ),
    "second derivatives": lambda f: jax.grad(
      lambda *arrays: (
        sum(jnp.sum(grad**2) for grad in jax.grad(f, STUDENT)(*arrays)) / 1000
      ),
      BOTH,
    ),
  }.items(),
  ids=operator.itemgetter(0),
)
def test_transformations(transformed, in_pairs):
  _, transform = transformed
  *arrays, _, _ = inputs(shape=(6,))
  one = jax.jit(transform(RUN))(*arrays)
  other = jax.jit(transform(EXACT))(*arrays)
  for grad, expected in zip(
    jax.tree.leaves(one), jax.tree.leaves(other), strict=True
  ):
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)


def test_one_program_differentiated_in_different_arguments(in_pairs):
  """JAX keeps the traced function: what is saved must not depend on them."""
  *arrays, _, _ = inputs(shape=(6,))
  inner = jax.jit(RUN)
  run = jax.jit(lambda *arrays: inner(*arrays))
  expected = jax.jit(jax.grad(EXACT, BOTH))(*arrays)
  for argnums in ((0,), TEACHER):
    assert_same(
      (0.0, jax.grad(run, argnums)(*arrays)),
      (0.0, [expected[i] for i in argnums]),
      atol=1e-4,
    )


def test_traced_numbers_of_the_divergence_are_differentiated(in_pairs):
  """Each with a temperature and a shift of its own, and its own gradient."""
  *arrays, _, _ = inputs()

  def run(temperature, index):
    def divergence(student, teacher, where):
      student = student * (jnp.arange(student.shape[-1]) != index)
      return cubic(student / temperature, teacher)

    return losses.linear_divergence_sum(
      *arrays, divergence=divergence, chunk_size=5
    )

  temperatures, indices = np.array([1.0, 2.0], np.float32), np.array([0, 3])
  values, slopes = jax.jit(jax.vmap(jax.value_and_grad(run)))(
    temperatures, indices
  )
  for i, (temperature, index) in enumerate(
    zip(temperatures, indices, strict=True)
  ):
    logits = arrays[0] @ arrays[1] * (np.arange(7) != index)
    exact = cubic(logits, arrays[2] @ arrays[3]).sum()
    np.testing.assert_allclose(values[i], exact / temperature**2, rtol=1e-4)
    np.testing.assert_allclose(
      slopes[i], -2 * exact / temperature**3, rtol=1e-4
    )


def test_sharded_tokens_are_one_device():
  arrays = [*inputs(), WEIGHTS]
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  spec = lambda x: jax.sharding.PartitionSpec(
    *["data"] * (x.shape[:2] == SOME.shape)
  )
  placed = [
    jax.device_put(x, jax.sharding.NamedSharding(mesh, spec(x))) for x in arrays
  ]
  run = program(total, 7)
  assert_same(run(*placed), run(*arrays))


# What is refused


def test_wrong_weights_and_masks():
  *arrays, _, _ = inputs()
  with pytest.raises(TypeError, match="weights has dtype int"):
    RUN(*arrays, weights=WEIGHTS.astype(np.int32))
  for wrong in (WEIGHTS[:-1], WEIGHTS[..., None], np.float32(1.0)):
    with pytest.raises(ValueError, match=r"weights has shape .*\(8, 2\), one"):
      RUN(*arrays, weights=wrong)
  with pytest.raises(ValueError, match=r"where has shape \(8,\)"):
    RUN(*arrays, where=SOME[:, 0])
  with pytest.raises(TypeError, match="where has dtype float"):
    RUN(*arrays, where=WEIGHTS)


def test_wrong_arguments_are_those_of_linear_divergence():
  *arrays, _, _ = inputs()
  run = functools.partial(losses.linear_divergence_sum, *arrays)
  with pytest.raises(ValueError, match="chunk_size is 0; .* above 0"):
    run(divergence=cubic, chunk_size=0)
  with pytest.raises(TypeError, match="divergence is None"):
    run(divergence=None, chunk_size=4)
  mean = lambda *logits, where: cubic(*logits).mean()
  with pytest.raises(ValueError, match=r"divergence gives shape \(\) .*\(4,\)"):
    run(divergence=mean, chunk_size=4)
  with pytest.raises(ValueError, match=r"\(5, 9\).*needs teacher_index"):
    RUN(*inputs(vocab_t=9)[:4])
