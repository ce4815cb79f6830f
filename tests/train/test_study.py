"""A study asks a trained network once."""

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.train import Study
from kd_jax.train.study import use_devices

CONFIG = {"eval_every": 1, "save_every": 1, "log_every": 1}


class Net:
  """Says its weight times the image, and counts how often it is asked."""

  def __init__(self, heads=0):
    self.heads, self.asked = heads, 0

  def predict(self, variables, images):
    self.asked += 1
    return np.asarray(variables["params"]["w"] * images)

  def predict_heads(self, variables, images):
    whole = self.predict(variables, images)
    return whole, np.stack([whole] * self.heads)


def study(path):
  images = np.arange(6, dtype=np.float32).reshape(3, 2)
  test = {"image": images, "label": np.array([0, 1, 1])}
  found = Study(path, test, 1, CONFIG)
  found.costs["net"] = {}
  return found


@pytest.mark.parametrize("heads", [0, 2])
def test_logits_are_kept_for_these_variables(tmp_path, heads):
  net, kept = Net(heads), tmp_path / "logits.npz"
  one, two = ({"params": {"w": jnp.full(2, w)}} for w in (1.0, 2.0))
  ask = lambda variables, **how: study(tmp_path).test(
    net, variables, kind="net", **how
  )
  first = ask(one)
  ask(one)
  assert net.asked == 2  # without a file nothing is kept
  for _ in range(2):
    again = ask(one, kept=kept)
    for a, b in zip(first, again, strict=True):
      np.testing.assert_array_equal(a, b)
  assert net.asked == 3
  other = ask(two, kept=kept)
  assert net.asked == 4
  np.testing.assert_array_equal(other[0], 2 * first[0])
  data = bytearray(kept.read_bytes())
  for damaged in (data[: len(data) // 2], b"", b"nothing of the kind"):
    kept.write_bytes(damaged)
    np.testing.assert_array_equal(ask(two, kept=kept)[0], other[0])
  assert net.asked == 7


def test_a_flipped_bit_in_kept_logits_is_found(tmp_path):
  net, kept = Net(), tmp_path / "logits.npz"
  variables = {"params": {"w": jnp.ones(2)}}
  ask = lambda: study(tmp_path).test(net, variables, kind="net", kept=kept)
  first, whole = ask(), kept.read_bytes()
  for i in range(0, len(whole), 7):
    data = bytearray(whole)
    data[i] ^= 4
    kept.write_bytes(data)
    np.testing.assert_array_equal(ask(), first, err_msg=f"byte {i}")


def test_devices_that_are_not_there_are_refused():
  assert len(use_devices(0)) == 8 and len(use_devices(3)) == 3
  with pytest.raises(ValueError, match="devices is 9; it should be at most 8"):
    use_devices(9)
