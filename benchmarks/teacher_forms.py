"""What a teacher's inference costs in other forms.

A batch norm that only reads its statistics multiplies by a constant, which a
convolution right before it can do as well: its kernel is multiplied, the norm
adds what is left. That is what deployment tools do to a network. The other
form computes inside of the network in bfloat16.

Run: python -m benchmarks.run teacher_wide_resnet teacher_mobilenet_v3
"""

import collections
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from benchmarks.run import Benchmark
from kd_jax import models

Path = tuple[str, ...]

# name -> (shape of the images, attributes)
TEACHERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
  "wide_resnet": ((32, 32, 32, 3), {"depth": 22, "width": 1}),
  "mobilenet_v3": ((32, 32, 32, 3), {}),
}
CLASSES = 10


def behind_convolutions(
  apply: Callable[..., Any], variables: Any, images: jax.Array
) -> list[tuple[Path, nn.BatchNorm]]:
  """The paths of convolutions, each with the norm that alone takes its output.

  Where a sum or another layer takes it as well, its kernel has to stay.
  """
  made: list[tuple[jax.Array, Path]] = []
  found = []

  def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if isinstance(module, nn.BatchNorm):
      found.extend((path, module) for x, path in made if x is args[0])
    out = call(*args, **kwargs)
    if isinstance(module, nn.Conv) and not module.use_bias:
      out = checkpoint_name(out, "/".join(module.path))
      made.append((out, module.path))
    return out

  with nn.intercept_methods(look):
    program = jax.make_jaxpr(lambda v: apply(v, images)[0])(variables).jaxpr
  uses = collections.Counter(
    id(x) for equation in program.eqns for x in equation.invars
  )
  once = {
    equation.params["name"]
    for equation in program.eqns
    if equation.primitive.name == "name" and uses[id(equation.outvars[0])] == 1
  }
  return [(path, norm) for path, norm in found if "/".join(path) in once]


def folded(
  apply: Callable[..., Any], variables: Any, images: jax.Array
) -> tuple[Callable[..., Any], Any]:
  """The same network whose kernels do the norms' multiplications."""
  norms = behind_convolutions(apply, variables, images)
  params, state = (
    flax.traverse_util.flatten_dict(variables[part])
    for part in ("params", "state")
  )
  for path, norm in norms:
    mean, var = (
      state["batch_stats", *norm.path, name] for name in ("mean", "var")
    )
    scale = params[*norm.path, "scale"] * jax.lax.rsqrt(var + norm.epsilon)
    params[*path, "kernel"] *= scale
    params[*norm.path, "bias"] -= mean * scale
  paths = {norm.path for _, norm in norms}

  def skip(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if isinstance(module, nn.BatchNorm) and module.path in paths:
      return args[0] + module.variables["params"]["bias"]
    return call(*args, **kwargs)

  def apply_folded(variables: Any, images: jax.Array) -> Any:
    with nn.intercept_methods(skip):
      return apply(variables, images)

  new = flax.traverse_util.unflatten_dict(params)
  return apply_folded, {"params": new, "state": variables["state"]}


def benchmark(name: str) -> Benchmark:
  shape, fields = TEACHERS[name]
  images = jax.random.normal(jax.random.key(0), shape)
  plain, short = (
    models.create(name, CLASSES, dtype=dtype, **fields)
    for dtype in ("float32", "bfloat16")
  )
  # Statistics and scales as of a network that was trained, not 0 and 1.
  noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape)
  known = jax.tree.map(noise, plain.init(jax.random.key(1), images))
  without, changed = folded(plain.apply, known, images)

  def compiled(apply: Callable[..., Any], variables: Any) -> Any:
    run = jax.jit(lambda v, x: apply(v, x)[0].logits)
    return lambda: jax.block_until_ready(run(variables, images))

  base = "float32"
  forms = {
    base: compiled(plain.apply, known),
    "norms folded into convolutions": compiled(without, changed),
    "bfloat16": compiled(short.apply, known),
  }
  wanted, found, _ = (form() for form in forms.values())
  error = jnp.abs(found - wanted).max() / jnp.abs(wanted).max()
  if not error < 1e-4:
    raise RuntimeError(f"the folded network is another: off by {error}")
  count = len(behind_convolutions(plain.apply, known, images))
  total = sum(
    path[-1] == "mean"
    for path in flax.traverse_util.flatten_dict(known["state"])
  )
  return Benchmark(
    title=f"Forms of a teacher: {name}",
    base=base,
    forms=forms,
    claims=tuple(
      (f"a teacher costs less: {form}", form, base, "lower")
      for form in list(forms)[1:]
    ),
    data={
      "teacher": f"{name} {fields}",
      "images": "x".join(map(str, shape)),
      "batch norms": f"{total}, {count} of them right after a convolution",
    },
  )
