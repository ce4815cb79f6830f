"""A teacher as an exported program, which needs no code of its model.

The file holds the computation and, as constants in it, the parameters: what
`jax.export` writes. It runs where JAX runs, with any batch size.

A damaged program can crash the process that reads it. So its SHA-256 digest
lies beside it, in the form that `sha256sum --check` reads, and is compared
first. It guards against damage; take programs only from those you trust, as
you would take code.
"""

from collections.abc import Sequence
import hashlib
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import files
from kd_jax.errors import BadInput
from kd_jax.models.base import Model, Variables, from_function
from kd_jax.models.weights import check_is_file

PLATFORMS = ("cpu", "cuda", "tpu")


def save_program(
  path: str | os.PathLike[str],
  model: Model,
  variables: Variables,
  shape: Sequence[int],
  dtype: Any = jnp.float32,
) -> None:
  """Writes the logits of a model, as a function of its inputs, to a file.

  Args:
    path: the file; its digest is written to the same name with `.sha256`
      added. A crash between the two leaves a pair that is refused.
    model: as it is used, not trained.
    variables: {"params", "state"}; they become part of the program. Weights of
      more than about 1 GB are better kept in a file of `models.save`.
    shape: of one input, without the batch.
    dtype: of the inputs.

  Raises:
    Exception: whatever `jax.export` raises, if the model has no form that is
      the same for each batch size and platform.
  """
  from jax import export

  (batch,) = export.symbolic_shape("batch")
  logits = jax.jit(lambda inputs: model.apply(variables, inputs)[0].logits)
  inputs = jax.ShapeDtypeStruct((batch, *shape), dtype)
  program = export.export(logits, platforms=PLATFORMS)(inputs).serialize()
  digest = hashlib.sha256(program).hexdigest()
  files.write(path, lambda file: file.write(program))
  files.write_text(_digest_path(path), f"{digest}  {pathlib.Path(path).name}\n")


def load_program(path: str | os.PathLike[str]) -> Model:
  """A model that runs a program of `save_program`.

  Args:
    path: the file; its digest is beside it.

  Returns:
    A model without parameters and state, to be used as a teacher: its `apply`
    gives the logits, under `jit` and `pmap` and with sharded inputs as well. It
    cannot be trained, has no gradient to its inputs, and no `vmap`.

  Raises:
    BadInput: if the file or its digest is missing, the two do not fit, or this
      JAX cannot read the program.

  Example:
    >>> import tempfile
    >>> from kd_jax import models
    >>> net = models.create("mlp", 3, hidden=(4,))
    >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   models.save_program(f"{folder}/net", net, variables, shape=(2,))
    ...   teacher = models.load_program(f"{folder}/net")
    >>> nothing = {"params": {}, "state": {}}
    >>> teacher.apply(nothing, jnp.ones((5, 2)))[0].logits.shape
    (5, 3)
  """
  from jax import export

  check_is_file(path)
  digest = _digest_path(path)
  if not digest.is_file():
    raise BadInput(f"{digest} does not exist; it should hold {path}'s SHA-256")
  try:
    with digest.open("rb") as file:
      written = re.match(rb"[0-9a-f]{64}(?=\s|$)", file.read(1_000))
    content = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise BadInput(f"{path} cannot be read: {error}") from error
  if not written:
    raise BadInput(f"{digest} should begin with the 64 digits of a SHA-256")
  found = hashlib.sha256(content).hexdigest()
  if found != written.group().decode():
    raise BadInput(
      f"{path} is damaged: its SHA-256 is {found}; {digest.name} has "
      f"{written.group().decode()}"
    )
  try:
    program = export.deserialize(bytearray(content))
  except ImportError:
    raise
  except Exception as error:  # The reader has no exception of its own.
    reason = " ".join(str(error).split()) or type(error).__name__
    raise BadInput(
      f"{path} is no program that JAX {jax.__version__} can read: {reason:.200}"
    ) from error
  return from_function(
    lambda key, inputs: {}, lambda params, inputs: program.call(inputs)
  )


def _digest_path(path: str | os.PathLike[str]) -> pathlib.Path:
  return pathlib.Path(f"{os.fspath(path)}.sha256")
