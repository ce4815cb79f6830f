"""One of several processes that train together; run by test_distributed."""

import functools
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np


def main(coordinator, count, index, how, path, signalled="no"):
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(coordinator, int(count), int(index))
  from tests.train.conftest import Problem
  from tests.train.pair import Pair

  problem = Problem()
  fit = functools.partial(problem.fit, how=how, devices=None)
  if how == "sharded":
    pair = Pair()
    split = pair.runner(devices=None, sharded=("teacher",))
    fit = functools.partial(pair.fit, split)
  options = {
    "workdir": pathlib.Path(path) / "run",
    "save_every": 5,
    "eval_every": 4,
    "evaluate": lambda state: {"at": float(state.step)},
  }
  if signalled == "in step":
    stop_at(problem, fit, options, index)
  if signalled == "in evaluation":
    stop_in_a_long_one(fit, options, index)
  fit(**options | {"num_steps": 7})  # and resumes from there
  state = fit(**options)
  leaves = [np.asarray(x) for x in jax.tree.leaves(state.params)]
  np.savez(pathlib.Path(path) / f"params{index}.npz", *leaves)


def stop_at(problem, fit, options, index):
  """The second process gets SIGTERM in step 3; all leave after one step."""

  def batches(step):
    if step == 3 and index == "1":
      os.kill(os.getpid(), signal.SIGTERM)
    if step >= 3:  # the others hear of it over the network
      time.sleep(0.3)
    return problem.batches()(step)

  try:
    fit(**options, batches=batches)
  except SystemExit as error:
    assert error.code == 143, error.code
    print("stopped", flush=True)
    sys.stdout.flush()
    os._exit(143)
  raise AssertionError("nobody stopped")


def stop_in_a_long_one(fit, options, index):
  """The second process gets SIGTERM where no Python runs, as in a compile."""
  from kd_jax.train import signals

  signals.GRACE = 1.0

  @jax.jit
  def busy(x):
    return jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.sin(x @ x), x)

  def evaluate(state):
    if index == "1":
      threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return {"at": float(busy(jnp.eye(200)).sum())}

  fit(**options | {"evaluate": evaluate})


if __name__ == "__main__":
  main(*sys.argv[1:])
