import errno
import gzip
import hashlib
import io
import struct
import subprocess
import sys
import zipfile

import numpy as np
from PIL import Image
import pytest

from kd_jax import data
from kd_jax.data import folders, known, png, prepare, raw, writer
from kd_jax.errors import BadInput


def make_arrays(n=30, shape=(6, 5), classes=3, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
  return images, (np.arange(n) % classes).astype(np.uint8)


def idx_bytes(array):
  head = bytes([0, 0, 8, array.ndim])
  return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, packed=True, **arrays):
  """Writes train and test files; `arrays` replaces some by name."""
  train, test = make_arrays(), make_arrays(12, seed=1)
  contents = {
    "train-images-idx3": train[0],
    "train-labels-idx1": train[1],
    "t10k-images-idx3": test[0],
    "t10k-labels-idx1": test[1],
  }
  contents.update(arrays)
  folder.mkdir(exist_ok=True)
  for name, array in contents.items():
    if array is None:
      continue
    content = idx_bytes(array)
    path = folder / f"{name}-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
  return {"train": train, "test": test}


def run(capsys, *arguments):
  """Runs the command; returns its exit code, stdout and stderr."""
  with pytest.raises(SystemExit) as stop:
    prepare.main([str(argument) for argument in arguments])
  out, err = capsys.readouterr()
  return stop.value.code, out, err


def assert_refused(capsys, message, source, data_dir, name="digits"):
  code, out, err = run(capsys, name, "--source", source, "--data_dir", data_dir)
  assert code == 2
  assert out == ""
  assert err.startswith("prepare: ") and err.count("\n") == 1, err
  assert message in err
  assert not data_dir.exists()


def rows_by_index(name, split, root):
  """What plain TFDS reads, in the order of the raw files."""
  import tensorflow_datasets as tfds

  records = tfds.data_source(name, split=split, data_dir=root, download=False)
  return sorted(
    (records[i] for i in range(len(records))), key=lambda row: row["index"]
  )


# IDX files.


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_become_a_data_set(tmp_path, capsys, packed):
  splits = write_idx(tmp_path / "raw", packed)
  code, out, err = run(
    capsys, "digits", "--source", tmp_path / "raw", "--data_dir", tmp_path / "d"
  )
  assert (code, err) == (0, "")
  assert "digits: 30 train + 12 test images of 6x5x1, 3 classes" in out
  assert str(tmp_path / "d" / "digits" / "1.0.0") in out
  for split, (images, labels) in splits.items():
    rows = rows_by_index("digits", split, tmp_path / "d")
    assert [row["index"] for row in rows] == list(range(len(labels)))
    assert np.array_equal([row["image"] for row in rows], images[..., None])
    assert np.array_equal([row["label"] for row in rows], labels)
    ours = data.to_arrays(data.load("digits", split, str(tmp_path / "d")))
    assert sorted(x.tobytes() for x in ours["image"]) == sorted(
      x.tobytes() for x in images
    )
  # Nothing but the data set, also not a directory that it was built in.
  assert [p.name for p in (tmp_path / "d").iterdir()] == ["digits"]
  assert [p.name for p in (tmp_path / "d" / "digits").iterdir()] == ["1.0.0"]


def test_the_order_on_disk_is_that_of_tfds(tmp_path):
  # By the MD5 of the split's name and the position, so that an id means the
  # same image here and in a data set that TFDS itself has built.
  images, labels = make_arrays(300, (2, 2))
  splits = {"test": (images[..., None], labels)}
  writer.write("order", raw.from_arrays(splits), tmp_path)
  hashes = [hashlib.md5(f"test{i}".encode()).hexdigest() for i in range(300)]
  order = np.argsort(hashes)
  stored = data.to_arrays(data.load("order", "test", str(tmp_path)))
  assert np.array_equal(stored["image"][..., 0], images[order])


def test_a_training_set_alone_and_other_names(tmp_path, capsys):
  images, labels = make_arrays()
  folder = tmp_path / "raw"
  folder.mkdir()
  for name, array in (("images.idx3", images), ("labels.idx1", labels)):
    (folder / f"emnist-letters-train-{name}-ubyte").write_bytes(
      idx_bytes(array)
    )
  code, out, _ = run(
    capsys, "letters", "--source", folder, "--data_dir", tmp_path / "d"
  )
  assert code == 0
  assert "letters: 30 train images" in out


