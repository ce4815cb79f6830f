"""How flat a minimum is: curvature, and the worst loss in a ball around it.

All take `loss_fn(params, batch) -> [examples]`, one loss per example, and mean
the loss over all data by

    L(w) = 1 / n sum_batches sum_i loss_fn(w, batch)_i

so that each example counts once, however the data are cut into batches. The
model must treat examples one by one (BatchNorm in evaluation mode).

**None of these numbers compares two networks by itself.** Dinh et al. 2017
turn a flat minimum of a ReLU network into an arbitrarily sharp one without
changing what it computes: multiply one layer, divide the next. With a
normalisation layer after it, a layer can be scaled by any c > 0, and the
Hessian in its weights scales by 1 / c^2: weight decay alone makes a minimum
"sharper". Report the norm of the parameters beside these numbers, and the ball
whose radius is relative to it. That takes out one common factor, not factors
that differ between layers.

References: Hutchinson 1990 (trace); Keskar et al. 2017, arXiv:1609.04836,
Sec. 2.2 (worst loss nearby); Foret et al. 2021, arXiv:2010.01412 (SAM, the
ball and its first step); Dinh et al. 2017, arXiv:1703.04933 (scale).
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, keystr
import numpy as np

from kd_jax import errors

LossFn = Callable[[Any, Any], jax.Array]


class Worst(NamedTuple):
  """What `worst_in_ball` found.

  Attributes:
    centre: L(w).
    worst: the largest L(w + delta) that was met, at least `centre`.
    radius: rho, absolute also where it was asked for relatively.
    delta: where `worst` was met, like `params`; of norm rho at most.
  """

  centre: float
  worst: float
  radius: float
  delta: Any

  @property
  def increase(self) -> float:
    """L(w + delta) - L(w), the sharpness; never negative."""
    return self.worst - self.centre


def hessian_trace(
  loss_fn: LossFn,
  params: Any,
  batches: Sequence[Any],
  key: jax.Array,
  *,
  num_samples: int,
) -> tuple[float, float]:
  """Hutchinson's estimate of the trace of the loss's Hessian.

    tr H = E[v^T H v],   v_i = +-1 with equal probability

  H v is the derivative along v of the gradient, so H is never formed. The
  estimate is unbiased, and exact from one probe where H is diagonal; otherwise
  the variance of a probe is 2 sum_{i != j} H_ij^2. The trace is not invariant
  to scale: see the module. Where the loss has kinks (ReLU), H is the Hessian
  between them.

  Args:
    loss_fn: (params, batch) -> [examples] float, pure and twice
      differentiable. Defined once, it is compiled once for each shape of a
      batch; what changes between calls, such as the statistics of BatchNorm,
      goes in by `jax.tree_util.Partial(loss, statistics)`.
    params: pytree of float32 (or float64) arrays, w. All of it counts: bind
      what is not to count to `loss_fn` instead.
    batches: sequence of pytrees of arrays that share their leading axis, all
      of the data. Each size compiles a program, so all but the last should be
      equal. One batch at a time is on the device.
    key: of the probes. The same in every batch, so that how the data are cut
      does not matter.
    num_samples: probes, at least 2. Each costs about as much as two gradients
      of the whole data.

  Returns:
    (mean over the probes, its standard error). The error is that of having few
    probes, not that of having few data.

  Raises:
    TypeError: if `params` or the losses have the wrong dtype, or `batches` is
      no sequence.
    ValueError: if `num_samples` is below 2, there is no parameter or no
      example, or the losses are not one per example.

  Example:
    >>> loss = lambda w, batch: batch["x"] * w[0] ** 2 + 3 * w[1] ** 2
    >>> batches = [{"x": np.ones(4)}, {"x": np.full(2, 4.0)}]  # the mean is 2
    >>> w, key = jnp.ones(2), jax.random.key(0)
    >>> hessian_trace(loss, w, batches, key, num_samples=2)
    (10.0, 0.0)

  Reference: Hutchinson 1990, Comm. Stat. Simul. 19(2).
  """
  errors.check_number("num_samples", num_samples, least=2)
  loss_fn, params = _checked(loss_fn, params, batches)
  samples = []
  for i in range(num_samples):
    probe = _draw(jax.random.rademacher, jax.random.fold_in(key, i), params)
    curvature = functools.partial(_curvature, loss_fn, params, probe)
    samples.append(_mean(curvature, batches)[0])
  error = np.std(samples, ddof=1) / math.sqrt(num_samples)
  return float(np.mean(samples)), float(error)


def hessian_top_eigenvalue(
  loss_fn: LossFn,
  params: Any,
  batches: Sequence[Any],
  key: jax.Array,
  *,
  steps: int,
) -> tuple[float, float]:
  """The Hessian's eigenvalue of largest magnitude, by power iteration.

    v <- H v / ||H v||,   lambda = v^T H v

  Not invariant to scale: see the module.

  Args:
    loss_fn: as for `hessian_trace`.
    params: as for `hessian_trace`.
    batches: as for `hessian_trace`.
    key: of the first v.
    steps: products with H, each about two gradients of the whole data.

  Returns:
    (lambda, ||H v - lambda v||). |lambda| is a lower bound of the largest
    magnitude, and some eigenvalue is within the residual of lambda: a large
    residual asks for more steps. Where two eigenvalues differ in sign alone,
    more steps do not help.

  Raises:
    ValueError: if `steps` is below 1. For the rest see `hessian_trace`.

  Example:
    >>> loss = lambda w, batch: batch["x"] * w[0] ** 2 + 3 * w[1] ** 2
    >>> w, batches, key = jnp.ones(2), [{"x": np.ones(4)}], jax.random.key(0)
    >>> value, _ = hessian_top_eigenvalue(loss, w, batches, key, steps=20)
    >>> round(value, 3)
    6.0
  """
  errors.check_number("steps", steps, least=1)
  loss_fn, params = _checked(loss_fn, params, batches)
  product = _draw(jax.random.normal, key, params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  for _ in range(steps):
    vector = _step(zeros, product, 1.0)
    curvature = functools.partial(_curvature, loss_fn, params, vector)
    value, product = _mean(curvature, batches)
    if not _norm(product) > 0:  # No direction to go on with.
      break
  return value, float(_norm(_add_scaled(product, vector, -value)))


def worst_in_ball(
  loss_fn: LossFn,
  params: Any,
  batches: Sequence[Any],
  key: jax.Array,
  *,
  radius: float,
  steps: int,
  relative: bool = False,
) -> Worst:
  """The largest loss found within a distance of the parameters.

    sharpness = max_{||delta||_2 <= rho} L(w + delta) - L(w)

  by projected gradient ascent with normalised steps,

    delta <- project(delta + s rho g / ||g||),   g = grad L(w + delta)

  with s = 1 at first, so that the first point is SAM's, w + rho g / ||g||. A
  point with no larger loss is given up, and the next step from the best one is
  half as long. Where the gradient is exactly zero (an exact minimum, a dead
  network), the step goes rho in a random direction instead, a new one each
  time.

  **This is a lower bound of the true maximum**; more steps never lower it, so
  compare networks at the same `steps`. The increase has to stand out from the
  rounding of a float32 loss, about 1e-7 of it, and rho from that of `params`.

  A network with normalisation layers computes the same when the weights before
  them are multiplied by a constant, so a fixed rho is a ball of another kind
  for smaller weights. `relative=True` makes it a fraction of their norm.

  Args:
    loss_fn: as for `hessian_trace`; differentiable once is enough.
    params: as for `hessian_trace`.
    batches: as for `hessian_trace`.
    key: of the random directions; not used where there is a gradient.
    radius: rho, above 0.
    steps: points tried, at least 1. Each is a gradient of the whole data, and
      so is the centre.
    relative: rho is `radius` times ||w||_2, over all parameters together.

  Returns:
    A `Worst`. Points where the loss is infinite or NaN do not count.

  Raises:
    ValueError: if `radius` or `steps` is out of range, the loss at `params` is
      not finite, or `params` is zero with `relative`. For the rest see
      `hessian_trace`.

  Example:
    >>> loss = lambda w, batch: batch["x"] * (3 * w[0] + 4 * w[1])
    >>> w, batches, key = jnp.ones(2), [{"x": np.ones(5)}], jax.random.key(0)
    >>> worst = worst_in_ball(loss, w, batches, key, radius=0.5, steps=1)
    >>> round(worst.centre, 3), round(worst.increase, 3)
    (7.0, 2.5)

  Reference: Foret et al. 2021, arXiv:2010.01412, Eq. 1 and 2; Keskar et al.
  2017, arXiv:1609.04836, Metric 2.1 (a box there, and a share of 1 + L).
  """
  errors.check_number("radius", radius, above=0)
  errors.check_number("steps", steps, least=1)
  loss_fn, params = _checked(loss_fn, params, batches)
  if relative:
    norm = float(_norm(params))
    if not norm > 0:
      raise ValueError(
        f"params has norm {norm}; with relative=True it should be above 0"
      )
    radius = radius * norm

  def evaluate(delta: Any) -> tuple[float, Any]:
    at_delta = functools.partial(_value_and_grad, loss_fn, params, delta)
    return _mean(at_delta, batches)

  delta = jax.tree.map(jnp.zeros_like, params)
  centre, gradient = evaluate(delta)
  if not math.isfinite(centre):
    raise ValueError(f"the loss at params is {centre}; it should be finite")
  worst, length = centre, float(radius)
  for i in range(steps):
    flat = not _norm(gradient) > 0
    if flat:
      direction = _draw(jax.random.normal, jax.random.fold_in(key, i), params)
      trial = _step(delta, direction, radius, radius)
    else:
      trial = _step(delta, gradient, length, radius)
    value, new = evaluate(trial)
    if math.isfinite(value) and value > worst:
      delta, worst, gradient = trial, value, new
    elif not flat:
      length /= 2
  return Worst(centre, worst, float(radius), delta)


def _checked(
  loss_fn: LossFn, params: Any, batches: Sequence[Any]
) -> tuple[Partial, Any]:
  """The loss as a pytree, to be traced, and the parameters on the device."""
  # A Partial's function is static and its arguments are traced: one program
  # for each function, whatever is bound to it.
  loss_fn = loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)
  # Weak types are those of Python's numbers; they would compile once more.
  params = jax.tree.map(jnp.asarray, params)
  params = jax.tree.map(lambda x: x.astype(x.dtype), params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if leaf.dtype not in (jnp.float32, jnp.float64):
      # In 16 bits, w + delta mostly rounds back to w.
      raise TypeError(
        f"params{keystr(path)} has dtype {leaf.dtype}; it should be float32"
      )
  if not any(leaf.size for leaf in jax.tree.leaves(params)):
    raise ValueError("params is empty; it should hold at least one number")
  if isinstance(batches, Mapping) or not hasattr(batches, "__len__"):
    # A single batch, or a generator, which could be read only once.
    kind = type(batches).__name__
    raise TypeError(f"batches is a {kind}; it should be a sequence of batches")
  if len(batches) == 0:
    raise ValueError("batches is empty; it should hold at least one batch")
  return loss_fn, params


def _examples(batch: Any, index: int) -> int:
  """The leading size that all arrays of a batch share."""
  shapes = [np.shape(array) for array in jax.tree.leaves(batch)]
  sizes = {shape[0] if shape else 0 for shape in shapes}
  if len(sizes) != 1 or 0 in sizes:
    raise ValueError(
      f"batches[{index}] holds shapes {shapes}; they should share a leading "
      "axis of at least one example"
    )
  return sizes.pop()


def _mean(
  function: Callable[[Any], tuple[jax.Array, Any]], batches: Sequence[Any]
) -> tuple[float, Any]:
  """Means over all examples of a sum, added up in float64, and of a pytree."""
  total, count, tree = 0.0, 0, None
  for i, batch in enumerate(batches):
    count += _examples(batch, i)
    value, part = function(batch)
    tree = part if tree is None else _add_scaled(tree, part, 1.0)
    total += float(value)  # This waits: no second batch is under way.
  return total / count, _divide(tree, count)


@jax.jit
def _add_scaled(a: Any, b: Any, factor: float) -> Any:
  """The pytree a + factor b."""
  return jax.tree.map(lambda x, y: x + factor * y, a, b)


@jax.jit
def _divide(tree: Any, count: int) -> Any:
  return jax.tree.map(lambda x: x / count, tree)


def _total(loss_fn: LossFn, params: Any, batch: Any) -> jax.Array:
  """The sum of the losses of a batch."""
  rows = jnp.shape(jax.tree.leaves(batch)[0])[0]
  # Differences of losses are wanted: TF32 or bfloat16 products, which are an
  # accelerator's default, would drown them.
  with jax.default_matmul_precision("highest"):
    values = loss_fn(params, batch)
  if jnp.shape(values) != (rows,):
    raise ValueError(
      f"loss_fn returned shape {jnp.shape(values)}; it should be one loss per "
      f"example, ({rows},)"
    )
  if not jnp.issubdtype(values.dtype, jnp.floating):
    raise TypeError(
      f"loss_fn returned dtype {values.dtype}; losses should be a float"
    )
  return values.astype(jnp.promote_types(values.dtype, jnp.float32)).sum()


@jax.jit
def _value_and_grad(
  loss_fn: LossFn, params: Any, delta: Any, batch: Any
) -> tuple[jax.Array, Any]:
  """The sum of a batch's losses at params + delta, and its gradient."""
  moved = jax.tree.map(jnp.add, params, delta)
  return jax.value_and_grad(lambda p: _total(loss_fn, p, batch))(moved)


