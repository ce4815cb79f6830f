"""Teacher outputs on disk: what pins them, what damages them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import teachers
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
