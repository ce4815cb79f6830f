"""A small problem that the tests of training share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import losses, models, train
from kd_jax.reduce import Term

N, CLASSES = 64, 3


class Problem:
  """Random data with a mask, an MLP, and how to train it."""

  def __init__(self):
    rng = np.random.default_rng(0)
    self.data = {
      "id": np.arange(N, dtype=np.int32) + 1000,
      "x": rng.normal(size=(N, 4)).astype(np.float32),
      "label": rng.integers(0, CLASSES, N).astype(np.int32),
      "valid": np.arange(N) % 5 != 0,
    }
    self.model = models.from_linen(models.MLP(hidden=(8,), num_classes=CLASSES))
    self.variables = self.model.init(jax.random.key(0), self.data["x"][:1])
    self.optimizer = optax.adam(1e-2)

  def loss_fn(self, params, model_state, frozen, batch, key):
    del key
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = self.model.apply(variables, batch["x"], train=True)
    terms = {
      "hard": Term(
        losses.cross_entropy(out.logits, batch["label"]),
        where=batch["valid"],
      ),
      "small": Term(
        losses.logit_mse(out.logits, jnp.zeros_like(out.logits)),
        weight=frozen.get("small_weight", 0.1),
      ),
    }
    hit = (out.logits.argmax(-1) == batch["label"]).astype(jnp.float32)
    aux = train.Aux(model_state={"model": state}, metrics={"accuracy": hit})
    return terms, aux

  def state(self, optimizer=None):
    return train.init_state(
      {"model": self.variables["params"]},
      optimizer or self.optimizer,
      jax.random.key(1),
      model_state={"model": self.variables["state"]},
    )

  def step(self, **options):
    return train.make_step(self.loss_fn, self.optimizer, **options)

  def batches(self, batch_size=16, seed=0):
    return train.index_batches(seed, batch_size, N)

  def fit(self, step=None, *, how="jit", devices=1, per_call=1, **options):
    runner = train.compile(
      train.gather_batch(step or self.step()),
      how=how,
      devices=jax.devices()[:devices],
      steps_per_call=per_call,
    )
    options = {"num_steps": 12, "progress": False, "log_every": 1, **options}
    frozen = options.pop("frozen", {})
    batches = options.pop("batches", self.batches())
    frozen = {"data": options.pop("data", self.data), **frozen}
    return train.fit(runner, self.state(), frozen, batches, **options)


@pytest.fixture(scope="session")
def problem():
  return Problem()


def assert_trees(got, want, *, exact=False):
  """Equal trees: to the bit, or to float32 tolerance."""

  def check(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if exact:
      np.testing.assert_array_equal(a, b)
    else:
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

  jax.tree.map(check, got, want)


@pytest.fixture
def same():
  return assert_trees
