"""The contract of every public loss.

Losses are found by themselves: what `kd_jax.losses` exports is tested here. A
loss whose arguments have new names needs an entry in INPUTS (or in one of the
tables beside it), not a test; without one it fails. To try losses of your own,
KD_LOSSES=my_package.my_module pytest tests/contracts/test_losses.py

Each loss is compiled once as a program for values and gradients, with all its
scalars and its mask traced, and most tests share that program.
"""

from collections.abc import Callable, Iterator
import functools
import importlib
import inspect
import os
import pkgutil
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import banks, losses

BATCH, CLASSES = 8, 5

# An argument that is a tuple of arrays has one entry for each: "name/0".
Arrays = dict[str, np.ndarray]


class Input(NamedTuple):
  """What an argument looks like.

  Attributes:
    shape: of the array, or a tuple of shapes for a tuple of arrays.
    batch: the axis of the examples; None: a parameter, the same for all.
    draw: makes an array of that shape; None: normal, with a deviation of 2.
      Only arguments without it are replaced by harsh values.
  """

  shape: tuple[Any, ...]
  batch: int | None = 0
  draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = (
    None
  )


def _integers(high: int) -> Callable[..., np.ndarray]:
  return lambda rng, shape: rng.integers(high, size=shape).astype(np.int32)


