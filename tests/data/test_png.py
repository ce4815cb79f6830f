import io
import struct
import zlib

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
from PIL import Image
import pytest

from kd_jax.data import png


def by_pillow(data):
  with Image.open(io.BytesIO(data)) as image:
    pixels = np.asarray(image)
  return pixels.reshape(*pixels.shape[:2], -1)


def write_with_pillow(image, **options):
  file = io.BytesIO()
  Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
    file, **options
  )
  return file.getvalue()


@hypothesis.given(
  hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])),
  )
)
def test_round_trip(image):
  data = png.encode(image)
  assert np.array_equal(png.decode(data, image.shape[2]), image)
  assert np.array_equal(by_pillow(data), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_other_programs(channels):
  ramp = np.arange(32, dtype=np.uint8)
  image = (ramp[:, None, None] * 3 + ramp[:, None]).astype(np.uint8)
  image = np.repeat(image, channels, 2)
  data = write_with_pillow(image, format="PNG")
  assert png._decode_plain(data) is None  # Pillow filters the rows.
  assert np.array_equal(png.decode(data, channels), image)


def test_jpeg_and_other_channels():
  image = np.full((8, 8, 1), 90, np.uint8)
  data = write_with_pillow(image, format="JPEG")
  assert png.decode(data, 1).shape == (8, 8, 1)
  color = png.decode(data, 3)
  assert color.shape == (8, 8, 3)
  assert np.abs(color.astype(int) - 90).max() <= 2
  assert np.array_equal(
    png.decode(png.encode(image), 3), np.repeat(image, 3, 2)
  )


def test_damage_is_never_silent():
  image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
  data = png.encode(image)
  for position in range(len(data)):
    for flip in (1, 128):
      bad = bytearray(data)
      bad[position] ^= flip
      try:
        pixels = png.decode(bytes(bad), 3)
      except ValueError:
        continue
      assert np.array_equal(pixels, image)  # A checksum that is not needed.


@pytest.mark.parametrize("keep", [0, 7, 20, 40, 60, 300])
def test_cut_off_files(keep):
  image = np.random.default_rng(0).integers(0, 256, (20, 20, 1), dtype=np.uint8)
  with pytest.raises(ValueError, match="not a readable PNG or JPEG"):
    png.decode(png.encode(image)[:keep], 1)


def test_a_stream_without_its_checksum_is_not_trusted():
  image = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
  rows = np.pad(image[..., 0], ((0, 0), (1, 0))).tobytes()
  header = png._chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 8, 0, 0, 0, 0))
  end = png._chunk(b"IEND", b"")
  for cut, trusted in ((0, True), (4, False), (1, False)):
    stream = zlib.compress(rows)
    body = png._chunk(b"IDAT", stream[: len(stream) - cut])
    pixels = png._decode_plain(png.encode(image)[:8] + header + body + end)
    assert (pixels is not None) == trusted


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((2, 2), np.uint8),
    np.zeros((2, 2, 2), np.uint8),
    np.zeros((2, 2, 1), np.float32),
  ],
)
def test_what_cannot_be_encoded(image):
  with pytest.raises(ValueError, match=r"it must be uint8\[height"):
    png.encode(image)
