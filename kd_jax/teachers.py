"""Frozen teachers: what pins one, and their outputs cached on disk."""

from collections.abc import Callable, Mapping
import hashlib
import json
import os
import pathlib
from typing import Any
import warnings

import jax
import numpy as np

from kd_jax import files
from kd_jax.data import order
from kd_jax.errors import BadInput
from kd_jax.models.base import Model

FORMAT = 1


def digest(tree: Any) -> str:
  """SHA-256 of a pytree: its paths, dtypes, shapes and bytes.

  Args:
    tree: arrays, for example a teacher's variables or a data set's columns.

  Returns:
    64 hexadecimal digits; one flipped bit gives others.

  Example:
    >>> digest({"w": np.zeros(2)}) == digest({"w": np.array([0.0, 0.0])})
    True
    >>> digest({"w": np.zeros(2)}) == digest({"v": np.zeros(2)})
    False
  """
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.ascontiguousarray(jax.device_get(leaf))
    head = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n"
    found.update(head.encode())
    found.update(array.tobytes())
  return found.hexdigest()


def fingerprint(tree: Any) -> str:
  """The number of examples in a data set, and a digest, for people.

  Args:
    tree: arrays; with an entry `id`, a data set's columns.

  Returns:
    One short line.

  Example:
    >>> fingerprint({"id": np.arange(3)}).partition(",")[0]
    '3 examples'
  """
  count = f"{len(tree['id'])} examples, " if "id" in tree else ""
  return f"{count}{digest(tree)[:16]}"


def check(
  model: Model,
  variables: Any,
  inputs: Any,
  *,
  classes: int | None = None,
  name: str = "the teacher",
) -> None:
  """Finds a teacher that cannot be trusted, before the first step.

  A network that was left in training mode draws numbers, moves its statistics,
  or says something else of an example when others are beside it.

  Args:
    model: the teacher.
    variables: its variables.
    inputs: array or pytree of arrays [batch, ...], at least two examples, as it
      will be asked.
    classes: how many logits it should have; None does not ask.
    name: what to call it in the message.

  Raises:
    BadInput: if its logits are NaN or infinite (-inf, an absent class, is
      fine), differ between two calls, change its state, depend on the other
      examples of the batch by more than 1% of the largest logit, or are of
      other classes.
    ValueError: if there are fewer than two examples.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import models, teachers
    >>> net = models.create("mlp", 3, hidden=(4,))
    >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> teachers.check(net, variables, jnp.ones((2, 2)), classes=3)
  """
  if len(jax.tree.leaves(inputs)[0]) < 2:
    raise ValueError("inputs holds one example; two are needed to compare")
  ask = jax.jit(lambda v, x: _answer(model.apply(v, x)))
  (said, state), (again, _) = ask(variables, inputs), ask(variables, inputs)
  first = jax.tree.map(lambda x: x[:1], inputs)
  alone = np.asarray(ask(variables, first)[0])
  said, again = np.asarray(said), np.asarray(again)
  if classes is not None and said.shape[-1] != classes:
    raise BadInput(
      f"{name} has {said.shape[-1]} classes; it should have {classes}"
    )
  if np.isnan(said).any() or np.isposinf(said).any():
    raise BadInput(
      f"{name} is not finite: its logits hold "
      f"{'NaN' if np.isnan(said).any() else 'inf'}"
    )
  if not np.array_equal(said, again):
    raise BadInput(
      f"{name} says something else in a second call: is it in training mode "
      "(dropout)?"
    )
  old = jax.device_get(variables.get("state", {}))
  if digest(old) != digest(jax.device_get(state)):
    raise BadInput(
      f"{name} changes its state when it is asked: is it in training mode "
      "(batch statistics)?"
    )
  shown = np.where(np.isneginf(said[:1]), 0.0, said[:1])
  gap = np.abs(np.where(np.isneginf(alone), 0.0, alone) - shown).max()
  if not gap <= 0.01 * max(1.0, np.abs(shown).max()):
    raise BadInput(
      f"{name} says something else of an example alone than among others (the "
      f"logits differ by {gap:.3g}): is it in training mode (batch statistics)?"
    )


def _answer(found: Any) -> tuple[jax.Array, Any]:
  outputs, state = found
  return outputs.logits.astype(np.float32), state


