"""The command line of every experiment: config, overrides, exit codes.

`python -m experiments.NAME --config=configs/NAME/SETTING.py[:ARG,key=value]
--workdir=DIR [--config.key=value] [--allow=key]`.

Exit codes: 0 done, 1 the run failed, 2 the input was wrong (nothing was
touched), 143 stopped by SIGTERM with its state saved.
"""

from collections.abc import Callable, Mapping
import difflib
import errno
import logging
import os
import pathlib
import re
import sys
from typing import Any
import warnings

from absl import flags, logging as absl_logging
import jax
from ml_collections import ConfigDict, config_flags

from kd_jax import memory
from kd_jax.errors import BadInput, CheckpointError

# A disk that is full, over its quota, read-only or broken.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def main(
  run: Callable[..., Mapping[str, Any]],
  argv: list[str] | None = None,
) -> None:
  """Parses the command line, calls `run(config, workdir)`, and exits.

  With `--allow`, its fields are the argument `allow` of `run`.

  Args:
    run: the experiment. It raises `BadInput` for wrong input.
    argv: the command line with the program's name; `sys.argv` by default.
  """
  argv = list(sys.argv if argv is None else argv)
  values = flags.FlagValues()
  flags.DEFINE_string(
    "workdir", None, "Where the run writes; resumes there.", flag_values=values
  )
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, as configs/hinton/mnist5k.py:demo.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "allow",
    [],
    "Fields that may differ from those the run in --workdir began with, as "
    "students.soft.epochs: it goes on with the new ones and notes it.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "distributed",
    False,
    "Every host of a pod runs this command: join them before anything else.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "help", False, "Show this text.", short_name="h", flag_values=values
  )
  try:
    config, workdir = _parse(argv, values)
  except BadInput as error:
    _leave(error)
  _mute_orbax()
  warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
  if values["distributed"].value:
    try:
      jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
      _leave(BadInput(f"--distributed found no other hosts: {error}"))
  memory.keep()
  try:
    allow = values["allow"].value
    run(config, workdir, **({"allow": allow} if allow else {}))
  except BadInput as error:
    _leave(error)
  except (FloatingPointError, CheckpointError) as error:
    _leave(error, code=1)
  except jax.errors.JaxRuntimeError as error:
    if not str(error).startswith("RESOURCE_EXHAUSTED"):
      raise
    _leave(error, code=1)
  except BrokenPipeError:  # the reader of the table has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except OSError as error:
    if error.errno not in DISK:
      raise  # a bug, which should keep its traceback
    _leave(error, code=1)
  except KeyboardInterrupt:
    print("interrupted; the same command goes on", file=sys.stderr)
    sys.exit(130)


def _mute_orbax() -> None:
  """Leaves one line to a save that failed: ours, and none in its middle.

  Orbax logs what it raises, and more. After a failed save its other writes
  have no event loop left to report to, each of which is a traceback from a
  thread of its own.
  """
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  hook = sys.unraisablehook

  def without_late_writes(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  sys.unraisablehook = without_late_writes


def _parse(argv: list[str], values: flags.FlagValues) -> tuple[ConfigDict, str]:
  if any(a in ("--help", "-help", "-h") for a in argv[1:]):
    about = sys.modules["__main__"].__doc__ or ""
    print(f"{about}\n{__doc__}\n{values.main_module_help() or values}")
    sys.exit(0)
  argv = _expand(argv)
  typed, sys.argv = sys.argv, argv  # config_flags looks for overrides there
  try:
    rest = values(argv)
  except Exception as error:  # the config file is a program
    raise BadInput(_explain(error, argv)) from error
  finally:
    sys.argv = typed
  if len(rest) > 1:
    raise BadInput(f"unexpected argument {rest[1]!r}; options start with --")
  if values["config"].value is None:
    raise BadInput(
      "--config is missing; as --config=configs/NAME/SETTING.py, see configs/"
    )
  if not isinstance(values["config"].value, ConfigDict):
    found = type(values["config"].value).__name__
    raise BadInput(
      f"get_config of the config file returned a {found}; it should return a "
      "ConfigDict"
    )
  if not values["workdir"].value:
    raise BadInput("--workdir is missing; as --workdir=runs/first")
  return values["config"].value, values["workdir"].value


def _expand(argv: list[str]) -> list[str]:
  """Turns `--config=FILE:ARG,key=value` into an ARG and overrides.

  The file comes first then, as config_flags wants it.
  """
  config, out = [], []
  for arg in argv[1:]:
    match = re.fullmatch(r"--?config=([^:,]*)(?:[:,](.*))?", arg)
    if not match:
      if arg in ("--config", "--allow"):  # it would swallow what comes next
        raise BadInput(f"write {arg}=VALUE, with an equals sign")
      out.append(arg)
      continue
    file, spec = match.groups()
    if not pathlib.Path(file).is_file():
      there = sorted(str(p) for p in pathlib.Path("configs").glob("*/*.py"))
      close = difflib.get_close_matches(file, there, n=1, cutoff=0.3)
      hint = f"; did you mean {close[0]}?" if close else ""
      raise BadInput(f"--config: there is no file {file}{hint}")
    if not file.endswith(".py"):
      raise BadInput(f"--config is {file}; it should be a file in configs/")
    parts = re.split(r",(?![^(]*\))", spec or "")  # not within (1,2)
    name = "" if "=" in parts[0] else parts.pop(0)
    config.append(f"--config={file}" + (f":{name}" if name else ""))
    for part in filter(None, parts):
      key, equals, value = part.partition("=")
      if not equals:
        raise BadInput(f"--config: {part!r} in {arg!r} should be key=value")
      config.append(f"--config.{key}={value}")
  fields = [
    arg.partition("=")[0]
    for arg in (*config, *out)
    if arg.startswith("--config.")
  ]
  twice = [field for field in fields if fields.count(field) > 1]
  if twice:  # tuples would be joined, of all else the last would win
    raise BadInput(f"{twice[0]} is given twice; once is enough")
  return [argv[0], *config, *out]


def _explain(error: Exception, argv: list[str]) -> str:
  """One line for what absl and ml_collections raise on a bad command line."""
  text = str(error).strip()
  if isinstance(error, KeyError | AttributeError):
    key = text.strip("\"'")
    if key.isidentifier():  # ml_collections said nothing but the key
      for arg in argv:  # with the groups in which it was looked for
        path = re.match(rf"--config\.([\w.]*\b{key})\b", arg)
        key = path.group(1) if path else key
      return f"the config has no field {key!r}"
  hint = re.search(r'Did you mean "(.*)" instead of "(.*)"\?', text)
  if hint:
    right, wrong = hint.groups()
    return f"the config has no field {wrong!r}; did you mean {right!r}?"
  unknown = re.search(r"Unknown command line flag 'config\.([^']*)'", text)
  if unknown:
    return f"the config has no field {unknown.group(1)!r}"
  if "Traceback" in text:  # of the config file itself: its last line says it
    last = text.splitlines()[-1].removeprefix("ValueError: ")
    return f"the config file failed: {last}"
  expected = flags.Error, AttributeError, LookupError, OSError, SyntaxError
  if not isinstance(error, (*expected, TypeError, ValueError)):
    return f"the config file failed: {type(error).__name__}: {text}"
  return text or type(error).__name__


def _leave(error: Exception, code: int = 2) -> None:
  line = " ".join(str(error).split())
  print(f"error: {line}", file=sys.stderr)
  sys.exit(code)
