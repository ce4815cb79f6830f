"""What the tests of losses on embeddings share.

Compilation is most of these tests' time: they share programs, and so shapes.
"""

import functools

import jax
import numpy as np

from tests import references


def run(loss, student, teacher, where=None, **options):
  """(values, (student gradient, teacher gradient)); numbers are traced."""
  if where is None:
    where = np.ones(len(student), bool)
  scalars = {k: x for k, x in options.items() if isinstance(x, float)}
  static = {k: x for k, x in options.items() if k not in scalars}
  return _program(loss, **static)(student, teacher, where, scalars)


@functools.cache
def _program(loss, **static):
  @jax.jit
  def run(student, teacher, where, scalars):
    def total(student, teacher):
      values = loss(student, teacher, where=where, **static, **scalars)
      return values.sum(), values

    grads, values = jax.grad(total, argnums=(0, 1), has_aux=True)(
      student, teacher
    )
    return values, grads

  return run


def embeddings(seed, shape, scale=1.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


def pad(x, shape):
  """With zeros."""
  return np.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])


def rotation(seed, size):
  """A random orthogonal matrix."""
  q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
  return q.astype(np.float32)


def check(
  loss, reference, student, teacher, where=None, *, rtol=2e-5, **options
):
  """Values and both gradients against a float64 reference.

  Masked examples are not shown to the reference.
  """
  if where is None:
    where = np.ones(len(student), bool)
  values, grads = run(loss, student, teacher, where, **options)
  s, t = (np.asarray(x, np.float64)[where] for x in (student, teacher))
  value = lambda s, t: reference(s, t, **options)
  for got, want in (
    (values, value(s, t)),
    (grads[0], references.gradient(lambda x: value(x, t), s)),
    (grads[1], references.gradient(lambda x: value(s, x), t)),
  ):
    np.testing.assert_array_equal(got[~where], 0.0)
    np.testing.assert_allclose(
      got[where], want, rtol=rtol, atol=rtol * np.abs(want).max() + 1e-9
    )


def check_mask(loss, reference, student, teacher, **options):
  """As if masked examples had never been in the batch."""
  where = np.arange(len(student)) % 4 != 1
  student, teacher = student.copy(), teacher.copy()
  student[~where], teacher[~where] = np.nan, np.inf
  check(loss, reference, student, teacher, where, **options)


def check_finite(loss, student, teacher, **options):
  values, grads = run(loss, student, teacher, **options)
  for array in (values, *grads):
    assert np.all(np.isfinite(array))
  return values, grads


def check_pmap(loss, reference, width, other_width, **options):
  """One example per device is as all of them on one."""
  n = jax.local_device_count()
  student = embeddings(0, (n, width))
  teacher = embeddings(1, (n, other_width))
  where = np.arange(n) % 4 != 1

  def run(student, teacher, where):
    def total(student, teacher):
      values = loss(student, teacher, where=where, axis_name="i", **options)
      return values.sum(), values

    return jax.grad(total, argnums=(0, 1), has_aux=True)(student, teacher)

  grads, values = jax.pmap(run, axis_name="i")(
    student[:, None], teacher[:, None], where[:, None]
  )
  s, t = (np.float64(x)[where] for x in (student, teacher))
  value = lambda s, t: reference(s, t, **options)
  np.testing.assert_allclose(values[where, 0], value(s, t), rtol=2e-5)
  for grad, want in (
    (grads[0], references.gradient(lambda x: value(x, t), s)),
    (grads[1], references.gradient(lambda x: value(s, x), t)),
  ):
    np.testing.assert_array_equal(grad[~where], 0.0)
    np.testing.assert_allclose(grad[where, 0], want, rtol=1e-4, atol=1e-6)


def relative_error(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return np.abs(got - want).max() / np.abs(want).max()
