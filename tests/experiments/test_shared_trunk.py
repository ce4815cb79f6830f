"""What teaches in a network of several classifiers, against the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.shared_trunk import cifar10
from experiments import shared_trunk
from kd_jax import models
from kd_jax.errors import BadInput

B, C, T = 5, 4, 3.0


def softmax(z):
  e = np.exp(np.float64(z) - np.max(z, -1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  return np.sum(p * (np.log(p) - np.log(q)), -1)


def output(heads=3, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  attention = softmax(rng.normal(size=(B, heads - 1, heads - 1)))
  return models.Outputs(
    logits=draw(B, C),
    heads=draw(heads, B, C),
    features={
      "attention": jnp.asarray(attention, jnp.float32),
      "exits": draw(heads, B, 6),
    },
  )


def expected(method, out):
  """The paper's losses in NumPy."""
  z, e = np.float64(out.heads), np.float64(out.logits)
  q, together = softmax(z / T), softmax(e / T)
  if method == "one":
    return {"soft": T**2 * sum(kl(together, one) for one in q)}
  if method == "ffl":
    mean = softmax(z.mean(0) / T)
    to = sum(kl(together, one) for one in q)
    return {"soft": T**2 * (to + kl(mean, together))}
  if method == "okddip":
    a = np.float64(out.features["attention"])
    own = np.einsum("bij,jbc->ibc", a, q[:-1])
    to = sum(kl(t, one) for t, one in zip(own, q[:-1], strict=True))
    return {"soft": T**2 * (to + kl(q[:-1].mean(0), q[-1]))}
  if method == "own_teacher":
    f = np.float64(out.features["exits"])
    soft = T**2 * sum(kl(together, one) for one in q[:-1])
    gap = sum(np.mean((one - f[-1]) ** 2, -1) for one in f[:-1])
    return {"soft": soft, "hint": gap}
  if method == "rocket":
    return {"hint": np.sum((z[0] - z[1]) ** 2, -1)}
  return {}


@pytest.mark.parametrize("method", shared_trunk.METHODS)
def test_the_losses_are_the_papers(method):
  out = output(2 if method == "rocket" else 4)
  found = shared_trunk.soft_losses(method, out, T)
  wanted = expected(method, out)
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["one", "okddip", "ffl", "own_teacher"])
def test_a_head_is_reached_by_what_it_is_taught_alone(method):
  """With one teacher's divergence left in, only its student moves."""
  out = output(4)

  def loss(heads, logits, features):
    now = out.replace(heads=heads, logits=logits, features=features)
    return sum(
      x.mean() for x in shared_trunk.soft_losses(method, now, T).values()
    )

  heads, logits, features = jax.grad(loss, (0, 1, 2))(
    out.heads, out.logits, out.features
  )
  # Of each divergence the gradient by the logits of its student: T (q - p).
  z, e = np.float64(out.heads), np.float64(out.logits)
  q, together = softmax(z / T), softmax(e / T)
  asked = np.broadcast_to(together, q.shape).copy()
  if method == "okddip":
    a = np.float64(out.features["attention"])
    asked[:-1] = np.einsum("bij,jbc->ibc", a, q[:-1])
    asked[-1] = q[:-1].mean(0)
  expected_heads = T * (q - asked) / B
  if method == "own_teacher":  # the deepest is `logits`, and learns nothing
    expected_heads[-1] = 0.0
  np.testing.assert_allclose(heads, expected_heads, rtol=1e-3, atol=1e-6)
  if method == "ffl":  # the fused classifier follows the mean of logits
    mean = softmax(z.mean(0) / T)
    expected_logits = T * (together - mean) / B
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-3, atol=1e-6)
  else:
    assert not np.any(logits)
  if method == "okddip":
    assert np.any(features["attention"])
  if method == "own_teacher":
    assert np.any(features["exits"][0]) and not np.any(features["exits"][-1])


def test_the_booster_is_not_pulled_to_the_light_net():
  out = output(2)

  def loss(heads):
    now = out.replace(heads=heads)
    return shared_trunk.soft_losses("rocket", now, T)["hint"].mean()

  grads = jax.grad(loss)(out.heads)
  assert np.any(grads[0]) and not np.any(grads[1])


