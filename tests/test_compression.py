import itertools
import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import compression


def model(sizes=(16, 8, 4), dtype=np.float32):
  params = {
    f"w{i}": np.ones(pair, dtype)
    for i, pair in enumerate(itertools.pairwise(sizes))
  }
  return {"params": params, "state": {"mean": np.zeros(4, np.float32)}}


def forward(variables, x):
  for w in variables["params"].values():
    x = x @ w
  return x


def measured(variables, batch=32):
  x = np.ones((batch, 16), np.float32)
  return compression.cost(forward, variables, x, repeats=20)


def test_sizes_and_flops_are_those_of_the_matrices():
  found = measured(model())
  assert found["parameters"] == 16 * 8 + 8 * 4
  assert found["bytes"] == 4 * (16 * 8 + 8 * 4 + 4)
  # A multiplication and an addition for each weight and example.
  assert found["flops"] == pytest.approx(2 * 32 * 160, rel=0.2)
  assert found["batch_size"] == 32
  assert found["repeats"] == 20
  assert 0 < found["latency_ms_p50"] <= found["latency_ms_p95"]
  assert found["temp_bytes"] >= 0
  json.dumps(found, allow_nan=False)  # plain numbers


def test_bytes_follow_the_dtype_and_parameters_do_not():
  half = compression.cost(
    forward,
    {"params": model(dtype=jnp.bfloat16)["params"]},
    np.ones((2, 16), jnp.bfloat16),
    repeats=1,
  )
  assert half["parameters"] == 160
  assert half["bytes"] == 320
  bare = compression.cost(
    lambda w, x: x @ w, np.ones((3, 5), np.float32), np.ones((2, 3)), repeats=1
  )
  assert bare["parameters"] == 15


def test_latency_waits_for_the_result(monkeypatch):
  # Dispatch may return before the result is there, and on this machine it may
  # not, so the order of events is what can be tested.
  events = []
  ready = jax.block_until_ready

  def wait(x):
    events.append("ready")
    return ready(x)

  def perf_counter():
    events.append("clock")
    return time.perf_counter()

  clock = types.SimpleNamespace(perf_counter=perf_counter)
  monkeypatch.setattr(compression, "time", clock)
  monkeypatch.setattr(jax, "block_until_ready", wait)
  x = np.ones((2, 16), np.float32)
  compression.cost(forward, model(), x, repeats=3, warmup=2)
  assert events == ["ready"] * 2 + ["clock", "ready", "clock"] * 3


def test_latency_is_of_the_calls_after_the_warm_up(monkeypatch):
  # A clock that only being read moves: 1 ms a call, and 2 ms the last one.
  ticks = iter(np.cumsum([0.0] + [0.001, 0.010] * 4 + [0.002, 0.010]))
  clock = types.SimpleNamespace(perf_counter=lambda: next(ticks))
  monkeypatch.setattr(compression, "time", clock)
  found = compression.cost(
    forward, model(), np.ones((2, 16), np.float32), repeats=5, warmup=3
  )
  assert found["latency_ms_p50"] == pytest.approx(1.0)
  assert found["latency_ms_p95"] == pytest.approx(1.8)  # between 1 and 2


@pytest.mark.parametrize(
  ("analysis", "expected"),
  [
    ({"flops": 5.0}, 5.0),
    ([{"flops": 5.0}, {"flops": 2.0}], 7.0),
    ([{"flops": 5.0}], 5.0),
    ([], None),
    (None, None),
    ({}, None),
    ({"bytes accessed": 3.0}, None),
    ({"flops": -1.0}, None),
    ({"flops": float("nan")}, None),
  ],
)
def test_every_form_of_the_compilers_analysis(analysis, expected):
  class Compiled:
    def cost_analysis(self):
      return analysis

  assert compression._flops(Compiled()) == expected


def test_a_backend_without_analysis():
  class Compiled:
    def cost_analysis(self):
      raise NotImplementedError

    def memory_analysis(self):
      raise NotImplementedError

  assert compression._flops(Compiled()) is None
  assert compression._temp_bytes(Compiled()) is None


def test_ratios():
  teacher, student = measured(model((16, 64, 4))), measured(model())
  found = compression.ratios(teacher, student)
  assert set(found) == set(compression.COSTS)
  assert found["parameters"] == 8.0
  assert found["flops"] == pytest.approx(8.0, rel=0.2)
  assert compression.ratios({}, student)["bytes"] is None
  empty = compression.ratios({"temp_bytes": 3}, {"temp_bytes": 0})
  assert empty["temp_bytes"] is None


def test_wrong_arguments_are_named():
  x = np.ones((2, 16), np.float32)
  with pytest.raises(ValueError, match="repeats is 0"):
    compression.cost(forward, model(), x, repeats=0)
  with pytest.raises(ValueError, match="warmup -1"):
    compression.cost(forward, model(), x, warmup=-1)
  with pytest.raises(ValueError, match="leading axis"):
    compression.cost(forward, model(), np.float32(1))
  with pytest.raises(ValueError, match="leading axis"):
    compression.cost(forward, model(), {"a": x, "b": x[:1]})
  with pytest.raises(ValueError, match=r"batch_size 2.*with 3"):
    compression.ratios({"batch_size": 2}, {"batch_size": 3})
