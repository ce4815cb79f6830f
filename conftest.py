"""What every test process needs before it imports jax."""

import os
import pathlib
import sys

from hypothesis import settings

_ROOT = pathlib.Path(__file__).parent
_FLAGS = {
  "--xla_force_host_platform_device_count": 8,
  # Most of a test's time is compilation: these save a third. To test what is
  # compiled as for users: XLA_FLAGS="--xla_backend_optimization_level=3
  # --xla_cpu_use_fusion_emitters=true" make test
  "--xla_backend_optimization_level": 1,
  "--xla_cpu_use_fusion_emitters": "false",
}
_PYTHON = "{}.{}".format(*sys.version_info)
_CACHE = _ROOT / ".cache" / f"jax-py{_PYTHON}"


def _prepare_environment() -> None:
  """Sets defaults; what the caller has set in the environment stays."""
  flags = os.environ.get("XLA_FLAGS", "")
  for flag, value in _FLAGS.items():
    if flag not in flags:
      flags = f"{flags} {flag}={value}".strip()
  os.environ["XLA_FLAGS"] = flags
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  # XLA sizes its thread pool by this. With fewer threads than devices in
  # flight, a collective can wait for a thread for ever, and XLA then aborts.
  os.environ.setdefault("NPROC", "16")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


_prepare_environment()

# The same examples in every run, and no time limit: the first example of a
# test pays for compilation.
settings.register_profile(
  "kd_jax", deadline=None, derandomize=True, database=None
)
settings.load_profile("kd_jax")
