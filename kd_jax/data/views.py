"""Random views of images on the device, one key for each example.

A view depends on the example's key alone, not on the batch that it is in, its
place there or the number of devices. Give teacher and student the same keys
(or the same view) and they see the same pixels; that is what "consistent"
teaching needs (Beyer et al. 2021, arXiv:2106.05237, Sec. 3.1).

Each function draws its own random numbers from a key, so the same keys can be
given to a crop and then a flip. The same function twice with the same keys
does the same twice.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# What each kind of view folds into the keys; a new kind takes a new number
# (`crops` has 4).
_SHIFT, _CROP, _FLIP, _MIXUP = range(4)


def keys(key: jax.Array, ids: jax.Array, epoch: jax.Array | int) -> jax.Array:
  """One key for each example: fold_in(fold_in(key, id), epoch).

  Args:
    key: a typed key (`jax.random.key`), the same for the whole run.
    ids: int[batch], the examples' ids.
    epoch: int[batch] or one int: the epoch, or any number of the view.

  Returns:
    keys[batch].

  Raises:
    TypeError: if the ids or the epoch are not integers.
    ValueError: if ids is not one-dimensional, or the epoch has another shape.
  """
  ids, epoch = jnp.asarray(ids), jnp.asarray(epoch)
  for name, value in (("ids", ids), ("epoch", epoch)):
    if not jnp.issubdtype(value.dtype, jnp.integer):
      raise TypeError(f"{name} is {value.dtype}; it must be integer")
  if ids.ndim != 1 or epoch.shape not in ((), ids.shape):
    raise ValueError(
      f"ids has shape {ids.shape} and epoch {epoch.shape}; they must be "
      "[batch] and [batch] or []"
    )

  def fold(number: jax.Array, turn: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, number), turn)

  return jax.vmap(fold, in_axes=(0, 0 if epoch.ndim else None))(ids, epoch)


def to_float(images: jax.Array) -> jax.Array:
  """Pixels in [0, 1]: the one place where uint8 becomes float.

  Args:
    images: uint8[...].

  Returns:
    float32[...], images / 255.

  Raises:
    TypeError: if the images are not uint8; converting twice is a mistake.
  """
  if images.dtype != jnp.uint8:
    raise TypeError(f"images is {images.dtype}; to_float takes uint8")
  return images.astype(jnp.float32) / 255.0


def normalize(
  images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """(images - mean) / std for each channel.

  Args:
    images: float[..., channels], from `to_float`.
    mean: one number for each channel, in units of the images.
    std: one positive number for each channel.

  Returns:
    float[..., channels] of the images' dtype.

  Raises:
    TypeError: if the images are not floating point.
    ValueError: if the channels differ in number or a std is not positive.
  """
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise TypeError(f"images is {images.dtype}; call to_float first")
  channels = images.shape[-1]
  if len(mean) != channels or len(std) != channels:
    raise ValueError(
      f"images has {channels} channels, mean {len(mean)} and std {len(std)}"
    )
  if not all(value > 0 for value in std):
    raise ValueError(f"std is {tuple(std)}; it must be positive")
  shift = jnp.asarray(mean, images.dtype)
  return (images - shift) / jnp.asarray(std, images.dtype)


def random_shift(
  keys: jax.Array, images: jax.Array, max_shift: int = 2, fill: float = 0
) -> jax.Array:
  """Moves each image by a whole number of pixels, up to `max_shift` each way.

  Both offsets are uniform over {-max_shift, ..., max_shift}; what comes in
  from outside is `fill`. With 2 it is the jitter of Hinton et al. 2015,
  arXiv:1503.02531, Sec. 3.

  Args:
    keys: keys[batch], from `keys`.
    images: [batch, height, width, channels] of any dtype.
    max_shift: pixels, 0 or more.
    fill: the value outside the image, a plain number.

  Returns:
    Images of the same shape and dtype.

  Raises:
    ValueError: if the shapes do not fit, max_shift is negative or the images'
      dtype cannot hold fill.
  """
  _check(keys, images)
  if max_shift < 0:
    raise ValueError(f"max_shift is {max_shift}; it must be 0 or more")
  return _random_window(
    keys, _SHIFT, images, images.shape[1:3], max_shift, fill
  )


def random_crop(
  keys: jax.Array,
  images: jax.Array,
  size: int | tuple[int, int],
  padding: int = 0,
  fill: float = 0,
) -> jax.Array:
  """Cuts a window out of each image, which is padded on all sides before.

  Every place where the window fits is equally likely. For CIFAR: size 32,
  padding 4.

  Args:
    keys: keys[batch], from `keys`.
    images: [batch, height, width, channels] of any dtype.
    size: (height, width) of the window, or one number for both.
    padding: pixels added on each side, 0 or more.
    fill: the value of the padding, a plain number.

  Returns:
    [batch, size, size, channels] of the images' dtype.

  Raises:
    ValueError: if the shapes do not fit, the window is larger than the padded
      image or the images' dtype cannot hold fill.
  """
  _check(keys, images)
  window = (size, size) if isinstance(size, int) else tuple(size)
  if padding < 0:
    raise ValueError(f"padding is {padding}; it must be 0 or more")
  padded = tuple(length + 2 * padding for length in images.shape[1:3])
  if not all(0 < w <= p for w, p in zip(window, padded, strict=True)):
    raise ValueError(
      f"size is {window}; it must be within the padded image, {padded}"
    )
  return _random_window(keys, _CROP, images, window, padding, fill)


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability 1/2.

  Args:
    keys: keys[batch], from `keys`.
    images: [batch, height, width, channels] of any dtype.

  Returns:
    Images of the same shape and dtype.

  Raises:
    ValueError: if the shapes do not fit.
  """
  _check(keys, images)
  flip = jax.vmap(lambda key: jax.random.bernoulli(_draw(key, _FLIP)))(keys)
  return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def mixup(
  keys: jax.Array,
  values: Any,
  *,
  alpha: float = 1.0,
  partner: jax.Array | None = None,
  same_ratio: bool = False,
) -> tuple[Any, jax.Array, jax.Array]:
  """Mixes each example with another one of the batch.

    mixed_i = r_i x_i + (1 - r_i) x_{partner_i},   r_i ~ Beta(alpha, alpha)

  Zhang et al. 2018, arXiv:1710.09412, Sec. 2. alpha = 1 draws r from U[0, 1]
  exactly, as function matching does (Beyer et al. 2021, arXiv:2106.05237).
  Each example has its own r, from its own key; the first paper's code, and the
  released code of the second, draw one for a whole batch: `same_ratio=True`
  (under `pmap`, for a device's part). Unlike a crop, a mixed image depends
  on what else is in the batch, which under `pmap` is the device's own. Mix
  once and give the result to teacher and student alike.

  Args:
    keys: keys[batch], from `keys`.
    values: a float array [batch, ...], or a tree of them, such as images and
      one-hot targets; all are mixed with the same r and the same partner.
    alpha: the concentration, a positive number.
    partner: int[batch], positions in the batch; by default the previous
      example, and the last one for the first: in a shuffled batch a random
      pairing.
    same_ratio: one r for the whole batch, that of the first example's key.

  Returns:
    (mixed values, r float32[batch], partner int[batch]).

  Raises:
    TypeError: if a value is not floating point.
    ValueError: if the shapes do not fit or alpha is not positive.
  """
  batch = keys.shape[0]
  for leaf in jax.tree.leaves(values):
    if leaf.shape[:1] != keys.shape:
      raise ValueError(
        f"keys has shape {keys.shape}, a value to mix {leaf.shape}; both "
        "must start with [batch]"
      )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(f"a value to mix is {leaf.dtype}; it must be floating")
  if partner is None:
    partner = jnp.roll(jnp.arange(batch), 1)
  elif partner.shape != keys.shape:
    raise ValueError(
      f"partner has shape {partner.shape}, keys {keys.shape}; they must match"
    )

  ratio = mix_ratios(keys, alpha=alpha, same_ratio=same_ratio)

  def mix(x: jax.Array) -> jax.Array:
    r = ratio.reshape(batch, *(1,) * (x.ndim - 1)).astype(x.dtype)
    return r * x + (1 - r) * x[partner]

  return jax.tree.map(mix, values), ratio, partner