def terms(method, epoch=0, **changes):
  row = cifar10.student("", method, "", **changes).to_dict()
  out = output(2 if method == "rocket" else 4)
  model = models.Model(
    None, lambda variables, images, *, train=False, key=None: (out, {})
  )
  view = {"crop": "none", "size": 4, "padding": 0, "least_area": 1.0}
  view |= {"flip": False, "on_host": False}
  loss_fn = shared_trunk.make_loss(model, view, row)
  fields = ("temperature", "soft_weight", "hint_weight")
  frozen = {
    "view_key": jax.random.key(0),
    "hparams": {k: row[k] for k in fields},
  }
  batch = {
    "id": np.arange(B, dtype=np.int32),
    "image": np.zeros((B, 4, 4, 1), np.uint8),
    "label": np.arange(B, dtype=np.int32) % C,
    "epoch": np.full(B, epoch, np.int32),
  }
  found, _ = loss_fn({"model": {}}, {"model": {}}, frozen, batch, None)
  label = batch["label"]
  hard = -np.log(softmax(out.heads))[:, np.arange(B), label]
  together = -np.log(softmax(out.logits))[np.arange(B), label]
  return found, hard, together


def test_who_learns_the_labels():
  for method in ("labels", "okddip", "rocket"):
    found, hard, _ = terms(method)
    np.testing.assert_allclose(found["hard"].value, hard.sum(0), rtol=1e-5)
  for method in ("one", "ffl"):
    found, hard, together = terms(method)
    np.testing.assert_allclose(
      found["hard"].value, hard.sum(0) + together, rtol=1e-5
    )
  found, hard, _ = terms("own_teacher", soft_weight=0.3)
  shares = np.array([0.7, 0.7, 0.7, 1.0])[:, None]
  np.testing.assert_allclose(
    found["hard"].value, (shares * hard).sum(0), rtol=1e-5
  )
  np.testing.assert_allclose(found["soft"].weight, 0.3)
  np.testing.assert_allclose(found["hint"].weight, 0.03)


def test_the_ramp_is_of_the_divergences():
  for epoch, weight in ((0, np.exp(-5)), (2, np.exp(-1.25)), (4, 1), (9, 1)):
    found, _, _ = terms("one", epoch, ramp=4.0)
    np.testing.assert_allclose(found["soft"].weight, weight, rtol=1e-5)


def tiny(rows):
  config = cifar10.get_config("smoke")
  config.rows, config.devices = rows, 1
  return config


def test_a_whole_run_with_its_rows(tmp_path):
  rows = ("okddip", "own_teacher", "rocket")
  result = shared_trunk.run(tiny(rows), tmp_path / "run")
  assert [r["name"] for r in result["rows"]] == [
    "OKDDip: a branch",
    "OKDDip: the leader",
    "its own teacher: exit 1",
    "its own teacher: exit 2",
    "its own teacher: exit 3",
    "rocket launching: light net",
    "rocket launching: booster",
  ]
  flops = [result["models"][f"exits, exit {i}"]["flops"] for i in (1, 2, 3)]
  assert all(flops)
  again = shared_trunk.run(tiny(rows), tmp_path / "run")
  assert again["rows"] == result["rows"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"rows": ("nothing",)}, "rows is 'nothing'"),
    ({"students.one.method": "two"}, r"students\.one\.method is 'two'"),
    ({"students.one.network": "big"}, r"students\.one\.network is 'big'"),
    ({"students.one.network": "fused"}, "fields.combine is 'gate'"),
    (
      {"students.one.method": "own_teacher", "students.one.network": "gated"},
      "needs a network of model 'multi_exit'",
    ),
    (
      {"students.one.method": "rocket", "students.one.network": "branches_3"},
      "network of two branches",
    ),
    ({"networks.gated.model": "cnn"}, r"networks\.gated\.model is 'cnn'"),
    (
      {"networks.gated.fields.trunk": (("a", 4, 4),)},
      r"networks\.gated: fields make no branched: ",
    ),
    ({"students.one.hint_weight": -1.0}, "hint_weight is -1"),
    ({"students.one.ramp": -1.0}, "ramp is -1"),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(
  tmp_path, change, message
):
  config = tiny(("one",))
  config.update_from_flattened_dict(change)
  with pytest.raises(BadInput, match=message) as error:
    shared_trunk.run(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()
