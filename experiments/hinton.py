"""Distilling the knowledge in a neural network: soft targets on MNIST.

Hinton, Vinyals & Dean 2015, arXiv:1503.02531, Sec. 3. A teacher MLP with
dropout and jittered images; students without any regularisation learn from
its softened probabilities on plain images. The control is the same student,
for the same steps, on hard labels.

  python -m experiments.hinton --config=configs/hinton/mnist5k.py \
    --workdir=runs/hinton
"""

import functools

import jax
import numpy as np
import optax

from kd_jax import cli, data, losses, models, report, teachers, train
from kd_jax.data import views
from kd_jax.errors import check_choice, check_number
from kd_jax.reduce import Term


def make_loss(model, teacher=None, max_shift=0):
  """The method: soft targets and hard labels on one view of the images."""

  def loss_fn(params, model_state, frozen, batch, key):
    images, hparams = batch["image"], frozen["hparams"]
    if max_shift:
      keys = views.keys(frozen["view_key"], batch["id"], batch["epoch"])
      images = views.random_shift(keys, images, max_shift=max_shift)
    inputs = views.to_float(images)
    variables = {"params": params["model"], "state": model_state["model"]}
    out, state = model.apply(variables, inputs, train=True, key=key)
    hard = losses.cross_entropy(out.logits, batch["label"])
    terms = {"hard": Term(hard, weight=hparams["hard_weight"])}
    targets = batch.get("teacher_logits")  # computed once: images do not move
    if "teacher" in frozen:
      targets = teacher.apply(frozen["teacher"], inputs)[0].logits
    if targets is not None:
      soft = losses.kl(
        out.logits,
        jax.lax.stop_gradient(targets),
        temperature=hparams["temperature"],
      )
      terms["soft"] = Term(soft, weight=hparams["soft_weight"])
    return terms, train.Aux(model_state={"model": state})

  return loss_fn


def network(config, settings, num_classes, teacher=None):
  """An MLP with its training step, shared by all seeds and temperatures."""
  fields = ("hidden", "dropout", "input_dropout")
  mlp = models.MLP(num_classes=num_classes, **{k: settings[k] for k in fields})
  model = models.from_linen(mlp)
  schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
  return train.Classifier(
    model,
    make_loss(model, teacher, settings.max_shift),
    optax.adam(schedule),
    preprocess=views.to_float,
    how=config.parallel,
    devices=train.use_devices(config.devices),
    steps_per_call=config.steps_per_call,
  )


def load(config):
  """Reads and checks everything before anything is compiled or written."""
  train.check_splits(config)
  source = data.load(config.dataset, config.train_split, config.data_dir)
  test = data.load(config.dataset, config.test_split, config.data_dir)
  arrays = data.to_arrays(source)
  n = len(arrays["id"])
  bias = [f"{row}+bias" for row in config.rows]
  train.check_comparison(config.rows, config.claims, config.seeds, derived=bias)
  check_number("holdout", config.holdout, least=0, most=n - 1)
  train.check_seeds("teacher.seeds", config.teacher.seeds)
  train.check_periods(config)
  train.check_settings("", config)
  for name in ("teacher", "student"):
    devices = len(train.use_devices(config.devices))
    train.check_settings(name, config[name], devices=devices)
    side = min(arrays["image"].shape[1:3])
    shift = config[name].max_shift
    check_number(f"{name}.max_shift", shift, least=0, most=side - 1)
  for name in config.rows:
    check_choice("rows", name, tuple(config.students))
    s = config.students[name]
    train.check_student(f"students.{name}", s, taught=True)
    if not all(isinstance(label, int) for label in s.classes):
      raise ValueError(
        f"students.{name}.classes is {s.classes}; it should hold whole numbers"
      )
    if len(set(s.classes)) < len(s.classes):
      raise ValueError(f"students.{name}.classes names one twice")
    for label in s.classes:
      top = source.num_classes - 1
      check_number(f"students.{name}.classes", label, least=0, most=top)
    if s.learn_bias and not config.holdout:
      raise ValueError(f"students.{name}.learn_bias needs holdout above 0")
  pool = {k: v[: n - config.holdout] for k, v in arrays.items()}
  held = {k: v[n - config.holdout :] for k, v in arrays.items()}
  train.index_batches(0, config.teacher.batch_size, len(pool["id"]))
  for name in config.rows:  # raises if too small for a batch
    size = len(choose(pool, config.students[name], config.seeds[0]))
    train.index_batches(0, config.student.batch_size, size)
  teacher_net = network(config, config.teacher, source.num_classes)
  return source.num_classes, teacher_net, pool, held, data.to_arrays(test)


