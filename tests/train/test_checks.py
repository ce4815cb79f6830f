"""Checks of settings by the names of their fields."""

from ml_collections import ConfigDict
import pytest

from kd_jax import train


def test_good_settings_pass():
  train.check_settings(
    "student",
    {
      "learning_rate": 0.1,
      "dropout": 0,
      "hidden": (8, 8),
      "optimizer": {"weight_decay": 0.0, "name": "adam"},
      "batch_size": 16,
    },
    devices=8,
  )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"learning_rate": 0}, "student.learning_rate is 0; it should be above 0"),
    ({"temperature": float("nan")}, "student.temperature is nan"),
    ({"dropout": 1.0}, "student.dropout is 1.0"),
    ({"fraction": 1.5}, "student.fraction is 1.5"),
    ({"epochs": -3}, "student.epochs is -3"),
    (
      ConfigDict({"optimizer": {"weight_decay": -1.0}}),
      "student.optimizer.weight_decay is -1.0; it should be at least 0",
    ),
    ({"batch_size": 12}, "batch_size is 12; it should be a multiple of"),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    train.check_settings("student", settings, devices=8)


def test_periods_and_seeds():
  good = {"eval_every": "2 epochs", "save_every": "9 minutes", "log_every": 5}
  train.check_periods(good)
  with pytest.raises(ValueError, match="log_every is 0"):
    train.check_periods({**good, "log_every": 0})
  with pytest.raises(ValueError, match="claims speak of"):
    train.check_comparison(("a",), (("x", "a", "b", "lower"),), (0,))
  for rows in ((), ("a", "a")):
    with pytest.raises(ValueError, match="at least one, each once"):
      train.check_comparison(rows, (), (0,))
  with pytest.raises(ValueError, match="devices is 9; it should be at most 8"):
    train.use_devices(9)
  with pytest.raises(ValueError, match="seeds is .*at least one"):
    train.check_comparison(("a",), (), ())
  for seeds in ((1, 1), (-1,), (2**32,)):  # 2**32 would be 0 once more
    with pytest.raises(ValueError, match="seeds is .* distinct seeds from 0"):
      train.check_comparison(("a",), (), seeds)
  with pytest.raises(ValueError, match=r"x.seeds is \(1.5,\); .*whole numbers"):
    train.check_seeds("x.seeds", (1.5,))
