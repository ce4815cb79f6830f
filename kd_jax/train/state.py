"""The training state: one frozen pytree that can be printed and saved."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


class TrainState(flax.struct.PyTreeNode):
  """All that a run needs in order to go on, and nothing else.

  Attributes:
    step: int32 scalar, how many updates were made.
    params: trainable parameters in a dict by role (`student`, `projector`,
      `peer_0`).
    opt_state: the optimiser's state.
    model_state: what models carry without a gradient (batch statistics), in a
      dict by role.
    key: typed random key of the run; the key of a step is
      `fold_in(key, step)`, so nothing about randomness needs to be saved.
    skipped: int32 scalar, how many steps were not finite. Past the allowed
      number the state no longer changes: it is the last good one.
    extra: what a method keeps beside the parameters and no gradient reaches:
      an average of them (EMA), stale copies of peers. Often {}.
  """

  step: jax.Array
  params: Mapping[str, Any]
  opt_state: Any
  model_state: Mapping[str, Any]
  key: jax.Array
  skipped: jax.Array
  extra: Mapping[str, Any] = flax.struct.field(default_factory=dict)


def init_state(
  params: Mapping[str, Any],
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  *,
  model_state: Mapping[str, Any] | None = None,
  extra: Mapping[str, Any] | None = None,
) -> TrainState:
  """The state at step 0.

  Args:
    params: parameters in a dict by role.
    optimizer: the optax transformation that `make_step` will use.
    key: typed key, `jax.random.key(seed)`.
    model_state: non-trainable state in a dict by role.
    extra: see `TrainState`.

  Returns:
    A fresh `TrainState`. It holds copies of all it is given: the compiled step
    donates its input, and must not eat the caller's arrays.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from kd_jax import models, train
    >>> net = models.create("mlp", 3, hidden=(4,))
    >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> state = train.init_state(
    ...     {"student": variables["params"]}, optax.adam(1e-3),
    ...     jax.random.key(1), model_state={"student": variables["state"]})
    >>> list(state.params), int(state.step)
    (['student'], 0)
  """
  copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
  params = copy(dict(params))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    model_state=copy(dict(model_state or {})),
    key=key,
    skipped=jnp.zeros((), jnp.int32),
    extra=copy(dict(extra or {})),
  )
