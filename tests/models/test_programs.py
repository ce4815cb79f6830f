"""Teachers as exported programs: the same logits, and none that is damaged."""

import hashlib
import pickle
import subprocess

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses, models, teachers
from kd_jax.errors import BadInput
from kd_jax.models import programs

SHAPE = (4, 4, 1)
NOTHING = {"params": {}, "state": {}}


class WithStatistics(nn.Module):
  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.relu(nn.Conv(8, (3, 3))(x))
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = models.Dropout(0.5)(x, train=train)
    return nn.Dense(3)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return rng.normal(size=(16, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def trained(images):
  """A model with its variables, whose statistics are no longer the first."""
  model = models.from_linen(WithStatistics())
  variables = model.init(jax.random.key(0), images[:1])
  _, state = model.apply(variables, images, train=True, key=jax.random.key(1))
  return model, {"params": variables["params"], "state": state}


@pytest.fixture(scope="module")
def stored(trained, tmp_path_factory):
  path = tmp_path_factory.mktemp("program") / "teacher.jax"
  models.save_program(path, *trained, shape=SHAPE)
  return path


@pytest.fixture
def copy(stored, tmp_path):
  """A copy to damage."""
  for path in stored.parent.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path / stored.name


def refused(path):
  with pytest.raises(BadInput) as error:
    models.load_program(path)
  assert str(error.value).startswith(str(path.parent))
  assert "\n" not in str(error.value)
  return str(error.value).replace(f"{path.parent}/", "")


def test_the_same_logits_for_any_batch(trained, stored, images):
  model, variables = trained
  program = models.load_program(stored)
  start = program.init(jax.random.key(0), images)
  assert start == NOTHING
  for n in (1, 5, 16):
    outputs, state = program.apply(start, images[:n])
    assert isinstance(outputs, models.Outputs) and state == {}
    expected = model.apply(variables, images[:n])[0].logits
    assert outputs.logits.dtype == expected.dtype
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5, atol=1e-6)
  # A frozen teacher, whatever it is asked for.
  again, _ = program.apply(start, images, train=True, key=jax.random.key(3))
  np.testing.assert_array_equal(again.logits, outputs.logits)


def test_it_passes_the_check_of_teachers(stored, images):
  program = models.load_program(stored)
  teachers.check(program, NOTHING, images, classes=3)
  with pytest.raises(BadInput, match="has 3 classes; it should have 4"):
    teachers.check(program, NOTHING, images, classes=4)


def test_it_teaches(trained, stored, images):
  model, variables = trained
  student = models.create("mlp", 3, hidden=(8,))
  params = student.init(jax.random.key(0), images[:1])["params"]

  def gradient(teacher, frozen):
    def loss_fn(params):
      logits = student.apply({"params": params, "state": {}}, images)[0].logits
      taught = jax.lax.stop_gradient(teacher.apply(frozen, images)[0].logits)
      return losses.kl(logits, taught, temperature=4.0).mean()

    return jax.jit(jax.grad(loss_fn))(params)

  program = gradient(models.load_program(stored), NOTHING)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    program,
    gradient(model, variables),
  )
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(program))


def test_on_several_devices(trained, stored, images):
  model, variables = trained
  program = models.load_program(stored)
  expected = model.apply(variables, images)[0].logits
  ask = lambda x: program.apply(NOTHING, x)[0].logits
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  logits = jax.jit(ask)(jax.device_put(images, over))
  assert logits.sharding.is_equivalent_to(over, logits.ndim)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
  n = len(jax.devices())
  logits = jax.pmap(ask)(images.reshape(n, -1, *SHAPE)).reshape(16, 3)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_tokens_and_bfloat16(tmp_path):
  bigrams = models.from_function(lambda key, x: None, lambda w, x: w[x])
  table = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
  tokens = np.arange(10, dtype=np.int32).reshape(2, 5) % 7
  variables = {"params": jnp.asarray(table), "state": {}}
  models.save_program(tmp_path / "lm", bigrams, variables, (5,), jnp.int32)
  program = models.load_program(tmp_path / "lm")
  logits = program.apply(NOTHING, tokens)[0].logits
  np.testing.assert_array_equal(logits, table[tokens])
  linear = models.from_function(lambda key, x: None, lambda w, x: x @ w)
  half = {"params": jnp.eye(3, dtype=jnp.bfloat16), "state": {}}
  models.save_program(tmp_path / "half", linear, half, (3,), jnp.bfloat16)
  ones = jnp.ones((2, 3), jnp.bfloat16)
  logits = models.load_program(tmp_path / "half").apply(NOTHING, ones)[0].logits
  assert logits.dtype == jnp.bfloat16 and (logits == 1).all()


