"""What the timings rest on: the clock, and that peers do the same work."""

import importlib
import os
import sys

import numpy as np
import pytest

from benchmarks import _common, import_time, run, temporaries
from benchmarks.step_floor import Pair, a_batch
from kd_jax import results
from kd_jax.errors import BadInput

PAIRS = {
  "mlp": Pair(
    *((6,), 4, 1), ("mlp", {"hidden": (7, 5)}), ("mlp", {"hidden": (3,)})
  ),
  "conv": Pair(
    *((8, 8, 3), 4, 1),
    ("wide_resnet", {"depth": 10, "width": 1}),
    ("wide_resnet", {"depth": 10, "width": 1}),
  ),
  "vit": Pair(
    *((8, 8, 3), 4, 1),
    ("vit", {"patch_size": 4, "width": 12, "depth": 2, "heads": 3}),
    ("vit", {"patch_size": 4, "width": 8, "depth": 1, "heads": 2}),
  ),
}
LM = Pair(
  *((5,), 3, 1),
  ("gpt", {"width": 12, "depth": 2, "heads": 3, "max_length": 6}),
  ("gpt", {"width": 8, "depth": 1, "heads": 2, "max_length": 6}),
  words=200,
)


@pytest.fixture
def peers():
  pytest.importorskip("torch")
  from benchmarks import peers

  return peers


def made(peers, name, steps=3):
  pair = PAIRS[name]
  variables, batch = peers.weights(pair), a_batch(pair)
  ours = peers.jax_step(pair, variables, batch)
  theirs = peers.torch_step(pair, variables, batch)
  return (
    [ours() for _ in range(steps)],
    [theirs() for _ in range(steps)],
    variables[1],
  )


@pytest.mark.parametrize("name", PAIRS)
def test_pytorch_makes_the_same_steps(peers, name):
  ours, theirs, start = made(peers, name)
  peers.check_same(ours, theirs, start)
  found = [float(loss) for loss, _ in ours]
  assert len(set(found)) == len(found)  # Something is learned.


@pytest.mark.parametrize("name", PAIRS)
def test_torchdistill_makes_the_same_steps(peers, name):
  pytest.importorskip("torchdistill")
  ours, _, start = made(peers, name)
  pair = PAIRS[name]
  work = peers.torchdistill_step(pair, peers.weights(pair), a_batch(pair))
  peers.check_same(ours, [work() for _ in range(3)], start)


# PyTorch's own compiler warns of PyTorch.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_all_forms_of_a_language_model_make_the_same_steps(peers):
  from benchmarks import peers_lm

  variables, batch = peers.weights(LM), a_batch(LM)
  ours, theirs = peers_lm.forms(LM, variables, batch)
  chunked, full, cached = ([f() for _ in range(3)] for f in ours.values())
  for name in ("PyTorch eager", "PyTorch eager, in chunks"):
    found = [theirs[name]() for _ in range(3)]
    for own in (chunked, full):
      peers.check_same(own, found, variables[1])
  # What the cache tells apart is less, so the divergence is.
  assert 0.1 < float(cached[0][0]) / float(full[0][0]) < 1


def test_a_sweep_runs_beside_pytorch(peers, monkeypatch):
  from benchmarks import sweep

  monkeypatch.setattr(peers, "check_threads", lambda: None)
  monkeypatch.setitem(sweep.SIZES, "tiny", ((7,), (5,), 4, 2, (1, 2)))
  bench = sweep.benchmark("tiny", "PyTorch")
  assert bench.base == "8 runs in PyTorch" and bench.base in bench.forms
  for work in bench.forms.values():
    work()


def test_a_loss_that_differs_is_named(peers, monkeypatch):
  monkeypatch.setattr(peers.losses, "kl", peers.losses.reverse_kl)
  with pytest.raises(ValueError, match="the loss of step 0"):
    peers.check_same(*made(peers, "mlp", steps=1))


