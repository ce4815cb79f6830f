"""Who sees which view: what makes a teacher consistent."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs.patient_consistent import cifar10
from experiments import patient_consistent
from kd_jax import models, train
from kd_jax.data import order, views
from kd_jax.errors import BadInput

N, CLASSES = 12, 10
KEY = jax.random.key(5)


def pool():
  rng = np.random.default_rng(0)
  return {
    "id": np.arange(100, 100 + N, dtype=np.int32),
    "image": rng.integers(0, 256, (N, 8, 8, 1)).astype(np.uint8),
    "label": rng.integers(0, CLASSES, N).astype(np.int32),
  }


def batch(epoch=3, rows=(4, 0, 7)):
  data, rows = pool(), np.array(rows)
  partner = order.partners(0, epoch, rows, N)
  return {
    **{k: v[rows] for k, v in data.items()},
    "partner": {k: v[partner] for k, v in data.items()},
    "epoch": np.full(len(rows), epoch, np.int32),
  }


def settings(mode, crop="inception", **more):
  config = cifar10.get_config("modes+smoke")
  config.view.crop, config.view.size = crop, 8
  config.view.on_host = more.pop("on_host", False)
  row = config.students[config.rows[0]].to_dict() | {"mode": mode, **more}
  return config.view, row


def probe(seen):
  """A model that notes what it is shown; logits are the first pixels."""

  def apply(variables, images, *, train=False, key=None):
    seen.append(np.asarray(images))
    return models.Outputs(images.reshape(len(images), -1)[:, :CLASSES]), {}

  return models.Model(lambda key, images: {}, apply)


def shown(mode, data=None, drop=None, **more):
  """What student and teacher see, and the terms, in one step."""
  view, row = settings(mode, **more)
  student, teacher = [], []
  loss_fn = patient_consistent.make_loss(
    probe(student), view, row, probe(teacher)
  )
  hparams = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 1.0}
  frozen = {"view_key": KEY, "hparams": hparams, "teacher": {}}
  rows = {**batch(), **(data or {})}
  rows.pop(drop, None)
  terms, _ = loss_fn({"model": {}}, {"model": {}}, frozen, rows, None)
  return student, teacher, terms


@pytest.mark.parametrize("crop", ["inception", "shift"])
@pytest.mark.parametrize("mode", ["consistent", "function_matching"])
def test_teacher_and_student_see_the_same_pixels(mode, crop):
  student, teacher, terms = shown(mode, crop=crop)
  np.testing.assert_array_equal(student[0], teacher[0])
  np.testing.assert_allclose(terms["soft"].value, 0.0, atol=1e-7)


def test_independent_views_differ():
  student, teacher, terms = shown("independent")
  gap = np.abs(student[0] - teacher[0]).reshape(3, -1).max(1)
  assert np.all(gap > 0.1)
  same, _, _ = shown("consistent")
  np.testing.assert_array_equal(student[0], same[0])
  assert np.all(terms["soft"].value > 0)


def test_function_matching_mixes_the_partners_own_view():
  """Mixing commutes with looking, as a partner's view is its own."""
  student, _, _ = shown("function_matching")
  view, _ = settings("consistent")
  now = batch()
  partner = {**now["partner"], "epoch": now["epoch"]}
  own = train.random_views(view)(KEY, now)
  other = train.random_views(view)(KEY, partner)
  keys = views.keys(KEY, now["id"], now["epoch"])
  r = np.float64(views.mix_ratios(keys))[:, None, None, None]
  np.testing.assert_allclose(
    student[0], r * own + (1 - r) * other, rtol=1e-5, atol=1e-6
  )
  assert len(np.unique(r)) == 3


def test_labels_ask_no_teacher_and_targets_no_labels():
  _, teacher, terms = shown("labels", hard_weight=1.0)
  assert not teacher and terms.keys() == {"hard"}
  _, _, terms = shown("consistent", hard_weight=0.0)
  assert terms.keys() == {"soft"}


def test_fixed_targets_are_those_that_were_given():
  targets = np.random.default_rng(1).normal(size=(3, 1, CLASSES))
  _, teacher, terms = shown(
    "fixed", {"teacher_logits": jnp.asarray(targets, jnp.float32)}
  )
  assert not teacher and np.all(terms["soft"].value > 0)


@pytest.mark.parametrize("mode", ["consistent", "function_matching"])
def test_images_from_the_host_are_only_flipped_and_mixed(mode):
  now = batch()
  del now["partner"]
  student, teacher, _ = shown(mode, now, on_host=True, drop="partner")
  np.testing.assert_array_equal(student[0], teacher[0])
  keys = views.keys(KEY, now["id"], now["epoch"])
  x = 2.0 * views.random_flip(keys, views.to_float(now["image"])) - 1.0
  if mode == "function_matching":
    r = np.float64(views.mix_ratios(keys))[:, None, None, None]
    x = r * x + (1 - r) * np.roll(x, 1, 0)
  np.testing.assert_allclose(student[0], x, rtol=1e-5, atol=1e-6)


