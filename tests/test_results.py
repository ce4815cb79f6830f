import copy
import json
import os
import pathlib
import subprocess
import sys

from hypothesis import given, strategies as st
import numpy as np
import pytest

from kd_jax import comparison, result_file, results


def sample(**changes) -> dict:
  """A whole result with invented numbers."""
  hard = [141, 150, 147, 152, 144]
  soft = [78, 70, 76, 81, 73]
  wide = [79, 74, 71, 80, 77]
  metric = {"name": "test errors", "unit": "of 10000", "better": "lower"}
  result = {
    "experiment": "invented",
    "title": "Invented digits: soft targets against hard labels",
    "command": "python -m experiments.invented --config=c.py --workdir=runs/x",
    "config": {
      "steps": 1500,
      "hidden": [800, 800],
      "name": "<script>x</script>",
    },
    "seeds": [0, 1, 2, 3, 4],
    "metric": metric,
    "data": {"name": "invented", "train": 60000, "test": 10000},
    "source": "Nobody et al. 1900",
    "rows": [
      {
        "name": "teacher",
        "paper": 67,
        "values": [69],
        "seeds": [0],
        "note": "trained once",
      },
      _row("hard labels", 146, hard, 0.06),
      _row("soft T=4", 74, soft, 0.03),
      _row("soft T=8", None, wide, 0.04),
    ],
    "comparisons": [
      results.compare(
        "soft targets at T=4 make fewer errors than hard labels",
        soft,
        hard,
        a="soft T=4",
        b="hard labels",
      ),
      results.compare(
        "T=8 makes fewer errors than T=4",
        wide,
        soft,
        a="soft T=8",
        b="soft T=4",
      ),
      results.compare(
        "hard labels make fewer errors than T=8",
        hard,
        wide,
        a="hard labels",
        b="soft T=8",
      ),
    ],
    "models": {
      "teacher": {
        "parameters": 2395210,
        "bytes": 9580840,
        "flops": 4.8e8,
        "latency_ms_p50": 1.92,
        "latency_ms_p95": 2.4,
        "batch_size": 100,
      },
      "student": {
        "parameters": 1276810,
        "bytes": 5107240,
        "flops": 2.55e8,
        "latency_ms_p50": 1.01,
        "latency_ms_p95": 1.31,
        "batch_size": 100,
      },
    },
    "environment": {"python": "3.11.9", "jax": "0.0", "device": "1 x cpu"},
    "wall_seconds": 754.2,
    "finished": "2001-02-03T04:05:06Z",
  }
  return {**copy.deepcopy(result), **changes}


def _row(name, paper, values, nll):
  n = len(values)
  accuracy = [1 - value / 10000 for value in values]
  return {
    "name": name,
    "paper": paper,
    "values": values,
    "details": {
      "accuracy": accuracy,
      "nll": [nll + i / 1000 for i in range(n)],
      "agreement": [0.98 + i / 1000 for i in range(n)],
    },
  }


def test_summary():
  assert results.summary([3]) == (3.0, None, 1)
  mean, sd, n = results.summary(np.array([1.0, 2.0, 6.0]))
  assert (mean, n) == (3.0, 3)
  assert sd == pytest.approx(np.sqrt(7.0), rel=1e-15)
  for bad in ([], [1.0, float("nan")], [float("inf")], ["1"], [True], [None]):
    with pytest.raises(ValueError, match="values"):
      results.summary(bad)


# Two-sided 95% points of Student's t, as in any printed table.
@pytest.mark.parametrize(
  ("df", "value"),
  [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)],
)
def test_t_quantile_equals_the_printed_table(df, value):
  assert comparison.t_quantile(0.975, df) == pytest.approx(value, abs=5e-4)


def test_t_quantile_agrees_with_scipy():
  stats = pytest.importorskip("scipy.stats")
  for df in (1, 1.3, 2, 2.7, 5, 17.2, 400, 1e6):
    for p in (0.6, 0.9, 0.975, 0.9999):
      found = comparison.t_quantile(p, df)
      assert found == pytest.approx(stats.t.ppf(p, df), rel=1e-6)
  assert comparison.t_quantile(0.5, 3) == pytest.approx(0, abs=1e-20)


