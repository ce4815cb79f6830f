"""Weights in `.safetensors` files: round trips, and what is refused unread."""

import io
import json
import os
import pathlib
import pickle
import resource
import struct
import time
import tracemalloc
import zipfile

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kd_jax import models, train
from kd_jax.errors import BadInput
from kd_jax.models import bit_npz, weights

SHAPE = (4, 4, 1)
KERNEL = "params/Dense_0/kernel"


class WithStatistics(nn.Module):
  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.Dense(8)(x.reshape(len(x), -1))
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(3, param_dtype=jnp.bfloat16)(x)


BIT = {"depth": (1,), "base_width": 4, "groups": 2, "root": "cifar"}


def filled(like):
  """Numbers for the shapes; nothing is compiled."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)


@pytest.fixture(scope="module")
def mlp():
  return filled(models.template("mlp", 3, SHAPE, hidden=(5,)))


@pytest.fixture(scope="module")
def bit():
  return filled(models.template("bit_resnet", 3, (8, 8, 3), **BIT))


def same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert isinstance(a, np.ndarray)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(a, b)


def refused(path, like, load=weights.load):
  """The message, which is one line that begins with the path."""
  with pytest.raises(BadInput) as error:
    load(path, like)
  message = str(error.value)
  assert message.startswith(str(path.parent)) and "\n" not in message
  assert len(message) < 1000
  return message.removeprefix(str(path.parent) + os.sep)


class Within:
  """A time and memory that nothing which read a bomb could stay below."""

  def __enter__(self):
    tracemalloc.start()
    self.rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    self.start = time.process_time()

  def __exit__(self, *unused):
    seconds = time.process_time() - self.start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.rss
    assert seconds < 1
    assert peak < 50e6 and grown < 100e3  # bytes; KiB


class TestRoundTrip:
  def test_mlp(self, mlp, tmp_path):
    path = tmp_path / "x.safetensors"
    models.save(path, mlp)
    same(weights.load(path, mlp), mlp)
    same(models.load(path, "mlp", 3, shape=SHAPE, hidden=(5,)), mlp)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]

  def test_names_are_paths(self, tmp_path):
    model = models.from_linen(WithStatistics())
    images = jnp.zeros((1, *SHAPE))
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    models.save(tmp_path / "x.safetensors", filled(like))
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {"state/batch_stats/BatchNorm_0/mean", KERNEL} < found.keys()

  def test_batch_statistics_and_bfloat16(self, tmp_path):
    model = models.from_linen(WithStatistics())
    images = jax.random.normal(jax.random.key(1), (6, *SHAPE))
    variables = model.init(jax.random.key(0), images)
    _, state = model.apply(variables, images, train=True)
    variables = {"params": variables["params"], "state": state}
    path = tmp_path / "x.safetensors"
    models.save(path, variables)
    like = jax.eval_shape(lambda: variables)
    loaded = weights.load(path, like)
    same(loaded, variables)
    assert loaded["params"]["Dense_1"]["kernel"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
      model.apply(loaded, images)[0].logits,
      model.apply(variables, images)[0].logits,
    )

  def test_other_trees_dtypes_and_layouts(self, tmp_path):
    grid = np.arange(6.0).reshape(2, 3)
    variables = {
      "params": [grid.T, {"a": (grid.astype(">f4"), np.float32(3))}],
      "state": {
        "none": np.zeros((0, 2), np.int8),
        "flag": np.array([True, False]),
        "nan": np.array([np.nan, -np.inf], np.float16),
      },
    }
    path = tmp_path / "x.safetensors"
    models.save(path, variables)
    native = jax.tree.map(
      lambda x: np.asarray(x, x.dtype.newbyteorder("=")), variables
    )
    same(weights.load(path, variables), native)
    # One array is a tree as well, and there need not be a state.
    models.save(path, {"params": grid})
    same(weights.load(path, {"params": grid}), {"params": grid, "state": {}})
    frozen = flax.core.freeze({"params": {"w": grid}, "state": {}})
    models.save(path, frozen)
    same(weights.load(path, frozen.unfreeze()), frozen.unfreeze())

  def test_a_file_of_another_program(self, mlp, tmp_path):
    """It has no digest, and maybe metadata of its own."""
    path = tmp_path / "x.safetensors"
    tensors = {k: np.asarray(v) for k, v in weights._named(mlp).items()}
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    same(weights.load(path, mlp), mlp)

  def test_tokens_make_the_template_of_a_language_model(self, tmp_path):
    variables = filled(models.template("lstm", 7, (5,), width=4))
    models.save(tmp_path / "x.safetensors", variables)
    loaded = models.load(
      tmp_path / "x.safetensors", "lstm", 7, shape=(5,), width=4
    )
    same(loaded, variables)

  def test_what_cannot_be_saved(self, mlp, tmp_path):
    with pytest.raises(ValueError, match=r"x.npz should be called \*.safe"):
      models.save(tmp_path / "x.npz", mlp)
    path = tmp_path / "x.safetensors"
    for leaf in (np.array("text"), np.array([None]), jnp.zeros(2, jnp.int4)):
      with pytest.raises(ValueError, match="params/w has dtype .* be one of b"):
        models.save(path, {"params": {"w": leaf}})
    with pytest.raises(ValueError, match="two variables are called params/a/b"):
      models.save(path, {"params": {"a": {"b": leaf}, "a/b": leaf}})
    assert not list(tmp_path.iterdir())

  def test_a_failed_save_leaves_what_was_there(
    self, mlp, tmp_path, monkeypatch
  ):
    path = tmp_path / "x.safetensors"
    models.save(path, mlp)
    before = path.read_bytes()

    def full(descriptor):
      raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
      models.save(path, jax.tree.map(jnp.zeros_like, mlp))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]

  def test_memory_for_one_copy(self, tmp_path):
    like = {"params": [np.ones((1024, 1024), np.float32)] * 16}
    path = tmp_path / "x.safetensors"
    models.save(path, like)
    tracemalloc.start()
    loaded = weights.load(path, like)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * path.stat().st_size
    path.unlink()  # The arrays are no view of the file.
    assert loaded["params"][3].sum() == 2**20


def tensor(shape, *offsets, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(path, header, data=b"", size=None):
  """A file in the format, with any header, which may lie about its size."""
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  size = len(header) if size is None else size
  path.write_bytes(struct.pack("<Q", size) + header + data)


PAIR = {"params": {"v": np.zeros(2, np.float32), "w": np.zeros(2, np.float32)}}
V, W = "params/v", "params/w"
GOOD = {V: tensor([2], 0, 8), W: tensor([2], 8, 16)}


class TestRefusals:
  def test_the_good_file_is_read(self, tmp_path):
    raw(tmp_path / "x.safetensors", GOOD, np.arange(4, dtype="<f4").tobytes())
    loaded = weights.load(tmp_path / "x.safetensors", PAIR)
    np.testing.assert_array_equal(loaded["params"]["w"], [2, 3])

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      ({"hidden": (6,)}, "params/Dense_0/bias has shape (6,); it should be (5"),
      ({"num_classes": 4}, "params/Dense_1/bias has shape (4,); it should be"),
      ({"hidden": ()}, "it has no params/Dense_1/bias (and 1 more)"),
      (
        {"hidden": (5, 5)},
        "it has an unknown params/Dense_2/bias (and 1 more)",
      ),
    ],
  )
  def test_another_architecture(self, mlp, tmp_path, change, message):
    fields = {"num_classes": 3, "hidden": (5,)} | change
    path = tmp_path / "x.safetensors"
    models.save(path, filled(models.template("mlp", shape=SHAPE, **fields)))
    start = "x.safetensors is of another architecture: "
    assert refused(path, mlp).startswith(start + message)

  def test_another_dtype_or_collection(self, mlp, tmp_path):
    path = tmp_path / "x.safetensors"
    models.save(path, jax.tree.map(lambda x: x.astype(jnp.bfloat16), mlp))
    assert refused(path, mlp) == (
      "x.safetensors: params/Dense_0/bias has dtype BF16; it should be F32"
    )
    models.save(path, {"params": mlp["params"], "state": {"n": np.ones(2)}})
    assert refused(path, mlp).endswith(": it has an unknown state/n")

  def test_a_name_that_spoils_the_line(self, tmp_path):
    path = tmp_path / "x.safetensors"
    for name in ("a\nb", "\x1b[31m", "a" * 10_000):
      raw(path, {**GOOD, name: tensor([0], 16, 16)}, bytes(16))
      assert "it has an unknown " in refused(path, PAIR)

  @pytest.mark.parametrize(
    ("header", "held", "size", "message"),
    [
      (GOOD, 16, 2**60, "not a .safetensors file, or it has been cut short"),
      (GOOD, 16, 2**64 - 1, "its header should take 18446744073709551615 by"),
      (GOOD, 15, None, "cannot be read: "),  # cut short
      (GOOD, 17, None, "cannot be read: "),
      (b"", 0, None, "cannot be read: "),
      (b"[]", 0, None, "cannot be read: "),
      (b"\xff\xfe", 0, None, "cannot be read: "),
      (b"[" * 500_000, 0, None, "cannot be read: "),
      (b'{"a":' * 100_000, 0, None, "cannot be read: "),
      (b"{}", 0, None, "it has no params/v (and 1 more)"),
      (GOOD | {"__metadata__": {"kd_jax.sha256": 1}}, 16, None, "cannot be re"),
      # Offsets that overlap, leave a hole, run backwards, or out of the file.
      (GOOD | {W: tensor([2], 4, 12)}, 12, None, "cannot be read: "),
      (GOOD | {W: tensor([2], 12, 20)}, 20, None, "cannot be read: "),
      (GOOD | {W: tensor([2], 16, 8)}, 16, None, "cannot be read: "),
      (GOOD | {W: tensor([2], 8, 2**63)}, 16, None, "cannot be read: "),
      (GOOD | {W: tensor([2**40], 8, 2**42 + 8)}, 16, None, "cannot be read: "),
      (GOOD | {W: tensor([2**62] * 3, 8, 16)}, 16, None, "cannot be read: "),
      (GOOD | {W: tensor([-2], 8, 16)}, 16, None, "cannot be read: "),
      (GOOD | {W: tensor([1], 8, 16)}, 16, None, "cannot be read: "),
      (GOOD | {W: tensor([2], 8, 16, dtype="O")}, 16, None, "cannot be read: "),
      (
        GOOD | {W: tensor([8], 8, 16, dtype="F8_E4M3")},
        16,
        None,
        "params/w has shape (8,); it should be (2,)",
      ),
      (
        GOOD | {W: tensor([2], 8, 16, dtype="I32")},
        16,
        None,
        "params/w has dtype I32; it should be F32",
      ),
    ],
  )
  def test_a_header_that_lies(self, tmp_path, header, held, size, message):
    path = tmp_path / "x.safetensors"
    raw(path, header, bytes(held), size)
    with Within():
      assert message in refused(path, PAIR)

  def test_a_long_header(self, tmp_path):
    """The file is as long as it says; parsing it would take seconds."""
    path = tmp_path / "x.safetensors"
    many = {f"{i}": tensor([0], 0, 0) for i in range(30_000)}
    raw(path, many)
    with Within():
      assert "it should have at most 1002000" in refused(path, PAIR)
    with path.open("wb") as file:  # Sparse: it takes no room on the disk.
      file.write(struct.pack("<Q", 2**38) + b"{")
      file.truncate(2**40)
    with Within():
      assert "has a header of 274877906944 bytes" in refused(path, PAIR)

  def test_no_file(self, mlp, tmp_path):
    path = tmp_path / "x.safetensors"
    assert refused(path, mlp) == "x.safetensors does not exist"
    path.mkdir()
    assert refused(path, mlp) == "x.safetensors is not a file"
    path.rmdir()
    os.mkfifo(path)  # Opening it would wait for ever.
    assert refused(path, mlp) == "x.safetensors is not a file"

  def test_cut_short_anywhere(self, tmp_path):
    path = tmp_path / "x.safetensors"
    models.save(path, PAIR)
    content = path.read_bytes()
    for length in range(len(content)):
      path.write_bytes(content[:length])
      refused(path, PAIR)

  def test_no_flipped_bit_goes_unnoticed(self, tmp_path):
    """But for those that change nothing, such as the digest's own name."""
    path = tmp_path / "x.safetensors"
    saved = {"params": {"v": np.float32([1, 2]), "w": np.float32([3, 4])}}
    models.save(path, saved)
    content = path.read_bytes()
    found = {}
    for place in range(len(content)):
      damaged = bytearray(content)
      damaged[place] ^= 1 << place % 8
      path.write_bytes(damaged)
      try:
        loaded = weights.load(path, saved)
      except BadInput as error:
        found[place] = str(error)
      else:
        same(loaded, {**saved, "state": {}})
    for place in range(len(content) - 16, len(content)):
      assert "x.safetensors is damaged: its SHA-256" in found[place]
    assert len(found) > 0.9 * len(content)

  def test_like_must_be_storable(self, mlp, tmp_path):
    path = tmp_path / "x.safetensors"
    models.save(path, mlp)
    like = jax.tree.map(lambda x: x.astype(jnp.int4), mlp)
    with pytest.raises(ValueError, match="kernel|bias.* has dtype int4"):
      weights.load(path, like)


