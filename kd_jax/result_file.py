"""The result file of a run: what is in it, and how it is checked and kept.

`result.json` is one JSON object:

  experiment, title, command, source: text
  config, data, environment: objects, shown as they are
  seeds: [integers]
  metric: {name, unit, better: "lower" or "higher"}
  rows: [{name, paper: number or null, values: [one per seed],
          details: {name: [one number or null per seed]}, note, seeds,
          curve: [name, number]}]
  comparisons: what `compare` returns
  models: {name: what `compression.cost` returns}
  wall_seconds: number;  finished: ISO 8601 time;  notes: [text], optional

A row may have `seeds` of its own (a teacher that was trained once). With
`curve` it is a point of the curve of that name, over what the result's text
`curve_over` says: "epochs".
"""

from collections.abc import Mapping
import datetime
import json
import math
import os
import pathlib
import platform
from typing import Any

import numpy as np

from kd_jax import comparison
from kd_jax.errors import NotFinite
from kd_jax.files import write_text

Result = Mapping[str, Any]

_REQUIRED = {
  "experiment": str,
  "title": str,
  "command": str,
  "source": str,
  "config": dict,
  "data": dict,
  "environment": dict,
  "seeds": list,
  "metric": dict,
  "rows": list,
  "comparisons": list,
  "models": dict,
  "wall_seconds": float,
  "finished": str,
}


def environment() -> dict[str, Any]:
  """What the run ran on, for a result's `environment`. Imports jax."""
  import jax
  import jaxlib

  import kd_jax

  devices = jax.devices()
  return {
    "python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "numpy": np.__version__,
    "device": f"{len(devices)} x {devices[0].device_kind}",
    "cpus": os.cpu_count(),
    "kd_jax": kd_jax.__version__,
  }


def validate(result: Result) -> None:
  """Checks that `result` is what the module's description says.

  Comparisons are computed again from their differences, and those from the
  rows, so a number or verdict that was changed by hand does not pass.

  Args:
    result: plain JSON values (lists, not arrays).

  Raises:
    ValueError: naming the first key that is missing or wrong.
  """
  _fields(result, _REQUIRED, "result")
  _seeds(result["seeds"], "seeds")
  _metric(result["metric"], "metric")
  _want(result["wall_seconds"] >= 0, "wall_seconds", "not negative")
  try:
    datetime.datetime.fromisoformat(result["finished"])
  except ValueError:
    _want(False, "finished", "an ISO 8601 time")
  notes = result.get("notes", [])
  _want(
    isinstance(notes, list) and all(isinstance(note, str) for note in notes),
    "notes",
    "a list of texts",
  )
  _want(len(result["rows"]) > 0, "rows", "not empty")
  rows: dict[str, list[float]] = {}
  for i, row in enumerate(result["rows"]):
    where = f"rows[{i}]"
    _fields(row, {"name": str, "values": list}, where)
    if "curve" in row:
      curve = row["curve"]
      fine = isinstance(curve, list) and len(curve) == 2
      _want(fine and isinstance(curve[0], str), f"{where}.curve", "[name, x]")
      _number(curve[1], f"{where}.curve")
      over = isinstance(result.get("curve_over"), str)
      _want(over, "curve_over", "text, since rows are points of curves")
    _want(row["name"] not in rows, f"{where}.name", "different in each row")
    rows[row["name"]] = _row(row, result["seeds"], where)
  for i, entry in enumerate(result["comparisons"]):
    _comparison(entry, rows, f"comparisons[{i}]")
  for name, model in result["models"].items():
    _fields(model, {}, f"models.{name}")
    for key, value in model.items():
      if value is not None:
        _number(value, f"models.{name}.{key}")


def _row(row: Result, seeds: list[int], where: str) -> list[float]:
  seeds = row.get("seeds", seeds)
  _seeds(seeds, f"{where}.seeds")
  if row.get("paper") is not None:
    _number(row["paper"], f"{where}.paper")
  _want(isinstance(row.get("note", ""), str), f"{where}.note", "text")
  details = row.get("details", {})
  _fields(details, {}, f"{where}.details")
  for name, values in {**details, "values": row["values"]}.items():
    place = f"{where}.{name}"
    one_each = isinstance(values, list) and len(values) == len(seeds)
    _want(one_each, place, f"a list of {len(seeds)}, one number per seed")
    for value in values:
      if name == "values" or value is not None:
        _number(value, place)
  return row["values"]


