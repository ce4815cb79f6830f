"""Prints what `linear_divergence` saves in memory and costs in time.

One training step's worth, the mean loss and its gradients for both hidden
states and the student's head (the teacher's is frozen), compiled once from the
logits of all tokens and once for each chunk size. The forms take turns, so that
a busy moment of the machine hits all of them. The memory is XLA's own count of
what the program needs beside its arguments and results.

Run: python -m benchmarks.linear_divergence --tokens 4096 --vocab 32000
"""

import argparse
from collections.abc import Callable
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from kd_jax.losses import divergences, linear_heads

_DIVERGENCES = {
  "kl": divergences.kl,
  "reverse_kl": divergences.reverse_kl,
  "jsd": divergences.jsd,
}

Loss = Callable[..., jax.Array]


def step(loss: Loss, arrays: list[jax.Array]) -> jax.stages.Compiled:
  """The compiled mean loss and its gradients, but for the teacher's head."""

  def mean(*arrays: jax.Array) -> jax.Array:
    return loss(*arrays).mean()

  run = jax.value_and_grad(mean, argnums=(0, 1, 2))
  return jax.jit(run).lower(*arrays).compile()


def seconds(run: jax.stages.Compiled, arrays: list[jax.Array]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run(*arrays))
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--tokens", type=int, default=2048)
  parser.add_argument("--vocab", type=int, default=8192)
  parser.add_argument("--student_width", type=int, default=128)
  parser.add_argument("--teacher_width", type=int, default=256)
  parser.add_argument("--chunk_sizes", type=int, nargs="+", default=[128, 512])
  parser.add_argument(
    "--dtype", choices=["float32", "bfloat16"], default="float32"
  )
  parser.add_argument("--divergence", choices=_DIVERGENCES, default="kl")
  parser.add_argument("--temperature", type=float, default=1.0)
  parser.add_argument("--rounds", type=int, default=5)
  options = parser.parse_args()

  shapes = [
    (options.tokens, options.student_width),
    (options.student_width, options.vocab),
    (options.tokens, options.teacher_width),
    (options.teacher_width, options.vocab),
  ]
  arrays = [
    # Logits with a deviation of 2 or so, whatever the widths.
    jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)
    * (2.0 / shape[0] ** 0.5 if i % 2 else 1.0)
    for i, shape in enumerate(shapes)
  ]
  arrays = [x.astype(options.dtype) for x in arrays]
  divergence = functools.partial(
    _DIVERGENCES[options.divergence], temperature=options.temperature
  )

  def plain(*arrays: jax.Array) -> jax.Array:
    hidden_s, head_s, hidden_t, head_t = arrays
    return divergence(hidden_s @ head_s, hidden_t @ head_t)

  forms: dict[str, Loss] = {"all tokens": plain}
  for chunk_size in options.chunk_sizes:
    forms[f"chunks of {chunk_size}"] = functools.partial(
      linear_heads.linear_divergence,
      divergence=divergence,
      chunk_size=chunk_size,
    )
  runs = {name: step(loss, arrays) for name, loss in forms.items()}
  times: dict[str, list[float]] = {name: [] for name in runs}
  for round_number in range(options.rounds + 1):
    for name, run in runs.items():
      taken = seconds(run, arrays)
      if round_number:  # The first one pays for the machine's caches.
        times[name].append(taken)

  logits = options.tokens * options.vocab * jnp.dtype(options.dtype).itemsize
  print(
    f"{options.divergence} of {options.tokens} tokens and {options.vocab} "
    f"classes in {options.dtype} on {jax.devices()[0].device_kind}; the logits "
    f"of one model are {logits / 2**20:.0f} MiB"
  )
  print(f"{'':18} {'loss':>9} {'temporary':>13} {'time':>11} {'of plain':>9}")
  base = statistics.median(times["all tokens"])
  for name, run in runs.items():
    loss, _ = run(*arrays)
    memory = run.memory_analysis()
    assert memory is not None, "this platform does not count its memory"
    temporary = memory.temp_size_in_bytes
    median = statistics.median(times[name])
    print(
      f"{name:18} {loss:9.5f} {temporary / 2**20:9.1f} MiB "
      f"{1e3 * median:8.1f} ms {median / base:9.2f}"
    )


if __name__ == "__main__":
  main()
