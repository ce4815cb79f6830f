"""Files of the BiT release: the forward pass layer by layer, and refusals."""

import pickle
import zipfile

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import BadInput
from kd_jax.models import bit_npz
from kd_jax.models.bit_resnet import BiTResNet

BLOCKS, WIDTH, CLASSES = (2, 1), 16, 5
MODEL = BiTResNet(CLASSES, depth=BLOCKS, base_width=WIDTH, groups=16)
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 37, 32, 3))
IMAGES = IMAGES.astype(np.float32)
CONV = "standardized_conv2d"


def release_entries(root_size=7):
  """A tiny BiT under the names of the released files; random numbers."""
  rng = np.random.default_rng(0)
  entries = {}

  def conv(name, *shape):
    kernel = rng.normal(0.01, 0.05, size=shape)
    entries[f"resnet/{name}{CONV}/kernel"] = kernel

  def norm(name, channels):
    gamma, beta = rng.uniform(0.3, 1.5, channels), rng.normal(size=channels)
    entries[f"resnet/{name}group_norm/gamma"] = gamma
    entries[f"resnet/{name}group_norm/beta"] = beta

  conv("root_block/", root_size, root_size, 3, WIDTH)
  before = WIDTH
  for b, units in enumerate(BLOCKS, 1):
    mid = WIDTH * 2 ** (b - 1)
    for u in range(1, units + 1):
      unit = f"block{b}/unit{u:02d}/"
      norm(f"{unit}a/", before)
      conv(f"{unit}a/", 1, 1, before, mid)
      norm(f"{unit}b/", mid)
      conv(f"{unit}b/", 3, 3, mid, mid)
      norm(f"{unit}c/", mid)
      conv(f"{unit}c/", 1, 1, mid, 4 * mid)
      if u == 1:
        conv(f"{unit}a/proj/", 1, 1, before, 4 * mid)
      before = 4 * mid
  norm("", before)
  entries["resnet/head/conv2d/kernel"] = rng.normal(
    size=(1, 1, before, CLASSES)
  )
  entries["resnet/head/conv2d/bias"] = rng.normal(size=CLASSES)
  # Small numbers, so that the epsilons of both normalisations matter.
  entries[f"resnet/block1/unit02/c/{CONV}/kernel"] *= 1e-4
  for affine in ("gamma", "beta"):
    entries[f"resnet/block1/unit02/a/group_norm/{affine}"] *= 5e-4
  # And means far from 0, for which E[x^2] - E[x]^2 is no good variance.
  entries["resnet/block1/unit01/a/group_norm/beta"] *= 60
  return {name: array.astype(np.float32) for name, array in entries.items()}


@pytest.fixture(scope="module")
def entries():
  return release_entries()


def write(folder, entries, name="bit.npz"):
  path = folder / name
  np.savez(path, **entries)
  return path


