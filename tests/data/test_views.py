import functools

import jax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from kd_jax.data import crops, views

KEY = jax.random.key(11)


def make_images(batch, height=6, width=7, channels=1, dtype=np.uint8):
  rng = np.random.default_rng(5)
  shape = (batch, height, width, channels)
  return rng.integers(1, 256, shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def make_keys(batch, epoch=0):
  return views.keys(KEY, jnp.arange(batch), epoch)


def offsets_of(outputs, images, padding, fill=0):
  """Where each output was cut out of its padded image, by plain slices."""
  outputs, side = np.asarray(outputs), (padding, padding)
  padded = np.pad(images, ((0, 0), side, side, (0, 0)), constant_values=fill)
  height, width = outputs.shape[1:3]
  offsets = [
    (top, left)
    for top in range(padded.shape[1] - height + 1)
    for left in range(padded.shape[2] - width + 1)
  ]
  matches = np.stack(
    [
      (padded[:, top : top + height, left : left + width] == outputs).all(
        (1, 2, 3)
      )
      for top, left in offsets
    ]
  )
  assert (matches.sum(0) == 1).all(), "not one window of the padded image"
  return np.array(offsets)[matches.argmax(0)]


def assert_uniform(counts):
  counts = np.asarray(counts, float)
  expected = counts.sum() / counts.size
  chi2 = np.sum((counts - expected) ** 2 / expected)
  # Mean k - 1 and variance 2 (k - 1): six standard deviations.
  k = counts.size
  assert chi2 < k - 1 + 6 * np.sqrt(2 * (k - 1))
  assert counts.min() > 0


ALL_VIEWS = {
  "resized crop": lambda keys, x: crops.random_resized_crop(
    keys, jnp.asarray(x, jnp.float32), 5
  ),
  "shift": lambda keys, x: views.random_shift(keys, x, max_shift=2),
  "crop": lambda keys, x: views.random_crop(keys, x, size=4, padding=1),
  "flip": views.random_flip,
  "mixup": lambda keys, x: views.mixup(keys, x, partner=jnp.arange(len(x)))[1],
}


def test_keys_fold_id_and_epoch():
  ids, epochs = np.array([5, 0, 2**31 - 1]), np.array([1, 7, 0])
  many = views.keys(KEY, ids, epochs)
  for key, row, epoch in zip(many, ids, epochs, strict=True):
    expected = jax.random.fold_in(jax.random.fold_in(KEY, row), epoch)
    assert jnp.array_equal(
      jax.random.key_data(key), jax.random.key_data(expected)
    )
  one = views.keys(KEY, ids, 3)
  same = views.keys(KEY, ids, np.full(3, 3))
  assert jnp.array_equal(jax.random.key_data(one), jax.random.key_data(same))
  data = jax.random.key_data(
    views.keys(KEY, np.repeat(np.arange(20), 20), np.tile(np.arange(20), 20))
  )
  assert np.unique(data, axis=0).shape[0] == 400


@pytest.mark.parametrize(
  ("ids", "epoch", "error"),
  [
    (np.zeros(3, np.float32), 0, TypeError),
    (np.zeros(3, int), 0.5, TypeError),
    (np.zeros((3, 1), int), 0, ValueError),
    (np.zeros(3, int), np.zeros(2, int), ValueError),
    (np.zeros(3, int), np.zeros((3, 1), int), ValueError),
  ],
)
def test_wrong_ids(ids, epoch, error):
  with pytest.raises(error, match=r"ids|epoch"):
    views.keys(KEY, ids, epoch)


@pytest.mark.parametrize("name", ALL_VIEWS)
def test_a_view_depends_on_the_key_alone(name):
  view, images = ALL_VIEWS[name], make_images(16, dtype=np.float32)
  view = jax.jit(view)
  whole = np.asarray(view(make_keys(16), images))
  order = np.random.default_rng(0).permutation(16)
  moved = view(make_keys(16)[order], images[order])
  assert np.array_equal(moved, whole[order])
  part = view(make_keys(16)[3:8], images[3:8])
  assert np.array_equal(part, whole[3:8])
  again = view(make_keys(16), images)
  assert np.array_equal(again, whole)
  other = view(make_keys(16, epoch=1), images)
  assert not np.array_equal(other, whole)


@pytest.mark.parametrize("name", ALL_VIEWS)
def test_a_view_does_not_depend_on_the_devices(name):
  view, images = ALL_VIEWS[name], make_images(16, dtype=np.float32)
  mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("batch"))

  def run(ids, x):
    return view(views.keys(KEY, ids, 0), x)

  spread = jax.jit(run, in_shardings=split, out_shardings=split)(
    np.arange(16), images
  )
  assert len(spread.sharding.device_set) == 8
  alone = jax.jit(run)(np.arange(16), images)
  # Moving pixels is exact; sums of pixels may be rounded in another order.
  tolerance = 1e-5 if name == "resized crop" else 0
  np.testing.assert_allclose(spread, alone, rtol=tolerance)


