"""Checkpoints: round trips, damage, what is never silent."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import models, train
from kd_jax.errors import BadInput
from kd_jax.train import (
  CheckpointError,
  Checkpoints,
  checkpoint as command_module,
)


def tree(value):
  return {
    "w": jax.random.normal(jax.random.key(value), (64, 64)),
    "half": jnp.full(3, value, jnp.bfloat16),
    "key": jax.random.key(7),
    "step": jnp.int32(value),
  }


def save(directory, *steps):
  with Checkpoints(directory, keep=3) as checkpoints:
    for step in steps:
      checkpoints.save(step, tree(step))


def restore(directory):
  with Checkpoints(directory, keep=3) as checkpoints:
    return checkpoints.restore(tree(0))


def largest_file(directory: pathlib.Path) -> pathlib.Path:
  files = [p for p in directory.rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def test_round_trip_is_to_the_bit(tmp_path, same):
  save(tmp_path, 3, 5)
  found, step = restore(tmp_path)
  assert step == 5
  assert found["half"].dtype == jnp.bfloat16
  same(jax.random.key_data(found.pop("key")), [0, 7], exact=True)
  want = tree(5)
  del want["key"]
  same(found, want, exact=True)


def test_nothing_there_is_none(tmp_path):
  assert restore(tmp_path) is None


def damage_flip(step: pathlib.Path):
  path = largest_file(step / "state")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def damage_cut(step: pathlib.Path):
  path = largest_file(step / "state")
  os.truncate(path, path.stat().st_size // 2)


def damage_empty(step: pathlib.Path):
  for path in sorted(step.rglob("*"), reverse=True):
    path.unlink() if path.is_file() else path.rmdir()


def damage_digests(step: pathlib.Path):
  path = largest_file(step / "digests")
  digests = json.loads(path.read_text())
  digests["['w']"] = digests["['half']"]
  path.write_text(json.dumps(digests))


def damage_types(step: pathlib.Path):
  """The weights are whole, but who does not know the tree cannot read it."""
  path = step / "state/_METADATA"
  path.write_text(path.read_text().replace("np.ndarray", "np..darray"))


@pytest.mark.parametrize(
  "damage",
  [damage_flip, damage_cut, damage_empty, damage_digests, damage_types],
)
def test_damage_falls_back_to_the_newest_good_one(tmp_path, damage, same):
  save(tmp_path, 3, 5, 8)
  damage(tmp_path / "8")
  with pytest.warns(UserWarning, match="checkpoint 8 cannot be trusted") as w:
    found, step = restore(tmp_path)
  if damage is damage_digests:
    assert "digest mismatch at w" in str(w[0].message)
  assert step == 5
  same(found["w"], tree(5)["w"], exact=True)
  assert (tmp_path / "damaged-8").is_dir() and (tmp_path / "3").is_dir()
  save(tmp_path, 8)  # the number is free again
  assert restore(tmp_path)[1] == 8


def test_all_damaged_stops_and_deletes_nothing(tmp_path):
  save(tmp_path, 3, 5)
  damage_flip(tmp_path / "3")
  damage_cut(tmp_path / "5")
  with pytest.raises(CheckpointError, match="no checkpoint .*5: .*; 3: "):
    restore(tmp_path)
  assert {p.name for p in tmp_path.iterdir()} >= {"3", "5"}


def test_an_older_or_equal_step_is_not_silently_dropped(tmp_path):
  save(tmp_path, 5)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="checkpoint 5 .* not written"):
      checkpoints.save(5, tree(5))


def test_another_architecture_is_an_error(tmp_path):
  save(tmp_path, 5)
  other = tree(0) | {"w": jnp.zeros((64, 65))}
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match=r"w is float32 \(64, 64\) there"):
      checkpoints.restore(other)
  assert (tmp_path / "5").is_dir()


def test_only_the_newest_are_kept(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, tree(step))
  assert {p.name for p in tmp_path.iterdir()} == {"2", "3"}


def test_a_failed_save_names_the_path(tmp_path, monkeypatch):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree(1))

    def full(*args, **kwargs):
      raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: No space left"):
      checkpoints.save(2, tree(2))
  assert restore(tmp_path)[1] == 1


def test_saved_bits_do_not_follow_a_donated_buffer(tmp_path):
  update = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
  state = {"w": jnp.zeros((256, 256))}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    for _ in range(5):
      state = update(state)
  with Checkpoints(tmp_path) as checkpoints:
    found, _ = checkpoints.restore({"w": jnp.zeros((256, 256))})
  np.testing.assert_array_equal(found["w"], 0.0)


class TestLoadTrained:
  """A stage of one run as the teacher of another."""

  SHAPE = (4, 4, 1)

  @pytest.fixture
  def stage(self, tmp_path):
    model = models.create("mlp", 3, hidden=(5,))
    start = model.init(jax.random.key(0), jnp.zeros((1, *self.SHAPE)))
    state = train.init_state(
      {"model": start["params"]},
      optax.adam(1e-3),
      jax.random.key(1),
      model_state={"model": start["state"]},
    )
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
      checkpoints.save(7, state)
    return tmp_path, start

  def load(self, path, classes=3, **fields):
    fields = {"hidden": (5,)} | fields
    return train.load_teacher(path, "mlp", classes, self.SHAPE, **fields)

  def test_gives_the_bits_of_the_model(self, stage, same):
    same(self.load(stage[0]), stage[1], exact=True)

  def test_leaves_the_other_run_alone(self, stage):
    def files():
      return {p: p.stat().st_mtime_ns for p in stage[0].rglob("*")}

    before = files()
    self.load(stage[0])
    assert files() == before

  @pytest.mark.parametrize("change", [{"hidden": (6,)}, {"classes": 4}])
  def test_refuses_another_architecture(self, stage, change):
    with pytest.raises(BadInput, match="another architecture: params/Dense"):
      self.load(stage[0], **change)

  def test_refuses_damage_and_nothing(self, stage, tmp_path):
    with pytest.raises(BadInput, match="holds no checkpoints"):
      self.load(tmp_path / "checkpoints")
    damage_flip(stage[0] / "checkpoints" / "7")
    with pytest.raises(BadInput, match="7 (is damaged|cannot be read)"):
      self.load(stage[0])

  def test_names_the_roles_there_are(self, stage):
    with pytest.raises(BadInput, match="no peer_0; it should be one of model"):
      train.load_trained(stage[0], stage[1], role="peer_0")


class TestVerify:
  """The command that looks through a directory."""

  def command(self, capsys, *args):
    code = command_module.main(["checkpoint", *map(str, args)])
    return code, *capsys.readouterr()

  def test_it_reads_every_stage_and_names_what_is_damaged(
    self, problem, tmp_path, capsys
  ):
    for stage in ("a", "b"):
      problem.fit(num_steps=4, save_every=2, workdir=tmp_path / stage)
    code, out, _ = self.command(capsys, "verify", tmp_path)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 4 and all(line.endswith(": good") for line in lines)
    damage_flip(tmp_path / "b/checkpoints/4")
    code, out, _ = self.command(capsys, "verify", tmp_path)
    assert code == 1
    bad = [line for line in out.splitlines() if not line.endswith(": good")]
    assert len(bad) == 1 and "b/checkpoints/4: " in bad[0]
    assert (tmp_path / "b/checkpoints/4").exists()  # it only looks

  def test_one_stage_or_its_checkpoints_will_do(
    self, problem, tmp_path, capsys
  ):
    problem.fit(num_steps=4, save_every=2, workdir=tmp_path)
    for path in (tmp_path, tmp_path / "checkpoints"):
      code, out, _ = self.command(capsys, "verify", path)
      assert code == 0 and len(out.splitlines()) == 2

  def test_wrong_use_is_exit_code_2(self, tmp_path, capsys):
    code, _, err = self.command(capsys, "verify", tmp_path)
    assert code == 2 and "holds no checkpoints" in err
    code, _, err = self.command(capsys, "check", tmp_path)
    assert code == 2 and err.startswith("usage: ")