class Reference:
  """The forward pass of the release in float64, straight from a file.

  Written from its description: the paper's ResNet v2 with group norm (epsilon
  1e-5) and standardised filters (epsilon 1e-10), all padding explicit.
  """

  def __init__(self, path, groups):
    with np.load(path) as file:
      self.weights = {name: np.float64(file[name]) for name in file.files}
    self.groups = groups
    self.pool_padding = 0.0
    self.conv_epsilon, self.norm_epsilon = 1e-10, 1e-5

  def conv(self, name, x, stride=1):
    w = self.weights[f"resnet/{name}{CONV}/kernel"]
    mean, var = w.mean((0, 1, 2)), w.var((0, 1, 2))
    w = (w - mean) / np.sqrt(var + self.conv_epsilon)
    windows = self.windows(x, len(w), stride, len(w) // 2, 0.0)
    return np.einsum("bhwcij,ijco->bhwo", windows, w)

  @staticmethod
  def windows(x, size, stride, pad, fill):
    around = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    x = np.pad(x, around, constant_values=fill)
    x = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return x[:, ::stride, ::stride]

  def norm_relu(self, name, x):
    gamma = self.weights[f"resnet/{name}group_norm/gamma"]
    beta = self.weights[f"resnet/{name}group_norm/beta"]
    y = np.empty_like(x)
    for channels in np.split(np.arange(x.shape[-1]), self.groups):
      part = x[..., channels]
      mean = part.mean((1, 2, 3), keepdims=True)
      var = part.var((1, 2, 3), keepdims=True)
      y[..., channels] = (part - mean) / np.sqrt(var + self.norm_epsilon)
    return np.maximum(y * gamma + beta, 0)

  def unit(self, name, x, stride):
    y = self.norm_relu(f"{name}a/", x)
    if f"resnet/{name}a/proj/{CONV}/kernel" in self.weights:
      x = self.conv(f"{name}a/proj/", y, stride)
    y = self.conv(f"{name}a/", y)
    y = self.conv(f"{name}b/", self.norm_relu(f"{name}b/", y), stride)
    return x + self.conv(f"{name}c/", self.norm_relu(f"{name}c/", y))

  def __call__(self, images, imagenet=True):
    """Yields (name, output) of the root, every unit and the head."""
    x = self.conv("root_block/", np.float64(images), 2 if imagenet else 1)
    if imagenet:
      x = self.windows(x, 3, 2, 1, self.pool_padding).max((-1, -2))
    yield "root", x
    for b, units in enumerate(BLOCKS, 1):
      for u in range(1, units + 1):
        stride = 2 if b > 1 and u == 1 else 1
        x = self.unit(f"block{b}/unit{u:02d}/", x, stride)
        yield f"block{b}/unit{u:02d}", x
    x = self.norm_relu("", x).mean((1, 2))
    kernel = self.weights["resnet/head/conv2d/kernel"][0, 0]
    yield "logits", x @ kernel + self.weights["resnet/head/conv2d/bias"]


def relative_error(actual, expected):
  assert actual.shape == expected.shape
  return np.abs(actual - expected).max() / np.abs(expected).max()


def layers(model, params, images):
  """The same outputs of the model, by the same names."""
  apply = jax.jit(
    lambda p, x: model.apply(
      {"params": p}, x, capture_intermediates=True, mutable=["intermediates"]
    )
  )
  outputs, state = apply(params, images)
  seen = flax.traverse_util.flatten_dict(state["intermediates"], sep="/")
  seen = {k.removesuffix("/__call__"): v[0] for k, v in seen.items()}
  return seen | {"logits": outputs.logits}


@pytest.mark.parametrize("root", ["imagenet", "cifar"])
def test_layer_by_layer(tmp_path, root):
  path = write(tmp_path, release_entries(7 if root == "imagenet" else 3))
  model = MODEL.clone(root=root)
  seen = layers(model, bit_npz.load(path, model), IMAGES)
  reference = Reference(path, groups=16)
  names = []
  for name, expected in reference(IMAGES, root == "imagenet"):
    assert relative_error(seen[name], expected) < 1e-5, name
    names.append(name)
  units = [n for n in seen if n.rsplit("/", 1)[-1].startswith("unit")]
  assert sorted(names) == sorted(["root", "logits", *units])


@pytest.mark.parametrize(
  "change",
  [{"pool_padding": -np.inf}, {"conv_epsilon": 1e-8}, {"norm_epsilon": 1e-6}],
)
def test_the_reference_tells_such_networks_apart(tmp_path, entries, change):
  path = write(tmp_path, entries)
  reference, other = Reference(path, 16), Reference(path, 16)
  vars(other).update(change)
  errors = [
    relative_error(output, expected)
    for (_, output), (_, expected) in zip(
      other(IMAGES), reference(IMAGES), strict=True
    )
  ]
  assert max(errors) > 1e-3


def test_save_and_load_are_inverse(tmp_path, entries):
  path = write(tmp_path, entries)
  params = bit_npz.load(path, MODEL)
  copy = tmp_path / "copy"  # Written under this very name.
  bit_npz.save(copy, {"params": jax.tree.map(jnp.asarray, params)})
  with np.load(copy) as saved:
    assert set(saved.files) == set(entries)
    for name, array in entries.items():
      assert saved[name].dtype == np.float32
      np.testing.assert_array_equal(saved[name], array)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["bit.npz", "copy"]
  again = bit_npz.load(copy, params)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_failed_save_leaves_what_was_there(tmp_path, entries, monkeypatch):
  path = write(tmp_path, entries)
  before = path.read_bytes()
  params = bit_npz.load(path, MODEL)
  with pytest.raises(ValueError, match="Dense_0/kernel is no parameter of a"):
    bit_npz.save(path, {"Dense_0": {"kernel": np.zeros((2, 2))}})

  def full(file, **_):
    file.write(b"half")
    raise OSError("disk full")

  monkeypatch.setattr(np, "savez", full)
  with pytest.raises(OSError, match="disk full"):
    bit_npz.save(path, params)
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["bit.npz"]


def test_like_gives_shapes_dtypes_and_the_head(tmp_path, entries):
  path = write(tmp_path, entries)
  model = MODEL.clone(num_classes=3)
  params = bit_npz.load(path, model, head=False)
  assert not params["head"]["kernel"].any()
  assert params["head"]["kernel"].shape == (8 * WIDTH, 3)
  head = {"kernel": np.ones((8 * WIDTH, 3)), "bias": np.arange(3)}
  like = {"params": params | {"head": head}}
  loaded = bit_npz.load(path, like, head=False)
  assert loaded["head"]["kernel"] is head["kernel"]
  assert loaded["head"]["bias"] is head["bias"]
  half = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
    bit_npz.load(path, MODEL),
  )
  loaded = bit_npz.load(path, half)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(loaded))
  with pytest.raises(ValueError, match="like has an abstract head; head=False"):
    bit_npz.load(path, half, head=False)
  # A file without a head is enough for `head=False`.
  body = {k: v for k, v in entries.items() if "/head/" not in k}
  path = write(tmp_path, body, "body.npz")
  bit_npz.load(path, model, head=False)
  with pytest.raises(
    BadInput, match=r"no resnet/head/conv2d/bias \(and 1 more"
  ):
    bit_npz.load(path, MODEL)