def _log_probs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Of the first classes of a distribution over more."""
  logits = rng.normal(size=(*shape[:-1], shape[-1] + 2))
  total = np.log(np.exp(logits).sum(-1, keepdims=True))
  return (logits - total)[..., : shape[-1]]


def _distinct(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  order = rng.random((*shape[:-1], CLASSES)).argsort(-1)
  return order[..., : shape[-1]].astype(np.int32)


def _positive(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  return rng.uniform(0.1, 1.0, size=shape)


def _negative(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  return -_positive(rng, shape)


def _directions(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  rows = rng.normal(size=shape)
  rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
  return rows.astype(np.float32)


INPUTS: dict[str, Input] = {
  "logits": Input((BATCH, CLASSES)),
  "features": Input((BATCH, 4, 4, CLASSES)),
  "embeddings": Input((BATCH, 6)),
  "hidden": Input((BATCH, 3, 4)),
  "factor": Input((BATCH, 4, 4, CLASSES)),
  "mean": Input((BATCH, 4, 4, CLASSES)),
  "log_scale": Input((CLASSES,), batch=None),
  "pair": Input(((BATCH, 4, 4, 3), (BATCH, 4, 4, CLASSES))),
  # Heads come before tokens, queries before keys.
  "attention": Input((BATCH, 2, 3, 3)),
  "values": Input((BATCH, 2, 3, 4)),
  "vectors": Input((BATCH, 3, 4)),
  "log_probs": Input((BATCH, 3), draw=_log_probs),
  "indices": Input((BATCH, 3), draw=_distinct),
  "weights": Input((BATCH, 3), draw=_positive),
  "index": Input((BATCH,), draw=_integers(BATCH)),
  "negatives": Input((BATCH, 4), draw=_integers(BATCH)),
  "labels": Input((BATCH,), draw=_integers(CLASSES)),
}
# Arguments of one loss that are not what their name says elsewhere.
SPECIAL: dict[tuple[str, str], Input] = {
  ("mutual_kl", "teacher_logits"): Input((3, BATCH, CLASSES), batch=1),
  ("early_exit_kl", "student_logits"): Input((3, BATCH, CLASSES), batch=1),
  ("linear_divergence", "student_hidden"): Input((BATCH, 4)),
  ("linear_divergence", "student_head"): Input((4, CLASSES), batch=None),
  ("linear_divergence", "teacher_hidden"): Input((BATCH, 3)),
  ("linear_divergence", "teacher_head"): Input((3, CLASSES), batch=None),
  ("ofd", "margin"): Input((CLASSES,), batch=None, draw=_negative),
}
# Values of keyword-only arguments that have no default and stay as they are.
REQUIRED: dict[str, Any] = {
  "bank": banks.CRDBank(
    *(_directions(np.random.default_rng(side), (BATCH, 6)) for side in (1, 2)),
    log_z_student=np.float32(0.5),
    log_z_teacher=np.float32(-0.5),
  ),
  "num_heads": 2,
  "divergence": losses.kl,
  "chunk_size": 3,
}
# Scalars whose default is None, beside those whose default is a float.
OPTIONAL_SCALARS = {"teacher_temperature": 1.5}
# Losses with one value per token, not per example.
OUTPUT_SHAPES: dict[str, tuple[int, ...]] = {
  "cosine_distance": (BATCH, 4, 4),
  "attention_mse": (BATCH, 3),
  "attention_kl": (BATCH, 3),
  "value_relation": (BATCH, 3),
  "relation_kl": (BATCH, 3),
  "hidden_mse": (BATCH, 3),
}
# Axes in which student and teacher may differ: from this one on.
FREE_AXES: dict[str, int] = {
  "attention_transfer": 3,
  "nst": 3,
  "crd": 1,  # any number of negatives
  "relation_kl": 2,
  "value_relation": 3,
  "rkd_distance": 1,
  "rkd_angle": 1,
  "similarity_preserving": 1,
  "correlation_congruence": 1,
  "pkt": 1,
  "procrustes": 1,
}
# Losses whose gradient is not that of their value, and in which argument: a
# weight that the method takes as a constant, or a mere sign. Tests of their
# own watch these.
NOT_THE_SLOPE: dict[str, set[str]] = {
  "activation_boundary": {"teacher_features"},
  "crd": {"momentum"},  # of the bank that is returned
  "adaptive_kl": {
    "student_logits",
    "teacher_logits",
    "temperature",
    "head_mass",
  },
  "concrete_score": {"student_logits", "teacher_logits", "temperature"},
}

PUBLIC = {
  name: value
  for module in [losses.__name__, *os.environ.get("KD_LOSSES", "").split()]
  for name, value in vars(importlib.import_module(module)).items()
  if inspect.isfunction(value) and not name.startswith("_")
}
# Sums over the examples of what another loss gives, which is tested here; that
# they are its sums, tests of their own show.
SUMS = {"linear_divergence_sum"}
every_function = pytest.mark.parametrize("name", PUBLIC)
every_loss = pytest.mark.parametrize(
  "name", [name for name in PUBLIC if name not in SUMS]
)


def parameters(name: str) -> dict[str, inspect.Parameter]:
  return dict(inspect.signature(PUBLIC[name]).parameters)


def positional(name: str) -> list[str]:
  return [
    key
    for key, parameter in parameters(name).items()
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
  ]


def required(name: str) -> list[str]:
  """Keyword-only arguments without a default."""
  return [
    key
    for key, parameter in parameters(name).items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    and parameter.default is inspect.Parameter.empty
  ]


def input_of(name: str, key: str) -> Input | None:
  """What to give for an argument, or None."""
  argument = key.split("/")[0]
  for known in ((name, argument), argument):
    found = (SPECIAL if isinstance(known, tuple) else INPUTS).get(known)
    if found is not None:
      return found
  side = re.sub("^(student|teacher)_", "", argument)
  return INPUTS.get(side)


def batch_axis(name: str, key: str) -> int | None:
  found = input_of(name, key)
  assert found is not None
  return found.batch


def call(name: str, arrays: dict[str, Any], **options: Any) -> jax.Array:
  """The loss of named arrays: jax sorts dictionaries, so by name it is."""
  arguments: dict[str, Any] = {}
  for key in sorted(arrays):
    argument, *index = key.split("/")
    if index:
      arguments[argument] = (*arguments.get(argument, ()), arrays[key])
    else:
      arguments[argument] = arrays[key]
  for key in required(name):
    if key not in arguments:
      assert key in REQUIRED, f"add {key} to INPUTS or REQUIRED in {__file__}"
      options[key] = REQUIRED[key]
  inputs = [arguments.pop(key) for key in positional(name)]
  result = PUBLIC[name](*inputs, **arguments, **options)
  # A loss with a state gives (values, new state).
  return result[0] if isinstance(result, tuple) else result


def inputs(name: str, seed: int = 0) -> Arrays:
  """Ordinary arguments, by name and in order."""
  rng = np.random.default_rng(seed)
  arrays: Arrays = {}
  for key in positional(name) + required(name):
    found = input_of(name, key)
    if found is None:
      assert key in REQUIRED, f"add {key} to INPUTS in {__file__}"
      continue
    shape = found.shape
    several = bool(shape) and isinstance(shape[0], tuple)
    for i, one in enumerate(shape if several else [shape]):
      draw = found.draw or (lambda rng, shape: 2 * rng.normal(size=shape))
      array = draw(rng, one)
      if array.dtype.kind == "f":
        array = array.astype(np.float32)
      arrays[f"{key}/{i}" if several else key] = array
  return arrays


def floats(arrays: Arrays) -> list[str]:
  return [key for key, x in arrays.items() if x.dtype.kind == "f"]


def harsh_keys(name: str, arrays: Arrays) -> list[str]:
  """The arguments that may hold any numbers."""
  return [
    key
    for key in floats(arrays)
    if (found := input_of(name, key)) is not None and found.draw is None
  ]


def output_shape(name: str) -> tuple[int, ...]:
  return OUTPUT_SHAPES.get(name, (BATCH,))


def mask(name: str, rows: np.ndarray) -> np.ndarray:
  """The mask that takes whole examples out."""
  shape = output_shape(name)
  return np.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape)


def scalars(name: str) -> dict[str, float]:
  """The traceable scalars at their defaults."""
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


def value_and_grads(name: str, **static: Any) -> Callable[..., Any]:
  """(values, gradients by float argument and scalar) of the summed loss."""

  def run(arrays, where, scalars):
    varied = scalars | {key: arrays[key] for key in floats(arrays)}

    def total(varied):
      options = {key: varied[key] for key in scalars}
      if where is not None:
        options["where"] = where
      varied = {key: x for key, x in varied.items() if key not in scalars}
      values = call(name, arrays | varied, **options, **static)
      return jnp.sum(values), values

    grads, values = jax.grad(total, has_aux=True)(varied)
    return values, grads

  return run


@functools.cache
def program(name: str) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """The same, compiled with everything traced."""
  return jax.jit(value_and_grads(name))


def run(name: str, arrays: Arrays, rows: np.ndarray | None = None, **options):
  """Values and gradients; `rows` [batch] bool, the valid examples."""
  if rows is None:
    rows = np.ones(BATCH, bool)
  options = scalars(name) | options
  values, grads = program(name)(
    {key: jnp.asarray(x) for key, x in arrays.items()},
    mask(name, rows),
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
    path = f"kd_jax.losses.{module.name}"
    for name, value in vars(importlib.import_module(path)).items():
      public = inspect.isfunction(value) and not name.startswith("_")
      if public and value.__module__ == path:  # not typing.NamedTuple
        assert PUBLIC.get(name) is value, (
          f"{module.name}.{name} is not exported"
        )


@every_function
def test_signature(name):
  assert not name.endswith("_loss")
  order = ["student", "teacher", "labels"]
  # The scale of a variational student's noise is its own parameter.
  kinds = [
    "student" if key == "log_scale" else key.split("_")[0]
    for key in positional(name)
  ]
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
  returned = inspect.signature(PUBLIC[name]).return_annotation
  returned = returned if isinstance(returned, str) else repr(returned)
  assert re.search(r"^(tuple\[)?(<class ')?jax\.(jaxlib.*\.)?Array", returned)
  assert parameters(name)["where"].default is None
  forbidden = {"alpha", "z", "q"}
  if name not in ("attention_transfer", "factor_transfer"):  # their exponent
    forbidden.add("p")
  assert not forbidden & parameters(name).keys()


@every_function
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
  high = {
    key: jnp.asarray(x, jnp.float32) if x.dtype == dtype else x
    for key, x in low.items()
  }
  values = traced_shape(name, low)
  assert values.dtype == jnp.float32
  assert values.shape == output_shape(name)
  # Computed in float32, not only returned in it.
  values, grads = program(name)(low, mask(name, np.ones(BATCH, bool)), {})
  expected, _ = program(name)(high, mask(name, np.ones(BATCH, bool)), {})
  np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)
  # A gradient has the dtype of its argument.
  assert all(grad.dtype == dtype for grad in grads.values())


@every_loss
def test_no_broadcasting(name):
  arrays = inputs(name)
  assert traced_shape(name, arrays).shape == output_shape(name)
  for key, x in arrays.items():
    if key == next(iter(arrays)):
      continue
    partner = key.replace("teacher_", "student_")
    if partner not in arrays or partner == key:
      partner = next(iter(arrays))
    wrong = {
      (*x.shape[:-1], 1),
      (*x.shape, 1),
      (1, *x.shape),
      (1, *x.shape[1:]),
      (x.shape[0] - 1, *x.shape[1:]),
      (1,),
      (),
    }
    if batch_axis(name, key) == 1:  # a stack of any number
      wrong -= {(1, *x.shape[1:]), (x.shape[0] - 1, *x.shape[1:])}
    free = FREE_AXES.get(name, x.ndim)
    for shape in wrong - {x.shape}:
      if shape[:free] == x.shape[:free] and (
        len(shape) == x.ndim or free < x.ndim - 1
      ):
        continue
      bad = arrays | {key: jnp.zeros(shape, x.dtype)}
      with pytest.raises(ValueError) as error:
        traced_shape(name, bad)
      for text in (key, str(shape), partner, str(arrays[partner].shape)):
        text = text.split("/")[0]
        assert text in str(error.value), f"{shape}: {error.value}"
      assert "\n" not in str(error.value)


@every_loss
def test_dtypes(name):
  arrays = inputs(name)
  for key, x in arrays.items():
    wrong = [jnp.bool_, jnp.complex64]
    wrong += [jnp.int32, jnp.uint8] if key in floats(arrays) else [jnp.float32]
    for dtype in wrong:
      with pytest.raises(TypeError, match=key.split("/")[0]):
        traced_shape(name, arrays | {key: jnp.zeros(x.shape, dtype)})


@every_loss
def test_a_mask_of_the_wrong_kind(name):
  arrays, right = inputs(name), output_shape(name)
  for shape in {(1,), (), (*right, 1), (1, *right), (BATCH - 1, *right[1:])}:
    with pytest.raises(ValueError, match="where has shape"):
      traced_shape(name, arrays, where=jnp.ones(shape, bool))
  for dtype in (jnp.int32, jnp.float32):
    with pytest.raises(TypeError, match="where has dtype"):
      traced_shape(name, arrays, where=jnp.ones(right, dtype))


# Masks


def with_rows(
  name: str, arrays: Arrays, rows: np.ndarray, fill: float, label: int
) -> Arrays:
  """The inputs with some examples replaced."""
  changed = {}
  for key, x in arrays.items():
    changed[key] = x.copy()
    axis = batch_axis(name, key)
    if axis is not None:
      by_example = np.moveaxis(changed[key], axis, 0)
      by_example[rows] = fill if x.dtype.kind == "f" else label
  return changed


@every_loss
@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf, 3e38])
def test_masked_examples_are_zero_and_get_no_gradient(name, fill):
  arrays = inputs(name)
  rows = np.arange(BATCH) % 3 != 0
  neutral = with_rows(name, arrays, ~rows, 0.5, 0)
  expected, expected_grads = run(name, neutral, rows)
  assert np.all(np.isfinite(expected)) and np.any(expected[rows] != 0)
  broken = with_rows(name, arrays, ~rows, fill, -100)
  values, grads = run(name, broken, rows)
  np.testing.assert_array_equal(values[~rows], 0.0)
  np.testing.assert_array_equal(values, expected)
  for key, grad in grads.items():
    np.testing.assert_array_equal(grad, expected_grads[key])
    if key in arrays and batch_axis(name, key) is not None:
      by_example = np.moveaxis(grad, batch_axis(name, key), 0)
      np.testing.assert_array_equal(by_example[~rows], 0.0)


@every_loss
def test_a_batch_that_is_masked_whole(name):
  rows = np.zeros(BATCH, bool)
  arrays = with_rows(name, inputs(name), ~rows, np.nan, -100)
  values, grads = run(name, arrays, rows)
  for array in (values, *grads.values()):
    np.testing.assert_array_equal(array, 0.0)


@every_loss
def test_one_example_is_a_batch(name):
  rows = np.arange(BATCH) == 2
  values, grads = run(name, inputs(name), rows)
  for array in (values, *grads.values()):
    assert np.all(np.isfinite(array))


@every_loss
def test_masked_examples_are_left_out(name):
  """As if they had never been in the batch, nor anyone's partner."""
  arrays = inputs(name)
  rows = np.arange(BATCH) % 3 != 0
  short = {
    key: x
    if (axis := batch_axis(name, key)) is None
    else np.compress(rows, x, axis)
    for key, x in arrays.items()
  }
  expected = jax.jit(lambda arrays: call(name, arrays))(short)
  values, _ = run(name, arrays, rows)
  np.testing.assert_allclose(values[rows], expected, rtol=1e-5, atol=1e-6)


