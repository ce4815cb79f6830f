import jax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np
import pytest

from kd_jax import calibration, evaluate


def data(n=23, features=3):
  return np.random.default_rng(0).normal(size=(n, features)).astype(np.float32)


WEIGHTS = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def linear(weights, x):
  return x @ weights


class Counting:
  """Counts how often its function is traced, that is compiled."""

  def __init__(self):
    self.traced = 0
    self.shapes = []

  def __call__(self, weights, x):
    self.traced += 1
    self.shapes.append(x.shape)
    return linear(weights, x)


@pytest.mark.parametrize("batch_size", [1, 5, 8, 23, 64])
def test_every_example_once_and_in_order(batch_size):
  x = data()
  logits = evaluate.predict(Partial(linear, WEIGHTS), x, batch_size=batch_size)
  assert logits.shape == (23, 4)
  assert logits.dtype == np.float32
  np.testing.assert_allclose(logits, x @ WEIGHTS, rtol=1e-5, atol=1e-6)


def test_the_tail_does_not_compile_again():
  apply = Counting()
  for n in (23, 7, 16):
    evaluate.predict(Partial(apply, WEIGHTS), data(n), batch_size=8)
  assert apply.shapes == [(8, 3)]
  # New variables, same program.
  x = data(9)
  new = evaluate.predict(Partial(apply, 2 * WEIGHTS), x, batch_size=8)
  assert apply.traced == 1
  np.testing.assert_allclose(new, 2 * x @ WEIGHTS, rtol=1e-5, atol=1e-6)


def test_a_plain_function_compiles_once():
  apply = Counting()
  x = data()
  logits = evaluate.predict(lambda x: apply(WEIGHTS, x), x, batch_size=8)
  assert apply.shapes == [(8, 3)]
  np.testing.assert_allclose(logits, x @ WEIGHTS, rtol=1e-5, atol=1e-6)


def test_a_dict_of_arrays():
  batch = {"id": np.arange(11), "x": jnp.asarray(data(11))}
  logits = evaluate.predict(
    lambda b: jnp.stack([b["id"], b["x"][:, 0]], axis=1), batch, batch_size=4
  )
  np.testing.assert_array_equal(logits[:, 0], np.arange(11))
  np.testing.assert_array_equal(logits[:, 1], data(11)[:, 0])


@pytest.mark.parametrize("bound", [True, False])
def test_eight_devices_give_the_same(bound):
  devices = jax.devices()
  assert len(devices) == 8, "the tests need 8 simulated devices"
  x = data(37)
  seen = []

  def spread(weights, x):
    jax.debug.inspect_array_sharding(x, callback=seen.append)
    return linear(weights, x)

  apply = Partial(spread, WEIGHTS) if bound else lambda x: spread(WEIGHTS, x)
  many = evaluate.predict(apply, x, batch_size=16, devices=devices)
  one = evaluate.predict(Partial(linear, WEIGHTS), x, batch_size=16)
  np.testing.assert_allclose(many, one, rtol=1e-6, atol=1e-6)
  assert len(seen[0].device_set) == 8


def test_half_precision_logits_become_float32():
  x = data()
  logits = evaluate.predict(
    lambda x: (x @ WEIGHTS).astype(jnp.bfloat16), x, batch_size=8
  )
  assert logits.dtype == np.float32
  np.testing.assert_allclose(logits, x @ WEIGHTS, rtol=1e-2, atol=1e-2)


def test_on_batch_hears_of_each_batch_and_may_stop():
  heard = []
  evaluate.predict(
    Partial(linear, WEIGHTS), data(), batch_size=8, on_batch=heard.append
  )
  assert heard == [8, 16, 23]

  def stop(done):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    evaluate.predict(
      Partial(linear, WEIGHTS), data(), batch_size=8, on_batch=stop
    )


