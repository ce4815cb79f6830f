"""Looks through checkpoints: `python -m kd_jax.train.checkpoint verify DIR`."""

import logging
import sys

from kd_jax.errors import BadInput
from kd_jax.train.trained import verify


def main(argv: list[str]) -> int:
  """`verify DIR`: a line for each checkpoint; 1 if one is damaged."""
  if len(argv) != 3 or argv[1] != "verify":
    print(
      "usage: python -m kd_jax.train.checkpoint verify DIR", file=sys.stderr
    )
    return 2
  # Orbax warns of what is told below.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  try:
    found = verify(argv[2])
  except BadInput as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  for path, wrong in found.items():
    print(f"{path}: {wrong or 'good'}")
  return int(any(found.values()))


if __name__ == "__main__":
  sys.exit(main(sys.argv))
