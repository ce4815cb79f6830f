"""Checkpoints that are verified when they are read: Orbax plus digests.

Orbax restores a flipped bit silently, and its newest step may be damaged. So
each step carries a SHA-256 digest of every leaf, and restoring walks back from
the newest step to the newest good one, saying what it skipped and why.
"""

from collections.abc import Mapping
import hashlib
import os
import pathlib
import re
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kd_jax.errors import CheckpointError


class Checkpoints:
  """The numbered checkpoints of one run.

  Use as a context manager: leaving it waits for the last save, and raises if
  that failed.

  Attributes:
    directory: holds one folder per step, named by its number.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
    """Opens (or makes) the directory.

    Args:
      directory: local path.
      keep: how many of the newest steps to keep. An older one is deleted only
        after a newer one is complete.
    """
    self.directory = pathlib.Path(directory).absolute()
    self.directory.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=False),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: Any, *unused: Any) -> None:
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      if kind is None:
        raise self._cannot_write(error) from error
    finally:
      self._manager.close()

  def save(self, step: int, tree: Any) -> None:
    """Writes `tree` as checkpoint `step`, in the background.

    Args:
      step: non-negative, above the steps that are there.
      tree: pytree of arrays; typed random keys are fine.

    Raises:
      CheckpointError: if this or the previous save failed; earlier steps stay.
    """
    plain = _to_plain(tree)
    try:
      done = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(plain),
          digests=ocp.args.JsonSave(_digests(plain)),
        ),
      )
    except Exception as error:
      raise self._cannot_write(error) from error
    if not done:
      raise CheckpointError(
        f"checkpoint {step} in {self.directory} was not written: a checkpoint "
        "of this or a later step is there already"
      )

  def wait(self) -> None:
    """Returns when the last save is on the disk.

    Raises:
      CheckpointError: if it failed.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._cannot_write(error) from error

  def restore(self, template: Any) -> tuple[Any, int] | None:
    """The newest good checkpoint.

    Args:
      template: a tree like the saved one; gives structure, shapes and dtypes.

    Returns:
      (tree of arrays on the default device, step), or None if there are no
      checkpoints at all. Damaged newer steps are renamed to `damaged-STEP` and
      warned about.

    Raises:
      CheckpointError: if there are checkpoints and none is good: training
        never silently starts again from step 0.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    skipped = []
    for step in steps:
      try:
        leaves = read_leaves(self._manager, step)
      except CheckpointError as error:
        skipped.append((step, str(error)))
        continue
      for bad, reason in skipped:
        aside = self._move_aside(bad)
        warnings.warn(
          f"checkpoint {bad} cannot be trusted ({reason}); moved to {aside}, "
          f"going on from checkpoint {step}",
          stacklevel=2,
        )
      if skipped:
        self._manager.reload()
      return _from_leaves(leaves, template), step
    if skipped:
      what = "; ".join(f"{step}: {reason}" for step, reason in skipped)
      raise CheckpointError(
        f"no checkpoint in {self.directory} can be trusted ({what}). Restore "
        "the directory from a copy, or remove it to start this stage again"
      )
    return None

  def _move_aside(self, step: int) -> pathlib.Path:
    source = self.directory / str(step)
    aside = self.directory / f"damaged-{step}"
    count = 1
    while aside.exists():
      count += 1
      aside = self.directory / f"damaged-{step}-{count}"
    if jax.process_index() == 0 and source.exists():
      source.rename(aside)
    return aside

  def _cannot_write(self, error: Exception) -> CheckpointError:
    cause = str(error).rsplit('": ', 1)[-1]  # orbax names each of its files
    cause = cause.partition(" [")[0]  # and tensorstore how it opened them
    return CheckpointError(f"cannot write to {self.directory}: {cause}")


def read_leaves(
  manager: ocp.CheckpointManager, step: int
) -> dict[tuple[str, ...], np.ndarray]:
  """The leaves of a checkpoint, whatever program wrote it, by their paths.

  All who read a checkpoint do it so: what one of them trusts, all do.

  Args:
    manager: of the folder that holds the checkpoints.
    step: of one that is there.

  Raises:
    CheckpointError: if they cannot be trusted; says in one line why.
  """
  if not (pathlib.Path(manager.directory) / str(step) / "digests").is_dir():
    raise CheckpointError("it has no digests: cut, or no checkpoint of kd_jax")
  try:
    stored = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(), digests=ocp.args.JsonRestore()
      ),
    )
    found = _leaves(jax.tree.map(np.asarray, stored["state"]))
    digests = {_parts(key): value for key, value in stored["digests"].items()}
  except Exception as error:  # orbax raises anything on damaged files
    lines = str(error).strip().splitlines() or [type(error).__name__]
    cause = lines[0].partition(" [tensorstore_spec")[0]
    raise CheckpointError(cause) from error
  for key in sorted({**found, **digests}):
    if key not in found or digest(found[key]) != digests.get(key):
      raise CheckpointError(f"digest mismatch at {'/'.join(key)}")
  return found


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {_parts(jax.tree_util.keystr(path)): leaf for path, leaf in found}


def _parts(key: str) -> tuple[str, ...]:
  """The names in a path, however its containers write them."""
  return tuple(re.findall(r"[\w-]+", key))


def _is_key(x: Any) -> bool:
  return isinstance(x, jax.Array) and jnp.issubdtype(
    x.dtype, jax.dtypes.prng_key
  )


def _to_plain(tree: Any) -> Any:
  """Host copies; typed keys as their uint32 data.

  Copies, since the save goes on while the next step reuses donated memory.
  """
  return jax.tree.map(
    lambda x: np.array(jax.random.key_data(x) if _is_key(x) else x), tree
  )


def _from_leaves(
  leaves: Mapping[tuple[str, ...], np.ndarray], template: Any
) -> Any:
  """A tree like the template, of what was read."""
  wanted = _leaves(_to_plain(template))
  for name in sorted({**leaves, **wanted}):
    there, here = (
      f"{tree[name].dtype} {tree[name].shape}" if name in tree else "nothing"
      for tree in (leaves, wanted)
    )
    if there != here:
      raise CheckpointError(
        f"the checkpoint is of another architecture: {'/'.join(name)} is "
        f"{there} there and {here} in this program"
      )

  def back(path: Any, like: Any) -> jax.Array:
    x = jnp.asarray(leaves[_parts(jax.tree_util.keystr(path))])
    if not _is_key(like):
      return x
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like))

  return jax.tree_util.tree_map_with_path(back, template)


def _digests(plain: Any) -> dict[str, str]:
  """SHA-256 of dtype, shape and bytes of each leaf, by its path."""
  return {
    jax.tree_util.keystr(path): digest(x)
    for path, x in jax.tree_util.tree_leaves_with_path(plain)
  }


def digest(x: np.ndarray) -> str:
  """SHA-256 of dtype, shape and bytes, in hexadecimal digits."""
  found = hashlib.sha256(f"{x.dtype.str}{x.shape}".encode())
  found.update(np.ascontiguousarray(x).view(np.uint8).reshape(-1).data)
  return found.hexdigest()
