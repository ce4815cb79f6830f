"""What a network is shown: a random view of stored images, or the whole."""

import jax

from kd_jax.data import crops, views
from kd_jax.errors import check_choice

CROPS = ("none", "shift", "inception")


def view(
  key: jax.Array,
  ids: jax.Array,
  epoch: jax.Array | int,
  images: jax.Array,
  *,
  crop: str,
  size: int,
  padding: int = 4,
  least_area: float = 0.08,
  flip: bool = True,
) -> jax.Array:
  """A random view of each image, a function of the key, its id and the epoch.

  Args:
    key: of the run's views. Who is given the same key sees the same views.
    ids: int[batch], the stable ids of the examples.
    epoch: scalar or int[batch], the epoch or the number of the view.
    images: uint8[batch, height, width, channels].
    crop: "shift" is a window of the padded image, as for CIFAR (see
      `views.random_crop`); "inception" a random rectangle, resized (see
      `crops.random_resized_crop`); "none" leaves images whole, or as the host
      has cropped them.
    size: height and width of the view; not for "none".
    padding: of "shift", in pixels.
    least_area: of "inception", the least share of the image's area.
    flip: mirror half of them.

  Returns:
    float32[batch, size, size, channels] from -1 to 1.

  Raises:
    ValueError: if `crop` is none of the three, or a size does not fit.
    TypeError: if the images are not uint8.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    >>> ids = jnp.arange(2)
    >>> view(jax.random.key(0), ids, 0, images, crop="shift", size=32).shape
    (2, 32, 32, 3)
  """
  check_choice("crop", crop, CROPS)
  keys = views.keys(key, ids, epoch)
  if crop == "shift":
    images = views.random_crop(keys, images, size, padding)
  images = views.to_float(images)
  if crop == "inception":
    area = (least_area, 1.0)
    images = crops.random_resized_crop(keys, images, size, area=area)
  images = views.random_flip(keys, images) if flip else images
  return 2.0 * images - 1.0


def whole(images: jax.Array) -> jax.Array:
  """The images as they are evaluated: uint8 to float32 from -1 to 1."""
  return 2.0 * views.to_float(images) - 1.0
