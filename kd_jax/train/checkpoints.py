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

from kd_jax import models
from kd_jax.errors import BadInput, CheckpointError as CheckpointError
from kd_jax.files import read_json


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
    plain = _to_plain(template)
    skipped = []
    for step in steps:
      try:
        restored = self._read(step, plain)
      except Exception as error:  # orbax raises anything on damaged files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        skipped.append((step, lines[0]))
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
      return _from_plain(restored, template), step
    if skipped:
      what = "; ".join(f"{step}: {reason}" for step, reason in skipped)
      raise CheckpointError(
        f"no checkpoint in {self.directory} can be trusted ({what}). Restore "
        "the directory from a copy, or remove it to start this stage again"
      )
    return None

  def _read(self, step: int, plain: Any) -> Any:
    stored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(plain), digests=ocp.args.JsonRestore()
      ),
    )
    state = jax.tree.map(np.asarray, stored["state"])
    found = _digests(state)
    wrong = [k for k, v in stored["digests"].items() if found.get(k) != v]
    wrong += [k for k in found if k not in stored["digests"]]
    if wrong:
      raise CheckpointError(f"digest mismatch at {wrong[0]}")
    return state

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


def load_trained(
  directory: str | os.PathLike[str],
  template: Mapping[str, Any],
  *,
  role: str = "model",
) -> dict[str, Any]:
  """The variables of a model that another run has trained.

  Args:
    directory: of a stage of that run, the one that holds `checkpoints`. It is
      only read.
    template: {"params", "state"} like the model's, whose structure, shapes and
      dtypes count (abstract ones will do).
    role: of the model in that run.

  Returns:
    {"params", "state"} of its newest checkpoint.

  Raises:
    BadInput: if there is no checkpoint, the training was not finished, or the
      newest one is damaged or of another architecture.
  """
  stage = pathlib.Path(directory).absolute()
  if not stage.is_dir():
    raise BadInput(f"{directory} does not exist")
  folder = stage / "checkpoints"
  steps = [int(f.name) for f in folder.glob("*") if f.name.isdecimal()]
  if not steps:
    raise BadInput(
      f"{directory} holds no checkpoints; it should be the directory of a "
      "training, as RUN/seed0/teacher"
    )
  note = stage / "stage.json"
  if note.exists():
    wanted = read_json(note)["num_steps"]
    if max(steps) < wanted:
      raise BadInput(
        f"{directory} is at step {max(steps)} of {wanted}; finish that run "
        "first"
      )
  path = folder / str(max(steps))
  stored = read_leaves(path)
  if isinstance(stored, str):
    raise BadInput(f"{path} is damaged: {stored}")
  roles = {key[1]: None for key in stored if key[0] == "params"}
  if role not in roles:
    raise BadInput(
      f"{path} has no {role}; it should be one of {', '.join(roles)}"
    )
  variables: dict[str, Any] = {"params": {}, "state": {}}
  for key, leaf in stored.items():
    part = {"params": "params", "model_state": "state"}.get(key[0])
    if part is None or key[1] != role:
      continue
    group = variables[part]
    for name in key[2:-1]:
      group = group.setdefault(name, {})
    group[key[-1]] = leaf
  _check_fits(path, variables, template)
  return variables


def load_teacher(
  path: str | os.PathLike[str],
  name: str,
  num_classes: int,
  shape: tuple[int, ...],
  **fields: Any,
) -> dict[str, Any]:
  """The variables of a teacher, from a file or from another run.

  Args:
    path: a file with a suffix, see `models.load`, or a directory, see
      `load_trained`.
    name: of the reference model, see `models.create`.
    num_classes: as for `models.create`.
    shape: of one input, without the batch.
    **fields: as for `models.create`.

  Returns:
    {"params", "state"}.

  Raises:
    BadInput: if it cannot be read or is of another architecture.
    ValueError: if there is no such model or field.
  """
  if os.path.isfile(path) or (
    pathlib.Path(path).suffix and not os.path.isdir(path)
  ):
    return models.load(path, name, num_classes, shape=shape, **fields)
  return load_trained(path, models.template(name, num_classes, shape, **fields))


