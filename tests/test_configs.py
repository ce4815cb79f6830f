"""Every config, two steps of everything: `get_config("smoke")`."""

import importlib
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from kd_jax import models
from kd_jax.data import png, prepare, writer
from kd_jax.train.workdir import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*/[!_]*.py"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A TFDS data set of 28x28 noise in ten classes, called `digits`."""
  from tests.data.test_prepare import make_arrays, write_idx

  root = tmp_path_factory.mktemp("data")
  arrays = {}
  for part, n in (("train", 200), ("t10k", 40)):
    images, labels = make_arrays(n, (28, 28), 10)
    arrays[f"{part}-images-idx3"] = images
    arrays[f"{part}-labels-idx1"] = labels
  write_idx(root / "raw", **arrays)
  prepare.prepare("digits", root / "raw", root / "tfds")
  return str(root / "tfds")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
  """TFDS data sets of JPEGs of many sizes, with the features of the real ones.

  The real ones are named here as their classes and splits are.
  """
  import tensorflow_datasets as tfds

  root = tmp_path_factory.mktemp("photographs")
  label, image = tfds.features.ClassLabel, tfds.features.Image
  text = tfds.features.Text
  kinds = {
    "oxford_flowers102": (102, ("train", "test"), {"file_name": text()}),
    "oxford_iiit_pet": (
      37,
      ("train", "test"),
      {
        "file_name": text(),
        "species": label(names=["Cat", "Dog"]),
        "head_bbox": tfds.features.BBoxFeature(),
        "segmentation_mask": image(shape=(None, None, 1)),
      },
    ),
    "food101": (101, ("train", "validation"), {}),
    "sun397": (397, ("train", "test"), {"file_name": text()}),
    "imagenet2012": (1000, ("train", "validation"), {"file_name": text()}),
  }
  for name, (classes, splits, more) in kinds.items():
    write_photographs(tfds, root, name, classes, splits, more)
  return str(root)


def write_photographs(tfds, root, name, classes, splits, more):
  rng = np.random.default_rng(classes)

  def photograph():
    height, width = rng.integers(30, 60, 2)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([3 * y, 3 * x, y + x], -1) % 256
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
    file.seek(0)
    return file

  def example(i):
    row = {"image": photograph(), "label": int(rng.integers(classes))}
    box = tfds.features.BBox(0.1, 0.1, 0.9, 0.9)
    mask = np.ones((8, 8, 1), np.uint8)
    values = {
      "file_name": f"{i}.jpg",
      "species": i % 2,
      "head_bbox": box,
      "segmentation_mask": io.BytesIO(png.encode(mask)),
    }
    return row | {key: values[key] for key in more}

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
      [tfds.core.BuilderConfig(name="tfds")] if name == "sun397" else []
    )
    code_path = None

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=classes),
        **more,
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, manager):
      return {split: self._generate_examples() for split in splits}

    def _generate_examples(self):
      for i in range(40):
        yield i, example(i)

  Builder.name = name
  with writer._quiet(tfds):
    Builder(
      data_dir=str(root), file_format="array_record"
    ).download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def load(path, arg):
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  return importlib.import_module(name).get_config(arg)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: "/".join(p.parts[-2:]))
def test_smoke(path, data_dir, photographs, tmp_path):
  config = load(path, "smoke")
  if "view" in config and config.view.on_host:
    config.data_dir = photographs
  elif config.get("dataset", "mnist5k") != "mnist5k":
    config.dataset, config.data_dir = "digits", data_dir
  experiment = importlib.import_module(f"experiments.{path.parent.name}")
  result = experiment.run(config, tmp_path / "run")
  assert result["experiment"] == path.parent.name
  values = [v for row in result["rows"] for v in row["values"]]
  assert values and np.isfinite(values).all()
  assert (tmp_path / "run" / "report.html").stat().st_size > 5000
  stages = list((tmp_path / "run").rglob("metrics.jsonl"))
  assert stages
  assert all(read_metrics(stage)[-1]["step"] == 2 for stage in stages)


def test_there_are_configs():
  assert len(CONFIGS) >= 2


PAPER = [
  path
  for path in CONFIGS
  if hasattr(load(path, "smoke"), "view") and load(path, "smoke").view.on_host
]


def test_the_settings_of_the_paper():
  assert len(PAPER) == 5
  for path in PAPER:
    config = load(path, "")
    assert config.view.on_host and config.evaluation[1] == config.view.size
    assert config.networks.student.model == "bit_resnet"
    assert config.networks.student.clip_norm == 1.0
    assert config.rows == ("function_matching",)
    assert config.students.function_matching.hard_weight == 0
    with pytest.raises(ValueError, match="unknown argument 'slow'"):
      load(path, "slow")
  flowers = load(ROOT / "configs/patient_consistent/flowers102.py", "long")
  row, optimizer = (
    flowers.students.function_matching,
    (flowers.networks.student.optimizer),
  )
  assert (row.epochs, row.temperature) == (1_000_000, 1.0)
  assert (optimizer.learning_rate, optimizer.weight_decay) == (3e-4, 1e-5)
  both = load(ROOT / "configs/patient_consistent/imagenet2012.py", "ensemble")
  sides = {name: teacher.size for name, teacher in both.teachers.items()}
  assert sides == {"t224": 224, "t384": 384}
  assert both.networks.student.batch_size == 4096


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_every_setting_of_a_sweep_is_a_field(path):
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  module = importlib.import_module(name)
  seen = set()
  for settings in module.sweep():
    config = module.get_config()
    config.update_from_flattened_dict(settings)  # raises if there is none
    seen.add(json.dumps(settings, sort_keys=True))
  assert len(seen) == len(list(module.sweep())) > 10


def test_a_sweep_prints_flags():
  path = "configs.patient_consistent.imagenet2012"
  done = subprocess.run(
    [sys.executable, "-m", path], cwd=ROOT, capture_output=True, text=True
  )
  lines = done.stdout.splitlines()
  assert len(lines) == 16 and not done.stderr
  assert lines[0].startswith("--config.students.function_matching.epochs=300")


def test_two_teachers_of_two_resolutions(photographs, tmp_path):
  path = ROOT / "configs/patient_consistent/imagenet2012.py"
  config = load(path, "ensemble+modes+smoke")
  config.data_dir = photographs
  config.rows = ("function_matching", "independent", "fixed")
  config.teachers.t384.size = 12
  experiment = importlib.import_module("experiments.patient_consistent")
  result = experiment.run(config, tmp_path / "run")
  names = [row["name"] for row in result["rows"]]
  assert names[:3] == ["t224", "t384", "all teachers"]
  sizes = {name: cost["parameters"] for name, cost in result["models"].items()}
  assert sizes["t384"] - sizes["t224"] == (12**2 - 8**2) * 3 * 8


@pytest.mark.parametrize("words", ["", "gpt", "smoke", "gpt+smoke"])
def test_language_models_fit_their_windows(words):
  config = load(ROOT / "configs/born_again_lm/text.py", words)
  c = config.network
  models.template(c.model, 30, (config.window,), **c.fields.to_dict())
