"""Memory that a process keeps for its next step."""

import ctypes
import os
import platform

# Options of mallopt, as in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep() -> bool:
  """Keeps the memory that is freed, instead of giving it back to the system.

  For a CPU. XLA asks for the temporary memory of a program at every call, as
  one block, and glibc gives large blocks back as soon as they are freed: at the
  next call the system has to clear them again, page by page. Where a step needs
  more than 32 MiB, that can be half of its time (benchmarks/kept_memory.py).

  Call it before the first array is made, since threads that have begun keep
  what they have; `kd_jax.cli` does. From then on the process does not shrink,
  and what it freed is there for any other part of it.

  Returns:
    Whether it was done: not where the C library is not glibc, nor where the
    environment has settings of its own (`MALLOC_...`, see `man mallopt`).

  Example:
    >>> from kd_jax import memory
    >>> memory.keep() in (True, False)
    True
  """
  own = any(name.startswith("MALLOC_") for name in os.environ)
  if own or platform.libc_ver()[0] != "glibc":
    return False
  library = ctypes.CDLL(None)
  # One arena for all threads: others have blocks of 64 MiB at most.
  options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
  return all([library.mallopt(*option) == 1 for option in options])
