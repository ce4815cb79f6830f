"""Results are recorded once, without the paths of this machine."""

import importlib
import json
import os
import shlex
import subprocess
import sys
import time
import types
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from kd_jax import train
from kd_jax.errors import BadInput

module = importlib.import_module("kd_jax.train.record")


def small_result(**more):
  row = {"name": "control", "paper": None, "values": [3.0], "details": {}}
  return {
    "experiment": "none",
    "title": "A test",
    "source": "nowhere",
    "seeds": [0],
    "metric": {"name": "errors", "unit": "of 9", "better": "lower"},
    "data": {"name": "none"},
    "rows": [row],
    "comparisons": [],
    **more,
  }


def test_a_body_runs_once(tmp_path, capsys):
  calls = []

  def body(path):
    calls.append(path)
    return small_result(), {}

  paths = {"run": "~/old/run", "rows": ("a", "b"), "data_dir": ""}
  config = {"data_dir": "/home/me/data", "seed": 1, "branch": paths}
  first = train.record(body, config, tmp_path / "run")
  again = train.record(body, config, tmp_path / "run")
  assert len(calls) == 1
  assert json.dumps(first) == json.dumps(again)
  portable = {**paths, "run": ".../run"}
  assert first["config"] == {
    "data_dir": "DATA_DIR",
    "seed": 1,
    "branch": portable,
  }
  assert "/home/me" not in (tmp_path / "run" / "result.json").read_text()
  assert first["wall_seconds"] >= 0 and "jax" in first["environment"]
  assert capsys.readouterr().out.count("report.html") == 2


def test_a_damaged_result_is_no_traceback(tmp_path):
  body = lambda path: (small_result(), {})
  train.record(body, {}, tmp_path / "run")
  stored = tmp_path / "run" / "result.json"
  stored.write_text(stored.read_text()[:100])
  with pytest.raises(BadInput, match=r"result.json is damaged \(.*remove it"):
    train.record(body, {}, tmp_path / "run")
  stored.unlink()
  train.record(body, {}, tmp_path / "run")


def test_a_failed_body_leaves_no_result(tmp_path):
  def body(path):
    (path / "stage").mkdir()
    raise RuntimeError("stopped")

  with pytest.raises(RuntimeError, match="stopped"):
    train.record(body, {}, tmp_path / "run")
  assert not (tmp_path / "run" / "result.json").exists()
  before = json.loads((tmp_path / "run" / "seconds.json").read_text())
  found = train.record(lambda path: (small_result(), {}), {}, tmp_path / "run")
  assert found["wall_seconds"] > before > 0  # of both times together


def test_a_killed_session_counts_up_to_its_last_file(tmp_path):
  path = tmp_path / "run"
  (path / "seed0").mkdir(parents=True)
  (path / "seconds.json").write_text("100.0")
  (path / "session.json").write_text(json.dumps(time.time() - 50.0))
  (path / "config.json").write_text("{}")
  (path / "seed0" / "metrics.jsonl").write_text("")
  at = time.time() - 30.0
  os.utime(path / "seed0" / "metrics.jsonl", (at, at))
  found = train.record(lambda path: (small_result(), {}), {}, path)
  assert 119.0 < found["wall_seconds"] < 130.0
  assert not (path / "session.json").exists()


def test_compiled_programs_are_kept(tmp_path):
  """In a process that has compiled nothing, as a command is."""
  code = """
import sys
from ml_collections import ConfigDict
import jax, jax.numpy as jnp
from kd_jax import train
def body(config, path):
  jax.jit(lambda x: x * 3)(jnp.ones(3))
  raise KeyboardInterrupt
try:
  config = ConfigDict({"compilation_cache": sys.argv[1]})
  train.execute(lambda config: (), body, config, sys.argv[2])
except KeyboardInterrupt:
  print(jax.config.jax_compilation_cache_dir)
"""

  def run(folder, **more):
    env = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    args = [sys.executable, "-c", code, str(folder), str(tmp_path / "run")]
    return subprocess.run(
      args, capture_output=True, text=True, check=True, env={**env, **more}
    )

  assert run(tmp_path / "kept").stdout == f"{tmp_path / 'kept'}\n"
  assert list((tmp_path / "kept").glob("*-cache"))
  there = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs")}
  assert run(tmp_path / "kept", **there).stdout == f"{tmp_path / 'theirs'}\n"
  assert run("").stdout == "None\n"
  (tmp_path / "file").write_text("")
  told = run(tmp_path / "file" / "kept")
  assert told.stdout == "None\n"
  assert "compiled programs are not kept" in told.stderr