def test_t_quantile_refuses_what_it_cannot_do():
  for p, df in ((0.4, 3), (1.0, 3), (0.9, 0.5), (0.9, float("nan"))):
    with pytest.raises(ValueError, match="should be in"):
      comparison.t_quantile(p, df)


def test_compare_pairs_seeds():
  # The seeds differ much more than the settings do.
  b = [10.0, 30.0, 20.0]
  a = [9.0, 28.0, 17.0]
  found = results.compare("less", a, b, a="new", b="old")
  half = 4.302653 * 1.0 / np.sqrt(3)
  assert found["differences"] == [-1.0, -2.0, -3.0]
  assert found["mean"] == -2.0
  assert found["sd"] == pytest.approx(1.0)
  assert found["ci95"] == pytest.approx([-2 - half, -2 + half], abs=1e-6)
  assert found["verdict"] == "within noise"  # -2 + 2.48 > 0
  assert (found["a"], found["b"], found["n"]) == ("new", "old", 3)
  unpaired = results.compare("less", a, b, paired=False)
  assert unpaired["ci95"][1] > found["ci95"][1]


def test_unpaired_agrees_with_scipy():
  stats = pytest.importorskip("scipy.stats")
  a, b = [1.0, 2.0, 4.0, 3.5], [9.0, 8.0, 10.5]
  found = results.compare("less", a, b, paired=False)
  interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
  assert found["ci95"] == pytest.approx([interval.low, interval.high])
  assert found["verdict"] == "reproduced"
  assert found["n"] == 3
  assert found["differences"] == []


def test_paired_agrees_with_scipy():
  stats = pytest.importorskip("scipy.stats")
  a, b = [1.0, 2.0, 4.0, 3.5], [7.0, 5.0, 9.5, 6.0]
  found = results.compare("less", a, b)
  interval = stats.ttest_rel(a, b).confidence_interval()
  assert found["ci95"] == pytest.approx([interval.low, interval.high])


@pytest.mark.parametrize(
  ("differences", "expected", "verdict"),
  [
    ([-5, -6, -7], "lower", "reproduced"),
    ([-5, -6, -7], "higher", "not reproduced"),
    ([5, 6, 7], "lower", "not reproduced"),
    ([5, 6, 7], "higher", "reproduced"),
    ([-5, -6, 3], "lower", "within noise"),
    ([0, 0, 0], "lower", "within noise"),
    ([-5, -5, -5], "lower", "reproduced"),
    ([-5, -6], "lower", "too few seeds"),
    ([-5], "lower", "too few seeds"),
  ],
)
def test_verdicts(differences, expected, verdict):
  zeros = [0] * len(differences)
  found = results.compare("claim", differences, zeros, expected)
  assert found["verdict"] == verdict


@given(
  st.lists(st.floats(-100, 100), min_size=3, max_size=8),
  st.sampled_from(["lower", "higher"]),
)
def test_a_claim_and_its_opposite_are_never_both_reproduced(values, expected):
  zeros = [0.0] * len(values)
  one = results.compare("", values, zeros, expected)
  other = results.compare(
    "", values, zeros, {"lower": "higher", "higher": "lower"}[expected]
  )
  opposite = {
    "reproduced": "not reproduced",
    "not reproduced": "reproduced",
    "within noise": "within noise",
  }
  assert other["verdict"] == opposite[one["verdict"]]
  low, high = one["ci95"]
  assert low <= one["mean"] <= high


def test_compare_names_what_is_wrong():
  with pytest.raises(ValueError, match="3 values and b_values 2"):
    results.compare("", [1, 2, 3], [1, 2])
  with pytest.raises(ValueError, match="expected is 'less'"):
    results.compare("", [1], [1], "less")
  with pytest.raises(ValueError, match=r"values\[1\] is nan"):
    results.compare("", [1, float("nan"), 3], [1, 2, 3])
  with pytest.raises(ValueError, match="empty"):
    results.compare("", [], [])


