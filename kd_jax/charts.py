"""Charts as inline SVG and pictures as data URIs, for a page without a network.

Colours are CSS variables (`--s0`...) of the page, so that they follow its light
or dark theme. All text is escaped here.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import html
import math
import struct
from typing import Any
import zlib

import numpy as np

from kd_jax.results import number

Map = Callable[[float], float]

COLOURS = 7
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 34
# Above this ratio of largest to smallest value the axis is logarithmic.
_LOG_RATIO = 30.0
_MAX_POINTS = 400


def image(pixels: np.ndarray, alt: str) -> str:
  """An <img> of uint8 pixels, [height, width], or with 1 or 3 channels.

  Raises:
    ValueError: if the dtype or shape is another.
  """
  pixels = np.asarray(pixels)
  if pixels.ndim == 3 and pixels.shape[2] == 1:
    pixels = pixels[:, :, 0]
  colour = pixels.ndim == 3 and pixels.shape[2] == 3
  if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or colour):
    raise ValueError(
      f"image is {pixels.dtype}{list(pixels.shape)}; it should be uint8, "
      "[height, width] or [height, width, 1 or 3]"
    )
  height, width = pixels.shape[:2]
  # Each line of a PNG begins with the number of its filter, 0 for none.
  lines = np.zeros((height, 1 + pixels[0].size), np.uint8)
  lines[:, 1:] = pixels.reshape(height, -1)
  header = struct.pack(
    ">IIBBBBB", width, height, 8, 2 if colour else 0, 0, 0, 0
  )
  data = b"\x89PNG\r\n\x1a\n"
  data += _chunk(b"IHDR", header)
  data += _chunk(b"IDAT", zlib.compress(lines.tobytes()))
  data += _chunk(b"IEND", b"")
  source = base64.b64encode(data).decode("ascii")
  return (
    f'<img src="data:image/png;base64,{source}" width="{width}" '
    f'height="{height}" alt="{html.escape(alt)}">'
  )


def _chunk(kind: bytes, data: bytes) -> bytes:
  check = zlib.crc32(kind + data)
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def lines(
  title: str,
  series: Mapping[str, Mapping[str, Any]],
  order: Sequence[str],
  over: str = "step",
) -> str:
  """A figure of curves over steps, with a legend.

  The value axis is logarithmic where values are positive and span more than a
  factor of 30; the caption says so, and how many points are not finite.

  Args:
    title: of the panel.
    series: name -> {"step": numbers, "value": as many numbers}.
    order: all names of the page, so that a name has one colour throughout.
    over: what `step` is; anything else than steps is drawn logarithmic.

  Raises:
    ValueError: if a series is empty or its lists differ in length.
  """
  curves, lost = {}, 0
  for name, points in series.items():
    step = np.asarray(points["step"], np.float64)
    value = np.asarray(points["value"], np.float64)
    if step.ndim != 1 or step.shape != value.shape or not len(step):
      raise ValueError(
        f"curve {title!r}, {name!r} has step {step.shape} and value "
        f"{value.shape}; they should be lists of one length, not empty"
      )
    fine = np.isfinite(step) & np.isfinite(value)
    lost += int((~fine).sum())
    curves[name] = (step[fine], value[fine])
  steps = np.concatenate([step for step, _ in curves.values()] or [np.zeros(1)])
  values = np.concatenate([v for _, v in curves.values()] or [np.zeros(1)])
  if not len(values):
    steps, values = np.zeros(1), np.zeros(1)
  low, high = values.min(), values.max()
  log = bool(low > 0 and high / low > _LOG_RATIO)
  x_log = bool(over != "step" and steps.min() > 0 and steps.max() > steps.min())
  x_of, x_ticks = _axis(steps.min(), steps.max(), x_log, _LEFT, _WIDTH - _RIGHT)
  y_of, y_ticks = _axis(low, high, log, _HEIGHT - _BOTTOM, _TOP, round_out=True)
  marks = [_grid(x_of, x_ticks, y_of, y_ticks, over, (_WIDTH, _HEIGHT))]
  legend = []
  for name, (step, value) in curves.items():
    i = order.index(name)
    style = f'class="line s{i % COLOURS}"'
    dash = _DASHES[i % len(_DASHES)]
    style += f' stroke-dasharray="{dash}"' if dash else ""
    shown = _thin(value)
    points_text = " ".join(
      f"{x_of(x):.1f},{y_of(y):.1f}"
      for x, y in zip(step[shown], value[shown], strict=True)
    )
    marks.append(f'<polyline {style} points="{points_text}"/>')
    if len(step) == 1:  # a line needs two points
      x, y = x_of(step[0]), y_of(value[0])
      marks.append(f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    last = number(float(f"{value[-1]:.4g}")) if len(value) else "no value"
    legend.append(
      f'<li><svg viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
      f'<polyline {style} points="0,4 28,4"/></svg> {html.escape(name)} '
      f'<span class="quiet">last {last}</span></li>'
    )
  notes = ["Logarithmic scale."] if log else []
  notes += [f"{lost} values that are not finite are left out."] if lost else []
  described = f"{title} over {over}s: " + ", ".join(curves)
  return (
    f"<figure><figcaption>{html.escape(title)}"
    f'<span class="quiet"> {" ".join(notes)}</span></figcaption>'
    f"{_svg(_WIDTH, _HEIGHT, described, marks)}"
    f'<ul class="legend">{"".join(legend)}</ul></figure>'
  )


def means(
  title: str, curves: Mapping[str, Mapping[float, Sequence[float]]], over: str
) -> str:
  """A figure of the means of `tables.curves`, see `lines`."""
  series = {
    name: {
      "step": sorted(points),
      "value": [float(np.mean(points[x])) for x in sorted(points)],
    }
    for name, points in curves.items()
  }
  return lines(title, series, list(series), over)


def _thin(value: np.ndarray) -> np.ndarray:
  """Which points to draw of many: the extremes of each stretch, so no spike."""
  if len(value) <= _MAX_POINTS:
    return np.arange(len(value))
  parts = np.array_split(np.arange(len(value)), _MAX_POINTS // 2)
  picks = [p[[value[p].argmin(), value[p].argmax()]] for p in parts]
  return np.unique(np.concatenate([[0, len(value) - 1], *picks]))


def strip(
  values: Sequence[float],
  paper: float | None,
  limits: tuple[float, float],
  label: str,
) -> str:
  """One row's seeds as dots, their mean as a bar, the paper as a diamond."""
  x_of, _ = _axis(*limits, False, 8, 172)
  mean = x_of(float(np.mean(values)))
  marks = ['<path class="axis" d="M4,12H176"/>']
  marks += [
    f'<circle class="dot" cx="{x_of(v):.1f}" cy="12" r="3.5"/>' for v in values
  ]
  marks.append(f'<path class="mean" d="M{mean:.1f},3V21"/>')
  if paper is not None:
    x = x_of(paper)
    marks.append(f'<path class="paper" d="M{x:.1f},6l6,6l-6,6l-6,-6z"/>')
  return _svg(180, 24, label, marks)


