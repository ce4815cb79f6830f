"""SIGTERM: a pre-emption gives half a minute, whatever the program is doing.

Python runs a signal's handler between two of its own instructions. While XLA
compiles or computes for minutes, there is none, and the machine would be gone
before. So the signal also wakes a thread, which gives the loop some time to
stop by itself and then saves in its place.
"""

from collections.abc import Callable
import os
import select
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 143  # 128 + SIGTERM, as shells say it
# Seconds that the loop has to come to the end of its step.
GRACE = 10.0


class Sigterm:
  """While it is open, SIGTERM asks the loop to stop instead of killing it.

  A second signal changes nothing. Outside of the main thread it does nothing,
  since signals are not delivered there. Of several processes one gets the
  signal and all stop at the same step: JAX's own service hears it there.

  Attributes:
    received: whether SIGTERM has come to this process.
  """

  def __init__(self, rescue: Callable[[], None]):
    """Opens with `with`.

    Args:
      rescue: saves what would be lost; called from another thread if the loop
        has not left `GRACE` seconds after the signal. Then the process ends.
    """
    self.received = False
    self._rescue = rescue
    main = threading.current_thread() is threading.main_thread()
    self._on = main and jax.process_count() == 1
    self._left = threading.Event()

  def stops(self, step: int) -> bool:
    """Whether the loop should save and leave after this step.

    It then leaves with `SystemExit(EXIT_CODE)`. Every process asks after the
    same steps, and gets the same answer.
    """
    if jax.process_count() == 1:
      return self.received
    return multihost_utils.reached_preemption_sync_point(step)

  def __enter__(self) -> "Sigterm":
    if not self._on:
      return self
    self._old = signal.signal(signal.SIGTERM, self._handle)
    self._ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    self._theirs = theirs
    self._old_fd = signal.set_wakeup_fd(
      theirs.fileno(), warn_on_full_buffer=False
    )
    self._thread = threading.Thread(
      target=self._watch, name="sigterm", daemon=True
    )
    self._thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if not self._on:
      return
    self._left.set()
    signal.set_wakeup_fd(self._old_fd)
    signal.signal(signal.SIGTERM, self._old)
    self._theirs.close()  # wakes the thread
    self._thread.join()
    self._ours.close()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self.received = True

  def _watch(self) -> None:
    while not self._left.is_set():
      select.select([self._ours], [], [])
      data = self._ours.recv(64)
      if not data:
        return
      if signal.SIGTERM in data:
        self.received = True
        break
    if self._left.wait(GRACE):
      return
    code: Any = EXIT_CODE
    try:
      self._rescue()
    except Exception as error:
      line = " ".join(str(error).split())
      print(f"error: SIGTERM: nothing saved: {line}", file=sys.stderr)
      code = 1
    sys.stderr.flush()
    os._exit(code)
