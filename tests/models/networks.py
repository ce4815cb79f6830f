"""What the tests of the networks for images share.

Images, random numbers for all variables, and the layers of `models.layers` in
float64 NumPy, written from their definitions. Compilation is most of these
tests' time, so a file compiles one network for several of them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.models import from_linen


def images(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def random_variables(module, inputs, *args, **kwargs):
  """Numbers that make every part of the network count."""
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    name, noise = path[-1].key, rng.normal(size=leaf.shape)
    if name == "kernel":
      return noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
    if name in ("scale", "var"):
      return np.exp(0.3 * noise)
    return 0.3 * noise  # bias, mean, tokens and positions

  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), jnp.asarray(inputs), *args, **kwargs)
  )
  drawn = jax.tree_util.tree_map_with_path(draw, shapes)
  return jax.tree.map(np.float32, drawn)


def doubles(variables):
  """(parameters, batch statistics), both in float64."""
  double = jax.tree.map(np.float64, variables)
  return double["params"], double.get("batch_stats", {})


def compiled(module, x):
  """(apply, variables, the same as `apply` takes them, x); has statistics."""
  variables = random_variables(module, x)
  model = {"params": variables["params"]}
  model["state"] = {"batch_stats": variables["batch_stats"]}
  return jax.jit(from_linen(module).apply), variables, model, x


def check_evaluation(network):
  """It changes no statistics and sees one image at a time.

  Args:
    network: what `compiled` returned, for three images.
  """
  apply, _, model, x = network
  outputs, after = apply(model, x)
  jax.tree.map(np.testing.assert_array_equal, after, model["state"])
  again, _ = apply(model, among_others(x))
  np.testing.assert_allclose(
    again.logits[0], outputs.logits[1], rtol=1e-5, atol=1e-6
  )


def among_others(x):
  """The second of three images comes first; the others are new."""
  return np.concatenate([x[1:2], 5 * x[::-1][:2]])


def conv(x, p, stride=1):
  """Padded with `side // 2` zeros on all sides, whatever the stride."""
  kernel = p["conv"]["kernel"]
  side = kernel.shape[0]
  pad = (side // 2, side // 2)
  x = np.pad(x, [(0, 0), pad, pad, (0, 0)])
  x = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
  x = x[:, ::stride, ::stride]
  return np.einsum("bhwcij,ijco->bhwo", x, kernel)


def normalised(x, p, s, epsilon=1e-5, *, batch=False):
  """`s` holds running statistics; without any, groups of 8 are normalised."""
  if batch:
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  elif s:
    mean, var = s["norm"]["mean"], s["norm"]["var"]
  else:
    groups = x.reshape(*x.shape[:3], -1, 8)
    mean, var = (
      np.repeat(f((1, 2, 4), keepdims=True)[..., 0], 8, axis=-1)
      for f in (groups.mean, groups.var)
    )
  x = (x - mean) / np.sqrt(var + epsilon)
  return x * p["norm"]["scale"] + p["norm"]["bias"]


def norm_relu(x, p, s, *, batch=False):
  return np.maximum(normalised(x, p, s, batch=batch), 0)


def head(x, p):
  return x.mean((1, 2)) @ p["dense"]["kernel"] + p["dense"]["bias"]