def bars(values: Sequence[float], marked: int, title: str) -> str:
  """Probabilities as bars, each class below its own, `marked` in colour.

  Of more than ten classes only the marked and the largest are shown. The
  largest bar has full height.
  """
  shown = sorted(
    sorted(range(len(values)), key=lambda c: (c != marked, -values[c]))[:10]
  )
  width = 130 / max(len(shown), 1)
  top = max(values) or 1.0
  marks = ['<path class="axis" d="M0,56H130"/>']
  for i, c in enumerate(shown):
    height = 54 * values[c] / top
    marks.append(
      f'<rect class="{"marked" if c == marked else "bar"}" '
      f'x="{i * width + 1:.1f}" y="{56 - height:.1f}" width="{width - 2:.1f}" '
      f'height="{height:.1f}"/>'
      f'<text x="{(i + 0.5) * width:.1f}" y="67" text-anchor="middle">'
      f"{c}</text>"
    )
  best = sorted(range(len(values)), key=lambda c: -values[c])[:3]
  texts = [f"{c}: {_percent(values[c])}" for c in best]
  alt = f"{title}, class {', '.join(texts)}"
  return (
    f'<div class="probabilities"><b>{html.escape(title)}</b>'
    f"{_svg(130, 70, alt, marks)}"
    f'<span class="quiet">{"<br>".join(map(html.escape, texts))}</span></div>'
  )


def _percent(probability: float) -> str:
  return "<0.1%" if 0 < probability < 5e-4 else f"{probability:.1%}"


