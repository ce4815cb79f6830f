"""Thirty lives cut short, on the way and at file operations: no bit differs."""

import pathlib
import random

from benchmarks import soak


def test_killed_thirty_times_a_run_ends_with_the_same_bits(capsys):
  # Half of them at file operations.
  kinds = ("file", "file", "file", "time", "term", "full")
  counts, faults = soak.soak(30, seed=1, kinds=kinds)
  assert not faults
  assert sum(counts[kind] for kind in soak.KINDS) == 30
  assert counts["file"] >= 6 and counts["runs"] >= 2


def write(path: pathlib.Path, data: bytes) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return path


def test_damage_leaves_an_older_checkpoint_alone(tmp_path):
  assert not soak.damage(tmp_path, random.Random(0))
  for step in ("4", "12"):
    write(tmp_path / f"seed0/a/checkpoints/{step}/state/d/x", b"12345678")
  old = write(tmp_path / "seed0/b/checkpoints/3/state/d/x", b"12345678")
  for seed in range(5):
    newest = write(tmp_path / "seed0/a/checkpoints/12/state/d/x", b"12345678")
    assert soak.damage(tmp_path, random.Random(seed))
    assert newest.read_bytes() != b"12345678"
  older = tmp_path / "seed0/a/checkpoints/4/state/d/x"
  assert old.read_bytes() == older.read_bytes() == b"12345678"


def test_a_difference_is_named():
  """A check of the checker."""
  wanted = {"a": [4, {"w": "12"}], "a metrics": [{"step": 1, "loss": 0.5}]}
  assert soak.differences(wanted, dict(wanted)) == []
  other = {**wanted, "a metrics": [{"step": 1, "loss": 0.25}], "b": 1}
  assert soak.differences(wanted, other) == ["a metrics", "b"]
