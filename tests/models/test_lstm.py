"""The LSTM language model against a float64 NumPy recurrence."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import LSTMLanguageModel, count_parameters, create

VOCABULARY = 11


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def recurrence(x, cell):
  """Sec. 3 of the paper, one step after the other; x is [batch, time, n]."""
  c = h = np.zeros((len(x), cell["hi"]["kernel"].shape[1]))
  outputs = []
  for t in range(x.shape[1]):
    gate = {
      name: x[:, t] @ cell[f"i{name}"]["kernel"]
      + h @ cell[f"h{name}"]["kernel"]
      + cell[f"h{name}"]["bias"]
      for name in "ifgo"
    }
    c = sigmoid(gate["f"]) * c + sigmoid(gate["i"]) * np.tanh(gate["g"])
    h = sigmoid(gate["o"]) * np.tanh(c)
    outputs.append(h)
  return np.stack(outputs, axis=1)


def network(tokens, p):
  x = p["embedding"]["embedding"][tokens]
  for number in range(1, 1 + sum(name.startswith("lstm") for name in p)):
    x = recurrence(x, p[f"lstm{number}"]["cell"])
  if "logits" in p:
    return x @ p["logits"]["kernel"] + p["logits"]["bias"]
  return x @ p["embedding"]["embedding"].T + p["bias"]


def words(batch, time):
  return np.random.default_rng(0).integers(VOCABULARY, size=(batch, time))


def drawn(**fields):
  """A small network, with values so large that all gates move."""
  module = LSTMLanguageModel(VOCABULARY, **({"width": 6} | fields))
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
  )
  return module, jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape, scale=0.5).astype(np.float32),
    shapes,
  )


@pytest.mark.parametrize(
  "fields", [{}, {"tied": True, "depth": 1}, {"depth": 3}], ids=str
)
def test_it_is_what_numpy_computes(fields):
  module, variables = drawn(**fields)
  tokens = words(3, 7)
  logits = jax.jit(module.apply)(variables, tokens).logits
  assert logits.shape == (3, 7, VOCABULARY) and logits.dtype == jnp.float32
  expected = network(tokens, jax.tree.map(np.float64, variables["params"]))
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_logits_depend_on_the_tokens_up_to_theirs():
  module, variables = drawn()
  time = 6
  tokens = jnp.arange(time)[None]  # A word each, so its row is its place.

  def sums(embedding):
    params = variables["params"] | {"embedding": {"embedding": embedding}}
    logits = module.apply({"params": params}, tokens).logits[0]
    return logits @ jnp.arange(1.0, 1 + VOCABULARY)

  embedding = variables["params"]["embedding"]["embedding"]
  jacobian = jax.jit(jax.jacrev(sums))(embedding)[:, :time]
  moved = np.abs(jacobian).max(-1) > 0
  np.testing.assert_array_equal(moved, np.tri(time, dtype=bool))


def test_windows_do_not_know_of_each_other():
  module, variables = drawn(depth=1)
  tokens = words(4, 5)
  apply = jax.jit(lambda x: module.apply(variables, x).logits)
  np.testing.assert_allclose(
    apply(tokens), apply(tokens[::-1])[::-1], rtol=1e-5, atol=1e-6
  )


def test_evaluation_draws_no_numbers():
  model = create("lstm", VOCABULARY, width=6, dropout=0.5)
  tokens = words(2, 3)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  assert shapes["state"] == {}
  program = jax.make_jaxpr(lambda v, x: model.apply(v, x))(shapes, tokens)
  assert "random" not in str(program)

  def train(v, x):
    return model.apply(v, x, train=True, key=jax.random.key(0))

  # Before each LSTM and before the read-out, outside of the loops.
  program = str(jax.make_jaxpr(train)(shapes, tokens))
  assert program.count("random_bits[") == 3
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    jax.eval_shape(lambda v, x: model.apply(v, x, train=True), shapes, tokens)


def test_dropout_leaves_the_path_through_time_alone():
  module, variables = drawn(depth=1, width=16)
  tokens = words(2, 5)
  logits, seen = jax.jit(
    lambda v, x: module.apply(
      v,
      x,
      train=True,
      rngs={"dropout": jax.random.key(0)},
      capture_intermediates=True,
      mutable=["intermediates"],
    )
  )(variables, tokens)
  (before,), (after,), (out,) = (
    jax.tree.map(np.float64, seen["intermediates"][name]["__call__"])
    for name in ("Dropout_0", "Dropout_1", "lstm1")
  )
  params = jax.tree.map(np.float64, variables["params"])
  kept = params["embedding"]["embedding"][tokens] * 2
  np.testing.assert_allclose(before, np.where(before == 0, 0, kept), rtol=1e-5)
  assert 0.3 < np.mean(before == 0) < 0.7
  masks = (before == 0)[0]
  assert (masks != masks[0]).any()  # Another one at each step.
  expected = recurrence(before, params["lstm1"]["cell"])
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(after, np.where(after == 0, 0, out * 2), rtol=1e-5)
  expected = after @ params["logits"]["kernel"] + params["logits"]["bias"]
  np.testing.assert_allclose(logits.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_all_parameters_start_uniformly(tied):
  # Not jitted: each of the two shapes is compiled once for all parameters.
  module = LSTMLanguageModel(40, width=40, depth=1, tied=tied)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = module.init(jax.random.key(0), tokens)["params"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    assert 0.035 < leaf.max() <= 0.05, path
    assert -0.035 > leaf.min() >= -0.05, path
  # No constant is added to the bias of the gate that forgets, either.
  for name in ("hi", "hf", "hg", "ho"):
    assert abs(params["lstm1"]["cell"][name]["bias"].mean()) < 0.02


@pytest.mark.parametrize(
  ("words", "width", "depth", "tied", "count"),
  [
    # The medium and the large network: 20 and 66 million, 51 with tied
    # embeddings (Press & Wolf 2017).
    (10_000, 650, 2, False, 19_775_200),
    (10_000, 1500, 2, False, 66_022_000),
    (10_000, 1500, 2, True, 51_022_000),
    (50, 200, 3, False, 982_450),
  ],
)
def test_numbers_of_parameters(words, width, depth, tied, count):
  module = LSTMLanguageModel(words, width, depth, tied=tied)
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32)
  )
  cell = 4 * (width * width + width * width + width)
  tables = words * width * (1 if tied else 2) + words
  assert count_parameters(shapes) == tables + depth * cell == count


def test_bfloat16_computes_close_to_float32():
  module, variables = drawn(tied=True)
  half = module.clone(dtype=jnp.bfloat16)
  tokens = words(2, 9)
  logits = jax.jit(half.apply)(variables, tokens).logits
  expected = network(tokens, jax.tree.map(np.float64, variables["params"]))
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected, atol=0.03)


def test_a_token_out_of_the_vocabulary_shows():
  module, variables = drawn(depth=1)
  tokens = words(2, 5)
  tokens[1, 2] = VOCABULARY
  logits = jax.jit(module.apply)(variables, tokens).logits
  expected = np.zeros((2, 5), bool)
  expected[1, 2:] = True
  np.testing.assert_array_equal(np.isnan(logits).all(-1), expected)
  np.testing.assert_array_equal(np.isnan(logits).any(-1), expected)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_classes": 0}, "num_classes is 0; it should be at least 1"),
    ({"width": 0}, "width is 0; it should be at least 1"),
    ({"depth": 0}, "depth is 0; it should be at least 1"),
    ({"init_scale": 0.0}, "init_scale is 0.0; it should be above 0"),
    ({"dropout": 1.0}, r"dropout is 1.0; it should be in \[0, 1\)"),
  ],
)
def test_bad_arguments(change, message):
  module = LSTMLanguageModel(**({"num_classes": 5, "width": 3} | change))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))


@pytest.mark.parametrize(
  ("inputs", "message"),
  [
    (np.zeros((3,), np.int32), r"inputs have shape \(3,\)"),
    (np.zeros((1, 3), np.float32), "inputs are float32; they should be"),
  ],
)
def test_bad_tokens(inputs, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(LSTMLanguageModel(5, 3).init, jax.random.key(0), inputs)
