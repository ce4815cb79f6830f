"""Training images on the device and on the host, and banks of their views."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import train
from kd_jax.data import crops, order
from kd_jax.errors import BadInput
from tests.data.test_crops import make_source
from tests.data.test_sources import make_source as same_size

KEY = jax.random.key(3)
CROP = {"size": 8, "area": (0.3, 1.0)}


def on_device(n=10):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (n, 6, 6, 1), dtype=np.uint8)
  return train.Images(same_size(images, np.arange(n) % 3))


def on_host(n=10):
  return train.Images(make_source(n), crop=CROP, evaluation=(12, 8), readers=0)


def test_feeds():
  images = on_device()
  said = np.arange(10.0)
  frozen, more = images.feed(
    0, 4, keys=[KEY], views=3, partners=True, columns={"said": said}
  )
  assert frozen["data"].keys() == {"id", "image", "label", "said"}
  assert more == {"views": 3, "partners": True}
  frozen, more = on_host().feed(0, 4, keys=[KEY], columns={"said": said})
  assert frozen == {} and more["steps_per_epoch"] == 2
  batch = more["batches"](3)
  np.testing.assert_array_equal(batch["said"], batch["id"])
  np.testing.assert_array_equal(batch["id"], order.batch_ids(0, 3, 4, 10))
  read = crops.random_crops(make_source(10), [KEY], **CROP)
  expected = read(order.batch_ids(0, 3, 4, 10), 1)["image"]
  np.testing.assert_array_equal(batch["image"], expected)


def test_a_part_keeps_the_ids():
  for images in (on_device(), on_host()):
    part = images.some(4)
    assert part.n == 4
    whole = images.evaluated()
    some = part.evaluated()
    rows = np.searchsorted(whole["id"], some["id"])
    assert np.all(np.diff(some["id"]) > 0)
    for name in ("image", "label"):
      np.testing.assert_array_equal(some[name], whole[name][rows])


def test_a_bank_holds_what_the_teacher_says_of_each_view(tmp_path):
  images, variables = on_device(), {"w": jnp.array([1.0, 2.0, -1.0])}

  def ask(variables, rows):
    mean = rows["image"].astype(jnp.float32).mean((1, 2, 3)) / 255
    return (mean + rows["epoch"])[:, None] * variables["w"]

  def bank(**changes):
    settings = {
      "views": 2,
      "batch_size": 4,
      "keys": [KEY],
      "manifest": {"view": "plain"},
      **changes,
    }
    return images.bank(tmp_path / "bank", ask, variables, **settings)

  found = bank()
  assert found.shape == (10, 2, 3)
  for view in range(2):
    rows = images.rows(np.arange(10), view, keys=[KEY])
    np.testing.assert_allclose(found[:, view], ask(variables, rows), rtol=1e-5)
  np.testing.assert_array_equal(bank(), found)
  variables = {"w": variables["w"].at[0].add(1e-6)}
  with pytest.raises(BadInput, match="made with other inputs: teacher is"):
    bank()
  with pytest.raises(BadInput, match="keys is"):
    bank(keys=[jax.random.key(4)])
  images = on_host()
  with pytest.raises(ValueError, match="read on the host have no bank"):
    bank()


def test_partners_are_those_of_the_order():
  images = on_device()
  rows = images.rows(np.array([7, 2]), 5, keys=[KEY], partners=1)
  other = order.partners(1, 5, np.array([7, 2]), 10)
  expected = images.arrays["image"][other]
  np.testing.assert_array_equal(rows["partner"]["image"], expected)
  assert rows["epoch"].tolist() == [5, 5]


def test_what_is_refused():
  with pytest.raises(ValueError, match="images differ in shape"):
    train.Images(make_source())
  with pytest.raises(ValueError, match=r"evaluation is \(\); images cropped"):
    train.Images(make_source(), crop=CROP)
  with pytest.raises(ValueError, match=r"evaluation is \(8,\)"):
    train.Images(make_source(), crop=CROP, evaluation=(8,))
  with pytest.raises(ValueError, match=r"evaluation is \('a', 'b'\)"):
    train.Images(make_source(), crop=CROP, evaluation=("a", "b"))
  with pytest.raises(ValueError, match="views is 3; images read on the host"):
    on_host().feed(0, 4, keys=[KEY], views=3)
