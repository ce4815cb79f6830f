"""The transformer language model against a float64 NumPy forward."""

import math

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.models import GPT, create
from tests.models.networks import random_variables

VOCABULARY, HEADS = 11, 2
TINY = {"width": 6, "depth": 2, "heads": HEADS, "max_length": 9}


def norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  return x * p["scale"] + p["bias"]


def attention(x, p):
  """One place after the other, which looks back."""
  q, k, v = (
    np.einsum("btw,whd->bthd", x, p[name]["kernel"]) + p[name]["bias"]
    for name in ("query", "key", "value")
  )
  out = np.zeros_like(q)
  for t in range(x.shape[1]):
    seen = slice(t + 1)
    scores = np.einsum("bhd,bkhd->bhk", q[:, t], k[:, seen])
    scores = np.exp(scores / q.shape[-1] ** 0.5)
    scores /= scores.sum(-1, keepdims=True)
    out[:, t] = np.einsum("bhk,bkhd->bhd", scores, v[:, seen])
  kernel, bias = p["out"]["kernel"], p["out"]["bias"]
  return np.einsum("bthd,hdw->btw", out, kernel) + bias


def mlp(x, p):
  x = x @ p["fc1"]["kernel"] + p["fc1"]["bias"]
  x *= (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
  return x @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def hidden(tokens, p):
  x = p["embedding"]["embedding"][tokens] + p["positions"][: tokens.shape[1]]
  for number in range(1, 1 + sum(name.startswith("block") for name in p)):
    block = p[f"block{number}"]
    x = x + attention(norm(x, block["norm1"]), block["attention"])
    x = x + mlp(norm(x, block["norm2"]), block["mlp"])
  return norm(x, p["norm"])


def words(batch, time):
  return np.random.default_rng(0).integers(VOCABULARY, size=(batch, time))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def network(request):
  """A model with numbers that make every part count, and its outputs."""
  module = GPT(VOCABULARY, **TINY, tied=request.param)
  tokens = words(3, 7)
  variables = random_variables(module, tokens)
  apply = jax.jit(create("gpt", VOCABULARY, **TINY, tied=request.param).apply)
  model = variables | {"state": {}}
  return apply, model, tokens, apply(model, tokens)[0]


def head_of(params):
  if "logits" in params:
    return params["logits"]["kernel"]
  return params["embedding"]["embedding"].T


def test_it_is_what_numpy_computes(network):
  _, variables, tokens, out = network
  params = jax.tree.map(np.float64, variables["params"])
  expected = hidden(tokens, params)
  assert out.logits.shape == (3, 7, VOCABULARY)
  assert out.logits.dtype == jnp.float32
  np.testing.assert_allclose(
    out.features["hidden"], expected, rtol=1e-4, atol=1e-5
  )
  expected = expected @ head_of(params)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-5)


def test_logits_depend_on_the_tokens_up_to_theirs(network):
  apply, variables, tokens, out = network
  for t in (0, 3, 6):
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % VOCABULARY
    apart = np.abs(apply(variables, changed)[0].logits - out.logits).max((0, 2))
    np.testing.assert_array_equal(apart[:t], 0)
    assert (apart[t:] > 1e-4).all()


def test_windows_do_not_know_of_each_other_nor_of_what_comes(network):
  apply, variables, tokens, out = network
  backwards = apply(variables, tokens[::-1])[0].logits[::-1]
  np.testing.assert_allclose(backwards, out.logits, rtol=1e-5, atol=1e-6)
  shorter = apply(variables, tokens[:, :4])[0].logits
  np.testing.assert_allclose(shorter, out.logits[:, :4], rtol=1e-4, atol=1e-5)


def test_a_divergence_of_the_hidden_states_is_that_of_the_logits(network):
  """With its gradients: what a method with a large vocabulary trains on."""
  _, variables, tokens, _ = network
  tied = "logits" not in variables["params"]
  model = create("gpt", VOCABULARY, **TINY, tied=tied)
  other = jax.tree.map(lambda x: 0.9 * x, variables)

  def apply(params):
    out, _ = model.apply({"params": params, "state": {}}, tokens)
    return out.logits, (out.features["hidden"], head_of(params))

  def of_logits(params):
    return losses.kl(apply(params)[0], apply(other["params"])[0]).sum()

  def of_hidden(params):
    student, teacher = apply(params)[1], apply(other["params"])[1]
    return losses.linear_divergence_sum(
      *student, *teacher, divergence=losses.kl, chunk_size=4
    )

  plain, chunked = (
    jax.jit(jax.value_and_grad(f))(variables["params"])
    for f in (of_logits, of_hidden)
  )
  assert plain[0] > 0.01
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    *(plain, chunked),
  )


def test_a_fresh_network_says_little_and_learns_everywhere():
  module = GPT(VOCABULARY, **TINY)
  tokens = words(3, 7)
  variables = jax.jit(module.init)(jax.random.key(0), tokens)

  @jax.jit
  def loss(params):
    logits = module.apply({"params": params}, tokens[:, :-1]).logits
    return losses.cross_entropy(logits, tokens[:, 1:]).mean()

  found, gradient = jax.value_and_grad(loss)(variables["params"])
  assert abs(found - math.log(VOCABULARY)) < 0.1
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    # Softmax does not see what a query has in common with all keys.
    if "key']['bias" not in jax.tree_util.keystr(path):
      assert np.abs(leaf).max() > 1e-7, path


def test_dropout():
  model = create("gpt", VOCABULARY, **TINY, dropout=0.5)
  tokens = words(2, 3)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  program = jax.make_jaxpr(lambda v, x: model.apply(v, x))(shapes, tokens)
  assert "random" not in str(program)
  program = jax.make_jaxpr(
    lambda v, x: model.apply(v, x, train=True, key=jax.random.key(0))
  )(shapes, tokens)
  # Of the embeddings, and of what each of two layers in two blocks adds.
  assert str(program).count("random_bits[") == 5
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    jax.eval_shape(lambda v, x: model.apply(v, x, train=True), shapes, tokens)


def test_bfloat16_inside_float32_outside():
  module = GPT(VOCABULARY, **TINY, dtype=jnp.bfloat16)
  shapes = jax.eval_shape(module.init, jax.random.key(0), words(1, 2))
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  out = jax.eval_shape(module.apply, shapes, words(1, 2))
  assert out.logits.dtype == out.features["hidden"].dtype == jnp.float32


@pytest.mark.parametrize(
  ("change", "inputs", "message"),
  [
    ({"depth": 0}, words(1, 2), "depth is 0; it should be at least 1"),
    ({"heads": 4}, words(1, 2), "width is 6; it should be a multiple of heads"),
    ({}, words(1, 10), "inputs have 10 tokens; they should have at most max_"),
    ({}, words(1, 2)[0], r"inputs have shape \(2,\); it should be \[batch"),
    ({}, np.float32(words(1, 2)), "inputs are float32; they should be integer"),
  ],
)
def test_bad_arguments(change, inputs, message):
  module = GPT(VOCABULARY, **(TINY | change))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), inputs)