def test_a_run_goes_on_with_the_same_inputs_only(tmp_path):
  class Half(NamedTuple):
    pool: object
    model: object

  def load(config):
    if config.steps < 0:
      raise ValueError("steps is negative")
    rows = {"id": np.arange(config.images), "label": np.zeros(config.images)}
    return Half(rows, len), {"w": jnp.full(3, config.teacher)}, "a word"

  def body(config, images, teacher, word, path):
    (path / "saved").write_text("something")
    if config.steps < 3:
      raise KeyboardInterrupt  # pre-empted
    return small_result(), {}

  def run(allow=(), **more):
    fields = {"steps": 3, "images": 4, "teacher": 1.0, "parallel": "jit"}
    config = ConfigDict({**fields, "devices": 0, **more})
    return train.execute(load, body, config, tmp_path / "run", allow=allow)

  with pytest.raises(BadInput, match="steps is negative"):
    run(steps=-1)
  assert not (tmp_path / "run").exists()
  with pytest.raises(KeyboardInterrupt):
    run(steps=1)
  stored = json.loads((tmp_path / "run" / "inputs.json").read_text())
  assert sorted(stored) == ["images.pool", "teacher"]
  assert stored["images.pool"].startswith("4 examples, ")
  with pytest.raises(
    BadInput,
    match=r"images 4 -> 5; images.pool 4 examples, \w+ -> 5 examples",
  ):
    run(images=5, allow=["steps"])
  with pytest.raises(BadInput, match=r"teacher 1.0 -> 2.0; teacher \w+ -> \w+"):
    run(teacher=2.0, allow=["steps"])
  found = run(allow=["steps"])
  assert found["notes"] == ["Changed on the way: steps 1 -> 3"]
  assert run()["notes"] == found["notes"]


def test_data_are_not_read_for_a_directory_in_use(tmp_path):
  config = ConfigDict({"seed": 1})

  def load(config):
    raise AssertionError("read")

  body = lambda config, path: (small_result(), {})
  with train.open_workdir(tmp_path, {"seed": 1}):
    (tmp_path / "saved").write_text("something")
    with pytest.raises(BadInput, match="is in use by process"):
      train.execute(load, body, config, tmp_path)
  with pytest.raises(BadInput, match="seed 1 -> 2"):
    train.execute(load, body, ConfigDict({"seed": 2}), tmp_path)


def test_a_finished_run_is_left_as_it_is(tmp_path):
  load, body = lambda config: (), lambda config, path: (small_result(), {})
  look = lambda: {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
  train.execute(load, body, ConfigDict({"log_every": 1}), tmp_path)
  before = look()
  train.execute(load, body, ConfigDict({"log_every": 2}), tmp_path)
  assert look() == {**before, tmp_path / ".lock": look()[tmp_path / ".lock"]}


def test_random_numbers_of_pmap_belong_to_its_devices(tmp_path, monkeypatch):
  def run(parallel):
    config = ConfigDict({"devices": 0, "parallel": parallel})
    body = lambda config, path: (small_result(), {})
    train.execute(lambda config: (), body, config, tmp_path / parallel)

  run("pmap")
  run("jit")
  assert (tmp_path / "jit" / "inputs.json").read_text() == "{}\n"
  monkeypatch.setattr(module.jax, "device_count", lambda: 4)
  run("jit")
  with pytest.raises(BadInput, match="devices 8 -> 4"):
    run("pmap")


def test_the_command_is_portable(monkeypatch):
  main = types.SimpleNamespace(
    __spec__=types.SimpleNamespace(name="experiments.x")
  )
  monkeypatch.setitem(sys.modules, "__main__", main)
  config = "--config=c.py:all,data_dir=/home/me/d,steps=3"
  monkeypatch.setattr(sys, "argv", ["x", config, "--workdir=/tmp/run"])
  assert module.command() == (
    "python -m experiments.x --config=c.py:all,data_dir=DATA_DIR,steps=3 "
    "--workdir=WORKDIR"
  )
  args = ["--workdir", "/a b/run", "--config.rows=('a','b')"]
  monkeypatch.setattr(sys, "argv", ["x", *args])
  words = shlex.split(module.command())
  assert words[2:] == ["experiments.x", "--workdir", "WORKDIR", args[2]]
  monkeypatch.setattr(sys, "argv", ["x", "--config.branch.run=/home/me/old"])
  assert shlex.split(module.command())[3] == "--config.branch.run=.../old"
  monkeypatch.setattr(sys, "argv", ["x", "--config.branch.run=runs/old"])
  assert shlex.split(module.command())[3] == "--config.branch.run=runs/old"
  main.__spec__ = None
  assert module.command() == "(called from Python)"


def test_stages_are_counted_and_their_curves_found(tmp_path):
  stages = train.Stages(tmp_path, 3)
  path, title = stages.enter("seed0/teacher", "teacher")
  assert path == tmp_path / "seed0" / "teacher" and title == "[1/3] teacher"
  path.mkdir(parents=True)
  (path / "metrics.jsonl").write_text(
    '{"step": 1, "loss": 2.0}\n{"step": 2, "errors": 5.0}\n'
  )
  assert stages.enter("seed1/teacher", "another")[1] == "[2/3] another"
  want = {"errors": {"teacher": {"step": [2], "value": [5.0]}}}
  assert stages.curves("errors") == want
  assert stages.curves("errors", prefix="seed1/") == {}
