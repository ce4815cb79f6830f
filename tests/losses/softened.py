"""Calls losses on softened logits through few compiled programs.

Compilation is most of these tests' time. A loss has one program for all that
is asked of it: for one shape, [batch, tokens, classes], with its mask and all
its scalars traced, and with the gradients by everything.
"""

from collections.abc import Callable
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = (2, 2, 5)


def logits(
  seed: int, shape: tuple[int, ...] = SHAPE, scale: float = 2.0
) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=shape)).astype(np.float32)


def of_probabilities(rows: list[list[float]]) -> np.ndarray:
  """Logits of four distributions; -inf for 0, and for classes left out."""
  probabilities = np.zeros(SHAPE, np.float32)
  for index, row in zip(np.ndindex(SHAPE[:-1]), rows, strict=True):
    probabilities[index][: len(row)] = row
  with np.errstate(divide="ignore"):
    return np.log(probabilities)


def run(
  loss: Callable[..., jax.Array],
  student: np.ndarray,
  teacher: np.ndarray,
  where: np.ndarray | None = None,
  **options: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Values, and gradients by "student", "teacher" and the scalars' names.

  The teacher's temperature is the student's unless given.
  """
  defaults = {
    key: parameter.default
    for key, parameter in inspect.signature(loss).parameters.items()
  }
  scalars = {key: x for key, x in defaults.items() if isinstance(x, float)}
  static = {
    key: x
    for key, x in options.items()
    if isinstance(x, str) and x != defaults[key]
  }
  scalars |= {k: x for k, x in options.items() if not isinstance(x, str)}
  scalars.setdefault("teacher_temperature", scalars["temperature"])
  values, grads = _program(loss, tuple(sorted(static.items())))(
    {"student": jnp.asarray(student), "teacher": jnp.asarray(teacher)}
    | {key: jnp.float32(x) for key, x in scalars.items()},
    np.ones(SHAPE[:-1], bool) if where is None else where,
  )
  return np.asarray(values), {key: np.asarray(x) for key, x in grads.items()}


def values(*arguments: Any, **options: Any) -> np.ndarray:
  return run(*arguments, **options)[0]


@functools.cache
def _program(
  loss: Callable[..., jax.Array], static: tuple[tuple[str, str], ...]
) -> Callable[..., Any]:
  @jax.jit
  def program(varied, where):
    def total(varied):
      scalars = dict(varied)
      inputs = scalars.pop("student"), scalars.pop("teacher")
      values = loss(*inputs, where=where, **scalars, **dict(static))
      return values.sum(), values

    grads, values = jax.grad(total, has_aux=True)(varied)
    return values, grads

  return program
