"""Is one setting better than another? Means over seeds and their intervals."""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import numpy as np

MIN_SEEDS = 3
BETTER = ("lower", "higher")


class Summary(NamedTuple):
  """Mean, sample standard deviation (None for one value) and how many."""

  mean: float
  sd: float | None
  n: int


def summary(values: Sequence[float]) -> Summary:
  """Mean and spread of one number per seed.

  Args:
    values: at least one finite number.

  Returns:
    `Summary(mean, sd, n)`; the sd divides by n - 1.

  Raises:
    ValueError: if there is no value or one is not a finite number.

  Example:
    >>> summary([1.0, 3.0])
    Summary(mean=2.0, sd=1.4142135623730951, n=2)
  """
  checked = numbers(values, "values")
  if not checked:
    raise ValueError("values is empty; it should hold one number per seed")
  sd = float(np.std(checked, ddof=1)) if len(checked) > 1 else None
  return Summary(float(np.mean(checked)), sd, len(checked))


@functools.cache
def t_quantile(probability: float, df: float) -> float:
  """Quantile of Student's t distribution, for probabilities from 0.5 to 1.

  With t = sqrt(df) tan(u), P(0 < T < t) is proportional to the integral of
  cos(u)^(df - 1), which Gauss-Legendre quadrature gives to rounding.

  Args:
    probability: in [0.5, 1).
    df: degrees of freedom, from 1 to 1e6; need not be whole.

  Returns:
    The t below which T lies with that probability.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> round(t_quantile(0.975, 4), 3)
    2.776
  """
  if not 0.5 <= probability < 1:
    raise ValueError(f"probability is {probability}; it should be in [0.5, 1)")
  if not 1 <= df <= 1e6:
    raise ValueError(f"df is {df}; it should be in [1, 1e6]")
  nodes, weights = _quadrature()
  constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
  constant /= math.sqrt(math.pi)
  low, high = 0.0, math.pi / 2
  for _ in range(100):
    angle = (low + high) / 2
    inside = np.cos(angle * (nodes + 1) / 2) ** (df - 1)
    mass = constant * angle / 2 * float(weights @ inside)
    low, high = (angle, high) if mass < probability - 0.5 else (low, angle)
  return math.sqrt(df) * math.tan(angle)


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
  return np.polynomial.legendre.leggauss(128)


def compare(
  claim: str,
  a_values: Sequence[float],
  b_values: Sequence[float],
  expected: str = "lower",
  paired: bool = True,
  *,
  a: str = "a",
  b: str = "b",
  metric: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Tests a claim that was stated before the run: a is lower (higher) than b.

  The verdict is "reproduced" only if the whole 95% t interval of the mean
  difference a - b lies on the expected side, "not reproduced" if all of it lies
  on the other side, "within noise" if it holds zero, and "too few seeds" under
  three: it is never rounded up.

  Args:
    claim: what was expected, in words.
    a_values: one number per seed.
    b_values: one number per seed, of the same seeds in the same order if
      `paired`.
    expected: "lower" or "higher": where a should lie, seen from b.
    paired: differences seed by seed; else Welch's interval for two independent
      samples, which has no differences and no sd.
    a: name of what is compared, as in the rows.
    b: name of what it is compared with, the control as a rule.
    metric: as in a result, if the values are not the result's own metric.

  Returns:
    An entry for `comparisons` in a result.

  Raises:
    ValueError: if a value is not a finite number, there is none, paired lists
      differ in length, or `expected` is another word.
  """
  if expected not in BETTER:
    raise ValueError(f"expected is {expected!r}; it should be one of {BETTER}")
  first, second = summary(a_values), summary(b_values)
  seeds = min(first.n, second.n)
  differences: list[float] = []
  sd, half = None, None
  if paired:
    if first.n != second.n:
      raise ValueError(
        f"a_values has {first.n} values and b_values {second.n}; paired, they "
        "should be of the same seeds"
      )
    differences = [
      float(x) - float(y) for x, y in zip(a_values, b_values, strict=True)
    ]
    mean, sd, _ = summary(differences)
    if sd is not None:
      half = t_quantile(0.975, seeds - 1) * sd / math.sqrt(seeds)
  else:
    mean = first.mean - second.mean
    if first.sd is not None and second.sd is not None:
      half = _welch(first, second)
  ci95 = None if half is None else [mean - half, mean + half]
  return {
    "claim": claim,
    "a": a,
    "b": b,
    "expected": expected,
    "paired": paired,
    "n": seeds,
    "differences": differences,
    "mean": mean,
    "sd": sd,
    "ci95": ci95,
    "verdict": verdict(ci95, seeds, expected),
    **({"metric": dict(metric)} if metric else {}),
  }


def _welch(first: Summary, second: Summary) -> float:
  """Half the 95% interval of a difference of two independent means."""
  assert first.sd is not None and second.sd is not None
  u, v = first.sd**2 / first.n, second.sd**2 / second.n
  if u + v == 0:
    return 0.0
  df = (u + v) ** 2 / (u**2 / (first.n - 1) + v**2 / (second.n - 1))
  return t_quantile(0.975, df) * math.sqrt(u + v)


def verdict(ci95: Sequence[float] | None, seeds: int, expected: str) -> str:
  """The word for an interval of a - b; see `compare`."""
  if ci95 is None or seeds < MIN_SEEDS:
    return "too few seeds"
  low, high = ci95
  if low <= 0 <= high:
    return "within noise"
  return (
    "reproduced" if (high < 0) == (expected == "lower") else "not reproduced"
  )


def numbers(values: Sequence[Any], name: str) -> list[float]:
  """`values` as a list of finite floats.

  Raises:
    ValueError: naming the first entry of `name` that is no finite number.
  """
  result = []
  for i, value in enumerate(values):
    try:
      number = math.nan if isinstance(value, str | bool) else float(value)
    except TypeError:
      number = math.nan
    if not math.isfinite(number):
      raise ValueError(
        f"{name}[{i}] is {value!r}; it should be a finite number"
      )
    result.append(number)
  return result
