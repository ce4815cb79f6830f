"""Checks of an experiment's settings, before anything is compiled."""

from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.comparison import BETTER
from kd_jax.errors import check_choice, check_number
from kd_jax.train.parallel import check_divides
from kd_jax.train.period import Period

PERIODS = ("eval_every", "save_every", "log_every")

# Of a larger seed, jax.random.key sees the lowest 32 bits only.
MOST_SEED = 2**32 - 1

# What the fields of a config mean, and so which values they can have.
_RANGES: dict[str, dict[str, float]] = {
  "steps": {"least": 1, "most": 2**31 - 1},
  "epochs": {"above": 0, "most": 1e8},
  "batch_size": {"least": 1},
  "learning_rate": {"above": 0},
  "weight_decay": {"least": 0},
  "warmup": {"least": 0},
  "clip_norm": {"least": 0},
  "temperature": {"above": 0},
  "soft_weight": {"least": 0},
  "hard_weight": {"least": 0},
  "hint_weight": {"least": 0},
  "ramp": {"least": 0},
  "mixup": {"above": 0},
  "bank": {"least": 0},
  "dropout": {"least": 0, "most": 0.99},
  "input_dropout": {"least": 0, "most": 0.99},
  "fraction": {"above": 0, "most": 1},
  "least_area": {"above": 0, "most": 1},
  "padding": {"least": 0},
  "size": {"least": 0},
  "readers": {"least": 0},
  "seed": {"least": 0, "most": MOST_SEED},
  "offset": {"least": 0, "most": MOST_SEED},
  "max_shift": {"least": 0},
  "decay": {"least": 0, "below": 1},
  "exchange_every": {"least": 1},
  "steps_per_call": {"least": 1},
  "tokens": {"least": 0},
  "probes": {"least": 2},
  "radius": {"above": 0},
  "paper": {"least": 0},
  "paper_bias": {"least": 0},
}


def check_comparison(
  rows: Sequence[str],
  claims: Sequence[Sequence[str]],
  seeds: Sequence[int],
  *,
  derived: Sequence[str] = (),
) -> None:
  """Refuses a comparison that could not be reported.

  Args:
    rows: names of the settings that will be trained.
    claims: (claim, row a, row b, direction), see `Scoreboard.compare`.
    seeds: of the students.
    derived: further rows that the experiment computes.

  Raises:
    ValueError: if there is no row, one comes twice, a claim is none or speaks
      of a row that is not there, or the seeds are not distinct or negative.
  """
  if not rows or len(set(rows)) < len(rows):
    raise ValueError(
      f"rows is {tuple(rows)}; it should name at least one, each once"
    )
  for claim in claims:
    fine = isinstance(claim, Sequence) and not isinstance(claim, str)
    if not fine or len(claim) != 4 or claim[3] not in BETTER:
      raise ValueError(
        f"claims holds {claim!r}; it should be (claim, row, row, "
        f"{' or '.join(map(repr, BETTER))})"
      )
  claimed = {row for claim in claims for row in claim[1:3]}
  missing = claimed - {*rows, *derived}
  if missing:
    raise ValueError(
      f"claims speak of {sorted(missing)}, which rows leaves out; name other "
      'claims, or none with --config.claims="()"'
    )
  if not seeds:
    raise ValueError("seeds is (); it should name at least one")
  check_seeds("seeds", seeds)


def check_seeds(name: str, seeds: Sequence[int]) -> None:
  """Raises ValueError unless seeds are distinct whole numbers in range."""
  if not all(isinstance(seed, int) for seed in seeds):
    raise ValueError(f"{name} is {tuple(seeds)}; it should hold whole numbers")
  distinct = len(set(seeds)) == len(seeds)
  if not distinct or not all(0 <= seed <= MOST_SEED for seed in seeds):
    raise ValueError(
      f"{name} is {tuple(seeds)}; it should hold distinct seeds from 0 to "
      f"{MOST_SEED}"
    )


def check_student(
  where: str, row: Any, *, taught: bool, before: Sequence[str] | None = None
) -> None:
  """Refuses a student that would learn nothing, or from nobody.

  Args:
    where: the name of its group, for the message.
    row: has `hard_weight` and `soft_weight`, and with `before`, `teacher`.
    taught: whether it has a teacher.
    before: the rows that are trained before it, one of which its teacher is.

  Raises:
    ValueError: naming the field.
  """
  if taught and before is not None and row.teacher not in before:
    raise ValueError(
      f"{where}.teacher is {row.teacher!r}; it should be one of the rows "
      "before it, or '' for none"
    )
  if not row.hard_weight and not (taught and row.soft_weight):
    raise ValueError(
      f"{where}.hard_weight is {row.hard_weight}; it should be above 0, as the "
      "student would learn nothing"
    )


def check_ensembles(
  ensembles: Mapping[str, Sequence[str]],
  rows: Sequence[str],
  students: Sequence[str],
) -> dict[str, tuple[str, ...]]:
  """The ensembles whose members are all trained; others are left out.

  Args:
    ensembles: names of their members, by name.
    rows: the students that are trained.
    students: all that there are.

  Returns:
    Those of `ensembles`.

  Raises:
    ValueError: if a member is no student.
  """
  for name, members in ensembles.items():
    for member in members:
      check_choice(f"ensembles.{name}", member, students)
  return {
    name: tuple(members)
    for name, members in ensembles.items()
    if set(members) <= set(rows)
  }


def check_splits(config: Mapping[str, Any]) -> None:
  """Raises ValueError if test errors would be those of training."""
  if config["test_split"] == config["train_split"]:
    raise ValueError(
      f"test_split is {config['test_split']!r}; it should be another one than "
      "train_split"
    )


def check_periods(config: Mapping[str, Any]) -> None:
  """Raises ValueError unless `eval_every`, ... of a config are periods."""
  for name in PERIODS:
    Period(name, config[name], steps_per_epoch=1)


def check_settings(
  where: str, settings: Mapping[str, Any], *, devices: int = 1
) -> None:
  """Checks the fields of a config group that are known by their names.

  `learning_rate`, `temperature`, `batch_size`, `dropout` and the like mean the
  same everywhere, so their ranges stand in one place.

  Args:
    where: the group's name, for the message.
    settings: the group, with its subgroups; fields of other names are the
      caller's.
    devices: how many share a batch.

  Raises:
    ValueError: if a value is out of range, or the batch does not divide.

  Example:
    >>> check_settings("student", {"temperature": 4.0, "hidden": (8, 8)})
  """
  for field, value in settings.items():
    name = f"{where}.{field}" if where else field
    if hasattr(value, "items"):
      check_settings(name, value)
    elif field in _RANGES:
      check_number(name, value, **_RANGES[field])
    elif field == "hidden":
      if not all(isinstance(n, int) and n > 0 for n in value):
        raise ValueError(f"{name} is {value}; it should hold positive integers")
    elif field == "parallel":
      check_choice(name, value, ("jit", "pmap"))
  if "batch_size" in settings:
    check_divides(settings["batch_size"], devices)