def layers(settings):
  """The hidden layers for people: 800-800."""
  return "-".join(map(str, settings.hidden))


def choose(pool, student, seed):
  """Positions of a student's transfer set in the training data."""
  part = {"classes": student.classes, "fraction": student.fraction}
  return data.transfer_set(pool["label"], seed=seed, **part)


def learn_bias(logits, labels, absent):
  """What to add to the absent classes for the fewest errors (the middle)."""
  grid = np.arange(-20.0, 20.05, 0.1)
  wrong = [np.sum(np.argmax(logits + b * absent, -1) != labels) for b in grid]
  return float(np.median(grid[np.equal(wrong, np.min(wrong))]))


def body(config, num_classes, teacher_net, pool, held, test, path):
  """A stage for every network and seed, then the table and the pictures."""
  teacher_seeds = config.teacher.seeds or config.seeds
  total = len(teacher_seeds) + len(config.seeds) * len(config.rows)
  study = train.Study(path, test, total, config)
  nets, known, examples = {}, {}, []

  for number, seed in enumerate(config.seeds):
    source = teacher_seeds[number % len(teacher_seeds)]
    if source not in known:
      frozen = {"data": pool, "hparams": {"hard_weight": 1.0}}
      label, paper = f"teacher {layers(config.teacher)}", config.teacher.paper
      found = study.train(
        teacher_net,
        frozen,
        name="teacher",
        title=label,
        kind="teacher",
        seed=source,
        settings=config.teacher,
      )
      study.board.add(
        "teacher", found[1], seed=source, title=label, paper=paper
      )
      few = views.to_float(test["image"][:4])
      teachers.check(teacher_net.model, found[0], few, classes=num_classes)
      column = teacher_net.predict(found[0], pool["image"])
      known[source] = (*found, column)
    teacher, taught, column = known[source]
    for name in config.rows:
      s = config.students[name]
      settings = config.student.copy_and_resolve_references()
      settings.hidden = s.hidden
      if s.hidden not in nets:  # one program for all that are of this size
        nets[s.hidden] = network(
          config, settings, num_classes, teacher_net.model
        )
      net, rows = nets[s.hidden], choose(pool, s, seed)
      transfer = {k: v[rows] for k, v in pool.items()}
      weights = ("temperature", "soft_weight", "hard_weight")
      frozen = {"data": transfer, "hparams": {k: s[k] for k in weights}}
      if config.live_teacher:
        frozen["teacher"] = teacher
      else:
        transfer["teacher_logits"] = column[rows]
      student, logits = study.train(
        net,
        frozen,
        name=name,
        title=s.label,
        kind=f"student {layers(settings)}",
        seed=seed,
        settings=settings,
      )
      if not examples:
        examples = report.pick(test, taught, logits, s.temperature)
      absent = ~np.isin(np.arange(num_classes), transfer["label"])
      add = functools.partial(
        study.board.add, seed=seed, teacher_logits=taught, absent=absent
      )
      add(name, logits, title=s.label, paper=s.paper)
      if s.learn_bias:
        guess = net.predict(student, held["image"])
        bias = learn_bias(guess, held["label"], absent)
        mended = logits + np.float32(bias) * absent
        title = f"{s.label}, one bias learned"
        add(f"{name}+bias", mended, title=title, paper=s.paper_bias, bias=bias)

  result = study.result(
    config.claims,
    experiment="hinton",
    title=f"Soft targets on {config.dataset}: {config.study}",
    source="Hinton et al. 2015, arXiv:1503.02531, Sec. 3",
    seeds=list(config.seeds),
    data={
      "name": config.dataset,
      "train": len(pool["id"]),
      "held out": len(held["id"]),
      "test": len(test["id"]),
    },
  )
  curves = study.stages.curves("test errors", prefix=f"seed{config.seeds[0]}/")
  return result, {"curves": curves, "examples": examples}


def run(config, workdir, **how):
  """Trains teachers and students for every seed; returns the result."""
  return train.execute(load, body, config, workdir, **how)


if __name__ == "__main__":
  cli.main(run)
