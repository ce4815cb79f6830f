"""The optimiser of Beyer et al.: clipped, decoupled, warmed up, cosine."""

from typing import Any

import jax
import optax

from kd_jax.errors import check_choice, check_number

OPTIMIZERS = ("adam", "sgd")


def decoupled(
  steps: int,
  *,
  name: str = "adam",
  learning_rate: float,
  weight_decay: float = 0.0,
  warmup: float = 0.0,
  momentum_dtype: str = "float32",
) -> optax.GradientTransformation:
  """Adam or SGD whose weight decay has no factor of the learning rate.

    update = -schedule(step) (learning_rate direction + weight_decay kernel)

  The schedule rises linearly from 0 to 1 and falls to 0 as a cosine. Only
  parameters that are called `kernel` decay.

  Args:
    steps: of the whole training.
    name: "adam", or "sgd" with momentum 0.9.
    learning_rate: the peak.
    weight_decay: the peak share of a kernel that one step takes away.
    warmup: steps, or if below 1 the share of the steps.
    momentum_dtype: of the first moment, "float32" or "bfloat16".

  Returns:
    The transformation.

  Raises:
    ValueError: if an argument is out of range.

  Reference: Beyer et al. 2022, arXiv:2106.05237, App. A (the settings);
  Loshchilov & Hutter 2019, arXiv:1711.05101 (decoupling).
  """
  check_choice("optimizer", name, OPTIMIZERS)
  check_choice("momentum_dtype", momentum_dtype, ("float32", "bfloat16"))
  check_number("steps", steps, least=1)
  check_number("learning_rate", learning_rate, above=0)
  check_number("weight_decay", weight_decay, least=0)
  check_number("warmup", warmup, least=0)
  rising = round(warmup if warmup >= 1 else warmup * steps)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 1.0, min(rising, steps - 1), steps
  )
  direction = {
    "adam": lambda: optax.scale_by_adam(mu_dtype=momentum_dtype),
    "sgd": lambda: optax.trace(0.9, accumulator_dtype=momentum_dtype),
  }

  def kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )

  return optax.chain(
    direction[name](),
    optax.scale(learning_rate),
    optax.add_decayed_weights(weight_decay, kernels),
    optax.scale_by_learning_rate(schedule),
  )
