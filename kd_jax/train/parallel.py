"""One step on many devices: `jit` over a mesh, or `pmap`.

Both give the numbers of one device. With `jit` arrays are global and the
compiler shards the program; with `pmap` every device runs its own copy on its
slice of the batch, and the step adds up with `psum`.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from kd_jax.train.state import TrainState

AXIS = "batch"
PEERS = "peer"


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
  """

  def __init__(
    self,
    step: Callable[..., Any],
    how: str,
    devices: Sequence[jax.Device],
    steps_per_call: int,
    peers: int = 1,
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
    self._mesh = Mesh(
      np.asarray(mesh).reshape(peers, -1),
      (PEERS, AXIS),
      axis_types=(AxisType.Auto,) * 2,
    )
    axis_name = None if how == "jit" else AXIS
    inner = functools.partial(step, axis_name=axis_name)

    def one(state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
      state, metrics = inner(state, frozen, batch)
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

  def replicate(self, tree: Any) -> Any:
    """Puts a copy of every array on every device.

    Of a `TrainState` whose peers are spread, each device gets its own peers'
    part.
    """
    if self.peers > 1 and isinstance(tree, TrainState):
      places = self._places(tree)
      return jax.tree.map(lambda x, at: self._put(x, at.spec), tree, places)
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
    lead = 1 if self.steps_per_call > 1 else 0
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
    state, frozen = self.unreplicate((state, frozen))
    return jax.jit(self.step.bad_leaves)(state, frozen, batch)  # type: ignore[attr-defined]

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

  Returns:
    A `Runner`.

  Raises:
    ValueError: on an unknown `how`, `steps_per_call` below 1, or `peers` that
      do not divide the devices.
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
  return Runner(step, how, devices, steps_per_call, peers)


def check_divides(batch_size: int, num_devices: int) -> None:
  """Raises ValueError unless the batch divides evenly over the devices."""
  if batch_size % num_devices:
    below = batch_size - batch_size % num_devices
    near = [str(n) for n in (below, below + num_devices) if n]
    raise ValueError(
      f"batch_size is {batch_size}; it should be a multiple of the number of "
      f"devices, {num_devices}: the nearest are {' and '.join(near)}"
    )
