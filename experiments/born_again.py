"""Born-again networks: generations of equals, each taught by the last.

Furlanello et al. 2018, arXiv:1805.04770, Sec. 3. A network is trained on
labels; one of the same architecture learns from it alone (BAN) or with the
labels as well (BAN+L); the next learns from that one. The ensemble is the mean
prediction of the born-again generations. Two ablations say what the teacher
gives: weights by its confidence (CWTM), and its confidence without its
knowledge of the other classes (DKPP). The control of a generation is its twin:
the same initial weights and batches, but labels alone; that of an ensemble, an
ensemble of twins.

  python -m experiments.born_again --config=configs/born_again/cifar10.py \
    --workdir=runs/born_again
"""

import functools
import os

import jax
from jax.tree_util import Partial
import numpy as np

from kd_jax import cli, losses, sharpness, targets, teachers, train
from kd_jax.data import augment
from kd_jax.errors import check_choice, check_number, naming
from kd_jax.reduce import Term

TARGETS = ("teacher", "permuted")


def make_loss(model, view, row, teacher=None, axis_name=None):
  """The method: student and teacher see the same view."""
  look = train.random_views(view)

  def loss_fn(params, model_state, frozen, batch, key):
    images = look(frozen["view_key"], batch)
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = model.apply(variables, images, train=True, key=key)
    hparams, terms = frozen["hparams"], {}
    if teacher is not None:
      asked = teacher.apply(frozen["teacher"], images)[0].logits
      asked = jax.lax.stop_gradient(asked)
    if row["hard_weight"]:
      hard = losses.cross_entropy(out.logits, batch["label"])
      if row["by_confidence"]:
        hard *= targets.confidence_weights(asked, axis_name=axis_name)
      terms["hard"] = Term(hard, weight=hparams["hard_weight"])
    if row["soft_weight"]:
      if row["target"] == "permuted":
        asked = targets.permute_nonmax(asked, jax.random.fold_in(key, 1))
      temperature = hparams["temperature"]
      soft = losses.kl(out.logits, asked, temperature=temperature)
      terms["soft"] = Term(soft, weight=hparams["soft_weight"])
    return terms, train.Aux(model_state={"model": state})

  return loss_fn


def network(config, row, steps, models):
  """A student with its training step; its teacher is a row, too."""
  model, teacher = models[row["network"]], None
  if row["teacher"]:
    teacher = models[config.students[row["teacher"]].network]
  axis_name = train.AXIS if config.parallel == "pmap" else None
  loss_fn = make_loss(model, config.view, row, teacher, axis_name)
  settings = config.networks[row["network"]]
  return train.image_classifier(
    config, settings, model, loss_fn, steps, teacher=teacher
  )


def load(config):
  """Reads and checks everything before anything is compiled or written."""
  kept = train.check_ensembles(
    config.ensembles, config.rows, tuple(config.students)
  )
  train.check_comparison(
    config.rows, config.claims, config.seeds, derived=tuple(kept)
  )
  images = train.load_images(config)
  check_number("sharpness.images", config.sharpness.images, least=0)
  used = {}
  for number, name in enumerate(config.rows):
    check_choice("rows", name, tuple(config.students))
    row, where = config.students[name], f"students.{name}"
    used[f"{where}.network"] = row.network
    check_choice(f"{where}.target", row.target, TARGETS)
    if (row.by_confidence or row.soft_weight) and not row.teacher:
      raise ValueError(f"{where}.teacher is ''; its loss needs a teacher")
    if row.teacher in config.rows[:number]:
      parent = config.students[row.teacher]
      if (row.network, row.offset) == (parent.network, parent.offset):
        raise ValueError(
          f"{where}.offset is {row.offset}; it should not be that of its "
          f"teacher {row.teacher}, from whose initial weights it would begin"
        )
    train.check_student(
      where, row, taught=bool(row.teacher), before=config.rows[:number]
    )
  train.check_networks(config, used, images)
  test = images.test.evaluated()
  branched = branches(config, images, test["image"][:4])
  return images, test, kept, branched


def branches(config, images, few):
  """The rows that are taken from another run, {(row, seed): variables}."""
  run, rows = config.branch.run, config.branch.rows
  if bool(run) != bool(rows):
    raise ValueError(
      f"branch.run is {run!r} and branch.rows is {rows}; give both or none"
    )
  branched, same = {}, ["dataset", "train_split", "transfer", "view"]
  for name in rows:
    check_choice("branch.rows", name, tuple(config.rows))
    row = config.students[name]
    if row.teacher and row.teacher not in rows:
      raise ValueError(
        f"branch.rows leaves out {row.teacher}, the teacher of {name}"
      )
    same += [f"students.{name}", f"networks.{row.network}"]
  if rows:
    with naming("branch.run"):
      train.check_branch(run, config.to_dict(), same)
  for name in rows:
    settings = config.networks[config.students[name].network]
    for seed in config.seeds:
      stage = os.path.join(run, f"seed{seed}", name)
      with naming("branch.run"):
        found = train.image_teacher(config, settings, images, stage, few)
      branched[name, seed] = found
  return branched


