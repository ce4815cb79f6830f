"""Generations: who teaches, what is taught, and what a kill leaves alone."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.born_again import _common as common, cifar10, cifar100
from experiments import born_again
from kd_jax import models, train
from kd_jax.errors import BadInput

CLASSES, SIDE, BATCH = 4, 4, 8


def view():
  fields = {"crop": "none", "size": SIDE, "padding": 0, "least_area": 1.0}
  return {**fields, "flip": False, "on_host": False}


def table(seed=0):
  """A model whose logits are a table of its own, one row an example."""
  logits = np.random.default_rng(seed).normal(size=(BATCH, CLASSES)) * 2

  def apply(variables, images, *, train=False, key=None):
    return models.Outputs(variables["params"]), {}

  return models.Model(None, apply), jnp.asarray(logits, jnp.float32)


def terms(**changes):
  """(terms, student's logits, teacher's, labels) of one batch."""
  row = common.student("", 1.0, teacher="x").to_dict() | changes
  (student, z), (teacher, t) = table(0), table(1)
  loss_fn = born_again.make_loss(student, view(), row, teacher)
  rng = np.random.default_rng(2)
  batch = {
    "id": np.arange(BATCH, dtype=np.int32),
    "image": np.zeros((BATCH, SIDE, SIDE, 1), np.uint8),
    "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
    "epoch": np.zeros(BATCH, np.int32),
  }
  hparams = {k: row[k] for k in ("temperature", "soft_weight", "hard_weight")}
  frozen = {
    "view_key": jax.random.key(0),
    "hparams": hparams,
    "teacher": {"params": t, "state": {}},
  }

  def run(z, t, seed=3):
    key = jax.random.key(seed)
    frozen["teacher"]["params"] = t
    return loss_fn({"model": z}, {"model": {}}, frozen, batch, key)[0]

  return run, z, t, batch["label"]


def softmax(z):
  e = np.exp(np.float64(z) - np.max(z, -1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  return np.sum(p * (np.log(p) - np.log(q)), -1)


def test_a_generation_learns_from_the_teacher_alone():
  run, z, t, _ = terms()
  found = run(z, t)
  assert found.keys() == {"soft"}
  expected = kl(softmax(t), softmax(z))
  np.testing.assert_allclose(found["soft"].value, expected, rtol=1e-5)


def test_with_labels_the_loss_is_the_sum():
  run, z, t, label = terms(hard_weight=1.0)
  found = run(z, t)
  hard = -np.log(softmax(z))[np.arange(BATCH), label]
  np.testing.assert_allclose(found["hard"].value, hard, rtol=1e-5)
  assert found["hard"].weight == found["soft"].weight == 1.0


def test_confidence_weighs_the_labels_and_nothing_else():
  run, z, t, label = terms(hard_weight=1.0, soft_weight=0.0, by_confidence=True)
  found = run(z, t)
  assert found.keys() == {"hard"}
  best = softmax(t).max(-1)
  hard = -np.log(softmax(z))[np.arange(BATCH), label]
  # The paper's sum over the batch, with weights that add up to 1.
  expected = np.sum(best / best.sum() * hard)
  np.testing.assert_allclose(found["hard"].value.mean(), expected, rtol=1e-5)


def test_permuted_predictions_keep_the_best_and_mix_the_rest():
  run, z, t, _ = terms(target="permuted")
  p, seen = softmax(t), set()
  for seed in range(4):
    found = run(jnp.log(p).astype(jnp.float32), t, seed)
    value = np.asarray(found["soft"].value)
    assert np.all(value >= -1e-6)
    seen.add(tuple(np.round(value, 4)))
  assert len(seen) == 4  # another permutation in each step
  # Uniform over what is not the best: no permutation can move it.
  flat = np.full((BATCH, CLASSES), -1.0, np.float32)
  flat[np.arange(BATCH), np.argmax(t, -1)] = 2.0
  found = run(z, jnp.asarray(flat))
  expected = kl(softmax(flat), softmax(z))
  np.testing.assert_allclose(found["soft"].value, expected, rtol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [
    {"hard_weight": 1.0},
    {"target": "permuted"},
    {"by_confidence": True, "hard_weight": 1.0, "soft_weight": 0.0},
  ],
)
def test_no_gradient_reaches_the_teacher(changes):
  run, z, t, _ = terms(**changes)

  def loss(z, t):
    return sum(jnp.mean(x.value) * x.weight for x in run(z, t).values())

  to_student, to_teacher = jax.grad(loss, (0, 1))(z, t)
  assert np.abs(to_student).max() > 1e-3
  assert np.all(to_teacher == 0.0)


def tiny(**changes):
  config = cifar10.get_config("generations+smoke")
  config.devices, config.log_every = 1, "1 steps"
  for row in config.students.values():
    row.epochs = 2.0
  config.update_from_flattened_dict(changes)
  return config


def scores(result):
  return {r["name"]: (r["values"], r["details"]["nll"]) for r in result["rows"]}


def digests(folder):
  return {
    str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in folder.rglob("*")
    if p.is_file()
  }


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  path = tmp_path_factory.mktemp("born_again") / "run"
  return path, born_again.run(tiny(), path)


def test_every_generation_is_in_the_table(first):
  rows = first[1]["rows"]
  assert [r["name"] for r in rows] == [
    "labels alone",
    "generation 1",
    "generation 2",
    "labels, weighted by confidence (CWTM)",
    "permuted predictions (DKPP)",
    "both",
  ]
  for r in rows[:-1]:
    assert {"Hessian trace", "train NLL"} <= r["details"].keys()
  assert "agreement" in rows[1]["details"]
  assert "agreement" not in rows[0]["details"]


def test_a_generation_begins_anew_and_its_twin_with_it():
  """Every config of generations: other weights than the teacher's."""
  for config in (
    cifar10.get_config("generations+unlike"),
    cifar100.get_config("wrn28-10+twins"),
  ):
    for name, row in config.students.items():
      if row.teacher:
        parent = config.students[row.teacher]
        assert (row.network, row.offset) != (parent.network, parent.offset)
      if name.startswith("twin_"):
        twin = config.students[name.replace("twin", "generation")]
        assert row.offset == twin.offset and row.network == twin.network
        assert not row.teacher


