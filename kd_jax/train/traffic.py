"""What the devices send each other in a compiled step."""

import math
import re
from typing import NamedTuple

KINDS = (
  "all-reduce",
  "all-gather",
  "all-to-all",
  "reduce-scatter",
  "collective-permute",
)
_CALL = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")


class Collective(NamedTuple):
  """One exchange between devices.

  Attributes:
    kind: one of `KINDS`.
    bytes: of its result, on each device.
  """

  kind: str
  bytes: int


def collectives(program: str) -> list[Collective]:
  """The exchanges of a compiled program, in the order of its text.

  One in a loop is listed once. A backend that starts an exchange and ends it
  later may list operands in its result, and so more bytes; on a CPU none does.

  Args:
    program: `compiled.as_text()`, where `compiled` is what
      `jax.jit(f).lower(...).compile()` returns.

  Returns:
    One entry for each.

  Example:
    >>> collectives("%a = (f32[24,10]{1,0}, bf16[4]{0}) all-reduce(%x, %y)")
    [Collective(kind='all-reduce', bytes=968)]
  """
  return [
    Collective(kind, sum(_bytes(*found) for found in _ARRAY.findall(shapes)))
    for shapes, kind in _CALL.findall(program)
  ]


def _bytes(dtype: str, bits: str, shape: str) -> int:
  """Of an array such as f32[24,10]; bits is empty for pred."""
  count = math.prod(int(n) for n in shape.split(",") if n)
  return math.ceil(count * int(bits or 8) / 8)
