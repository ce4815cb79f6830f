"""Crops of any size, on the device and on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import data
from kd_jax.data import crops, order, views
from tests.data.test_views import KEY, make_images, make_keys

SIDES = [(20, 30), (24, 16), (33, 33), (17, 40), (16, 16), (50, 21)]


def make_source(n=6, channels=3):
  """Smooth pictures of many sizes, one colour ramp and a little noise."""
  rng = np.random.default_rng(3)
  images = []
  for i in range(n):
    height, width = SIDES[i % len(SIDES)]
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([4 * y, 5 * x, 3 * (x + y)][:channels], -1)
    noise = rng.integers(0, 40, (height, width, channels))
    images.append(np.minimum(ramp + noise, 255).astype(np.uint8))
  ids = np.arange(n, dtype=np.int32)

  def fetch(chosen):
    return [images[i] for i in chosen], (chosen % 3).astype(np.int64)

  shape = (None, None, channels)
  return data.Source("many", "train", ("a", "b", "c"), shape, ids, fetch)


def bilinear(image, top, left, height, width, size):
  """Resizes a rectangle with real corners, pixel by pixel, in float64."""
  result = np.zeros((size, size))
  for i in range(size):
    for j in range(size):
      y = top + (i + 0.5) * height / size - 0.5
      x = left + (j + 0.5) * width / size - 0.5
      weight_y = np.maximum(0, 1 - abs(np.arange(image.shape[0]) - y))
      weight_x = np.maximum(0, 1 - abs(np.arange(image.shape[1]) - x))
      weights = np.outer(weight_y, weight_x)  # less than 1 beyond the border
      result[i, j] = (weights * image).sum() / weights.sum()
  return result


def test_resized_crop_is_a_bilinear_rectangle():
  """The corners are found from two ramps, the pixels then from noise."""
  height, width, batch = 20, 30, 200
  y, x = np.mgrid[:height, :width].astype(np.float32)
  noise = np.random.default_rng(0).normal(size=(height, width))
  image = np.stack([y, x, noise], -1).astype(np.float32)
  images = jnp.broadcast_to(image, (batch, *image.shape))
  out = np.asarray(
    crops.random_resized_crop(
      make_keys(batch), images, 8, area=(0.2, 0.9), aspect=(0.5, 2.0)
    ),
    np.float64,
  )
  # Inside, a ramp stays a ramp; its step is the rectangle's size over 8.
  step_y, step_x = (
    out[:, 4, 4, 0] - out[:, 3, 4, 0],
    (out[:, 4, 4, 1] - out[:, 4, 3, 1]),
  )
  h, w = 8 * step_y, 8 * step_x
  top = out[:, 4, 4, 0] + 0.5 - 4.5 * step_y
  left = out[:, 4, 4, 1] + 0.5 - 4.5 * step_x
  share, ratio = h * w / (height * width), w / h
  assert np.all((share > 0.2 - 1e-4) & (share < 0.9 + 1e-4))
  assert np.all((ratio > 0.5 - 1e-3) & (ratio < 2 + 1e-3))
  slack = 1e-3
  assert np.all((top > -slack) & (top + h < height + slack))
  assert np.all((left > -slack) & (left + w < width + slack))
  # Not always the middle, nor always one size.
  for number in (share, ratio, top, left):
    assert number.std() > 0.05 * number.mean()
  for i in range(3):
    expected = bilinear(image[..., 2], top[i], left[i], h[i], w[i], 8)
    np.testing.assert_allclose(out[i, ..., 2], expected, atol=1e-3)


def test_resized_crop_that_never_fits_is_the_whole_image():
  images = jnp.asarray(make_images(3, 8, 8), jnp.float32)
  out = crops.random_resized_crop(
    make_keys(3), images, 8, area=(1.0, 1.0), aspect=(3.0, 4.0)
  )
  np.testing.assert_allclose(out, images, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_cut_on_the_host_is_the_crop_on_the_device(channels):
  images = make_images(8, 40, 28, channels)
  on_device = jax.jit(
    lambda keys, images: crops.random_resized_crop(
      keys, images, (12, 10), area=(0.1, 1.0), antialias=True
    )
  )(make_keys(8), images.astype(np.float32))
  boxes = np.asarray(crops.rectangles(make_keys(8), 40, 28, area=(0.1, 1.0)))
  on_host = [
    crops.cut(image, box, (12, 10))
    for image, box in zip(images, boxes, strict=True)
  ]
  assert on_host[0].dtype == np.uint8
  # Whole levels, and 8 bits in Pillow's weights.
  np.testing.assert_allclose(np.stack(on_host), on_device, atol=1.6)
  assert np.ptp(boxes, axis=0).min() > 3


def test_the_central_crop_takes_the_middle():
  y, x = np.mgrid[:40, :80]
  image = np.stack([2 * y, 2 * x, 0 * x], -1).astype(np.uint8)
  out = crops.central(image, 20, 16).astype(float)
  assert out.shape == (16, 16, 3)
  # Half the size, so a pixel is the mean of two by two; 2 are cut off above,
  # and the middle 16 of 40 are columns 12 to 27.
  want_y = 2 * (2 * np.arange(2, 18) + 0.5)
  want_x = 2 * (2 * np.arange(12, 28) + 0.5)
  np.testing.assert_allclose(out[:, 8, 0], want_y, atol=1.5)
  np.testing.assert_allclose(out[8, :, 1], want_x, atol=1.5)
  whole = make_images(1, 9, 9, 3)[0]
  np.testing.assert_array_equal(crops.central(whole, 9, 9), whole)
  with pytest.raises(ValueError, match="size is 17; it should be above 0 and"):
    crops.central(image, 16, 17)


def test_a_whole_source_is_cropped_for_evaluation(monkeypatch):
  source = make_source()
  arrays = crops.central_arrays(source, 16, 12)
  for position in range(len(source)):
    expected = crops.central(source[position]["image"], 16, 12)
    np.testing.assert_array_equal(arrays["image"][position], expected)
  assert arrays["label"].tolist() == [0, 1, 2, 0, 1, 2]
  assert arrays["id"].tolist() == list(range(6))


def test_random_crops_take_the_rectangles_of_the_keys():
  source = make_source()
  other = jax.random.key(99)
  read = crops.random_crops(source, [KEY, other], 8, area=(0.2, 0.9))
  batch = read(np.array([4, 1, 3]), 5)
  assert batch["id"].tolist() == [4, 1, 3]
  for name, key in (("image", KEY), ("other_image", other)):
    keys = views.keys(key, jnp.array([4, 1, 3]), 5)
    for row, position in enumerate((4, 1, 3)):
      image = source[position]["image"]
      box = crops.rectangles(
        keys[row : row + 1], *image.shape[:2], area=(0.2, 0.9)
      )[0]
      np.testing.assert_array_equal(batch[name][row], crops.cut(image, box, 8))
  assert np.any(batch["image"] != batch["other_image"])
  assert np.any(batch["image"] != read(np.array([4, 1, 3]), 6)["image"])
  with pytest.raises(ValueError, match="keys has 0 keys"):
    crops.random_crops(source, [], 8)


def test_batches_of_crops_are_a_function_of_the_step():
  source = make_source(12)
  read = crops.random_crops(source, [KEY], 8)
  batches = crops.crop_batches(read, seed=3, batch_size=5, n=12)
  ahead = data.ahead(batches, num_threads=2)
  for step in (0, 1, 2, 7, 8, 3):  # with jumps, as a run that is taken up
    batch, again = batches(step), ahead(step)
    assert batch["epoch"].tolist() == [step // 2] * 5
    np.testing.assert_array_equal(batch["id"], order.batch_ids(3, step, 5, 12))
    for name, value in batch.items():
      np.testing.assert_array_equal(again[name], value)
  with pytest.raises(ValueError, match="batch_size is 13"):
    crops.crop_batches(read, seed=3, batch_size=13, n=12)


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (
      lambda keys, images: crops.random_resized_crop(keys, images, 4),
      TypeError,
      "is uint8",
    ),
    (
      lambda keys, images: crops.random_resized_crop(
        keys, views.to_float(images), 0
      ),
      ValueError,
      "size is",
    ),
    (
      lambda keys, images: crops.random_resized_crop(
        keys, views.to_float(images), 4, area=(0.5, 1.5)
      ),
      ValueError,
      "area is",
    ),
    (
      lambda keys, images: crops.random_resized_crop(
        keys, views.to_float(images), 4, aspect=(2.0, 1.0)
      ),
      ValueError,
      "aspect is",
    ),
  ],
)
def test_wrong_arguments(call, error, message):
  with pytest.raises(error, match=message):
    call(make_keys(4), make_images(4))
