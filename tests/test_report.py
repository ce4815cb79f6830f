import base64
import html.parser
import io
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from kd_jax import calibration, charts, report, report_style
from tests.test_results import patient, sample

EVIL = "<script>alert(1)</script>\"'&<img src=http://x.invalid onerror=y>"
NO_END = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
  """Everything that a browser would make of a page, as far as we check it."""

  def __init__(self, path):
    super().__init__()
    self.tags, self.attributes, self.open, self.text = [], [], [], []
    self.feed(pathlib.Path(path).read_text(encoding="utf-8"))
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, key, value or "") for key, value in attrs]
    if tag not in NO_END:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in NO_END:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)

  def count(self, tag):
    return self.tags.count(tag)

  def words(self):
    return " ".join("".join(self.text).split())


def curves():
  step = list(range(0, 100, 10))
  return {
    "loss": {
      "hard": {"step": step, "value": [2.0 / (1 + s) for s in step]},
      "soft": {"step": step, "value": [1.0 / (1 + s) for s in step]},
    },
    "errors": {"soft": {"step": step, "value": [90 - s / 10 for s in step]}},
  }


def example(**changes):
  rng = np.random.default_rng(0)
  softened = np.array([0.1, 0.2, 0.6, 0.1])
  made = {
    "image": rng.integers(0, 256, (6, 5, 1), dtype=np.uint8),
    "label": np.int32(2),
    "teacher": [0.001, 0.019, 0.979, 0.001],
    "softened": softened,
    "student": [0.0, 0.05, 0.95, 0.0],
  }
  return {**made, **changes}


def reliability():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(200, 4))
  return {"student": calibration.reliability(z, rng.integers(0, 4, 200))}


def write(path, result=None, **parts):
  report.write(path, result or sample(), **parts)
  return Page(path)


def test_a_full_report_holds_everything(tmp_path):
  page = write(
    tmp_path / "report.html",
    curves=curves(),
    examples=[example(), example()],
    reliability=reliability(),
    temperature=4.0,
  )
  words = page.words()
  lead = "Reproduced: soft T=4 made 71.2 fewer test errors than hard labels"
  assert lead in words
  for text in (
    "146.8 ± 4.4",
    "agreement with teacher",
    "Not reproduced: hard labels made 70.6 more",
    "Teacher, T=4",
    "2: 60.0%",
    "÷ 1.88",
    "12 min 34 s",
    "python -m experiments.invented",
    '"steps": 1500',
    "last 81",
    "average gap",
    "Logarithmic scale.",
  ):
    assert text in words, text
  assert page.count("img") == 2
  # A strip for each row, two panels with a key for each of three curves, three
  # bar charts for each example, one reliability diagram.
  assert page.count("svg") == 4 + 2 + 3 + 6 + 1


def test_the_page_needs_no_network_and_runs_nothing(tmp_path):
  result = sample(
    experiment=EVIL,
    title=EVIL,
    command=EVIL,
    source=EVIL,
    config={EVIL: [EVIL]},
    data={EVIL: EVIL},
    environment={EVIL: EVIL},
    notes=[EVIL],
    metric={"name": EVIL, "unit": EVIL, "better": "lower"},
  )
  result["models"][EVIL] = {"parameters": 3, EVIL: 4}
  for row in result["rows"]:
    row.update(name=EVIL + row["name"], note=EVIL)
    row["details"] = {EVIL: row["values"]}
  for entry in result["comparisons"]:
    entry.update(claim=EVIL, a=EVIL + entry["a"], b=EVIL + entry["b"])
  points = {"step": [1, 2], "value": [1.0, 2.0]}
  page = write(
    tmp_path / "report.html",
    result,
    curves={EVIL: {EVIL: points}},
    examples=[example()],
    reliability={EVIL: reliability()["student"]},
  )
  assert page.count("script") == 0
  assert page.count("link") == 0
  assert page.count("img") == 1
  for tag, key, value in page.attributes:
    assert not key.startswith("on"), (tag, key)
    if key in ("src", "href", "action", "data", "poster"):
      assert value.startswith("data:image/png;base64,"), value
  assert "url(" not in report_style.STYLE
  assert "@import" not in report_style.STYLE
  assert EVIL in "".join(page.text)  # shown as it was typed
  policies = [v for t, k, v in page.attributes if (t, k) == ("meta", "content")]
  assert any("default-src 'none'" in value for value in policies)


