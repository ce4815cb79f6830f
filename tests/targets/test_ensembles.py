import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import targets
from tests import references

MEMBERS, EXAMPLES, CLASSES = 3, 4, 5
both = pytest.mark.parametrize("space", ["probability", "logit"])


def members(seed=0, scale=2.0):
  rng = np.random.default_rng(seed)
  z = scale * rng.normal(size=(MEMBERS, EXAMPLES, CLASSES))
  return z.astype(np.float32)


def softmax(z, temperature=1.0):
  return np.exp(references.log_softmax(z, temperature))


@functools.partial(jax.jit, static_argnames="space")
def program(z, weights, temperature, where, space):
  return targets.ensemble(
    z, weights=weights, temperature=temperature, where=where, space=space
  )


def ensemble(z, weights=(1, 1, 1), temperature=1.0, where=None, **kwargs):
  """One compiled program for each space."""
  weights = np.asarray(weights, np.float32)
  if weights.ndim == 1:
    weights = np.repeat(weights[:, None], EXAMPLES, axis=1)
  where = np.ones(EXAMPLES, bool) if where is None else where
  space = kwargs.get("space", "probability")
  return np.asarray(program(z, weights, temperature, where, space))


peers = jax.jit(targets.peers, static_argnames="space")


@both
@pytest.mark.parametrize("chosen", range(MEMBERS))
def test_one_weight_is_that_member(space, chosen):
  z = members()
  weights = 7.0 * np.eye(MEMBERS)[chosen]
  target = ensemble(z, weights, temperature=2.0, space=space)
  np.testing.assert_allclose(
    references.log_softmax(target, 2.0),
    references.log_softmax(z[chosen], 2.0),
    rtol=1e-6,
    atol=1e-6,
  )


@both
def test_equal_members_and_a_single_one(space):
  z = members()
  same = ensemble(np.repeat(z[:1], MEMBERS, axis=0), space=space)
  alone = jax.jit(functools.partial(targets.ensemble, space=space))(z[:1])
  for target in (same, alone):
    np.testing.assert_allclose(softmax(target), softmax(z[0]), atol=1e-6)


@both
def test_weights_of_each_example(space):
  z = members()
  weights = np.random.default_rng(1).uniform(size=(MEMBERS, EXAMPLES))
  target = ensemble(z, weights, space=space)
  for i in range(EXAMPLES):
    everywhere = ensemble(z, weights[:, i], space=space)
    np.testing.assert_allclose(target[i], everywhere[i], rtol=1e-6, atol=1e-6)
  # A mask hides bad weights too.
  weights[:, 2] = np.nan
  where = np.arange(EXAMPLES) != 2
  masked = ensemble(z, weights, space=space, where=where)
  np.testing.assert_allclose(masked[where], target[where], rtol=1e-6)
  assert np.all(np.isfinite(masked))


def test_the_mean_of_logits_is_the_mean_of_logits():
  z = members()
  np.testing.assert_allclose(
    ensemble(z, (1, 2, 1), space="logit"),
    (z[0] + 2 * z[1] + z[2]) / 4,
    rtol=1e-5,
    atol=1e-6,
  )


def test_high_temperatures_keep_their_digits():
  """The arithmetic mean tends to the mean of the centred logits."""
  z = members()
  for temperature in (1e3, 1e4):
    p = softmax(z, temperature).mean(0)
    want = temperature * np.log(p / p[..., :1])
    target = ensemble(z, temperature=temperature).astype(np.float64)
    np.testing.assert_allclose(target - target[..., :1], want, atol=3e-6)
  np.testing.assert_allclose(
    target - target[..., :1], (z - z[..., :1]).mean(0), atol=2e-3
  )


def test_a_class_that_one_member_lacks():
  z = members()
  z[0, :, 1] = -np.inf
  p = np.zeros_like(z, dtype=np.float64)
  keep = np.arange(CLASSES) != 1
  p[0][:, keep] = softmax(z[0][:, keep])
  p[1:] = softmax(z[1:])
  np.testing.assert_allclose(softmax(ensemble(z)), p.mean(0), rtol=2e-6)
  product = np.prod(p[:, :, keep], axis=0) ** (1 / 3)
  target = ensemble(z, space="logit")
  np.testing.assert_array_equal(target[:, 1], -np.inf)
  np.testing.assert_allclose(
    softmax(target[:, keep]),
    product / product.sum(-1, keepdims=True),
    rtol=2e-6,
  )
  # It does not count if the member does not.
  np.testing.assert_allclose(
    softmax(ensemble(z, (0, 1, 1))), p[1:].mean(0), rtol=2e-6
  )
  np.testing.assert_allclose(
    ensemble(z, (0, 1, 1), space="logit"), z[1:].mean(0), rtol=1e-5, atol=1e-6
  )


