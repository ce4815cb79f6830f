"""The page on many devices says what the programs and the arithmetic say."""

import pathlib
import re

import pytest

from benchmarks import pods, scaling
from kd_jax import result_file

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "pods.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_tables_follow_from_the_counts():
  """Those of operations are counted anew by --check alone, as that is slow."""
  counts = pods.stored(TEXT)
  config, known = pods.networks()
  assert counts.batch == config.networks.student.batch_size
  assert counts.epochs == config.students.function_matching.epochs
  for name in ("teacher", "student"):
    found = pods.tree_bytes(known[name][1])
    assert getattr(counts, f"{name}_bytes") == found, name
  splits = [pods.shares(machine.devices) for machine in pods.MACHINES]
  assert pods.insert(TEXT, pods.table(counts, splits)) == TEXT


def test_an_hour_by_hand():
  """1e6 operations an image at 40% of 1e9 a second, 8 images on each of 2."""
  machine = pods.Machine("m", 2, 1, 1e9, "p", 1e9, 1e9, 1e6, "l")
  counts = pods.Counts(16, 5, 10, 400, 1000, 500_000, 250_000, 600_000, 100)
  found = pods.column(machine, counts, (100, 200))
  assert found["teacher's inference"] == "10.0 ms"
  assert found["student's forward and backward pass"] == "12.0 ms"
  assert found["the teacher's part of both"] == "45%"
  assert found["all-reduce of the gradients, alone"] == "1.0 ms"
  assert found["gathering the teacher in each step, alone"] == "0.1 ms"
  assert found["images a second"] == f"{16 / 0.022:.0f}"


def test_a_page_without_marks_or_rows_is_refused():
  with pytest.raises(ValueError, match="marks"):
    pods.insert("no marks", "")
  with pytest.raises(ValueError, match="row 'images in a global batch'"):
    pods.stored("no table")


def test_its_links_lead_somewhere():
  for link in re.findall(r"\]\(([^):]+)\)", TEXT):
    assert (PAGE.parent / link).exists(), link


def test_the_result_of_scaling_is_one():
  row = {"seconds": [1.0, 3.0], "flops": 8.0, "exchanges": 2, "bytes": 4}
  found = {(how, n): row for how in scaling.HOWS for n in scaling.COUNTS}
  result = scaling.result(found, 1.0)
  result_file.validate(result)
  assert result["rows"][0]["values"] == [0.5, 1.5]