def test_save_and_load(tmp_path):
  result = sample()
  path = tmp_path / "result.json"
  results.save(path, result)
  assert results.load(path) == result
  assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
  assert os.stat(path).st_mode & 0o044  # others may read it, umask permitting
  # NumPy and JAX values are written as numbers.
  arrays = sample()
  arrays["rows"][1]["values"] = np.array([141, 150, 147, 152, 144])
  arrays["wall_seconds"] = np.float32(754.25)
  arrays["seeds"] = tuple(np.arange(5))
  results.save(path, arrays)
  assert results.load(path)["rows"] == result["rows"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "result.json"
  results.save(path, sample())
  before = path.read_bytes()
  with pytest.raises(ValueError, match=r"rows\[1\]\.details\.nll\[0\] is nan"):
    bad = sample()
    bad["rows"][1]["details"]["nll"][0] = np.float32(np.nan)
    results.save(path, bad)
  with pytest.raises(TypeError, match=r"result\.config is a set"):
    results.save(path, sample(config={1}))

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space"):
    results.save(path, sample(title="new"))
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def _broken():
  """Ways to break a result, and what the message must name."""

  def edit(change):
    result = sample()
    change(result)
    return result

  def row(**changes):
    return edit(lambda r: r["rows"][1].update(changes))

  def entry(**changes):
    return edit(lambda r: r["comparisons"][0].update(changes))

  one = sample()["rows"][0]
  return [
    (edit(lambda r: r.pop("command")), "result.command"),
    (sample(title=3), "result.title"),
    (sample(seeds=[]), "seeds"),
    (sample(seeds=[0, 0, 1, 2, 3]), "seeds"),
    (sample(seeds=[0.0, 1.0, 2.0, 3.0, 4.0]), "seeds"),
    (sample(rows=[]), "rows"),
    (sample(rows=[one, one]), r"rows\[1\]\.name"),
    (sample(rows=["hard"]), r"rows\[0\]"),
    (row(values=[1, 2]), r"rows\[1\]\.values.*5"),
    (row(values=[1, 2, 3, 4, None]), r"rows\[1\]\.values"),
    (row(values=[1, 2, 3, 4, "5"]), r"rows\[1\]\.values"),
    (row(details={"nll": [0.1]}), r"rows\[1\]\.nll"),
    (row(paper="146"), r"rows\[1\]\.paper"),
    (row(note=None), r"rows\[1\]\.note"),
    (sample(wall_seconds=-1), "wall_seconds"),
    (sample(wall_seconds=True), "wall_seconds"),
    (sample(finished="yesterday"), "finished"),
    (sample(metric={"name": "x", "unit": "", "better": "less"}), "better"),
    (sample(models={"teacher": {"flops": "many"}}), r"models\.teacher\.flops"),
    (sample(notes="one"), "notes"),
    (entry(verdict="within noise"), r"comparisons\[0\]\.verdict"),
    (entry(mean=-90.0), r"comparisons\[0\]\.mean"),
    (entry(ci95=[-80.0, -79.0]), r"comparisons\[0\]\.ci95"),
    (entry(differences=[-1, -2, -3, -4, -5]), r"\.differences.*row a"),
    (entry(expected="down"), r"comparisons\[0\]\.expected"),
    (entry(metric={}), r"comparisons\[0\]\.metric"),
    ([], "result is wrong"),
  ]


@pytest.mark.parametrize(("result", "message"), _broken())
def test_a_bad_result_is_refused_by_name(result, message, tmp_path):
  path = tmp_path / "bad.json"
  path.write_text(json.dumps(result))
  with pytest.raises(ValueError, match=message) as error:
    results.load(path)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)


def test_other_things_may_be_compared_with_a_metric_of_their_own():
  metric = {"name": "NLL", "unit": "nats", "better": "lower"}
  entry = results.compare(
    "T=4 is better calibrated",
    [0.2, 0.21, 0.22],
    [0.4, 0.42, 0.41],
    a="soft T=4",
    b="hard labels",
    metric=metric,
  )
  result = sample(comparisons=[entry])
  results.validate(result)
  assert "soft T=4 had NLL lower by 0.2 than" in results.table(result)
  unpaired = results.compare(
    "", [1.0, 2.0, 4.0], [7.0, 5.0, 9.5], paired=False, metric=metric
  )
  results.validate(sample(comparisons=[unpaired]))


