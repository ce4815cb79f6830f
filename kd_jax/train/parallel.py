"""One step on many devices: `jit` over a mesh, or `pmap`.

Both give the numbers of one device. With `jit` arrays are global and the
compiler shards the program; with `pmap` every device runs its own copy on its
slice of the batch, and the step adds up with `psum`. With `jit` parts of
`frozen`, such as a large teacher, can be split over the devices as well.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from kd_jax.train.state import TrainState

AXIS = "batch"
PEERS = "peer"
# Bytes below which an array is not worth a transfer of its own in each step.
SMALL = 2**16


class Runner:
  """A compiled step and the ways in and out of the devices.

  Use: `state = runner.replicate(state)`, the same for `frozen`, then
  `state, metrics = runner(state, frozen, runner.shard(batch))` as often as
  needed, and `runner.unreplicate(state)` at the end.

  Attributes:
    how: "jit" or "pmap".
    devices: the devices used.
    steps_per_call: how many steps one call makes. Above 1, batches have a
      further leading axis of that length, and so have the metrics.
    peers: over how many groups of devices the peers of a stacked cohort, or
      the settings of a sweep, are spread.
    sharded: which parts of `frozen` are split over the devices.
  """

  def __init__(
    self,
    step: Callable[..., Any],
    how: str,
    devices: Sequence[jax.Device],
    steps_per_call: int,
    peers: int = 1,
    sharded: Sequence[str] = (),
  ):
    self.step = step
    self.how = how
    self.devices = tuple(devices)
    self.steps_per_call = steps_per_call
    # The rows of this process: pmap takes and gives what is local.
    here = jax.process_index()
    self._local = [
      i for i, d in enumerate(self.devices) if d.process_index == here
    ]
    mesh = self.devices
    if how == "pmap":
      mesh = tuple(self.devices[i] for i in self._local)
    self.peers = peers
    self.sharded = tuple(sharded)
    self._mesh = Mesh(
      np.asarray(mesh).reshape(peers, -1),
      (PEERS, AXIS),
      axis_types=(AxisType.Auto,) * 2,
    )
    axis_name = None if how == "jit" else AXIS
    inner = functools.partial(step, axis_name=axis_name)

    def one(state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
      state, metrics = inner(state, self._whole(frozen, state), batch)
      if peers > 1:  # where they were, so that the next call finds them there
        state = lax.with_sharding_constraint(state, self._places(state))
      return state, metrics

    def many(state: Any, frozen: Any, batches: Any) -> tuple[Any, Any]:
      return lax.scan(lambda s, b: one(s, frozen, b), state, batches)

    run = one if steps_per_call == 1 else many
    if how == "jit":
      self._run = jax.jit(run, donate_argnums=0)
    else:
      self._run = jax.pmap(
        run, axis_name=AXIS, devices=self.devices, donate_argnums=0
      )

  def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
    """Runs the step: `(state, frozen, batch) -> (state, metrics)`.

    `state` is donated: use the returned one. Metrics are still on the device.
    """
    state, metrics = self._run(state, frozen, batch)
    if self.how == "pmap":
      metrics = jax.tree.map(lambda x: x.addressable_data(0)[0], metrics)
    return state, metrics

  def lower(self, state: Any, frozen: Any, batch: Any) -> Any:
    """The step as `jax.jit(f).lower(...)` gives it, to be looked at.

    `compile()` of it has `cost_analysis()` and `memory_analysis()`, of one
    device, and `as_text()`, which `collectives` reads.
    """
    return self._run.lower(state, frozen, batch)

  def replicate(self, tree: Any) -> Any:
    """Puts a copy of every array on every device.

    Of a `TrainState` whose peers are spread, each device gets its own peers'
    part; of `frozen`, its share of what is sharded, see `split_specs`.

    Raises:
      ValueError: if `frozen` lacks a part that is to be sharded.
    """
    if self.peers > 1 and isinstance(tree, TrainState):
      places = self._places(tree)
      return jax.tree.map(lambda x, at: self._put(x, at.spec), tree, places)
    if self.sharded and not isinstance(tree, TrainState):
      missing = [name for name in self.sharded if name not in tree]
      if missing:
        raise ValueError(
          f"sharded names {', '.join(missing)}; frozen should have that, but "
          f"it holds {', '.join(tree)}"
        )
      specs = jax.tree.map(lambda _: P(), dict(tree))
      for name in self.sharded:
        specs[name] = split_specs(tree[name], self._mesh.shape[AXIS])
      return jax.tree.map(self._put, dict(tree), specs)
    spec = P() if self.how == "jit" else P(AXIS)
    copies = len(self._local)

    def put(x: Any) -> jax.Array:
      if self.how == "pmap":
        lib = jnp if isinstance(x, jax.Array) else np
        x = lib.broadcast_to(x, (copies, *np.shape(x)))
      return self._put(x, spec)

    return jax.tree.map(put, tree)

  def shard(self, batch: Any) -> Any:
    """Splits a global batch (the same on every process) over the devices.

    Args:
      batch: pytree of arrays, [batch, ...], or [steps_per_call, batch, ...].

    Returns:
      The arrays on the devices, as the compiled step wants them.

    Raises:
      ValueError: if the batch does not divide over the devices.
    """
    return self._shard(batch, 1 if self.steps_per_call > 1 else 0)

  def _shard(self, batch: Any, lead: int) -> Any:
    """As `shard`, along axis `lead`."""
    alone = self.how == "jit" and len(self.devices) == 1

    def put(x: Any) -> Any:
      x = np.asarray(x)
      check_divides(x.shape[lead], len(self.devices) // self.peers)
      if alone:  # the call itself brings it there faster
        return x
      if self.how == "jit":
        return self._put(x, P(*[None] * lead, AXIS))
      split = (len(self.devices), x.shape[lead] // len(self.devices))
      x = x.reshape(*x.shape[:lead], *split, *x.shape[lead + 1 :])
      return self._put(np.moveaxis(x, lead, 0)[self._local], P(AXIS))

    return jax.tree.map(put, batch)

  def unreplicate(self, tree: Any) -> Any:
    """The first device's copy of a replicated tree.

    It shares memory with `tree`: a further step with the donated `tree` ends
    it. Peers that are spread are brought together.
    """
    if self.peers > 1 and isinstance(tree, TrainState):
      return jax.tree.map(
        lambda x, at: self._gather(x) if at.spec else x.addressable_data(0),
        tree,
        self._places(tree),
      )
    first = lambda x: x.addressable_data(0)
    if self.how == "jit":
      return jax.tree.map(first, tree)
    return jax.tree.map(lambda x: first(x)[0], tree)

  def bad_leaves(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
    """Diagnosis after a non-finite step, see `make_step`; compiles anew.

    Args:
      state: replicated state before the step.
      frozen: replicated frozen arguments.
      batch: one batch, not sharded.

    Returns:
      (a tree like `params`, True where the gradient is finite; the metrics).
    """
    run = lambda *a: self.step.bad_leaves(a[0], self._whole(a[1], a[0]), a[2])  # type: ignore[attr-defined]
    if self.how == "jit":  # which has room for no more than the step itself
      return jax.jit(run)(state, frozen, self._shard(batch, 0))
    state, frozen = self.unreplicate((state, frozen))
    return jax.jit(run)(state, frozen, batch)

  def _whole(self, frozen: Any, state: Any) -> Any:
    """In the compiled step: each device gathers what it holds a share of."""
    if not self.sharded:
      return frozen
    shares = {name: frozen[name] for name in self.sharded}
    # Tied to the step, so that a scan of steps gathers in each anew; before
    # its loop, all would be gathered at once.
    shares, _ = lax.optimization_barrier((shares, state.step))
    here = NamedSharding(self._mesh, P())
    return {**frozen, **lax.with_sharding_constraint(shares, here)}

  def _places(self, state: Any) -> Any:
    """A sharding for each leaf: what is a peer's has a leading axis for it."""
    here = NamedSharding(self._mesh, P())
    each = NamedSharding(self._mesh, P(PEERS))
    spread = {
      name: jax.tree.map(lambda _: each, getattr(state, name))
      for name in ("params", "opt_state", "model_state", "extra")
    }
    return jax.tree.map(lambda _: here, state).replace(**spread)

  def _gather(self, x: jax.Array) -> Any:
    if jax.process_count() == 1:
      return jnp.asarray(jax.device_get(x))
    from jax.experimental import multihost_utils

    return jnp.asarray(multihost_utils.process_allgather(x, tiled=True))

  def _put(self, x: Any, spec: P) -> jax.Array:
    sharding = NamedSharding(self._mesh, spec)
    if jax.process_count() == 1 or self.how == "pmap":
      return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(
      x.dtype, jax.dtypes.prng_key
    ):
      data = self._put(np.asarray(jax.random.key_data(x)), spec)
      return jax.random.wrap_key_data(data)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def compile(
  step: Callable[..., Any],
  *,
  how: str = "jit",
  devices: Sequence[jax.Device] | None = None,
  steps_per_call: int = 1,
  peers: int = 1,
  sharded: Sequence[str] = (),
) -> Runner:
  """Compiles a step of `make_step` for one or many devices.

  Args:
    step: `step(state, frozen, batch, *, axis_name)`.
    how: "jit" (default) or "pmap".
    devices: the devices to use, all by default.
    steps_per_call: steps per dispatch; above 1 they are scanned on the device,
      which pays for tiny models. On CPU, a convolution's weight gradient is
      slow inside a scan.
    peers: for stacked cohorts (`models.stacked`, `by_peer`) and the settings of
      a `sweep`: a mesh axis over which they are spread. Each group of devices
      holds and trains its own share of them; peers exchange logits only,
      settings nothing.
    sharded: for "jit", names of parts of `frozen` of which each device keeps a
      share, such as ("teacher",); `split_specs` says which arrays, and
      `split_bytes` what that saves. The step gathers each array before it is
      used, with the bits of a run in which every device has all. How many are
      there whole at one time is up to the compiler: see docs/pods.md.

  Returns:
    A `Runner`.

  Raises:
    ValueError: on an unknown `how`, `steps_per_call` below 1, `peers` that do
      not divide the devices, or something `sharded` with "pmap".
  """
  if how not in ("jit", "pmap"):
    raise ValueError(f"how is {how!r}; it should be 'jit' or 'pmap'")
  if steps_per_call < 1:
    raise ValueError(
      f"steps_per_call is {steps_per_call}; it should be at least 1"
    )
  devices = jax.devices() if devices is None else devices
  if peers < 1 or len(devices) % peers or (peers > 1 and how != "jit"):
    raise ValueError(
      f"peers is {peers}; it should divide the number of devices, "
      f"{len(devices)}, and be 1 but for 'jit'"
    )
  if isinstance(sharded, str) or (sharded and how != "jit"):
    raise ValueError(
      f"sharded is {sharded!r}; it should be a tuple of names, empty but for "
      "'jit': with 'pmap' every device has its own copy"
    )
  return Runner(step, how, devices, steps_per_call, peers, sharded)


