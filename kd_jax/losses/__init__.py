"""Distillation losses: pure functions that need jax and nothing else.

Every loss takes student, teacher, then labels by position and the rest by
keyword, computes in float32, and returns one float32 value per example; the
plain mean is the loss of the paper. Nothing inside stops a gradient: wrap the
teacher in `jax.lax.stop_gradient` to freeze it.
"""

from kd_jax.losses.divergences import (
  jsd as jsd,
  kl as kl,
  reverse_kl as reverse_kl,
)
from kd_jax.losses.logits import (
  cross_entropy as cross_entropy,
  logit_mse as logit_mse,
)
