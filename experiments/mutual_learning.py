"""Deep mutual learning: peers that teach each other while they learn.

Zhang et al. 2018, arXiv:1706.00384, Sec. 2. Each of K networks learns from the
labels and from what the others say of the same view. Who learns from whom is a
matrix. Variants on the same code: the peers' mean as the target, stale copies
exchanged every so many steps after a burn-in (codistillation, Anil et al.
2018, arXiv:1804.03235), the running mean of one's own weights (mean teacher,
Tarvainen & Valpola 2017, arXiv:1703.01780), peers that take turns. The control
is a cohort of the same peers that do not listen to each other: equal cost,
equal initial weights, equal batches.

  python -m experiments.mutual_learning \
    --config=configs/mutual_learning/cifar10.py --workdir=runs/mutual
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import cli, fidelity, losses, models, targets, train
from kd_jax.errors import check_choice, check_number
from kd_jax.reduce import Term

TARGETS = ("each", "mean_probability", "mean_logit", "stale", "ema")
UPDATES = ("together", "in_turn")


def who_teaches(row):
  """[K, K]: what peer i takes from peer j; all others alike by default."""
  count = len(row["peers"])
  if row["teach"]:
    return np.asarray(row["teach"], np.float32)
  return (1.0 - np.eye(count, dtype=np.float32)) / max(count - 1, 1)


def make_loss(model, view, row, active=None):
  """The method, for all peers or for the one that is `active`."""
  look, matrix = train.random_views(view), who_teaches(row)
  count = len(matrix)
  listens = matrix.sum(1) > 0

  def asked(frozen, images, heads):
    """What the peers are taught by, [K, batch, classes]."""
    if row["targets"] in ("stale", "ema"):
      copies = {k: v["model"] for k, v in frozen["extra"].items()}
      return model.apply(copies, images)[0].heads
    return heads if row["differentiate"] else jax.lax.stop_gradient(heads)

  def soft_loss(heads, teachers, temperature):
    """[K, batch]: for each peer the weighted divergences to its teachers."""
    how = {"temperature": temperature}
    if row["targets"] == "ema":  # everyone's teacher is its own mean
      return jax.vmap(lambda q, p: losses.kl(q, p, **how))(heads, teachers)
    if row["targets"] in ("mean_probability", "mean_logit"):
      space = row["targets"].removeprefix("mean_")
      weights = np.where(listens[:, None], matrix, 1.0)
      mean = targets.peers(teachers, weights=weights, space=space, **how)
      each = jax.vmap(lambda q, p: losses.kl(q, p, **how))(heads, mean)
      return each * listens[:, None]
    pairs = [(i, j) for i in range(count) for j in range(count) if matrix[i, j]]
    each = {i: jnp.zeros(heads.shape[1]) for i in range(count)}
    for i, j in pairs:
      each[i] += matrix[i, j] * losses.kl(heads[i], teachers[j], **how)
    return jnp.stack(list(each.values()))

  def loss_fn(params, model_state, frozen, batch, key):
    images, hparams = look(frozen["view_key"], batch), frozen["hparams"]
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = model.apply(variables, images, train=True, key=key)
    if active is not None:  # the others keep their batch statistics
      state = {**variables["state"], active: state[active]}
    label = batch["label"]
    hard = jax.vmap(lambda z: losses.cross_entropy(z, label))(out.heads)
    one = np.array([active in (None, f"peer_{i}") for i in range(count)])
    terms = {"hard": Term((hard * one[:, None]).sum(0))}
    if row["soft_weight"]:
      begun = batch["step"] >= hparams["burn_in"]
      teachers = asked(frozen, images, out.heads)
      soft = soft_loss(out.heads, teachers, hparams["temperature"])
      weight = jnp.where(begun, hparams["soft_weight"], 0.0)
      terms["soft"] = Term((soft * one[:, None]).sum(0), weight=weight)
    return terms, train.Aux(model_state={"model": state})

  return loss_fn


def network(config, row, steps, num_classes):
  """The cohort with its step; each peer has an optimiser of its own."""
  settings = [config.networks[name] for name in row["peers"]]
  nets = [train.image_model(config, s, num_classes) for s in settings]
  names = [f"peer_{i}" for i in range(len(nets))]
  model = models.cohort(dict(zip(names, nets, strict=True)))
  if row["stacked"]:
    model = models.stacked(nets[0], len(nets))
  extra = {
    "stale": lambda: train.stale(row["exchange_every"]),
    "ema": lambda: train.ema(row["decay"]),
  }.get(row["targets"], lambda: None)()
  s = settings[0]
  inner = train.optimizer(steps, **s.optimizer)

  def moving(active):
    return train.by_peer(
      inner,
      active=active,
      clip_norm=s.clip_norm or None,
      stacked=row["stacked"],
    )

  turns = names if row["updates"] == "in_turn" else [None]
  loss_fns = [make_loss(model, config.view, row, name) for name in turns]
  how = {"heads": len(nets), "extra": extra, "clip_norm": None}
  how["peers"] = row["groups"]
  return train.image_classifier(
    config, s, model, loss_fns, [moving(name) for name in turns], **how
  )


def check_row(config, where, row):
  """Refuses a cohort that could not learn, or not as it is asked to."""
  check_choice(f"{where}.targets", row.targets, TARGETS)
  check_choice(f"{where}.updates", row.updates, UPDATES)
  check_number(f"{where}.burn_in", row.burn_in, least=0)
  count = len(row.peers)
  if count < 1:
    raise ValueError(f"{where}.peers is (); it should name a network each")
  try:
    matrix = who_teaches(row)
    fine = matrix.shape == (count, count) and np.all(matrix >= 0)
    fine = fine and not np.any(np.diag(matrix))
  except ValueError:  # no rectangle, or no numbers
    fine = False
  if not fine:
    raise ValueError(
      f"{where}.teach is {row.teach}; it should be {count} rows of {count} "
      "weights, not negative, with 0 on the diagonal"
    )
  if count == 1 and row.soft_weight and row.targets != "ema":
    raise ValueError(f"{where}.peers is {row.peers}; one has nobody to ask")
  if row.stacked and (len(set(row.peers)) > 1 or row.updates == "in_turn"):
    raise ValueError(
      f"{where}.stacked is True; it should be False, unless all peers are "
      "alike and move together"
    )
  if row.groups > 1 and not (row.stacked and config.parallel == "jit"):
    raise ValueError(
      f"{where}.groups is {row.groups}; it should be 1, unless peers are "
      "stacked and parallel is 'jit'"
    )
  devices = len(train.use_devices(config.devices))
  if row.groups < 1 or count % row.groups or devices % row.groups:
    raise ValueError(
      f"{where}.groups is {row.groups}; it should divide both the number of "
      f"peers, {count}, and of devices, {devices}"
    )
  first = config.networks[row.peers[0]]
  for name in row.peers:
    s = config.networks[name]
    if (s.batch_size, s.optimizer) != (first.batch_size, first.optimizer):
      raise ValueError(
        f"networks.{name}: its batch_size and optimizer should be those of "
        f"{row.peers[0]}, as peers see the same batches"
      )


def load(config):
  """Reads and checks everything before anything is compiled or written."""
  derived = [
    f"{name}/{part}"
    for name in config.rows
    for part in ("ensemble", "average", *config.networks)
  ]
  train.check_comparison(
    config.rows, config.claims, config.seeds, derived=derived
  )
  images = train.load_images(config)
  used = {}
  for name in config.rows:
    check_choice("rows", name, tuple(config.cohorts))
    for i, peer in enumerate(config.cohorts[name].peers):
      used[f"cohorts.{name}.peers[{i}]"] = peer
  train.check_networks(config, used, images)
  for name in config.rows:
    check_row(config, f"cohorts.{name}", config.cohorts[name])
  return images, images.test.evaluated()


def report(board, name, row, seed, mean, heads):
  """Rows for the peers, of each kind, and for their mean prediction."""
  kinds = list(dict.fromkeys(row["peers"]))
  details = {}
  if len(heads) > 1:
    details = {"peer agreement": fidelity.peer_agreement(heads)}
  if len(kinds) == 1:
    title, paper = row["label"], row["paper"]
    board.add(name, heads, seed=seed, title=title, paper=paper, **details)
  for kind in kinds if len(kinds) > 1 else ():
    alike = heads[[i for i, peer in enumerate(row["peers"]) if peer == kind]]
    title = f"{row['label']}: {kind}"
    board.add(f"{name}/{kind}", alike, seed=seed, title=title, **details)
  if len(heads) > 1:
    title = f"{row['label']}: ensemble"
    board.add(f"{name}/ensemble", mean, seed=seed, title=title)


def body(config, images, test, path):
  """Trains each cohort for each seed."""
  part = images.part
  study = train.Study(path, test, len(config.seeds) * len(config.rows), config)
  nets = {}
  for seed in config.seeds:
    for name in config.rows:
      row = config.cohorts[name].to_dict()
      s = config.networks[row["peers"][0]]
      steps = train.steps_of(row["epochs"], s.batch_size, part.n)
      if name not in nets:
        nets[name] = network(config, row, steps, images.num_classes)
      frozen, feed = part.feed(seed, s.batch_size, keys=[train.view_key(seed)])
      fields = ("temperature", "soft_weight", "burn_in")
      frozen["hparams"] = {k: row[k] for k in fields}
      variables, (mean, heads) = study.train(
        nets[name],
        frozen,
        name=name,
        title=row["label"],
        kind=" + ".join(row["peers"]),
        seed=seed,
        settings={"steps": steps, "batch_size": s.batch_size},
        **feed,
      )
      report(study.board, name, row, seed, mean, heads)
      if row["targets"] == "ema":  # the teachers, which are often better
        own = {k: v["model"] for k, v in variables["extra"].items()}
        _, heads = nets[name].predict_heads(own, test["image"])
        title = f"{row['label']}: mean of its weights"
        study.board.add(f"{name}/average", heads, seed=seed, title=title)
  result = study.result(
    config.claims,
    experiment="mutual_learning",
    title=f"Mutual learning on {config.dataset}: {config.study}",
    source="Zhang et al. 2018, arXiv:1706.00384, Sec. 2",
    seeds=list(config.seeds),
    data={"name": config.dataset, "train": part.n, "test": len(test["label"])},
  )
  curves = {}
  for key in ("mean test errors", "peer agreement"):
    first = f"seed{config.seeds[0]}/"
    curves |= study.stages.curves(key, prefix=first)
  return result, {"curves": curves}


def run(config, workdir, **how):
  """Trains every cohort for every seed; returns the result."""
  return train.execute(load, body, config, workdir, **how)


if __name__ == "__main__":
  cli.main(run)
