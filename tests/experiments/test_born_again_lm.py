"""Generations of language models, and the perplexity they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.born_again_lm import text as config_text
from experiments import born_again_lm
from kd_jax import models
from kd_jax.errors import BadInput

B, T, V = 3, 5, 4


def table(seed):
  logits = np.random.default_rng(seed).normal(size=(B, T, V))

  def apply(variables, tokens, *, train=False, key=None):
    return models.Outputs(variables["params"]), {}

  return models.Model(None, apply), jnp.asarray(logits, jnp.float32)


def log_softmax(z):
  z = np.float64(z)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def terms(hard_weight, temperature=2.0):
  row = config_text.student("", 1.0, "x", hard_weight=hard_weight).to_dict()
  (model, z), (_, t) = table(0), table(1)
  label = np.random.default_rng(2).integers(0, V, (B, T)).astype(np.int32)
  batch = {"tokens": np.zeros((B, T), np.int32), "label": label}
  hparams = {"temperature": temperature, "soft_weight": 1.0, "hard_weight": 1.0}
  loss_fn = born_again_lm.make_loss(model, row)

  def run(z, t):
    frozen = {"hparams": hparams, "teacher": {"params": t, "state": {}}}
    return loss_fn({"model": z}, {"model": {}}, frozen, batch, None)[0]

  return run, z, t, label


def test_every_token_counts_alike():
  run, z, t, label = terms(1.0)
  found = run(z, t)
  hard = -np.take_along_axis(log_softmax(z), label[..., None], -1)[..., 0]
  p, q = log_softmax(t / 2.0), log_softmax(z / 2.0)
  soft = 4.0 * np.sum(np.exp(p) * (p - q), -1)
  np.testing.assert_allclose(found["hard"].value, hard, rtol=1e-5)
  np.testing.assert_allclose(found["soft"].value, soft, rtol=1e-4)


def test_the_teacher_is_a_constant_and_labels_can_be_left_out():
  run, z, t, _ = terms(0.0)
  assert run(z, t).keys() == {"soft"}
  grads = jax.grad(lambda z, t: run(z, t)["soft"].value.sum(), (0, 1))(z, t)
  assert np.any(grads[0]) and not np.any(grads[1])


def test_the_score_is_that_of_all_tokens():
  """Batches of two windows and a tail of one."""
  model, z = table(0)

  def apply(variables, tokens, *, train=False, key=None):
    return models.Outputs(z[tokens[:, 0]]), {}

  tokens = np.repeat(np.arange(B, dtype=np.int32)[:, None], T, 1)
  label = np.random.default_rng(2).integers(0, V, (B, T)).astype(np.int32)
  test = {"id": np.arange(B), "tokens": tokens, "label": label}
  model = models.Model(None, apply)
  found = born_again_lm.scorer(model, test, batch_size=2)({})
  hard = -np.take_along_axis(log_softmax(z), label[..., None], -1)
  np.testing.assert_allclose(found, hard.mean(), rtol=1e-6)


def tiny():
  config = config_text.get_config("smoke")
  config.devices = 1
  return config


def test_a_run_is_taken_up_in_its_generation(tmp_path, monkeypatch):
  whole = born_again_lm.run(tiny(), tmp_path / "a")
  assert [row["name"] for row in whole["rows"]] == [
    "the text alone",
    "generation 1 + text",
    "generation 2 + text",
    "ensemble of generations 1-2 + text",
  ]
  real = born_again_lm.train.fit

  def killed(*args, **more):
    if "generation 2" in more["title"]:
      raise KeyboardInterrupt
    return real(*args, **more)

  monkeypatch.setattr(born_again_lm.train, "fit", killed)
  with pytest.raises(KeyboardInterrupt):
    born_again_lm.run(tiny(), tmp_path / "b")
  monkeypatch.undo()
  again = born_again_lm.run(tiny(), tmp_path / "b")
  assert again["rows"] == whole["rows"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"text": "none.txt"}, "text none.txt does not exist"),
    ({"unit": "line"}, "unit is 'line'"),
    ({"window": 9999}, "a window of 9999 needs"),
    ({"rows": ("generation_1_labels",)}, "it should be one of the rows before"),
    ({"students.generation_0.hard_weight": 0.0}, "student would learn nothing"),
    ({"network.model": "gru"}, "network: model name is 'gru'"),
    ({"network.batch_size": 999}, "network: batch_size is 999"),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(
  tmp_path, change, message
):
  config = tiny()
  config.update_from_flattened_dict(change)
  if "rows" in change:
    config.ensembles = {}
  with pytest.raises(BadInput, match=message) as error:
    born_again_lm.run(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()
