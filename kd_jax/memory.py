"""Memory that a process keeps for its next step."""

import ctypes
import os
import platform

import jax

# Options of mallopt, as in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep() -> bool:
  """Keeps the memory that is freed, instead of giving it back to the system.

  For a CPU. XLA asks for the temporary memory of a program at every call, as
  one block, and glibc gives large blocks back as soon as they are freed: at the
  next call the system has to clear them again, page by page. Where a step needs
  more than 32 MiB, that can be half of its time (benchmarks/kept_memory.py).

  Programs then run in the thread that calls them, whose memory can grow; that
  of JAX's own threads comes in blocks of at most 64 MiB. So a call returns when
  the program has ended, and what Python does between two steps is no longer
  done beside the first of them. Programs for several devices still run in
  threads of their own, and gain less.

  Call it before the first array is made, and after
  `jax.distributed.initialize`; `kd_jax.cli` does. From then on the process does
  not shrink: what compiling took stays, and there may come to be twice the
  memory of the largest program. Where that is too much, MALLOC_ARENA_MAX=8 in
  the environment leaves all as it was.

  Returns:
    Whether it was done: not where JAX has made its devices already or runs on
    an accelerator (only programs for the CPU beside it then run in the thread
    that calls them), the C library is not glibc, or the environment has
    settings of its own (`MALLOC_...`, see `man mallopt`).

  Example:
    >>> from kd_jax import memory
    >>> memory.keep() in (True, False)
    True
  """
  own = any(name.startswith("MALLOC_") for name in os.environ)
  if own or platform.libc_ver()[0] != "glibc" or _has_devices():
    return False
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if jax.default_backend() != "cpu":
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return mallopt(_MMAP_MAX, 0) == mallopt(_TRIM_THRESHOLD, -1) == 1


def _has_devices() -> bool:
  """Whether JAX has made its devices: their number cannot change then."""
  count = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
  try:
    jax.config.update("jax_num_cpu_devices", abs(count) + 1)
  except RuntimeError:
    return True
  jax.config.update("jax_num_cpu_devices", count)
  return False
