"""Who sees which view: what makes a teacher consistent."""

import jax
import jax.numpy as jnp
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
  row = config.students[config.rows[0]].to_dict() | {"mode": mode, **more}
  return config.view, row


def probe(seen):
  """A model that notes what it is shown; logits are the first pixels."""

  def apply(variables, images, *, train=False, key=None):
    seen.append(np.asarray(images))
    return models.Outputs(images.reshape(len(images), -1)[:, :CLASSES]), {}

  return models.Model(lambda key, images: {}, apply)


def shown(mode, data=None, **more):
  """What student and teacher see, and the terms, in one step."""
  view, row = settings(mode, **more)
  student, teacher = [], []
  loss_fn = patient_consistent.make_loss(
    probe(student), view, row, probe(teacher)
  )
  hparams = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 1.0}
  frozen = {"view_key": KEY, "hparams": hparams, "teacher": {}}
  terms, _ = loss_fn(
    {"model": {}}, {"model": {}}, frozen, {**batch(), **(data or {})}, None
  )
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
  own = patient_consistent.look(KEY, now, now["epoch"], view)
  other = patient_consistent.look(KEY, now["partner"], now["epoch"], view)
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


def test_a_bank_replays_what_the_teacher_says_live(tmp_path):
  config = cifar10.get_config("bank+smoke")
  config.view.size = 8
  row = config.students["bank_4"].to_dict()
  model = models.create("mlp", CLASSES, hidden=(16,))
  data = pool()
  teacher = model.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))
  # A network whose answers differ from image to image.
  teacher = jax.tree.map(lambda x: x + 0.1, teacher)
  net = patient_consistent.network(
    config, config.teacher, {**row, "steps": 1}, CLASSES
  )
  net.model = model
  found = patient_consistent.bank(
    config, "x", row, 0, net, teacher, data, (N, CLASSES), tmp_path
  )
  assert found.shape == (N, 4, CLASSES)
  assert np.ptp(found, axis=1).min() > 0  # each view has its own answer
  key = train.view_key(0)

  @jax.jit
  def answer(live):
    images = patient_consistent.student_view(key, live, config.view, row)
    return model.apply(teacher, images)[0].logits

  for view in range(4):
    rows = np.arange(N)
    partner = order.partners(0, view, rows, N)
    live = {
      **data,
      "partner": {k: v[partner] for k, v in data.items()},
      "epoch": np.full(N, view, np.int32),
    }
    np.testing.assert_allclose(
      found[:, view], answer(live), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"view.size": 29}, "view.size is 29; it should be at least 1 and at most"),
    ({"view.crop": "none"}, "view.crop is 'none'"),
    ({"transfer": 4000}, "transfer is 4000"),
    ({"transfer": 10}, "batch_size is 16, but the data set has only 10"),
    (
      {"students.labels_30.mode": "fxed"},
      r"students\.labels_30\.mode is 'fxed'",
    ),
    ({"students.labels_30.bank": 4}, r"students\.labels_30\.bank needs a mode"),
    ({"student.model": "resnet"}, "model name is 'resnet'"),
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