def test_predict_names_what_is_wrong():
  apply = Partial(linear, WEIGHTS)
  with pytest.raises(ValueError, match="no example"):
    evaluate.predict(apply, data(0), batch_size=8)
  with pytest.raises(ValueError, match=r"leading axes \[3, 4\]"):
    evaluate.predict(apply, {"a": data(3), "b": data(4)}, batch_size=8)
  with pytest.raises(ValueError, match="leading axis"):
    evaluate.predict(apply, {"a": np.float32(1)}, batch_size=8)
  with pytest.raises(ValueError, match="leading axis"):
    evaluate.predict(apply, {}, batch_size=8)
  with pytest.raises(ValueError, match="batch_size is 0"):
    evaluate.predict(apply, data(), batch_size=0)
  with pytest.raises(ValueError, match=r"batch_size is 20.* 8 devices.* 16"):
    evaluate.predict(apply, data(), batch_size=20, devices=jax.devices())
  with pytest.raises(ValueError, match="devices is empty"):
    evaluate.predict(apply, data(), batch_size=20, devices=[])
  with pytest.raises(ValueError, match=r"returned shape \(8,\)"):
    evaluate.predict(lambda x: x[:, 0], data(), batch_size=8)
  with pytest.raises(ValueError, match=r"returned shape \(4, 3\)"):
    evaluate.predict(lambda x: x[:4], data(), batch_size=8)
  with pytest.raises(TypeError, match="int32"):
    evaluate.predict(lambda x: x.astype(int), data(), batch_size=8)


def test_classification_by_hand():
  p = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
  scores = evaluate.classification(np.log(p), np.array([0, 2, 2]))
  assert scores == pytest.approx(
    {
      "accuracy": 2 / 3,
      "errors": 1,
      "nll": -(np.log(0.7) + np.log(0.3) + np.log(0.5)) / 3,
      # Three bins with one example each.
      "ece": (0.3 + 0.6 + 0.5) / 3,
      "brier": (0.09 + 0.04 + 0.01 + 0.01 + 0.36 + 0.49 + 0.04 + 0.09 + 0.25)
      / 3,
      "count": 3,
    },
    rel=1e-12,
  )
  assert type(scores["errors"]) is int


def test_classification_agrees_with_scikit_learn():
  metrics = pytest.importorskip("sklearn.metrics")
  rng = np.random.default_rng(0)
  z = rng.normal(size=(500, 6)).astype(np.float32)
  y = rng.integers(0, 6, 500)
  scores = evaluate.classification(z, y)
  p = np.exp(z.astype(float))
  p /= p.sum(1, keepdims=True)
  assert scores["nll"] == pytest.approx(metrics.log_loss(y, p), rel=1e-9)
  assert scores["accuracy"] == metrics.accuracy_score(y, z.argmax(1))
  assert scores["errors"] == 500 - round(500 * scores["accuracy"])


def test_classification_masks():
  rng = np.random.default_rng(0)
  z, y = rng.normal(size=(12, 3)), rng.integers(0, 3, 12)
  where = rng.random(12) < 0.5
  dirty = np.where(where[:, None], z, np.nan)
  labels = np.where(where, y, 99)
  masked = evaluate.classification(dirty, labels, where=where)
  assert masked == evaluate.classification(z[where], y[where])
  assert masked["count"] == where.sum()
  with pytest.raises(ValueError, match="no example"):
    evaluate.classification(z, y, where=np.zeros(12, bool))


def test_classification_is_exact_where_float32_is_not():
  # A mean over many equal values drifts when it is summed in float32.
  z = np.tile(np.log(np.array([[0.9, 0.1]])), (100_000, 1))
  y = np.zeros(100_000, np.int32)
  scores = evaluate.classification(z, y)
  assert scores["nll"] == pytest.approx(-np.log(0.9), rel=1e-12)
  assert scores["ece"] == pytest.approx(0.1, rel=1e-10)
  assert calibration.brier(z, y) == pytest.approx(0.02, rel=1e-10)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_classification_takes_device_arrays(dtype):
  z = jnp.array([[2.0, -1.0], [0.5, 1.5]], dtype)
  scores = evaluate.classification(z, jnp.array([0, 0]))
  assert scores["errors"] == 1


def test_classification_names_what_is_wrong():
  z, y = np.zeros((4, 3)), np.zeros(4, int)
  with pytest.raises(ValueError, match="labels has shape"):
    evaluate.classification(z, y[:, None])
  with pytest.raises(ValueError, match=r"labels\[1\] is 3.*0\.\.2"):
    evaluate.classification(z, np.array([0, 3, 0, 0]))
  with pytest.raises(TypeError, match="labels has dtype"):
    evaluate.classification(z, y.astype(np.float32))
  with pytest.raises(ValueError, match=r"logits\[3\]"):
    evaluate.classification(np.where(np.arange(4)[:, None] == 3, np.nan, z), y)
