"""Models made of models, and the small CNN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses, models


def linear(classes=4):
  return models.create("mlp", classes, hidden=())


def test_images_of_the_right_size_are_left_alone():
  images = jax.random.normal(jax.random.key(0), (3, 6, 6, 1))
  model = linear()
  same = models.at_resolution(model, 6)
  variables = same.init(jax.random.key(1), images)
  np.testing.assert_array_equal(
    same.apply(variables, images)[0].logits,
    model.apply(variables, images)[0].logits,
  )


def test_halving_is_the_mean_of_four():
  images = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))
  model = models.from_function(
    lambda key, x: {}, lambda params, x: x.reshape(len(x), -1)
  )
  half = models.at_resolution(model, 4)
  out = half.apply(half.init(jax.random.key(1), images), images)[0].logits
  wide = np.pad(np.float64(images), ((0, 0), (1, 1), (1, 1), (0, 0)))
  # A triangle of twice the width: 1, 3, 3, 1 of eighths, less at the border.
  taps = np.array([1.0, 3.0, 3.0, 1.0])
  expected = np.zeros((3, 4, 4, 2))
  inside = np.pad(np.ones((8, 8)), 1)
  for i in range(4):
    for j in range(4):
      window = wide[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
      weights = (
        np.outer(taps, taps) * inside[2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
      )
      expected[:, i, j] = np.einsum("bhwc,hw->bc", window, weights)
      expected[:, i, j] /= weights.sum()
  np.testing.assert_allclose(out, expected.reshape(3, -1), rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match="size is 0"):
    models.at_resolution(model, 0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matching_an_ensemble_is_matching_each_member(temperature):
  """The gradient of the mean divergence, at whatever temperature."""
  inputs = jax.random.normal(jax.random.key(0), (5, 3))
  members = {"a": linear(), "b": linear(), "c": linear()}
  both = models.ensemble(members, temperature=temperature)
  variables = both.init(jax.random.key(1), inputs)
  variables = jax.tree.map(
    lambda x: 3 * x + jax.random.normal(jax.random.key(2), x.shape), variables
  )
  student = jax.random.normal(jax.random.key(3), (5, 4))

  def match(student, target):
    return losses.kl(student, target, temperature=temperature).mean()

  target = both.apply(variables, inputs)[0].logits
  got = jax.grad(match)(student, target)
  each = [
    jax.grad(match)(
      student, members[name].apply(variables[name], inputs)[0].logits
    )
    for name in members
  ]
  np.testing.assert_allclose(got, sum(each) / 3, rtol=1e-4, atol=1e-6)


def test_an_ensemble_of_one_says_what_it_says():
  inputs = jax.random.normal(jax.random.key(0), (5, 3))
  one = models.ensemble({"a": linear()}, temperature=3.0)
  variables = one.init(jax.random.key(1), inputs)
  np.testing.assert_array_equal(
    one.apply(variables, inputs)[0].logits,
    linear().apply(variables["a"], inputs)[0].logits,
  )
  with pytest.raises(ValueError, match="members is empty"):
    models.ensemble({})
  with pytest.raises(ValueError, match="an ensemble is used, not trained"):
    one.apply(variables, inputs, train=True)


@pytest.mark.parametrize("pool", [True, False])
def test_the_cnn_is_its_layers(pool):
  layers = ((8, 3, 2), (16, 3, 1))
  model = models.create("cnn", 5, layers=layers, groups=4, pool=pool)
  images = jax.random.normal(jax.random.key(0), (3, 9, 7, 2))
  variables = model.init(jax.random.key(1), images)
  params, x = variables["params"], images
  for i, (_, kernel, stride) in enumerate(layers):
    x = jax.lax.conv_general_dilated(
      x,
      params[f"Conv_{i}"]["kernel"],
      (stride, stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert params[f"Conv_{i}"]["kernel"].shape[0] == kernel
    parts = np.float64(x).reshape(3, -1, 4, x.shape[-1] // 4)
    mean, var = parts.mean((1, 3)), parts.var((1, 3))
    parts = (parts - mean[:, None, :, None]) / np.sqrt(
      var[:, None, :, None] + 1e-6
    )
    x = np.maximum(parts.reshape(x.shape), 0).astype(np.float32)
  x = x.mean((1, 2)) if pool else x.reshape(3, -1)
  head = params["Dense_0"]
  expected = x @ head["kernel"] + head["bias"]
  got = model.apply(variables, images)[0].logits
  np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_what_a_cnn_refuses():
  with pytest.raises(ValueError, match="layers has 6 channels"):
    models.create("cnn", 5, layers=((6, 3, 2),)).init(
      jax.random.key(0), jnp.zeros((1, 8, 8, 1))
    )


class TestCohort:
  """Peers as one model: unlike ones, and one architecture stacked."""

  def setup_method(self):
    self.net = models.create("cnn", 3, layers=((8, 3, 2),))
    self.images = jax.random.normal(jax.random.key(0), (5, 6, 6, 1))

  def test_each_head_is_that_network(self):
    members = {"a": self.net, "b": linear(3)}
    both = models.cohort(members)
    variables = both.init(jax.random.key(1), self.images)
    out, state = both.apply(variables, self.images, train=True)
    assert state == {"a": {}, "b": {}}
    total = 0.0
    for i, (name, net) in enumerate(members.items()):
      own = {part: variables[part][name] for part in ("params", "state")}
      alone = net.apply(own, self.images)[0].logits
      np.testing.assert_allclose(out.heads[i], alone, rtol=1e-6)
      total = total + np.float64(jax.nn.softmax(alone)) / 2
    np.testing.assert_allclose(jax.nn.softmax(out.logits), total, rtol=1e-5)

  def test_stacked_is_the_cohort_of_equals(self):
    apart = models.cohort({f"peer_{i}": self.net for i in range(3)})
    together = models.stacked(self.net, 3)
    key = jax.random.key(2)
    one = apart.init(key, self.images)
    other = together.init(key, self.images)
    for i in range(3):
      jax.tree.map(
        np.testing.assert_array_equal,
        one["params"][f"peer_{i}"],
        jax.tree.map(lambda x, i=i: x[i], other["params"]),
      )
    np.testing.assert_allclose(
      together.apply(other, self.images)[0].heads,
      apart.apply(one, self.images)[0].heads,
      rtol=1e-5,
      atol=1e-6,
    )

  @pytest.mark.parametrize("stack", [False, True])
  def test_each_draws_from_a_key_of_its_own(self, stack):
    net = models.create("mlp", 3, hidden=(64,), dropout=0.5)
    same = {"params": None, "state": {}}
    start = net.init(jax.random.key(0), self.images)
    if stack:
      model = models.stacked(net, 2)
      copies = jax.tree.map(lambda x: jnp.stack([x, x]), start["params"])
      same = {"params": copies, "state": {}}
    else:
      model = models.cohort({"a": net, "b": net})
      same = {
        "params": {"a": start["params"], "b": start["params"]},
        "state": {"a": {}, "b": {}},
      }
    out, _ = model.apply(same, self.images, train=True, key=jax.random.key(3))
    assert np.abs(out.heads[0] - out.heads[1]).max() > 1e-3
    out, _ = model.apply(same, self.images)
    np.testing.assert_allclose(out.heads[0], out.heads[1], rtol=1e-6)

  def test_there_is_somebody(self):
    with pytest.raises(ValueError, match="members is empty"):
      models.cohort({})
    with pytest.raises(ValueError, match="count is 0"):
      models.stacked(self.net, 0)
