"""Online distillation within one network: branches and exits that teach.

The classifiers share their first layers, so that a group costs little more
than one network, and what teaches is made of the group itself:

  one          the branches' gated mean (Zhu et al. 2018, arXiv:1806.04606)
  okddip       for each branch a mean of its own, by attention; the mean of all
               for the leader (Chen et al. 2019, arXiv:1912.00350)
  ffl          a classifier on all feature maps, itself taught by the mean of
               logits (Kim et al. 2019, arXiv:1904.09058)
  own_teacher  the deepest exit teaches the others (Zhang et al. 2019,
               arXiv:1905.08094); accuracy and latency of every exit
  rocket       a booster gives its logits to a light net, with which it is
               trained (Zhou et al. 2018, arXiv:1708.04106)

The control is the same network, every classifier on labels alone; and a single
branch. What teaches is always taken as a constant.

  python -m experiments.shared_trunk \
    --config=configs/shared_trunk/cifar10.py --workdir=runs/shared_trunk
"""

import jax
import jax.numpy as jnp

from kd_jax import cli, compression, losses, targets, train
from kd_jax.data import augment
from kd_jax.errors import check_choice, check_number
from kd_jax.reduce import Term

# Which way to combine the branches each method needs.
METHODS = {
  "labels": "",
  "one": "gate",
  "okddip": "attention",
  "ffl": "fusion",
  "own_teacher": "",
  "rocket": "mean",
}
constant = jax.lax.stop_gradient


def soft_losses(method, out, temperature):
  """What the heads are taught, [batch] each by name: T^2 KL of all pairs."""
  how = {"temperature": temperature}
  to = lambda asked: sum(losses.kl(z, asked, **how) for z in out.heads)
  if method == "one":
    return {"soft": to(constant(out.logits))}
  if method == "ffl":
    mean = constant(targets.ensemble(out.heads, space="logit"))
    fused = losses.kl(out.logits, mean, **how)
    return {"soft": to(constant(out.logits)) + fused}
  if method == "okddip":
    peers, leader = out.heads[:-1], out.heads[-1]
    # [to, from, batch]; the gradient reaches the attention through it.
    weights = jnp.moveaxis(out.features["attention"], 0, -1)
    own = targets.peers(constant(peers), weights=weights, **how)
    soft = sum(losses.kl(z, t, **how) for z, t in zip(peers, own, strict=True))
    mean = constant(targets.ensemble(peers, **how))
    return {"soft": soft + losses.kl(leader, mean, **how)}
  if method == "own_teacher":
    deepest = constant(out.logits)
    exits = out.features["exits"]
    gap = sum(losses.hint(f, constant(exits[-1])) for f in exits[:-1])
    soft = losses.early_exit_kl(out.heads[:-1], deepest, **how)
    return {"soft": soft, "hint": gap}
  if method == "rocket":
    light, booster = out.heads
    return {"hint": 2.0 * losses.logit_mse(light, constant(booster))}
  return {}


def make_loss(model, view, row):
  """The method, on one view of the images."""
  look, method = train.random_views(view), row["method"]

  def loss_fn(params, model_state, frozen, batch, key):
    images, hparams = look(frozen["view_key"], batch), frozen["hparams"]
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = model.apply(variables, images, train=True, key=key)
    hard = [losses.cross_entropy(z, batch["label"]) for z in out.heads]
    if method == "own_teacher":
      share = 1.0 - hparams["soft_weight"]
      total = hard[-1] + share * sum(hard[:-1])
    elif method in ("one", "ffl"):  # what teaches learns the labels, too
      total = sum(hard) + losses.cross_entropy(out.logits, batch["label"])
    else:
      total = sum(hard)
    terms = {"hard": Term(total)}
    for name, value in soft_losses(method, out, hparams["temperature"]).items():
      weight = hparams[f"{name}_weight"]
      if name == "soft" and row["ramp"]:  # as a sigmoid, over that many epochs
        left = 1.0 - jnp.minimum(batch["epoch"][0] / row["ramp"], 1.0)
        weight *= jnp.exp(-5.0 * left**2)
      terms[name] = Term(value, weight=weight)
    return terms, train.Aux(model_state={"model": state})

  return loss_fn


def heads_of(settings):
  """How many classifiers the network has, beside the combined one."""
  many = "branches" if settings.model == "branched" else "stages"
  return len(settings.fields[many])


def network(config, row, steps, num_classes):
  """A network of several classifiers with its training step."""
  settings = config.networks[row["network"]]
  model = train.image_model(config, settings, num_classes)
  loss_fn = make_loss(model, config.view, row)
  return train.image_classifier(
    config, settings, model, loss_fn, steps, heads=heads_of(settings)
  )