def test_a_view_in_a_scan_has_the_same_bits():
  images = make_images(8)

  def body(carry, epoch):
    return carry, views.random_shift(make_keys(8, epoch), images)

  _, scanned = jax.lax.scan(body, 0, jnp.arange(3))
  for epoch in range(3):
    alone = views.random_shift(make_keys(8, epoch), images)
    assert np.array_equal(scanned[epoch], alone)


@pytest.mark.parametrize(
  ("dtype", "fill"),
  [(np.uint8, 0), (np.uint8, 255), (np.float32, -0.5), (jnp.bfloat16, 0)],
)
def test_shift_moves_whole_pixels(dtype, fill):
  images = make_images(40, dtype=dtype)
  moved = views.random_shift(make_keys(40), images, max_shift=1, fill=fill)
  assert moved.dtype == dtype
  assert moved.shape == images.shape
  offsets_of(moved, images, 1, fill)


def test_shift_is_uniform():
  images = np.tile(make_images(1, channels=3), (5000, 1, 1, 1))
  moved = views.random_shift(make_keys(5000), images, max_shift=2)
  offsets = offsets_of(moved, images, 2)
  assert_uniform(np.bincount(offsets @ [5, 1], minlength=25))


def test_no_shift_changes_nothing():
  images = make_images(4)
  moved = views.random_shift(make_keys(4), images, max_shift=0)
  assert np.array_equal(moved, images)


def test_crop_takes_every_window():
  images = np.tile(make_images(1, 5, 4), (3000, 1, 1, 1))
  cropped = views.random_crop(make_keys(3000), images, size=(3, 4), padding=1)
  assert cropped.shape == (3000, 3, 4, 1)
  offsets = offsets_of(cropped, images, 1)
  assert_uniform(np.bincount(offsets @ [3, 1], minlength=5 * 3))


def test_crop_of_the_whole_image():
  images = make_images(4, 5, 5)
  assert np.array_equal(views.random_crop(make_keys(4), images, 5), images)


def test_mixup_with_one_ratio_for_the_batch():
  images = jnp.asarray(make_images(5), jnp.float32)
  one, ratio, _ = views.mixup(make_keys(5), images, same_ratio=True)
  own = views.mixup(make_keys(5), images)[1]
  np.testing.assert_array_equal(ratio, np.full(5, own[0]))
  assert len(np.unique(own)) == 5
  r = np.float64(ratio[0])
  expected = r * images + (1 - r) * images[np.roll(np.arange(5), 1)]
  np.testing.assert_allclose(one, expected, rtol=1e-5)


def test_flip_mirrors_half_of_the_images():
  images = np.tile(make_images(1), (2000, 1, 1, 1))
  flipped = np.asarray(views.random_flip(make_keys(2000), images))
  mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
  kept = (flipped == images).all((1, 2, 3))
  assert np.array_equal(mirrored, ~kept)
  assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(2000)


def test_kinds_of_views_are_independent():
  # The same keys for a shift and a flip must not tie one to the other.
  batch = 4000
  keys = make_keys(batch)
  images = np.tile(make_images(1, 3, 4), (batch, 1, 1, 1))
  offsets = offsets_of(views.random_shift(keys, images, max_shift=1), images, 1)
  flipped = views.random_flip(keys, images)
  flips = (np.asarray(flipped) != images).any((1, 2, 3))
  ratio = np.asarray(views.mixup(keys, images.astype(np.float32))[1])
  margin = 5 / np.sqrt(batch)
  columns = np.stack([offsets[:, 0], offsets[:, 1], flips, ratio])
  off_diagonal = np.corrcoef(columns) - np.eye(4)
  assert np.abs(off_diagonal).max() < margin


def test_mixup_follows_the_equation():
  images, targets = make_images(6, dtype=np.float32), np.eye(6, dtype="f")
  partner = np.array([5, 0, 0, 3, 1, 2])
  mixed, ratio, returned = views.mixup(
    make_keys(6), {"image": images, "target": targets}, partner=partner
  )
  assert np.array_equal(returned, partner)
  r = np.asarray(ratio, np.float64)
  for name, value in (("image", images), ("target", targets)):
    value = value.astype(np.float64)
    shape = (6,) + (1,) * (value.ndim - 1)
    expected = r.reshape(shape) * value
    expected += (1 - r.reshape(shape)) * value[partner]
    np.testing.assert_allclose(mixed[name], expected, rtol=1e-6)
  np.testing.assert_allclose(np.sum(mixed["target"], -1), 1, rtol=1e-6)