def test_a_generation_and_its_twin_begin_alike(tmp_path):
  """With the same loss on labels at the first step; generation 0 has another.

  The network has no dropout, so that this says: the same weights and batch.
  """
  rows = ("generation_0", "generation_1_labels", "twin_1")
  config = tiny(rows=rows, claims=(), **{"sharpness.images": 0})
  born_again.run(config, tmp_path / "run")
  losses = {}
  for name in rows:
    path = tmp_path / "run" / "seed0" / name / "metrics.jsonl"
    losses[name] = train.workdir.read_metrics(path)[0]["hard"]
  assert losses["generation_1_labels"] == pytest.approx(losses["twin_1"], 1e-6)
  assert abs(losses["generation_0"] - losses["twin_1"]) > 1e-3


def test_a_run_goes_on_in_its_generation(first, tmp_path, monkeypatch):
  """Killed in generation 2: what came before is left as it is."""
  path = tmp_path / "run"
  real = born_again.train.Study.train

  def killed(self, *args, **more):
    if more["name"] == "generation_2":
      raise KeyboardInterrupt
    return real(self, *args, **more)

  monkeypatch.setattr(born_again.train.Study, "train", killed)
  with pytest.raises(KeyboardInterrupt):
    born_again.run(tiny(), path)
  monkeypatch.undo()
  stages = ("generation_0", "generation_1")
  before = [digests(path / "seed0" / name / "checkpoints") for name in stages]
  assert all(before)
  result = born_again.run(tiny(), path)
  assert scores(result) == scores(first[1])
  after = [digests(path / "seed0" / name / "checkpoints") for name in stages]
  assert after == before


def test_a_branch_begins_with_generations_of_another_run(first, tmp_path):
  config = tiny()
  config.branch.run = str(first[0])
  config.branch.rows = ("generation_0", "generation_1")
  branch = born_again.run(config, tmp_path / "branch")
  assert scores(branch) == scores(first[1])
  trained = {p.name for p in (tmp_path / "branch/seed0").iterdir()}
  for name in config.branch.rows:
    assert not (tmp_path / f"branch/seed0/{name}/checkpoints").exists()
  assert "generation_2" in trained


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"students.generation_0.epochs": 9.0}, "generation_0.epochs 2.0 -> 9.0"),
    ({"transfer": 64}, "had other settings: transfer 32 -> 64"),
    ({"students.generation_0.offset": 7}, "generation_0.offset 0 -> 7"),
    ({"networks.student.batch_size": 8}, "student.batch_size 16 -> 8"),
    ({"branch.rows": ("generation_1",)}, "leaves out generation_0"),
    ({"seeds": (0, 1)}, "seed1/generation_0 does not exist"),
  ],
)
def test_a_branch_of_other_settings_is_refused(
  first, tmp_path, change, message
):
  config = tiny()
  config.branch.run = str(first[0])
  config.branch.rows = ("generation_0",)
  config.update_from_flattened_dict(change)
  with pytest.raises(BadInput, match=message):
    born_again.run(config, tmp_path / "branch")
  assert not (tmp_path / "branch").exists()


