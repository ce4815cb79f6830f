import email
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

import kd_jax

ROOT = pathlib.Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def requirement_name(requirement: str) -> str:
  name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
  return re.sub(r"[-_.]+", "-", name).lower()


def locked(path: pathlib.Path) -> dict[str, str]:
  """Returns {name: version} of a lock; a line of another kind is an error."""
  versions = {}
  for line in path.read_text(encoding="utf-8").splitlines():
    if line and not line.startswith("#"):
      assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
      name, version = line.split("==")
      versions[requirement_name(name)] = version
  return versions


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel's member names and its METADATA, built from a copy of the tree.

  The copy has the folders that must stay out, each made a package, which is
  what a careless `find_packages()` would take.
  """
  folder = tmp_path_factory.mktemp("wheel")
  tree = folder / "tree"
  for path in ["setup.py", "pyproject.toml", "LICENSE", "README.md"]:
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    (tree / path).write_bytes((ROOT / path).read_bytes())
  for path in (ROOT / "kd_jax").rglob("*"):
    if path.is_file() and "__pycache__" not in path.parts:
      target = tree / path.relative_to(ROOT)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(path.read_bytes())
  for name in ["experiments", "configs", "tests", "benchmarks"]:
    (tree / name).mkdir()
    (tree / name / "__init__.py").touch()
  subprocess.run(
    [
      *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index"),
      *("--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree),
    ],
    check=True,
  )
  (path,) = folder.glob("*.whl")
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    (metadata,) = [name for name in names if name.endswith("/METADATA")]
    return names, email.message_from_bytes(archive.read(metadata))


def test_wheel_holds_kd_jax_alone_and_all_of_it(wheel):
  names, _ = wheel
  code = {name for name in names if ".dist-info/" not in name}
  expected = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "kd_jax").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  }
  assert "kd_jax/py.typed" in code
  assert code == expected
  assert any(name.endswith("LICENSE") for name in names)


def test_metadata(wheel):
  _, metadata = wheel
  assert metadata["Name"] == "kd_jax"
  assert metadata["Version"] == kd_jax.__version__
  assert metadata["Requires-Python"] == ">=3.11"
  assert metadata["License-Expression"] == "Apache-2.0"
  assert metadata.get_all("Provides-Extra") == ["train", "experiments", "dev"]


def test_base_dependencies_are_jax_and_numpy(wheel):
  _, metadata = wheel
  requirements = metadata.get_all("Requires-Dist")
  base = [line for line in requirements if "extra ==" not in line]
  assert [requirement_name(line) for line in base] == ["jax", "numpy"]


def test_version_is_written_once():
  # Only in the package itself, which setup.py reads.
  assert re.fullmatch(r"\d+\.\d+\.\d+", kd_jax.__version__)
  assert kd_jax.__version__ not in (ROOT / "setup.py").read_text("utf-8")
  with (ROOT / "pyproject.toml").open("rb") as file:
    assert "project" not in tomllib.load(file)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_lock_has_every_requirement_and_neither_cuda_nor_tensorflow(
  path, wheel
):
  _, metadata = wheel
  versions = locked(path)
  needed = {requirement_name(r) for r in metadata.get_all("Requires-Dist")}
  assert needed <= versions.keys()
  assert "setuptools" in versions  # The make targets build without isolation.
  for name in versions:
    assert name != "tensorflow"
    assert not re.match("nvidia|jax-cuda|jax-rocm|torch", name)


def test_the_oldest_versions_are_the_lower_bounds(wheel):
  _, metadata = wheel
  oldest = locked(ROOT / "requirements" / "oldest-py311.txt")
  for requirement in metadata.get_all("Requires-Dist"):
    bound = re.search(r">=\s*([0-9.]+)", requirement).group(1)
    assert oldest[requirement_name(requirement)] == bound, requirement
