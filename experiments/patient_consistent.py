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
import numpy as np
import optax

from kd_jax import cli, data, losses, models, teachers, train
from kd_jax.data import views
from kd_jax.errors import check_number, check_numbers, checking
from kd_jax.reduce import Term

MODES = ("labels", "fixed", "independent", "consistent", "function_matching")


def look(key, rows, epoch, view):
  """The view of each image in an epoch: a function of its id and the key."""
  keys = views.keys(key, rows["id"], epoch)
  images = rows["image"]
  if view["crop"] == "shift":
    images = views.random_crop(keys, images, view["size"], view["padding"])
  images = views.to_float(images)
  if view["crop"] == "inception":
    images = views.random_resized_crop(
      keys, images, view["size"], area=(view["least_area"], 1.0)
    )
  images = views.random_flip(keys, images) if view["flip"] else images
  return 2.0 * images - 1.0


def whole(images):
  """What is evaluated, and seen by a teacher of fixed targets."""
  return 2.0 * views.to_float(images) - 1.0


def student_view(key, batch, view, row):
  """What the student sees; with mixup, mixed with its partner's view."""
  images = look(key, batch, batch["epoch"], view)
  if row["mode"] != "function_matching":
    return images
  keys = views.keys(key, batch["id"], batch["epoch"])
  ratio = views.mix_ratios(
    keys, alpha=row["mixup"], same_ratio=row["same_ratio"]
  )[:, None, None, None]
  other = look(key, batch["partner"], batch["epoch"], view)
  return ratio * images + (1.0 - ratio) * other


def make_loss(model, view, row, teacher=None):
  """The method: what the teacher is asked about the student's view."""

  def loss_fn(params, model_state, frozen, batch, key):
    images = student_view(frozen["view_key"], batch, view, row)
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = model.apply(variables, images, train=True, key=key)
    hparams, terms = frozen["hparams"], {}
    if row["hard_weight"]:
      hard = losses.cross_entropy(out.logits, batch["label"])
      terms["hard"] = Term(hard, weight=hparams["hard_weight"])
    if row["mode"] != "labels":
      if "teacher_logits" in batch:  # of this view, computed beforehand
        picked = (
          batch["epoch"][:, None, None] % batch["teacher_logits"].shape[1]
        )
        targets = jnp.take_along_axis(batch["teacher_logits"], picked, 1)[:, 0]
      else:
        if row["mode"] == "independent":
          own = jax.random.fold_in(frozen["view_key"], 1)
          images = look(own, batch, batch["epoch"], view)
        targets = teacher.apply(frozen["teacher"], images)[0].logits
      soft = losses.kl(
        out.logits,
        jax.lax.stop_gradient(targets),
        temperature=hparams["temperature"],
      )
      terms["soft"] = Term(soft, weight=hparams["soft_weight"])
    return terms, train.Aux(model_state={"model": state})

  return loss_fn