def test_a_training_that_was_not_finished_is_no_teacher(first, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(first[0], copy)
  note = copy / "seed0/generation_0/stage.json"
  assert note.read_text() == '{"num_steps": 4}\n'
  note.write_text('{"num_steps": 6000}\n')
  config = tiny()
  config.branch.run, config.branch.rows = str(copy), ("generation_0",)
  with pytest.raises(BadInput, match="is at step 4 of 6000; finish that run"):
    born_again.run(config, tmp_path / "branch")


def test_a_teacher_of_other_classes_is_refused(first, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(first[0], copy)
  stored = json.loads((copy / "inputs.json").read_text())
  assert stored["classes"] == ", ".join("0123456789")
  assert " examples, " in stored["images.part"]
  stored["classes"] = ", ".join(["1", "0", *"23456789"])  # in another order
  (copy / "inputs.json").write_text(json.dumps(stored))
  config = tiny()
  config.branch.run, config.branch.rows = str(copy), ("generation_0",)
  with pytest.raises(
    BadInput,
    match=r"branch.run: .*generation_0 has learned other classes: 1, 0, 2.*"
    "; it should be 0, 1, 2",
  ):
    born_again.run(config, tmp_path / "branch")
  assert not (tmp_path / "branch").exists()


def test_ensembles_of_rows_that_are_left_out_are_left_out(tmp_path):
  config = tiny()
  config.rows = ("generation_0", "generation_1")
  config.sharpness.images = 0
  result = born_again.run(config, tmp_path / "run")
  assert [r["name"] for r in result["rows"]] == ["labels alone", "generation 1"]


def test_weights_by_confidence_are_those_of_the_whole_batch(tmp_path):
  """A batch over eight devices is the batch of one, under pmap as well."""
  found = []
  for devices, parallel in ((1, "jit"), (8, "jit"), (8, "pmap")):
    config = tiny(devices=devices, parallel=parallel)
    config.rows, config.ensembles = ("generation_0", "cwtm"), {}
    config.sharpness.images = 0
    config.claims = ()
    path = tmp_path / f"{devices}{parallel}"
    found.append(scores(born_again.run(config, path)))
    shutil.rmtree(path)
  for other in found[1:]:
    for name, (_, nll) in found[0].items():
      np.testing.assert_allclose(other[name][1], nll, rtol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"rows": ("generation_1",)}, r"generation_1\.teacher is 'generation_0'"),
    ({"rows": ("nothing",)}, "rows is 'nothing'"),
    ({"students.dkpp.target": "label"}, r"students\.dkpp\.target is 'label'"),
    ({"students.dkpp.soft_weight": 0.0}, "student would learn nothing"),
    ({"students.generation_0.hard_weight": 0.0}, "would learn nothing"),
    ({"students.cwtm.teacher": ""}, r"cwtm\.teacher is ''; its loss needs"),
    ({"students.cwtm.network": "big"}, r"cwtm\.network is 'big'"),
    ({"students.dkpp.offset": 0}, r"dkpp\.offset is 0; it should not be"),
    ({"ensembles.both": ("generation_9",)}, r"ensembles\.both is"),
    (
      {"branch.rows": ("generation_0",)},
      r"branch\.run: .* is no run of kd_jax",
    ),
    ({"branch.run": "x"}, r"branch\.run is 'x' and branch\.rows is \(\)"),
    ({"networks.student.fields.hidden": ("a",)}, r"fields\.hidden is \('a',\)"),
    ({"seeds": ("a",)}, "seeds is .*; it should hold whole numbers"),
    ({"sharpness.images": -1}, r"sharpness\.images is -1"),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(
  tmp_path, change, message
):
  config = tiny()
  with config.ignore_type():
    config.update_from_flattened_dict(change)
  if "rows" in change:
    config.ensembles = {}
  if "branch.rows" in change:
    config.branch.run = str(tmp_path)
  with pytest.raises(BadInput, match=message) as error:
    born_again.run(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()