def _comparison(entry: Result, rows: dict[str, list], where: str) -> None:
  words = dict.fromkeys(("claim", "a", "b", "expected", "verdict"), str)
  _fields(entry, {**words, "differences": list, "mean": float}, where)
  expected, paired = entry["expected"], entry.get("paired", True)
  _want(expected in comparison.BETTER, f"{where}.expected", "lower or higher")
  if "metric" in entry:
    _metric(entry["metric"], f"{where}.metric")
  ci95, differences = entry.get("ci95"), entry["differences"]
  if paired:
    a, b = rows.get(entry["a"]), rows.get(entry["b"])
    if "metric" not in entry and a is not None and b is not None:
      true = np.subtract(a, b) if len(a) == len(b) else np.zeros(0)
      _want(
        len(true) == len(differences) and np.allclose(true, differences),
        f"{where}.differences",
        "values of row a less values of row b; where the comparison is about "
        "something else, it should have a metric of its own",
      )
    zeros = [0.0] * len(differences)
    again = comparison.compare("", differences, zeros, expected)
    for key in ("mean", "sd", "ci95"):
      _want(
        _close(again[key], entry.get(key)), f"{where}.{key}", str(again[key])
      )
    seeds = len(differences)
  else:
    _fields(entry, {"n": int}, where)
    seeds = entry["n"]
    if ci95 is not None:
      _want(len(comparison.numbers(ci95, where)) == 2, where, "two numbers")
  verdict = comparison.verdict(ci95, seeds, expected)
  _want(entry["verdict"] == verdict, f"{where}.verdict", repr(verdict))


def _close(x: Any, y: Any) -> bool:
  if x is None or y is None:
    return x is y
  return np.shape(x) == np.shape(y) and np.allclose(x, y, rtol=1e-9, atol=1e-9)


def _want(condition: Any, where: str, should: str) -> None:
  if not condition:
    raise ValueError(f"{where} is wrong; it should be {should}")


def _number(value: Any, where: str) -> None:
  fine = isinstance(value, int | float) and not isinstance(value, bool)
  _want(fine and math.isfinite(value), where, f"a finite number, not {value!r}")


def _fields(value: Any, kinds: Mapping[str, type], where: str) -> None:
  _want(isinstance(value, Mapping), where, "an object")
  for key, kind in kinds.items():
    _want(key in value, f"{where}.{key}", "there; it is missing")
    if kind is float:
      _number(value[key], f"{where}.{key}")
    else:
      _want(isinstance(value[key], kind), f"{where}.{key}", kind.__name__)


def _seeds(seeds: Any, where: str) -> None:
  fine = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
  _want(fine and seeds, where, "a list of integers, at least one")
  _want(len(set(seeds)) == len(seeds), where, "without repetition")


def _metric(metric: Any, where: str) -> None:
  _fields(metric, dict.fromkeys(("name", "unit", "better"), str), where)
  better = metric["better"] in comparison.BETTER
  _want(better, f"{where}.better", "lower or higher")


def save(path: str | os.PathLike[str], result: Result) -> None:
  """Validates `result` and writes it as JSON, whole or not at all.

  Args:
    path: the file; its folder exists.
    result: as the module describes; NumPy and JAX numbers and arrays are fine.

  Raises:
    ValueError: naming the key that is wrong, or is NaN or infinite.
    TypeError: if a value is none of JSON's kinds.
    OSError: if the file cannot be written.
  """
  result = plain(result)
  validate(result)
  write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def plain(value: Any, where: str = "result") -> Any:
  """`value` with NumPy and JAX numbers and arrays as JSON values.

  Raises:
    ValueError: naming the place, below `where`, of a NaN or an infinity.
    TypeError: naming the place of a value that is none of JSON's kinds.
  """
  if isinstance(value, Mapping):
    return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
  if hasattr(value, "tolist"):  # NumPy and JAX, arrays and scalars
    return plain(value.tolist(), where)
  if isinstance(value, float) and not math.isfinite(value):
    raise NotFinite(f"{where} is {value}; it should be a finite number")
  if value is None or isinstance(value, str | bool | int | float):
    return value
  raise TypeError(f"{where} is a {type(value).__name__}; JSON has no such kind")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads and validates a result file.

  Args:
    path: the file.

  Returns:
    The result.

  Raises:
    ValueError: naming the file and what is wrong in it.
    OSError: if it cannot be read.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
    result = json.loads(text, parse_constant=_refuse)
    validate(result)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: {error}") from error
  return result


def _refuse(constant: str) -> None:
  raise ValueError(f"holds {constant}; numbers should be finite")
