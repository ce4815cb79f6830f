"""Image folders, plain or in a zip archive: train/<class>/<name>.png or .jpg.

Nothing is unpacked to disk. An archive is refused as a whole if a name in it
leads elsewhere, an entry is a link or encrypted, or it would unpack to far
more than image files can.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import hashlib
import io
import os
import pathlib
import stat
from typing import Any
import zipfile
import zlib

import numpy as np

from kd_jax.data import png
from kd_jax.data.raw import RawData, RawSplit
from kd_jax.errors import BadInput

# Told how far a long job is: (what, done, total).
Progress = Callable[[str, int, int], None]

_SPLITS = {
  "train": "train",
  "test": "test",
  "val": "validation",
  "validation": "validation",
}
_SUFFIXES = (".jpg", ".jpeg", ".png")
_IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini")  # and names with a dot
_MODES = ("L", "RGB", "1", "P")  # Pillow's names of what has one meaning here.
_MAX_PIXELS = 2**26
_MAX_FILE = 2**28  # Bytes of one image file.
_MAX_RATIO = 50  # Unpacked to packed size of an archive of image files.
_SMALL = 64  # Pixels; images up to this size are stored decoded.


@dataclasses.dataclass(frozen=True)
class _File:
  """A file below the source: where it is and how to read it."""

  parts: tuple[str, ...]
  read: Callable[[], bytes]

  @property
  def name(self) -> str:
    return "/".join(self.parts)


def read_directory(
  root: pathlib.Path,
  class_names: Sequence[str] | None = None,
  progress: Progress | None = None,
) -> RawData:
  """Reads the images below root/train/<class>/, root/test/<class>/ and so on.

  All files are opened once to check the headers and the digest; the pixels
  are decoded when they are asked for. If all images have one shape of at most
  64x64, they are stored decoded, as PNG, so that every reader sees the same
  pixels; larger files are stored as they are.

  Args:
    root: the directory; the folders may be one or more levels below it.
    class_names: the classes that there must be; by default the names of the
      folders in train/, sorted.
    progress: told how far the check is.

  Returns:
    The data set.

  Raises:
    BadInput: if there are no images, a link, a file that is no image, a class
      that train/ does not have.
  """
  return _build(list(_walk(root)), str(root), class_names, progress)


def read_zip(
  path: pathlib.Path,
  class_names: Sequence[str] | None = None,
  progress: Progress | None = None,
) -> RawData:
  """Reads a zip archive of such folders; see `read_directory`.

  Args:
    path: the archive.
    class_names: as `read_directory`.
    progress: as `read_directory`.

  Returns:
    The data set.

  Raises:
    BadInput: as `read_directory`, or if the archive is damaged or unsafe.
  """
  try:
    archive = zipfile.ZipFile(path)
  except (zipfile.BadZipFile, OSError) as error:
    raise BadInput(
      f"{path} is neither a directory nor a readable zip file: {error}"
    ) from error
  return _build(_list_zip(archive, path), str(path), class_names, progress)


def _walk(root: pathlib.Path) -> Iterator[_File]:
  def fail(error: OSError) -> None:
    raise error

  for folder, folders, names in os.walk(root, onerror=fail):
    folders.sort()
    for name in sorted([*folders, *names]):
      path = pathlib.Path(folder, name)
      if path.is_symlink():
        raise BadInput(f"{path} is a link: put the files themselves there")
    for name in sorted(names):
      path = pathlib.Path(folder, name)
      yield _File(path.relative_to(root).parts, path.read_bytes)


def _list_zip(archive: zipfile.ZipFile, path: pathlib.Path) -> list[_File]:
  infos = archive.infolist()
  for info in infos:
    name = info.filename
    parts = pathlib.PurePosixPath(name).parts
    mode = info.external_attr >> 16
    wrong = None
    if ".." in parts or name.startswith("/") or "\\" in name or ":" in name:
      wrong = "leads out of the archive"
    elif stat.S_ISLNK(mode):
      wrong = "is a link"
    elif info.flag_bits & 1:
      wrong = "is encrypted"
    elif info.file_size > _MAX_FILE:
      wrong = f"unpacks to {info.file_size} bytes, more than {_MAX_FILE}"
    if wrong:
      raise BadInput(f"{path} is refused: its entry {name!r} {wrong}")
  names = {info.filename for info in infos}
  if len(names) != len(infos):
    raise BadInput(f"{path} is refused: it holds the same name twice")
  unpacked, packed = sum(i.file_size for i in infos), path.stat().st_size
  if unpacked > _MAX_RATIO * packed:
    raise BadInput(
      f"{path} is refused: its {packed} bytes would unpack to {unpacked}, "
      f"more than {_MAX_RATIO} times as many"
    )

  def reader(info: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
      try:
        return archive.read(info)
      except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
      ) as error:
        raise BadInput(
          f"{path}: entry {info.filename!r} is damaged: {error}"
        ) from error

    return read

  return [
    _File(pathlib.PurePosixPath(info.filename).parts, reader(info))
    for info in sorted(infos, key=lambda info: info.filename)
    if not info.is_dir()
  ]


def _build(
  files: list[_File],
  where: str,
  class_names: Sequence[str] | None,
  progress: Progress | None,
) -> RawData:
  groups = _group(files, where)
  if "train" not in groups:
    raise BadInput(
      f"{where} holds no images in train/<class>/ (.jpg, .jpeg or .png); IDX "
      "files would be named train-images-idx3-ubyte.gz and so on"
    )
  classes = sorted({file.parts[-2] for file in groups["train"]})
  if class_names is not None and classes != sorted(class_names):
    raise BadInput(
      f"{where} has the classes {', '.join(classes)}; they must be "
      f"{', '.join(class_names)}"
    )
  names = tuple(class_names or classes)
  label = {name: index for index, name in enumerate(names)}
  for members in groups.values():
    for file in members:
      if file.parts[-2] not in label:
        raise BadInput(f"{where}: {file.name} has a class that train/ has not")
      if not file.parts[-2].isprintable():
        raise BadInput(f"{where}: class {file.parts[-2]!r} is not printable")

  total = sum(len(members) for members in groups.values())
  done, digests, sizes, modes, formats = 0, {}, set(), set(), set()
  for split, members in groups.items():
    digest = hashlib.sha256()
    for file in members:
      data = file.read()
      with _open(data, f"{where}: {file.name}") as image:
        sizes.add(image.size)
        modes.add(image.mode)
        formats.add(image.format)
      digest.update(f"{file.parts[-2]} {len(data)} ".encode() + data)
      done += 1
      if progress:
        progress("checking", done, total)
    digests[split] = digest.hexdigest()

  mode = "L" if modes <= {"L", "1"} else "RGB"
  width, height = next(iter(sizes)) if len(sizes) == 1 else (None, None)
  small = width is not None and max(width, height) <= _SMALL

  def split_of(split: str) -> RawSplit:
    members = groups[split]

    def image(index: int) -> bytes:
      file = members[index]
      data = file.read()
      with _open(data, f"{where}: {file.name}") as opened:
        try:
          opened.load()
        except (OSError, SyntaxError) as error:
          raise BadInput(f"{where}: {file.name} is damaged: {error}") from error
        if not small and opened.mode == mode:
          return data
        pixels = np.asarray(opened.convert(mode))
      return png.encode(pixels.reshape(*pixels.shape[:2], -1))

    labels = [label[file.parts[-2]] for file in members]
    return RawSplit(np.array(labels, np.int64), image, digests[split])

  return RawData(
    splits={split: split_of(split) for split in groups},
    class_names=names,
    image_shape=(height, width, 1 if mode == "L" else 3),
    lossy="JPEG" in formats,
  )


def _group(files: list[_File], where: str) -> dict[str, list[_File]]:
  """The image files of each split; anything out of place is an error."""
  groups: dict[str, list[_File]] = {}
  folders: dict[str, tuple[str, ...]] = {}
  for file in files:
    parts = file.parts
    if any(part.startswith(".") or part in _IGNORED for part in parts):
      continue
    is_image = parts[-1].lower().endswith(_SUFFIXES)
    split = _SPLITS.get(parts[-3]) if len(parts) > 2 else None
    if split is None:
      if is_image:
        raise BadInput(f"{where}: {file.name} is not in <split>/<class>/")
      continue  # A README or a list of names beside the folders.
    if not is_image:
      raise BadInput(f"{where}: {file.name} is no .jpg, .jpeg or .png file")
    if folders.setdefault(split, parts[:-2]) != parts[:-2]:
      raise BadInput(
        f"{where} has two folders for {split}: {'/'.join(folders[split])} and "
        f"{'/'.join(parts[:-2])}"
      )
    groups.setdefault(split, []).append(file)
  order = sorted(groups, key=list(_SPLITS.values()).index)
  return {
    split: sorted(groups[split], key=lambda file: file.parts) for split in order
  }


def _open(data: bytes, where: str) -> Any:
  """A Pillow image of which only the header is read, or BadInput."""
  from PIL import Image

  if len(data) > _MAX_FILE:
    raise BadInput(f"{where} has {len(data)} bytes, more than {_MAX_FILE}")
  try:
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
  except (
    OSError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
  ) as error:
    raise BadInput(f"{where} is no readable PNG or JPEG image") from error
  if image.width * image.height > _MAX_PIXELS:
    raise BadInput(
      f"{where} has {image.width}x{image.height} pixels, more than "
      f"{_MAX_PIXELS} in all"
    )
  if image.mode not in _MODES or "transparency" in image.info:
    raise BadInput(
      f"{where} is neither grey nor RGB (mode {image.mode}, with or without "
      "transparency): convert it first"
    )
  return image
