"""How often something is due: by steps, by epochs or by the clock."""

import re
from time import monotonic

_UNITS = ("step", "epoch", "minute")


class Period:
  """When the loop evaluates, saves or logs.

  By the clock it begins when it is made, and again whenever it was due: a run
  that is taken up again waits a whole period.

  Attributes:
    steps: between two times; None if it goes by the clock, or never comes.
    seconds: between two times; None if it goes by steps, or never comes.
  """

  def __init__(
    self, name: str, every: int | str | None, steps_per_epoch: int | None = None
  ):
    """Reads a period.

    Args:
      name: what to call it in the message.
      every: 500, "500 steps", "2 epochs", "0.5 epochs", "10 minutes"; None is
        never.
      steps_per_epoch: needed for epochs, which are rounded to whole steps.

    Raises:
      ValueError: if it is none of these, or not positive.
    """
    self.steps: int | None = None
    self.seconds: float | None = None
    if every is None:
      return
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*?)s?", str(every).strip())
    unit = (match[2] or "step") if match else ""
    number = float(match[1]) if match else 0.0
    whole = unit != "step" or number.is_integer()
    if unit not in _UNITS or number <= 0 or not whole:
      raise ValueError(
        f"{name} is {every!r}; it should be as 500, '500 steps', '2 epochs' or "
        "'10 minutes', and at least 1 step"
      )
    if unit == "minute":
      self.seconds = 60 * number
      self._since = monotonic()
    elif unit == "epoch":
      if steps_per_epoch is None:
        raise ValueError(f"{name} is {every!r}; there are no epochs here")
      self.steps = max(1, round(number * steps_per_epoch))
    else:
      self.steps = int(number)

  def end(self, step: int) -> float:
    """The next step after `step` at which this is due; infinity if unknown."""
    if self.steps is None:
      return float("inf")
    return (step // self.steps + 1) * self.steps

  def due(self, step: int) -> bool:
    """Whether it is due at the end of `step` (a clock then begins again)."""
    if self.steps is not None:
      return step % self.steps == 0
    if self.seconds is None:
      return False
    now = monotonic()
    if now - self._since < self.seconds:
      return False
    self._since = now
    return True
