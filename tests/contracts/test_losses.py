"""The contract of every public loss.

Losses are found by themselves: what `kd_jax.losses` exports is tested here. A
loss whose arguments have new names needs an entry in INPUTS (or REQUIRED),
not a test; without one it fails.

Each loss is compiled once as a program for values and gradients, with all its
scalars and its mask traced, and most tests share that program.
"""

from collections.abc import Callable, Iterator
import functools
import importlib
import inspect
import pkgutil
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses

BATCH, CLASSES = 8, 5

Arrays = dict[str, np.ndarray]


def _logits(rng: np.random.Generator) -> np.ndarray:
  return (2 * rng.normal(size=(BATCH, CLASSES))).astype(np.float32)


def _labels(rng: np.random.Generator) -> np.ndarray:
  return rng.integers(CLASSES, size=BATCH).astype(np.int32)


# What a positional argument of this name looks like.
INPUTS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
  "student_logits": _logits,
  "teacher_logits": _logits,
  "labels": _labels,
}
# Values of keyword-only arguments that have no default.
REQUIRED: dict[str, Any] = {}
# Scalars whose default is None, beside those whose default is a float.
OPTIONAL_SCALARS = {"teacher_temperature": 1.5}

PUBLIC = {
  name: value
  for name, value in vars(losses).items()
  if callable(value) and not name.startswith("_")
}
every_loss = pytest.mark.parametrize("name", PUBLIC)


def parameters(name: str) -> dict[str, inspect.Parameter]:
  return dict(inspect.signature(PUBLIC[name]).parameters)


def positional(name: str) -> list[str]:
  return [
    key
    for key, parameter in parameters(name).items()
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
  ]


@functools.cache
def bound(name: str) -> Callable[..., jax.Array]:
  """The loss with its required keywords given."""
  missing = {
    key
    for key, parameter in parameters(name).items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    and parameter.default is inspect.Parameter.empty
  }
  unknown = missing - REQUIRED.keys()
  assert not unknown, f"add {sorted(unknown)} to REQUIRED in {__file__}"
  return functools.partial(
    PUBLIC[name], **{key: REQUIRED[key] for key in missing}
  )


def call(name: str, arrays: dict[str, Any], **options: Any) -> jax.Array:
  """The loss of named arrays: jax sorts dictionaries, so by name it is."""
  return bound(name)(*(arrays[key] for key in positional(name)), **options)


def inputs(name: str, seed: int = 0) -> Arrays:
  """Ordinary arguments, by name and in order."""
  unknown = [key for key in positional(name) if key not in INPUTS]
  assert not unknown, f"add {unknown} to INPUTS in {__file__}"
  rng = np.random.default_rng(seed)
  return {key: INPUTS[key](rng) for key in positional(name)}


def floats(arrays: Arrays) -> list[str]:
  return [key for key, x in arrays.items() if x.dtype.kind == "f"]


def scalars(name: str) -> dict[str, float]:
  """The traceable scalars at their defaults, and other fair values."""
  return {
    key: parameter.default
    for key, parameter in parameters(name).items()
    if isinstance(parameter.default, float)
  }


def other_scalars(name: str) -> dict[str, float]:
  """Values that are not the defaults; inside (0, 1) if those are in [0, 1]."""
  values = {key: 0.9 * x + 0.02 for key, x in scalars(name).items()}
  names = parameters(name).keys()
  values.update({k: v for k, v in OPTIONAL_SCALARS.items() if k in names})
  return values


@functools.cache
def program(name: str) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """(values, gradients by float argument and scalar), everything traced."""

  @jax.jit
  def run(arrays, where, scalars):
    varied = scalars | {key: arrays[key] for key in floats(arrays)}

    def total(varied):
      options = {key: varied[key] for key in scalars}
      values = call(name, arrays | varied, where=where, **options)
      return jnp.sum(values), values

    grads, values = jax.grad(total, has_aux=True)(varied)
    return values, grads

  return run


def run(name: str, arrays: Arrays, where=None, **options: float):
  if where is None:
    where = np.ones(BATCH, bool)
  options = scalars(name) | options
  values, grads = program(name)(
    {key: jnp.asarray(x) for key, x in arrays.items()},
    where,
    {key: jnp.float32(x) for key, x in options.items()},
  )
  return np.asarray(values), {k: np.asarray(g) for k, g in grads.items()}


