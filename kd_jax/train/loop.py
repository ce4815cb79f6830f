"""The training loop: progress, logs, evaluation, checkpoints, stopping."""

from collections.abc import Callable, Mapping
import contextlib
import json
import os
import pathlib
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from kd_jax.files import write_text
from kd_jax.results import duration
from kd_jax.train.checkpoints import Checkpoints
from kd_jax.train.parallel import Runner
from kd_jax.train.period import Period
from kd_jax.train.signals import EXIT_CODE, Sigterm
from kd_jax.train.state import TrainState
from kd_jax.train.workdir import MetricWriter, hash_ids

SETTLE = 0.05  # seconds between looks at the metrics, which wait for a device


def fit(
  runner: Runner,
  state: TrainState,
  frozen: Any,
  batches: Callable[[int], Mapping[str, np.ndarray]],
  *,
  num_steps: int,
  workdir: str | os.PathLike[str] | None = None,
  evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
  eval_every: int | str | None = None,
  save_every: int | str | None = None,
  log_every: int | str = 100,
  steps_per_epoch: int | None = None,
  title: str = "training",
  progress: bool = True,
) -> TrainState:
  """Trains up to step `num_steps`, going on from the newest checkpoint.

  Batch number `step` is a pure function of the step, so the state alone says
  where a run is. The same call after an interruption gives the bits of an
  uninterrupted run; after the end it returns at once.

  Args:
    runner: the compiled step, `train.compile(...)`.
    state: the state at step 0, as from `train.init_state`; its arrays may be
      used up, so copy them to keep them.
    frozen: what the step only reads, not yet replicated.
    batches: `batches(step) -> dict` of NumPy arrays with a leading batch axis:
      the global batch, the same on every process.
    num_steps: the step at which to stop.
    workdir: where `checkpoints/`, `metrics.jsonl` and TensorBoard events go.
      None writes nothing (and cannot resume).
    evaluate: `evaluate(state) -> scalars`, at `eval_every` and at the end. An
      array has a number for each setting of a `sweep`; it is logged as
      `name[0]`, `name[1]`, ..., as the step's metrics are.
    eval_every: between evaluations: 500, "500 steps", "2 epochs" or
      "10 minutes"; None is only at the end.
    save_every: between checkpoints, likewise.
    log_every: between the lines of `metrics.jsonl`, likewise.
    steps_per_epoch: for periods in epochs.
    title: what the progress bar says.
    progress: show a progress bar (a line per evaluation where standard error
      is no terminal).

  Returns:
    The state at `num_steps`, unreplicated.

  Raises:
    FloatingPointError: if the loss or a gradient is not finite; names the
      step, the setting of a `sweep`, the terms, the first bad leaf and the
      examples. The last good state is saved.
    CheckpointError: if checkpoints cannot be written or none can be trusted.
    SystemExit: with code 143 after SIGTERM, once the state is saved.
    ValueError: if a period is not one, or num_steps not positive.
  """
  if num_steps < 1:
    raise ValueError(f"num_steps is {num_steps}; it should be at least 1")
  evals = Period("eval_every", eval_every, steps_per_epoch)
  saves = Period("save_every", save_every, steps_per_epoch)
  logs = Period("log_every", log_every, steps_per_epoch)
  clocks = [period for period in (evals, saves) if period.seconds]

  with contextlib.ExitStack() as stack:
    checkpoints = writer = None
    if workdir is not None:
      directory = pathlib.Path(workdir)
      checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints"))
      restored = checkpoints.restore(state)
      if restored is not None:
        state = restored[0]
    step = first = int(state.step)
    if step >= num_steps:
      return state
    if workdir is not None:
      if jax.process_index() == 0:
        note = {"num_steps": num_steps}
        write_text(directory / "stage.json", json.dumps(note) + "\n")
      writer = MetricWriter(directory, step)
      stack.callback(writer.close)
    bar = stack.enter_context(_Progress(title, step, num_steps, progress))

    state, frozen = runner.replicate(state), runner.replicate(frozen)
    saved = step if first else -1

    saving = threading.Lock()

    def save(at: int, good: TrainState) -> None:
      nonlocal saved
      if checkpoints is not None and at != saved:
        checkpoints.save(at, good)
        saved = at

    def rescue() -> None:
      """What a thread does if the signal comes in a long compilation."""
      if checkpoints is None:
        return
      if runner.peers > 1 and jax.process_count() > 1:
        raise RuntimeError("peers on several hosts cannot be gathered now")
      # On a CPU a call may hold it until its end; of half a minute ten seconds
      # are gone, and five are for the save.
      for left in reversed(range(150)):
        try:
          with saving:
            good = runner.unreplicate(state)
            save(int(good.step), good)
          break
        except RuntimeError:  # the step that runs has taken this state
          if not left:
            raise
          time.sleep(0.1)
      checkpoints.wait()
      bar.say(f"{title}: stopped by SIGTERM, saved step {max(saved, 0)}")

    stop = stack.enter_context(Sigterm(rescue))
    pending: list[tuple[int, list[Any], Any]] = []
    settled = time.monotonic()

    def settle(but: int = 0) -> None:
      """Takes in the metrics of past calls, stops if some are bad.

      Of the last `but` calls they stay where they are. After a bad step no
      other changes the state, so nothing is lost by looking late.
      """
      nonlocal settled
      calls = pending[: len(pending) - but]
      del pending[: len(calls)]
      settled = time.monotonic()
      if not calls:
        return
      due = [
        [writer is not None and logs.due(begin + i + 1) for i in range(len(b))]
        for begin, b, _ in calls
      ]
      # Every number that is fetched costs time; of most steps one is enough.
      few = [
        metrics
        if any(now) or metrics is calls[-1][2]
        else {"ok": metrics["ok"]}
        for now, (*_, metrics) in zip(due, calls, strict=True)
      ]
      for (begin, inputs, _), now, metrics in zip(
        calls, due, jax.device_get(few), strict=True
      ):
        if runner.steps_per_call == 1:
          metrics = {name: np.asarray(x)[None] for name, x in metrics.items()}
        if not metrics["ok"].all():
          good = runner.unreplicate(state)
          at = int(good.step)
          message = _diagnose(runner, state, frozen, batches(at), at)
          save(at, good.replace(skipped=good.skipped - 1))
          raise FloatingPointError(message)
        for i, batch in enumerate(inputs):
          if writer is not None and now[i]:
            scalars = _scalars(
              {k: v[i] for k, v in metrics.items() if k != "ok"}
            )
            ids = batch["id"] if "id" in batch else batch.get("index")
            extra = {} if ids is None else {"ids": hash_ids(ids)}
            writer.write(begin + i + 1, scalars, **extra)
        bar.advance(begin + len(inputs))
      bar.loss(np.mean(metrics["loss"][-1]))

    while step < num_steps:
      end = min(num_steps, evals.end(step), saves.end(step))
      count = min(runner.steps_per_call, int(end) - step)
      inputs = [batches(step + i) for i in range(count)]
      if runner.steps_per_call == 1:
        batch = inputs[0]
      else:
        batch = {k: np.stack([b[k] for b in inputs]) for k in inputs[0]}
      state, metrics = runner(state, frozen, runner.shard(batch))
      pending.append((step, inputs, metrics))
      if time.monotonic() - settled > SETTLE:
        settle(but=1)  # while the last one runs
      step += count
      due_eval, due_save = evals.due(step), saves.due(step)
      if clocks:
        due_eval, due_save = _agreed(due_eval, due_save)
      due_eval = evaluate is not None and (due_eval or step == num_steps)
      due_save = due_save or step == num_steps
      stopped = stop.stops(step)
      if due_eval or due_save or stopped:
        settle()
      if due_eval:
        scalars = _scalars(evaluate(runner.unreplicate(state)))  # type: ignore[misc]
        if writer is not None:
          writer.write(step, scalars)
        bar.note(step, scalars)
      stopped = stopped or stop.received  # while it was evaluated
      if due_save or stopped:
        with saving:
          save(step, runner.unreplicate(state))
      if stopped:  # also at the end: what comes next must not start
        bar.say(f"{title}: stopped by SIGTERM, saved step {step}")
        raise SystemExit(EXIT_CODE)
    return runner.unreplicate(state)


