"""What the student is asked to match: the teacher's logits, made over.

A target is logits: any loss takes it as `teacher_logits`. A function that
works at a temperature T returns z with softmax(z / T) = the distribution that
is wanted, so `losses.kl(student_logits, z, temperature=T)` is right. Logits
mean the same with a constant added, and the targets make use of that: only
`softmax` of them says something. `top_k` and `importance_samples` give log-
probabilities at chosen classes instead, for `losses.topk_kl` and
`losses.sampled_kl`, `confidence_weights` one weight per example, and
`ofd_margin` a margin for `losses.ofd`.

Classes with a logit of -inf do not exist, and stay at -inf. Everything is
computed in float32. Gradients flow into all inputs: wrap the target in
`jax.lax.stop_gradient` to freeze it. Examples that `where` masks are computed
from zeros: what is in them does no harm, and they get no gradient.
"""

from kd_jax.targets.born_again import (
  confidence_weights as confidence_weights,
  permute_nonmax as permute_nonmax,
)
from kd_jax.targets.ensembles import (
  ensemble as ensemble,
  peers as peers,
)
from kd_jax.targets.labels import (
  mix_labels as mix_labels,
  sort_label_first as sort_label_first,
  virtual as virtual,
)
from kd_jax.targets.margins import ofd_margin as ofd_margin
from kd_jax.targets.shifts import (
  alpha_mixture as alpha_mixture,
  calibrated as calibrated,
  delta as delta,
)
from kd_jax.targets.sparse import (
  Samples as Samples,
  TopK as TopK,
  importance_samples as importance_samples,
  top_k as top_k,
)