def traced_shape(name: str, arrays: dict[str, Any], **options: Any):
  """Traces the loss without compiling it."""
  return jax.eval_shape(lambda arrays: call(name, arrays, **options), arrays)


# What is public


def test_everything_public_is_under_contract():
  assert {"kl", "reverse_kl", "jsd", "logit_mse", "cross_entropy"} <= set(
    PUBLIC
  )
  for module in pkgutil.iter_modules(losses.__path__):
    if module.name.startswith("_"):
      continue
    members = vars(importlib.import_module(f"kd_jax.losses.{module.name}"))
    for name, value in members.items():
      if inspect.isfunction(value) and not name.startswith("_"):
        assert PUBLIC.get(name) is value, (
          f"{module.name}.{name} is not exported"
        )


@every_loss
def test_signature(name):
  assert not name.endswith("_loss")
  order = ["student", "teacher", "labels"]
  kinds = [key.split("_")[0] for key in positional(name)]
  assert kinds[0] == "student" and set(kinds) <= set(order)
  assert kinds == sorted(kinds, key=order.index)
  for key, parameter in parameters(name).items():
    assert parameter.annotation is not inspect.Parameter.empty, key
    assert parameter.kind in (
      inspect.Parameter.POSITIONAL_OR_KEYWORD,
      inspect.Parameter.KEYWORD_ONLY,
    )
    if key in positional(name):
      assert parameter.default is inspect.Parameter.empty
  assert inspect.signature(PUBLIC[name]).return_annotation in (
    jax.Array,
    "jax.Array",
  )
  assert parameters(name)["where"].default is None
  assert not {"alpha", "z", "p", "q"} & parameters(name).keys()


@every_loss
def test_docstring(name):
  doc = inspect.getdoc(PUBLIC[name])
  sections = ["Args:", "Returns:", "Raises:", "Example:", "Reference:"]
  places = [doc.find(f"\n{section}") for section in sections]
  assert places == sorted(places) and places[0] > 0, places
  args = doc[places[0] : places[1]]
  for key in parameters(name):
    assert re.search(rf"^  {key}: ", args, re.MULTILINE), f"{key} in Args"
  assert re.search(r"^ +loss = ", doc[: places[0]], re.MULTILINE), "equation"
  assert re.search(r"arXiv:\d{4}\.\d{4,5}, (Sec|Eq|App)\. ", doc[places[4] :])
  # That it runs is tested with all doctests of the package.
  assert re.search(rf">>> .*\b{name}\(", doc[places[3] :]), "call in Example"


# What goes in and comes out


@every_loss
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_one_float32_value_per_example(name, dtype):
  arrays = inputs(name)
  low = {
    key: jnp.asarray(x, dtype) if key in floats(arrays) else x
    for key, x in arrays.items()
  }
  values = call(name, low)
  assert values.dtype == jnp.float32
  assert values.shape == (BATCH,)
  # Computed in float32, not only returned in it.
  high = {
    key: jnp.asarray(x, jnp.float32) if x.dtype == dtype else x
    for key, x in low.items()
  }
  np.testing.assert_array_equal(values, call(name, high))
  # A gradient has the dtype of its argument.
  grads = jax.eval_shape(
    jax.grad(lambda varied: call(name, low | varied).sum()),
    {key: low[key] for key in floats(arrays)},
  )
  assert all(grad.dtype == dtype for grad in grads.values())


@every_loss
def test_no_broadcasting(name):
  arrays = inputs(name)
  assert traced_shape(name, arrays).shape == (BATCH,)
  for key, x in arrays.items():
    if key == positional(name)[0]:
      continue
    partner = key.replace("teacher_", "student_")
    if partner not in arrays or partner == key:
      partner = positional(name)[0]
    wrong = {
      (*x.shape[:-1], 1),
      (*x.shape, 1),
      (1, *x.shape),
      (1, *x.shape[1:]),
      (x.shape[0] - 1, *x.shape[1:]),
      (1,),
      (),
    }
    for shape in wrong - {x.shape}:
      bad = arrays | {key: jnp.zeros(shape, x.dtype)}
      with pytest.raises(ValueError) as error:
        traced_shape(name, bad)
      for text in (key, str(shape), partner, str(arrays[partner].shape)):
        assert text in str(error.value), f"{shape}: {error.value}"
      assert "\n" not in str(error.value)