def split_specs(tree: Any, count: int) -> Any:
  """How arrays are split over devices: along which axis, if any.

  Args:
    tree: arrays, or their shapes from `jax.eval_shape`.
    count: how many devices share them.

  Returns:
    A `PartitionSpec` for each: the longest of the axes that `count` divides is
    split (the first of equals). An array without such an axis, or below
    `SMALL` bytes, stays whole on every device, with an empty one.

  Raises:
    ValueError: if `count` is not positive.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> kernel = jax.ShapeDtypeStruct((3, 3, 512, 1024), jnp.float32)
    >>> odd = jax.ShapeDtypeStruct((999, 1001), jnp.float32)
    >>> [tuple(spec) for spec in split_specs([kernel, odd], 8)]
    [(None, None, None, 'batch'), ()]
  """
  if count < 1:
    raise ValueError(f"count is {count}; it should be positive")

  def spec(x: Any) -> P:
    fits = [i for i, n in enumerate(np.shape(x)) if n and n % count == 0]
    if count == 1 or not fits or _bytes(x) < SMALL:
      return P()
    axis = max(fits, key=lambda i: (np.shape(x)[i], -i))
    return P(*[None] * axis, AXIS)

  return jax.tree.map(spec, tree)


def split_bytes(tree: Any, count: int) -> tuple[int, int]:
  """What each device holds of arrays that are split by `split_specs`.

  Args:
    tree: arrays, or their shapes from `jax.eval_shape`.
    count: how many devices share them.

  Returns:
    (bytes of its shares, bytes of the arrays that stay whole).

  Raises:
    ValueError: if `count` is not positive.

  Example:
    >>> import numpy as np
    >>> split_bytes({"kernel": np.ones((512, 64)), "bias": np.ones(64)}, 8)
    (32768, 512)
  """
  specs = jax.tree.leaves(split_specs(tree, count))
  both = list(zip(jax.tree.leaves(tree), specs, strict=True))
  split = sum(_bytes(x) for x, spec in both if spec != P())
  return split // count, sum(_bytes(x) for x, spec in both if spec == P())


def _bytes(x: Any) -> int:
  dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
  return math.prod(np.shape(x)) * dtype.itemsize


def check_divides(batch_size: int, num_devices: int) -> None:
  """Raises ValueError unless the batch divides evenly over the devices."""
  if batch_size % num_devices:
    below = batch_size - batch_size % num_devices
    near = [str(n) for n in (below, below + num_devices) if n]
    raise ValueError(
      f"batch_size is {batch_size}; it should be a multiple of the number of "
      f"devices, {num_devices}: the nearest are {' and '.join(near)}"
    )
