"""Knowledge distillation in JAX.

Importing the package loads nothing: import the part that is needed, for
example `from kd_jax import losses`.
"""

__version__ = "0.1.0"