def test_numbered_convolutions_are_understood(tmp_path, entries):
  params = bit_npz.load(write(tmp_path, entries), MODEL)
  names = {k: k for k in entries}
  for i, name in enumerate(k for k in entries if CONV in k and "block2" in k):
    names[name] = name.replace(f"/{CONV}/", f"/{CONV}_{i + 9}/")
  renamed = {names[k]: v for k, v in entries.items()}
  assert set(renamed) != set(entries)
  loaded = bit_npz.load(write(tmp_path, renamed, "renamed.npz"), MODEL)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  path = write(tmp_path, entries | renamed, "both.npz")
  with pytest.raises(
    BadInput, match=r"has resnet/block2/.* twice: .*_9/kernel"
  ):
    bit_npz.load(path, MODEL)


UNIT = "resnet/block1/unit02/b"


@pytest.mark.parametrize(
  "model, message",
  [
    # Wrong architecture: too deep, too shallow, too wide, another root or head.
    ({"depth": (2, 2)}, r"it has no resnet/block2/unit02/a/group_norm/beta"),
    ({"depth": (2,)}, r"it has an unknown resnet/block2/unit01/a/group_norm"),
    (
      {"depth": (1, 2)},
      r"has no resnet/block2/unit02/\S+ \(and 8 more\), and an unknown "
      r"resnet/block1/unit02/\S+ \(and 8 more\)$",
    ),
    ({"width": 2}, r"/kernel has shape \(.*\); it should be \(.*\)$"),
    ({"root": "cifar"}, r"root_block/.* \(7, 7, 3, 16\); .* \(3, 3, 3, 16\)$"),
  ],
)
def test_a_wrong_architecture_is_refused(tmp_path, entries, model, message):
  path = write(tmp_path, entries)
  with pytest.raises(BadInput, match=message) as error:
    bit_npz.load(path, MODEL.clone(**model))
  assert str(error.value).startswith(f"{path} is of another architecture: ")
  assert "\n" not in str(error.value)