def test_independent_views_from_the_host_are_two_crops():
  now = {**batch(), "other_image": batch()["image"][::-1]}
  student, teacher, _ = shown("independent", now, on_host=True)
  first = np.sort(student[0].reshape(3, -1), -1)
  second = np.sort(teacher[0].reshape(3, -1), -1)
  np.testing.assert_allclose(second, first[::-1])  # perhaps flipped


def tiny(rows, **changes):
  """A run of tiny networks with a fast teacher."""
  config = cifar10.get_config("modes+bank+smoke")
  every = cifar10.get_config("modes+bank")
  config.rows = rows
  for name in rows:
    config.students[name].epochs = 3.0
  assert set(rows) <= set(every.rows)
  config.devices = 1
  config.update_from_flattened_dict(changes)
  return config


def scores(result):
  return {
    row["name"]: (row["values"], row["details"]["nll"])
    for row in result["rows"]
  }


def test_one_fixed_view_from_a_bank_is_what_a_teacher_says_of_it(tmp_path):
  """A student of the bank's first view, and one whose views never change."""
  config = tiny(("bank_4",))
  bank = patient_consistent.run(config, tmp_path / "a")
  stored = tmp_path / "a/banks/bank_4-seed0"
  assert len(list(stored.glob("view-*.npy"))) == 4
  (tmp_path / "a/result.json").unlink()
  again = patient_consistent.run(config, tmp_path / "a")  # from the bank
  assert scores(again) == scores(bank)


def test_a_bank_replays_live_inference(tmp_path, monkeypatch):
  """With as many views as epochs the bank is the live teacher."""
  rows = ("bank_4", "function_matching_30")
  config = tiny(rows)
  result = patient_consistent.run(config, tmp_path / "run")
  _, cached, live = result["rows"]
  assert cached["values"] == live["values"]
  np.testing.assert_allclose(
    cached["details"]["nll"], live["details"]["nll"], rtol=1e-5
  )


def test_a_run_killed_within_an_epoch_goes_on_to_the_same_bits(
  tmp_path, monkeypatch
):
  config = tiny(("function_matching_30",), save_every="1 step")
  whole = patient_consistent.run(config, tmp_path / "a")
  read, calls = train.index_batches, []

  def stopping(*args, **kwargs):
    batches = read(*args, **kwargs)

    def stop(step):
      calls.append(step)
      if kwargs.get("partners") and step == 3:  # the second of epoch 1
        raise KeyboardInterrupt
      return batches(step)

    return stop

  with monkeypatch.context() as patch:
    patch.setattr("kd_jax.train.classifier.index_batches", stopping)
    with pytest.raises(KeyboardInterrupt):
      patient_consistent.run(config, tmp_path / "b")
  resumed = patient_consistent.run(config, tmp_path / "b")
  assert scores(resumed) == scores(whole)
  stages = [
    tmp_path / name / "seed0/function_matching_30" for name in ("a", "b")
  ]
  a, b = ((stage / "metrics.jsonl").read_text() for stage in stages)
  assert a == b


def test_eight_devices_give_the_numbers_of_one(tmp_path):
  """Who is mixed with whom, and which view, depend on no device."""
  found = []
  for how, devices in (("jit", 1), ("pmap", 8)):
    config = tiny(("function_matching_30",), parallel=how, devices=devices)
    result = patient_consistent.run(config, tmp_path / how)
    found.append([row["details"]["nll"] for row in result["rows"]])
  np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


