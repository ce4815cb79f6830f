import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses import _batch as batch


def outer(x, y, z):
  return jnp.tanh(x[:, None] * y) + z


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("numbers", [0, batch.CACHE // 2, batch.CACHE * 2])
def test_by_row_is_vmap(n, numbers):
  """All rows at once, two with a rest, one at a time: the same."""
  rng = np.random.default_rng(0)
  shapes = (n, 3), (n, 2), (n,)
  arrays = [np.float32(rng.normal(size=shape)) for shape in shapes]

  @functools.partial(jax.jit, static_argnums=0)
  def run(function, *arrays):
    values, pull = jax.vjp(function, *arrays)
    return values, *pull(values), *jax.jvp(function, arrays, arrays)

  by_row = lambda *arrays: batch.by_row(outer, numbers, *arrays)
  for got, want in zip(
    run(by_row, *arrays), run(jax.vmap(outer), *arrays), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_by_row_keeps_no_row_in_memory():
  x = jax.ShapeDtypeStruct((512, 512), jnp.float32)

  def total(x):
    rows = lambda row: jnp.sin(row[:, None] * row).sum()
    return batch.by_row(rows, 512**2, x).sum()

  compiled = jax.jit(jax.value_and_grad(total)).lower(x).compile()
  used = compiled.memory_analysis().temp_size_in_bytes
  assert used < 4 * 512**2 * 8
