"""The command of every experiment: wrong input is one line and exit code 2."""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from experiments import hinton
from kd_jax import cli

CONFIG = "configs/hinton/mnist5k.py"
SMOKE = f"--config={CONFIG}:demo+smoke"


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
  ],
)
def test_wrong_input(capsys, monkeypatch, tmp_path, args, message):
  workdir = tmp_path / "run"
  code, err = call(capsys, monkeypatch, *args, f"--workdir={workdir}")
  assert code == 2
  assert message in err
  assert err.startswith("error: ") and err.count("\n") == 1
  assert "Traceback" not in err
  assert not workdir.exists()


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


def test_a_failed_run_is_exit_code_1(capsys, monkeypatch, tmp_path):
  def run(config, workdir):
    raise FloatingPointError("step 3 is not finite: hard = nan")

  code, err = call(capsys, monkeypatch, SMOKE, f"--workdir={tmp_path}", run=run)
  assert code == 1 and err == "error: step 3 is not finite: hard = nan\n"


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
