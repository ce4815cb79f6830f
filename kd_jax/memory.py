"""Memory that a process keeps for its next step."""

import ctypes
import os
import platform

import jax

# Options of mallopt, as in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep() -> bool:
  """Keeps the memory that is freed, instead of giving it back to the system.

  For a CPU. XLA asks for the temporary memory of a program at every call, as
  one block, and glibc gives large blocks back as soon as they are freed: at the
  next call the system has to clear them again, page by page. Where a step needs
  more than 32 MiB, that can be half of its time (benchmarks/kept_memory.py);
  steps of a few milliseconds gain nothing and may become slower.

  Call it before the first array is made, since threads that have begun keep
  their ways, and after `jax.distributed.initialize`; `kd_jax.cli` does. From
  then on the process does not shrink, and may grow to twice the memory of its
  largest program. Where that is too much, MALLOC_ARENA_MAX=8 in the environment
  leaves all as it was.

  Returns:
    Whether it was done: not where JAX runs on an accelerator, the C library is
    not glibc, or the environment has settings of its own (`MALLOC_...`, see
    `man mallopt`).

  Example:
    >>> from kd_jax import memory
    >>> memory.keep() in (True, False)
    True
  """
  own = any(name.startswith("MALLOC_") for name in os.environ)
  if own or platform.libc_ver()[0] != "glibc":
    return False
  mallopt = ctypes.CDLL(None).mallopt
  # The threads that JAX is about to start share one arena with all others:
  # more of them would have blocks of 64 MiB at most.
  one = mallopt(_ARENA_MAX, 1) == 1
  if jax.default_backend() != "cpu":
    return False
  return one and mallopt(_MMAP_MAX, 0) == mallopt(_TRIM_THRESHOLD, -1) == 1
