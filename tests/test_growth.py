"""The fit on made-up numbers, and that every row can be measured."""

import jax
import pytest

from benchmarks import growth
from kd_jax import result_file, results


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_exponent_of_a_power(power):
  sizes = [3, 10, 31, 100, 310]
  costs = [0.25 * size**power for size in sizes]
  assert growth.exponent(sizes, costs) == pytest.approx(power, abs=1e-9)


def test_fixed_cost_at_small_sizes_does_not_count():
  sizes = [1, 2, 4, 1000, 2000, 4000]
  costs = [9.0, 9.0, 9.0, 1e6, 4e6, 16e6]
  assert growth.exponent(sizes, costs) == pytest.approx(2.0)
  # Of two sizes both count, of three the two larger.
  assert growth.exponent([1, 2], [1.0, 8.0]) == pytest.approx(3.0)
  assert growth.exponent([1, 2, 4], [0.0, 1.0, 8.0]) == pytest.approx(3.0)


def test_what_is_unknown_has_no_exponent():
  assert growth.exponent([1, 2, 4], [1.0, None, 2.0]) is None
  assert growth.exponent([1, 2, 4], [1.0, 0, 2.0]) is None
  assert growth.exponent([1, 2, 4], [None, 1.0, 2.0]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", growth.AXES)
def test_every_row_has_a_program(name):
  axis = growth.AXES[name]
  assert list(axis.sizes) == sorted(set(axis.sizes)) and len(axis.sizes) >= 5
  function, arguments = axis.make(axis.sizes[0])
  jax.eval_shape(function, *arguments)


def test_rows_make_a_result(tmp_path):
  rows = []
  for name in ("kl, batch", "rkd_distance, batch"):
    axis = growth.AXES[name]
    axis = axis._replace(sizes=(2, 600) if "rkd" in name else (2, 4))
    rows.append(growth.measure(name, axis, blocks=2, rounds=1))
  found = growth.result(rows, blocks=2, rounds=1, seconds=3.0)
  result_file.save(tmp_path / "growth.json", found)
  found = result_file.load(tmp_path / "growth.json")
  assert "rkd_distance, batch" in results.table(found)
  plain, loop = (row["details"]["exponent of FLOPs"] for row in found["rows"])
  assert plain[0] > 0.5 and plain[0] == plain[1]
  assert loop == [None, None]  # XLA would count one turn of it
