"""Born-again language models: an LSTM, taught by one like it.

Furlanello et al. 2018, arXiv:1805.04770, Table 6: on the Penn Treebank an LSTM
that learns from the words and from an equal trained before it has a lower
perplexity; from the teacher alone, the paper says, language models gained
nothing. The control is the first one, trained for as long.

  python -m experiments.born_again_lm \
    --config=configs/born_again_lm/text.py --workdir=runs/born_again_lm
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import (
  cli,
  comparison,
  compression,
  losses,
  models,
  teachers,
  train,
)
from kd_jax.data import text
from kd_jax.errors import check_choice, naming
from kd_jax.reduce import Term


def make_loss(model, row):
  """The method: the next token, and what the teacher says of it."""

  def loss_fn(params, model_state, frozen, batch, key):
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = model.apply(variables, batch["tokens"], train=True, key=key)
    hparams, terms = frozen["hparams"], {}
    if row["hard_weight"]:
      hard = losses.cross_entropy(out.logits, batch["label"])
      terms["hard"] = Term(hard, weight=hparams["hard_weight"])
    if row["teacher"]:
      asked = model.apply(frozen["teacher"], batch["tokens"])[0].logits
      asked = jax.lax.stop_gradient(asked)
      temperature = hparams["temperature"]
      soft = losses.kl(out.logits, asked, temperature=temperature)
      terms["soft"] = Term(soft, weight=hparams["soft_weight"])
    return terms, train.Aux(model_state={"model": state})

  return loss_fn


def load(config):
  """Reads the text and checks everything before anything is written."""
  kept = train.check_ensembles(
    config.ensembles, config.rows, tuple(config.students)
  )
  train.check_comparison(
    config.rows, config.claims, config.seeds, derived=tuple(kept)
  )
  train.check_periods(config)
  train.check_settings("", config)
  folder = config.data_dir
  units = text.split(text.read(config.text, folder), config.unit)
  if config.test_text:
    tested = text.split(text.read(config.test_text, folder), config.unit)
  else:  # the last tenth
    end = len(units) - len(units) // 10
    units, tested = units[:end], units[end:]
  units = units[: config.tokens or None]
  known = text.vocabulary(units, config.most)
  data = text.windows(text.encode(units, known), config.window)
  test = text.windows(text.encode(tested, known), config.window)
  s = config.network
  with naming("network"):
    devices = train.use_devices(config.devices)
    train.check_divides(s.batch_size, len(devices))
    train.index_batches(0, s.batch_size, len(data["id"]))
    model = models.create(s.model, len(known), **s.fields)
    models.template(s.model, len(known), (config.window,), **s.fields)
    train.optimizer(1, **s.optimizer)
  for number, name in enumerate(config.rows):
    check_choice("rows", name, tuple(config.students))
    row, where = config.students[name], f"students.{name}"
    train.check_student(
      where, row, taught=bool(row.teacher), before=config.rows[:number]
    )
  return model, data, test, len(known), kept


def scorer(model, test, batch_size=50):
  """A function of variables: the mean NLL of all test tokens, in nats."""

  @jax.jit
  def total(variables, tokens, label):
    logits = model.apply(variables, tokens)[0].logits
    return losses.cross_entropy(logits, label).sum()

  def nll(variables):
    sums = [
      total(
        variables,
        test["tokens"][i : i + batch_size],
        test["label"][i : i + batch_size],
      )
      for i in range(0, len(test["id"]), batch_size)
    ]
    return float(
      np.sum(jax.device_get(sums), dtype=np.float64) / test["label"].size
    )

  return nll


def train_one(config, net, start, frozen, seed, path, title, nll):
  """Trains one network with one seed, or takes it up where it was left."""
  runner, optimizer, steps = net
  batch_size, n = config.network.batch_size, len(frozen["data"]["id"])
  state = train.init_state(
    {"model": start["params"]},
    optimizer,
    jax.random.fold_in(jax.random.key(seed), 1),
    model_state={"model": start["state"]},
  )

  def variables(state):
    parts = {"params": state.params, "state": state.model_state}
    return {name: part["model"] for name, part in parts.items()}

  def scores(state):
    value = nll(variables(state))
    return {"test NLL": value, "test perplexity": np.exp(value)}

  state = train.fit(
    runner,
    state,
    frozen,
    train.index_batches(seed, batch_size, n),
    num_steps=steps,
    workdir=path,
    evaluate=scores,
    steps_per_epoch=n // batch_size,
    title=title,
    **{
      name: config[name] for name in ("eval_every", "save_every", "log_every")
    },
  )
  return variables(state)


def network(config, model, row, n):
  """(compiled step, optimiser, number of steps) of a row."""
  s = config.network
  steps = train.steps_of(row["epochs"], s.batch_size, n)
  optimizer = train.optimizer(steps, **s.optimizer)
  step = train.make_step(
    make_loss(model, row), optimizer, clip_norm=s.clip_norm or None
  )
  runner = train.compile(
    train.gather_batch(step),
    how=config.parallel,
    devices=train.use_devices(config.devices),
    steps_per_call=config.steps_per_call,
  )
  return runner, optimizer, steps


def body(config, model, data, test, classes, ensembles, path):
  """Each generation is a stage of its own; a teacher is a row before."""
  stages = train.Stages(path, len(config.seeds) * len(config.rows))
  nll, nets, found, costs = scorer(model, test), {}, {}, {}
  for seed in config.seeds:
    trained, digests = {}, {}
    for number, name in enumerate(config.rows):
      row = config.students[name].to_dict()
      if name not in nets:
        nets[name] = network(config, model, row, len(data["id"]))
      own = jax.random.fold_in(jax.random.key(seed), 2 + number)
      start = model.init(own, jnp.asarray(data["tokens"][:1]))
      weights = ("temperature", "soft_weight", "hard_weight")
      frozen = {"data": data, "hparams": {k: row[k] for k in weights}}
      if row["teacher"]:
        frozen["teacher"] = trained[row["teacher"]]
        few = test["tokens"][:4]
        teachers.check(model, frozen["teacher"], few, classes=classes)
      stage, title = stages.enter(f"seed{seed}/{name}", row["label"])
      title = f"{title}, seed {seed}"
      variables = train_one(
        config, nets[name], start, frozen, seed, stage, title, nll
      )
      trained[name], digests[name] = variables, teachers.digest(variables)
      found.setdefault(name, []).append(nll(variables))
    for name, members in ensembles.items():
      together = models.ensemble(dict.fromkeys(members, model))
      score = scorer(together, test)
      mean = score({member: trained[member] for member in members})
      found.setdefault(name, []).append(mean)
    if not costs:
      costs["language model"] = compression.cost(
        lambda v, x: model.apply(v, x)[0].logits,
        trained[config.rows[0]],
        test["tokens"][:10],
      )
    for name, before in digests.items():
      assert teachers.digest(trained[name]) == before, f"{name} has changed"
  return table(config, found, costs, data, test, classes), {
    "curves": stages.curves("test perplexity", prefix=f"seed{config.seeds[0]}/")
  }


def table(config, found, costs, data, test, classes):
  """The result file's fields: a perplexity for each row and seed."""
  titles = {name: config.students[name].label for name in config.rows}
  titles |= {name: name for name in config.ensembles}
  papers = {name: config.students[name].paper or None for name in config.rows}
  values = {name: np.exp(nlls).tolist() for name, nlls in found.items()}
  return {
    "experiment": "born_again_lm",
    "title": f"Born-again language models on {config.study}",
    "source": "Furlanello et al. 2018, arXiv:1805.04770, Table 6",
    "seeds": list(config.seeds),
    "metric": {
      "name": "test perplexity",
      "unit": f"per {config.unit}",
      "better": "lower",
    },
    "data": {
      "text": config.study,
      "tokens (training)": int(data["label"].size),
      "tokens (test)": int(test["label"].size),
      "vocabulary": classes,
    },
    "rows": [
      {
        "name": titles[name],
        "paper": papers.get(name),
        "seeds": list(config.seeds),
        "values": value,
        "details": {"nll": found[name]},
      }
      for name, value in values.items()
    ],
    "comparisons": [
      comparison.compare(
        claim, values[a], values[b], expected, a=titles[a], b=titles[b]
      )
      for claim, a, b, expected in config.claims
    ],
    "models": costs,
  }


def run(config, workdir, **how):
  """Trains every generation for every seed; returns the result."""
  return train.execute(load, body, config, workdir, **how)


if __name__ == "__main__":
  cli.main(run)