def load(config):
  """Reads and checks everything before anything is compiled or written."""
  derived = [
    f"{name}/{part}"
    for name in config.rows
    for part in ("together", *(f"head{i}" for i in range(9)))
  ]
  train.check_comparison(
    config.rows, config.claims, config.seeds, derived=derived
  )
  images = train.load_images(config)
  for name, s in config.networks.items():
    check_choice(f"networks.{name}.model", s.model, ("branched", "multi_exit"))
  used = {}
  for name in config.rows:
    check_choice("rows", name, tuple(config.students))
    used[f"students.{name}.network"] = config.students[name].network
  train.check_networks(config, used, images)
  for name in config.rows:
    row, where = config.students[name], f"students.{name}"
    check_choice(f"{where}.method", row.method, tuple(METHODS))
    s = config.networks[row.network]
    wanted = METHODS[row.method]
    if wanted and s.fields.get("combine", "mean") != wanted:
      raise ValueError(
        f"{where}.network is {row.network!r}; the method {row.method!r} needs "
        f"a network whose fields.combine is {wanted!r}"
      )
    if row.method == "own_teacher" and s.model != "multi_exit":
      raise ValueError(
        f"{where}.network is {row.network!r}; the method 'own_teacher' needs a "
        "network of model 'multi_exit'"
      )
    if row.method == "own_teacher":  # the labels' share is what remains of 1
      check_number(f"{where}.soft_weight", row.soft_weight, least=0, most=1)
    if row.method == "rocket" and heads_of(s) != 2:
      raise ValueError(
        f"{where}.network is {row.network!r}; the method 'rocket' needs a "
        "network of two branches, the light one first"
      )
  return images, images.test.evaluated()


def exit_costs(study, net, variables, kind, images):
  """What each exit costs alone: the compiler leaves out what lies behind."""
  for i in range(net.heads):
    name = f"{kind}, exit {i + 1}"
    if name not in study.costs:

      def one(variables, images, i=i):
        out, _ = net.model.apply(variables, augment.whole(images))
        return out.heads[i]

      study.costs[name] = compression.cost(one, variables, images[:100])


def body(config, images, test, path):
  """Trains each network for each seed; a row for each of its classifiers."""
  part, nets = images.part, {}
  study = train.Study(path, test, len(config.seeds) * len(config.rows), config)
  for seed in config.seeds:
    for name in config.rows:
      row = config.students[name].to_dict()
      s = config.networks[row["network"]]
      steps = train.steps_of(row["epochs"], s.batch_size, part.n)
      if name not in nets:
        nets[name] = network(config, row, steps, images.num_classes)
      frozen, feed = part.feed(seed, s.batch_size, keys=[train.view_key(seed)])
      fields = ("temperature", "soft_weight", "hint_weight")
      frozen["hparams"] = {k: row[k] for k in fields}
      variables, (together, heads) = study.train(
        nets[name],
        frozen,
        name=name,
        title=row["label"],
        kind=row["network"],
        seed=seed,
        settings={"steps": steps, "batch_size": s.batch_size},
        **feed,
      )
      label, add = row["label"], study.board.add
      if s.model == "multi_exit":
        exit_costs(study, nets[name], variables, row["network"], test["image"])
      if s.model == "multi_exit" or row["method"] == "rocket":
        kinds = ("light net", "booster")
        for i, head in enumerate(heads):
          what = kinds[i] if row["method"] == "rocket" else f"exit {i + 1}"
          add(f"{name}/head{i}", head, seed=seed, title=f"{label}: {what}")
        continue
      add(name, heads, seed=seed, title=f"{label}: a branch")
      if len(heads) > 1:
        leader = row["method"] == "okddip"
        what = "the leader" if leader else "all together"
        add(f"{name}/together", together, seed=seed, title=f"{label}: {what}")
  result = study.result(
    config.claims,
    experiment="shared_trunk",
    title=f"Branches and exits on {config.dataset}: {config.study}",
    source="Zhu et al. 2018, arXiv:1806.04606; Zhang et al. 2019, "
    "arXiv:1905.08094",
    seeds=list(config.seeds),
    data={"name": config.dataset, "train": part.n, "test": len(test["label"])},
  )
  first = f"seed{config.seeds[0]}/"
  return result, {
    "curves": study.stages.curves("mean test errors", prefix=first)
  }


def run(config, workdir, **how):
  """Trains every network for every seed; returns the result."""
  return train.execute(load, body, config, workdir, **how)


if __name__ == "__main__":
  cli.main(run)