def test_pictures_have_words(tmp_path):
  page = write(
    tmp_path / "report.html",
    curves=curves(),
    examples=[example()],
    reliability=reliability(),
  )
  text = (tmp_path / "report.html").read_text()
  charts_found = re.findall(r"<svg[^>]*>(?:<title>([^<]*))?", text)
  named = [title for title in charts_found if title]
  hidden = text.count('aria-hidden="true"')
  assert len(named) + hidden == len(charts_found)
  assert hidden == 3  # the keys of the legends, whose names stand beside them
  assert ("html", "lang", "en") in page.attributes
  alts = [value for _, key, value in page.attributes if key == "alt"]
  assert alts == ["an example of class 2"]
  assert any("soft T=4" in title for title in named)


def test_a_bare_result_makes_a_page(tmp_path):
  rows = [{"name": "only", "values": [0]}]
  result = sample(rows=rows, comparisons=[], models={}, seeds=[7])
  page = write(tmp_path / "report.html", result)
  words = page.words()
  assert "No comparison with a control was made in this run." in words
  for heading in ("Claims", "Learning curves", "Dark knowledge", "Sizes"):
    assert heading not in words
  assert page.count("svg") == 1


def test_models_measured_on_other_batches_have_no_ratio(tmp_path):
  result = sample()
  result["models"]["student"]["batch_size"] = 1
  words = write(tmp_path / "report.html", result).words()
  assert "1,276,810" in words
  assert "÷" not in words


def test_a_loss_is_in_the_headline(tmp_path):
  result = sample()
  result["comparisons"] = result["comparisons"][2:]
  words = write(tmp_path / "report.html", result).words()
  start = words.index("Not reproduced: hard labels made 70.6 more test errors")
  assert start < words.index("Results")


def test_the_image_is_the_pixels():
  pil = pytest.importorskip("PIL.Image")
  rng = np.random.default_rng(0)
  for shape in ((7, 5), (7, 5, 1), (7, 5, 3)):
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    tag = charts.image(pixels, 'a "quoted" <alt>')
    data = base64.b64decode(re.search(r"base64,([^\"]*)", tag)[1])
    shown = np.asarray(pil.open(io.BytesIO(data)))
    np.testing.assert_array_equal(shown, pixels.reshape(shown.shape))
    assert "<alt>" not in tag
  for bad in (
    np.zeros((7, 5)),
    np.zeros((7, 5, 4), np.uint8),
    np.zeros(7, np.uint8),
  ):
    with pytest.raises(ValueError, match="uint8"):
      charts.image(bad, "")


def _points(svg):
  """Coordinates of the first polyline of a chart."""
  text = re.search(r'points="([^"]*)"', svg)[1]
  return np.array([p.split(",") for p in text.split()], float)


def test_curves_are_drawn_where_the_values_are():
  series = {"a": {"step": [0, 50, 100], "value": [0.0, 10.0, 20.0]}}
  xy = _points(charts.lines("t", series, ["a"]))
  np.testing.assert_allclose(np.diff(xy[:, 0]), [151, 151], atol=0.11)
  # Upwards is a smaller y; equal steps of the value are equal heights.
  heights = np.diff(xy[:, 1])
  assert heights[0] < 0
  assert heights[0] == pytest.approx(heights[1], abs=0.11)
  decades = {"a": {"step": [0, 1, 2], "value": [1e-3, 1e-1, 1e1]}}
  chart = charts.lines("t", decades, ["a"])
  heights = np.diff(_points(chart)[:, 1])
  assert heights[0] == pytest.approx(heights[1], abs=0.11)
  assert "Logarithmic scale." in chart


@pytest.mark.parametrize(
  "value",
  [[3.0, 3.0], [0.0, 0.0], [-5.0, 5.0], [1e-12, 1e12], [1e6, 1e6 + 1]],
)
def test_any_finite_values_stay_inside_the_chart(value):
  chart = charts.lines("t", {"a": {"step": [0, 1], "value": value}}, ["a"])
  xy = _points(chart)
  assert np.isfinite(xy).all()
  assert (xy >= 0).all()
  assert (xy <= [360, 220]).all()


