"""The floors of mutual learning and of feature distillation.

Mutual learning of K peers should cost K supervised steps, and matching five
hidden layers of a teacher its inference and a supervised step, see
`benchmarks.step_floor`.

Run: python -m benchmarks.run floor_mutual floor_taps
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.run import Benchmark
from benchmarks.step_floor import CLASSES, in_turn, stepping
from kd_jax import losses, models, train
from kd_jax.reduce import Term

PEERS, TAPS, WIDTH, BATCH, STEPS = 4, 5, 800, 128, 3


class Deep(nn.Module):
  """An MLP that shows its hidden layers."""

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> models.Outputs:
    features = {}
    for i in range(TAPS):
      x = features[f"hidden{i}"] = nn.relu(nn.Dense(WIDTH)(x))
    return models.Outputs(nn.Dense(CLASSES)(x), features=features)


def steps_of(
  model: models.Model, terms: Callable[..., dict[str, Term]], batch: Any
) -> Callable[[Any], Callable[[], Any]]:
  """`steps_of(...)(frozen)` makes one more step on each call.

  Args:
    model: the student.
    terms: `terms(outputs, batch, frozen)`.
    batch: the batch.
  """
  optimizer = optax.adam(1e-3)

  def loss_fn(
    params: Any, model_state: Any, frozen: Any, batch: Any, key: Any
  ) -> Any:
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = model.apply(variables, batch["image"], train=True, key=key)
    aux = train.Aux(model_state={"model": state})
    return terms(out, batch, frozen), aux

  start = model.init(jax.random.key(1), batch["image"][:1])
  step = train.make_step(loss_fn, optimizer)
  return functools.partial(stepping, start, optimizer, batch, step)


def alone(out: models.Outputs, batch: Any, frozen: Any) -> dict[str, Term]:
  return {"hard": Term(losses.cross_entropy(out.logits, batch["label"]))}


def together(out: models.Outputs, batch: Any, frozen: Any) -> dict[str, Term]:
  heads = out.heads
  hard = jax.vmap(losses.cross_entropy, (0, None))(heads, batch["label"])
  said = jax.lax.stop_gradient(heads)
  soft = [
    losses.mutual_kl(heads[i], jnp.delete(said, i, axis=0))
    for i in range(PEERS)
  ]
  return {"hard": Term(hard.sum(0)), "soft": Term(sum(soft))}


def mutual(batch: Any) -> Benchmark:
  one = models.create("mlp", CLASSES, hidden=(WIDTH, WIDTH))
  cohort = models.cohort({f"peer_{i}": one for i in range(PEERS)})
  stacked = models.stacked(one, PEERS)
  base = f"{PEERS} supervised steps"
  form = functools.partial(in_turn, STEPS)
  each = [steps_of(one, alone, batch)(None) for _ in range(PEERS)]
  return Benchmark(
    title="The floor of mutual learning",
    base=base,
    forms={
      base: form(*each),
      "a cohort's step": form(steps_of(cohort, together, batch)(None)),
      "a stacked cohort's": form(steps_of(stacked, together, batch)(None)),
    },
    claims=[
      (
        "mutual learning costs less than its peers alone",
        "a cohort's step",
        base,
        "lower",
      )
    ],
    data={
      "peers": f"{PEERS} x mlp {WIDTH}-{WIDTH}",
      "batch size": BATCH,
      "steps in a round": STEPS,
    },
  )


def taps(batch: Any) -> Benchmark:
  model = models.from_linen(Deep())
  known = model.init(jax.random.key(0), batch["image"][:1])
  ask = jax.jit(lambda v, x: model.apply(v, x)[0].features)
  base = "teacher inference, then a supervised step"
  form = functools.partial(in_turn, STEPS)

  def matching(out: models.Outputs, batch: Any, frozen: Any) -> Any:
    asked = model.apply(frozen, batch["image"])[0].features
    gaps = [
      losses.hint(out.features[name], jax.lax.stop_gradient(asked[name]))
      for name in asked
    ]
    return {**alone(out, batch, frozen), "hint": Term(sum(gaps))}

  def inference() -> Any:
    return ask(known, batch["image"])

  return Benchmark(
    title=f"The floor of feature distillation: {TAPS} taps",
    base=base,
    forms={
      base: form(inference, steps_of(model, alone, batch)(None)),
      f"a step with {TAPS} taps": form(steps_of(model, matching, batch)(known)),
    },
    claims=[
      (
        "taps cost less than the parts of the step",
        f"a step with {TAPS} taps",
        base,
        "lower",
      )
    ],
    data={
      "teacher and student": f"mlp, {TAPS} hidden layers of {WIDTH}",
      "batch size": BATCH,
      "steps in a round": STEPS,
    },
  )


def benchmark(which: str) -> Benchmark:
  rng = np.random.default_rng(0)
  batch = {
    "image": jnp.asarray(rng.normal(size=(BATCH, 784)), jnp.float32),
    "label": jnp.asarray(rng.integers(0, CLASSES, BATCH), jnp.int32),
  }
  return {"mutual": mutual, "taps": taps}[which](batch)