def test_mixup_partner_by_default_is_the_previous_one():
  values = np.arange(4, dtype=np.float32)
  mixed, ratio, partner = views.mixup(make_keys(4), values)
  assert np.asarray(partner).tolist() == [3, 0, 1, 2]
  expected = ratio * values + (1 - ratio) * values[[3, 0, 1, 2]]
  np.testing.assert_allclose(mixed, expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 1, 3.0])
def test_mixup_ratios_have_their_distribution(alpha):
  n = 4000
  _, ratio, _ = views.mixup(make_keys(n), np.zeros(n, "f"), alpha=alpha)
  ratio = np.asarray(ratio, np.float64)
  assert ratio.min() >= 0 and ratio.max() <= 1
  variance = 1 / (4 * (2 * alpha + 1))  # Of Beta(alpha, alpha).
  assert abs(ratio.mean() - 0.5) < 5 * np.sqrt(variance / n)
  assert abs(ratio.var() / variance - 1) < 0.12
  if alpha == 1:  # Kolmogorov-Smirnov distance from U[0, 1].
    distance = np.abs(np.sort(ratio) - (np.arange(n) + 0.5) / n).max()
    assert distance < 2.2 / np.sqrt(n)


def test_to_float_and_normalize():
  pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  values = views.to_float(jnp.asarray(pixels))
  assert values.dtype == jnp.float32
  assert values.min() == 0 and values.max() == 1
  np.testing.assert_allclose(values, pixels / 255, rtol=2e-7)
  images = np.random.default_rng(0).random((2, 3, 3, 3), np.float32)
  mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 2.0)
  result = views.normalize(images, mean, std)
  np.testing.assert_allclose(
    result, (images.astype(np.float64) - mean) / std, rtol=2e-6, atol=2e-7
  )


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int8, bool])
def test_only_uint8_becomes_float(dtype):
  with pytest.raises(TypeError, match="to_float takes uint8"):
    views.to_float(np.zeros((1, 2, 2, 1), dtype))


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (
      lambda keys, images: views.random_shift(keys, images, -1),
      ValueError,
      "max_shift is",
    ),
    (
      lambda keys, images: views.random_shift(keys[:3], images),
      ValueError,
      r"\(3,\)",
    ),
    (
      lambda keys, images: views.random_shift(keys, images[0]),
      ValueError,
      "height",
    ),
    (
      lambda keys, images: views.random_shift(keys, images, 2, 300),
      ValueError,
      "fill is 3",
    ),
    (
      lambda keys, images: views.random_shift(keys, images, 2, 0.5),
      ValueError,
      "fill is 0",
    ),
    (
      lambda keys, images: views.random_shift(keys, images, 2, -1),
      ValueError,
      "fill is -1",
    ),
    (
      lambda keys, images: views.random_crop(keys, images, 7),
      ValueError,
      r"size is \(7, 7",
    ),
    (
      lambda keys, images: views.random_crop(keys, images, 0),
      ValueError,
      "size is",
    ),
    (
      lambda keys, images: views.random_crop(keys, images, 4, -1),
      ValueError,
      "padding is",
    ),
    (
      lambda keys, images: views.random_flip(keys[:1], images),
      ValueError,
      r"\(1,\)",
    ),
    (lambda keys, images: views.mixup(keys, images), TypeError, "is uint8"),
    (
      lambda keys, images: views.mixup(keys, np.zeros(3, "f")),
      ValueError,
      r"\(3,\)",
    ),
    (
      lambda keys, images: views.mixup(keys, np.zeros(4, "f"), alpha=0),
      ValueError,
      "alpha is 0",
    ),
    (
      lambda keys, images: views.mixup(
        keys, np.zeros(4, "f"), partner=jnp.arange(3)
      ),
      ValueError,
      "partner has shape",
    ),
    (
      lambda keys, images: views.normalize(images, (0,), (1,)),
      TypeError,
      "call to_float",
    ),
    (
      lambda keys, images: views.normalize(np.zeros((1, 3), "f"), (0,), (1,)),
      ValueError,
      "3 channels, mean 1 and std 1",
    ),
    (
      lambda keys, images: views.normalize(np.zeros((1, 1), "f"), (0,), (0,)),
      ValueError,
      r"std is \(0,\)",
    ),
  ],
)
def test_wrong_arguments(call, error, message):
  with pytest.raises(error, match=message):
    call(make_keys(4), make_images(4))