@pytest.mark.parametrize(
  ("name", "arg", "parameters"),
  [
    ("cifar10", "", (40_000, 42_000)),
    ("cifar10", "vit", (150_000, 250_000)),
    ("cifar10", "mobilenet", (570_000, 590_000)),
    ("flowers102", "fast", (23_700_000, 23_720_000)),  # 25.5M, 102 classes
    ("imagenet2012", "vit", (21_900_000, 22_100_000)),
    ("imagenet2012", "mobilenet", (5_400_000, 5_550_000)),
  ],
)
def test_the_students_that_configs_name(name, arg, parameters):
  path = f"configs.patient_consistent.{name}"
  config = importlib.import_module(path).get_config(arg)
  s = config.networks.student
  classes = {"cifar10": 10, "flowers102": 102, "imagenet2012": 1000}[name]
  model = models.create(s.model, classes, **s.fields)
  side = s.size or config.view.size
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert parameters[0] < count < parameters[1]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"view.size": 29}, "view.size is 29; it should be at least 1 and at most"),
    ({"view.crop": "whirl"}, "view.crop is 'whirl'"),
    ({"view.least_area": 0.0}, "view.least_area is 0.0"),
    ({"transfer": 4000}, "transfer is 4000"),
    ({"transfer": 10}, "batch_size is 16, but the data set has only 10"),
    (
      {"students.labels_30.mode": "fxed"},
      r"students\.labels_30\.mode is 'fxed'",
    ),
    (
      {"students.labels_30.temperature": 0.0},
      r"students\.labels_30\.temperature is 0",
    ),
    (
      {"students.labels_30.network": "big"},
      r"students\.labels_30\.network is 'big'; it should be one of",
    ),
    ({"students.labels_30.bank": 4}, r"students\.labels_30\.bank is 4"),
    (
      {"students.labels_30.hard_weight": 0.0},
      r"students\.labels_30\.hard_weight is 0",
    ),
    ({"rows": ("labels_31",)}, "rows is 'labels_31'; it should be one of"),
    ({"rows": ("labels_30", "labels_30")}, "each once"),
    ({"parallel": "foo"}, "parallel is 'foo'"),
    ({"devices": 9}, "devices is 9"),
    (
      {"networks.student.model": "resnet"},
      r"networks\.student: model name is 'resnet'",
    ),
    (
      {"networks.student.optimizer.learning_rate": -1.0},
      r"networks\.student\.optimizer\.learning_rate is -1",
    ),
    ({"networks.student.optimizer.name": "adm"}, "optimizer is 'adm'"),
    ({"save_every": "a while"}, "save_every is 'a while'"),
    (
      {"teachers.teacher.checkpoint": "none.npz"},
      r"teachers\.teacher\.checkpoint: model name is 'mlp'; files",
    ),
    ({"view.on_host": True}, r"evaluation is \(\); images cropped on the host"),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(
  tmp_path, change, message
):
  config = cifar10.get_config("modes+smoke")
  config.update_from_flattened_dict(change)
  with pytest.raises(BadInput, match=message) as error:
    patient_consistent.run(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


BIT = {"depth": (1,), "base_width": 4, "groups": 2, "root": "cifar"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A BiT network of 3-channel images in the published layout."""
  path = tmp_path_factory.mktemp("files") / "bit.npz"
  model = models.create("bit_resnet", CLASSES, **BIT)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  models.bit_npz.save(path, variables)
  return str(path)


@pytest.mark.parametrize(
  ("classes", "fields", "message"),
  [
    (12, BIT, "bit.npz has 10 classes; it should have 12"),
    (CLASSES, {**BIT, "depth": (2,)}, "bit.npz is of another architecture"),
    (CLASSES, {**BIT, "base_width": 8}, "bit.npz is of another architecture"),
  ],
)
def test_a_teacher_that_does_not_fit(checkpoint, classes, fields, message):
  with pytest.raises(BadInput, match=message) as error:
    models.load(checkpoint, "bit_resnet", classes, **fields)
  assert "\n" not in str(error.value)


def test_a_teacher_from_a_file_teaches(checkpoint, tmp_path, monkeypatch):
  """Images of three channels; the teacher's logits are those of the file."""
  load = patient_consistent.train.setup.data.load

  def in_colour(name, split, data_dir):
    source = load(name, split, data_dir)
    fetch = source.fetch

    def fetched(ids):
      images, labels = fetch(ids)
      return np.repeat(images, 3, -1), labels

    return dataclasses.replace(source, fetch=fetched, image_shape=(28, 28, 3))

  monkeypatch.setattr(patient_consistent.train.setup.data, "load", in_colour)
  config = tiny(("fixed_30",))
  config.teachers.teacher.checkpoint = checkpoint
  config.teachers.teacher.model = "bit_resnet"
  config.teachers.teacher.fields = ConfigDict(BIT)
  result = patient_consistent.run(config, tmp_path / "run")
  assert result["rows"][0]["name"] == "teacher"
  assert not (tmp_path / "run/seed0/teacher").exists()  # none was trained
  config.students.fixed_30.temperature = 2.0
  with pytest.raises(BadInput, match="temperature 1.0 -> 2.0"):
    patient_consistent.run(config, tmp_path / "run")
  config.teachers.teacher.checkpoint = str(tmp_path / "gone.npz")
  with pytest.raises(
    BadInput, match=r"teachers\.teacher\.checkpoint: .*gone.npz does not exist"
  ):
    patient_consistent.run(config, tmp_path / "other")


def test_a_stage_of_another_run_teaches(tmp_path):
  config = tiny(("fixed_30",))
  first = patient_consistent.run(config, tmp_path / "first")
  config.teachers.teacher.checkpoint = str(tmp_path / "first/seed0/teacher")
  again = patient_consistent.run(config, tmp_path / "again")
  assert scores(again) == scores(first)
  assert not (tmp_path / "again/seed0/teacher").exists()
  config.teachers.teacher.checkpoint = str(tmp_path / "first/seed0")
  with pytest.raises(
    BadInput, match=r"teachers\.teacher\.checkpoint: .*holds no checkpoints"
  ):
    patient_consistent.run(config, tmp_path / "other")