def _agreed(*flags: bool) -> list[bool]:
  """What process 0 says: clocks of several machines differ."""
  if jax.process_count() == 1:
    return list(flags)
  from jax.experimental import multihost_utils

  return multihost_utils.broadcast_one_to_all(np.array(flags)).tolist()


def _diagnose(
  runner: Runner, state: Any, frozen: Any, batch: Mapping[str, Any], step: int
) -> str:
  """One line that says where the first non-finite number is."""
  leaves, metrics = jax.device_get(
    runner.bad_leaves(state, frozen, dict(batch))
  )
  terms = [
    f"{name} = {x}"
    for name, x in _scalars(metrics).items()
    if not np.isfinite(x)
  ]
  bad = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, fine in jax.tree_util.tree_leaves_with_path(leaves)
    if not np.all(fine)
  ]
  of_settings = [~np.isfinite(x) for x in metrics.values() if np.ndim(x)]
  settings: Any = np.flatnonzero(np.any(of_settings, 0)) if of_settings else ()
  where = f" in setting {_few(settings, ', ')}" if len(settings) else ""
  ids = np.asarray(batch.get("id", batch.get("index", []))).reshape(-1)
  return (
    f"step {step} is not finite{where}: "
    f"{_few(terms, '; ') or 'loss is finite'}; first bad gradient: "
    f"{bad[0] if bad else 'none, but their norm overflows'}; examples "
    f"{_few(ids, ', ')}. The update was not made; the state of step {step} is "
    "saved"
  )


