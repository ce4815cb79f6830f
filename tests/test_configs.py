"""Every config, two steps of everything: `get_config("smoke")`."""

import importlib
import pathlib

import numpy as np
import pytest

from kd_jax.data import prepare
from kd_jax.train.workdir import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*/*.py"))


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


def load(path, arg):
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  return importlib.import_module(name).get_config(arg)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: "/".join(p.parts[-2:]))
def test_smoke(path, data_dir, tmp_path):
  config = load(path, "smoke")
  if config.dataset != "mnist5k":
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
