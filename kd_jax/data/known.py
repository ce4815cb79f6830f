"""The image data sets that `prepare` knows: TFDS's names and the originals."""

from collections.abc import Mapping, Sequence
import dataclasses

from kd_jax.data.raw import RawData
from kd_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Known:
  """What a well-known data set must be.

  Attributes:
    version: TFDS's.
    image_shape: (height, width, channels).
    counts: examples of each split.
    class_names: in the order of the labels.
    files: SHA-256 of the unpacked original files, if they are known.
    text_id: whether TFDS stores a text id, as "train_00000".
  """

  version: str
  image_shape: tuple[int, int, int]
  counts: Mapping[str, int]
  class_names: tuple[str, ...]
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)
  text_id: bool = False


_MNIST_COUNTS = {"train": 60000, "test": 10000}
KNOWN = {
  "mnist": Known(
    version="3.0.1",
    image_shape=(28, 28, 1),
    counts=_MNIST_COUNTS,
    class_names=tuple("0123456789"),
    files={
      "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
      ),
      "train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
      ),
      "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
      ),
      "t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
      ),
    },
  ),
  "fashion_mnist": Known(
    version="3.0.1",
    image_shape=(28, 28, 1),
    counts=_MNIST_COUNTS,
    class_names=(
      "T-shirt/top",
      "Trouser",
      "Pullover",
      "Dress",
      "Coat",
      "Sandal",
      "Shirt",
      "Sneaker",
      "Bag",
      "Ankle boot",
    ),
    files={
      "train-images-idx3-ubyte": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
      ),
      "train-labels-idx1-ubyte": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
      ),
      "t10k-images-idx3-ubyte": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
      ),
      "t10k-labels-idx1-ubyte": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
      ),
    },
  ),
  "kmnist": Known(
    version="3.0.1",
    image_shape=(28, 28, 1),
    counts=_MNIST_COUNTS,
    class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
  ),
  "cifar10": Known(
    version="3.0.2",
    image_shape=(32, 32, 3),
    counts={"train": 50000, "test": 10000},
    class_names=(
      "airplane",
      "automobile",
      "bird",
      "cat",
      "deer",
      "dog",
      "frog",
      "horse",
      "ship",
      "truck",
    ),
    text_id=True,
  ),
}


def check(name: str, known: Known, data: RawData) -> None:
  """Checks data that claims to be a well-known data set.

  Args:
    name: its name.
    known: what it must be.
    data: what was read.

  Raises:
    BadInput: if a file is not the original, a shape or a count differs.
  """
  for file, digest in known.files.items():
    if data.files.get(file, digest) != digest:
      raise BadInput(
        f"{file} is not the original of {name}: its content has SHA-256 "
        f"{data.files[file]}, not {digest}; give changed data another NAME"
      )
  if data.image_shape != known.image_shape:
    raise BadInput(
      f"{name} must have images of {describe_shape(known.image_shape)}, not "
      f"{describe_shape(data.image_shape)}; give other data another NAME"
    )
  counts = {split: len(one.labels) for split, one in data.splits.items()}
  if counts != known.counts:
    raise BadInput(
      f"{name} must have {describe_counts(known.counts)} examples, not "
      f"{describe_counts(counts)}; give other data another NAME"
    )


def describe_counts(counts: Mapping[str, int]) -> str:
  """As "60,000 train + 10,000 test"."""
  return " + ".join(f"{count:,} {split}" for split, count in counts.items())


def describe_shape(shape: Sequence[int | None]) -> str:
  """As "28x28x1", with a question mark for what varies."""
  return "x".join("?" if size is None else str(size) for size in shape)
