"""Units, numbers, windows."""

import gzip

import numpy as np
import pytest

from kd_jax.data import text
from kd_jax.errors import BadInput


def test_words_are_those_of_the_treebank():
  found = text.split(" no it was n't\n\n black <unk> \n", "word")
  assert found == ["no", "it", "was", "n't", "<eos>", "black", "<unk>", "<eos>"]
  assert text.split("ab\n", "character") == ["a", "b", "\n"]
  with pytest.raises(ValueError, match="unit is 'line'"):
    text.split("a", "line")


def test_rare_units_are_unknown():
  units = list("aaabbc")
  known = text.vocabulary(units, most=3)
  assert known == ("<unk>", "a", "b")
  assert text.encode(list("cab"), known).tolist() == [0, 1, 2]
  assert text.encode(list("cab"), known).dtype == np.int32
  assert text.vocabulary(["<unk>", "x", "<unk>"]) == ("<unk>", "x")
  with pytest.raises(ValueError, match="most is 1"):
    text.vocabulary(units, most=1)


@pytest.mark.parametrize(("n", "length"), [(11, 3), (10, 3), (4, 3), (9, 1)])
def test_each_token_but_the_first_is_predicted_once(n, length):
  found = text.windows(np.arange(n, dtype=np.int32), length)
  count = (n - 1) // length
  assert found["tokens"].shape == found["label"].shape == (count, length)
  np.testing.assert_array_equal(found["label"], found["tokens"] + 1)
  np.testing.assert_array_equal(
    found["label"].ravel(), np.arange(1, 1 + count * length)
  )
  assert found["id"].tolist() == list(range(count))


def test_a_text_too_short_for_a_window_is_named():
  with pytest.raises(ValueError, match="the text has 3 tokens; a window of 3"):
    text.windows(np.arange(3, dtype=np.int32), 3)
  with pytest.raises(ValueError, match="length is 0"):
    text.windows(np.arange(3, dtype=np.int32), 0)


def test_files_plain_and_packed(tmp_path):
  plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
  plain.write_text("Grüße\n", encoding="utf-8")
  packed.write_bytes(gzip.compress(plain.read_bytes()))
  assert text.read(plain) == text.read(packed) == "Grüße\n"
  assert len(text.read("pydoc")) > 100_000


@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("none.txt", None, "does not exist; it should be a file or 'pydoc'"),
    ("bad.txt", b"\xff\xfe\x00", "is no UTF-8 text"),
    ("bad.txt.gz", b"plain", "is no UTF-8 text"),
    (
      "cut.txt.gz",
      gzip.compress(b"abc" * 99, mtime=0)[:-9],
      "is no UTF-8 text",
    ),
    ("empty.txt", b" \n", "is empty"),
  ],
)
def test_what_is_no_text_is_refused(tmp_path, name, data, message):
  path = tmp_path / name
  if data is not None:
    path.write_bytes(data)
  with pytest.raises(BadInput, match=message) as error:
    text.read(path)
  assert "\n" not in str(error.value)