def optimizer(settings, steps):
  """Adam or SGD; the decay is not multiplied by the learning rate."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 1.0, round(settings.warmup * steps), steps
  )
  scale = (
    optax.trace(0.9) if settings.optimizer == "sgd" else optax.scale_by_adam()
  )
  return optax.chain(
    scale,
    optax.scale(settings.learning_rate),
    optax.add_decayed_weights(settings.weight_decay),
    optax.scale_by_learning_rate(schedule),
  )


def network(config, settings, row, num_classes, teacher=None):
  """A network with its training step, in one of the modes."""
  model = models.create(settings.model, num_classes, **settings.fields)
  return train.Classifier(
    model,
    make_loss(model, config.view, row, teacher),
    optimizer(settings, row["steps"]),
    preprocess=whole,
    how=config.parallel,
    devices=train.use_devices(config.devices),
    steps_per_call=config.steps_per_call,
    clip_norm=settings.clip_norm,
  )


def bank(config, name, row, seed, teacher_net, teacher, pool, shape, path):
  """Teacher logits [n, views, classes] for a finite bank of views, on disk."""
  n, key = len(pool["id"]), train.view_key(seed)
  size = min(config.student.batch_size, n)

  @jax.jit
  def look_and_ask(variables, rows, epoch):
    images = student_view(key, {**rows, "epoch": epoch}, config.view, row)
    return teacher_net.model.apply(variables, images)[0].logits

  def compute(view):
    parts = []
    for positions, mask in data.eval_batches(n, size):
      rows = {k: v[positions] for k, v in pool.items()}
      partner = data.partners(seed, view, positions, n)
      rows["partner"] = {k: v[partner] for k, v in pool.items()}
      epoch = np.full(size, view, np.int32)
      parts.append(np.asarray(look_and_ask(teacher, rows, epoch))[mask])
    return np.concatenate(parts)

  manifest = {
    "teacher": teachers.digest(teacher),
    "data": teachers.digest(pool),
    "views of": {k: row[k] for k in ("mode", "mixup", "same_ratio")},
    "view": config.view.to_dict(),
    "seed": seed,
    "batch_size": size,
  }
  logits = teachers.cached(
    path / "banks" / f"{name}-seed{seed}",
    compute,
    views=row["bank"],
    shape=shape,
    manifest=manifest,
  )
  return logits.swapaxes(0, 1)


def load(config):
  """Reads and checks everything before anything is compiled or written."""
  source = data.load(config.dataset, config.train_split, config.data_dir)
  test = data.to_arrays(
    data.load(config.dataset, config.test_split, config.data_dir)
  )
  pool, side = data.to_arrays(source), config.view.size
  train.check_comparison(config.rows, config.claims, config.seeds)
  devices = len(train.use_devices(config.devices))
  check_number("transfer", config.transfer, least=1, most=len(pool["id"]))
  check_number("view.size", side, least=1, most=pool["image"].shape[1])
  if config.view.crop not in ("shift", "inception"):
    raise ValueError(
      f'view.crop is {config.view.crop!r}; it should be "shift" or "inception"'
    )
  transfer = data.transfer_set(
    pool["label"], fraction=config.transfer / len(pool["id"]), seed=0
  )
  settings = {"teacher": config.teacher, "student": config.student}
  for name, s in settings.items():
    train.check_training(name, {**s, "steps": 1}, devices)
    size = len(pool["id"]) if name == "teacher" else len(transfer)
    train.index_batches(0, s.batch_size, size)  # raises if that is too small
    models.create(s.model, source.num_classes, **s.fields)
  check_number("teacher.epochs", config.teacher.epochs, above=0)
  for name in config.rows:
    row, where = config.students[name], f"students.{name}"
    if row.mode not in MODES:
      raise ValueError(
        f"{where}.mode is {row.mode!r}; it should be one of {', '.join(MODES)}"
      )
    positive, weight = {"above": 0}, {"least": 0}
    check_numbers(
      where,
      row,
      epochs=positive,
      temperature=positive,
      mixup=positive,
      soft_weight=weight,
      hard_weight=weight,
      bank=weight,
    )
    if row.bank and row.mode not in ("consistent", "function_matching"):
      raise ValueError(f"{where}.bank needs a mode in which views are shared")
  part = {k: v[transfer] for k, v in pool.items()}
  return source.num_classes, pool, part, test


def body(config, num_classes, pool, part, test, path):
  """The teacher, then each way to teach for each seed."""
  periods = {k: config[k] for k in ("eval_every", "save_every", "log_every")}
  total = 1 + len(config.seeds) * len(config.rows)
  study = train.Study(path, test, total, **periods)

  def steps(settings, epochs, rows):
    return max(1, round(epochs * (len(rows["id"]) // settings.batch_size)))

  plain = {"mode": "labels", "hard_weight": 1.0}
  count = steps(config.teacher, config.teacher.epochs, pool)
  net = network(config, config.teacher, {**plain, "steps": count}, num_classes)
  teacher, taught = study.train(
    net,
    {"data": pool, "hparams": {"hard_weight": 1.0}},
    name="teacher",
    title="teacher",
    kind="teacher",
    seed=config.teacher.seed,
    settings={"steps": count, "batch_size": config.teacher.batch_size},
  )
  before = teachers.digest(teacher)
  study.board.add("teacher", taught, seed=config.teacher.seed)
  fixed = net.predict(teacher, part["image"])[:, None]

  for name in config.rows:
    row = config.students[name].to_dict()
    row["steps"] = steps(config.student, row["epochs"], part)
    student = network(config, config.student, row, num_classes, net.model)
    for seed in config.seeds:
      weights = ("temperature", "soft_weight", "hard_weight")
      frozen = {"data": dict(part), "hparams": {k: row[k] for k in weights}}
      if row["bank"]:
        frozen["data"]["teacher_logits"] = bank(
          config, name, row, seed, net, teacher, part, fixed.shape[::2], path
        )
      elif row["mode"] == "fixed":
        frozen["data"]["teacher_logits"] = fixed
      elif row["mode"] != "labels":
        frozen["teacher"] = teacher
      _, logits = study.train(
        student,
        frozen,
        name=name,
        title=row["label"],
        kind="student",
        seed=seed,
        settings={
          "steps": row["steps"],
          "batch_size": config.student.batch_size,
        },
        views=row["bank"] or None,
        partners=row["mode"] == "function_matching",
      )
      study.board.add(
        name, logits, seed=seed, title=row["label"], teacher_logits=taught
      )
  assert teachers.digest(teacher) == before, "the teacher has changed"
  result = study.result(
    config.claims,
    experiment="patient_consistent",
    title=f"Patient and consistent teaching on {config.dataset}",
    source="Beyer et al. 2022, arXiv:2106.05237, Sec. 3",
    seeds=list(config.seeds),
    data={
      "name": config.dataset,
      "train (teacher)": len(pool["id"]),
      "train (students)": len(part["id"]),
      "test": len(test["id"]),
    },
  )
  curves = study.stages.curves("test errors", prefix=f"seed{config.seeds[0]}/")
  return result, {"curves": curves}


def run(config, workdir):
  """Trains the teacher and the students; returns the result."""
  with checking():
    inputs = load(config)
  return train.record(
    lambda path: body(config, *inputs, path), config.to_dict(), workdir
  )


if __name__ == "__main__":
  cli.main(run)
