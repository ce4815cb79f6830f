"""Knowledge distillation: a good teacher is patient and consistent.

Beyer et al. 2022, arXiv:2106.05237, Sec. 3. The student matches the teacher's
function: both see the same view (random crop, flip, mixup), no label is used,
and it goes on for very long. Beside it, the other ways to teach: targets that
were computed once, independent views, the same crop without mixup. The
controls are the same student on labels alone, and with fixed targets and a
little of the labels.

  python -m experiments.patient_consistent \
    --config=configs/patient_consistent/cifar10.py --workdir=runs/patient
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np

from kd_jax import cli, evaluate, losses, models, targets, teachers, train
from kd_jax.data import augment, views
from kd_jax.errors import check_choice, naming
from kd_jax.reduce import Term

MODES = ("labels", "fixed", "independent", "consistent", "function_matching")


def student_view(key, batch, view, row):
  """What the student sees; with mixup, mixed with its partner's view."""
  look = train.random_views(view)
  images = look(key, batch)
  if row["mode"] != "function_matching":
    return images
  keys = views.keys(key, batch["id"], batch["epoch"])
  how = {"alpha": row["mixup"], "same_ratio": row["same_ratio"]}
  if "partner" not in batch:  # read on the host: the neighbour in the batch
    return views.mixup(keys, images, **how)[0]
  ratio = views.mix_ratios(keys, **how)[:, None, None, None]
  other = look(key, {**batch["partner"], "epoch": batch["epoch"]})
  return ratio * images + (1.0 - ratio) * other


def keys_of(key, mode):
  """Keys of the views: the student's, and the teacher's if it has its own."""
  return [key, jax.random.fold_in(key, 1)] if mode == "independent" else [key]


def make_loss(model, view, row, teacher=None):
  """The method: what the teacher is asked about the student's view."""

  def targets(frozen, batch, images):
    if "teacher_logits" in batch:  # of this view, computed beforehand
      count = batch["teacher_logits"].shape[1]
      picked = (batch["epoch"] % count)[:, None, None]
      return jnp.take_along_axis(batch["teacher_logits"], picked, 1)[:, 0]
    if row["mode"] == "independent":
      own = keys_of(frozen["view_key"], row["mode"])[1]
      image = "other_image" if view["on_host"] else "image"
      images = train.random_views(view)(own, batch, image)
    return teacher.apply(frozen["teacher"], images)[0].logits

  def loss_fn(params, model_state, frozen, batch, key):
    images = student_view(frozen["view_key"], batch, view, row)
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = model.apply(variables, images, train=True, key=key)
    hparams, terms = frozen["hparams"], {}
    if row["hard_weight"]:
      hard = losses.cross_entropy(out.logits, batch["label"])
      terms["hard"] = Term(hard, weight=hparams["hard_weight"])
    if row["mode"] != "labels":
      asked = jax.lax.stop_gradient(targets(frozen, batch, images))
      temperature = hparams["temperature"]
      soft = losses.kl(out.logits, asked, temperature=temperature)
      terms["soft"] = Term(soft, weight=hparams["soft_weight"])
    return terms, train.Aux(model_state={"model": state})

  return loss_fn


def ask(teacher, variables, images):
  """The teacher's logits for stored images, as they are evaluated."""
  fn = Partial(
    lambda v, x: teacher.apply(v, augment.whole(x))[0].logits, variables
  )
  return evaluate.predict(fn, images, batch_size=min(500, len(images)))


def network(config, settings, row, steps, num_classes, teacher=None):
  """A network with its training step, in one of the modes."""
  model = train.image_model(config, settings, num_classes)
  loss_fn = make_loss(model, config.view, row, teacher)
  return train.image_classifier(
    config, settings, model, loss_fn, steps, teacher=teacher
  )


def load(config):
  """Reads and checks everything before anything is compiled or written."""
  train.check_comparison(config.rows, config.claims, config.seeds)
  images = train.load_images(config)
  classes, view = images.num_classes, config.view
  test, checkpoints = images.test.evaluated(), {}
  few = test["image"][:4]
  for name, s in config.teachers.items():
    where = f"teachers.{name}"
    if not s.checkpoint:
      train.check_network(config, where, s, images.pool, classes)
      continue
    with naming(f"{where}.checkpoint"):
      found = train.image_teacher(config, s, images, s.checkpoint, few)
      checkpoints[name] = found
  used = {}
  for name in config.rows:
    check_choice("rows", name, tuple(config.students))
    row, where = config.students[name], f"students.{name}"
    check_choice(f"{where}.mode", row.mode, MODES)
    train.check_student(where, row, taught=row.mode != "labels")
    used[f"{where}.network"] = row.network
    if row.bank and (view.on_host or row.mode not in MODES[3:]):
      raise ValueError(
        f"{where}.bank is {row.bank}; it should be 0, but for the modes "
        f"{' and '.join(MODES[3:])} with images on the device"
      )
  train.check_networks(config, used, images)
  return images, test, checkpoints


