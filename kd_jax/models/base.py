"""What a model is to kd_jax: `init` and `apply`, two pure functions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax

Variables = Mapping[str, Any]


@flax.struct.dataclass
class Outputs:
  """What a model returns.

  Attributes:
    logits: [batch, classes] float, before any softmax or temperature; of a
      language model [batch, time, classes].
    heads: [heads, batch, classes] float, the logits of each if there are
      several: of the peers of a cohort, the branches or exits of a network.
      `logits` is then what the whole predicts.
    features: by name, what a method reads beside them.
  """

  logits: jax.Array
  heads: jax.Array | None = None
  features: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)


class Model(NamedTuple):
  """A model as two pure functions.

  Attributes:
    init: `init(key, inputs) -> {"params": ..., "state": ...}`.
    apply: `apply(variables, inputs, *, train=False, key=None) -> (Outputs,
      new_state)`. `key` is needed only by a model that draws numbers when it
      trains. `new_state` equals the old one when `train` is False.
  """

  init: Callable[..., dict[str, Any]]
  apply: Callable[..., tuple[Outputs, Any]]


def from_linen(module: nn.Module) -> Model:
  """Makes a `Model` of a Linen module.

  Args:
    module: its `__call__(inputs, *, train)` returns `Outputs` or logits. All
      collections but `params` become the state; dropout uses the rng
      `dropout`.

  Returns:
    The model. Its teacher use (`train=False`) never changes the state.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import models
    >>> model = models.from_linen(models.MLP(hidden=(8,), num_classes=3))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    >>> outputs, _ = model.apply(variables, jnp.zeros((5, 4, 4, 1)))
    >>> outputs.logits.shape
    (5, 3)
  """

  def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
    # One compiled program: eager initialisation compiles every small op.
    variables = jax.jit(lambda k, x: module.init(k, x, train=False))(
      key, inputs
    )
    variables = dict(variables)
    return {"params": variables.pop("params"), "state": variables}

  def apply(
    variables: Variables,
    inputs: Any,
    *,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> tuple[Outputs, Any]:
    state = variables["state"]
    collections = {"params": variables["params"], **state}
    rngs = None if key is None else {"dropout": key}
    if train and state:
      out, state = module.apply(
        collections, inputs, train=True, rngs=rngs, mutable=list(state)
      )
    else:
      out = module.apply(collections, inputs, train=train, rngs=rngs)
    return (out if isinstance(out, Outputs) else Outputs(out)), state

  return Model(init, apply)


def from_function(
  init: Callable[..., Any], apply: Callable[..., jax.Array]
) -> Model:
  """Makes a `Model` of two plain functions without state or randomness.

  Args:
    init: `init(key, inputs) -> params`.
    apply: `apply(params, inputs) -> logits`.

  Returns:
    The model.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import models
    >>> linear = models.from_function(
    ...     lambda key, x: jax.random.normal(key, (x.shape[-1], 3)),
    ...     lambda w, x: x @ w)
    >>> variables = linear.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> linear.apply(variables, jnp.ones((4, 2)))[0].logits.shape
    (4, 3)
  """

  def model_init(key: jax.Array, inputs: Any) -> dict[str, Any]:
    return {"params": init(key, inputs), "state": {}}

  def model_apply(
    variables: Variables,
    inputs: Any,
    *,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> tuple[Outputs, Any]:
    del train, key
    return Outputs(apply(variables["params"], inputs)), variables["state"]

  return Model(model_init, model_apply)


def count_parameters(variables: Variables) -> int:
  """The number of trainable scalars in `variables["params"]`."""
  return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