def test_values_that_are_not_finite_are_counted():
  series = {
    "a": {"step": [0, 1, 2], "value": [1.0, np.nan, 2.0]},
    "b": {"step": [0, 1, 2], "value": [np.inf, np.nan, np.nan]},
  }
  chart = charts.lines("t", series, ["a", "b"])
  assert "4 values that are not finite are left out." in chart
  assert len(_points(chart)) == 2
  assert "no value" in chart
  nothing = {"b": series["b"]}
  assert "3 values" in charts.lines("t", nothing, ["b"])


def test_long_curves_keep_their_spikes():
  value = np.ones(50_000)
  value[31_234] = 1.9
  series = {"a": {"step": np.arange(50_000), "value": value}}
  chart = charts.lines("t", series, ["a"])
  xy = _points(chart)
  assert len(xy) < 1000
  assert (xy[:, 1] < xy[0, 1] - 50).sum() == 1
  assert xy[-1, 0] == pytest.approx(350, abs=0.1)


def test_a_series_has_one_colour_in_all_panels(tmp_path):
  write(tmp_path / "report.html", curves=curves())
  text = (tmp_path / "report.html").read_text()
  keys = re.findall(r'class="line (s\d)"[^>]*/></svg> (\w+)', text)
  assert sorted(set(keys)) == [("s0", "hard"), ("s1", "soft")]
  assert len(keys) == 3


def test_bars_show_the_probabilities():
  chart = charts.bars([0.1, 0.2, 0.6, 0.1], 2, "teacher")
  heights = re.findall(r'class="(\w+)"[^/]*height="([\d.]+)"', chart)
  assert [kind for kind, _ in heights] == ["bar", "bar", "marked", "bar"]
  tall = [float(height) for _, height in heights]
  np.testing.assert_allclose(tall, [9, 18, 54, 9], atol=0.11)
  many = np.full(100, 0.001)
  many[[3, 50, 70]] = [0.5, 0.2, 0.1]
  chart = charts.bars(many.tolist(), 99, "teacher")
  shown = re.findall(r'text-anchor="middle">(\d+)<', chart)
  assert len(shown) == 10
  assert {"3", "50", "70", "99"} <= set(shown)
  assert "50: 20.0%" in chart


def test_bad_parts_are_refused_and_the_old_report_stays(tmp_path):
  path = tmp_path / "report.html"
  write(path)
  before = path.read_bytes()
  bad = [
    (dict(examples=[example(label=4)]), r"examples\[0\]\.teacher.*label 4"),
    (dict(examples=[example(softened=[0.5, np.nan, 0.2, 0])]), "softened"),
    (dict(examples=[example(student=[[1.0]])]), "student"),
    (dict(examples=[example(image=np.zeros((3, 3)))]), "uint8"),
    (dict(curves={"t": {"a": {"step": [1], "value": [1, 2]}}}), "'t', 'a'"),
    (dict(curves={"t": {"a": {"step": [], "value": []}}}), "not empty"),
  ]
  for parts, message in bad:
    with pytest.raises(ValueError, match=message):
      report.write(path, sample(), **parts)
  with pytest.raises(ValueError, match="seeds"):
    report.write(path, sample(seeds=[]))
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_numpy_values_in_a_result_are_fine(tmp_path):
  result = sample(wall_seconds=np.float32(3))
  result["rows"][1]["values"] = np.array(result["rows"][1]["values"])
  assert "146.8 ± 4.4" in write(tmp_path / "report.html", result).words()


def test_importing_loads_neither_jax_nor_matplotlib():
  code = (
    "import sys, kd_jax.report\n"
    "print([m for m in ('jax', 'flax', 'matplotlib') if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
    check=True,
  )
  assert done.stdout.strip() == "[]"


def test_rows_that_are_points_of_a_curve_are_drawn(tmp_path):
  report.write(tmp_path / "r.html", patient())
  page = Page(tmp_path / "r.html")
  assert "mean over seeds" in page.words() and "75.6 ± 4.3" in page.words()
  before = report.write(tmp_path / "plain.html", sample())
  assert before is None
  plain = Page(tmp_path / "plain.html")
  assert page.count("polyline") == plain.count("polyline") + 2  # and a legend
  (points,) = [
    value
    for tag, key, value in page.attributes
    if tag == "polyline" and key == "points" and value != "0,4 28,4"
  ]
  (x0, y0), (x1, y1) = (p.split(",") for p in points.split())
  assert float(x0) < float(x1) and float(y0) > float(y1)  # more errors: higher
