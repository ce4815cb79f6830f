"""The command of every experiment: wrong input is one line and exit code 2."""

import errno
import fcntl
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.hinton import mnist5k
from experiments import (
  born_again,
  born_again_lm,
  hinton,
  mutual_learning,
  patient_consistent,
  shared_trunk,
)
from kd_jax import cli, models, result_file, train
from kd_jax.data import raw, writer

CONFIG = "configs/hinton/mnist5k.py"
SMOKE = f"--config={CONFIG}:demo+smoke"
MOST = 2**32 - 1


def call(capsys, monkeypatch, *args, run=hinton.run):
  """Exit code and standard error of the command, in this process."""
  argv = ["experiments/hinton.py", *map(str, args)]
  monkeypatch.setattr(sys, "argv", argv)
  code = 0
  try:
    cli.main(run)
  except SystemExit as stop:
    code = stop.code
  return code, capsys.readouterr().err


@pytest.mark.parametrize(
  "args,message",
  [
    ([SMOKE + ",teacher.stepz=3"], "no field 'stepz'; did you mean 'steps'?"),
    ([SMOKE, "--config.zzz=3"], "no field 'zzz'"),
    ([SMOKE, "--config.teacher.zzz=3"], "no field 'teacher.zzz'"),
    (
      [SMOKE, "--config.seeds=(1,)", "--config.seeds=(2,)"],
      "--config.seeds is given twice",
    ),
    ([SMOKE + ",devices=1", "--config.devices=1"], "config.devices is given"),
    ([SMOKE, "--config.teacher.steps=abc"], "config.teacher.steps=abc"),
    ([SMOKE, "--config.teacher.steps=4.5"], "config.teacher.steps=4.5"),
    ([SMOKE + ",nonsense"], "should be key=value"),
    ([f"--config={CONFIG}:nope"], "unknown argument 'nope'; it should be one"),
    (["--config=configs/hinton/mnist6k.py"], f"did you mean {CONFIG}?"),
    (["--config"], "write --config=VALUE"),
    ([], "--config is missing"),
    ([SMOKE, "extra"], "unexpected argument 'extra'"),
    ([SMOKE, "--confg=3"], "confg"),
    ([SMOKE + ",dataset=mnits"], "data set 'mnits' is not in"),
    ([SMOKE + ",train_split=tran"], "tran"),
    ([SMOKE + ",students.soft_t4.temperature=0"], "temperature is 0.0"),
    ([SMOKE + ",students.soft_t4.temperature=nan"], "temperature is nan"),
    ([SMOKE + ",students.hard.hard_weight=-1"], "hard_weight is -1.0"),
    ([SMOKE, "--config.students.hard.classes=(3,10)"], "classes is 10"),
    ([SMOKE + ",students.hard.fraction=0.001"], "only 3 examples"),
    ([SMOKE + ",students.hard.learn_bias=true"], "needs holdout above 0"),
    ([SMOKE + ",holdout=3000"], "holdout is 3000"),
    ([SMOKE, "--config.seeds=(1,1)"], "distinct seeds"),
    (
      [SMOKE, "--config.claims=(('a','hard','soft_t4','side'),)"],
      "claims holds",
    ),
    (
      [SMOKE, "--config.claims=('x',)"],
      "claims holds 'x'; it should be (claim",
    ),
    ([SMOKE + ",teacher.paper=nan"], "teacher.paper is nan"),
    (
      [SMOKE + ",teacher.max_shift=-1"],
      "max_shift is -1; it should be at least",
    ),
    ([SMOKE, "--config.students.soft_t4.hidden=(0,)"], "hidden is (0,)"),
    ([SMOKE, "--config.students.soft_t4.hidden=('a',)"], "hidden is ('a',)"),
    (
      [SMOKE + ",students.hard.hard_weight=0,students.hard.soft_weight=0"],
      "students.hard.hard_weight is 0.0",
    ),
    ([SMOKE + ",parallel=tpu"], "parallel is 'tpu'; it should be one of"),
    (
      [SMOKE, "--config.rows=('hart',)", "--config.claims=()"],
      "rows is 'hart'; it should be one of",
    ),
    (
      [SMOKE, "--config.save_every=5 fortnights"],
      "save_every is '5 fortnights'",
    ),
    ([SMOKE, "--allow=teacher.steps"], "--allow is for a run that has begun"),
    (
      ["--config=configs/born_again/cifar10.py:generations+smoke"],
      "the config has no field 'holdout': is it of this experiment?",
    ),
    ([SMOKE, "--allow", "seeds"], "write --allow=VALUE"),
    (["--config=README.md"], "--config is README.md; it should be a file in"),
    ([SMOKE + ",test_split=train"], "test_split is 'train'; it should be"),
    ([SMOKE + ",teacher.max_shift=28"], "teacher.max_shift is 28"),
    ([SMOKE + ",teacher.steps=0"], "teacher.steps is 0"),
    ([SMOKE + ",teacher.batch_size=4000"], "batch_size is 4000"),
    ([SMOKE + ",student.batch_size=12"], "the nearest are 8 and 16"),
    ([SMOKE + ",parallel=threads"], "parallel is 'threads'"),
    ([SMOKE + ",log_every=0"], "log_every is '0'"),
    ([SMOKE + ",teacher.dropout=1.5"], "teacher.dropout is 1.5"),
    ([SMOKE, "--config.teacher.seeds=('x',)"], "teacher.seeds is ('x',)"),
    ([SMOKE, "--config.teacher.seeds=(-1,)"], "teacher.seeds is (-1,)"),
    (
      [SMOKE, f"--config.seeds=(0,{2**32})"],
      f"distinct seeds from 0 to {MOST}",
    ),
    ([SMOKE, "--config.students.hard.classes=(1.5,2)"], "classes is (1.5, 2);"),
    ([SMOKE, "--config.students.hard.classes=('3',)"], "classes is ('3',); it"),
    ([SMOKE + ",devices=9"], "devices is 9; it should be at most 8"),
  ],
)
def test_wrong_input(capsys, monkeypatch, tmp_path, args, message):
  refused(capsys, monkeypatch, tmp_path / "run", args, message)


