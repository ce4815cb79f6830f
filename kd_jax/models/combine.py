"""Models made of models: at another resolution, several as one, cohorts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import targets
from kd_jax.models.base import Model, Outputs, Variables


def at_resolution(model: Model, size: int) -> Model:
  """A model that resizes its images first (bilinear, smoothed when smaller).

  Args:
    model: takes images [batch, size, size, channels].
    size: in pixels.

  Returns:
    A model of images [batch, height, width, channels] of any size; images that
    are `size` high and wide already are left as they are.

  Raises:
    ValueError: if size is not positive.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import models
    >>> small = models.at_resolution(models.create("mlp", 3, hidden=()), 4)
    >>> variables = small.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> variables["params"]["Dense_0"]["kernel"].shape
    (16, 3)
  """
  if size < 1:
    raise ValueError(f"size is {size}; it should be at least 1")

  def resized(images: jax.Array) -> jax.Array:
    shape = (images.shape[0], size, size, images.shape[-1])
    if images.shape == shape:
      return images
    return jax.image.resize(images, shape, "bilinear")

  def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
    return model.init(key, resized(inputs))

  def apply(
    variables: Variables,
    inputs: Any,
    *,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> tuple[Outputs, Any]:
    return model.apply(variables, resized(inputs), train=train, key=key)

  return Model(init, apply)


def ensemble(
  members: Mapping[str, Model],
  *,
  space: str = "probability",
  temperature: float = 1.0,
) -> Model:
  """Several models of the same classes as one, see `targets.ensemble`.

  To be used, not to be trained: a teacher.

  Args:
    members: at least one model by name.
    space: what is averaged, "probability" or "logit".
    temperature: at which the probabilities are averaged; give the student's.
      Matching this mean is, up to a constant, matching each member: the
      cross-entropy is linear in the target.

  Returns:
    A model whose variables are {name: variables of that member}.

  Raises:
    ValueError: if there is no member.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import models
    >>> net = models.create("mlp", 3, hidden=())
    >>> both = models.ensemble({"a": net, "b": net})
    >>> variables = both.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> outputs, _ = both.apply(variables, jnp.ones((2, 4)))
    >>> sorted(variables), outputs.logits.shape
    (['a', 'b'], (2, 3))
  """
  if not members:
    raise ValueError("members is empty; it should hold at least one model")

  def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
    keys = jax.random.split(key, len(members))
    return {
      name: model.init(own, inputs)
      for (name, model), own in zip(members.items(), keys, strict=True)
    }

  def apply(
    variables: Variables,
    inputs: Any,
    *,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> tuple[Outputs, Any]:
    if train:
      raise ValueError("train is True; an ensemble is used, not trained")
    del key
    each = [
      model.apply(variables[name], inputs)[0].logits
      for name, model in members.items()
    ]
    if len(each) == 1:
      return Outputs(each[0]), {}
    mean = targets.ensemble(
      jnp.stack(each), space=space, temperature=temperature
    )
    return Outputs(mean), {}

  return Model(init, apply)


def cohort(members: Mapping[str, Model]) -> Model:
  """Several models of the same classes that are trained together.

  Args:
    members: at least one model by name, the peers.

  Returns:
    A model whose params and state are dicts by the names. `Outputs.heads` has
    the logits of each peer in order, `Outputs.logits` their mean prediction
    (`targets.ensemble`). In training each peer draws from a key of its own.

  Raises:
    ValueError: if there is no member.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import models
    >>> nets = {f"peer_{i}": models.create("mlp", 3, hidden=(4 + i,))
    ...         for i in range(2)}
    >>> both = models.cohort(nets)
    >>> variables = both.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> both.apply(variables, jnp.ones((5, 4)))[0].heads.shape
    (2, 5, 3)
  """
  if not members:
    raise ValueError("members is empty; it should hold at least one model")
  names = list(members)

  def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
    keys = jax.random.split(key, len(names))
    each = {
      name: members[name].init(own, inputs)
      for name, own in zip(names, keys, strict=True)
    }
    return {
      part: {name: each[name][part] for name in names}
      for part in ("params", "state")
    }

  def apply(
    variables: Variables,
    inputs: Any,
    *,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> tuple[Outputs, Any]:
    keys: Any = [None] * len(names)
    if key is not None:
      keys = jax.random.split(key, len(names))
    heads, state = [], {}
    for name, own in zip(names, keys, strict=True):
      one = {part: variables[part][name] for part in ("params", "state")}
      out, state[name] = members[name].apply(one, inputs, train=train, key=own)
      heads.append(out.logits)
    return _peers(jnp.stack(heads)), state

  return Model(init, apply)


def stacked(model: Model, count: int) -> Model:
  """A cohort of one architecture, as one program with a leading axis.

  The same numbers as `cohort` of that many, up to rounding: one batched
  operation in place of several. That fills an accelerator with small models.
  On a CPU batched convolutions are slower than several.

  Args:
    model: the architecture.
    count: how many peers.

  Returns:
    A model whose params and state have a leading axis [count]; its outputs are
    those of `cohort`.

  Raises:
    ValueError: if count is not positive.
  """
  if count < 1:
    raise ValueError(f"count is {count}; it should be at least 1")

  def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
    keys = jax.random.split(key, count)
    return jax.vmap(model.init, (0, None))(keys, inputs)

  def apply(
    variables: Variables,
    inputs: Any,
    *,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> tuple[Outputs, Any]:
    def one(variables: Any, own: Any) -> tuple[jax.Array, Any]:
      out, state = model.apply(variables, inputs, train=train, key=own)
      return out.logits, state

    keys = None if key is None else jax.random.split(key, count)
    axes = (0, None if keys is None else 0)
    heads, state = jax.vmap(one, axes)(dict(variables), keys)
    return _peers(heads), state

  return Model(init, apply)


def _peers(heads: jax.Array) -> Outputs:
  return Outputs(logits=targets.ensemble(heads), heads=heads)
