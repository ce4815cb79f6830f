import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

from kd_jax import targets
from kd_jax.losses import activations

margin = jax.jit(targets.ofd_margin, static_argnames="form")


def expected(mean, scale):
  """E[x | x < 0] for a normal x, by the scaled error function."""
  s = abs(scale)
  u = mean / s
  if u < -5:
    phi = np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi)
    return mean - s * phi / special.ndtr(-u)
  hazard = np.sqrt(2 / np.pi) / special.erfcx(u / np.sqrt(2))
  return s * (u - hazard)


def grid():
  steps = np.array([-30, -10, -3.2, -3, -1, -0.3, 0.1, 0.5, 2.9, 3, 3.1, 7, 30])
  mean, scale = np.meshgrid(steps, steps)
  return mean.astype(np.float32), scale.astype(np.float32)


def test_the_reference_is_the_conditional_mean():
  for mean, scale in ((-1.0, 0.7), (0.5, 2.0), (4.0, 1.3)):
    density = lambda x, m=mean, s=scale: np.exp(-(((x - m) / s) ** 2) / 2)
    mass, _ = integrate.quad(density, -60, 0)
    first, _ = integrate.quad(lambda x, d=density: x * d(x), -60, 0)
    np.testing.assert_allclose(first / mass, expected(mean, scale), rtol=1e-6)


def test_the_paper_has_the_conditional_mean_everywhere():
  mean, scale = grid()
  want = np.vectorize(expected)(
    mean.astype(np.float64), scale.astype(np.float64)
  )
  np.testing.assert_allclose(margin(mean, scale, form="paper"), want, rtol=3e-6)


def test_the_released_code_gives_up_where_few_are_negative():
  mean, scale = (x.astype(np.float64) for x in grid())
  want = np.vectorize(expected)(mean, scale)
  rare = special.ndtr(-mean / np.abs(scale)) <= 0.001
  want = np.where(rare, -3 * np.abs(scale), want)
  assert 0 < rare.sum() < rare.size
  np.testing.assert_allclose(margin(*grid()), want, rtol=3e-6)
  # 3.0902 standard deviations.
  two = margin(np.float32([3.090, 3.0905]), np.ones(2, np.float32))
  np.testing.assert_allclose(two, [expected(3.09, 1.0), -3.0], rtol=1e-4)


# Scales of 0, ratios beyond float32, both signs.
EXTREMES = (
  np.float32([2.0, -2.0, 0.0, 1e4, -1e4, 30.0, 0.0, 0.0, 1e30, -1e-30]),
  np.float32([0.0, 0.0, 0.0, 1e-30, 1e-30, 1e-38, 1e-30, 1e4, 1e30, 1e-30]),
)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_gradients_and_extremes(form):
  @jax.jit
  def run(mean, scale):
    total = lambda m, s: targets.ofd_margin(m, s, form=form).sum()
    grads = jax.grad(total, argnums=(0, 1))(mean, scale)
    return targets.ofd_margin(mean, scale, form=form), grads

  ordinary = [x.ravel() for x in grid()]
  n = len(ordinary[0])
  both = map(np.concatenate, zip(ordinary, EXTREMES, strict=True))
  values, grads = jax.device_get(run(*both))
  for array in (values, *grads):
    assert np.all(np.isfinite(array))
  assert np.all(values <= 0)
  np.testing.assert_array_equal(values[n : n + 3], [0.0, -2.0, 0.0])
  if form == "paper":
    step, (mean, scale) = 1e-5, (x.astype(np.float64) for x in ordinary)
    f = np.vectorize(expected)
    for grad, numeric in zip(
      grads,
      (
        (f(mean + step, scale) - f(mean - step, scale)) / (2 * step),
        (f(mean, scale + step) - f(mean, scale - step)) / (2 * step),
      ),
      strict=True,
    ):
      np.testing.assert_allclose(grad[:n], numeric, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e30])
def test_the_unit_does_not_matter(unit):
  mean, scale = grid()
  unit = np.float32(unit)
  for form in ("released", "paper"):
    np.testing.assert_allclose(
      margin(unit * mean, unit * scale, form=form) / unit,
      margin(mean, scale, form=form),
      rtol=1e-5,
    )


def test_it_feeds_its_loss():
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 4, 3, 3, 2)).astype(np.float32)
  cut = margin(np.float32([0.1, 0.2]), np.float32([1.0, -0.5]))
  assert jax.jit(activations.ofd)(student, teacher, margin=cut).shape == (4,)


def test_any_shape_and_dtype_and_bad_numbers():
  mean = np.array([[0.5, 4.0, np.nan, 1.0]], jnp.bfloat16)
  scale = np.array([[1.0, 1.0, 1.0, np.nan]], jnp.bfloat16)
  want = [expected(0.5, 1.0), -3.0, np.nan, np.nan]
  result = margin(mean, scale)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, [want], rtol=1e-6)
  rows = jax.jit(jax.vmap(targets.ofd_margin))(mean[0], scale[0])
  np.testing.assert_allclose(rows, want, rtol=1e-6)


def test_wrong_arguments():
  three = np.ones(3, np.float32)
  with pytest.raises(ValueError, match=r"mean has shape \(3,\) and scale has"):
    targets.ofd_margin(three, three[:2])
  with pytest.raises(ValueError, match=r"^form is 'exact'; it should be"):
    targets.ofd_margin(three, three, form="exact")
  with pytest.raises(TypeError, match="scale has dtype int"):
    targets.ofd_margin(three, three.astype(int))
