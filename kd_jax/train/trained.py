"""What earlier runs have trained: read, and compared with its digests."""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from kd_jax import models
from kd_jax.errors import BadInput, CheckpointError
from kd_jax.files import read_json
from kd_jax.train.checkpoints import read_leaves


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
  try:
    with ocp.CheckpointManager(folder) as manager:
      stored = read_leaves(manager, max(steps))
  except CheckpointError as error:
    raise BadInput(f"{path} is damaged: {error}") from error
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
  found: dict[str, str | None] = {}
  for path in steps:
    found[str(path)] = None
    try:
      with ocp.CheckpointManager(path.parent) as manager:
        read_leaves(manager, int(path.name))
    except CheckpointError as error:
      found[str(path)] = str(error)
  return found


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