@every_loss
def test_the_order_of_the_examples_does_not_matter(name):
  arrays = inputs(name)
  order = np.random.default_rng(3).permutation(BATCH)
  moved = {
    key: x
    if (axis := batch_axis(name, key)) is None
    else np.take(x, order, axis)
    for key, x in arrays.items()
  }
  np.testing.assert_allclose(
    run(name, moved)[0], run(name, arrays)[0][order], rtol=1e-5, atol=1e-6
  )


# Values and gradients


def harsh(name: str) -> Iterator[tuple[str, Arrays]]:
  """Inputs that naive code turns into NaN."""
  arrays = inputs(name)
  keys = harsh_keys(name, arrays)
  signs = {key: np.sign(arrays[key]) for key in keys}

  def each(change: Callable[[str, np.ndarray], np.ndarray]) -> Arrays:
    return arrays | {
      key: np.asarray(change(key, arrays[key]), np.float32) for key in keys
    }

  def like_student(key: str, x: np.ndarray) -> np.ndarray:
    first = arrays.get(key.replace("teacher_", "student_"), x)
    return first if first.shape == x.shape else x

  # 9984 is 1e4 as bfloat16 has it.
  yield "sigma 60", each(lambda key, x: 30 * x)
  yield "+-1e4", each(lambda key, x: 9984 * signs[key])
  yield (
    "+-1e4, opposite",
    each(
      lambda key, x: (
        9984
        * signs[keys[0]].flat[0]
        * (-1) ** keys.index(key)
        * np.ones_like(x)
      )
    ),
  )
  yield "gap 200", each(lambda key, x: 100 * signs[key])
  yield "an offset of 1e4", each(lambda key, x: x + 9984)
  yield "tiny", each(lambda key, x: 1e-30 * x)
  yield "zeros", each(lambda key, x: 0 * x)
  yield "equal examples", each(lambda key, x: np.broadcast_to(x[:1], x.shape))
  yield "student equals teacher", each(like_student)

  logits = [key for key in keys if key.endswith(("logits", "attention"))]
  if not logits:
    return
  # Another pair of classes for each example.
  absent = {
    key: np.indices(arrays[key].shape).sum(0) % arrays[key].shape[-1] < 2
    for key in logits
  }
  change = lambda keys, everywhere=False: (
    arrays
    | {
      key: np.where(absent[key] | everywhere, np.float32(-np.inf), arrays[key])
      for key in keys
    }
  )
  yield "absent classes", change(logits)
  yield "no class at all", change(logits, True)
  for key in logits:
    yield f"classes absent in {key} alone", change([key])
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
    axis = batch_axis(name, key)
    np.moveaxis(broken[key], axis or 0, 0)[3 if axis is not None else 0] = (
      np.nan
    )
    values, _ = run(name, broken)
    assert np.all(np.isnan(values[3])), key


