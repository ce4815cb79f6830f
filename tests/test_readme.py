"""What the README says is true."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax import catalogue, losses, models, train
from kd_jax.reduce import Term

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


def test_the_composition_example_runs():
  scope = {}
  exec(compile(blocks("python")[1], "README.md", "exec"), scope)
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32)
  # Rotations and scales keep the neighbours; other features have others.
  turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
  moved = 2.0 * z[0] @ jnp.asarray(turn, jnp.float32)
  np.testing.assert_allclose(scope["neighbour_loss"](moved, z[0]), 0, atol=1e-5)
  assert scope["neighbour_loss"](z[1], z[0]).min() > 1e-3
  wide = rng.normal(size=(2, 64, 512)).astype(np.float32)
  assert scope["neighbour_loss"](*wide).min() > 1e-3
  # The mean of equal members is the member.
  same = jnp.stack([z[0], z[0]])
  np.testing.assert_allclose(
    scope["ensemble_loss"](z[1], same),
    losses.kl(z[1], z[0], temperature=4.0),
    rtol=1e-4,
  )


def test_the_sweep_example_runs():
  model = models.from_linen(models.MLP(hidden=(4,), num_classes=3))
  images = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)

  def loss_fn(params, model_state, frozen, batch, key):
    variables = {"params": params["model"], "state": {}}
    soft = losses.kl(
      model.apply(variables, batch["image"])[0].logits,
      batch["teacher_logits"],
      temperature=frozen["hparams"]["temperature"],
    )
    return {"soft": Term(soft)}, train.Aux(model_state)

  scope = {
    **{"jax": jax, "optax": optax, "train": train, "loss_fn": loss_fn},
    **{"model": model, "teacher": model, "example": images[:1], "steps": 2},
    "teacher_variables": model.init(jax.random.key(9), images[:1]),
    "batches": lambda step: {"image": images},
  }
  exec(compile(blocks("python")[3], "README.md", "exec"), scope)
  assert scope["states"].key.shape == (8,) and scope["best"].step == 2
  kernel = scope["best"].params["model"]["Dense_0"]["kernel"]
  assert kernel.shape == (5, 4)


def test_the_catalogue_lists_every_loss():
  """With its equation and paper, and just as the docstrings have them."""
  assert catalogue.insert(TEXT) == TEXT, "run `make catalogue`"
  rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, re.MULTILINE))
  public = {
    name
    for name, value in vars(losses).items()
    if not name.startswith("_") and isinstance(value, types.FunctionType)
  }
  assert public <= rows.keys()
  for name in public:
    assert "`loss = " in rows[name], name
    assert re.search(r"https://arxiv.org/abs/\d{4}\.\d{4,5}", rows[name]), name


def test_the_catalogue_command(tmp_path, capsys):
  file = tmp_path / "README.md"
  file.write_text(f"above\n{catalogue.BEGIN}\nold\n{catalogue.END}\nbelow\n")
  assert catalogue.main(["--check", str(file)]) == 1
  assert catalogue.main(["--write", str(file)]) == 0
  assert catalogue.main(["--check", str(file)]) == 0
  text = file.read_text()
  assert text.startswith("above\n") and text.endswith("below\n")
  assert "| `kl` | Softened KL" in text and "old" not in text
  file.write_text("no marks")
  assert catalogue.main(["--write", str(file)]) == 2
  assert "marks" in capsys.readouterr().err
  assert file.read_text() == "no marks"


def test_files_and_targets_that_are_named_exist():
  for name in re.findall(r"configs/[\w/]+\.py|experiments/\w+\.py", TEXT):
    assert (ROOT / name).is_file(), name
  for link in re.findall(r"\]\(([^):]+)\)", TEXT):
    if link.startswith("#"):
      assert f"\n## {link[1:].capitalize()}\n" in TEXT, link
    else:
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