@pytest.mark.parametrize(
  "text",
  [
    "",
    "{",
    '{"a": NaN}',
    "[" * 100_000,
    "\udcff".encode("utf-8", "surrogateescape"),
  ],
)
def test_what_is_no_json_is_refused(text, tmp_path):
  path = tmp_path / "bad.json"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ValueError, match=r"bad\.json"):
    results.load(path)


def test_words_say_who_lost():
  better, noise, lost = (
    results.sentence(entry, sample()["metric"])
    for entry in sample()["comparisons"]
  )
  assert better.startswith(
    "Reproduced: soft T=4 made 71.2 fewer test errors than hard labels"
  )
  assert "5 seeds" in better
  assert noise.startswith("Within noise: ")
  assert "on average it is a loss to soft T=4" in noise
  assert lost.startswith(
    "Not reproduced: hard labels made 70.6 more test errors than soft T=8"
  )
  assert lost.endswith("That is a loss to soft T=8.")
  few = results.compare("", [1, 2], [3, 5], a="x", b="y")
  assert "2 seeds" in results.sentence(few, sample()["metric"])
  assert "At least 3" in results.sentence(few, sample()["metric"])
  same = results.compare("", [1, 2, 3], [1, 2, 3], a="x", b="y")
  words = results.sentence(same, sample()["metric"])
  assert "x and y had the same test errors" in words
  accuracy = {"name": "accuracy", "unit": "", "better": "higher"}
  worse = results.compare("", [0.5] * 3, [0.9] * 3, "higher", a="x", b="y")
  words = results.sentence(worse, accuracy)
  assert words.startswith("Not reproduced: x had accuracy lower by 0.4 than y")
  assert words.endswith("That is a loss to y.")
  # A claim that the control wins, and it does not.
  claim = results.compare("", [0.9] * 3, [0.5] * 3, "lower", a="x", b="y")
  assert results.sentence(claim, accuracy).endswith("opposite of the claim.")


def test_table_is_aligned_and_complete():
  text = results.table(sample())
  lines = text.splitlines()
  head = lines.index(next(x for x in lines if x.startswith("setting")))
  body = lines[head : head + 6]
  assert len({len(line) for line in body}) == 1
  assert "test errors of 10000, lower is better" in body[0]
  hard = next(line for line in body if line.startswith("hard labels"))
  assert " ".join(hard.split()) == "hard labels 146.8 ± 4.4 141 to 152 146 5"
  assert "teacher: trained once" in text
  assert text.count("Claim: ") == 3


def test_markdown_holds_everything_and_no_order():
  one = sample()
  two = sample(
    title="Another | setting\n# not a heading <b>",
    command="python a.py\npython b.py",
    comparisons=[],
    notes=["nothing was compared"],
    models={},
  )
  three = sample(experiment="earlier")
  text = results.markdown([one, two, three])
  assert text == results.markdown([three, one, two])
  headings = [x for x in text.splitlines() if x.startswith("#")]
  assert headings == [
    "# Results",
    "## earlier",
    "### Invented digits: soft targets against hard labels",
    "## invented",
    "### Another \\| setting \\# not a heading &lt;b>",
    "### Invented digits: soft targets against hard labels",
  ]
  assert "Generated by" in text
  assert f"    {one['command']}\n" in text
  assert "    python a.py\n    python b.py\n" in text
  assert "| hard labels | 146.8 ± 4.4 | 141 to 152 | 146 | 5 |" in text
  assert "12 min 34 s" in text
  assert "python 3.11.9; jax 0.0; device 1 x cpu" in text
  assert "That is a loss to soft T=8." in text
  assert "No comparison was made in this run." in text
  assert "Note: nothing was compared" in text
  assert "| 1 | 1 | 1 | 0 |" in text
  # Each line of a table has as many cells as its head.
  for block in text.split("\n\n"):
    if block.startswith("|"):
      cells = [
        line.replace("\\|", "").count("|") for line in block.splitlines()
      ]
      assert len(set(cells)) == 1, block