@jax.jit
def _curvature(
  loss_fn: LossFn, params: Any, vector: Any, batch: Any
) -> tuple[jax.Array, Any]:
  """v^T H v and H v, H the Hessian of the sum of a batch's losses."""
  gradient = jax.grad(lambda p: _total(loss_fn, p, batch))
  _, product = jax.jvp(gradient, (params,), (vector,))
  # Not `vdot`, whose products an accelerator may round.
  parts = jax.tree.map(lambda v, h: jnp.sum(v * h), vector, product)
  return jax.tree.reduce(jnp.add, parts), product


@functools.partial(jax.jit, static_argnums=0)
def _draw(sample: Callable[..., jax.Array], key: jax.Array, tree: Any) -> Any:
  """Independent random numbers in the shapes and dtypes of a pytree."""
  keys = iter(jax.random.split(key, len(jax.tree.leaves(tree))))
  return jax.tree.map(lambda x: sample(next(keys), x.shape, x.dtype), tree)


@jax.jit
def _norm(tree: Any) -> jax.Array:
  """The L2 norm of all numbers of a pytree together."""
  leaves = jax.tree.leaves(tree)
  largest = functools.reduce(
    jnp.maximum, [jnp.max(jnp.abs(x), initial=0.0) for x in leaves]
  )
  # The squares of a flat minimum's gradient underflow: divide first.
  unit = jnp.where(largest > 0, largest, 1.0)
  return unit * jnp.sqrt(sum(jnp.sum((x / unit) ** 2) for x in leaves))


@jax.jit
def _step(
  start: Any, direction: Any, length: float, radius: float = math.inf
) -> Any:
  """A step of a given length from `start`, pulled back into the ball."""
  norm = _norm(direction)
  unit = jax.tree.map(lambda d: (d / norm).astype(d.dtype), direction)
  moved = _add_scaled(start, unit, length)
  shrink = jnp.minimum(1.0, radius / _norm(moved))
  return jax.tree.map(lambda x: x * shrink.astype(x.dtype), moved)