def test_other_inputs_are_refused(stored, images):
  program = models.load_program(stored)
  for inputs in (images[..., :2, :], images.reshape(16, -1)):
    with pytest.raises(ValueError, match=r"expected .*\(batch, 4, 4, 1\)"):
      program.apply(NOTHING, inputs)
  with pytest.raises(ValueError, match="expected float32 .* with uint8"):
    program.apply(NOTHING, np.zeros((2, *SHAPE), np.uint8))


def test_a_flipped_bit_is_never_run(copy, monkeypatch):
  """Nor read: the reader may crash."""
  from jax import export

  content = copy.read_bytes()
  models.load_program(copy)

  def never(*_):
    raise AssertionError("read")

  monkeypatch.setattr(export, "deserialize", never)
  for place in np.linspace(0, len(content) - 1, 50).astype(int):
    damaged = bytearray(content)
    damaged[place] ^= 1 << place % 8
    copy.write_bytes(damaged)
    found = hashlib.sha256(damaged).hexdigest()
    assert f"teacher.jax is damaged: its SHA-256 is {found}; te" in refused(
      copy
    )
  copy.write_bytes(content[:-1])
  assert "teacher.jax is damaged" in refused(copy)


def test_a_digest_that_is_missing_or_none(copy):
  digest = copy.with_name("teacher.jax.sha256")
  kept = digest.read_text()
  for text in ("", "abc", kept[1:], kept.upper(), "0" + kept, "\0" * 100):
    digest.write_text(text)
    assert refused(copy) == (
      "teacher.jax.sha256 should begin with the 64 digits of a SHA-256"
    )
  digest.write_text("0" * 64)
  assert refused(copy).endswith(f"teacher.jax.sha256 has {'0' * 64}")
  digest.unlink()
  assert refused(copy) == (
    "teacher.jax.sha256 does not exist; it should hold teacher.jax's SHA-256"
  )
  digest.write_text(kept[:64])  # The name may be left out.
  models.load_program(copy)
  copy.unlink()
  assert refused(copy) == "teacher.jax does not exist"
  copy.mkdir()
  assert refused(copy) == "teacher.jax is not a file"


@pytest.mark.parametrize("content", [b"", b"no program", pickle.dumps([0])])
def test_another_file_with_its_digest(tmp_path, content):
  path = tmp_path / "x"
  path.write_bytes(content)
  digest = hashlib.sha256(content).hexdigest()
  (tmp_path / "x.sha256").write_text(digest)
  assert f"x is no program that JAX {jax.__version__} can read: " in refused(
    path
  )


def test_sha256sum_reads_the_digest(stored):
  done = subprocess.run(
    ["sha256sum", "--check", "--strict", f"{stored.name}.sha256"],
    cwd=stored.parent,
    capture_output=True,
    check=True,
  )
  assert done.stdout == b"teacher.jax: OK\n"


def test_a_program_is_for_all_platforms(stored):
  from jax import export

  program = export.deserialize(bytearray(stored.read_bytes()))
  assert set(program.platforms) == set(programs.PLATFORMS)


def test_a_model_that_cannot_be_exported_leaves_nothing(tmp_path):
  uneven = models.from_function(
    lambda key, x: {}, lambda params, x: x.reshape(3, -1)
  )
  with pytest.raises(Exception, match="batch"):
    models.save_program(tmp_path / "x", uneven, NOTHING, (5,))
  assert not list(tmp_path.iterdir())
