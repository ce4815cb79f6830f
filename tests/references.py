"""Losses in float64 NumPy, written from the equations, for one example a row.

Plain formulas, on purpose: they are evaluated where they are accurate, and
share neither code nor tricks with the library.
"""

from collections.abc import Callable

import numpy as np


def log_softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
  z = np.asarray(z, np.float64) / temperature
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl_of_logs(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
  return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def kl(
  student: np.ndarray,
  teacher: np.ndarray,
  temperature: float = 1.0,
  teacher_temperature: float | None = None,
) -> np.ndarray:
  log_q = log_softmax(student, temperature)
  log_p = log_softmax(teacher, teacher_temperature or temperature)
  return temperature**2 * kl_of_logs(log_p, log_q)


def reverse_kl(
  student: np.ndarray,
  teacher: np.ndarray,
  temperature: float = 1.0,
  teacher_temperature: float | None = None,
) -> np.ndarray:
  log_q = log_softmax(student, temperature)
  log_p = log_softmax(teacher, teacher_temperature or temperature)
  return temperature**2 * kl_of_logs(log_q, log_p)


def jsd(
  student: np.ndarray,
  teacher: np.ndarray,
  temperature: float = 1.0,
  teacher_temperature: float | None = None,
  beta: float = 0.5,
) -> np.ndarray:
  log_q = log_softmax(student, temperature)
  log_p = log_softmax(teacher, teacher_temperature or temperature)
  log_m = np.log(beta * np.exp(log_p) + (1 - beta) * np.exp(log_q))
  return temperature**2 * (
    beta * kl_of_logs(log_p, log_m) + (1 - beta) * kl_of_logs(log_q, log_m)
  )


def cross_entropy(
  student: np.ndarray, targets: np.ndarray, smoothing: float = 0.0
) -> np.ndarray:
  """`targets` are distributions."""
  targets = (1 - smoothing) * targets + smoothing / targets.shape[-1]
  return -(targets * log_softmax(student)).sum(-1)


def gradient(
  function: Callable[[np.ndarray], np.ndarray],
  x: np.ndarray,
  step: float = 1e-5,
) -> np.ndarray:
  """Central differences of the summed function, in float64.

  The error is about 1e-10 for values and derivatives of order 1.
  """
  x = np.asarray(x, np.float64)
  result = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    high, low = x.copy(), x.copy()
    high[index] += step
    low[index] -= step
    result[index] = (function(high) - function(low)).sum() / (2 * step)
  return result
