"""Branches and exits: what each classifier sees, and what they say together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
TRUNK = ((8, 3, 2),)
BRANCHES = (((16, 3, 1),), ((16, 3, 1),), ((16, 3, 1),))


def branched(combine, **fields):
  fields = {"trunk": TRUNK, "branches": BRANCHES} | fields
  return models.create("branched", 5, combine=combine, groups=4, **fields)


def outputs(model, seed=1):
  variables = model.init(jax.random.key(seed), IMAGES)
  return variables, model.apply(variables, IMAGES)[0]


def test_a_branch_is_the_network_of_trunk_and_branch():
  variables, out = outputs(branched("mean"))
  params = variables["params"]
  plain = models.create("cnn", 5, layers=(*TRUNK, *BRANCHES[0]), groups=4)
  for i in range(3):
    own = {
      "Conv_0": params["trunk_conv0"],
      "GroupNorm_0": params["trunk_norm0"],
      "Conv_1": params[f"branch{i}_conv0"],
      "GroupNorm_1": params[f"branch{i}_norm0"],
      "Dense_0": params[f"head{i}"],
    }
    alone = plain.apply({"params": own, "state": {}}, IMAGES)[0].logits
    np.testing.assert_allclose(out.heads[i], alone, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(out.logits, out.heads.mean(0), rtol=1e-6)


def test_a_gate_weighs_the_branches():
  variables, out = outputs(branched("gate"))
  gate = np.float64(out.features["gate"])
  np.testing.assert_allclose(gate.sum(1), 1.0, rtol=1e-6)
  expected = np.einsum("bk,kbc->bc", gate, np.float64(out.heads))
  np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-6)
  assert np.ptp(gate, 0).max() > 1e-4  # it depends on the image
  assert "gate" in variables["params"]


def test_attention_is_between_the_peers_and_moves_no_features():
  model = branched("attention")
  variables, out = outputs(model)
  found = out.features["attention"]
  assert found.shape == (4, 2, 2)
  np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(out.logits, out.heads[-1])

  def total(params):
    out, _ = model.apply({"params": params, "state": {}}, IMAGES)
    return jnp.sum(out.features["attention"][:, 0, 0])

  grads = jax.grad(total)(variables["params"])
  reached = {
    name
    for name, tree in grads.items()
    if any(np.any(leaf) for leaf in jax.tree.leaves(tree))
  }
  assert reached == {"query", "key"}


def test_fusion_sees_all_branches():
  model = branched("fusion")
  variables, out = outputs(model)
  assert out.logits.shape == (4, 5)

  def total(params):
    out, _ = model.apply({"params": params, "state": {}}, IMAGES)
    return jnp.sum(out.logits**2)

  grads = jax.grad(total)(variables["params"])
  for i in range(3):
    assert np.any(grads[f"branch{i}_conv0"]["kernel"])
    assert not np.any(grads[f"head{i}"]["kernel"])


STAGES = (((8, 3, 1),), ((8, 3, 2),), ((16, 3, 2),))


def test_an_exit_sees_only_what_lies_before_it():
  model = models.create("multi_exit", 5, stages=STAGES, groups=4)
  variables, out = outputs(model)
  assert out.heads.shape == (3, 4, 5)
  assert out.features["exits"].shape == (3, 4, 16)
  np.testing.assert_array_equal(out.logits, out.heads[-1])

  def total(params, i):
    out, _ = model.apply({"params": params, "state": {}}, IMAGES)
    return jnp.sum(out.heads[i] ** 2)

  for i in range(3):
    grads = jax.grad(total)(variables["params"], i)
    reached = {
      name
      for name, tree in grads.items()
      if any(np.any(leaf) for leaf in jax.tree.leaves(tree))
    }
    stages = {name[5] for name in reached if name.startswith("stage")}
    assert stages == {str(j) for j in range(i + 1)}
    exits = {name[4] for name in reached if name.startswith("exit")}
    assert exits == ({str(i)} if i < 2 else set())


def test_a_program_of_one_exit_leaves_out_what_lies_behind():
  model = models.create("multi_exit", 5, stages=STAGES, groups=4)
  variables, _ = outputs(model)

  def flops(i):
    run = jax.jit(lambda v, x: model.apply(v, x)[0].heads[i])
    return run.lower(variables, IMAGES).compile().cost_analysis()["flops"]

  whole = jax.jit(lambda v, x: model.apply(v, x)[0].heads)
  total = whole.lower(variables, IMAGES).compile().cost_analysis()["flops"]
  assert 0 < flops(0) < 0.9 * total
  assert 0 < flops(1) < 0.9 * total


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("branched", {"combine": "sum"}, "combine is 'sum'"),
    ("branched", {"branches": ()}, "branches has 0 branches"),
    (
      "branched",
      {"branches": BRANCHES[:2], "combine": "attention"},
      "attention needs at least 3",
    ),
    ("branched", {"trunk": ((6, 3, 1),)}, "layers has 6 channels"),
    (
      "branched",
      {"branches": (((8, 3, 1),), ((8, 3, 2),)), "combine": "fusion"},
      "maps of different sizes",
    ),
    ("multi_exit", {"stages": STAGES[:1]}, "stages has 1"),
  ],
)
def test_bad_fields(name, fields, message):
  model = models.create(name, 5, **({"groups": 4} | fields))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), IMAGES)
