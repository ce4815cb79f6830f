"""Numbers and tables of a result as text, for people."""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any

from kd_jax.comparison import summary

Result = Mapping[str, Any]

# Details in the order in which they are shown; others follow as they come.
DETAILS = {
  "accuracy": "accuracy",
  "nll": "NLL",
  "ece": "ECE",
  "brier": "Brier",
  "agreement": "agreement with teacher",
  "kl_teacher_student": "KL(teacher, student)",
  "kl_student_teacher": "KL(student, teacher)",
}
COSTS = {
  "parameters": "parameters",
  "bytes": "bytes",
  "flops": "FLOPs",
  "latency_ms_p50": "latency p50, ms",
  "latency_ms_p95": "latency p95, ms",
  "batch_size": "batch size",
}
_MISSING = "–"  # noqa: RUF001  (an en dash, as tables have it)


def number(value: float | None) -> str:
  """A number as a person writes it; a dash for None.

  Example:
    >>> number(1234567), number(76.25), number(0.012345), number(None)
    ('1,234,567', '76.25', '0.01235', '–')
  """
  if value is None:
    return _MISSING
  if float(value).is_integer() and abs(value) < 1e15:
    return f"{int(value):,}"
  return f"{value:,.1f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def spread(values: Iterable[float | None]) -> str:
  """Mean ± sd with the digits that the sd allows; a dash if none is known.

  Example:
    >>> spread([74, 76, 79]), spread([146]), spread([5, 5])
    ('76.3 ± 2.5', '146', '5 ± 0')
  """
  known = [value for value in values if value is not None]
  if not known:
    return _MISSING
  mean, sd, _ = summary(known)
  if not sd:
    return number(mean) + ("" if sd is None else " ± 0")
  digits = max(0, 1 - math.floor(math.log10(sd)))
  if digits > 6:
    return f"{mean:.6g} ± {sd:.1e}"
  return f"{mean:,.{digits}f} ± {sd:,.{digits}f}"


def value_range(values: Sequence[float]) -> str:
  """Smallest to largest."""
  low, high = min(values), max(values)
  return number(low) if low == high else f"{number(low)} to {number(high)}"


def metric_text(metric: Mapping[str, str]) -> str:
  """The metric with its unit and direction, for the head of a column."""
  unit = f" {metric['unit']}" if metric["unit"] else ""
  return f"{metric['name']}{unit}, {metric['better']} is better"


def duration(seconds: float) -> str:
  """A time that a person can read.

  Example:
    >>> duration(42.3), duration(754), duration(7260)
    ('42 s', '12 min 34 s', '2 h 1 min')
  """
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min {whole % 60} s"
  return f"{whole // 3600} h {whole % 3600 // 60} min"


def main_columns(result: Result) -> tuple[list[str], list[list[str]]]:
  """Head and rows of the table of the metric, as text."""
  head = ["setting", metric_text(result["metric"]), "min to max", "paper"]
  head.append("seeds")
  rows = [
    [
      row["name"],
      spread(row["values"]),
      value_range(row["values"]),
      number(row.get("paper")),
      str(len(row["values"])),
    ]
    for row in result["rows"]
  ]
  return head, rows


def curves(result: Result) -> dict[str, dict[float, list[float]]]:
  """The rows that are points of curves: {name: {x: one value per seed}}."""
  found: dict[str, dict[float, list[float]]] = {}
  for row in result["rows"]:
    if "curve" in row:
      name, x = row["curve"]
      found.setdefault(name, {})[x] = row["values"]
  return {name: points for name, points in found.items() if len(points) > 1}


def curve_columns(result: Result) -> tuple[list[str], list[list[str]]]:
  """Head and rows of the table of the curves; no rows if there are none."""
  found = curves(result)
  places = sorted({x for points in found.values() for x in points})
  head = [f"{result['metric']['name']} after {result.get('curve_over')}"]
  rows = [
    [name, *(spread(points.get(x, [])) for x in places)]
    for name, points in found.items()
  ]
  return head + [number(x) for x in places], rows


def detail_columns(result: Result) -> tuple[list[str], list[list[str]]]:
  """Head and rows of the table of the details; no rows if there are none."""
  present = list(
    dict.fromkeys(
      name for row in result["rows"] for name in row.get("details", {})
    )
  )
  names = [name for name in DETAILS if name in present]
  names += [name for name in present if name not in DETAILS]
  rows = [
    [row["name"], *(spread(row["details"].get(name, [])) for name in names)]
    for row in result["rows"]
    if row.get("details")
  ]
  return ["setting", *(DETAILS.get(name, name) for name in names)], rows


def cost_columns(result: Result) -> tuple[list[str], list[list[str]]]:
  """Head and rows of the table of sizes and latency."""
  models = result["models"]
  keys = [key for key in COSTS if any(key in m for m in models.values())]
  rows = [
    [name, *(number(model.get(key)) for key in keys)]
    for name, model in models.items()
  ]
  return ["model", *(COSTS[key] for key in keys)], rows
