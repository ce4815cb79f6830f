"""Crops of any size: on the device, and on the host where sizes vary.

Images of one size live on the device and are cropped there. Those that come in
many sizes (photographs) are decoded and cropped on the host; the rectangle is
drawn from the same key, so it is the same rectangle.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kd_jax.data import order, views
from kd_jax.data.source import Arrays, Source

_KIND = 4  # folded into the keys, see `views`


def random_resized_crop(
  keys: jax.Array,
  images: jax.Array,
  size: int | tuple[int, int],
  *,
  area: tuple[float, float] = (0.08, 1.0),
  aspect: tuple[float, float] = (3 / 4, 4 / 3),
  antialias: bool = False,
) -> jax.Array:
  """Cuts a random rectangle out of each image and resizes it ("Inception").

  The rectangle's share of the image is uniform in `area`, its width over
  height log-uniform in `aspect`, its place uniform; Szegedy et al. 2014,
  arXiv:1409.4842, Sec. 6. Rectangles that do not fit are drawn again, ten
  times at most; then the whole image is taken. Its corners are not rounded to
  pixels.

  Args:
    keys: keys[batch], from `views.keys`.
    images: float[batch, height, width, channels].
    size: (height, width) of the result, or one number for both.
    area: least and greatest share of the image's area, within (0, 1].
    aspect: least and greatest width over height, positive.
    antialias: smooth before taking fewer pixels than there were.

  Returns:
    float[batch, size, size, channels], bilinear between pixels.

  Raises:
    TypeError: if the images are not floating point.
    ValueError: if the shapes do not fit, or a range is not one.
  """
  views._check(keys, images)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise TypeError(f"images is {images.dtype}; call views.to_float first")
  window = (size, size) if isinstance(size, int) else tuple(size)
  if not min(window) > 0:
    raise ValueError(f"size is {window}; it must be positive")
  boxes = rectangles(keys, *images.shape[1:3], area=area, aspect=aspect)

  def cut(box: jax.Array, image: jax.Array) -> jax.Array:
    scale = jnp.array(window) / box[2:]
    return jax.image.scale_and_translate(
      image,
      (*window, image.shape[-1]),
      (0, 1),
      scale,
      -box[:2] * scale,
      "bilinear",
      antialias=antialias,
    )

  return jax.vmap(cut)(boxes, images)


def rectangles(
  keys: jax.Array,
  height: ArrayLike,
  width: ArrayLike,
  *,
  area: tuple[float, float] = (0.08, 1.0),
  aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
  """Which part `random_resized_crop` takes of each image.

  Args:
    keys: keys[batch], from `views.keys`.
    height: of the images in pixels: one number, or [batch].
    width: likewise.
    area: see `random_resized_crop`.
    aspect: see `random_resized_crop`.

  Returns:
    float32[batch, 4]: top, left, height, width, in pixels.

  Raises:
    ValueError: if a range is not one.
  """
  if not 0 < area[0] <= area[1] <= 1:
    raise ValueError(f"area is {area}; it must be a range within (0, 1]")
  if not 0 < aspect[0] <= aspect[1]:
    raise ValueError(f"aspect is {aspect}; it must be a positive range")

  def draw(key: jax.Array, height: jax.Array, width: jax.Array) -> jax.Array:
    shares, ratios, place = jax.random.uniform(
      jax.random.fold_in(key, _KIND), (3, 10), jnp.float32
    )
    shares = area[0] + (area[1] - area[0]) * shares
    ratios = jnp.exp(
      jnp.log(aspect[0]) + jnp.log(aspect[1] / aspect[0]) * ratios
    )
    heights = jnp.sqrt(shares * height * width / ratios)
    widths = heights * ratios
    fits = (heights <= height) & (widths <= width)
    first = jnp.argmax(fits)
    whole = ~fits[first]
    h = jnp.where(whole, height, heights[first])
    w = jnp.where(whole, width, widths[first])
    return jnp.stack([(height - h) * place[0], (width - w) * place[1], h, w])

  sides = [
    jnp.broadcast_to(jnp.asarray(side, jnp.float32), keys.shape)
    for side in (height, width)
  ]
  return jax.vmap(draw)(keys, *sides)


def cut(
  image: np.ndarray, box: Sequence[float], size: int | tuple[int, int]
) -> np.ndarray:
  """Takes a rectangle of an image and resizes it, on the host.

  Bilinear, smoothed where pixels get fewer: `random_resized_crop` with
  `antialias=True`, rounded to whole levels.

  Args:
    image: uint8[height, width, 1 or 3].
    box: top, left, height, width, in pixels; need not be whole.
    size: (height, width) of the result, or one number for both.

  Returns:
    uint8[size, size, channels].
  """
  from PIL import Image

  height, width = (size, size) if isinstance(size, int) else size
  top, left, h, w = map(float, box)
  limits = image.shape[1], image.shape[0]
  corner = min(left + w, limits[0]), min(top + h, limits[1])  # rounding
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  picture = picture.resize(
    (width, height),
    Image.Resampling.BILINEAR,
    box=(max(left, 0.0), max(top, 0.0), *corner),
  )
  return np.asarray(picture).reshape(height, width, image.shape[-1])


def central(image: np.ndarray, resize: int, size: int) -> np.ndarray:
  """The usual crop for evaluation: shorter side to `resize`, then the middle.

  Args:
    image: uint8[height, width, 1 or 3].
    resize: the shorter side after resizing, in pixels.
    size: of the square that is cut out of the middle.

  Returns:
    uint8[size, size, channels].

  Raises:
    ValueError: unless 0 < size <= resize.
  """
  if not 0 < size <= resize:
    raise ValueError(
      f"size is {size}; it should be above 0 and at most resize, {resize}"
    )
  height, width = image.shape[:2]
  side = size * min(height, width) / resize
  box = (height - side) / 2, (width - side) / 2, side, side
  return cut(image, box, size)


def central_arrays(source: Source, resize: int, size: int) -> Arrays:
  """A whole source for evaluation, `central` crops, in memory.

  Args:
    source: images of any sizes.
    resize: see `central`.
    size: see `central`.

  Returns:
    {"id": int32[n], "image": uint8[n, size, size, C], "label": int32[n]}.

  Raises:
    ValueError: if the source is empty, or as `central`.
  """
  if not len(source):
    raise ValueError(
      f"data set {source.name!r} split {source.split!r} is empty"
    )
  parts = []
  for start in range(0, len(source), 256):
    ids, images, labels = source.read(
      np.arange(start, min(start + 256, len(source)))
    )
    stacked = np.stack([central(image, resize, size) for image in images])
    parts.append({"id": ids, "image": stacked, "label": labels})
  return {
    key: np.concatenate([part[key] for part in parts]) for key in parts[0]
  }


def random_crops(
  source: Source,
  keys: Sequence[jax.Array],
  size: int | tuple[int, int],
  **ranges: tuple[float, float],
) -> Callable[[np.ndarray, int], Arrays]:
  """Makes the function that decodes images and takes their random rectangles.

  Args:
    source: images of any sizes.
    keys: of the run. The first gives "image"; a second one gives another view
      of the same images, "other_image".
    size: see `cut`.
    **ranges: `area` and `aspect` of `rectangles`.

  Returns:
    `crops(positions, epoch)` -> {"id", "image": uint8[k, size, size, C],
    "label"} and perhaps "other_image". For an epoch (or number of a view) the
    rectangles are those that `random_resized_crop` takes with
    `views.keys(key, ids, epoch)`.

  Raises:
    ValueError: if there is no key, or more than two.
  """
  if not 1 <= len(keys) <= 2:
    raise ValueError(f"keys has {len(keys)} keys; it should have 1 or 2")
  cpu = jax.devices("cpu")[0]
  host_keys = [np.asarray(jax.random.key_data(key)) for key in keys]
  kinds = [jax.random.key_impl(key) for key in keys]

  @jax.jit
  def boxes(
    data: Any, ids: jax.Array, epoch: jax.Array, sides: jax.Array
  ) -> list[jax.Array]:
    found = []
    for one, kind in zip(data, kinds, strict=True):
      key = jax.random.wrap_key_data(one, impl=kind)
      own = views.keys(key, ids, epoch)
      found.append(rectangles(own, sides[:, 0], sides[:, 1], **ranges))
    return found

  def crops(positions: np.ndarray, epoch: int) -> Arrays:
    ids, images, labels = source.read(positions)
    sides = np.array([image.shape[:2] for image in images], np.float32)
    with jax.default_device(cpu):
      drawn = jax.device_get(boxes(host_keys, ids, np.int32(epoch), sides))
    batch = {"id": ids, "label": labels}
    for name, found in zip(("image", "other_image"), drawn, strict=False):
      batch[name] = np.stack(
        [
          cut(image, box, size)
          for image, box in zip(images, found, strict=True)
        ]
      )
    return batch

  return crops


def crop_batches(
  crops: Callable[[np.ndarray, int], Arrays],
  seed: int,
  batch_size: int,
  n: int,
  columns: Mapping[str, np.ndarray] | None = None,
) -> Callable[[int], Arrays]:
  """Whole batches of `random_crops`, a pure function of the step.

  Args:
    crops: from `random_crops`.
    seed: of the order.
    batch_size: examples in a batch.
    n: examples in the source.
    columns: [n, ...] what else belongs to each example, by name.

  Returns:
    `batches(step)`: what `crops` gives, "epoch", int32[batch], and the columns'
    rows. Give it to `ahead`, to read before the batch is needed.

  Raises:
    ValueError: if the batch is larger than the source.
  """
  order.epoch_of(0, batch_size, n)

  def batches(step: int) -> Arrays:
    epoch = order.epoch_of(step, batch_size, n)
    positions = order.batch_ids(seed, step, batch_size, n)
    rows = {name: value[positions] for name, value in (columns or {}).items()}
    epochs = np.full(batch_size, epoch, np.int32)
    return {**crops(positions, epoch), **rows, "epoch": epochs}

  return batches