def cached(
  directory: str | os.PathLike[str],
  compute: Callable[[int], np.ndarray],
  *,
  views: int,
  shape: tuple[int, int],
  manifest: Mapping[str, Any],
  progress: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
  """A teacher's logits for a finite bank of views, computed once.

  A directory serves one teacher, one data set and one way to make views, which
  the manifest pins; it refuses all others. A call that was interrupted goes on
  with the first view that is missing.

  Args:
    directory: where the bank lives; made if missing.
    compute: `compute(view) -> float32 [n, classes]`, logits without
      temperature. Called only for views that are not there.
    views: how many views there are of each example.
    shape: (n, classes).
    manifest: all that the logits depend on: digests of teacher and data (see
      `digest`), the seed and settings of the views, the batch size with which
      they were computed. Plain JSON values.
    progress: called with a line for people at each view that is computed.

  Returns:
    float32 [views, n, classes].

  Raises:
    BadInput: if the directory holds a bank with another manifest (the fields
      are named), or something else.
    ValueError: if `compute` returns another shape or dtype.
  """
  path = pathlib.Path(directory).absolute()
  wanted = json.loads(
    json.dumps(
      {**manifest, "views": views, "shape": shape, "format": FORMAT},
      sort_keys=True,
    )
  )
  _claim(path, wanted)
  bank = np.empty((views, *shape), np.float32)
  for view in range(views):
    logits = _read(path / f"view-{view:05d}.npy", shape)
    if logits is None:
      progress(f"teacher logits, view {view + 1} of {views}")
      logits = np.asarray(compute(view))
      if logits.shape != shape or logits.dtype != np.float32:
        raise ValueError(
          f"compute returned {logits.dtype}{list(logits.shape)}; it should be "
          f"float32{list(shape)}"
        )
      _write(path / f"view-{view:05d}.npy", logits)
    bank[view] = logits
  return bank


def bank(
  directory: str | os.PathLike[str],
  ask: Callable[[Any, int], Any],
  rows: Callable[[np.ndarray, int], Any],
  *,
  n: int,
  classes: int,
  views: int,
  batch_size: int,
  manifest: Mapping[str, Any],
  progress: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
  """What a teacher says of a finite bank of views, cached on disk.

  Args:
    directory: see `cached`.
    ask: `ask(batch, view) -> float32 [batch, classes]`, the teacher's logits
      for that view of the examples; best compiled.
    rows: `rows(positions, view) -> batch`: the examples at int[batch]
      positions, and what else the view is made of.
    n: examples.
    classes: of the teacher.
    views: how many there are of each example.
    batch_size: examples that the teacher is asked at a time.
    manifest: see `cached`; the batch size is added.
    progress: see `cached`.

  Returns:
    float32 [n, views, classes].

  Raises:
    BadInput: as `cached`.
    ValueError: as `cached`.
  """

  def compute(view: int) -> np.ndarray:
    parts = [
      np.asarray(ask(rows(positions, view), view))[mask]
      for positions, mask in order.eval_batches(n, batch_size)
    ]
    return np.concatenate(parts)

  logits = cached(
    directory,
    compute,
    views=views,
    shape=(n, classes),
    manifest={**manifest, "batch_size": batch_size},
    progress=progress,
  )
  return logits.swapaxes(0, 1)


def _claim(path: pathlib.Path, wanted: Mapping[str, Any]) -> None:
  """Checks the manifest, or writes it into a new directory."""
  stored = path / "manifest.json"
  if not stored.exists():
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
      raise BadInput(f"{path} holds no bank of teacher logits; name another")
    path.mkdir(parents=True, exist_ok=True)
    files.write_text(stored, json.dumps(wanted, indent=1, sort_keys=True))
    return
  found = files.read_json(stored)
  changed = [
    f"{name} is {wanted.get(name)} here and {found.get(name)} there"
    for name in sorted({*wanted, *found})
    if wanted.get(name) != found.get(name)
  ]
  if changed:
    raise BadInput(
      f"the teacher logits in {path} were made with other inputs: "
      f"{'; '.join(changed)}. Name another directory"
    )


def _write(path: pathlib.Path, logits: np.ndarray) -> None:
  files.write(path, lambda file: np.save(file, logits, allow_pickle=False))
  mark = hashlib.sha256(path.read_bytes()).hexdigest()
  files.write_text(path.with_suffix(".sha256"), mark)


def _read(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray | None:
  """The logits of one view; None if they are not there or damaged."""
  mark = path.with_suffix(".sha256")
  if not path.exists() or not mark.exists():
    return None
  if hashlib.sha256(path.read_bytes()).hexdigest() != mark.read_text():
    warnings.warn(f"{path} is damaged; it is computed anew", stacklevel=3)
    return None
  logits = np.load(path, allow_pickle=False)
  assert logits.shape == shape, path  # the manifest has it
  return logits