class TestShards:
  INDEX = "x.safetensors.index.json"

  def write(self, folder, places=None, files=None):
    """Two files and their index; `files` has other contents for them."""
    one, two = "x-1.safetensors", "x-2.safetensors"
    whole = weights._named(PAIR)
    files = files or {one: [V], two: [W]}
    for name, held in files.items():
      tensors = {n: whole.get(n, np.ones(1)) for n in held}
      safetensors.numpy.save_file(tensors, folder / name)
    places = {V: one, W: two} if places is None else places
    index = {"metadata": {"total_size": 16}, "weight_map": places}
    (folder / self.INDEX).write_text(json.dumps(index))
    return folder / self.INDEX

  def test_round_trip(self, mlp, tmp_path):
    path = self.write(tmp_path)
    same(weights.load(path, PAIR), {**PAIR, "state": {}})
    named = {k: np.asarray(v) for k, v in weights._named(mlp).items()}
    places = {name: f"{i % 3}.safetensors" for i, name in enumerate(named)}
    for file in set(places.values()):
      part = {n: a for n, a in named.items() if places[n] == file}
      safetensors.numpy.save_file(part, tmp_path / file)
    path.write_text(json.dumps({"weight_map": places}))
    same(models.load(path, "mlp", 3, shape=SHAPE, hidden=(5,)), mlp)

  @pytest.mark.parametrize(
    "place",
    [
      "../x-2.safetensors",
      "/etc/passwd",
      "/tmp/x-2.safetensors",
      "sub/x-2.safetensors",
      "./x-2.safetensors",
      "..\\x-2.safetensors",
      "..",
      "",
      "x-2.safetensors\0",
      "x-2.safetensors\n",
      "x-2.bin",
      "https://example.com/x-2.safetensors",
      "x" * 100_000,
      "\ud800.safetensors",
      None,
      2,
      ["x-2.safetensors"],
    ],
  )
  def test_a_shard_elsewhere(self, tmp_path, place):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x-2.safetensors").write_bytes(b"")
    path = self.write(tmp_path, {V: "x-1.safetensors", W: place})
    assert " should be the plain name of a .saf" in refused(path, PAIR)

  def test_a_link(self, tmp_path):
    path = self.write(tmp_path)
    real = tmp_path / "x-2.safetensors"
    real.rename(tmp_path / "real.safetensors")
    real.symlink_to(tmp_path / "real.safetensors")
    message = "'x-2.safetensors' should be the plain name of a .safetensors "
    assert message + "file in the same folder, and no link" in refused(
      path, PAIR
    )

  @pytest.mark.parametrize(
    ("places", "files", "message"),
    [
      # In the other file, in both, or in none.
      (
        {V: "b.safetensors", W: "a.safetensors"},
        {"a.safetensors": [V], "b.safetensors": [W]},
        "b.safetensors is not what x.safetensors.index.json says: it has no "
        "params/v, and an unknown params/w",
      ),
      (
        {V: "a.safetensors", W: "b.safetensors"},
        {"a.safetensors": [V, W], "b.safetensors": [W]},
        "a.safetensors is not what x.safetensors.index.json says: it has an "
        "unknown params/w",
      ),
      (
        {V: "a.safetensors", W: "b.safetensors"},
        {"a.safetensors": [V], "b.safetensors": ["more"]},
        "b.safetensors is not what x.safetensors.index.json says: it has no "
        "params/w, and an unknown more",
      ),
      ({V: "a.safetensors", W: "b.safetensors"}, None, "a.safetensors does no"),
      ({V: "x-1.safetensors"}, None, "of another architecture: it has no par"),
      (
        {V: "x-1.safetensors", W: "x-2.safetensors", "u": "x-2.safetensors"},
        None,
        "of another architecture: it has an unknown u",
      ),
    ],
  )
  def test_a_wrong_index(self, tmp_path, places, files, message):
    path = self.write(tmp_path, places, files)
    assert message in refused(path, PAIR)

  @pytest.mark.parametrize(
    "content",
    [
      b"",
      b"{",
      b"null",
      b"[]",
      b"{}",
      b'{"weight_map": null}',
      b'{"weight_map": ["x-1.safetensors"]}',
      b"\xff\xfe\x00",
      b"[" * 900_000,
      b'{"weight_map": ' + b"9" * 10_000 + b"}",
    ],
  )
  def test_no_index(self, tmp_path, content):
    path = self.write(tmp_path)
    path.write_bytes(content)
    with Within():
      assert f'{self.INDEX} is no index; it should be JSON, {{"we' in refused(
        path, PAIR
      )

  def test_a_huge_index(self, tmp_path):
    path = self.write(tmp_path)
    with path.open("wb") as file:
      file.truncate(2**40)
    with Within():
      assert "has more than 1002000 bytes; no index has" in refused(path, PAIR)

  def test_a_damaged_shard(self, tmp_path):
    path = self.write(tmp_path)
    one, two = tmp_path / "x-1.safetensors", tmp_path / "x-2.safetensors"
    two.write_bytes(two.read_bytes()[:-1])
    assert refused(path, PAIR).startswith("x-2.safetensors cannot be read: ")
    two.write_bytes(pickle.dumps([]))
    assert "x-2.safetensors is or may hold a pickle" in refused(path, PAIR)
    os.unlink(two)
    os.mkfifo(two)
    assert refused(path, PAIR) == "x-2.safetensors is not a file"
    assert one.is_file()

  def test_a_shard_written_here_is_verified(self, tmp_path):
    path = self.write(tmp_path)
    part = {V: PAIR["params"]["v"]}
    metadata = {"kd_jax.sha256": "0" * 64}
    safetensors.numpy.save_file(part, tmp_path / "x-1.safetensors", metadata)
    assert "x-1.safetensors is damaged: its SHA-256 is" in refused(path, PAIR)


