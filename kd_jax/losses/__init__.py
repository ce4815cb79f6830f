"""Distillation losses: pure functions that need jax and nothing else.

Every loss takes student, teacher, then labels by position and the rest by
keyword, computes in float32, and returns one float32 value per example; the
plain mean is the loss of the paper. `linear_divergence_sum` alone returns a
sum over the examples. Nothing inside stops a gradient: wrap the teacher in
`jax.lax.stop_gradient` to freeze it.
"""

from kd_jax.losses.activations import (
  activation_boundary as activation_boundary,
  ofd as ofd,
)
from kd_jax.losses.contrastive import (
  crd as crd,
)
from kd_jax.losses.decoupled import (
  dkd as dkd,
  nkd as nkd,
)
from kd_jax.losses.distributions import (
  gaussian_wasserstein as gaussian_wasserstein,
  mmd as mmd,
  procrustes as procrustes,
)
from kd_jax.losses.divergences import (
  jsd as jsd,
  kl as kl,
  reverse_kl as reverse_kl,
  total_variation as total_variation,
)
from kd_jax.losses.feature_maps import (
  attention_transfer as attention_transfer,
  cwd as cwd,
  fsp as fsp,
  hierarchical_context as hierarchical_context,
  nst as nst,
)
from kd_jax.losses.features import (
  cosine_distance as cosine_distance,
  factor_transfer as factor_transfer,
  hint as hint,
  patient_hidden as patient_hidden,
  vid as vid,
)
from kd_jax.losses.linear_heads import (
  linear_divergence as linear_divergence,
  linear_divergence_sum as linear_divergence_sum,
)
from kd_jax.losses.logits import (
  cross_entropy as cross_entropy,
  logit_mse as logit_mse,
  virtual_teacher as virtual_teacher,
)
from kd_jax.losses.mixtures import (
  adaptive_kl as adaptive_kl,
  alpha_mixture_kl as alpha_mixture_kl,
  skew_kl as skew_kl,
  skew_reverse_kl as skew_reverse_kl,
)
from kd_jax.losses.peers import (
  early_exit_kl as early_exit_kl,
  mutual_kl as mutual_kl,
)
from kd_jax.losses.ranking import (
  plackett_luce as plackett_luce,
  sorted_kl as sorted_kl,
)
from kd_jax.losses.relations import (
  rkd_angle as rkd_angle,
  rkd_distance as rkd_distance,
)
from kd_jax.losses.scale_free import (
  dist as dist,
  standardized_kl as standardized_kl,
)
from kd_jax.losses.scores import (
  concrete_score as concrete_score,
  cosine_logits as cosine_logits,
)
from kd_jax.losses.sequences import (
  sampled_kl as sampled_kl,
  topk_kl as topk_kl,
)
from kd_jax.losses.similarities import (
  correlation_congruence as correlation_congruence,
  pkt as pkt,
  similarity_preserving as similarity_preserving,
)
from kd_jax.losses.transformers import (
  attention_kl as attention_kl,
  attention_mse as attention_mse,
  hidden_mse as hidden_mse,
  relation_kl as relation_kl,
  value_relation as value_relation,
)
