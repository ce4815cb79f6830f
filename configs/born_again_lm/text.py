"""Born-again language models on any text, at the scale of a CPU core.

Without a file the text is Python's own help, which needs no download; any UTF-8
text is a better one: `--config.text=FILE --config.study=NAME`, within
`--config.data_dir`. Arguments, as
`--config=configs/born_again_lm/text.py:ARG`:
  generations  a character model, two generations with and without the text's
               own next character (the default)
  gpt          with it or alone: transformers in place of LSTMs
  smoke        two steps of a tiny network
"""

from ml_collections import ConfigDict

from configs._common import fill, network, parse


def student(label, epochs, teacher="", **more):
  """A row of the table: who teaches a network, and what it is told."""
  fields = {
    "label": label,
    "teacher": teacher,  # the name of a row before; '' is the text alone
    "epochs": float(epochs),
    "temperature": 1.0,
    "soft_weight": 1.0 if teacher else 0.0,  # of T^2 KL(teacher, student)
    "hard_weight": 1.0,  # of the next token in the text
    "paper": 0.0,  # the paper's perplexity
  }
  return fill(fields, more)


def base(text, unit, window):
  """A config without networks and rows."""
  c = ConfigDict()
  c.study = text
  c.compilation_cache = "~/.cache/kd_jax/programs"  # "" keeps none
  c.data_dir = ""  # where the files are
  c.text = text  # a UTF-8 file, perhaps .gz, or "pydoc"
  c.test_text = ""  # a file; '' is the last tenth of `text`
  c.unit = unit  # or "word"
  c.most = 10_000  # the size of the vocabulary is at most this
  c.tokens = 0  # of the training text; 0 is all
  c.window = window
  c.seeds = (0, 1, 2)
  c.parallel = "jit"  # or "pmap"
  c.devices = 0  # how many to use; 0 is all
  c.steps_per_call = 1
  c.eval_every = "2 epochs"  # or steps, or minutes
  c.save_every = "10 minutes"
  c.log_every = "50 steps"
  c.rows = ()
  c.claims = ()
  c.students = ConfigDict()
  c.ensembles = ConfigDict()
  return c


def generations(c, epochs, count=2):
  """Generations with and without the text, and the ensemble of the first."""
  rows, first = {"generation_0": student("the text alone", epochs)}, {}
  for suffix, title, hard in (("_labels", " + text", 1.0), ("", "", 0.0)):
    first[suffix] = "generation_0"
    for k in range(1, count + 1):
      name = f"generation_{k}{suffix}"
      rows[name] = student(
        f"generation {k}{title}", epochs, first[suffix], hard_weight=hard
      )
      first[suffix] = name
  c.students.update(ConfigDict(rows))
  c.rows = tuple(rows)
  members = tuple(f"generation_{k}_labels" for k in range(1, count + 1))
  c.ensembles[f"ensemble of generations 1-{count} + text"] = members
  c.claims = (
    (
      "with the text, generation 1 has a lower perplexity than the text alone",
      "generation_1_labels",
      "generation_0",
      "lower",
    ),
    (
      "the teacher alone gives a lower perplexity than the text alone",
      "generation_1",
      "generation_0",
      "lower",
    ),
  )


def get_config(arg=""):
  """The settings; see the top of the file."""
  words = parse(arg, ("generations", "gpt", "smoke"), "generations")
  c = base("pydoc", "character", 64)
  c.tokens = 300_000
  c.network = network(
    "lstm",
    32,
    3e-3,
    fields={"width": 128, "depth": 1, "dropout": 0.2, "init_scale": 0.08},
  )
  if "gpt" in words:
    fields = {"width": 128, "depth": 4, "heads": 4, "dropout": 0.1}
    c.network = network(
      "gpt", 32, 1e-3, fields={**fields, "max_length": c.window}
    )
  generations(c, epochs=8.0)
  if "smoke" in words:
    smoke(c)
  return c


def smoke(c):
  """Two steps of a tiny network."""
  c.text, c.test_text, c.unit, c.seeds = "pydoc", "", "character", (0,)
  c.tokens, c.window = 600, 16
  c.network.batch_size = 16
  c.network.fields.width, c.network.fields.depth = 8, 1
  for row in c.students.values():
    row.epochs = 1.0
  kept = ("generation_0", "generation_1_labels", "generation_2_labels")
  c.rows = tuple(name for name in c.rows if name in kept)
  c.claims = ()