@pytest.mark.parametrize(
  "lines,message",
  [
    ("return {", "'{' was never closed (broken.py, line 2)"),
    ("return 1 / 0", "the config file failed: ZeroDivisionError: division by"),
    ("import nowhere", "the config file failed: ModuleNotFoundError: No mod"),
    ("return steps", "the config file failed: NameError: name 'steps' is not"),
    ("return [1]", "returned a list; it should return a ConfigDict"),
    ("raise ValueError('no such size')", "no such size"),
  ],
)
def test_a_config_file_that_fails(
  capsys, monkeypatch, tmp_path, lines, message
):
  path = tmp_path / "broken.py"
  path.write_text(f"def get_config(arg=''):\n  {lines}\n")
  args = [f"--config={path}"]
  refused(capsys, monkeypatch, tmp_path / "run", args, message)


def refused(capsys, monkeypatch, workdir, args, message, run=hinton.run):
  """One line, exit code 2, and nothing is written."""
  args = [*args, f"--workdir={workdir}"]
  code, err = call(capsys, monkeypatch, *args, run=run)
  assert code == 2, err
  assert message in err
  assert err.startswith("error: ") and err.count("\n") == 1
  assert "Traceback" not in err
  assert not workdir.exists()


# Experiment, the argument of its config, what every one of them refuses.
OTHERS = {
  patient_consistent: "patient_consistent/cifar10.py:modes+smoke",
  born_again: "born_again/cifar10.py:generations+smoke",
  mutual_learning: "mutual_learning/cifar10.py:peers+smoke",
  shared_trunk: "shared_trunk/cifar10.py:smoke",
  born_again_lm: "born_again_lm/text.py:smoke",
}
GPT = "born_again_lm/text.py:gpt+smoke"
PATIENT, BORN, MUTUAL, TRUNK, LM = OTHERS.values()


@pytest.mark.parametrize("experiment", OTHERS)
@pytest.mark.parametrize(
  "change,message",
  [
    ("steps_per_call=0", "steps_per_call is 0; it should be at least 1"),
    ("seeds=(4294967296,)", "seeds is (4294967296,); it should hold distinct"),
    ("parallel=tpu", "parallel is 'tpu'; it should be one of"),
    ("devices=9", "devices is 9; it should be at most 8"),
    ("rows=('a',)", "'a'"),
    ("claims=('a',)", "claims holds 'a'"),
    ("save_every=soon", "save_every is 'soon'"),
    ("nothing=1", "no field 'nothing'"),
  ],
)
def test_every_experiment_refuses(
  capsys, monkeypatch, tmp_path, experiment, change, message
):
  args = [f"--config=configs/{OTHERS[experiment]}", f"--config.{change}"]
  workdir = tmp_path / "run"
  refused(capsys, monkeypatch, workdir, args, message, experiment.run)


