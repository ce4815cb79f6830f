"""Hinton et al., Sec. 3, on 5,000 real digits: small runs, wide margins."""

import json

import jax
import numpy as np
import pytest

from configs.hinton import mnist5k
from experiments import hinton

STUDIES = "temperature+missing3+only78+few_labels"


def tiny(arg="demo+smoke"):
  config = mnist5k.get_config(arg)
  config.eval_every = "1 steps"
  return config


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  """One teacher and seven students, small and soon done."""
  config = mnist5k.get_config(STUDIES)
  config.seeds = (0,)
  config.devices = 1  # eight simulated ones on two cores only get in the way
  config.teacher.steps, config.student.steps = 900, 500
  config.teacher.hidden = (600, 600)
  for student in config.students.values():
    student.hidden = (400, 400)
  config.eval_every = "1000 steps"
  config.rows = ("hard", "soft_t4", "hard_no3", "soft_no3", "soft_only78")
  config.rows += ("hard_few", "soft_few")
  config.claims = ()
  return hinton.run(config, tmp_path_factory.mktemp("hinton") / "run")


def errors(result, name):
  (row,) = [row for row in result["rows"] if row["name"] == name]
  return row["values"][0]


def detail(result, name, key):
  (row,) = [row for row in result["rows"] if row["name"] == name]
  return row["details"][key][0]


def test_soft_targets_beat_hard_labels(result):
  """Seen with the full sizes: teacher 67, hard 124, soft 89 of 2,000."""
  teacher = errors(result, "teacher 600-600")
  hard = errors(result, "hard labels")
  soft = errors(result, "soft targets, T=4")
  assert 40 < teacher < 115
  assert 100 < hard < 180
  assert soft < hard - 10
  assert detail(result, "soft targets, T=4", "agreement") > 0.93
  assert detail(result, "soft targets, T=4", "kl_teacher_student") < detail(
    result, "hard labels", "kl_teacher_student"
  )


def test_a_class_that_was_never_seen(result):
  missed = "errors on absent classes"
  hard = detail(result, "hard labels, no 3s", missed)
  soft = detail(result, "soft targets, no 3s", missed)
  mended = detail(result, "soft targets, no 3s, one bias learned", missed)
  assert hard > 190  # of about 200 threes: it cannot know them
  assert mended < soft < 0.8 * hard
  assert errors(result, "soft targets, no 3s, one bias learned") < 180


def test_two_digits_teach_something_of_ten(result):
  before = errors(result, "soft targets, only 7s and 8s")
  after = errors(result, "soft targets, only 7s and 8s, one bias learned")
  assert after < 0.7 * before
  assert after < 1000  # chance is 1,800


def test_few_labels(result):
  some = "10% of the examples"
  hard = errors(result, f"hard labels, {some}")
  soft = errors(result, f"soft targets, T=4, {some}")
  assert soft < hard - 20


def test_a_cached_teacher_is_the_live_teacher(tmp_path):
  runs = []
  for live in (False, True):
    config = tiny()
    config.live_teacher = live
    runs.append(hinton.run(config, tmp_path / f"{live}"))
  for a, b in zip(runs[0]["rows"], runs[1]["rows"], strict=True):
    assert a["values"] == b["values"]
    np.testing.assert_allclose(
      a["details"]["nll"], b["details"]["nll"], rtol=1e-5
    )


@pytest.mark.parametrize("how", ["jit", "pmap"])
def test_all_devices_are_used(tmp_path, how):
  config = tiny()
  config.parallel = how
  result = hinton.run(config, tmp_path / "run")
  assert len(result["rows"]) == 3
  assert str(jax.device_count()) in result["environment"]["device"]


def test_the_teacher_is_bit_identical_after_its_students(tmp_path):
  config = tiny()
  path = tmp_path / "run"
  hinton.run(config, path)
  files = sorted((path / "seed0/teacher/checkpoints").rglob("*"))
  before = {f: f.read_bytes() for f in files if f.is_file()}
  (path / "result.json").unlink()
  hinton.run(config, path)  # students again, from the stored teacher
  assert {f: f.read_bytes() for f in files if f.is_file()} == before


def test_a_finished_run_prints_its_result_and_rewrites_nothing(
  tmp_path, capsys
):
  first = hinton.run(tiny(), tmp_path / "run")
  times = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.json")}
  capsys.readouterr()
  again = hinton.run(tiny(), tmp_path / "run")
  assert json.dumps(again) == json.dumps(first)
  assert "soft targets, T=4" in capsys.readouterr().out
  result = tmp_path / "run" / "result.json"
  assert result.stat().st_mtime_ns == times[result]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
  whole = hinton.run(tiny(), tmp_path / "a")
  real, calls = hinton.train.Classifier.fit, []

  def stop_at_the_third(self, *args, **kwargs):
    calls.append(kwargs["title"])
    if len(calls) == 3:
      raise KeyboardInterrupt
    return real(self, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(hinton.train.Classifier, "fit", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
      hinton.run(tiny(), tmp_path / "b")
  assert not (tmp_path / "b" / "result.json").exists()
  resumed = hinton.run(tiny(), tmp_path / "b")
  assert json.dumps(resumed["rows"]) == json.dumps(whole["rows"])


def test_the_bias_is_the_middle_of_the_best():
  labels = np.array([0, 1, 2, 2])
  logits = np.zeros((4, 3))
  logits[np.arange(4), [0, 1, 0, 1]] = [9.0, 8.0, 3.0, 5.0]
  absent = np.array([False, False, True])
  bias = hinton.learn_bias(logits, labels, absent)
  assert bias == pytest.approx(6.5, abs=0.1)  # above 5 and below 8
