"""How much memory large losses ask for, as XLA counts it: compiled, not run.

The temporary bytes of a program are what it needs beside its arguments and its
results. Two heads with a vocabulary of 128k, for 4096 tokens: the mean over
tokens with its gradients for the student's hidden states and head. The angles
of a batch's triplets: the mean loss with its gradient for the student.

Run: python -m benchmarks.temporaries --json results/benchmarks/temporaries.json
"""

from collections.abc import Callable
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _common
from benchmarks.relations import all_at_once
from kd_jax import losses

TOKENS, VOCABULARY, WIDTH, CHUNK = 4096, 131_072, 512, 64
DIVERGENCES = ("kl", "reverse_kl", "jsd")
BATCHES = (512, 1024, 4096)


def temporary(mean: Callable[..., jax.Array], count: int, *arrays: Any) -> int:
  """Bytes of the mean's program with gradients for the first `count`."""
  function = jax.value_and_grad(mean, argnums=tuple(range(count)))
  program = jax.jit(function).lower(*arrays).compile()
  return program.memory_analysis().temp_size_in_bytes


def heads(
  name: str, dtype: Any, tokens: int, vocabulary: int, chunk: int
) -> tuple[int, int]:
  """The bytes of all logits at once, and of a chunk of tokens at a time."""
  shapes = [(tokens, WIDTH), (WIDTH, vocabulary)] * 2
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  divergence = getattr(losses, name)

  def plain(student: Any, head: Any, teacher: Any, known: Any) -> jax.Array:
    own, asked = (
      jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
      for hidden, kernel in ((student, head), (teacher, known))
    )
    return divergence(own, asked).mean()

  def chunked(*arrays: jax.Array) -> jax.Array:
    options = {"divergence": divergence, "chunk_size": chunk}
    return losses.linear_divergence_sum(*arrays, **options) / tokens

  return temporary(plain, 2, *arrays), temporary(chunked, 2, *arrays)


def angles(
  loss: Callable[..., jax.Array], n: int, width: int = 64
) -> tuple[int]:
  """The bytes of the angles' loss for a batch of n."""
  arrays = [jax.ShapeDtypeStruct((n, width), jnp.float32)] * 2
  return (temporary(lambda s, t: loss(s, t).mean(), 1, *arrays),)


def rows() -> dict[str, tuple[int, ...]]:
  """The bytes of every program, by name; of two the plain form comes first."""
  found: dict[str, Any] = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    for name in DIVERGENCES:
      key = f"{name}, {jnp.dtype(dtype).name}"
      found[key] = functools.partial(
        heads, name, dtype, TOKENS, VOCABULARY, CHUNK
      )
  first = BATCHES[0]
  found[f"rkd_angle plain, N = {first}"] = lambda: angles(all_at_once, first)
  for n in BATCHES:
    found[f"rkd_angle, N = {n}"] = functools.partial(
      angles, losses.rkd_angle, n
    )
  return {name: work() for name, work in found.items()}


def result(found: dict[str, tuple[int, ...]], seconds: float) -> dict[str, Any]:
  """The result file's content, see `kd_jax.result_file`."""
  table = []
  for name, bytes in found.items():
    row: dict[str, Any] = {"name": name, "values": [bytes[-1] / 2**20]}
    if len(bytes) == 2:
      row["details"] = {
        "all logits at once, MiB": [bytes[0] / 2**20],
        "of that": [bytes[1] / bytes[0]],
      }
    table.append(row)
  return _common.result(
    title="Temporary memory of large losses",
    command="python -m benchmarks.temporaries",
    data={
      "tokens": TOKENS,
      "vocabulary": VOCABULARY,
      "width of both hidden states": WIDTH,
      "tokens in a chunk": CHUNK,
      "width of what rkd_angle relates": 64,
    },
    metric={"name": "temporary memory", "unit": "MiB", "better": "lower"},
    rows=table,
    wall_seconds=seconds,
    notes=["Compiled for a CPU, not run."],
  )


def main() -> None:
  parser = _common.parser(__doc__)
  options = parser.parse_args()
  begin = time.time()
  found = rows()
  _common.show(result(found, time.time() - begin), options.json)


if __name__ == "__main__":
  main()