@every_loss
def test_gradients_are_those_of_the_values(name):
  arrays, options = inputs(name), other_scalars(name)
  options = {key: options[key] for key in scalars(name)}
  _, grads = run(name, arrays, **options)
  rng = np.random.default_rng(1)
  step = 2.0**-7
  for key, grad in grads.items():
    if key in NOT_THE_SLOPE.get(name, ()):
      continue
    if key in positional(name) or key in options:
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
      (grad * direction).sum(), slope, rtol=1e-2, atol=1e-2, err_msg=key
    )


# Transformations


@every_loss
def test_scalars_are_traced_and_agree_with_numbers(name):
  arrays, options = inputs(name), other_scalars(name)
  expected = jax.jit(lambda arrays: call(name, arrays, **options))(arrays)
  values = jax.jit(lambda arrays, options: call(name, arrays, **options))(
    arrays, options
  )
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
  if not scalars(name):
    return
  default, _ = run(name, arrays)
  compiled = program(name)._cache_size()
  swept = {key: options[key] for key in scalars(name)}
  values, _ = run(name, arrays, **swept)
  assert program(name)._cache_size() == compiled
  assert np.any(values != default)


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
  stacked = {key: np.stack([x[key] for x in seeds]) for key in seeds[0]}
  values = jax.jit(jax.vmap(lambda arrays: call(name, arrays)))(stacked)
  expected = [run(name, arrays)[0] for arrays in seeds]
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