IDX_FAULTS = {
  "count": ({"train-labels-idx1": make_arrays(29)[1]}, "holds 30 images, but"),
  "no labels": ({"t10k-labels-idx1": None}, "holds no test labels file"),
  "no train": (
    {"train-images-idx3": None, "train-labels-idx1": None},
    "holds no train images file",
  ),
  "empty": (
    {
      "train-images-idx3": np.zeros((0, 6, 5), np.uint8),
      "train-labels-idx1": np.zeros(0, np.uint8),
    },
    "is empty: its header says [0, 6, 5]",
  ),
  "shapes": (
    {"t10k-images-idx3": make_arrays(12, (6, 6))[0]},
    "the images of the splits differ in shape",
  ),
  "dimensions": (
    {"train-images-idx3": make_arrays()[0].reshape(30, 30)},
    "starts with 00000802, not with the magic number 00000803",
  ),
}


@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_idx_files_that_do_not_fit(tmp_path, capsys, fault):
  replaced, message = IDX_FAULTS[fault]
  write_idx(tmp_path / "raw", **replaced)
  assert_refused(capsys, message, tmp_path / "raw", tmp_path / "d")


BYTE_FAULTS = {
  "cut off": (lambda b: b[:-3], "is cut off: its header [30, 6, 5] asks for"),
  "too long": (lambda b: b + b"\0", "goes on after its end"),
  "header": (lambda b: b[:9], "is cut off in its header"),
  "nothing": (lambda b: b"", "starts with , not with the magic number"),
  "type": (
    lambda b: b[:2] + b"\x0d" + b[3:],
    "starts with 00000d03, not with the magic number 00000803",
  ),
  "huge": (
    lambda b: b[:4] + b"\x7f" + b[5:],
    "says that it holds [2130706462, 6, 5], more than it can",
  ),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fault", BYTE_FAULTS)
def test_damaged_idx_files(tmp_path, capsys, fault, packed):
  write_idx(tmp_path / "raw", packed=False)
  damage, message = BYTE_FAULTS[fault]
  path = tmp_path / "raw" / "train-images-idx3-ubyte"
  content = damage(path.read_bytes())
  path.write_bytes(gzip.compress(content) if packed else content)
  assert_refused(capsys, message, tmp_path / "raw", tmp_path / "d")


@pytest.mark.parametrize("damage", ["cut off", "flipped"])
def test_damaged_gzip(tmp_path, capsys, damage):
  write_idx(tmp_path / "raw")
  path = tmp_path / "raw" / "train-images-idx3-ubyte.gz"
  content = bytearray(path.read_bytes())
  if damage == "cut off":
    content = content[: len(content) // 2]
  else:
    content[-20] ^= 0xFF
  path.write_bytes(content)
  message = "train-images-idx3-ubyte.gz is damaged or cut off"
  assert_refused(capsys, message, tmp_path / "raw", tmp_path / "d")


def test_the_same_file_twice(tmp_path, capsys):
  write_idx(tmp_path / "raw")
  write_idx(tmp_path / "raw", packed=False)
  assert_refused(capsys, "holds both", tmp_path / "raw", tmp_path / "d")


def test_well_known_names_are_held_to_the_originals(tmp_path, capsys):
  write_idx(tmp_path / "raw")
  source, target = tmp_path / "raw", tmp_path / "d"
  message = "train-images-idx3-ubyte is not the original of mnist"
  assert_refused(capsys, message, source, target, "mnist")
  message = "kmnist must have images of 28x28x1, not 6x5x1"
  assert_refused(capsys, message, source, target, "kmnist")
  images, labels = make_arrays(12, (28, 28))
  write_idx(
    source,
    **{"train-images-idx3": images, "train-labels-idx1": labels},
    **{"t10k-images-idx3": images, "t10k-labels-idx1": labels},
  )
  message = "must have 60,000 train + 10,000 test examples, not 12 train + 12"
  assert_refused(capsys, message, source, target, "kmnist")
  write_idx(source, **{"t10k-labels-idx1": np.full(12, 10, np.uint8)})
  message = "label 10 of test image 0 is outside the 10 classes [0, 9]"
  assert_refused(capsys, message, source, target, "fashion_mnist")


def test_other_file_names_do_not_hide_another_content(tmp_path, capsys):
  write_idx(tmp_path / "raw", packed=False)
  for path in (tmp_path / "raw").iterdir():
    path.rename(path.with_name("my-" + path.name.replace("-idx", ".idx")))
  message = "train-images-idx3-ubyte is not the original of mnist"
  assert_refused(capsys, message, tmp_path / "raw", tmp_path / "d", "mnist")


@pytest.mark.parametrize(
  ("name", "version", "shape", "text_id"),
  [
    ("mnist", "3.0.1", (28, 28, 1), False),
    ("cifar10", "3.0.2", (32, 32, 3), True),
  ],
)
def test_the_code_in_tfds_reads_its_names(
  tmp_path, name, version, shape, text_id
):
  import tensorflow_datasets as tfds

  images = np.random.default_rng(0).integers(0, 256, (9, *shape), np.uint8)
  labels = np.arange(9)
  found = raw.from_arrays(
    {"train": (images, labels)}, known.KNOWN[name].class_names
  )
  writer.write(name, found, tmp_path, version=version, text_id=text_id)
  by_code = tfds.builder(name, data_dir=str(tmp_path))
  assert type(by_code).__module__.startswith("tensorflow_datasets.image_class")
  assert by_code.info.features["label"].names == list(found.class_names)
  records = tfds.data_source(
    name, split="train", data_dir=str(tmp_path), download=False
  )
  ours = data.load(name, "train", str(tmp_path))
  assert set(records[0]) == {"image", "label"} | ({"id"} if text_id else set())
  for record, example in zip(records, ours, strict=True):
    assert np.array_equal(record["image"], example["image"])
    assert record["label"] == example["label"]
    if text_id:
      assert record["id"] == f"train_{example['label']:05}".encode()


# Existing data sets and interruptions.


def test_twice_the_same_and_something_else(tmp_path, capsys):
  source, target = tmp_path / "raw", tmp_path / "d"
  arguments = ("digits", "--source", source, "--data_dir", target)
  write_idx(source)
  assert run(capsys, *arguments)[0] == 0
  directory = target / "digits" / "1.0.0"
  before = {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}

  other = tmp_path / "unpacked"
  write_idx(other, packed=False)
  code, out, err = run(
    capsys, "digits", "--source", other, "--data_dir", target
  )
  assert (code, err) == (0, "")
  assert "already there, the same" in out
  after = {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}
  assert after == before

  labels = make_arrays()[1][::-1]
  write_idx(source, **{"train-labels-idx1": labels})
  code, _, err = run(capsys, *arguments)
  assert code == 2
  assert "already holds another data set: --overwrite replaces it" in err
  assert {p.name: p.stat().st_mtime_ns for p in directory.iterdir()} == before

  assert run(capsys, *arguments, "--overwrite")[0] == 0
  rows = rows_by_index("digits", "train", target)
  assert np.array_equal([row["label"] for row in rows], labels)
  assert [p.name for p in target.iterdir()] == ["digits"]


@pytest.mark.parametrize("damage", ["file", "digest"])
def test_an_existing_data_set_that_is_damaged(tmp_path, capsys, damage):
  source, target = tmp_path / "raw", tmp_path / "d"
  arguments = ("digits", "--source", source, "--data_dir", target)
  write_idx(source)
  assert run(capsys, *arguments)[0] == 0
  directory = target / "digits" / "1.0.0"
  if damage == "file":
    next(directory.glob("*train.array_record*")).write_bytes(b"")
  else:
    (directory / "metadata.json").write_text("not json")
  code, _, err = run(capsys, *arguments)
  assert code == 2
  assert "--overwrite replaces it" in err and err.count("\n") == 1
  assert run(capsys, *arguments, "--overwrite")[0] == 0
  assert run(capsys, *arguments)[0] == 0


@pytest.mark.parametrize("existing", [True, False])
def test_an_interruption_leaves_nothing(tmp_path, existing):
  target = tmp_path / "new" / "d"
  old = raw.from_arrays({"train": (make_arrays()[0][..., None], np.arange(30))})
  if existing:
    writer.write("digits", old, target)
  changed = raw.from_arrays(
    {"train": (make_arrays(seed=3)[0][..., None], np.arange(30))}
  )

  def interrupt(what, done, total):
    assert (what, total) == ("writing", 30)
    if done == 20:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    writer.write("digits", changed, target, overwrite=True, progress=interrupt)
  if existing:
    assert [p.name for p in target.iterdir()] == ["digits"]
    assert writer.write("digits", old, target)[1] is False
  else:
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, capsys, monkeypatch):
  def fail(directory):
    raise OSError(errno.ENOSPC, "No space left on device", str(directory))

  monkeypatch.setattr(writer, "_sync", fail)
  write_idx(tmp_path / "raw")
  code, out, err = run(
    capsys, "digits", "--source", tmp_path / "raw", "--data_dir", tmp_path / "d"
  )
  assert (code, out) == (1, "")
  assert "nothing was written" in err and "No space left on device" in err
  assert not (tmp_path / "d").exists()


# Image folders.


def image_bytes(pixels, form="PNG", mode=None):
  image = Image.fromarray(np.asarray(pixels, np.uint8))
  file = io.BytesIO()
  (image.convert(mode) if mode else image).save(file, form)
  return file.getvalue()


def make_files(shapes=((7, 6, 3),), form="PNG"):
  """path -> bytes of a small image folder."""
  rng = np.random.default_rng(0)
  files, turn = {}, 0
  for split, count in (("train", 4), ("test", 2)):
    for name in ("emu", "cat", "dog"):
      for number in range(count):
        shape = shapes[turn % len(shapes)]
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        suffix = {"PNG": "png", "JPEG": "jpg"}[form]
        path = f"{split}/{name}/{number:03}.{suffix}"
        files[path] = image_bytes(pixels, form)
        turn += 1
  return files


def write_folder(root, files):
  for path, content in files.items():
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content)
  return root