def example_losses(model, state, params, batch):
  """What sharpness is measured of: the loss of each training image."""
  variables = {"params": params, "state": state}
  logits = model.apply(variables, augment.whole(batch["image"]))[0].logits
  return losses.cross_entropy(logits, batch["label"])


def flatness(config, loss_fn, variables, arrays):
  """How flat the minimum is, on some of the training images."""
  s = config.sharpness
  if not s.images:
    return {}
  batch = {name: arrays[name][: s.images] for name in ("image", "label")}
  loss_fn = Partial(loss_fn, variables["state"])
  on, params, key = [batch], variables["params"], jax.random.key(0)
  trace, error = sharpness.hessian_trace(
    loss_fn, params, on, key, num_samples=s.probes
  )
  worst = sharpness.worst_in_ball(
    loss_fn, params, on, key, radius=s.radius, steps=s.steps, relative=True
  )
  return {
    "train NLL": worst.centre,
    f"rise within {s.radius:g} |w|": worst.increase,
    "Hessian trace": trace,
    "its standard error": error,
  }


def body(config, images, test, ensembles, branched, path):
  """Each generation is a stage of its own; a teacher is a row before."""
  num_classes, part = images.num_classes, images.part
  total = len(config.seeds) * len(config.rows) - len(branched)
  study = train.Study(path, test, total, config)
  arrays = part.evaluated() if config.sharpness.images else None
  models = {
    name: train.image_model(config, s, num_classes)
    for name, s in config.networks.items()
  }
  example = {
    name: functools.partial(example_losses, model)
    for name, model in models.items()
  }
  nets = {}
  for seed in config.seeds:
    trained, said, digests = {}, {}, {}
    for name in config.rows:
      row = config.students[name].to_dict()
      s = config.networks[row["network"]]
      steps = train.steps_of(row["epochs"], s.batch_size, part.n)
      if name not in nets:
        nets[name] = network(config, row, steps, models)
      net = nets[name]
      if (name, seed) in branched:
        found = branched[name, seed]
        found = found, study.test(net, found, kind=row["network"])
      else:
        key = train.view_key(seed + row["offset"])
        frozen, feed = part.feed(seed + row["offset"], s.batch_size, keys=[key])
        weights = ("temperature", "soft_weight", "hard_weight")
        frozen["hparams"] = {k: row[k] for k in weights}
        if row["teacher"]:
          frozen["teacher"] = trained[row["teacher"]]
        found = study.train(
          net,
          frozen,
          name=name,
          title=row["label"],
          kind=row["network"],
          seed=seed,
          offset=row["offset"],
          settings={"steps": steps, "batch_size": s.batch_size},
          **feed,
        )
      trained[name], said[name] = found
      digests[name] = teachers.digest(found[0])
      study.board.add(
        name,
        said[name],
        seed=seed,
        title=row["label"],
        paper=row["paper"],
        teacher_logits=said.get(row["teacher"]),
        **study.once(
          f"seed{seed}/{name}/sharpness.json",
          functools.partial(
            flatness, config, example[row["network"]], trained[name], arrays
          ),
        ),
      )
    for name, members in ensembles.items():
      mean = targets.ensemble(np.stack([said[member] for member in members]))
      study.board.add(name, np.asarray(mean), seed=seed)
    for name, before in digests.items():
      assert teachers.digest(trained[name]) == before, f"{name} has changed"
  result = study.result(
    config.claims,
    experiment="born_again",
    title=f"Born-again networks on {config.dataset}: {config.study}",
    source="Furlanello et al. 2018, arXiv:1805.04770, Sec. 3",
    seeds=list(config.seeds),
    data={
      "name": config.dataset,
      "train": part.n,
      "test": len(test["label"]),
    },
  )
  curves = study.stages.curves("test errors", prefix=f"seed{config.seeds[0]}/")
  return result, {"curves": curves}


def run(config, workdir, **how):
  """Trains every generation for every seed; returns the result."""
  return train.execute(load, body, config, workdir, **how)


if __name__ == "__main__":
  cli.main(run)