@every_loss
def test_pmap_is_one_device(name):
  """With 8 devices; relational losses gather their partners by axis_name."""
  assert jax.local_device_count() == BATCH
  arrays = inputs(name)
  rows = np.arange(BATCH) % 3 != 0
  static = {}
  if "axis_name" in parameters(name):
    static["axis_name"] = "batch"
  axes = {key: batch_axis(name, key) for key in arrays}
  # One example per device along the leading axis, parameters everywhere.
  split = {
    key: x if axes[key] is None else np.stack(np.split(x, BATCH, axes[key]))
    for key, x in arrays.items()
  }
  values, grads = jax.pmap(
    value_and_grads(name, **static),
    axis_name="batch",
    in_axes=({key: None if axes[key] is None else 0 for key in axes}, 0, None),
  )(split, mask(name, rows)[:, None], {})
  expected, expected_grads = run(name, arrays, rows)
  np.testing.assert_allclose(
    values.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6
  )
  for key in floats(arrays):
    # Of a parameter, each device has its part of the gradient.
    grad = (
      np.sum(grads[key], 0)
      if axes[key] is None
      else np.concatenate(grads[key], axes[key])
    )
    np.testing.assert_allclose(
      grad, expected_grads[key], rtol=1e-4, atol=1e-5, err_msg=key
    )
