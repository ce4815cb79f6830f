"""What several settings cost as one program, over a run for each of them.

Eight students of one architecture differ in temperature, learning rate and
initial weights; all see the same batches and one teacher. The base is a
compiled distillation step that asks its teacher, run for one setting after the
other. As one program, the teacher is asked once for all. Beside PyTorch the
base are eight runs there; `benchmarks.peers` checks that a step is the same.

Run: python -m benchmarks.run sweep_tiny sweep_small sweep_mlp
     NPROC=1 python -m benchmarks.run peers_sweep_tiny peers_sweep_small
     NPROC=1 python -m benchmarks.run peers_sweep_mlp
"""

from collections.abc import Callable
import time
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.run import Benchmark
from benchmarks.step_floor import Pair, a_batch
from kd_jax import losses, models, train
from kd_jax.reduce import Term

CLASSES = 10

# name -> (teacher's hidden layers, student's, examples in a batch, steps in a
# round, steps a call)
SIZES: dict[str, Any] = {
  "tiny": ((64, 64), (32,), 32, 100, (1, 100)),
  "small": ((300, 300), (100, 100), 128, 20, (1, 10)),
  "mlp": ((1200, 1200), (800, 800), 128, 4, (1,)),
}


def optimizer(hparams: Any) -> optax.GradientTransformation:
  return optax.sgd(hparams["learning_rate"], 0.9)


def in_pytorch(
  large: tuple[int, ...],
  small: tuple[int, ...],
  size: int,
  count: int,
  steps: int,
) -> Callable[[], None]:
  """Some steps of each of so many students in PyTorch, eager."""
  from benchmarks import peers

  roles = (("mlp", {"hidden": hidden}) for hidden in (large, small))
  pair = Pair((784,), size, steps, *roles)
  batch = a_batch(pair)
  runs = [
    peers.torch_step(pair, peers.weights(pair, seed), batch)
    for seed in range(count)
  ]

  def work() -> None:
    for run in runs:
      for _ in range(steps):
        run()

  return work


def benchmark(size: str, peer: str = "") -> Benchmark:
  environment: dict[str, str] = {}
  beside = f", beside {peer}" if peer else ""
  if peer:
    from benchmarks import peers

    peers.check_threads()
    environment = peers.ENVIRONMENT
  large, small, examples, steps, calls = SIZES[size]
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(examples, 784)).astype(np.float32),
    "label": rng.integers(0, CLASSES, examples).astype(np.int32),
  }
  teacher = models.create("mlp", CLASSES, hidden=large)
  student = models.create("mlp", CLASSES, hidden=small)
  known = teacher.init(jax.random.key(0), batch["image"][:1])
  hparams = train.grid(
    temperature=(2.0, 4.0), learning_rate=(1e-4, 1e-3), seed=(0, 1)
  )
  count = len(hparams["seed"])

  def ask(frozen: Any, batch: Any) -> Any:
    logits = teacher.apply(frozen["teacher"], batch["image"])[0].logits
    return {**batch, "teacher_logits": jax.lax.stop_gradient(logits)}

  def loss_fn(
    params: Any, model_state: Any, frozen: Any, batch: Any, key: Any
  ) -> Any:
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = student.apply(variables, batch["image"], train=True, key=key)
    soft = losses.kl(
      out.logits,
      batch["teacher_logits"],
      temperature=frozen["hparams"]["temperature"],
    )
    hard = losses.cross_entropy(out.logits, batch["label"])
    terms = {"soft": Term(soft), "hard": Term(hard, weight=0.1)}
    return terms, train.Aux(model_state={"model": state})

  def asking(
    params: Any, model_state: Any, frozen: Any, batch: Any, key: Any
  ) -> Any:
    return loss_fn(params, model_state, frozen, ask(frozen, batch), key)

  def start(hparams: Any) -> train.TrainState:
    key = jax.random.key(hparams["seed"])
    variables = student.init(key, batch["image"][:1])
    return train.init_state(
      {"model": variables["params"]},
      optimizer(hparams),
      key,
      model_state={"model": variables["state"]},
    )

  state = train.sweep_state(start, hparams)
  every = [
    (train.setting(state, k), {name: x[k] for name, x in hparams.items()})
    for k in range(count)
  ]

  def form(step: Any, runs: Any, per_call: int) -> Callable[[], Any]:
    """Some more steps of each of these runs, one run after the other."""
    runner = train.compile(
      step, devices=jax.devices()[:1], steps_per_call=per_call
    )
    rows = batch
    if per_call > 1:
      rows = {name: np.stack([x] * per_call) for name, x in batch.items()}
    place = lambda state, own: [
      runner.replicate(jax.tree.map(lambda x: x.copy(), state)),
      runner.replicate({"teacher": known, "hparams": own}),
    ]
    here = jax.device_put(runner.shard(rows))
    now = [place(*run) for run in runs]

    def work() -> None:
      for run in now:
        for _ in range(steps // per_call):
          run[0], _ = runner(*run, here)
        jax.block_until_ready(run[0])

    return work

  alone = train.make_step(asking, optimizer)
  one = {
    how: train.sweep(loss_fn, optimizer, shared=ask, how=how)
    for how in ("vmap", "map")
  }
  base = alone_name = f"{count} runs, one after the other"
  forms: dict[str, Callable[[], Any]] = {}
  if peer:
    base = f"{count} runs in PyTorch"
    forms[base] = in_pytorch(large, small, examples, count, steps)
  for per_call in calls:
    more = f", {per_call} steps a call" if per_call > 1 else ""
    forms[alone_name + more] = form(alone, every, per_call)
    for how, step in one.items():
      forms[f"one program, {how}{more}"] = form(
        step, [(state, hparams)], per_call
      )
  return Benchmark(
    title=f"{count} settings as one program: {size} MLP{beside}",
    base=base,
    forms=forms,
    claims=[
      (
        f"one program ({how}) costs less than {count} runs",
        f"one program, {how}",
        base,
        "lower",
      )
      for how in one
    ],
    data={
      "teacher": "-".join(map(str, large)),
      "student": "-".join(map(str, small)),
      "settings": count,
      "batch size": examples,
      "steps in a round": steps,
    },
    clock=time.process_time if peer else time.perf_counter,
    environment=environment,
  )