def mix_ratios(
  keys: jax.Array, *, alpha: float = 1.0, same_ratio: bool = False
) -> jax.Array:
  """How much of each example `mixup` keeps, r ~ Beta(alpha, alpha).

  Args:
    keys: keys[batch], from `keys`.
    alpha: the concentration, a positive number; 1 is U[0, 1].
    same_ratio: one r for the whole batch, that of the first example's key.

  Returns:
    float32[batch].

  Raises:
    ValueError: if alpha is not positive.
  """
  if not alpha > 0:
    raise ValueError(f"alpha is {alpha}; it must be positive")

  def draw(key: jax.Array) -> jax.Array:
    if alpha == 1:
      return jax.random.uniform(_draw(key, _MIXUP))
    return jax.random.beta(_draw(key, _MIXUP), alpha, alpha)

  ratio = jax.vmap(draw)(keys)
  return jnp.broadcast_to(ratio[0], ratio.shape) if same_ratio else ratio


def _draw(key: jax.Array, kind: int) -> jax.Array:
  """Keeps the numbers of different kinds of views independent."""
  return jax.random.fold_in(key, kind)


def _check(keys: jax.Array, images: jax.Array) -> None:
  if images.ndim != 4 or keys.shape != images.shape[:1]:
    raise ValueError(
      f"keys has shape {keys.shape} and images {images.shape}; they must be "
      "[batch] and [batch, height, width, channels]"
    )


def _random_window(
  keys: jax.Array,
  kind: int,
  images: jax.Array,
  window: tuple[int, ...],
  padding: int,
  fill: float,
) -> jax.Array:
  if jnp.issubdtype(images.dtype, jnp.integer):
    low, high = jnp.iinfo(images.dtype).min, jnp.iinfo(images.dtype).max
    if not (float(fill).is_integer() and low <= fill <= high):
      raise ValueError(f"fill is {fill}, which {images.dtype} cannot hold")
  side = (padding, padding)
  padded = jnp.pad(images, ((0, 0), side, side, (0, 0)), constant_values=fill)
  # Offsets of the window, one more than what is left over.
  room = [p - w + 1 for p, w in zip(padded.shape[1:3], window, strict=True)]

  def cut(key: jax.Array, image: jax.Array) -> jax.Array:
    top, left = jax.random.randint(_draw(key, kind), (2,), 0, jnp.array(room))
    return jax.lax.dynamic_slice(
      image, (top, left, 0), (*window, image.shape[-1])
    )

  return jax.vmap(cut)(keys, padded)