def test_the_command_writes_checks_and_refuses(tmp_path, capsys):
  folder = tmp_path / "results" / "invented"
  folder.mkdir(parents=True)
  results.save(folder / "a.json", sample())
  results.save(folder / "b.json", sample(title="b"))
  page = tmp_path / "RESULTS.md"
  both = str(tmp_path / "results" / "*" / "*.json")
  empty = str(tmp_path / "results" / "*.json")
  # A file that is named twice counts once; a pattern may match nothing.
  args = [both, empty, str(folder / "a.json")]
  assert results.main([*args, "--check", str(page)]) == 1
  assert results.main([*args, "--write", str(page)]) == 0
  assert results.main([*args, "--check", str(page)]) == 0
  assert page.read_text().count("### ") == 2
  capsys.readouterr()
  assert results.main(args) == 0
  assert capsys.readouterr().out == page.read_text()
  page.write_text(page.read_text().replace("146.8", "46.8"))
  assert results.main([*args, "--check", str(page)]) == 1
  assert "--write" in capsys.readouterr().err
  edited = page.read_bytes()
  (folder / "b.json").write_text('{"experiment": 1}')
  for files in ([both], [empty], [str(tmp_path / "none.json")]):
    assert results.main([*files, "--write", str(page)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
  assert page.read_bytes() == edited


def test_the_module_runs_without_jax(tmp_path):
  results.save(tmp_path / "a.json", sample())
  code = (
    "import runpy, sys; sys.argv = ['results', sys.argv[1]]\n"
    "try: runpy.run_module('kd_jax.results', run_name='__main__')\n"
    "except SystemExit as e: assert e.code == 0, e.code\n"
    "assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path / "a.json")],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("# Results")


def test_environment_names_versions_and_device():
  import jax

  found = results.environment()
  assert found["jax"] == jax.__version__
  assert found["device"].startswith(f"{len(jax.devices())} x ")
  results.validate(sample(environment=found))


def test_numbers_are_written_for_people():
  assert results.spread([146]) == "146"
  assert results.spread([None, None]) == "–"  # noqa: RUF001
  assert results.spread([0.98532, 0.98532]) == "0.9853 ± 0"
  assert results.spread([1e-9, 3e-9]) == "2e-09 ± 1.4e-09"
  assert results.spread([1000, 3000]) == "2,000 ± 1,414"
  assert results.spread([99.2, 99.6, 99.5]) == "99.43 ± 0.21"
  assert results.number(0.0) == "0"
  assert results.number(1e300) == "1e+300"
  assert results.value_range([3, 3]) == "3"
  assert result_file.plain(np.int64(3)) == 3


def patient():
  """A result whose rows are points of two curves, and one of none."""
  result = sample(curve_over="epochs")
  for row, curve in zip(
    result["rows"][1:],
    (["hard", 30.0], ["soft", 30.0], ["soft", 300.0]),
    strict=True,
  ):
    row["curve"] = curve
  return result


def test_rows_that_are_points_of_a_curve_make_a_table():
  head, rows = results.curve_columns(patient())
  assert head == ["test errors after epochs", "30", "300"]
  assert rows == [["soft", "75.6 ± 4.3", "76.2 ± 3.7"]]  # "hard" is a point
  text = results.markdown([patient()])
  assert "| soft | 75.6 ± 4.3 | 76.2 ± 3.7 |" in text
  assert results.curve_columns(sample()) == (["test errors after None"], [])
  assert "after None" not in results.markdown([sample()])


@pytest.mark.parametrize("curve", ["soft", ["soft"], [3, 4.0], ["soft", "x"]])
def test_a_bad_curve_is_refused(curve):
  result = patient()
  result["rows"][1]["curve"] = curve
  with pytest.raises(ValueError, match=r"rows\[1\].curve"):
    results.validate(result)
  result = patient()
  del result["curve_over"]
  with pytest.raises(ValueError, match="curve_over is wrong"):
    results.validate(result)
