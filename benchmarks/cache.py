"""What a cached teacher costs: time of a step, bytes of an example.

A student of tokens with a large vocabulary learns from labels alone, from a
live teacher, and from what was stored of one: all probabilities, the likeliest
classes, classes drawn at random. What is stored is an array on disk, of which
each step reads the rows of its examples; the reading is part of the step.

Run: python -m benchmarks.run cache
"""

import atexit
from collections.abc import Callable
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.run import Benchmark
from kd_jax import losses, models, targets, train
from kd_jax.reduce import Term

EXAMPLES, VOCABULARY, WIDTH, BATCH, STEPS = 1024, 16384, 128, 128, 2
TOP, DRAWS = 50, 12
TEACHER, STUDENT = {"hidden": (1024, 1024)}, {"hidden": (256,)}
LABELS = "labels alone"


def soft_term(form: str, logits: jax.Array, batch: Any) -> jax.Array | None:
  """The distillation loss of a form; None if it has none."""
  if "teacher_logits" in batch:
    return losses.kl(logits, batch["teacher_logits"].astype(jnp.float32))
  if form.startswith("top"):
    return losses.topk_kl(logits, batch["log_probs"], indices=batch["indices"])
  if "weights" in batch:
    return losses.sampled_kl(
      logits,
      batch["log_probs"],
      indices=batch["indices"],
      weights=batch["weights"],
    )
  return None


def benchmark() -> Benchmark:
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(EXAMPLES, WIDTH)).astype(np.float32)
  label = rng.integers(0, VOCABULARY, EXAMPLES).astype(np.int32)
  teacher = models.create("mlp", VOCABULARY, **TEACHER)
  student = models.create("mlp", VOCABULARY, **STUDENT)
  known = teacher.init(jax.random.key(0), inputs[:1])
  start = student.init(jax.random.key(1), inputs[:1])
  optimizer = optax.sgd(1e-2)
  said = jax.jit(lambda x: 8.0 * teacher.apply(known, x)[0].logits)
  logits = np.concatenate(
    [said(inputs[i : i + BATCH]) for i in range(0, EXAMPLES, BATCH)]
  )
  top = targets.top_k(logits, TOP)
  drawn = targets.importance_samples(logits, jax.random.key(2), DRAWS)
  half = jnp.bfloat16
  narrow = np.uint16 if VOCABULARY <= 2**16 else np.int32
  stored: dict[str, dict[str, Any]] = {
    LABELS: {},
    "live teacher": {},
    "all logits, float32": {"teacher_logits": logits},
    "all logits, bfloat16": {"teacher_logits": logits.astype(half)},
    f"top {TOP}": {
      "indices": np.asarray(top.indices).astype(narrow),
      "log_probs": np.asarray(top.log_probs).astype(np.float16),
    },
    f"{DRAWS} draws": {
      "indices": np.asarray(drawn.indices).astype(narrow),
      "log_probs": np.asarray(drawn.log_probs),
      "weights": np.asarray(drawn.weights),
    },
  }
  folder = tempfile.TemporaryDirectory()
  atexit.register(folder.cleanup)

  def on_disk(name: str, array: Any) -> np.ndarray:
    """The same array, read from a file."""
    path = pathlib.Path(folder.name) / f"{name}.bin"
    np.asarray(array).tofile(path)
    return np.memmap(path, array.dtype, "r", shape=array.shape)

  def form(name: str) -> Callable[[], Any]:
    columns = {
      key: on_disk(f"{name} {key}".replace(" ", "_"), array)
      for key, array in stored[name].items()
    }

    def loss_fn(
      params: Any, model_state: Any, frozen: Any, batch: Any, key: Any
    ) -> Any:
      variables = {"params": params["model"], "state": model_state["model"]}
      out = student.apply(variables, batch["x"], train=True, key=key)[0]
      if frozen is not None:
        live = 8.0 * teacher.apply(frozen, batch["x"])[0].logits
        batch = {**batch, "teacher_logits": jax.lax.stop_gradient(live)}
      if "indices" in batch:
        wide = {"indices": batch["indices"].astype(jnp.int32)}
        batch = {**batch, **wide}
        batch["log_probs"] = batch["log_probs"].astype(jnp.float32)
      terms = {"hard": Term(losses.cross_entropy(out.logits, batch["label"]))}
      soft = soft_term(name, out.logits, batch)
      if soft is not None:
        terms["soft"] = Term(soft)
      return terms, train.Aux(model_state=model_state)

    run = jax.jit(train.make_step(loss_fn, optimizer), donate_argnums=0)
    state = train.init_state(
      {"model": start["params"]},
      optimizer,
      jax.random.key(2),
      model_state={"model": start["state"]},
    )
    now = {"state": state}
    frozen = known if name == "live teacher" else None
    order = np.random.default_rng(1)

    def work() -> None:
      for _ in range(STEPS):
        rows = np.sort(order.choice(EXAMPLES, BATCH, replace=False))
        batch = {"x": inputs[rows], "label": label[rows]}
        batch |= {key: column[rows] for key, column in columns.items()}
        now["state"], metrics = run(now["state"], frozen, batch)
      if not metrics["ok"]:  # which waits for the step
        raise FloatingPointError(f"{name} is not finite: {metrics}")

    return work

  bytes_of = {
    name: sum(array[0].nbytes for array in columns.values())
    for name, columns in stored.items()
    if columns
  }
  return Benchmark(
    title="What a cached teacher costs",
    base=LABELS,
    forms={name: form(name) for name in stored},
    claims=(
      (
        "draws cost less than a live teacher",
        f"{DRAWS} draws",
        "live teacher",
        "lower",
      ),
      ("so do the likeliest", f"top {TOP}", "live teacher", "lower"),
    ),
    data={
      "vocabulary": VOCABULARY,
      "batch size": BATCH,
      "teacher": f"mlp {TEACHER}",
      "student": f"mlp {STUDENT}",
      **{f"bytes an example, {name}": n for name, n in bytes_of.items()},
    },
  )
