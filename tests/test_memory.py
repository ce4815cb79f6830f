"""Memory that is kept: what the system has to clear again at each call."""

import os
import subprocess
import sys

import jax
import pytest

from kd_jax import memory

# The pages that a call of a program with 32 MiB of temporary memory costs, when
# the blocks have found their places.
PROGRAM = """
import resource
import jax
import jax.numpy as jnp
from kd_jax import memory

done = memory.keep() if {keep} else None
x = jnp.ones((2048, 2048))
run = jax.jit(lambda x: (jax.nn.softmax(x) * jax.nn.log_softmax(2 * x)).sum())
for _ in range(40):
  run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
  run(x).block_until_ready()
after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(done, (after - before) / 10)
"""


def pages(keep, **more):
  env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
  command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
  done = subprocess.run(
    command, env=env | more, check=True, capture_output=True, text=True
  )
  said, count = done.stdout.split()
  return said, float(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_a_step_finds_the_memory_of_the_last_one():
  said, kept = pages(True)
  assert said == "True"
  _, given_back = pages(False)
  assert given_back > 4096  # 16 MiB, one of its arrays
  assert kept < given_back / 4


def test_settings_of_the_environment_stay(monkeypatch):
  monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
  monkeypatch.setattr(memory, "_has_devices", lambda: False)
  assert memory.keep() is False
  monkeypatch.delenv("MALLOC_ARENA_MAX")
  monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("musl", "1"))
  assert memory.keep() is False


def test_it_is_too_late_once_there_are_devices():
  count = len(jax.devices())
  assert memory.keep() is False
  assert jax.config.jax_num_cpu_devices == -1
  assert len(jax.devices()) == count
