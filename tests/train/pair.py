"""A pair of which the teacher is large, to be split over devices."""

import jax
import numpy as np
import optax

from kd_jax import losses, models, train
from kd_jax.reduce import Term

WIDTH, CLASSES, N = 128, 8, 32


class Pair:
  """An MLP that learns from a wider one."""

  def __init__(self, depth=2, teacher_depth=2):
    rng = np.random.default_rng(0)
    self.data = {
      "id": np.arange(N, dtype=np.int32),
      "x": rng.normal(size=(N, 16)).astype(np.float32),
      "label": rng.integers(0, CLASSES, N).astype(np.int32),
      "valid": np.arange(N) % 3 != 0,
    }
    few = self.data["x"][:1]
    self.teacher = models.create(
      "mlp", CLASSES, hidden=(WIDTH,) * teacher_depth
    )
    self.student = models.create("mlp", CLASSES, hidden=(24,) * depth)
    self.known = self.teacher.init(jax.random.key(0), few)
    self.start = self.student.init(jax.random.key(1), few)
    self.optimizer = optax.adam(1e-2)

  def loss_fn(self, params, model_state, frozen, batch, key):
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = self.student.apply(variables, batch["x"], train=True)
    asked = self.teacher.apply(frozen["teacher"], batch["x"])[0].logits
    soft = losses.kl(out.logits, jax.lax.stop_gradient(asked))
    hard = losses.cross_entropy(out.logits, batch["label"])
    terms = {"soft": Term(soft), "hard": Term(hard, where=batch["valid"])}
    return terms, train.Aux(model_state={"model": state})

  def runner(self, how="jit", devices=8, parts=1, **options):
    step = train.make_step(self.loss_fn, self.optimizer, microbatches=parts)
    return train.compile(
      train.gather_batch(step),
      how=how,
      devices=jax.devices()[:devices],
      **options,
    )

  def state(self):
    return train.init_state(
      {"model": self.start["params"]},
      self.optimizer,
      jax.random.key(2),
      model_state={"model": self.start["state"]},
    )

  def fit(self, runner, **options):
    options = {"num_steps": 12, "progress": False, "log_every": 1, **options}
    frozen = {"data": self.data, "teacher": options.pop("teacher", self.known)}
    batches = train.index_batches(0, 16, N)
    return train.fit(runner, self.state(), frozen, batches, **options)

  def lowered(self, runner):
    batch = {k: x[:16] for k, x in self.data.items()}
    if runner.steps_per_call > 1:
      batch = {
        k: np.stack([x] * runner.steps_per_call) for k, x in batch.items()
      }
    frozen = runner.replicate({"teacher": self.known})
    state = runner.replicate(self.state())
    return runner.lower(state, frozen, runner.shard(batch))

  def student_bytes(self):
    return sum(x.nbytes for x in jax.tree.leaves(self.start["params"]))
