"""Data: sources, the order of batches, views on device, preparation.

The names here need NumPy only; what reads TFDS or Grain imports them when it
is called. `kd_jax.data.views` (JAX) and `kd_jax.data.prepare` (a command) are
imported by name.
"""

from kd_jax.data.order import batch_ids, epoch_of, eval_batches, partners
from kd_jax.data.source import Source, ahead, batch_at, to_arrays
from kd_jax.data.sources import embedded, load, tfds
from kd_jax.data.subset import transfer_set

__all__ = [
  "Source",
  "ahead",
  "batch_at",
  "batch_ids",
  "embedded",
  "epoch_of",
  "eval_batches",
  "load",
  "partners",
  "tfds",
  "to_arrays",
  "transfer_set",
]