class Evil:
  """Makes a file when it is unpickled."""

  def __init__(self, target):
    self.target = target

  def __reduce__(self):
    return pathlib.Path.touch, (self.target,)


def evil_files(marker):
  """(name, content) of files that are pickles, or hold one."""
  pickles = [
    pickle.dumps(Evil(marker), protocol)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
  ]
  zipped = io.BytesIO()
  with zipfile.ZipFile(zipped, "w") as archive:
    archive.writestr("archive/data.pkl", pickles[2])
    archive.writestr("archive/version", "3\n")
  array = io.BytesIO()
  np.save(array, np.array([Evil(marker)], object), allow_pickle=True)
  suffixes = ("pt", "pth", "bin", "ckpt", "pkl", "pickle", "joblib", "PT")
  for i, suffix in enumerate((*suffixes, "npy")):
    yield f"x.{suffix}", pickles[i % len(pickles)]
  for name in ("x.safetensors", "x.safetensors.index.json", "x.npz", "x"):
    for content in (*pickles, zipped.getvalue(), array.getvalue()):
      yield name, content
  yield "x.pt", zipped.getvalue()
  yield "x.npy", array.getvalue()


class TestPickles:
  def test_none_is_ever_run(self, mlp, bit, tmp_path):
    marker = tmp_path / "marker"
    for name, content in evil_files(marker):
      path = tmp_path / name
      path.write_bytes(content)
      for load in (
        lambda path, _: weights.load(path, mlp),
        lambda path, _: bit_npz.load(path, bit),
        lambda path, _: models.load(path, "mlp", 3, hidden=()),
        lambda path, _: train.load_teacher(path, "mlp", 3, SHAPE, hidden=()),
      ):
        with Within():
          if name != "x.npz":
            refused(path, None, load)
          else:  # Or no file of such a model.
            with pytest.raises(ValueError):
              load(path, None)
        assert not marker.exists(), name
      path.unlink()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # So the files would have run it.

  @pytest.mark.parametrize(
    "name",
    ["x.pt", "x.pth", "x.bin", "x.ckpt", "x.pkl", "x.joblib", "x.npy", "x"],
  )
  def test_the_line_says_what_to_do(self, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps([0]))
    line = refused(path, None, lambda p, _: models.load(p, "mlp", 3, hidden=()))
    assert line.startswith(f"{name} is or may hold a pickle, which could run")
    assert 'safetensors.torch.save_file(model.state_dict(), "x.safe' in line

  def test_an_archive_with_a_pickle(self, tmp_path):
    for name in ("x.npz", "x.safetensors"):
      with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("x/data.pkl", b"")
      line = refused(
        tmp_path / name,
        None,
        lambda p, _: models.load(p, "bit_resnet", 3, **BIT),
      )
      assert "is or may hold a pickle" in line

  def test_a_header_whose_size_looks_like_a_pickle(self, tmp_path):
    size = int.from_bytes(b"\x80\x02", "little")
    header = json.dumps(GOOD).ljust(size).encode()
    raw(tmp_path / "x.safetensors", header, bytes(16))
    weights.load(tmp_path / "x.safetensors", PAIR)

  def test_files_of_other_kinds(self, mlp, tmp_path):
    load = lambda path, _: models.load(path, "mlp", 3, hidden=())
    for name in ("x", "x.h5", "x.msgpack", "x.tar.gz"):
      (tmp_path / name).write_bytes(b"something")
      assert refused(tmp_path / name, None, load) == (
        f"{name} should be called *.safetensors, *.safetensors.index.json or "
        "*.npz"
      )
    np.savez(tmp_path / "x.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="'mlp'; files in .npz can be"):
      models.load(tmp_path / "x.npz", "mlp", 3, hidden=())


class TestLoadTeacher:
  def test_files_and_directories(self, mlp, tmp_path):
    load = lambda path, _=None: train.load_teacher(
      path, "mlp", 3, SHAPE, hidden=(5,)
    )
    models.save(tmp_path / "x.safetensors", mlp)
    same(load(tmp_path / "x.safetensors"), mlp)
    same(load(str(tmp_path / "x.safetensors")), mlp)
    missing = tmp_path / "y.safetensors"
    assert refused(missing, None, load) == "y.safetensors does not exist"
    assert refused(tmp_path / "run", None, load) == "run does not exist"
    (tmp_path / "run.v2").mkdir()
    assert "run.v2 holds no checkpoints" in refused(
      tmp_path / "run.v2", None, load
    )
    (tmp_path / "blob").write_bytes(b"")
    assert "blob should be called *.saf" in refused(
      tmp_path / "blob", None, load
    )


class TestNpzBombs:
  """Entries of a BiT file that unpack to more than the model expects."""

  @pytest.fixture
  def entries(self, bit, tmp_path):
    bit_npz.save(tmp_path / "good.npz", bit)
    with np.load(tmp_path / "good.npz") as archive:
      return dict(archive)

  def write(self, path, entries, bomb, *, compression=zipfile.ZIP_DEFLATED):
    """A file in which each entry of `bomb` is (header, bytes that follow)."""
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
      for name in entries.keys() | bomb.keys():
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
          if name not in bomb:
            np.save(file, entries[name])
            continue
          header, size = bomb[name]
          file.write(header)
          for _ in range(size // 2**20):
            file.write(bytes(2**20))
          file.write(bytes(size % 2**20))

  @staticmethod
  def header(shape, descr="<f4", version=(1, 0)):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return np.lib.format.magic(*version) + size + text.encode()

  BIAS = "resnet/head/conv2d/bias"

  @pytest.mark.parametrize(
    ("header", "size", "message"),
    [
      # A shape that is a GB, with bytes and without.
      ({"shape": (2**28,)}, 2**26, f"has {2**28} classes; it should have 3"),
      ({"shape": (2**50,)}, 12, f"has {2**50} classes; it should have 3"),
      ({"shape": (2**25, 8)}, 2**26, "shape (33554432, 8); it should be (3,)"),
      # The right shape, and 64 MB.
      ({"shape": (3,)}, 2**26, "bytes; it should have "),
      ({"shape": (3,)}, 11, "bytes; it should have "),
      ({"shape": (3,), "descr": "<V100000000"}, 12, "should be floating point"),
      ({"shape": (3,), "descr": "|O"}, 24, "is or may hold a pickle"),
      # Its header says that it is 4 GB long; numpy would read all of it.
      ({"shape": (3,), "version": (2, 0)}, 2**26, "is not an array"),
      ({"shape": "()" + " " * 60_000}, 12, "cannot be read: "),
    ],
  )
  def test_an_entry(self, tmp_path, entries, bit, header, size, message):
    path = tmp_path / "x.npz"
    self.write(path, entries, {self.BIAS: (self.header(**header), size)})
    assert path.stat().st_size < 2e6
    with Within():
      assert message in refused(path, bit, bit_npz.load)

  def test_an_entry_that_nothing_asked_for(self, tmp_path, entries, bit):
    path = tmp_path / "x.npz"
    self.write(path, entries, {"more": (self.header((2**28,)), 2**26)})
    with Within():
      line = refused(path, bit, bit_npz.load)
    assert line.endswith("it has an unknown more")

  @pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
  def test_kinds_that_unpack_without_bound(self, tmp_path, entries, bit, kind):
    path = tmp_path / "x.npz"
    bomb = {self.BIAS: (self.header((3,)), 2**26)}
    self.write(path, entries, bomb, compression=kind)
    with Within():
      line = refused(path, bit, bit_npz.load)
    assert "is compressed as no .npz file is" in line

  def test_without_a_bomb_it_is_read(self, tmp_path, entries, bit):
    self.write(tmp_path / "x.npz", entries, {})
    same(bit_npz.load(tmp_path / "x.npz", bit), bit["params"])
