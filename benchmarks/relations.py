"""What the angles of all triplets of a batch cost.

The loss of RKD and its gradient for the student: from all cosines at once, as
the equation is usually written in code, and as `losses.rkd_angle` has it.

The time grows with the cube of the batch, the memory with its square:
`rkd_angle_4096` has a batch whose cosines alone would be 256 GiB, all at once,
beside one of a quarter of it.

Run: python -m benchmarks.run rkd_angle
     python -m benchmarks.run rkd_angle_4096 --blocks 1 --rounds 1
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run import Benchmark
from kd_jax import losses

N, WIDTH = 256, 64


def all_at_once(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """The mean over triplets, with the [N, N, N] cosines in memory."""

  def cosines(x: jax.Array) -> jax.Array:
    gaps = x[None] - x[:, None]
    size = jnp.sum(gaps**2, -1, keepdims=True)
    far = size > 0
    unit = jnp.where(far, gaps / jnp.sqrt(jnp.where(far, size, 1.0)), 0.0)
    return jnp.einsum("jid,jkd->jik", unit, unit)

  gap = jnp.abs(cosines(student) - cosines(teacher))
  return jnp.where(gap < 1.0, gap**2 / 2.0, gap - 0.5).mean()


def a_few(student: jax.Array, teacher: jax.Array) -> jax.Array:
  return losses.rkd_angle(student, teacher).mean()


def compiled(loss: Callable[..., jax.Array], n: int) -> tuple[Any, Any]:
  """The loss and its gradient for a batch of n, and such a batch."""
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, n, WIDTH))]
  return jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile(), arrays


def benchmark(n: str = "") -> Benchmark:
  if n:
    programs = {
      f"{size:,} examples": compiled(a_few, size)
      for size in (int(n) // 4, int(n))
    }
    title = f"The angles of all triplets of {int(n):,} examples"
  else:
    programs = {
      "all triplets at once": compiled(all_at_once, N),
      "losses.rkd_angle": compiled(a_few, N),
    }
    (one, _), (other, _) = (run(*arrays) for run, arrays in programs.values())
    if not abs(one - other) <= 1e-5 * abs(one):
      raise ValueError(f"the forms say {one} and {other}; they should agree")
    title = "The angles of all triplets"

  def form(program: Callable[..., Any], arrays: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(program(*arrays))

  base, own = programs
  return Benchmark(
    title=title,
    base=base,
    forms={name: form(*program) for name, program in programs.items()},
    claims=[]
    if n
    else [("a few at a time takes less time", own, base, "lower")],
    data={"width": WIDTH} if n else {"examples": N, "width": WIDTH},
    bytes={
      name: program.memory_analysis().temp_size_in_bytes
      for name, (program, _) in programs.items()
    },
    source="Park et al. 2019 (RKD), arXiv:1904.05068",
  )
