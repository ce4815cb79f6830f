"""What a divergence of two heads with a large vocabulary costs.

One training step's worth: the mean over tokens and its gradients for the
student's hidden states and head, with a frozen teacher. From the logits of all
tokens; some tokens at a time with the logits computed twice, as one value per
token needs it; and with the gradients computed along with the sum. The memory
is XLA's own count of what the program needs beside its arguments and results.

At 128k words the logits of all tokens need more memory than many machines have
(`temporaries` says how much), and a round takes minutes: ask for few.

Run: python -m benchmarks.run linear_kl linear_reverse_kl linear_jsd
     python -m benchmarks.run linear_kl_128k --blocks 3 --rounds 1
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run import Benchmark
from kd_jax import losses

# name -> (tokens, words of the vocabulary, width of both hidden states, tokens
# in a chunk: an eighth and less of all logits' memory)
SIZES = {
  "32k": (1024, 32_000, 256, 256),
  "128k": (4096, 131_072, 512, 128),
  # For `jsd`, which asks for 32 GiB with all logits of twice as many.
  "128k_2048": (2048, 131_072, 512, 128),
}


def benchmark(divergence: str, size: str = "32k") -> Benchmark:
  tokens, vocab, width, chunk = SIZES[size]
  rng = np.random.default_rng(0)
  shapes = [(tokens, width), (width, vocab)] * 2
  arrays = [
    # Logits with a deviation of 2, whatever the width.
    jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
    for shape, scale in zip(shapes, [1.0, 2.0 / width**0.5] * 2, strict=True)
  ]
  function = getattr(losses, divergence)
  options = {"divergence": function, "chunk_size": chunk}

  def plain(
    student: jax.Array, head: jax.Array, teacher: jax.Array, known: jax.Array
  ) -> jax.Array:
    return function(student @ head, teacher @ known).mean()

  def twice(*arrays: jax.Array) -> jax.Array:
    return losses.linear_divergence(*arrays, **options).mean()

  def once(*arrays: jax.Array) -> jax.Array:
    return losses.linear_divergence_sum(*arrays, **options) / tokens

  programs = {
    name: jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    .lower(*arrays)
    .compile()
    for name, mean in {
      "logits of all tokens": plain,
      "chunks, logits twice": twice,
      "chunks, gradients with the loss": once,
    }.items()
  }

  def form(program: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(program(*arrays))

  everything, again, together = programs
  return Benchmark(
    title=f"Two heads with a large vocabulary: {divergence}"
    + (size != "32k") * f", {vocab // 1024}k words",
    base=everything,
    forms={name: form(program) for name, program in programs.items()},
    claims=(
      (
        "gradients with the loss take less time than logits twice",
        *(together, again, "lower"),
      ),
      (
        "gradients with the loss take less time than all logits at once",
        *(together, everything, "lower"),
      ),
    ),
    data={
      "tokens": tokens,
      "vocabulary": vocab,
      "width of both hidden states": width,
      "tokens in a chunk": chunk,
      "dtype": "float32",
      "logits of one model": f"{4 * tokens * vocab / 2**20:.0f} MiB",
    },
    bytes={
      name: program.memory_analysis().temp_size_in_bytes
      for name, program in programs.items()
    },
    source="Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989",
  )