def write_zip(path, files):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def expected_order(files, split):
  return sorted(path for path in files if path.startswith(f"{split}/"))


@pytest.mark.parametrize("packed", ["folder", "zip", "zip below", "in folder"])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_image_folders(tmp_path, capsys, packed, form):
  files = make_files(form=form)
  extra = {"README.md": b"hello", "train/.DS_Store": b"x", "__MACOSX/a": b""}
  if packed == "folder":
    source = write_folder(tmp_path / "raw", files | extra)
  elif packed == "zip below":
    below = {f"birds/{path}": content for path, content in files.items()}
    source = write_zip(tmp_path / "birds.zip", below | extra)
  else:
    source = write_zip(tmp_path / "birds.zip", files | extra)
    if packed == "in folder":
      source = tmp_path
  code, out, err = run(
    capsys, "birds", "--source", source, "--data_dir", tmp_path / "d"
  )
  assert (code, err) == (0, "")
  assert "birds: 12 train + 6 test images of 7x6x3, 3 classes" in out
  for split in ("train", "test"):
    rows = rows_by_index("birds", split, tmp_path / "d")
    for row, path in zip(rows, expected_order(files, split), strict=True):
      with Image.open(io.BytesIO(files[path])) as image:
        assert np.array_equal(row["image"], np.asarray(image))
      assert row["label"] == ["cat", "dog", "emu"].index(path.split("/")[1])
  source = data.load("birds", "train", str(tmp_path / "d"))
  assert source.class_names == ("cat", "dog", "emu")
  assert data.to_arrays(source)["image"].shape == (12, 7, 6, 3)


