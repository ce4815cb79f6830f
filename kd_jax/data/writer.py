"""Writes checked raw data as a TFDS data set (ArrayRecord), all or nothing."""

from collections.abc import Iterator
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import numpy as np

from kd_jax.data import sources
from kd_jax.data.folders import Progress
from kd_jax.data.raw import RawData
from kd_jax.data.source import require
from kd_jax.errors import BadInput

_DIGEST = "kd_jax_digest"


def write(
  name: str,
  data: RawData,
  data_dir: str | os.PathLike[str],
  *,
  version: str = "1.0.0",
  text_id: bool = False,
  overwrite: bool = False,
  progress: Progress | None = None,
) -> tuple[pathlib.Path, bool]:
  """Writes checked raw data as the TFDS data set data_dir/name/version.

  It is built in a hidden directory beside and moved to its place when it is
  whole; a process that is killed outright leaves that directory behind. Each
  example has "image" (PNG, or the file's own JPEG), "label" and "index", its
  position in the raw files; TFDS fixes the order on disk by a hash of that.

  Args:
    name: lower-case letters, digits and underscores, from a letter on.
    data: as `raw.from_arrays` or `raw.read_idx` give it.
    data_dir: the TFDS directory.
    version: the version to write.
    text_id: whether to store "id" too, as "train_00000".
    overwrite: whether to replace a data set that differs.
    progress: told how far the work is.

  Returns:
    (the directory, False if the same data set was there already).

  Raises:
    BadInput: if the name is unusable, another data set is there already, or
      an image turns out to be damaged.
    OSError: if the disk fails.
  """
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise BadInput(
      f"NAME is {name!r}; it must be lower-case letters, digits and "
      "underscores, as fashion_mnist"
    )
  require("tensorflow_datasets", "tensorflow-datasets array_record")
  root = pathlib.Path(data_dir).expanduser().absolute()
  target = root / name / version
  if target.exists() and not overwrite:
    _check_existing(target, name, version, data)
    return target, False
  made = [folder for folder in target.parents if not folder.exists()]
  root.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
  try:
    built = _build(name, data, scratch, version, text_id, progress)
    _sync(built)
    target.parent.mkdir(exist_ok=True)
    if target.exists():
      if not overwrite:  # Another process was faster.
        _check_existing(target, name, version, data)
        return target, False
      target.rename(scratch / "old")
    built.rename(target)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)  # A folder in use stays.
    for folder in made:  # The deepest first.
      with contextlib.suppress(OSError):
        folder.rmdir()
    raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return target, True


def _check_existing(
  target: pathlib.Path, name: str, version: str, data: RawData
) -> None:
  """Raises BadInput unless the data set that is there is this one."""
  try:
    text = (target / "metadata.json").read_text(encoding="utf-8")
    digest = json.loads(text)[_DIGEST]
  except (OSError, ValueError, KeyError, TypeError):
    digest = None  # TFDS wrote it, or something else.
  if digest != data.digest:
    raise BadInput(
      f"{target} already holds another data set: --overwrite replaces it"
    )
  root = str(target.parents[1])
  for split, one in data.splits.items():
    try:
      source = sources.tfds(f"{name}:{version}", split, root)
      whole = len(source) == len(one.labels)
      source.rows(np.array([0, len(source) - 1]))
    except ValueError as error:
      raise BadInput(
        f"{target} is damaged: --overwrite replaces it ({error})"
      ) from error
    if not whole:
      raise BadInput(f"{target} is not whole: --overwrite replaces it")


def _build(
  name: str,
  data: RawData,
  scratch: pathlib.Path,
  version: str,
  text_id: bool,
  progress: Progress | None,
) -> pathlib.Path:
  """Builds the data set below `scratch` and returns its directory."""
  import tensorflow_datasets as tfds

  features: dict[str, Any] = {
    "image": tfds.features.Image(shape=data.image_shape),
    "label": tfds.features.ClassLabel(names=list(data.class_names)),
    "index": np.int64,
  }
  if text_id:
    features["id"] = tfds.features.Text()
  total = sum(len(split.labels) for split in data.splits.values())
  done = 0

  class Info(tfds.core.DatasetInfo):
    """Metadata that does not ask a server for what is known about NAME."""

    def initialize_from_bucket(self) -> None:
      """Does nothing."""

  class Builder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
  ):
    """Hands the raw examples to TFDS."""

    VERSION = tfds.core.Version(version)
    # No checksums beside this file. Looking for them needs a package that
    # TFDS does not ask for.
    code_path = None

    def _info(self) -> Any:
      return Info(
        builder=self,
        description=f"{name}, prepared from raw files by kd_jax.",
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "label"),
        metadata=tfds.core.MetadataDict({_DIGEST: data.digest}),
      )

    def _split_generators(self, manager: Any) -> dict[str, Iterator[Any]]:
      del manager  # There is nothing to download.
      return {split: self._generate_examples(split) for split in data.splits}

    def _generate_examples(
      self, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
      nonlocal done
      one = data.splits[split]
      for index, label in enumerate(one.labels):
        example = {
          "image": io.BytesIO(one.image(index)),
          "label": int(label),
          "index": index,
        }
        if text_id:
          example["id"] = f"{split}_{index:05d}"
        yield index, example
        done += 1
        if progress:
          progress("writing", done, total)

  Builder.name = name
  with _quiet(tfds):
    builder = Builder(data_dir=str(scratch), file_format="array_record")
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
  return pathlib.Path(builder.data_dir)


@contextlib.contextmanager
def _quiet(tfds: Any) -> Iterator[None]:
  """Keeps TFDS from printing where it builds and from drawing its own bars."""
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()


def _sync(directory: pathlib.Path) -> None:
  """Waits until the files are on the disk."""
  for path in [*directory.iterdir(), directory]:
    handle = os.open(path, os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)
