"""One clear line for wrong input."""

import pytest

from kd_jax.errors import BadInput, check_number, check_numbers, checking


@pytest.mark.parametrize(
  "error", [ValueError("x"), TypeError("x"), KeyError("x"), OSError("x")]
)
def test_input_errors_keep_their_message(error):
  with pytest.raises(BadInput) as found, checking():
    raise error
  assert str(found.value) == "x"
  assert found.value.__cause__ is error


def test_bugs_are_not_input():
  with pytest.raises(ZeroDivisionError), checking():
    raise ZeroDivisionError


@pytest.mark.parametrize(
  "value,limits,message",
  [
    (0, {"above": 0}, "t is 0; it should be above 0"),
    (2, {"least": 0, "most": 1}, "t is 2; it should be at least 0 and at most"),
    (float("nan"), {}, "t is nan; it should be finite"),
    (float("inf"), {"above": 0}, "t is inf; it should be finite and above 0"),
  ],
)
def test_ranges(value, limits, message):
  with pytest.raises(ValueError, match=message):
    check_number("t", value, **limits)
  with pytest.raises(ValueError, match="group.t is"):
    check_numbers("group", {"t": value}, t=limits)
  check_number("t", 1.0, above=0, least=1, most=1)