def test_a_folder_and_its_zip_are_the_same(tmp_path, capsys):
  files = make_files()
  folder = write_folder(tmp_path / "raw", files)
  archive = write_zip(tmp_path / "raw.zip", files)
  target = ("--data_dir", tmp_path / "d")
  assert run(capsys, "birds", "--source", folder, *target)[0] == 0
  code, out, _ = run(capsys, "birds", "--source", archive, *target)
  assert code == 0 and "already there, the same" in out


def test_small_images_are_stored_decoded(tmp_path):
  # Two JPEG decoders may differ by one level; PNG is the same for all.
  source = write_folder(tmp_path / "raw", make_files(form="JPEG"))
  found = folders.read_directory(source)
  assert found.lossy
  for split in found.splits.values():
    assert split.image(0).startswith(b"\x89PNG")


def test_large_images_stay_as_they_are(tmp_path):
  shapes = ((70, 66, 3), (65, 80, 3), (80, 65))
  files = make_files(shapes, "JPEG")
  source = write_folder(tmp_path / "raw", files)
  _, found, _ = prepare.prepare("birds", source, tmp_path / "d")
  assert found.image_shape == (None, None, 3)
  assert found.lossy
  for index, path in enumerate(expected_order(files, "train")):
    stored = found.splits["train"].image(index)
    with Image.open(io.BytesIO(files[path])) as image:
      if image.mode == "RGB":
        assert stored == files[path]  # Not encoded a second time.
      else:
        pixels = png.decode(stored, 3)
        assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
  loaded = data.load("birds", "train", str(tmp_path / "d"))
  assert loaded.image_shape == (None, None, 3)
  assert {loaded[i]["image"].shape for i in range(12)} == {
    (70, 66, 3),
    (65, 80, 3),
    (80, 65, 3),
  }
  with pytest.raises(ValueError, match="images differ in shape"):
    data.to_arrays(loaded)


