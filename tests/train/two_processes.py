"""One of several processes that train together; run by test_distributed."""

import pathlib
import sys

import jax
import numpy as np


def main(coordinator, count, index, how, path):
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(coordinator, int(count), int(index))
  from tests.train.conftest import Problem

  problem = Problem()
  options = {
    "how": how,
    "devices": None,
    "workdir": pathlib.Path(path) / "run",
    "save_every": 5,
    "eval_every": 4,
    "evaluate": lambda state: {"at": float(state.step)},
  }
  problem.fit(**options | {"num_steps": 7})  # and resumes from there
  state = problem.fit(**options)
  leaves = [np.asarray(x) for x in jax.tree.leaves(state.params)]
  np.savez(pathlib.Path(path) / f"params{index}.npz", *leaves)


if __name__ == "__main__":
  main(*sys.argv[1:])
