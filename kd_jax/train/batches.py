"""Batches by their rows: data that lives on the device, and who comes when."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kd_jax.data import order
from kd_jax.train.state import TrainState
from kd_jax.train.step import Batch, Metrics


def gather_batch(
  step: Callable[..., tuple[TrainState, Metrics]],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Lets a step take its examples from data that lives on the device.

  Args:
    step: what `make_step` returned.

  Returns:
    The same step, whose `frozen` has a further entry `data`, a dict of arrays
    with a common leading axis, and whose `batch` has `index`, int32 [batch],
    the rows to take. If there is `partner`, int32 [batch], those rows become a
    dict under that name. Other entries of `batch` are passed on; a batch
    without `index` holds its examples itself.
  """

  def with_data(function: Callable[..., Any]) -> Callable[..., Any]:
    def gathered(
      state: TrainState,
      frozen: Any,
      batch: Batch,
      *,
      axis_name: str | None = None,
    ) -> Any:
      rest = dict(batch)
      if "index" not in rest:
        return function(state, frozen, rest, axis_name=axis_name)
      index = rest.pop("index")
      rows = {name: x[index] for name, x in frozen["data"].items()}
      if "partner" in rest:
        other = rest.pop("partner")
        rest["partner"] = {name: x[other] for name, x in frozen["data"].items()}
      return function(state, frozen, {**rows, **rest}, axis_name=axis_name)

    return gathered

  gathered = with_data(step)
  gathered.bad_leaves = with_data(step.bad_leaves)  # type: ignore[attr-defined]
  return gathered


def index_batches(
  seed: int,
  batch_size: int,
  n: int,
  *,
  views: int | None = None,
  partners: bool = False,
) -> Callable[[int], dict[str, np.ndarray]]:
  """Batches for `gather_batch`: rows and epoch, a pure function of the step.

  Args:
    seed: of the order.
    batch_size: examples in a batch.
    n: examples in the data.
    views: how many views of an example there are; the epoch counts up to it
      and begins again, and with it what is drawn from `views.keys`. None: a
      new view in every epoch.
    partners: with `partner`, the row to mix each example with.

  Returns:
    `batches(step) -> {"index": int32[batch], "epoch": int32[batch]}`, and
    perhaps `partner`.

  Raises:
    ValueError: if the batch is larger than the data, or `views` not positive.
  """
  order.epoch_of(0, batch_size, n)  # raises now, not at the first step
  if views is not None and views < 1:
    raise ValueError(f"views is {views}; it should be positive")

  def batches(step: int) -> dict[str, np.ndarray]:
    epoch = order.epoch_of(step, batch_size, n)
    view = epoch if views is None else epoch % views
    index = order.batch_ids(seed, step, batch_size, n)
    batch = {"index": index, "epoch": np.full(batch_size, view, np.int32)}
    if partners:
      batch["partner"] = order.partners(seed, view, index, n)
    return batch

  return batches