def test_grey_and_palette_images(tmp_path):
  files = make_files(((5, 5),))
  found = prepare.prepare("grey", write_folder(tmp_path / "g", files), tmp_path)
  assert found[1].image_shape == (5, 5, 1)
  first = expected_order(files, "train")[0]
  color = np.zeros((5, 5, 3), np.uint8)
  color[:2] = 204, 0, 0  # In the palette
  files[first] = image_bytes(color, mode="P")
  _, found, _ = prepare.prepare(
    "mixed", write_folder(tmp_path / "m", files), tmp_path
  )
  assert found.image_shape == (5, 5, 3)
  assert np.array_equal(png.decode(found.splits["train"].image(0), 3), color)


def huge_png():
  header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + png._chunk(b"IHDR", header)
    + png._chunk(b"IDAT", b"")
    + png._chunk(b"IEND", b"")
  )


FILE_FAULTS = {
  "not an image": ({"train/cat/9.png": b"hello"}, "9.png is no readable PNG"),
  "empty": ({"train/cat/9.jpg": b""}, "9.jpg is no readable PNG or JPEG"),
  "cut off": (
    {"train/cat/9.png": make_files()["train/cat/000.png"][:-60]},
    "train/cat/9.png is damaged",
  ),
  "gif": ({"train/cat/9.gif": b"GIF89a"}, "9.gif is no .jpg, .jpeg or .png"),
  "disguised": (
    {"train/cat/9.png": image_bytes(np.zeros((7, 6)), "GIF")},
    "9.png is no readable PNG or JPEG",
  ),
  "alpha": (
    {"train/cat/9.png": image_bytes(np.zeros((7, 6, 4)))},
    "9.png is neither grey nor RGB (mode RGBA",
  ),
  "huge": ({"train/cat/9.png": huge_png()}, "9.png has 9000x9000 pixels"),
  "class": (
    {"test/fox/0.png": image_bytes(np.zeros((7, 6, 3)))},
    "test/fox/0.png has a class that train/ has not",
  ),
  "place": (
    {"train/0.png": image_bytes(np.zeros((7, 6, 3)))},
    "train/0.png is not in <split>/<class>/",
  ),
  "two": (
    {"more/train/cat/0.png": image_bytes(np.zeros((7, 6, 3)))},
    "has two folders for train",
  ),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_folders_with_a_fault(tmp_path, capsys, fault, packed):
  more, message = FILE_FAULTS[fault]
  if packed:
    source = write_zip(tmp_path / "raw.zip", make_files() | more)
  else:
    source = write_folder(tmp_path / "raw", make_files() | more)
  assert_refused(capsys, message, source, tmp_path / "d")


def test_links_are_refused(tmp_path, capsys):
  source = write_folder(tmp_path / "raw", make_files())
  secret = tmp_path / "secret.png"
  secret.write_bytes(make_files()["train/cat/000.png"])
  (source / "train" / "cat" / "9.png").symlink_to(secret)
  assert_refused(capsys, "9.png is a link", source, tmp_path / "d")
  (source / "train" / "cat" / "9.png").unlink()
  (source / "train" / "fox").symlink_to(source / "train" / "cat")
  assert_refused(capsys, "fox is a link", source, tmp_path / "d")


def zip_entry(name, content=b"x", mode=0o100644, size=None):
  info = zipfile.ZipInfo(name)
  info.external_attr = mode << 16
  info.compress_type = zipfile.ZIP_DEFLATED
  return info, content


ZIP_FAULTS = {
  "parent": (zip_entry("train/cat/../../../x.png"), "leads out of the archive"),
  "absolute": (zip_entry("/etc/train/cat/x.png"), "leads out of the archive"),
  "backslash": (zip_entry("..\\train\\x.png"), "leads out of the archive"),
  "drive": (zip_entry("C:/train/cat/x.png"), "leads out of the archive"),
  "link": (zip_entry("train/cat/x.png", b"/etc/passwd", 0o120777), "is a link"),
  "bomb": (zip_entry("train/cat/x.png", bytes(10**7)), "would unpack to 100"),
  "large": (zip_entry("train/cat/x.png", bytes(10**5)), "unpacks to 100000"),
}


@pytest.mark.parametrize("fault", ZIP_FAULTS)
def test_archives_that_are_refused(tmp_path, capsys, monkeypatch, fault):
  if fault == "large":
    monkeypatch.setattr("kd_jax.data.folders._MAX_FILE", 99_999)
  (info, content), message = ZIP_FAULTS[fault]
  path = write_zip(tmp_path / "raw.zip", make_files())
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr(info, content)
  assert_refused(capsys, message, path, tmp_path / "d")


def test_an_encrypted_archive(tmp_path, capsys):
  path = write_zip(tmp_path / "raw.zip", {"train/cat/0.png": b"x"})
  content = bytearray(path.read_bytes())
  content[content.index(b"PK\x01\x02") + 8] |= 1  # The flag in the directory.
  path.write_bytes(content)
  assert_refused(capsys, "is encrypted", path, tmp_path / "d")


def test_an_archive_with_a_name_twice(tmp_path, capsys):
  path = write_zip(tmp_path / "raw.zip", make_files())
  with (
    zipfile.ZipFile(path, "a") as archive,
    pytest.warns(UserWarning, match="Duplicate name"),
  ):
    archive.writestr("train/cat/000.png", b"other")
  assert_refused(capsys, "the same name twice", path, tmp_path / "d")


def test_a_damaged_archive(tmp_path, capsys):
  path = write_zip(tmp_path / "raw.zip", make_files())
  content = bytearray(path.read_bytes())
  content[200] ^= 0xFF
  path.write_bytes(content)
  assert_refused(capsys, "is damaged", path, tmp_path / "d")
  path.write_bytes(content[:-100])
  message = "neither a directory nor a readable zip file"
  assert_refused(capsys, message, path, tmp_path / "d")


# The command.


def test_cifar10_must_have_its_classes(tmp_path, capsys):
  source = write_folder(tmp_path / "raw", make_files())
  message = "has the classes cat, dog, emu; they must be airplane, automobile"
  assert_refused(capsys, message, source, tmp_path / "d", "cifar10")


@pytest.mark.parametrize(
  "name", ["Digits", "../digits", "a/b", "", "1a", "a b"]
)
def test_unusable_names(tmp_path, capsys, name):
  write_idx(tmp_path / "raw")
  message = "it must be lower-case letters"
  assert_refused(capsys, message, tmp_path / "raw", tmp_path / "d", name)


def test_sources_that_are_nothing(tmp_path, capsys):
  target = tmp_path / "d"
  assert_refused(capsys, "does not exist", tmp_path / "nowhere", target)
  empty = tmp_path / "empty"
  empty.mkdir()
  assert_refused(capsys, "IDX files would be named", empty, target)
  for name in ("a.zip", "b.zip"):
    write_zip(empty / name, make_files())
  assert_refused(capsys, "holds 2 zip files: name one", empty, target)
  file = tmp_path / "notes.txt"
  file.write_text("hello")
  message = "neither a directory nor a readable zip file"
  assert_refused(capsys, message, file, target)


def test_arrays_that_do_not_fit():
  images, labels = make_arrays()
  images = images[..., None]
  for splits, message in (
    ({"train": (images.astype("f"), labels)}, "train images are float32"),
    ({"train": (images, labels[:-1])}, "30 images but 29 labels"),
    ({"train": (images[:0], labels[:0])}, "train is empty"),
    ({}, "there are no splits"),
  ):
    with pytest.raises(BadInput, match=message):
      raw.from_arrays(splits)
  with pytest.raises(BadInput, match="label 2 of train image 2 is outside"):
    raw.from_arrays({"train": (images, labels)}, ["a", "b"])


def test_help_shows_an_example(capsys):
  code, out, _ = run(capsys, "--help")
  assert code == 0
  assert "python -m kd_jax.data.prepare mnist --source" in out


def test_the_command_in_its_own_process(tmp_path):
  command = [sys.executable, "-m", "kd_jax.data.prepare", "digits"]
  command += [
    "--source",
    str(tmp_path / "no"),
    "--data_dir",
    str(tmp_path / "d"),
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr == f"prepare: --source {tmp_path / 'no'} does not exist\n"


def test_the_progress_line():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  meter = prepare._Meter(stream)
  for done in range(1, 101):
    meter("writing", done, 100)
  meter.close()
  last = stream.getvalue().split("\r")[-1]
  assert last.startswith("writing [####################] 100 of 100 images")
  assert last.endswith("\n")


def test_a_name_that_is_nearly_a_known_one(tmp_path, capsys):
  write_idx(tmp_path / "raw")
  message = "'mnits', which is easily taken for 'mnist'"
  assert_refused(
    capsys, message, tmp_path / "raw", tmp_path / "tfds", name="mnits"
  )