@pytest.mark.parametrize(
  "config,change,message",
  [
    (PATIENT, "networks.student.batch_size=12", "the nearest are 8 and 16"),
    (PATIENT, "students.labels_30.temperature=0", "temperature is 0.0; it"),
    (PATIENT, "students.labels_30.hard_weight=-1", "hard_weight is -1.0; it"),
    (PATIENT, "students.labels_30.mixup=nan", "mixup is nan; it should be"),
    (PATIENT, "dataset=none", "data set 'none' is not in"),
    (PATIENT, "evaluation=('a','b')", "evaluation is ('a', 'b'); it should"),
    (PATIENT, f"teachers.teacher.seed={2**64}", "teachers.teacher.seed is 1"),
    (BORN, "students.dkpp.temperature=-1", "students.dkpp.temperature is -1.0"),
    (BORN, "students.generation_0.offset=-5", "generation_0.offset is -5; it"),
    (
      BORN,
      "sharpness.probes=1",
      "sharpness.probes is 1; it should be at least",
    ),
    (BORN, "sharpness.radius=inf", "sharpness.radius is inf; it should be"),
    (BORN, "networks.student.batch_size=9", "the nearest are 8 and 16"),
    (MUTUAL, "cohorts.mutual_2.temperature=0", "temperature is 0.0; it should"),
    (MUTUAL, "cohorts.mutual_2.teach=((1,2),)", "mutual_2.teach is ((1, 2),)"),
    (TRUNK, "students.one.soft_weight=nan", "students.one.soft_weight is nan"),
    (
      TRUNK,
      "students.own_teacher.soft_weight=1.5",
      "soft_weight is 1.5; it sh",
    ),
    (LM, "students.generation_1_labels.temperature=0", "temperature is 0.0"),
    (LM, "network.batch_size=12", "network: batch_size is 12; it should be"),
    (LM, "text=none.txt", "text none.txt does not exist"),
    (LM, "tokens=-1", "tokens is -1; it should be at least 0"),
    (
      LM,
      "network.fields.depth=0",
      "network: depth is 0; it should be at least",
    ),
    (LM, "network.fields.init_scale=nan", "network: init_scale is nan; it"),
    (GPT, "network.fields.heads=3", "network: width is 8; it should be a mul"),
    (GPT, "network.fields.max_length=4", "network: inputs have 16 tokens; the"),
  ],
)
def test_one_experiment_refuses(
  capsys, monkeypatch, tmp_path, config, change, message
):
  name = config.partition("/")[0]
  (experiment,) = [e for e in OTHERS if e.__name__.endswith(f".{name}")]
  args = [f"--config=configs/{config}", f"--config.{change}"]
  workdir = tmp_path / "run"
  refused(capsys, monkeypatch, workdir, args, message, experiment.run)


def damage_record(folder):
  (file,) = folder.glob("tiny-train.array_record*")
  data = bytearray(file.read_bytes())
  middle = len(data) // 2
  data[middle : middle + 40] = bytes(40)
  file.write_bytes(data)


def leave_out_a_class(folder):
  names = folder / "label.labels.txt"
  names.write_text("\n".join(names.read_text().split()[:-1]) + "\n")


def damage_metadata(folder):
  (folder / "dataset_info.json").write_text("{")


@pytest.mark.parametrize(
  "damage,message",
  [
    (damage_record, "of data set 'tiny' in "),
    (leave_out_a_class, "is outside its 2 classes [0, 1]"),
    (damage_metadata, "cannot be opened as array_record"),
  ],
)
def test_damaged_data_are_refused(
  capsys, monkeypatch, tmp_path, damage, message
):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
  splits = {name: (image, np.arange(64) % 3) for name in ("train", "test")}
  made = raw.from_arrays(splits, ["cat", "dog", "emu"])
  damage(writer.write("tiny", made, tmp_path)[0])
  args = [SMOKE, "--config.dataset=tiny", f"--config.data_dir={tmp_path}"]
  refused(capsys, monkeypatch, tmp_path / "run", args, message)


