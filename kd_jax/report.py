"""The report of a run: one HTML file that opens without a network."""

from collections.abc import Mapping, Sequence
import html
import json
import os
from typing import Any

import numpy as np

from kd_jax import calibration, charts, files, result_file, results
from kd_jax.report_style import STYLE

Result = Mapping[str, Any]


def write(
  path: str | os.PathLike[str],
  result: Result,
  *,
  curves: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
  examples: Sequence[Mapping[str, Any]] | None = None,
  reliability: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
  temperature: float | None = None,
) -> None:
  """Writes the report of a run, whole or not at all.

  The page holds everything in itself, no script, and asks the browser to load
  nothing. Text from outside (names, config values) is shown, never acted on.

  Args:
    path: the file to write, `report.html` as a rule.
    result: as `kd_jax.result_file` describes.
    curves: panel title -> series name -> {"step": numbers, "value": numbers}.
      A series has one colour in all panels.
    examples: some examples with "image" (uint8 [height, width] or with 1 or 3
      channels), "label" (integer), and probabilities [classes] as "teacher"
      (at temperature 1), "softened" (at the temperature of distillation) and,
      if there, "student".
    reliability: model name -> what `calibration.reliability` returns.
    temperature: of "softened", to name it.

  Raises:
    ValueError: if the result is not valid, a curve's lists differ in length, or
      an example's image or probabilities have a wrong shape.
    OSError: if the file cannot be written; an old report stays as it was.
  """
  result = result_file.plain(result)
  result_file.validate(result)
  parts = [
    _opening(result),
    _table_section(result),
    _claims(result),
    _curves(curves or {}),
    _examples(examples or [], temperature),
    _reliability(reliability or {}),
    _costs(result),
    _making(result),
  ]
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
  page = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{_e(result['title'])}</title>\n<style>{STYLE}</style></head>\n"
    f"<body><main>\n{''.join(parts)}</main></body></html>\n"
  )
  files.write_text(path, page)


