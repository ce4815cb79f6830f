"""Who may import whom, read from the source without running it."""

import ast
from collections.abc import Iterator
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIGHT = {"jax", "numpy"}
# Third-party packages that a part of kd_jax may import. A part that is not
# named here follows REST.
ALLOWED = {
  "losses": LIGHT,
  "targets": LIGHT,
  "relate": LIGHT,
  "banks": LIGHT,
  "reduce": LIGHT,
  "features": LIGHT | {"flax"},
  "projectors": LIGHT | {"flax"},
  "teachers": LIGHT | {"flax"},
  "models": LIGHT | {"flax"},
  # What the loop shows and logs with comes on top of optax and orbax.
  "train": LIGHT | {"flax", "optax", "orbax", "tensorboardX", "tqdm"},
  "data": LIGHT,
  "cli": LIGHT | {"absl", "ml_collections"},
}
REST = LIGHT | {"flax", "jaxlib"}
# Parts that may import anything else inside a function, when it is needed.
LATE = {"data", "train", "cli", "results", "report", "export", "models"}
# The light parts may only build on each other.
LIGHT_PARTS = {"losses", "targets", "relate", "banks", "reduce", "errors"}
OURS = {"kd_jax", "experiments", "configs", "tests", "benchmarks"}


class Import(NamedTuple):
  module: str
  line: int
  late: bool  # inside a function


def imports(path: pathlib.Path) -> Iterator[Import]:
  """All imports of a file; those for type checkers alone are left out."""

  def visit(node: ast.AST, late: bool) -> Iterator[Import]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
      return
    late |= isinstance(
      node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    )
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield Import(alias.name, node.lineno, late)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: relative import"
      # `from kd_jax import reduce` imports kd_jax.reduce.
      for alias in node.names:
        yield Import(f"{node.module}.{alias.name}", node.lineno, late)
    for child in ast.iter_child_nodes(node):
      yield from visit(child, late)

  return visit(ast.parse(path.read_text(encoding="utf-8")), False)


def part(path: pathlib.Path) -> str:
  """The part of kd_jax that a file belongs to: "losses", "reduce", ..."""
  parts = path.relative_to(ROOT / "kd_jax").parts
  return parts[0].removesuffix(".py")


def broken_rules(path: pathlib.Path) -> list[str]:
  """Sentences on the imports of a file of kd_jax that break a rule."""
  name = part(path)
  faults = []
  for module, line, late in imports(path):
    package, *rest = module.split(".")
    if package in sys.stdlib_module_names:
      continue
    if package == "kd_jax":
      if name in LIGHT_PARTS and rest and rest[0] not in LIGHT_PARTS:
        faults.append(f"{line}: {name} imports kd_jax.{rest[0]}")
    elif package in OURS:
      faults.append(f"{line}: kd_jax imports {package}")
    elif package not in ALLOWED.get(name, REST) and not (late and name in LATE):
      faults.append(f"{line}: {name} imports {package}")
  return faults


def files(folder: str) -> list[pathlib.Path]:
  return sorted((ROOT / folder).rglob("*.py"))


def shown(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files("kd_jax"), ids=shown)
def test_library(path):
  assert broken_rules(path) == []


@pytest.mark.parametrize("path", files("experiments"), ids=shown)
def test_experiments_do_not_import_each_other(path):
  for module, line, _ in imports(path):
    package = module.split(".")[0]
    assert package not in OURS - {"kd_jax"}, f"line {line}: {module}"


@pytest.mark.parametrize("path", files("configs"), ids=shown)
def test_configs_import_ml_collections_and_each_other_only(path):
  for module, line, _ in imports(path):
    package = module.split(".")[0]
    allowed = package in {"ml_collections", "configs"}
    allowed |= package in sys.stdlib_module_names
    assert allowed, f"line {line}: {module}"


def test_the_rules_find_what_they_forbid(tmp_path, monkeypatch):
  """A check of the checker, on files that break each rule once."""
  monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
  cases = {
    "losses/a.py": ("import flax", ["1: losses imports flax"]),
    "losses/b.py": (
      "from kd_jax import train",
      ["1: losses imports kd_jax.train"],
    ),
    "losses/c.py": (
      "def f():\n  import optax",
      ["2: losses imports optax"],
    ),
    "reduce.py": ("import experiments.a", ["1: kd_jax imports experiments"]),
    "data/a.py": ("import grain", ["1: data imports grain"]),
    "data/b.py": ("def f():\n  from grain import x", []),
    "new.py": ("import optax", ["1: new imports optax"]),
    "train/a.py": ("import math\nimport optax\nfrom kd_jax import losses", []),
  }
  for name, (text, expected) in cases.items():
    path = tmp_path / "kd_jax" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert broken_rules(path) == expected, name


def test_losses_load_jax_and_nothing_else():
  program = """
import sys
import jax, jax.numpy
before = set(sys.modules)
import kd_jax.losses
after = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(after - set(sys.stdlib_module_names)))
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  added, loaded = (set(line.split()) for line in done.stdout.splitlines())
  assert added <= {"kd_jax", "jax"}
  heavy = "flax optax orbax tensorflow_datasets tensorflow absl ml_collections"
  heavy += " grain tensorboardX matplotlib chex"
  assert loaded.isdisjoint(heavy.split())