def test_a_class_that_only_a_member_without_weight_has_is_absent():
  z = members()
  z[1:, :, 3] = -np.inf
  np.testing.assert_array_equal(ensemble(z, (0, 1, 1))[:, 3], -np.inf)


@both
def test_gradients_by_the_weights(space):
  probe = np.random.default_rng(2).normal(size=(EXAMPLES, CLASSES))

  @jax.jit
  @functools.partial(jax.grad, argnums=1)
  def gradient(z, weights):
    target = targets.ensemble(z, weights=weights, space=space)
    target -= target.mean(-1, keepdims=True)
    return jnp.sum(probe * target)

  # The member without weight is sure of what the others find impossible.
  z = members()
  z[0, :, 0] += 1e4
  for weights in ((0.0, 1.0, 1.0), (1e-30, 1.0, 1.0)):
    assert np.all(np.isfinite(gradient(z, np.float32(weights))))

  # The derivative at 0, for members that are not that far apart.
  def value(weights):
    if space == "logit":
      log_p = np.tensordot(weights / weights.sum(), z, 1)
    else:
      log_p = np.log(np.tensordot(weights / weights.sum(), softmax(z), 1))
    return (probe * (log_p - log_p.mean(-1, keepdims=True))).sum()

  z = members()
  np.testing.assert_allclose(
    gradient(z, np.float32([0.0, 0.5, 1.0])),
    references.gradient(value, np.array([0.0, 0.5, 1.0])),
    rtol=1e-4,
    atol=1e-5,
  )


@both
def test_peers_with_weights(space):
  """OKDDip: row i of the weights is what student i takes from each."""
  z = members()
  rng = np.random.default_rng(3)
  everyone = np.ones((MEMBERS, MEMBERS))
  attention = rng.uniform(size=(MEMBERS, MEMBERS))
  each = rng.uniform(size=(MEMBERS, MEMBERS, EXAMPLES))
  for weights in (everyone, attention, each):
    result = np.asarray(peers(z, weights=np.float32(weights), space=space))
    for row, target in zip(weights, result, strict=True):
      np.testing.assert_allclose(
        target, ensemble(z, row, space=space), rtol=1e-5, atol=1e-6
      )


@pytest.mark.parametrize(
  "weights", [[1, -1, 1], [0, 0, 0], [1, np.nan, 1], [1, np.inf, 1]]
)
def test_bad_weights(weights):
  z, weights = members(), np.float32(weights)
  with pytest.raises(ValueError, match=r"^weights should be finite, not neg"):
    targets.ensemble(z, weights=weights)
  assert np.all(np.isnan(ensemble(z, weights)))
  rows = np.ones((MEMBERS, MEMBERS), np.float32)
  rows[1] = weights
  with pytest.raises(ValueError, match=r"^weights should be finite, not neg"):
    targets.peers(z, weights=rows)
  result = np.asarray(peers(z, weights=rows, space="probability"))
  assert np.all(np.isnan(result[1])) and np.all(np.isfinite(result[[0, 2]]))


def test_wrong_arguments():
  z = members()
  with pytest.raises(ValueError, match=r"weights has shape \(4,\) and teacher"):
    targets.ensemble(z, weights=np.ones(4, np.float32))
  with pytest.raises(ValueError, match=r"should have shape \(3,\) or \(3, 4\)"):
    targets.ensemble(z, weights=np.ones((3, 5), np.float32))
  with pytest.raises(ValueError, match=r"shape \(3, 3\) or \(3, 3, 4\)"):
    targets.peers(z, weights=np.ones(3, np.float32))
  with pytest.raises(TypeError, match="weights has dtype int"):
    targets.ensemble(z, weights=np.ones(3, int))
  for target in (targets.ensemble, targets.peers):
    with pytest.raises(
      ValueError, match=r"^space is 'log'; it should be \"prob"
    ):
      target(z, space="log")
    for axis in (0, -3):
      with pytest.raises(ValueError, match="axis 0 should be the members"):
        target(z, axis=axis)
  with pytest.raises(ValueError, match="at least two members"):
    targets.peers(z[:1])
