"""A sum over chunks whose gradients are computed along with it."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def total(
  of_chunk: Callable[[Any, Any], jax.Array], shared: Any, chunks: Any
) -> jax.Array:
  """The sum of of_chunk(shared, chunk), scalars, over the chunks.

  Differentiated, it computes the gradients along with it: those of what the
  chunks share add up, in the dtype of that, those of the chunks are stacked.
  """
  return lax.map(functools.partial(of_chunk, shared), chunks).sum()


def _forward(
  of_chunk: Callable[[Any, Any], jax.Array], shared: Any, chunks: Any
) -> tuple[jax.Array, Any]:
  def take(tree: Any, asked: bool) -> Any:
    """The arrays whose gradients are asked for, or the others; else None."""
    return jax.tree.map(
      lambda x: x.value if x.perturbed == asked else None, tree
    )

  def join(tree: Any, moved: Any, fixed: Any) -> Any:
    return jax.tree.map(
      lambda x, m, f: m if x.perturbed else f, tree, moved, fixed
    )

  def add(grads: Any, chunk: tuple[Any, Any]) -> tuple[Any, Any]:
    moved, fixed = chunk

    def loss(of_all: Any, own: Any) -> jax.Array:
      return of_chunk(
        join(shared, of_all, take(shared, False)), join(chunks, own, fixed)
      )

    value, (to_shared, to_chunk) = jax.value_and_grad(loss, argnums=(0, 1))(
      take(shared, True), moved
    )
    return jax.tree.map(jnp.add, grads, to_shared), (value, to_chunk)

  to_shared, (values, to_chunks) = lax.scan(
    add,
    jax.tree.map(jnp.zeros_like, take(shared, True)),
    (take(chunks, True), take(chunks, False)),
  )
  # What is saved has to be the same tree whatever is asked for, so what is not
  # is saved as well, without entries.
  saved = jax.tree.map(
    lambda x, grad: (
      grad[..., None]
      if x.perturbed
      else jnp.zeros((*x.value.shape, 0), x.value.dtype)
    ),
    (shared, chunks),
    (to_shared, to_chunks),
  )
  return values.sum(), saved


def _backward(
  of_chunk: Callable[[Any, Any], jax.Array], saved: Any, gradient: jax.Array
) -> Any:
  def scaled(grad: jax.Array) -> jax.Array | None:
    if not jnp.issubdtype(grad.dtype, jnp.floating):
      return None
    if not grad.shape[-1]:
      return jnp.zeros(grad.shape[:-1], grad.dtype)
    return (gradient * grad[..., 0]).astype(grad.dtype)

  return jax.tree.map(scaled, saved)


total.defvjp(_forward, _backward, symbolic_zeros=True)
