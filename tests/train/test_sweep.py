"""Several settings as one program, against a run of each of them alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import losses, models, train
from kd_jax.reduce import Term
from kd_jax.train.workdir import read_metrics

WIDTH = 17  # of the teacher alone
STUDENT = models.from_linen(models.MLP(hidden=(8,), num_classes=3))
TEACHER = models.from_linen(models.MLP(hidden=(WIDTH,), num_classes=3))
HPARAMS = {
  "temperature": np.float32([1.0, 4.0, 2.5]),
  "soft_weight": np.float32([0.9, 0.5, 0.0]),
  "learning_rate": np.float32([1e-2, 3e-3, 3e-2]),
  "weight_decay": np.float32([0.0, 0.1, 0.3]),
  "seed": np.int32([0, 0, 5]),
}
COUNT = 3


def optimizer(hparams):
  return optax.adamw(
    hparams["learning_rate"], weight_decay=hparams["weight_decay"]
  )


def loss_fn(params, model_state, frozen, batch, key):
  hparams = frozen["hparams"]
  variables = {"params": params["model"], "state": model_state["model"]}
  out, state = STUDENT.apply(variables, batch["x"], train=True, key=key)
  soft = losses.kl(
    out.logits, batch["teacher_logits"], temperature=hparams["temperature"]
  )
  hard = losses.cross_entropy(out.logits, batch["label"])
  terms = {
    "soft": Term(soft, weight=hparams["soft_weight"]),
    "hard": Term(hard, where=batch["valid"]),
  }
  drawn = jnp.full(len(hard), jax.random.uniform(key))
  return terms, train.Aux(
    model_state={"model": state}, metrics={"drawn": drawn}
  )


def ask(frozen, batch):
  logits = TEACHER.apply(frozen["teacher"], batch["x"])[0].logits
  return {**batch, "teacher_logits": logits}


def asking(params, model_state, frozen, batch, key):
  batch = ask(frozen, batch)
  return loss_fn(params, model_state, frozen, batch, key)


def start(hparams, extra=None):
  key = jax.random.key(hparams["seed"])
  variables = STUDENT.init(key, jnp.zeros((1, 4)))
  params, state = ({"model": variables[x]} for x in ("params", "state"))
  return train.init_state(
    params,
    optimizer(hparams),
    jax.random.fold_in(key, 1),
    model_state=state,
    extra=extra and extra.start(params, state),
  )


def frozen_of(problem, hparams):
  teacher = TEACHER.init(jax.random.key(7), jnp.zeros((1, 4)))
  return {"data": problem.data, "teacher": teacher, "hparams": hparams}


def setting_of(hparams, k):
  return jax.tree.map(lambda x: x[k], hparams)


def steps(
  problem, step, state, hparams, count=5, *, how="jit", devices=1, **options
):
  """The state and the metrics of every step."""
  runner = train.compile(
    train.gather_batch(step),
    how=how,
    devices=jax.devices()[:devices],
    **options,
  )
  per_call = runner.steps_per_call
  state = runner.replicate(state)
  frozen = runner.replicate(frozen_of(problem, hparams))
  batches, found = problem.batches(), []
  for i in range(0, count, per_call):
    batch = batches(i)
    if per_call > 1:
      rows = [batches(i + j) for j in range(per_call)]
      batch = {name: np.stack([row[name] for row in rows]) for name in batch}
    state, metrics = runner(state, frozen, runner.shard(batch))
    found.append(jax.device_get(metrics))
  assert devices > 1 or runner._run._cache_size() == 1
  whole = {}
  for name in found[0]:
    values = [metrics[name] for metrics in found]
    whole[name] = (np.stack if per_call == 1 else np.concatenate)(values)
  return runner.unreplicate(state), whole


@pytest.fixture(scope="module")
def alone(problem):
  """What `make_step` makes of each setting."""
  step = train.make_step(asking, optimizer)
  return [
    steps(problem, step, start(own), own)
    for own in (setting_of(HPARAMS, k) for k in range(COUNT))
  ]


def check(found, alone, same, exact=False):
  state, metrics = found
  for k, (one, own) in enumerate(alone):
    mine = train.setting(state, k)
    assert int(mine.step) == int(one.step) == 5
    for name in ("params", "opt_state", "model_state"):
      same(getattr(mine, name), getattr(one, name), exact=exact)
    keys = [jax.random.key_data(x.key) for x in (mine, one)]
    same(*keys, exact=True)
    for name in {*own} & {*metrics}:
      values = own[name]
      same(metrics[name] if name == "ok" else metrics[name][:, k], values)


def test_map_gives_the_bits_of_runs_alone(problem, same, alone):
  step = train.sweep(loss_fn, optimizer, shared=ask, how="map")
  state = train.sweep_state(start, HPARAMS)
  found = steps(problem, step, state, HPARAMS)
  check(found, alone, same, exact=True)
  weights = [one.params["model"]["Dense_0"]["bias"] for one, _ in alone]
  assert not np.allclose(weights[0], weights[1], atol=1e-3)  # of one seed


@pytest.mark.parametrize(
  "how,options",
  [
    ("vmap", {}),
    ("vmap", {"devices": 8, "steps_per_call": 5}),
    ("vmap", {"devices": 4, "how": "pmap"}),
    ("vmap", {"devices": 6, "peers": 3}),
    ("map", {"devices": 2}),
  ],
)
def test_vmap_and_devices_give_the_numbers_of_runs_alone(
  problem, same, alone, how, options
):
  step = train.sweep(loss_fn, optimizer, shared=ask, how=how)
  state = train.sweep_state(start, HPARAMS)
  state, metrics = steps(problem, step, state, HPARAMS, **options)
  if "how" in options:  # with pmap each device draws for itself
    del metrics["drawn"]
  check((state, metrics), alone, same)


def dots(jaxpr, times=1):
  """(shape of the result, how often) of every matrix product."""
  for line in jaxpr.eqns:
    if line.primitive.name == "dot_general":
      yield line.outvars[0].aval.shape, times
    inner = times * line.params.get("length", 1)
    for value in jax.tree.leaves(
      list(line.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      value = getattr(value, "jaxpr", value)
      if hasattr(value, "eqns"):
        yield from dots(value, inner)


@pytest.mark.parametrize("how", ["vmap", "map"])
def test_the_teacher_is_asked_once(problem, how):
  step = train.sweep(loss_fn, optimizer, shared=ask, how=how)
  batch = {name: x[:16] for name, x in problem.data.items()}
  arguments = train.sweep_state(start, HPARAMS), frozen_of(problem, HPARAMS)
  found = list(dots(jax.make_jaxpr(step)(*arguments, batch).jaxpr))
  hidden = [times for shape, times in found if shape == (16, WIDTH)]
  assert hidden == [1]
  student = [(shape, times) for shape, times in found if shape[-2:] == (16, 8)]
  assert set(student) == {((3, 16, 8), 1) if how == "vmap" else ((16, 8), 3)}


def test_settings_on_devices_of_their_own_exchange_no_weights(problem):
  runner = train.compile(
    train.gather_batch(train.sweep(loss_fn, optimizer, shared=ask)),
    devices=jax.devices()[:6],
    peers=3,
  )
  state = runner.replicate(train.sweep_state(start, HPARAMS))
  frozen = runner.replicate(frozen_of(problem, HPARAMS))
  batch = runner.shard(problem.batches()(0))
  lowered = runner._run.lower(state, frozen, batch)
  for line in lowered.compile().as_text().splitlines():
    if re.search("= .*(all-gather|all-to-all|permute)[(]", line):
      shapes = re.findall(r"\w+\[([\d,]*)\]", line.split("(")[0])
      sizes = [np.prod([int(n) for n in x.split(",") if n]) for x in shapes]
      assert max(sizes) <= COUNT, line  # metrics, and whether they are finite


def fit(problem, path, hparams=HPARAMS, how="map", **options):
  runner = train.compile(
    train.gather_batch(train.sweep(loss_fn, optimizer, shared=ask, how=how)),
    devices=jax.devices()[:1],
    steps_per_call=2,
  )
  options = {"num_steps": 5, "progress": False, "log_every": 1, **options}
  return train.fit(
    runner,
    train.sweep_state(start, hparams),
    frozen_of(problem, hparams),
    problem.batches(),
    workdir=path,
    **options,
  )


def test_a_run_of_settings_resumes_and_logs_each(
  problem, same, alone, tmp_path
):
  scores = lambda state: {
    "bias": state.params["model"]["Dense_1"]["bias"][:, 0]
  }
  fit(problem, tmp_path, num_steps=3, evaluate=scores)
  state = fit(problem, tmp_path)
  rows = [x for x in read_metrics(tmp_path / "metrics.jsonl") if "ids" in x]
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
  for k, (one, metrics) in enumerate(alone):
    same(train.setting(state, k).params, one.params, exact=True)
    same([row[f"loss[{k}]"] for row in rows], list(metrics["loss"]))
  (scored,) = (
    x for x in read_metrics(tmp_path / "metrics.jsonl") if "ids" not in x
  )
  assert scored.keys() == {"step", "bias[0]", "bias[1]", "bias[2]"}


def test_a_setting_that_is_not_finite_is_named_and_holds_all(
  problem, same, tmp_path
):
  rates = np.float32([1e-2, 1e30, 3e-2])  # finite for one step
  hparams = {**HPARAMS, "learning_rate": rates}
  with pytest.raises(FloatingPointError) as error:
    fit(problem, tmp_path, hparams)
  text = str(error.value)
  assert text.startswith("step 1 is not finite in setting 1: ")
  assert "loss[1] = nan" in text and "Dense_" in text
  assert "loss[0]" not in text and "loss[2]" not in text
  state = fit(problem, tmp_path, hparams, num_steps=1)  # as it was saved
  assert int(state.step) == 1 and int(state.skipped) == 0
  one = train.make_step(asking, optimizer)
  own = setting_of(hparams, 2)
  want, _ = steps(problem, one, start(own), own, count=1)
  same(train.setting(state, 2).params, want.params, exact=True)


def test_options_and_what_is_beside_the_parameters(problem, same):
  options = {"clip_norm": 0.1, "microbatches": 2}
  extra = train.ema(0.5)
  begin = functools.partial(start, extra=extra)
  own = setting_of(HPARAMS, 2)
  runs = [
    steps(problem, train.with_extra(step, extra.update), state, hparams, 2)[0]
    for step, state, hparams in (
      (
        train.sweep(loss_fn, optimizer, shared=ask, how="map", **options),
        train.sweep_state(begin, HPARAMS),
        HPARAMS,
      ),
      (train.make_step(asking, optimizer, **options), begin(own), own),
    )
  ]
  mine = train.setting(runs[0], 2)
  same(mine.params, runs[1].params)
  same(mine.extra, runs[1].extra)


def test_a_grid_is_every_combination():
  found = train.grid(temperature=(1, 4.0), seed=range(3))
  assert found["temperature"].tolist() == [1, 1, 1, 4, 4, 4]
  assert found["seed"].tolist() == [0, 1, 2, 0, 1, 2]


def test_bad_arguments_are_named(problem):
  unequal = {**HPARAMS, "temperature": np.ones(2, np.float32)}
  message = r"hparams has the shapes .*temperature \(2,\).*one leading axis"
  with pytest.raises(ValueError, match=message):
    train.sweep_state(start, unequal)
  with pytest.raises(ValueError, match=r"seed \(\)"):
    train.sweep_state(start, {**HPARAMS, "seed": 0})
  with pytest.raises(ValueError, match="shapes of nothing"):
    train.sweep_state(start, {})
  with pytest.raises(ValueError, match="each should have at least one value"):
    train.grid(seed=())
  with pytest.raises(ValueError, match="how is 'scan'"):
    train.sweep(loss_fn, optimizer, how="scan")
  state = train.sweep_state(start, HPARAMS)
  step = train.sweep(loss_fn, optimizer)
  few = {"hparams": jax.tree.map(lambda x: x[:2], HPARAMS)}
  with pytest.raises(ValueError, match="has 2 settings; .* of the state, 3"):
    step(state, few, {})
  with pytest.raises(ValueError, match="state is that of one run"):
    step(train.setting(state, 0), {"hparams": HPARAMS}, {})
  with pytest.raises(ValueError, match="index is 3; it should be .* most 2"):
    train.setting(state, 3)