def teacher_files(folder, name):
  """What the smoke test's teacher could be, and is not."""
  net = models.create("mlp", 7 if name == "classes" else 10, hidden=(8,))
  start = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  start = jax.tree.map(np.array, start)
  if name == "nan":
    start["params"]["Dense_0"]["bias"][3] = np.nan
  if name == "large":  # finite, but its logits are not
    start = jax.tree.map(lambda x: 1e30 * x, start)
  path = folder / "x.safetensors"
  models.save(path, start)
  content = path.read_bytes()
  if name == "cut":
    path.write_bytes(content[:-9])
  if name == "flip":
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
  if name in ("pickle", "torch"):
    path = folder / ("x.pt" if name == "torch" else "x.safetensors")
    path.write_bytes(pickle.dumps([0]))
  if name == "object":
    path = folder / "x.npz"
    np.savez(path, a=np.array([{}], object))
  if name in ("above", "link"):
    other = "../x.safetensors" if name == "above" else "y.safetensors"
    (folder / "y.safetensors").symlink_to(path)
    path = folder / "x.safetensors.index.json"
    places = {"params/Dense_0/bias": other}
    path.write_text(json.dumps({"weight_map": places}))
  if name == "order":  # of the classes, in a run that has trained it
    path = folder / "seed0" / "teacher"
    classes = ", ".join(["1", "0", *"23456789"])
    (folder / "inputs.json").write_text(json.dumps({"classes": classes}))
  return path if name != "folder" else folder


@pytest.mark.parametrize(
  "name,message",
  [
    ("nan", "x.safetensors is not finite: params/Dense_0/bias holds NaN"),
    ("large", "x.safetensors is not finite: its logits hold"),
    ("classes", "Dense_1/bias has shape (7,); it should be (10,)"),
    ("order", "has learned other classes: 1, 0, 2, 3, 4, 5, 6, 7, 8, 9; it"),
    ("cut", "x.safetensors cannot be read"),
    ("flip", "x.safetensors is damaged: its SHA-256 is not the one"),
    ("pickle", "is or may hold a pickle, which could run any program"),
    ("torch", "convert it where it was made, for example by safetensors."),
    ("object", "files in .npz can be read for bit_resnet only"),
    ("above", "should be the plain name of a .safetensors file in the same"),
    ("link", "should be the plain name of a .safetensors file in the same"),
    ("folder", "holds no checkpoints; it should be the directory of"),
  ],
)
def test_a_teacher_that_is_refused(
  capsys, monkeypatch, tmp_path, name, message
):
  path = teacher_files(tmp_path, name)
  field = "--config.teachers.teacher.checkpoint"
  args = [f"--config=configs/{PATIENT}", f"{field}={path}"]
  workdir, run = tmp_path / "run", patient_consistent.run
  refused(capsys, monkeypatch, workdir, args, message, run)


def test_no_workdir(capsys, monkeypatch):
  code, err = call(capsys, monkeypatch, SMOKE)
  assert code == 2 and "--workdir is missing" in err


def test_a_workdir_of_another_config(capsys, monkeypatch, tmp_path):
  workdir = f"--workdir={tmp_path / 'run'}"
  assert call(capsys, monkeypatch, SMOKE, workdir)[0] == 0
  files = sorted((tmp_path / "run").rglob("*"))
  before = {f: f.read_bytes() for f in files if f.is_file()}
  code, err = call(
    capsys, monkeypatch, SMOKE + ",teacher.learning_rate=0.1", workdir
  )
  assert code == 2
  assert "teacher.learning_rate 0.001 -> 0.1" in err
  assert {f: f.read_bytes() for f in files if f.is_file()} == before
  assert sorted((tmp_path / "run").rglob("*")) == files
  allow = "--allow=teacher.learning_rate"
  code, err = call(
    capsys, monkeypatch, SMOKE + ",teacher.learning_rate=0.1", workdir, allow
  )
  assert code == 2 and "is finished, so --allow comes too late" in err
  assert {f: f.read_bytes() for f in files if f.is_file()} == before
  (tmp_path / "run" / "result.json").unlink()
  code, err = call(
    capsys, monkeypatch, SMOKE + ",teacher.learning_rate=0.1", workdir, allow
  )
  assert code == 0
  assert (tmp_path / "run" / "changes.json").exists()


def test_overrides_reach_the_run_in_every_form(capsys, monkeypatch, tmp_path):
  seen = []
  run = lambda config, workdir: seen.append((config, workdir)) or {}
  code, _ = call(
    capsys,
    monkeypatch,
    "--config.student.steps=7",
    f"--config={CONFIG},teacher.steps=9,seeds=(4,)",
    "--workdir",
    tmp_path,
    run=run,
  )
  ((config, workdir),) = seen
  assert code == 0 and workdir == str(tmp_path)
  assert config.student.steps == 7 and config.teacher.steps == 9
  assert config.seeds == (4,)


