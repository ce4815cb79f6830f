"""Who owns a directory, and what is logged in it."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from kd_jax.errors import BadInput
from kd_jax.train import check_workdir, open_workdir
from kd_jax.train.workdir import (
  MetricWriter,
  hash_ids,
  read_changes,
  read_metrics,
)

CONFIG = {"seed": 1, "model": {"hidden": (8, 8)}, "log_every": 5}


def begin(path):
  """What a run leaves with its first checkpoint."""
  file = path / "seed0" / "teacher" / "checkpoints" / "4" / "state" / "x"
  file.parent.mkdir(parents=True)
  file.write_bytes(b"x")


def test_the_same_config_comes_back_and_log_intervals_may_change(tmp_path):
  with open_workdir(tmp_path / "run", CONFIG) as path:
    assert json.loads((path / "config.json").read_text())["seed"] == 1
  with open_workdir(tmp_path / "run", {**CONFIG, "log_every": 9}):
    pass


def test_another_config_is_refused_and_listed(tmp_path):
  with open_workdir(tmp_path, CONFIG):
    pass
  begin(tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  other = {**CONFIG, "seed": 2, "model": {"hidden": (8, 9)}, "new": True}
  with pytest.raises(BadInput) as error:
    with open_workdir(tmp_path, other):
      raise AssertionError("opened")
  text = str(error.value)
  assert "seed 1 -> 2" in text
  assert "model.hidden [8, 8] -> [8, 9]" in text
  assert "new (none) -> True" in text
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_change_that_is_allowed_is_made_and_noted(tmp_path):
  with open_workdir(tmp_path, CONFIG):
    pass
  begin(tmp_path)
  other = {**CONFIG, "seed": 2, "model": {"hidden": (8, 9)}}
  with pytest.raises(BadInput, match=r"^((?!model).)*seed 1 -> 2.*--allow"):
    check_workdir(tmp_path, other, allow=["model"])
  with open_workdir(tmp_path, other, allow=["seed", "model.hidden"]):
    pass
  wanted = ["model.hidden [8, 8] -> [8, 9]", "seed 1 -> 2"]
  assert read_changes(tmp_path) == wanted
  with open_workdir(tmp_path, {**other, "seed": 3}, allow=["seed"]):
    pass
  assert read_changes(tmp_path) == [*wanted, "seed 2 -> 3"]
  with pytest.raises(
    BadInput, match="--allow names 'seeds', which is no field or what"
  ):
    check_workdir(tmp_path, {**other, "seed": 4}, allow=["seed", "seeds"])
  with pytest.raises(
    BadInput, match="--allow names 'seed', which is no field or what"
  ):
    check_workdir(tmp_path, {**other, "seed": 3}, allow=["seed"])


def test_settings_may_be_corrected_before_anything_was_saved(tmp_path):
  with open_workdir(tmp_path, CONFIG, inputs={"images": "5"}):
    stage = tmp_path / "seed0" / "teacher"
    (stage / "tensorboard").mkdir(parents=True)
    for name in ("stage.json", "metrics.jsonl", "tensorboard/events.1"):
      (stage / name).write_text("")
    (stage / "checkpoints").mkdir()
  other = {**CONFIG, "seed": 2}
  with pytest.raises(BadInput, match="has saved nothing yet; leave it out"):
    check_workdir(tmp_path, other, allow=["seed"])
  with open_workdir(tmp_path, other, inputs={"images": "6"}):
    pass
  assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2
  assert read_changes(tmp_path) == []
  begin(tmp_path)
  with pytest.raises(BadInput, match="seed 2 -> 1"):
    check_workdir(tmp_path, CONFIG)


def test_no_directory_can_be_made(tmp_path, monkeypatch):
  def refuse(self, **how):
    raise PermissionError(13, "Permission denied", str(self))

  monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
  with pytest.raises(BadInput, match="run cannot be made: .*Permission denied"):
    with open_workdir(tmp_path / "run", CONFIG):
      raise AssertionError("opened")


def test_other_inputs_are_refused(tmp_path):
  before = {"images": "5 examples, 12ab", "teacher": "77"}
  with open_workdir(tmp_path, CONFIG, inputs=before):
    begin(tmp_path)
  with open_workdir(tmp_path, CONFIG, inputs=before):
    pass
  after = {**before, "images": "6 examples, 34cd"}
  with pytest.raises(
    BadInput, match="images 5 examples, 12ab -> 6 examples, 34cd"
  ):
    check_workdir(tmp_path, CONFIG, inputs=after)
  with open_workdir(tmp_path, CONFIG, inputs=after, allow=["images"]):
    pass
  (tmp_path / "inputs.json").unlink()
  with pytest.raises(BadInput, match="inputs.json is missing; restore it"):
    check_workdir(tmp_path, CONFIG, inputs=before)
  (tmp_path / "inputs.json").write_text("{")
  with pytest.raises(BadInput, match="inputs.json is damaged"):
    check_workdir(tmp_path, CONFIG, inputs=before)


def test_what_is_no_run_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(BadInput, match="no run of kd_jax"):
    check_workdir(tmp_path, CONFIG)
  with pytest.raises(BadInput, match="is a file"):
    check_workdir(tmp_path / "thesis.tex", CONFIG)
  with pytest.raises(BadInput, match=r"thesis\.tex is no directory"):
    check_workdir(tmp_path / "thesis.tex" / "run", CONFIG)
  with pytest.raises(BadInput, match="local path"):
    check_workdir("gs://bucket/run", CONFIG)
  check_workdir(tmp_path / "new", CONFIG)
  assert not (tmp_path / "new").exists()
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(BadInput, match="is damaged"):
    check_workdir(tmp_path, CONFIG)


def test_one_writer_at_a_time(tmp_path):
  code = textwrap.dedent(f"""
    from kd_jax.train import open_workdir
    with open_workdir({str(tmp_path)!r}, {CONFIG!r}):
      pass
  """)
  run = lambda: subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  with open_workdir(tmp_path, CONFIG):
    second = run()
    assert second.returncode != 0
    assert "is in use by process" in second.stderr
  assert run().returncode == 0  # the lock goes with its process


def test_metrics_are_unrounded_and_cut_at_the_resumed_step(tmp_path):
  value = np.float32(1) / np.float32(3)
  writer = MetricWriter(tmp_path, 0)
  for step in (1, 2, 3):
    writer.write(step, {"loss": value}, ids="ab")
  writer.close()
  path = tmp_path / "metrics.jsonl"
  with open(path, "a") as file:
    file.write('{"step": 4, "lo')  # killed while writing
  rows = read_metrics(path)
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert np.float32(rows[0]["loss"]) == value and rows[0]["ids"] == "ab"
  MetricWriter(tmp_path, 2).close()
  assert [row["step"] for row in read_metrics(path)] == [1, 2]
  path.write_text('nonsense\n{"step": 1}\n')
  with pytest.raises(ValueError, match="line 1 is damaged"):
    read_metrics(path)
  assert read_metrics(tmp_path / "missing") == []


def test_ids_hash_by_order_not_by_dtype():
  assert hash_ids(np.array([1, 2], np.int32)) == hash_ids(np.array([1, 2]))
  assert hash_ids(np.array([1, 2])) != hash_ids(np.array([2, 1]))