def verify(directory: str | os.PathLike[str]) -> dict[str, str | None]:
  """Reads every checkpoint below a directory and compares its digests.

  Args:
    directory: of a run, a stage or its checkpoints. Nothing is changed.

  Returns:
    {path of a checkpoint: None, or what is wrong with it}, in order.

  Raises:
    BadInput: if there is no checkpoint.
  """
  root = pathlib.Path(directory).absolute()
  folders = [root] if root.name == "checkpoints" else []
  folders += sorted(root.rglob("checkpoints"))
  steps = [
    path
    for folder in folders
    for path in sorted(
      (p for p in folder.iterdir() if p.name.isdecimal()),
      key=lambda p: int(p.name),
    )
  ]
  if not steps:
    raise BadInput(f"{directory} holds no checkpoints")
  found = {}
  for path in steps:
    stored = read_leaves(path)
    found[str(path)] = stored if isinstance(stored, str) else None
  return found


def read_leaves(path: pathlib.Path) -> dict[tuple[str, ...], np.ndarray] | str:
  """The leaves of a checkpoint, whatever program wrote it.

  Args:
    path: of one checkpoint, the folder that its step names.

  Returns:
    The leaves by their paths; or in one line, why they cannot be trusted.
  """
  if not (path / "digests").is_dir():
    return "it has no digests: cut, or no checkpoint of kd_jax"
  try:
    with ocp.CheckpointManager(path.parent) as manager:
      stored = manager.restore(
        int(path.name),
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(), digests=ocp.args.JsonRestore()
        ),
      )
    leaves = jax.tree_util.tree_leaves_with_path(stored["state"])
    named = {
      _parts(jax.tree_util.keystr(key)): np.asarray(x) for key, x in leaves
    }
    digests = {_parts(key): value for key, value in stored["digests"].items()}
  except Exception as error:  # orbax raises anything on damaged files
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
  for key in sorted({**named, **digests}):
    same = key in named and _digest(named[key]) == digests.get(key)
    if not same:
      return f"digest mismatch at {'/'.join(key)}"
  return named


def _parts(key: str) -> tuple[str, ...]:
  """The names in a path, however its containers write them."""
  return tuple(re.findall(r"[\w-]+", key))


def _check_fits(path: pathlib.Path, found: Any, wanted: Any) -> None:
  shapes = [
    {
      jax.tree_util.keystr(key, simple=True, separator="/"): leaf.shape
      for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (found, wanted)
  ]
  for name in sorted({**shapes[0], **shapes[1]}):
    there, here = (shape.get(name, "nothing") for shape in shapes)
    if there != here:
      raise BadInput(
        f"{path} is of another architecture: {name} is {there} there and "
        f"{here} in this program"
      )


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


def _from_plain(plain: Any, template: Any) -> Any:
  def back(path: Any, x: np.ndarray, like: Any) -> jax.Array:
    typed = _is_key(like)
    shape = np.shape(jax.random.key_data(like) if typed else like)
    if x.shape != shape:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise CheckpointError(
        f"the checkpoint is of another architecture: {name} has shape "
        f"{x.shape} there and {shape} in this program"
      )
    if typed:
      return jax.random.wrap_key_data(
        jnp.asarray(x), impl=jax.random.key_impl(like)
      )
    return jnp.asarray(x)

  return jax.tree_util.tree_map_with_path(back, plain, template)


def _digests(plain: Any) -> dict[str, str]:
  """SHA-256 of dtype, shape and bytes of each leaf, by its path."""
  return {
    jax.tree_util.keystr(path): _digest(x)
    for path, x in jax.tree_util.tree_leaves_with_path(plain)
  }


def _digest(x: np.ndarray) -> str:
  digest = hashlib.sha256(f"{x.dtype.str}{x.shape}".encode())
  digest.update(np.ascontiguousarray(x).view(np.uint8).reshape(-1).data)
  return digest.hexdigest()
