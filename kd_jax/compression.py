"""What a model costs: parameters, bytes, FLOPs and latency."""

from collections.abc import Callable, Mapping
import math
import time
from typing import Any

import jax
import numpy as np

# What `ratios` compares; each is better when smaller.
COSTS = (
  "parameters",
  "bytes",
  "flops",
  "temp_bytes",
  "latency_ms_p50",
  "latency_ms_p95",
)


def cost(
  fn: Callable[[Any, Any], Any],
  variables: Any,
  inputs: Any,
  *,
  repeats: int = 50,
  warmup: int = 5,
) -> dict[str, float | None]:
  """Measures one call of `fn(variables, inputs)`, compiled.

  FLOPs and memory are what the compiler says of its own program on this
  device, for the whole batch; operations that it hands to a library may be
  missing from them. Latency is the time from the call until the result is
  ready, with everything on the device beforehand, so it includes the dispatch
  but no transfer from the host. Other work on the machine shows in it.

  Args:
    fn: pure function of (variables, inputs).
    variables: pytree of arrays. If it is a mapping with "params", parameters
      are counted in there; bytes always count all of it, with statistics.
    inputs: array or pytree of arrays with an equal leading axis, the batch.
    repeats: timed calls.
    warmup: untimed calls before them.

  Returns:
    `parameters` (count), `bytes` (of `variables` as stored), `flops` (a call),
    `temp_bytes` (the program's scratch memory), `latency_ms_p50`,
    `latency_ms_p95`, `batch_size`, `repeats`. None for what the compiler does
    not say.

  Raises:
    ValueError: if `repeats` is not positive, `warmup` is negative or the inputs
      have no common leading axis.
  """
  if repeats < 1 or warmup < 0:
    raise ValueError(
      f"repeats is {repeats} and warmup {warmup}; they should be at least 1 "
      "and 0"
    )
  sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
  if len(sizes) != 1 or sizes == {()}:
    raise ValueError("inputs should be arrays with one common leading axis")
  variables, inputs = jax.device_put((variables, inputs))
  compiled = jax.jit(fn).lower(variables, inputs).compile()
  for _ in range(warmup):
    jax.block_until_ready(compiled(variables, inputs))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(compiled(variables, inputs))
    seconds.append(time.perf_counter() - start)
  p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
  counted = variables
  if isinstance(variables, Mapping) and "params" in variables:
    counted = variables["params"]
  return {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(counted)),
    "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(variables)),
    "flops": _flops(compiled),
    "temp_bytes": _temp_bytes(compiled),
    "latency_ms_p50": float(p50),
    "latency_ms_p95": float(p95),
    "batch_size": sizes.pop()[0],
    "repeats": repeats,
  }


def ratios(
  teacher_cost: Mapping[str, float | None],
  student_cost: Mapping[str, float | None],
) -> dict[str, float | None]:
  """How many times less the student costs: teacher / student.

  Args:
    teacher_cost: from `cost`.
    student_cost: from `cost`, with the same batch size.

  Returns:
    One number for each of `COSTS`; None where either side is unknown or the
    student's is 0.

  Raises:
    ValueError: if both state a batch size and they differ.

  Example:
    >>> ratios({"parameters": 12}, {"parameters": 4})["parameters"]
    3.0
  """
  sizes = teacher_cost.get("batch_size"), student_cost.get("batch_size")
  if None not in sizes and sizes[0] != sizes[1]:
    raise ValueError(
      f"the teacher was measured with batch_size {sizes[0]} and the student "
      f"with {sizes[1]}; they should be the same"
    )
  result: dict[str, float | None] = {}
  for name in COSTS:
    teacher, student = teacher_cost.get(name), student_cost.get(name)
    if teacher is None or student is None or student == 0:
      result[name] = None
    else:
      result[name] = teacher / student
  return result


def _flops(compiled: Any) -> float | None:
  """FLOPs by the compiler's own count, if it has one."""
  try:
    analysis = compiled.cost_analysis()
  except NotImplementedError:  # Not every backend has one.
    return None
  # A dict, or by JAX's version a list with one for each program; or nothing.
  parts = analysis if isinstance(analysis, list | tuple) else [analysis]
  counts = [part.get("flops") for part in parts if part]
  if not counts or any(count is None for count in counts):
    return None
  total = float(sum(counts))
  # XLA says -1 for a count that it does not know.
  return total if math.isfinite(total) and total >= 0 else None


def _temp_bytes(compiled: Any) -> int | None:
  """Scratch memory of the compiled program, if the backend says."""
  try:
    analysis = compiled.memory_analysis()
  except NotImplementedError:
    return None
  size = getattr(analysis, "temp_size_in_bytes", None)
  return None if size is None else int(size)