def knowledge(config, row, images, seed, name, teacher, variables, path):
  """What the student gets of the teacher: (columns of the data, `frozen`)."""
  if row["mode"] == "fixed":
    shown = images.evaluated()["image"]
    teachers.check(teacher, variables, augment.whole(shown[:4]))
    logits = ask(teacher, variables, shown)
    return {"teacher_logits": logits[:, None]}, {}
  if not row["bank"]:
    live = row["mode"] != "labels"
    return {}, {"teacher": variables} if live else {}
  key = train.view_key(seed)
  few = images.evaluated()["image"][:4]
  teachers.check(teacher, variables, augment.whole(few))

  def answer(variables, rows):
    view = student_view(key, rows, config.view, row)
    return teacher.apply(variables, view)[0].logits

  logits = images.bank(
    path / "banks" / f"{name}-seed{seed}",
    answer,
    variables,
    views=row["bank"],
    batch_size=config.networks[row["network"]].batch_size,
    keys=[key],
    partners=seed if row["mode"] == "function_matching" else None,
    manifest={
      **{name: row[name] for name in ("mode", "mixup", "same_ratio")},
      "view": config.view.to_dict(),
    },
  )
  return {"teacher_logits": logits}, {}


def body(config, images, test, checkpoints, path):
  """The teachers, then each way to teach for each seed."""
  num_classes, pool, part = images.num_classes, images.pool, images.part
  total = len(config.seeds) * len(config.rows)
  total += len(config.teachers) - len(checkpoints)
  study = train.Study(path, test, total, config)

  def fit(net, s, row, images, seed, name, kind, columns, frozen):
    entries, more = images.feed(
      seed,
      s.batch_size,
      keys=keys_of(train.view_key(seed), row["mode"]),
      views=row["bank"],
      partners=row["mode"] == "function_matching",
      columns=columns,
    )
    weights = ("temperature", "soft_weight", "hard_weight")
    entries["hparams"] = {k: row[k] for k in weights}
    steps = train.steps_of(row["epochs"], s.batch_size, images.n)
    return study.train(
      net,
      {**frozen, **entries},
      name=name,
      title=row["label"],
      kind=kind,
      seed=seed,
      settings={"steps": steps, "batch_size": s.batch_size},
      **more,
    )

  alone = {"mode": "labels", "bank": 0}
  alone |= {"temperature": 1.0, "soft_weight": 0.0, "hard_weight": 1.0}
  members, variables, said = {}, {}, []
  for name, s in config.teachers.items():
    row = {**alone, "label": name, "epochs": s.epochs}
    steps = train.steps_of(s.epochs, s.batch_size, pool.n)
    net = network(config, s, row, steps, num_classes)
    if name in checkpoints:
      found = checkpoints[name], study.test(net, checkpoints[name], kind=name)
    else:
      found = fit(net, s, row, pool, s.seed, name, name, {}, {})
    members[name], variables[name] = net.model, found[0]
    said.append(found[1])
    study.board.add(name, found[1], seed=s.seed)
  before = teachers.digest(variables)
  said = np.asarray(targets.ensemble(np.stack(said)))
  if len(members) > 1:
    study.board.add("ensemble", said, seed=0, title="all teachers")

  for name in config.rows:
    row = config.students[name].to_dict()
    way = row["label"]
    row["label"] += f", {row['epochs']:,g} epoch{'s'[: row['epochs'] != 1]}"
    s, kind = config.networks[row["network"]], row["network"]
    teacher = models.ensemble(members, temperature=row["temperature"])
    steps = train.steps_of(row["epochs"], s.batch_size, part.n)
    net = network(config, s, row, steps, num_classes, teacher)
    for seed in config.seeds:
      known = knowledge(config, row, part, seed, name, teacher, variables, path)
      _, logits = fit(net, s, row, part, seed, name, kind, *known)
      study.board.add(
        name,
        logits,
        seed=seed,
        title=row["label"],
        curve=(way, row["epochs"]),
        teacher_logits=said,
      )
  assert teachers.digest(variables) == before, "a teacher has changed"
  result = study.result(
    config.claims,
    experiment="patient_consistent",
    title=f"Patient and consistent teaching on {config.dataset}: "
    f"{config.study}",
    source="Beyer et al. 2022, arXiv:2106.05237, Sec. 3",
    seeds=list(config.seeds),
    curve_over="epochs",
    data={
      "name": config.dataset,
      "train (teachers)": pool.n,
      "train (students)": part.n,
      "test": len(test["label"]),
    },
  )
  longest = max(config.students[name].epochs for name in config.rows)
  shown = tuple(
    f"seed{config.seeds[0]}/{name}"
    for name in config.rows
    if config.students[name].epochs == longest
  )
  curves = {
    f"{key} on the way, {longest:,g} epochs": panel
    for key, panel in study.stages.curves("test errors", prefix=shown).items()
  }
  return result, {"curves": curves}


def run(config, workdir, **how):
  """Trains the teachers and the students; returns the result."""
  return train.execute(load, body, config, workdir, **how)


if __name__ == "__main__":
  cli.main(run)