@every_loss
def test_dtypes(name):
  arrays = inputs(name)
  for key, x in arrays.items():
    wrong = [jnp.bool_, jnp.complex64]
    wrong += [jnp.int32, jnp.uint8] if key in floats(arrays) else [jnp.float32]
    for dtype in wrong:
      with pytest.raises(TypeError, match=key):
        traced_shape(name, arrays | {key: jnp.zeros(x.shape, dtype)})


@every_loss
def test_a_mask_of_the_wrong_kind(name):
  arrays = inputs(name)
  for shape in [(1,), (), (BATCH, 1), (1, BATCH), (BATCH - 1,)]:
    with pytest.raises(ValueError, match="where has shape"):
      traced_shape(name, arrays, where=jnp.ones(shape, bool))
  for dtype in (jnp.int32, jnp.float32):
    with pytest.raises(TypeError, match="where has dtype"):
      traced_shape(name, arrays, where=jnp.ones(BATCH, dtype))


# Masks


def with_rows(arrays: Arrays, rows: np.ndarray, fill: float, label: int):
  """The inputs with some examples replaced."""
  changed = {}
  for key, x in arrays.items():
    changed[key] = x.copy()
    changed[key][rows] = fill if x.dtype.kind == "f" else label
  return changed


@every_loss
@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf, 3e38])
def test_masked_examples_are_zero_and_get_no_gradient(name, fill):
  arrays = inputs(name)
  where = np.arange(BATCH) % 3 != 0
  expected, expected_grads = run(name, with_rows(arrays, ~where, 0.5, 0), where)
  assert np.all(np.isfinite(expected)) and np.any(expected[where] != 0)
  values, grads = run(name, with_rows(arrays, ~where, fill, -100), where)
  np.testing.assert_array_equal(values[~where], 0.0)
  np.testing.assert_array_equal(values, expected)
  for key, grad in grads.items():
    np.testing.assert_array_equal(grad, expected_grads[key])
    if key in arrays:
      np.testing.assert_array_equal(grad[~where], 0.0)


@every_loss
def test_a_batch_that_is_masked_whole(name):
  where = np.zeros(BATCH, bool)
  values, grads = run(
    name, with_rows(inputs(name), ~where, np.nan, -100), where
  )
  for array in (values, *grads.values()):
    np.testing.assert_array_equal(array, 0.0)


@every_loss
def test_no_mask_is_a_mask_of_ones(name):
  arrays = inputs(name)
  expected, _ = run(name, arrays)
  np.testing.assert_allclose(call(name, arrays), expected, rtol=1e-6, atol=1e-6)


# Values and gradients


def harsh(name: str) -> Iterator[tuple[str, Arrays]]:
  """Inputs that naive code turns into NaN."""
  arrays = inputs(name)
  keys = floats(arrays)
  signs = {key: np.sign(arrays[key]) for key in keys}
  first = arrays[keys[0]]

  def each(change: Callable[[str, np.ndarray], np.ndarray]) -> Arrays:
    return arrays | {
      key: np.asarray(change(key, arrays[key]), np.float32) for key in keys
    }

  # 9984 is 1e4 as bfloat16 has it.
  yield "sigma 60", each(lambda key, x: 30 * x)
  yield "+-1e4", each(lambda key, x: 9984 * signs[key])
  yield (
    "+-1e4, opposite",
    each(lambda key, x: 9984 * signs[keys[0]] * (-1) ** keys.index(key)),
  )
  yield "gap 200", each(lambda key, x: 100 * signs[key])
  yield "an offset of 1e4", each(lambda key, x: x + 9984)
  yield "tiny", each(lambda key, x: 1e-30 * x)
  yield "zeros", each(lambda key, x: 0 * x)
  yield "equal examples", each(lambda key, x: np.broadcast_to(x[:1], x.shape))
  yield (
    "student equals teacher",
    each(lambda key, x: first if x.shape == first.shape else x),
  )

  absent = (np.arange(CLASSES) + np.arange(BATCH)[:, None]) % CLASSES < 2
  logits = [key for key in keys if key.endswith("logits")]
  if not logits:
    return
  change = lambda keys, mask: (
    arrays | {key: np.where(mask, -np.inf, arrays[key]) for key in keys}
  )
  yield "absent classes", change(logits, absent)
  yield "no class at all", change(logits, True)
  for key in logits:
    yield f"classes absent in {key} alone", change([key], absent)
    yield f"no class at all in {key} alone", change([key], True)