def reliability(title: str, curve: Mapping[str, Sequence[float]]) -> str:
  """A reliability diagram of `calibration.reliability`'s data."""
  size = 240
  x_of, ticks = _axis(0.0, 1.0, False, _LEFT, size - _RIGHT)
  y_of, _ = _axis(0.0, 1.0, False, size - _BOTTOM, _TOP)
  marks = [_grid(x_of, ticks, y_of, ticks, "confidence", (size, size))]
  keys = ("lower", "upper", "accuracy", "confidence", "count")
  for low, high, accuracy, _, _ in zip(*(curve[k] for k in keys), strict=True):
    x, y = x_of(low), y_of(accuracy)
    marks.append(
      f'<rect class="s0 filled" x="{x:.1f}" y="{y:.1f}" '
      f'width="{max(x_of(high) - x - 1, 1):.1f}" '
      f'height="{y_of(0.0) - y:.1f}"/>'
    )
  marks.append(
    f'<path class="ideal" d="M{x_of(0):.1f},{y_of(0):.1f}'
    f'L{x_of(1):.1f},{y_of(1):.1f}"/>'
  )
  gaps = np.abs(np.subtract(curve["accuracy"], curve["confidence"]))
  gap = float(np.average(gaps, weights=curve["count"]))
  text = f"{title}: average gap between accuracy and confidence {gap:.4f}"
  return (
    f'<figure class="square"><figcaption>{html.escape(title)}'
    f'<span class="quiet"> average gap {gap:.4f}</span></figcaption>'
    f"{_svg(size, size, text, marks)}</figure>"
  )


def _svg(width: int, height: int, title: str, marks: Sequence[str]) -> str:
  return (
    f'<svg viewBox="0 0 {width} {height}" role="img">'
    f"<title>{html.escape(title)}</title>{''.join(marks)}</svg>"
  )


def _axis(
  low: float,
  high: float,
  log: bool,
  start: float,
  end: float,
  *,
  round_out: bool = False,
) -> tuple[Map, list[float]]:
  """A map from values to places between `start` and `end`, and its ticks."""
  if log:
    a, b = math.log10(low), math.log10(high)
    decades = range(math.floor(a), math.ceil(b) + 1)
    every = max(1, len(decades) // 5)
    ticks = [10.0**k for k in list(decades)[::every] if a <= k <= b]
    return (
      lambda v: start + (math.log10(v) - a) / (b - a) * (end - start)
    ), ticks
  if high == low:
    pad = abs(low) / 2 or 0.5
    low, high = low - pad, high + pad
  rough = (high - low) / 4
  power = 10.0 ** math.floor(math.log10(rough))
  unit = next(u for u in (1, 2, 5, 10) if u * power >= rough * 0.999) * power
  if round_out:
    low = math.floor(low / unit + 1e-9) * unit
    high = math.ceil(high / unit - 1e-9) * unit
  first = math.ceil(low / unit - 1e-9)
  last = math.floor(high / unit + 1e-9)
  ticks = [k * unit for k in range(first, last + 1)]
  return (lambda v: start + (v - low) / (high - low) * (end - start)), ticks


def _grid(
  x_of: Map,
  x_ticks: Sequence[float],
  y_of: Map,
  y_ticks: Sequence[float],
  x_name: str,
  size: tuple[int, int],
) -> str:
  """Grid lines, tick labels and the name of the x axis."""
  width, height = size
  right, bottom = width - _RIGHT, height - _BOTTOM
  marks = [
    f'<path class="grid" d="M{_LEFT},{y_of(v):.1f}H{right}"/>'
    f'<text x="{_LEFT - 5}" y="{y_of(v) + 4:.1f}" text-anchor="end">'
    f"{number(v)}</text>"
    for v in y_ticks
  ]
  marks += [
    f'<text x="{x_of(v):.1f}" y="{bottom + 14}" text-anchor="middle">'
    f"{number(v)}</text>"
    for v in x_ticks
  ]
  marks.append(
    f'<path class="axis" d="M{_LEFT},{_TOP}V{bottom}H{right}"/>'
    f'<text x="{(_LEFT + right) / 2:.0f}" y="{height - 5}" '
    f'text-anchor="middle">{html.escape(x_name)}</text>'
  )
  return "".join(marks)
