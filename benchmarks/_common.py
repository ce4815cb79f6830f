"""What benchmarks have in common: a small training, the result file."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import datetime
import os
import pathlib
from typing import Any, NamedTuple


class Training(NamedTuple):
  """What `train.fit` takes first."""

  runner: Any
  state: Any
  frozen: dict[str, Any]
  batches: Callable[[int], dict[str, Any]]


def mlp_pair(
  teacher: Sequence[int],
  student: Sequence[int],
  steps_per_call: int = 1,
  *,
  how: str = "jit",
  batch_size: int = 0,
) -> Training:
  """A student MLP and a live teacher on MNIST digits, as in Hinton et al.

  Args:
    teacher: its hidden layers; it is not trained.
    student: its hidden layers.
    steps_per_call: see `train.compile`.
    how: likewise.
    batch_size: 0 is that of the config.
  """
  import jax

  from configs.hinton import mnist5k
  from experiments import hinton
  from kd_jax import data, train

  config = mnist5k.get_config("demo")
  config.steps_per_call, config.parallel = steps_per_call, how
  config.student.batch_size = batch_size or config.student.batch_size
  config.teacher.hidden, config.student.hidden = tuple(teacher), tuple(student)
  row = config.students[config.rows[-1]]
  arrays = data.to_arrays(data.load("mnist5k", "train"))
  known = hinton.network(config, config.teacher, 10).model
  net = hinton.network(config, config.student, 10, known)
  few = jax.numpy.zeros((1, 28, 28, 1))
  start = net.model.init(jax.random.key(0), few)
  state = train.init_state(
    {"model": start["params"]},
    net.optimizer,
    jax.random.key(1),
    model_state={"model": start["state"]},
  )
  weights = ("temperature", "soft_weight", "hard_weight")
  frozen = {
    "data": arrays,
    "teacher": known.init(jax.random.key(2), few),
    "hparams": {key: row[key] for key in weights},
    "view_key": train.view_key(0),
  }
  size, n = config.student.batch_size, len(arrays["id"])
  return Training(net.runner, state, frozen, train.index_batches(0, size, n))


def at_least(least: int) -> Callable[[str], int]:
  """The type of an argument that counts something."""

  def count(text: str) -> int:
    if text.isdecimal() and int(text) >= least:
      return int(text)
    raise argparse.ArgumentTypeError(
      f"it is {text!r}; it should be a whole number of at least {least}"
    )

  return count


def new_file(text: str) -> pathlib.Path:
  """The type of an argument that says where to keep a result.

  What could not be written should be known before hours of measuring.
  """
  path = pathlib.Path(text)
  if path.is_dir():
    raise argparse.ArgumentTypeError(f"{text!r} is a folder, not a file")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise argparse.ArgumentTypeError(
      f"{text!r} cannot be written: {error}"
    ) from None
  if not os.access(path.parent, os.W_OK | os.X_OK):
    raise argparse.ArgumentTypeError(f"the folder of {text!r} is read-only")
  return path


def parser(doc: str | None, **counts: int) -> argparse.ArgumentParser:
  """That of a benchmark, whose result may be kept.

  Args:
    doc: its documentation; the first line says what it is.
    **counts: arguments that are at least one, `blocks` for `--blocks`, with
      what they are by default.
  """
  found = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
  found.add_argument("--json", type=new_file, help="keep the result here")
  for name, default in counts.items():
    found.add_argument(
      f"--{name}", type=at_least(1), default=default, help="%(default)s"
    )
  return found


def settings(more: Mapping[str, str] | None = None) -> str:
  """What stands before a command: the number of threads, where it was set."""
  now = {"NPROC": os.environ["NPROC"]} if "NPROC" in os.environ else {}
  return "".join(f"{k}={v} " for k, v in {**now, **(more or {})}.items())


def result(**fields: Any) -> dict[str, Any]:
  """The content of a result file, see `kd_jax.result_file`.

  Args:
    **fields: `title`, `command`, `metric`, `rows`, `data`, `wall_seconds`, and
      those of the others that are not empty.
  """
  from kd_jax import result_file

  now = datetime.datetime.now(datetime.UTC)
  return {
    "experiment": "benchmarks",
    "source": "kd_jax",
    "config": {},
    "seeds": [0],
    "comparisons": [],
    "models": {},
    "environment": result_file.environment(),
    "finished": now.isoformat(timespec="seconds"),
    **fields,
  }


def show(found: dict[str, Any], path: pathlib.Path | None) -> None:
  """Prints a result, and keeps it if there is a path."""
  from kd_jax import result_file, results

  print(results.table(found))
  if path:
    result_file.save(path, found)