@every_loss
def test_harsh_inputs_give_finite_values_and_gradients(name):
  swept = {key: other_scalars(name)[key] for key in scalars(name)}
  for case, arrays in harsh(name):
    for options in ({}, swept):
      values, grads = run(name, arrays, **options)
      assert np.all(np.isfinite(values)), f"{case}: {values}"
      for key in floats(arrays):
        finite = np.isfinite(grads[key])
        assert np.all(finite), f"{case}: gradient of {key}: {grads[key]}"


@every_loss
def test_broken_inputs_are_not_hidden(name):
  arrays = inputs(name)
  for key in floats(arrays):
    broken = arrays | {key: arrays[key].copy()}
    broken[key][3] = np.nan
    values, _ = run(name, broken)
    assert np.isnan(values[3]), key


@every_loss
def test_gradients_are_those_of_the_values(name):
  arrays, options = inputs(name), other_scalars(name)
  options = {key: options[key] for key in scalars(name)}
  _, grads = run(name, arrays, **options)
  rng = np.random.default_rng(1)
  step = 2.0**-7
  for key, grad in grads.items():
    assert np.any(grad != 0), f"the gradient of {key} is stopped"
    direction = rng.normal(size=grad.shape).astype(np.float32)
    sides = []
    for sign in (1, -1):
      moved = arrays | options
      moved[key] = moved[key] + sign * step * direction
      values, _ = run(
        name,
        {k: moved[k] for k in arrays},
        **{k: moved[k] for k in options},
      )
      sides.append(values.astype(np.float64).sum())
    slope = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(
      (grad * direction).sum(), slope, rtol=1e-2, atol=1e-2
    )


# Transformations


@every_loss
def test_scalars_are_traced_and_agree_with_numbers(name):
  arrays, options = inputs(name), other_scalars(name)
  expected = call(name, arrays, **options)
  values = jax.jit(bound(name))(*arrays.values(), **options)
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
  if not scalars(name):
    return
  default, _ = run(name, arrays)
  compiled = program(name)._cache_size()
  swept = {key: options[key] for key in scalars(name)}
  values, _ = run(name, arrays, **swept)
  assert program(name)._cache_size() == compiled
  assert np.any(values != default)
  np.testing.assert_allclose(
    values, call(name, arrays, **swept), rtol=1e-5, atol=1e-6
  )


@every_loss
@pytest.mark.parametrize("bad", [0, -1.0, np.nan, np.inf])
def test_temperatures(name, bad):
  for key in parameters(name):
    if not key.endswith("temperature"):
      continue
    with pytest.raises(ValueError, match=f"^{key} is .*above 0"):
      traced_shape(name, inputs(name), **{key: bad})
    if key in scalars(name):
      values, _ = run(name, inputs(name), **{key: bad})
      assert np.all(np.isnan(values))


@every_loss
def test_vmap_is_a_loop(name):
  seeds = [inputs(name, seed) for seed in range(3)]
  stacked = [np.stack([x[key] for x in seeds]) for key in seeds[0]]
  values = jax.jit(jax.vmap(bound(name)))(*stacked)
  expected = [run(name, arrays)[0] for arrays in seeds]
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


@every_loss
def test_pmap_is_one_device(name):
  """With 8 devices; relational losses gather their partners by axis_name."""
  assert jax.local_device_count() == BATCH
  arrays = inputs(name)
  where = np.arange(BATCH) % 3 != 0
  options = {}
  if "axis_name" in parameters(name):
    options["axis_name"] = "batch"
  split = lambda x: x.reshape(BATCH, 1, *x.shape[1:])
  values = jax.pmap(
    lambda where, *arrays: bound(name)(*arrays, where=where, **options),
    axis_name="batch",
  )(split(where), *map(split, arrays.values()))
  expected, _ = run(name, arrays, where)
  np.testing.assert_allclose(np.ravel(values), expected, rtol=1e-5, atol=1e-6)
