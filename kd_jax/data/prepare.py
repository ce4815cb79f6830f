"""Turns raw image files on disk into a TFDS data set, without a network.

  python -m kd_jax.data.prepare NAME --source DIR [--data_dir DIR]

The result is ArrayRecord, read with `kd_jax.data.load` or
`tfds.data_source(NAME, data_dir=DIR)`, no TensorFlow needed. The names that
TFDS has are written in TFDS's version and order of examples. Exit codes: 0
done, or there already; 1 it failed; 2 the input is wrong. Nothing is left on
disk unless the code is 0.
"""

import argparse
from collections.abc import Sequence
import difflib
import os
import pathlib
import signal
import sys
import time
from typing import Any, NoReturn

from kd_jax.data import folders, raw
from kd_jax.data.known import KNOWN, check, describe_counts, describe_shape
from kd_jax.data.sources import default_data_dir
from kd_jax.data.writer import write
from kd_jax.errors import BadInput


def prepare(
  name: str,
  source: str | os.PathLike[str],
  data_dir: str | os.PathLike[str],
  *,
  overwrite: bool = False,
  progress: folders.Progress | None = None,
) -> tuple[pathlib.Path, raw.RawData, bool]:
  """Reads raw files, checks them, and writes the TFDS data set.

  Args:
    name: the TFDS name; a well-known one is held to its counts, classes and,
      where they are known, the digests of the original files.
    source: a directory with IDX files, a directory with
      train/<class>/*.png|jpg, or a zip file of one.
    data_dir: the TFDS directory to write into.
    overwrite: whether to replace a data set that differs.
    progress: told how far the work is.

  Returns:
    (its directory, the raw data, False if it was there already).

  Raises:
    BadInput: if anything is wrong with the input; nothing is left on disk.
    OSError: if the disk fails; nothing is left on disk.
  """
  known = KNOWN.get(name)
  close = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.8)
  if close and not known:
    raise BadInput(
      f"name is {name!r}, which is easily taken for {close[0]!r}; write that, "
      "or choose a name that is less like it"
    )
  class_names = known.class_names if known else None
  path = pathlib.Path(source).expanduser()
  kind = _kind(path)
  if kind == "idx":
    data = raw.read_idx(path, class_names)
  elif kind == "folder":
    data = folders.read_directory(path, class_names, progress)
  else:
    data = folders.read_zip(pathlib.Path(kind), class_names, progress)
  if known:
    check(name, known, data)
  target, written = write(
    name,
    data,
    data_dir,
    version=known.version if known else "1.0.0",
    text_id=bool(known and known.text_id),
    overwrite=overwrite,
    progress=progress,
  )
  return target, data, written


def main(argv: Sequence[str] | None = None) -> NoReturn:
  """The command line; exits with its code.

  Args:
    argv: the arguments; those of the process by default.
  """
  parser = argparse.ArgumentParser(
    prog="python -m kd_jax.data.prepare",
    description="Turn raw image files on disk into a TFDS data set, without "
    "a network.",
    epilog="""\
examples:
  python -m kd_jax.data.prepare mnist --source ~/mnist --data_dir ~/tfds
      where ~/mnist holds train-images-idx3-ubyte.gz and the other three files
  python -m kd_jax.data.prepare my_birds --source birds.zip --data_dir ~/tfds
      where birds.zip holds train/<class>/*.jpg and test/<class>/*.jpg

afterwards, in Python:
  kd_jax.data.load("mnist", "train", data_dir="~/tfds")""",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "name",
    metavar="NAME",
    help="name of the data set. Checked against the originals: "
    + ", ".join(KNOWN),
  )
  parser.add_argument(
    "--source",
    required=True,
    help="directory with IDX files (.gz or not), directory with "
    "train/<class>/*.jpg|png, or a zip file of one",
  )
  parser.add_argument(
    "--data_dir",
    default=default_data_dir(),
    help="TFDS directory to write into (default: %(default)s)",
  )
  parser.add_argument(
    "--overwrite",
    action="store_true",
    help="replace a data set of this name that differs",
  )
  args = parser.parse_args(argv)
  # So that a build that is told to stop still cleans up behind itself.
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  start = time.monotonic()
  meter = _Meter(sys.stderr)
  code = 0
  try:
    target, data, written = prepare(
      args.name,
      args.source,
      args.data_dir,
      overwrite=args.overwrite,
      progress=meter,
    )
    meter.close()
    _tell(args, target, data, written, time.monotonic() - start)
  except (BadInput, ImportError) as error:
    meter.close()
    print(f"prepare: {error}", file=sys.stderr)
    code = 2
  except OSError as error:
    meter.close()
    print(f"prepare: failed, nothing was written: {error}", file=sys.stderr)
    code = 1
  except KeyboardInterrupt:
    meter.close()
    print("prepare: interrupted, nothing was written", file=sys.stderr)
    code = 130
  finally:
    signal.signal(signal.SIGTERM, before)
  sys.exit(code)


def _kind(source: pathlib.Path) -> str:
  """What the source is: "idx", "folder" or the path of a zip file."""
  if source.is_file():
    return str(source)
  if not source.is_dir():
    raise BadInput(f"--source {source} does not exist")
  if raw.find_idx(source):
    return "idx"
  archives = sorted(source.glob("*.zip"))
  if len(archives) == 1:
    return str(archives[0])
  if len(archives) > 1:
    raise BadInput(
      f"--source {source} holds {len(archives)} zip files: name one of them"
    )
  return "folder"


class _Meter:
  """A line on stderr that says how far the work is and how long it takes."""

  def __init__(self, stream: Any) -> None:
    self._stream = stream
    self._live = stream.isatty()
    self._what = ""
    self._start = self._shown = 0.0

  def __call__(self, what: str, done: int, total: int) -> None:
    now = time.monotonic()
    if what != self._what:
      self.close()
      self._what, self._start, self._shown = what, now, now
    pause = 0.1 if self._live else 10.0
    if now - self._shown < pause and (done < total or not self._live):
      return
    self._shown = now
    left = (now - self._start) * (total - done) / done
    bar = "#" * (20 * done // total)
    text = (
      f"{what} [{bar:.<20}] {done:,} of {total:,} images, {left:.0f} s left"
    )
    self._stream.write(f"\r{text:<75}" if self._live else f"{text}\n")
    self._stream.flush()

  def close(self) -> None:
    """Ends the line, if one was begun."""
    if self._what and self._live:
      self._stream.write("\n")
    self._what = ""


def _tell(
  args: argparse.Namespace,
  target: pathlib.Path,
  data: raw.RawData,
  written: bool,
  seconds: float,
) -> None:
  counts = {split: len(one.labels) for split, one in data.splits.items()}
  shape = describe_shape(data.image_shape)
  print(
    f"{args.name}: {describe_counts(counts)} images of {shape}, "
    f"{len(data.class_names)} classes"
  )
  known = KNOWN.get(args.name)
  if not known:
    print("note: a name of your own, so nothing was compared with originals")
  if known and known.files and not data.files:
    print("note: not IDX files, so nothing was compared with the originals")
  if known and data.lossy:
    print(
      "note: the images are JPEG files, so their pixels are not those of the "
      f"original {args.name}: say so beside any number"
    )
  size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
  state = (
    f"written in {seconds:.0f} s" if written else "already there, the same"
  )
  print(f"{target}: {size:.1f} MB, {state}")
  print(
    f'read it with kd_jax.data.load("{args.name}", "train", '
    f'data_dir="{target.parents[1]}")'
  )


if __name__ == "__main__":
  main()