def _few(items: Any, separator: str) -> str:
  return separator.join([*map(str, items[:8]), *["..."] * (len(items) > 8)])


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
  """Numbers by name: what has one for each setting becomes `name[0]`, ..."""
  found: dict[str, float] = {}
  for name, value in values.items():
    if np.ndim(value):
      found |= {f"{name}[{k}]": float(x) for k, x in enumerate(value)}
    else:
      found[name] = float(value)
  return found


class _Progress:
  """A bar on a terminal, a line per evaluation elsewhere."""

  def __init__(self, title: str, step: int, num_steps: int, progress: bool):
    self._title, self._num_steps = title, num_steps
    self._first, self._began = step, time.monotonic()
    self._on = progress and jax.process_index() == 0
    self._terminal = self._on and sys.stderr.isatty()
    self._bar = tqdm(
      total=num_steps,
      initial=step,
      desc=title,
      unit="step",
      dynamic_ncols=True,
      disable=not self._terminal,
    )
    self._scores, self._compiled = "", False
    if not self._terminal:
      begin = f"going on from step {step}" if step else "compiling"
      self.say(f"{title}: {num_steps} steps, {begin}")

  def __enter__(self) -> "_Progress":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._bar.close()

  def advance(self, step: int) -> None:
    if not self._compiled:  # which is not to count for the time left
      self._compiled = True
      self._first, self._began = step, time.monotonic()
    self._bar.update(step - self._bar.n)

  def loss(self, loss: float) -> None:
    self._bar.set_postfix_str(f"loss {loss:.4g}{self._scores}", refresh=False)

  def note(self, step: int, scalars: Mapping[str, float]) -> None:
    shown = [f", {name} {value:.4g}" for name, value in scalars.items()]
    self._scores = "".join(shown[:1])  # the bar needs the room
    if not self._terminal:
      to_go = (time.monotonic() - self._began) * (self._num_steps - step)
      made = step - self._first
      left = f", {duration(to_go / made)} left" if to_go and made else ""
      at = f"step {step}/{self._num_steps}"
      self.say(f"{self._title}: {at}{''.join(shown)}{left}")

  def say(self, line: str) -> None:
    if self._terminal:
      tqdm.write(line, file=sys.stderr)
    elif self._on:
      print(line, file=sys.stderr, flush=True)