def test_a_file_of_other_classes_is_refused(tmp_path, entries):
  path = write(tmp_path, entries)
  message = (
    r"has 5 classes; it should have 7 \(head=False leaves the head out\)$"
  )
  with pytest.raises(BadInput, match=message) as error:
    bit_npz.load(path, MODEL.clone(num_classes=7))
  assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
  "change, message",
  [
    ({f"{UNIT}/group_norm/beta": None}, rf"has no {UNIT}/group_norm/beta$"),
    ({"global_step": np.float32(3)}, r"has an unknown global_step$"),
    (
      {f"{UNIT}/group_norm/beta": np.zeros((1, 1, 16), np.float32)},
      rf"{UNIT}/group_norm/beta has shape \(1, 1, 16\); it should be \(16,\)$",
    ),
    (
      {f"{UNIT}/group_norm/beta": np.zeros(16, np.int32)},
      r"group_norm/beta has dtype int32; it should be floating point$",
    ),
    (
      {f"{UNIT}/group_norm/beta": np.full(16, None)},
      r"is or may hold a pickle, which could run any program and is never",
    ),
  ],
)
def test_a_wrong_entry_is_named(tmp_path, entries, change, message):
  changed = {k: v for k, v in (entries | change).items() if v is not None}
  path = write(tmp_path, changed)
  like = bit_npz.load(write(tmp_path, entries, "good.npz"), MODEL)
  before = jax.tree.map(np.copy, like)
  with pytest.raises(BadInput, match=message) as error:
    bit_npz.load(path, like)
  assert str(error.value).startswith(str(path))
  assert "\n" not in str(error.value)
  jax.tree.map(np.testing.assert_array_equal, like, before)


def damaged(path, entries, kind):
  if kind == "missing":
    return
  if kind == "pickle":
    path.write_bytes(pickle.dumps(entries))
  elif kind == "npy":
    with path.open("wb") as file:
      np.save(file, np.zeros(3))
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "no arrays":
    zipfile.ZipFile(path, "w").close()
  elif kind == "text":
    with zipfile.ZipFile(path, "w") as archive:
      for name in entries:
        archive.writestr(name, "hello")
  else:
    np.savez(path, **entries)
    content = bytearray(path.read_bytes())
    if kind == "truncated":
      del content[len(content) // 2 :]
    else:  # One flipped bit.
      content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
  "kind, message",
  [
    ("missing", "does not exist"),
    ("pickle", "is or may hold a pickle, which could run any program and"),
    ("npy", "is not an .npz file, or it has been cut short"),
    ("empty", "is not an .npz file, or it has been cut short"),
    ("truncated", "is not an .npz file, or it has been cut short"),
    ("no arrays", "is of another architecture: it has no resnet/block1"),
    ("text", f"resnet/block1/unit01/a/{CONV}/kernel is not an array"),
    ("flipped", "cannot be read: Bad CRC-32 for file 'resnet/block"),
  ],
)
def test_a_damaged_file_is_refused(tmp_path, entries, kind, message):
  path = tmp_path / "bit.npz"
  damaged(path, entries, kind)
  with pytest.raises(BadInput) as error:
    bit_npz.load(path, MODEL)
  assert str(error.value).startswith(str(path))
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_no_other_model_is_loaded(tmp_path, entries):
  path = write(tmp_path, entries)
  with pytest.raises(
    ValueError, match="conv_x/kernel is no parameter of a BiT"
  ):
    bit_npz.load(path, {"params": {"conv_x": {"kernel": np.zeros(3)}}})