def test_a_weight_that_differs_is_named(peers, monkeypatch):
  sgd = peers.optax.sgd
  monkeypatch.setattr(peers.optax, "sgd", lambda rate, m: sgd(1.02 * rate, m))
  with pytest.raises(ValueError, match=r"Dense_0.weight has moved by"):
    peers.check_same(*made(peers, "mlp", steps=1))


def test_more_than_one_thread_is_refused(peers):
  assert os.environ["NPROC"] != "1"
  with pytest.raises(BadInput, match="NPROC is '.*'; it should be '1'"):
    peers.benchmark("mlp")


def test_without_pytorch_one_line_says_so(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  monkeypatch.delitem(sys.modules, "benchmarks.peers", raising=False)
  with pytest.raises(BadInput, match="needs PyTorch: pip install torch$"):
    importlib.import_module("benchmarks.peers")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--rounds=0"], "it is '0'; it should be a whole number of at least 1"),
    (["--rounds=two"], "it is 'two'; it should be a whole number"),
    (["--json=there"], "'there' is a folder, not a file"),
    (["--json=file/x.json"], "'file/x.json' cannot be written"),
  ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(
  arguments, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "there").mkdir()
  (tmp_path / "file").touch()
  with pytest.raises(SystemExit) as stop:
    _common.parser("A benchmark.", rounds=3).parse_args(arguments)
  assert stop.value.code == 2
  flag = arguments[0].split("=")[0]
  assert f"argument {flag}: {message}" in capsys.readouterr().err


def test_the_result_of_importing_may_be_kept(tmp_path, capsys):
  jax, ours = import_time.IMPORTS
  found = import_time.result({jax: [1.0, 2.0], ours: [1.5, 2.0]}, 9.0)
  _common.show(found, tmp_path / "x.json")
  assert results.load(tmp_path / "x.json")["rows"][1]["values"] == [1.5, 1.0]
  assert "import kd_jax.losses" in capsys.readouterr().out


def test_turns_are_timed_by_the_clock_of_the_benchmark():
  now, taken = 0.0, iter([0.0, 0.0, 1.0, 10.0, 3.0, 30.0, 2.0, 20.0] * 2)

  def work():
    nonlocal now
    now += next(taken)

  forms = {"a": work, "b": work}
  medians = run.take_turns(forms, blocks=1, rounds=3, clock=lambda: now)
  np.testing.assert_allclose([medians["a"], medians["b"]], [[2.0], [20.0]])


def test_the_result_says_which_clock_and_which_environment():
  bench = run.Benchmark(
    title="t",
    base="a",
    forms={"a": lambda: None},
    clock=run.time.process_time,
    environment={"NPROC": "1"},
  )
  found = run.result("peers_mlp", bench, {"a": [2.0]}, 3, 1.0)
  assert found["metric"]["name"] == "processor time"
  asked = "peers_mlp --blocks 1 --rounds 3 --processor"
  assert found["command"] == f"NPROC=1 python -m benchmarks.run {asked}"


def test_chunks_ask_for_less_than_all_logits():
  found = temporaries.heads("kl", np.float32, 1024, 4096, 8)
  logits = 1024 * 4096 * 4
  assert logits <= found[0]
  assert found[1] < found[0] / 2
  (few,), (more,) = (
    temporaries.angles(temporaries.all_at_once, n) for n in (16, 32)
  )
  assert few >= 16**3 * 4 and more > 4 * few


def test_norms_are_folded_into_the_convolutions_before_them(monkeypatch):
  from benchmarks import teacher_forms

  small = (2, 8, 8, 3), {"depth": 10, "width": 1}
  monkeypatch.setitem(teacher_forms.TEACHERS, "wide_resnet", small)
  made = teacher_forms.benchmark("wide_resnet")
  assert made.data["batch norms"] == "7, 3 of them right after a convolution"
  found = {name: np.asarray(form()) for name, form in made.forms.items()}
  np.testing.assert_allclose(
    found["norms folded into convolutions"], found["float32"], atol=1e-4
  )