def pick(
  test: Mapping[str, np.ndarray],
  teacher_logits: np.ndarray,
  student_logits: np.ndarray,
  temperature: float,
  *,
  count: int = 8,
) -> list[dict[str, Any]]:
  """Examples whose soft targets say more than the label, for `write`.

  Args:
    test: `image`, uint8[n, ...], and `label`, int[n].
    teacher_logits: [n, classes].
    student_logits: [n, classes].
    temperature: of the softened probabilities.
    count: how many, spread over the tenth of the examples that the teacher is
      least sure of.

  Returns:
    Entries for `examples` of `write`.
  """
  taught = np.exp(calibration.log_softmax(teacher_logits))
  softened = np.exp(calibration.log_softmax(teacher_logits / temperature))
  learned = np.exp(calibration.log_softmax(student_logits))
  labels = np.asarray(test["label"])
  unsure = np.argsort(softened[np.arange(len(labels)), labels])
  tenth = unsure[: max(count, len(unsure) // 10)]
  return [
    {
      "image": test["image"][i],
      "label": int(labels[i]),
      "teacher": taught[i].tolist(),
      "softened": softened[i].tolist(),
      "student": learned[i].tolist(),
    }
    for i in tenth[:: max(1, len(tenth) // count)][:count]
  ]


def _e(value: Any) -> str:
  return html.escape(str(value))


def _section(title: str, *parts: str) -> str:
  return f"<section><h2>{_e(title)}</h2>\n{''.join(parts)}</section>\n"


def _html_table(
  head: Sequence[str], rows: Sequence[Sequence[str]], caption: str
) -> str:
  """A table; cells are HTML already, the head is text."""
  heads = "".join(f'<th scope="col">{_e(cell)}</th>' for cell in head)
  body = "".join(
    f'<tr><th scope="row">{row[0]}</th>'
    + "".join(f"<td>{cell}</td>" for cell in row[1:])
    + "</tr>\n"
    for row in rows
  )
  return (
    f'<div class="scroll" role="region" tabindex="0" '
    f'aria-label="{_e(caption)}">'
    f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>"
    f'</div><p class="quiet">{_e(caption)}</p>\n'
  )


def _text_table(
  head: Sequence[str], rows: Sequence[Sequence[str]], caption: str
) -> str:
  return _html_table(head, [list(map(_e, row)) for row in rows], caption)


def _opening(result: Result) -> str:
  entries = result["comparisons"]
  lead = "No comparison with a control was made in this run."
  if entries:
    lead = results.sentence(entries[0], result["metric"])
  sizes = ""
  models = result["models"]
  ratio = _ratios(result).get("student", {}).get("parameters")
  if ratio is not None:
    sizes = (
      f"<p>The student has {results.number(models['student']['parameters'])} "
      f"parameters, the teacher {ratio:.3g} times as many.</p>\n"
    )
  return (
    f'<p class="quiet">{_e(result["experiment"])} · '
    f"{_e(result['source'])}</p>\n"
    f"<h1>{_e(result['title'])}</h1>\n"
    f'<p class="lead">{_e(lead)}</p>\n{sizes}'
  )


def _table_section(result: Result) -> str:
  head, rows = results.main_columns(result)
  everything = [value for row in result["rows"] for value in row["values"]]
  papers = [row.get("paper") for row in result["rows"]]
  papers = [paper for paper in papers if paper is not None]
  limits = min(everything + papers), max(everything + papers)
  cells = []
  for row, texts in zip(result["rows"], rows, strict=True):
    label = f"{row['name']}: {texts[1]}, {texts[2]}"
    picture = charts.strip(row["values"], row.get("paper"), limits, label)
    cells.append([*map(_e, texts), picture])
  low, high = map(results.number, limits)
  caption = (
    f"Mean ± standard deviation over seeds. Strips run from {low} to {high}: "
    "a dot for each seed, a bar for the mean, a diamond for the paper's number "
    "(other data or settings may lie behind it)."
  )
  parts = [_html_table([*head, "each seed"], cells, caption)]
  notes = [
    f"<p>{_e(row['name'])}: {_e(row['note'])}</p>\n"
    for row in result["rows"]
    if row.get("note")
  ]
  head, rows = results.detail_columns(result)
  if rows:
    caption = "Likelihood and divergences in nats; mean ± sd over seeds."
    parts.append(_text_table(head, rows, caption))
  return _section("Results", *_patience(result), *parts, *notes)


def _patience(result: Result) -> list[str]:
  """The curves whose points are rows: a figure and a table."""
  found = results.curves(result)
  if not found:
    return []
  title = f"{results.metric_text(result['metric'])}: mean over seeds"
  figure = charts.means(title, found, result["curve_over"].removesuffix("s"))
  caption = "Mean ± standard deviation over seeds."
  return [figure, _text_table(*results.curve_columns(result), caption)]


def _claims(result: Result) -> str:
  cards = []
  for entry in result["comparisons"]:
    kind = entry["verdict"].replace(" ", "-")
    text = results.sentence(entry, result["metric"])
    cards.append(
      f'<div class="claim {kind}"><b>{_e(entry["claim"])}</b>{_e(text)}</div>\n'
    )
  if not cards:
    return ""
  rule = (
    "<p>Each claim was stated before the run. It counts as reproduced only if "
    "the whole 95% interval of the mean difference lies on its side.</p>\n"
  )
  return _section("Claims", rule, *cards)


def _curves(curves: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
  order = list(
    dict.fromkeys(name for panel in curves.values() for name in panel)
  )
  figures = [
    charts.lines(title, panel, order) for title, panel in curves.items()
  ]
  if not figures:
    return ""
  body = "".join(figures)
  return _section("Learning curves", f'<div class="grid-2">{body}</div>\n')


def _examples(
  examples: Sequence[Mapping[str, Any]], temperature: float | None
) -> str:
  at = "softened" if temperature is None else f"T={temperature:g}"
  titles = {"teacher": "Teacher", "softened": f"Teacher, {at}"}
  titles["student"] = "Student"
  cards = []
  for i, example in enumerate(examples):
    label = int(example["label"])
    pictures = [charts.image(example["image"], f"an example of class {label}")]
    for key, title in titles.items():
      if key != "student" or key in example:
        values = _probabilities(example[key], label, f"examples[{i}].{key}")
        pictures.append(charts.bars(values, label, title))
    cards.append(f'<div class="digit">{"".join(pictures)}</div>\n')
  if not cards:
    return ""
  text = (
    "<p>What the teacher knows beyond the label: which wrong classes it finds "
    "likely. At a higher temperature the small probabilities grow, and the "
    "student learns from them. The labelled class is marked by its colour. "
    "Each chart is scaled to its largest bar; the three largest are written "
    "below it.</p>\n"
  )
  body = f'<div class="digits">{"".join(cards)}</div>\n'
  return _section("Dark knowledge", text, body)


def _probabilities(values: Any, label: int, where: str) -> list[float]:
  array = np.asarray(values, np.float64)
  fine = array.ndim == 1 and 0 <= label < len(array)
  if not fine or not ((array >= 0) & (array <= 1 + 1e-6)).all():
    raise ValueError(
      f"{where} has shape {array.shape} and label {label}; it should be "
      "probabilities [classes] with the label among the classes"
    )
  return array.tolist()


def _reliability(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
  figures = [charts.reliability(name, curve) for name, curve in curves.items()]
  if not figures:
    return ""
  text = (
    "<p>Accuracy of the predictions made with a given confidence. On the "
    "dashed line the two are equal; bars below it mean overconfidence.</p>\n"
  )
  body = f'<div class="grid-2">{"".join(figures)}</div>\n'
  return _section("Calibration", text, body)


def _ratios(result: Result) -> dict[str, dict[str, float | None]]:
  """The teacher's cost over each other model's, measured on equal batches."""
  from kd_jax import compression  # It imports jax, which no reader needs.

  models = dict(result["models"])
  teacher = models.pop("teacher", None)
  if teacher is None:
    return {}
  return {
    name: compression.ratios(teacher, model)
    for name, model in models.items()
    if model.get("batch_size") == teacher.get("batch_size")
  }


def _costs(result: Result) -> str:
  head, rows = results.cost_columns(result)
  if not rows:
    return ""
  keys = {text: key for key, text in results.COSTS.items()}
  ratios = _ratios(result)
  cells = []
  for name, *texts in rows:
    row = [_e(name)]
    for column, text in zip(head[1:], texts, strict=True):
      ratio = ratios.get(name, {}).get(keys[column])
      note = f'<br><span class="quiet">÷ {ratio:.3g}</span>' if ratio else ""
      row.append(_e(text) + note)
    cells.append(row)
  caption = "FLOPs are the compiler's count for one call of the whole batch."
  if any(ratios.values()):
    caption += (
      " Below each number: how many times less than the teacher's it is."
    )
  return _section("Sizes and latency", _html_table(head, cells, caption))


def _making(result: Result) -> str:
  environment = {
    **result["environment"],
    "seeds": ", ".join(map(str, result["seeds"])),
    "wall time": results.duration(result["wall_seconds"]),
    "finished": result["finished"],
  }
  facts = {"data": results.pairs(result["data"]), **environment}
  items = "".join(
    f"<dt>{_e(key)}</dt><dd>{_e(results.as_text(value))}</dd>\n"
    for key, value in facts.items()
  )
  config = _e(json.dumps(result["config"], indent=2))
  return _section(
    "How it was made",
    f"<pre>{_e(result['command'])}</pre>\n<dl>{items}</dl>\n",
    f"<details><summary>Configuration</summary><pre>{config}</pre></details>\n",
    *(f"<p>{_e(note)}</p>\n" for note in result.get("notes", [])),
  )
