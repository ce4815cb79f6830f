"""Teacher outputs on disk: what pins them, what damages them."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models, teachers
from kd_jax.errors import BadInput

SHAPE = (6, 3)
MANIFEST = {"teacher": "ab12", "data": "cd34", "crop": [32, 4]}


def logits(view):
  return np.random.default_rng(view).normal(size=SHAPE).astype(np.float32)


def bank(path, compute=logits, views=3, shape=SHAPE, **manifest):
  return teachers.cached(
    path, compute, views=views, shape=shape, manifest={**MANIFEST, **manifest}
  )


def never(view):
  raise AssertionError("computed again")


def test_digest_sees_each_bit_name_dtype_and_shape():
  tree = {"a": {"w": np.arange(6.0)}, "b": np.zeros(2, np.float32)}
  first = teachers.digest(tree)
  assert first == teachers.digest({"b": jnp.zeros(2), "a": tree["a"]})
  flipped = tree["a"]["w"].copy()
  flipped.view(np.uint64)[3] ^= 1
  others = [
    {**tree, "a": {"w": flipped}},
    {**tree, "a": {"v": tree["a"]["w"]}},
    {**tree, "a": {"w": tree["a"]["w"].reshape(2, 3)}},
    {**tree, "b": np.zeros(2, np.float64)},
    {**tree, "b": -np.zeros(2, np.float32)},
  ]
  digests = {teachers.digest(other) for other in others}
  assert len(digests) == len(others) and first not in digests


def test_a_bank_is_computed_once_and_replayed_exactly(tmp_path):
  expected = np.stack([logits(view) for view in range(3)])
  np.testing.assert_array_equal(bank(tmp_path / "bank"), expected)
  np.testing.assert_array_equal(bank(tmp_path / "bank", never), expected)


def test_an_interrupted_bank_goes_on(tmp_path):
  def interrupted(view):
    if view == 2:
      raise KeyboardInterrupt
    return logits(view)

  with pytest.raises(KeyboardInterrupt):
    bank(tmp_path, interrupted)
  asked = []
  bank(tmp_path, lambda view: asked.append(view) or logits(view))
  assert asked == [2]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"teacher": "ee"}, "teacher is ee here and ab12 there"),
    ({"crop": [28, 4]}, r"crop is \[28, 4\] here and \[32, 4\] there"),
    ({"views": 2}, "views is 2 here and 3 there"),
    ({"shape": (6, 4)}, r"shape is \[6, 4\] here"),
    ({"mixup": True}, "mixup is True here and None there"),
  ],
)
def test_another_bank_is_refused_and_kept(tmp_path, change, message):
  first = bank(tmp_path)
  with pytest.raises(BadInput, match=message) as error:
    bank(tmp_path, never, **change)
  assert "\n" not in str(error.value)
  np.testing.assert_array_equal(bank(tmp_path, never), first)


@pytest.mark.parametrize("damage", ["bit", "cut", "mark"])
def test_a_damaged_view_is_computed_anew(tmp_path, damage):
  first = bank(tmp_path)
  file = tmp_path / "view-00001.npy"
  content = bytearray(file.read_bytes())
  if damage == "bit":
    content[-5] ^= 4
    file.write_bytes(content)
  elif damage == "cut":
    file.write_bytes(content[:-8])
  else:
    file.with_suffix(".sha256").write_text("0")
  with pytest.warns(UserWarning, match="view-00001.npy is damaged"):
    np.testing.assert_array_equal(bank(tmp_path), first)
  np.testing.assert_array_equal(bank(tmp_path, never), first)


def test_directories_that_are_no_bank(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(BadInput, match="holds no bank"):
    bank(tmp_path)
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "manifest.json").write_text("{")
  with pytest.raises(BadInput, match=r"manifest\.json is damaged"):
    bank(tmp_path / "b")
  assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == (
    '["b", "thesis.tex"]'
  )


def test_what_is_computed_must_fit(tmp_path):
  with pytest.raises(ValueError, match=r"float32\[2, 3\]; it should be"):
    bank(tmp_path / "a", lambda view: np.zeros((2, 3), np.float32))
  with pytest.raises(ValueError, match="float64"):
    bank(tmp_path / "b", lambda view: np.zeros(SHAPE))


class TestCheck:
  """What a teacher must not do, each in a network that does it."""

  X = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))

  def careless(self, name, **fields):
    """A reference model that is asked in training mode, as a bug would."""
    net = models.create(name, 5, **fields)

    def apply(variables, inputs, *, train=False, key=None):
      count = jax.pure_callback(
        lambda: np.uint32(next(self.calls)), jax.ShapeDtypeStruct((), "uint32")
      )
      return net.apply(variables, inputs, train=True, key=jax.random.key(count))

    self.calls = itertools.count()
    return models.Model(net.init, apply), net.init(jax.random.key(1), self.X)

  def test_all_reference_models_pass(self):
    batch_norm = {"depth": 10, "width": 1, "dropout": 0.5}
    for name, fields in (
      ("mlp", {"hidden": (6,), "dropout": 0.5}),
      ("cnn", {"layers": ((8, 3, 2),)}),
      ("wide_resnet", batch_norm),
      ("branched", {"combine": "gate"}),
    ):
      net = models.create(name, 5, **fields)
      start = net.init(jax.random.key(1), self.X)
      teachers.check(net, start, self.X, classes=5)

  def test_dropout_is_found(self):
    net, variables = self.careless("mlp", hidden=(32,), dropout=0.5)
    with pytest.raises(BadInput, match="something else in a second call"):
      teachers.check(net, variables, self.X)

  def test_moving_statistics_are_found(self):
    net, variables = self.careless("wide_resnet", depth=10, width=1)
    with pytest.raises(BadInput, match="changes its state"):
      teachers.check(net, variables, self.X)

  def test_statistics_of_the_batch_are_found(self):
    net, variables = self.careless("wide_resnet", depth=10, width=1)

    def still(variables, inputs, *, train=False, key=None):
      out, _ = net.apply(variables, inputs)
      return out, variables["state"]

    with pytest.raises(BadInput, match="of an example alone than among others"):
      teachers.check(models.Model(net.init, still), variables, self.X)

  @pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "inf")])
  def test_bad_weights_are_found(self, bad, word):
    net = models.create("mlp", 5, hidden=())
    variables = net.init(jax.random.key(1), self.X)
    bias = variables["params"]["Dense_0"]["bias"]
    variables["params"]["Dense_0"]["bias"] = bias.at[2].set(bad)
    with pytest.raises(BadInput, match=f"not finite: its logits hold {word}"):
      teachers.check(net, variables, self.X)
    variables["params"]["Dense_0"]["bias"] = bias.at[2].set(-np.inf)
    teachers.check(net, variables, self.X)  # an absent class

  def test_other_classes_and_too_few_examples_are_named(self):
    net = models.create("mlp", 5, hidden=())
    variables = net.init(jax.random.key(1), self.X)
    with pytest.raises(
      BadInput, match="my net has 5 classes; it should have 4"
    ):
      teachers.check(net, variables, self.X, classes=4, name="my net")
    with pytest.raises(ValueError, match="two are needed"):
      teachers.check(net, variables, self.X[:1])