def not_finite():
  raise FloatingPointError("step 3 is not finite: hard = nan")


def diverged():
  result_file.plain({"rows": [float("inf")]})


def too_large():
  return jax.numpy.ones(2**45).sum().item()


@pytest.mark.parametrize(
  "fail,line",
  [
    (not_finite, "step 3 is not finite: hard = nan"),
    (diverged, "result.rows[0] is inf; it should be a finite number"),
    (too_large, "RESOURCE_EXHAUSTED: "),
  ],
)
def test_a_failed_run_is_exit_code_1(capsys, monkeypatch, tmp_path, fail, line):
  run = lambda config, workdir: fail()
  code, err = call(capsys, monkeypatch, SMOKE, f"--workdir={tmp_path}", run=run)
  assert code == 1 and err.startswith(f"error: {line}") and err.count("\n") == 1


def test_a_warning_is_one_line(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
  call(capsys, monkeypatch, SMOKE, f"--workdir={tmp_path}", run=lambda *_: None)
  shown = warnings.formatwarning("skipped", UserWarning, "loop.py", 1, "line")
  assert shown == "warning: skipped\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """What the command leaves behind."""
  path = tmp_path_factory.mktemp("cli") / "run"
  hinton.run(mnist5k.get_config("demo+smoke"), path)
  return path


@pytest.fixture
def copy(finished, tmp_path):
  """A run that lacks no more than its result."""
  path = shutil.copytree(finished, tmp_path / "run")
  (path / "result.json").unlink()
  return path


def state(path):
  return {
    p: (p.stat().st_mtime_ns, p.read_bytes())
    for p in path.rglob("*")
    if p.is_file() and p.name != ".lock"
  }


def rows(path):
  return json.loads((path / "result.json").read_text())["rows"]


def test_a_finished_run_is_exit_code_0(capsys, monkeypatch, finished):
  before = state(finished)
  assert call(capsys, monkeypatch, SMOKE, f"--workdir={finished}") == (0, "")
  assert state(finished) == before


def test_the_second_of_two_leaves(capsys, monkeypatch, copy):
  before = state(copy)
  with open(copy / ".lock", "a+") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    code, err = call(capsys, monkeypatch, SMOKE, f"--workdir={copy}")
  assert code == 2 and err.startswith(f"error: workdir {copy} is in use by pro")
  assert err.count("\n") == 1 and state(copy) == before


def test_a_newer_checkpoint_that_is_damaged(
  capsys, monkeypatch, copy, finished
):
  (copy / "seed0/hard/checkpoints/9").mkdir()
  with pytest.warns(UserWarning, match="checkpoint 9 cannot be trusted .*; mo"):
    code, _ = call(capsys, monkeypatch, SMOKE, f"--workdir={copy}")
  assert code == 0 and rows(copy) == rows(finished)


def test_no_good_checkpoint_is_exit_code_1(capsys, monkeypatch, copy):
  for file in (copy / "seed0/hard/checkpoints").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:5])
  before = state(copy / "seed0")
  code, err = call(capsys, monkeypatch, SMOKE, f"--workdir={copy}")
  assert code == 1 and err.count("\n") == 1
  wanted = f"error: no checkpoint in {copy}/seed0/hard/checkpoints can be trust"
  assert err.startswith(wanted)
  assert state(copy / "seed0") == before


@pytest.mark.parametrize(
  "name", ["config.json", "inputs.json", "seconds.json", "changes.json"]
)
def test_a_file_of_the_run_that_is_cut(capsys, monkeypatch, copy, name):
  for text in ("{", "7"):
    (copy / name).write_text(text)
    code, err = call(capsys, monkeypatch, SMOKE, f"--workdir={copy}")
    assert code == 2 and f"{copy / name} is damaged" in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_what_is_not_finite_is_exit_code_1(capsys, monkeypatch, tmp_path):
  args = [SMOKE + ",teacher.learning_rate=1e38", f"--workdir={tmp_path}"]
  code, err = call(capsys, monkeypatch, *args)
  last = err.splitlines()[-1]
  assert code == 1 and "Traceback" not in err
  assert last.startswith("error: step 1 is not finite: ")
  assert "; examples " in last and last.endswith("state of step 1 is saved")


def test_sigterm_is_exit_code_143(capsys, monkeypatch, tmp_path, finished):
  """And the same command goes on."""

  def twice(*args, **kwargs):
    batches = train.index_batches(*args, **kwargs)

    def terminated(step):
      for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
      return batches(step)

    return terminated

  args = [SMOKE, f"--workdir={tmp_path}"]
  with monkeypatch.context() as patch:
    patch.setattr("kd_jax.train.classifier.index_batches", twice)
    code, err = call(capsys, monkeypatch, *args)
  assert code == 143
  assert re.search(r"stopped by SIGTERM, saved step \d\n$", err)
  assert call(capsys, monkeypatch, *args)[0] == 0
  assert rows(tmp_path) == rows(finished)


def test_a_full_disk_ends_the_run_and_loses_nothing(
  capsys, monkeypatch, tmp_path
):
  """The teacher is trained; its student cannot be saved; then there is room."""
  args = [SMOKE, f"--workdir={tmp_path / 'run'}"]
  assert call(capsys, monkeypatch, *args)[0] == 0
  before = json.loads((tmp_path / "run" / "result.json").read_text())
  (tmp_path / "run" / "result.json").unlink()
  stages = tmp_path / "run" / "seed0"
  (student,) = [p for p in stages.iterdir() if p.name.startswith("hard")]
  shutil.rmtree(student)
  teacher = (stages / "teacher" / "checkpoints").rglob("*")
  kept = {path: path.read_bytes() for path in teacher if path.is_file()}

  # No file of this process can grow beyond some KiB.
  small = ("sh", "-c", 'ulimit -f 16; exec "$@"', "-")
  full = subprocess.run(
    [*small, sys.executable, "-m", "experiments.hinton", *args],
    env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert full.returncode == 1
  wanted = rf"error: cannot write to {student}/checkpoints: .*File too large\n"
  assert re.search(wanted, full.stderr), full.stderr
  assert "Traceback" not in full.stderr and "ERROR" not in full.stderr
  assert not (tmp_path / "run" / "result.json").exists()
  assert {path: path.read_bytes() for path in kept} == kept
  assert call(capsys, monkeypatch, *args)[0] == 0
  after = json.loads((tmp_path / "run" / "result.json").read_text())
  assert after["rows"] == before["rows"]


def test_no_room_for_other_files(capsys, monkeypatch, tmp_path):
  def run(config, workdir):
    raise OSError(errno.ENOSPC, "No space left on device", workdir)

  args = [SMOKE, f"--workdir={tmp_path / 'x'}"]
  code, err = call(capsys, monkeypatch, *args, run=run)
  assert code == 1
  wanted = f"No space left on device: '{tmp_path / 'x'}'"
  assert err.startswith("error: ") and wanted in err
  assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch, capsys, tmp_path):
  def run(config, workdir):
    raise KeyError("bug")

  with pytest.raises(KeyError, match="bug"):
    call(capsys, monkeypatch, SMOKE, f"--workdir={tmp_path}", run=run)


def test_the_command_itself(tmp_path):
  """As typed, in a process of its own: --help, then a wrong key."""
  root = pathlib.Path(__file__).parents[1]

  def run(*args):
    return subprocess.run(
      [sys.executable, "-m", "experiments.hinton", *args],
      cwd=root,
      env=os.environ,
      capture_output=True,
      text=True,
      check=False,
    )

  shown = run("--help")
  assert shown.returncode == 0 and "--workdir" in shown.stdout
  assert "Hinton, Vinyals & Dean 2015" in shown.stdout
  wrong = run(SMOKE + ",seedz=1", f"--workdir={tmp_path / 'x'}")
  assert wrong.returncode == 2
  assert wrong.stderr.endswith("did you mean 'seeds'?\n")


def test_a_reader_of_the_table_may_leave(tmp_path):
  """As in `... | head -1`: no traceback."""
  root = pathlib.Path(__file__).parents[1]
  program = (
    "from kd_jax import cli\n"
    "def run(config, workdir):\n"
    "  for _ in range(9999): print('a line of a table')\n"
    "cli.main(run)\n"
  )
  done = subprocess.run(
    f'{sys.executable} -c "{program}" {SMOKE} --workdir={tmp_path} | head -1',
    shell=True,
    cwd=root,
    env={**os.environ, "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "a line of a table\n"
  assert "BrokenPipe" not in done.stderr
