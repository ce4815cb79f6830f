"""What the README says is true."""

import pathlib
import re
import types

import jax.numpy as jnp
import numpy as np

from kd_jax import losses

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_loss_example_runs():
  code = blocks("python")[0]
  assert len(code.splitlines()) <= 11
  scope = {"my_model": lambda params, images: images @ params}
  exec(compile(code, "README.md", "exec"), scope)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(6, 4)).astype(np.float32)
  valid = jnp.arange(6) < 4
  arguments = (
    jnp.ones((4, 3)),
    jnp.asarray(images),
    jnp.array([0, 1, 2, 0, -1, -1]),
    jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
    valid,
  )
  loss = scope["loss_fn"](*arguments)
  short = scope["loss_fn"](arguments[0], *(x[:4] for x in arguments[1:]))
  np.testing.assert_allclose(loss, short, rtol=1e-6)


def test_every_loss_is_in_the_table():
  listed = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
  public = {
    name
    for name, value in vars(losses).items()
    if not name.startswith("_") and isinstance(value, types.FunctionType)
  }
  assert listed == public


def test_files_and_targets_that_are_named_exist():
  for name in re.findall(r"configs/[\w/]+\.py|experiments/\w+\.py", TEXT):
    assert (ROOT / name).is_file(), name
  for link in re.findall(r"\]\(([^):]+)\)", TEXT):
    assert (ROOT / link).exists(), link
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  for target in re.findall(r"make (demo|test|help)\b", TEXT):
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
  for experiment in re.findall(r"-m experiments\.(\w+)", TEXT):
    assert (ROOT / "experiments" / f"{experiment}.py").is_file()


def test_results_are_what_the_result_files_give(capsys):
  from kd_jax import results

  files = sorted(map(str, (ROOT / "results").glob("*/*.json")))
  assert files
  assert results.main([*files, "--check", str(ROOT / "RESULTS.md")]) == 0
