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
import time
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 143  # 128 + SIGTERM, as shells say it
# Seconds that the loop has to come to the end of its step.
GRACE = 10.0
# Under this key JAX's service tells all processes of a signal to one of them;
# looked up every POLL seconds.
NOTICE = "RECEIVED_PREEMPTION_NOTICE"
POLL = 0.5


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
    self._alone = jax.process_count() == 1
    main = threading.current_thread() is threading.main_thread()
    self._on = main or not self._alone
    self._left = threading.Event()

  def stops(self, step: int) -> bool:
    """Whether the loop should save and leave after this step.

    It then leaves with `SystemExit(EXIT_CODE)`. Every process asks after the
    same steps, and gets the same answer.
    """
    if self._alone:
      return self.received
    return multihost_utils.reached_preemption_sync_point(step)

  def __enter__(self) -> "Sigterm":
    if not self._on:
      return self
    if self._alone:
      self._old = signal.signal(signal.SIGTERM, self._handle)
      self._ours, self._theirs = socket.socketpair()
      self._theirs.setblocking(False)
      self._old_fd = signal.set_wakeup_fd(
        self._theirs.fileno(), warn_on_full_buffer=False
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
    if self._alone:
      signal.set_wakeup_fd(self._old_fd)
      signal.signal(signal.SIGTERM, self._old)
      self._theirs.close()  # wakes the thread
    self._thread.join()
    if self._alone:
      self._ours.close()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self.received = True

  def _watch(self) -> None:
    heard = self._signalled if self._alone else self._announced
    if not heard() or self._left.wait(GRACE):
      return
    code: Any = EXIT_CODE
    try:
      self._rescue()
    except Exception as error:
      line = " ".join(str(error).split())
      print(f"error: SIGTERM: nothing saved: {line}", file=sys.stderr)
      code = 1
    sys.stderr.flush()
    if not self._alone and jax.process_index() == 0:
      time.sleep(1)  # the service ends with it, and the others with that
    os._exit(code)

  def _signalled(self) -> bool:
    """Waits for a signal to this process, or for the end of the loop."""
    while True:
      select.select([self._ours], [], [])
      data = self._ours.recv(64)
      if signal.SIGTERM in data:
        self.received = True
      if signal.SIGTERM in data or not data:
        return bool(data)

  def _announced(self) -> bool:
    """Waits for a signal to any of the processes, likewise."""
    from jax._src import distributed  # there is no public way, as yet

    service: Any = distributed.global_state.client
    while not self._left.wait(POLL):
      try:
        service.key_value_try_get(NOTICE)
        return True
      except jax.errors.JaxRuntimeError:  # no such key yet
        continue
    return False
