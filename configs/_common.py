"""What the configs of experiments on images share."""

from ml_collections import ConfigDict

# Without a choice of the dtype in which they compute.
FLOAT32_ONLY = ("mlp", "cnn", "branched", "multi_exit")


def parse(arg, known, default):
  """The words of an argument "a+b", each one of those that are known."""
  words = (arg or default).split("+")
  for word in words:
    if word not in known:
      raise ValueError(
        f"unknown argument {word!r}; it should be one of {', '.join(known)}"
      )
  return words


def fill(fields, changes):
  """`fields` with some of them changed; a misspelt one is an error."""
  unknown = set(changes) - set(fields)
  assert not unknown, unknown
  return ConfigDict(fields | changes)


def network(model, batch_size, learning_rate, *, fields=(), **more):
  """How a network looks and is trained.

  Args:
    model: a name of `kd_jax.models.create`.
    batch_size: examples a step.
    learning_rate: the peak.
    fields: of the model.
    **more: `clip_norm`, settings of the optimiser, or further fields.

  Returns:
    A group of a config.
  """
  fields = dict(fields)
  if model not in FLOAT32_ONLY:
    fields["dtype"] = "float32"  # or "bfloat16", inside of the network
  name = more.pop("name", "adam")
  optimizer = {"name": name, "learning_rate": learning_rate}
  if name == "nesterov":  # see kd_jax.train.staircase
    settings = {"momentum": 0.9, "drops": (0.3, 0.6, 0.8), "factor": 0.2}
  else:  # see kd_jax.train.decoupled
    # Warm-up in steps; below 1, a share of them.
    settings = {"warmup": 0.05, "momentum_dtype": "float32"}
  settings["weight_decay"] = 0.0
  for field, value in settings.items():
    optimizer[field] = more.pop(field, value)
  return ConfigDict(
    {
      "model": model,
      "fields": fields,
      "size": more.pop("size", 0),  # of its images, if not that of the views
      "batch_size": batch_size,
      "clip_norm": 1.0,  # 0 does not clip
      "optimizer": optimizer,
      **more,
    }
  )


def base(dataset, train_split="train", test_split="test", **view):
  """A config without networks and rows.

  Args:
    dataset: its name.
    train_split: of the training images.
    test_split: of those that are evaluated.
    **view: changes of the random views.

  Returns:
    The config.
  """
  c = ConfigDict()
  c.study = ""
  c.dataset = dataset
  c.train_split = train_split
  c.test_split = test_split
  c.compilation_cache = "~/.cache/kd_jax/programs"  # "" keeps none
  c.data_dir = ""
  c.transfer = 0  # training images that the students get; 0 is all
  c.seeds = (0,)
  c.parallel = "jit"  # or "pmap"
  c.devices = 0  # how many to use; 0 is all
  c.steps_per_call = 1
  c.readers = 4  # threads that read images on the host
  c.eval_every = "5 epochs"  # or steps, or minutes
  c.save_every = "10 minutes"
  c.log_every = "50 steps"
  c.view = fill(
    {
      "crop": "shift",  # a window of the padded image; or "inception"
      "size": 32,
      "padding": 4,  # of "shift"
      "least_area": 0.25,  # of "inception", a rectangle that is resized
      "flip": True,
      "on_host": False,  # where images come in many sizes
    },
    view,
  )
  c.evaluation = ()  # (shorter side, central crop); () is the whole image
  c.networks = ConfigDict()
  c.rows = ()
  c.claims = ()
  return c


def tiny(c, rows):
  """Two steps of tiny MLPs for these rows, on digits without a download."""
  c.dataset, c.view.size, c.transfer, c.seeds = "mnist5k", 28, 32, (0,)
  for settings in c.networks.values():
    settings.model, settings.fields = "mlp", ConfigDict({"hidden": (8,)})
    settings.batch_size, settings.size = 16, 8
  kept = tuple(row for row in c.rows if row in rows)
  c.rows = kept or c.rows[:1]
  c.claims = ()
