import functools
import math

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np
import pytest

from kd_jax import losses, sharpness

KEY = jax.random.key(0)


def cut(data, sizes):
  ends = np.cumsum(sizes)
  assert ends[-1] == len(next(iter(data.values())))
  return [
    {name: x[end - size : end] for name, x in data.items()}
    for end, size in zip(ends, sizes, strict=True)
  ]


def regression(n=12, d=5, seed=0):
  """Least squares: the Hessian is X^T X / n everywhere."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) * np.linspace(0.5, 2.0, d)
  return {"x": x.astype(np.float32), "y": rng.normal(size=n).astype(np.float32)}


def squares(params, batch):
  w = jnp.concatenate([params["a"], params["b"].ravel()])
  return (batch["x"] @ w - batch["y"]) ** 2 / 2


def split(w):
  w = np.asarray(w, np.float32)
  return {"a": w[:3], "b": w[3:].reshape(1, -1)}


def joined(params):
  flat = [np.ravel(params["a"]), np.ravel(params["b"])]
  return np.concatenate(flat).astype(np.float64)


def hessian(data):
  x = data["x"].astype(np.float64)
  return x.T @ x / len(x)


def minimum(data):
  x, y = (data[name].astype(np.float64) for name in "xy")
  return np.linalg.lstsq(x, y, rcond=None)[0]


def mean_loss(data, w):
  x, y = (data[name].astype(np.float64) for name in "xy")
  return ((x @ w - y) ** 2).mean() / 2


def saddle(params, batch):
  """w^T diag(h) w / 2 + g w, the same for every example."""
  w = params["w"]
  value = (params["h"] * w**2).sum() / 2 + (params["g"] * w).sum()
  return jnp.broadcast_to(value, batch["x"].shape)


def saddle_of(bound, params, batch):
  return saddle({**bound, **params}, batch)


def quadratic(h, g=0.0):
  h = jnp.asarray(h, jnp.float32)
  bound = {"h": h, "g": jnp.broadcast_to(jnp.float32(g), h.shape)}
  return Partial(saddle_of, bound)


ONE = [{"x": np.zeros(3, np.float32)}]


def mlp(params, batch):
  h = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
  logits = h @ params["w2"]
  picked = jnp.take_along_axis(logits, batch["y"][:, None], 1)[:, 0]
  return jax.nn.logsumexp(logits, axis=1) - picked


def mlp_with_ours(params, batch):
  h = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
  return losses.cross_entropy(h @ params["w2"], batch["y"])


def classification(n=12):
  rng = np.random.default_rng(1)
  data = {
    "x": rng.normal(size=(n, 3)).astype(np.float32),
    "y": rng.integers(0, 3, n),
  }
  params = {
    "w1": rng.normal(0, 0.5, (3, 4)).astype(np.float32),
    "b1": rng.normal(size=4).astype(np.float32),
    "w2": rng.normal(0, 0.5, (4, 3)).astype(np.float32),
  }
  return data, params


@functools.cache
def mlp_hessian():
  """The whole matrix, in float32."""
  data, params = classification()
  flat, back = ravel_pytree(params)
  dense = jax.jit(jax.hessian(lambda w: mlp(back(w), data).mean()))(flat)
  return np.asarray(dense, np.float64)


# The trace.


def test_trace_is_exact_for_a_diagonal_hessian():
  h = np.array([3.0, -1.0, 0.5, 2.0])
  mean, error = sharpness.hessian_trace(
    quadratic(h), {"w": jnp.ones(4)}, ONE, KEY, num_samples=3
  )
  assert mean == pytest.approx(4.5, rel=1e-6)
  assert error == pytest.approx(0, abs=1e-6)


def test_trace_and_its_error_for_a_dense_hessian():
  data = regression()
  h = hessian(data)
  n = 300
  mean, error = sharpness.hessian_trace(
    squares, split(np.ones(5)), [data], KEY, num_samples=n
  )
  off = h - np.diag(np.diag(h))
  true_error = math.sqrt(2 * (off**2).sum() / n)
  assert true_error > 0.01
  assert error == pytest.approx(true_error, rel=0.25)
  assert abs(mean - np.trace(h)) < 3 * true_error


def test_trace_of_a_network_against_its_whole_hessian():
  data, params = classification()
  h, n = mlp_hessian(), 400
  mean, error = sharpness.hessian_trace(
    mlp, params, cut(data, [8, 4]), KEY, num_samples=n
  )
  off = h - np.diag(np.diag(h))
  assert error == pytest.approx(math.sqrt(2 * (off**2).sum() / n), rel=0.2)
  assert abs(mean - np.trace(h)) < 3 * error
  assert abs(np.trace(h)) > 6 * error


def test_trace_through_a_loss_with_its_own_derivatives():
  data, params = classification()
  found, plain = (
    sharpness.hessian_trace(loss_fn, params, [data], KEY, num_samples=4)
    for loss_fn in (mlp_with_ours, mlp)
  )
  assert found == pytest.approx(plain, rel=1e-4)


def test_probes_are_signs_and_differ_between_parameters_and_samples():
  """With H = 1 1^T, v^T H v is (sum of v)^2."""
  loss = lambda w, batch: batch["x"] * (w["a"].sum() + w["b"].sum()) ** 2 / 2
  zeros = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
  batches = [{"x": np.ones(2)}]
  found = [
    sharpness.hessian_trace(loss, zeros, batches, key, num_samples=2)
    for key in jax.random.split(KEY, 8)
  ]
  # Two values determine their mean and its error, and the other way round.
  values = {round(m + s * e, 4) for m, e in found for s in (1, -1)}
  assert values <= {0.0, 4.0, 16.0, 36.0, 64.0}
  assert len(values) > 2
  again = sharpness.hessian_trace(
    loss, zeros, batches, jax.random.split(KEY, 8)[0], num_samples=2
  )
  assert again == found[0]


# The largest eigenvalue.


def test_top_eigenvalue_and_what_its_residual_promises():
  data = regression()
  eigenvalues = np.linalg.eigvalsh(hessian(data))
  for steps in (1, 3, 60):
    value, residual = sharpness.hessian_top_eigenvalue(
      squares, split(np.zeros(5)), cut(data, [8, 4]), KEY, steps=steps
    )
    assert value <= eigenvalues[-1] * (1 + 1e-6)
    assert np.abs(eigenvalues - value).min() <= residual + 1e-5
  assert value == pytest.approx(eigenvalues[-1], rel=1e-4)
  assert residual < 1e-2


def test_top_eigenvalue_of_a_network_against_its_whole_hessian():
  data, params = classification()
  eigenvalues = np.linalg.eigvalsh(mlp_hessian())
  value, residual = sharpness.hessian_top_eigenvalue(
    mlp, params, cut(data, [8, 4]), KEY, steps=100
  )
  assert value == pytest.approx(max(eigenvalues, key=abs), rel=1e-4)
  assert residual < 1e-2 * abs(value)


def test_top_eigenvalue_keeps_its_sign_and_may_be_zero():
  at = {"w": jnp.ones(3)}
  value, _ = sharpness.hessian_top_eigenvalue(
    quadratic([1.0, -4.0, 2.0]), at, ONE, KEY, steps=30
  )
  assert value == pytest.approx(-4.0, rel=1e-5)
  flat = sharpness.hessian_top_eigenvalue(
    quadratic(np.zeros(3)), at, ONE, KEY, steps=3
  )
  assert flat == (0.0, 0.0)


# The ball.


def in_ball(h, g, radius):
  """max g d + d^T H d / 2 in a ball that the maximum lies on the edge of.

  It solves (mu - H) d = g with mu above the eigenvalues and ||d|| = radius.
  """
  values, vectors = np.linalg.eigh(h)
  along = vectors.T @ g
  low = max(values[-1], 0.0)
  high = low + np.linalg.norm(g) / radius + 1.0
  for _ in range(200):
    mu = (low + high) / 2
    if np.linalg.norm(along / (mu - values)) > radius:
      low = mu
    else:
      high = mu
  d = along / (high - values)
  assert np.linalg.norm(d) == pytest.approx(radius)
  return along @ d + (values * d**2).sum() / 2


def test_first_step_is_that_of_sam():
  data = regression()
  w = np.linspace(-1, 1, 5)
  x, y = (data[name].astype(np.float64) for name in "xy")
  g = x.T @ (x @ w - y) / len(x)
  found = sharpness.worst_in_ball(
    squares, split(w), cut(data, [8, 4]), KEY, radius=0.3, steps=1
  )
  delta = 0.3 * g / np.linalg.norm(g)
  np.testing.assert_allclose(joined(found.delta), delta, rtol=1e-4, atol=1e-6)
  assert found.centre == pytest.approx(mean_loss(data, w), rel=1e-5)
  assert found.worst == pytest.approx(mean_loss(data, w + delta), rel=1e-5)
  assert found.increase == found.worst - found.centre
  assert found.radius == 0.3


@pytest.mark.parametrize("radius", [0.1, 3.0])
def test_ball_off_the_minimum_of_a_quadratic(radius):
  data = regression()
  w = minimum(data) + 0.1
  g = hessian(data) @ np.full(5, 0.1)
  found = sharpness.worst_in_ball(
    squares, split(w), [data], KEY, radius=radius, steps=40
  )
  best = in_ball(hessian(data), g, radius)
  assert found.increase == pytest.approx(best, rel=1e-3)
  assert np.linalg.norm(joined(found.delta)) <= radius * (1 + 1e-5)
  at = joined(split(w)) + joined(found.delta)
  assert found.worst == pytest.approx(mean_loss(data, at), rel=1e-5)


@pytest.mark.parametrize("h", [[1.0, 4.0, 2.0], [1.0, -5.0, -1.0]])
def test_ball_around_a_zero_gradient(h):
  """There lambda rho^2 / 2, found from a random start, also at a saddle."""
  found = sharpness.worst_in_ball(
    quadratic(h), {"w": jnp.zeros(3)}, ONE, KEY, radius=0.5, steps=60
  )
  assert found.centre == 0.0
  assert found.increase == pytest.approx(max(h) * 0.125, rel=1e-2)


def test_ball_around_a_maximum_is_no_worse():
  found = sharpness.worst_in_ball(
    quadratic([-1.0, -2.0]), {"w": jnp.zeros(2)}, ONE, KEY, radius=1, steps=5
  )
  assert found.increase == 0.0
  np.testing.assert_array_equal(found.delta["w"], 0.0)


def test_ball_that_holds_a_maximum_inside():
  """-(w - 1)^2 / 2 from 0 rises to 1/2 and falls again."""
  found = sharpness.worst_in_ball(
    quadratic([-1.0], 1.0), {"w": jnp.zeros(1)}, ONE, KEY, radius=8.0, steps=8
  )
  assert found.increase == pytest.approx(0.5, rel=1e-5)
  assert float(found.delta["w"][0]) == pytest.approx(1.0, rel=1e-2)


def test_more_steps_find_no_less_and_stay_in_the_ball():
  data, params = classification()
  before = -math.inf
  for steps in (1, 2, 5, 15):
    found = sharpness.worst_in_ball(
      mlp, params, [data], KEY, radius=0.5, steps=steps
    )
    assert found.worst >= max(before, found.centre)
    before = found.worst
    flat, _ = ravel_pytree(found.delta)
    assert np.linalg.norm(flat) <= 0.5 * (1 + 1e-5)
  assert jax.tree.structure(found.delta) == jax.tree.structure(params)
  at = jax.tree.map(np.add, params, found.delta)
  assert found.worst == pytest.approx(float(mlp(at, data).mean()), rel=1e-5)


def test_ball_that_leaves_the_domain():
  """-log(1 - w) is infinite at 1 and NaN beyond."""
  loss = lambda w, batch: -jnp.log1p(-w[0]) * batch["x"]
  found = sharpness.worst_in_ball(
    loss, jnp.zeros(1), [{"x": np.ones(2)}], KEY, radius=2.0, steps=12
  )
  assert 1.0 < found.worst < math.inf
  assert 0 < float(found.delta[0]) < 1


def test_tiny_gradients_are_not_taken_for_zero():
  scale = 1e-25
  loss = lambda w, batch: batch["x"] * (3 * w[0] + 4 * w[1])
  batches = [{"x": np.full(2, scale, np.float32)}]
  found = sharpness.worst_in_ball(
    loss, jnp.zeros(2), batches, KEY, radius=0.5, steps=1
  )
  np.testing.assert_allclose(found.delta, [0.3, 0.4], rtol=1e-5)
  assert found.increase == pytest.approx(2.5 * scale, rel=1e-5)


def test_relative_radius_undoes_a_common_scale():
  """A layer before a normalisation: only the direction of w matters."""
  data = regression(d=3)

  def normalised(w, batch):
    return (batch["x"] @ (w / jnp.linalg.norm(w)) - batch["y"]) ** 2

  w = jnp.asarray([1.0, 2.0, -2.0])
  ball = functools.partial(
    sharpness.worst_in_ball, normalised, batches=[data], key=KEY, steps=10
  )
  one = ball(params=w, radius=0.1, relative=True)
  two = ball(params=10 * w, radius=0.1, relative=True)
  assert one.radius == pytest.approx(0.3) and two.radius == pytest.approx(3.0)
  assert one.increase == pytest.approx(two.increase, rel=1e-3)
  np.testing.assert_allclose(10 * one.delta, two.delta, rtol=1e-2, atol=1e-3)
  fixed = [ball(params=c * w, radius=0.3).increase for c in (1, 10)]
  assert fixed[0] == pytest.approx(one.increase, rel=1e-5)
  assert fixed[1] < fixed[0] / 5
  traces = [
    sharpness.hessian_trace(normalised, c * w, [data], KEY, num_samples=4)[0]
    for c in (1, 10)
  ]
  assert traces[1] == pytest.approx(traces[0] / 100, rel=1e-3)


# The data.


def test_how_the_data_are_cut_does_not_matter():
  data, params = classification()

  def numbers(sizes):
    batches = cut(data, sizes)
    trace = sharpness.hessian_trace(mlp, params, batches, KEY, num_samples=3)
    top = sharpness.hessian_top_eigenvalue(mlp, params, batches, KEY, steps=3)
    ball = sharpness.worst_in_ball(
      mlp, params, batches, KEY, radius=0.5, steps=3
    )
    return [*trace, *top, ball.centre, ball.worst]

  whole = numbers([12])
  loss = float(mlp(params, data).mean())
  assert whole[4] == pytest.approx(loss, rel=1e-6)
  for sizes in ([4, 4, 4], [8, 4], [1] * 12):
    np.testing.assert_allclose(numbers(sizes), whole, rtol=1e-4)


def test_one_program_for_all_parameters_batches_and_bound_values():
  traced = []

  def loss(scale, params, batch):
    traced.append(batch["x"].shape)
    return scale * batch["x"] * (params**2).sum()

  batches = [{"x": np.ones(n, np.float32)} for n in (4, 4, 4, 2)]
  found = [
    sharpness.worst_in_ball(
      Partial(loss, jnp.float32(scale)),
      jnp.full(3, scale),
      batches,
      KEY,
      radius=0.1,
      steps=3,
    ).centre
    for scale in (1.0, 2.0)
  ]
  assert found == [3.0, 24.0]
  assert len(traced) == len(set(traced)) == 2


def test_params_are_left_as_they_are():
  data, params = classification()
  before = jax.tree.map(np.copy, params)
  sharpness.worst_in_ball(mlp, params, [data], KEY, radius=0.5, steps=2)
  jax.tree.map(np.testing.assert_array_equal, params, before)


# Wrong arguments.

CALLS = {
  "trace": functools.partial(sharpness.hessian_trace, num_samples=2),
  "top": functools.partial(sharpness.hessian_top_eigenvalue, steps=1),
  "ball": functools.partial(sharpness.worst_in_ball, radius=0.1, steps=1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_wrong_arguments_are_named(call):
  fine = {"w": jnp.ones(2)}
  loss = quadratic([1.0, 1.0])
  with pytest.raises(TypeError, match=r"params\['w'\] has dtype bfloat16"):
    call(loss, {"w": jnp.ones(2, jnp.bfloat16)}, ONE, KEY)
  with pytest.raises(TypeError, match=r"params\['w'\] has dtype int32"):
    call(loss, {"w": jnp.ones(2, jnp.int32)}, ONE, KEY)
  for empty in ({}, {"w": jnp.ones((0, 2))}):
    with pytest.raises(ValueError, match="params is empty"):
      call(loss, empty, ONE, KEY)
  with pytest.raises(TypeError, match="batches is a dict"):
    call(loss, fine, ONE[0], KEY)
  with pytest.raises(TypeError, match="batches is a generator"):
    call(loss, fine, (batch for batch in ONE), KEY)
  with pytest.raises(ValueError, match="batches is empty"):
    call(loss, fine, [], KEY)
  for batch in (
    {},
    {"x": np.zeros(0)},
    {"x": 1.0},
    {"x": np.zeros(2), "y": np.zeros(3)},
  ):
    with pytest.raises(ValueError, match=r"batches\[1\] holds shapes"):
      call(loss, fine, [*ONE, batch], KEY)
  with pytest.raises(ValueError, match=r"loss_fn returned shape \(\)"):
    call(lambda params, batch: params["w"].sum(), fine, ONE, KEY)
  with pytest.raises(TypeError, match="loss_fn returned dtype int32"):
    call(lambda params, batch: jnp.zeros(3, jnp.int32), fine, ONE, KEY)


def test_numbers_out_of_range_are_named():
  at, loss = {"w": jnp.ones(2)}, quadratic([1.0, 1.0])
  for n in (1, -3):
    with pytest.raises(ValueError, match=f"num_samples is {n}"):
      sharpness.hessian_trace(loss, at, ONE, KEY, num_samples=n)
  with pytest.raises(ValueError, match="steps is 0"):
    sharpness.hessian_top_eigenvalue(loss, at, ONE, KEY, steps=0)
  ball = functools.partial(sharpness.worst_in_ball, loss)
  with pytest.raises(ValueError, match="steps is 0"):
    ball(at, ONE, KEY, radius=0.1, steps=0)
  for radius in (0.0, -1.0, math.nan, math.inf):
    with pytest.raises(ValueError, match=f"radius is {radius}"):
      ball(at, ONE, KEY, radius=radius, steps=1)
  with pytest.raises(ValueError, match="params has norm 0.0"):
    zero = {"w": jnp.zeros(2)}
    ball(zero, ONE, KEY, radius=0.1, steps=1, relative=True)
  with pytest.raises(ValueError, match="loss at params is inf"):
    ball({"w": jnp.full(2, 1e30)}, ONE, KEY, radius=0.1, steps=1)
