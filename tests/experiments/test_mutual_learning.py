"""Who learns from whom, and through what no gradient flows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.mutual_learning import cifar10
from experiments import mutual_learning
from kd_jax import models, train
from kd_jax.data import augment
from kd_jax.errors import BadInput

CLASSES, SIDE, BATCH = 3, 4, 6
T = 2.0


def view():
  fields = {"crop": "none", "size": SIDE, "padding": 0, "least_area": 1.0}
  return {**fields, "flip": False, "on_host": False}


def row(count=3, **changes):
  peers = ("student",) * count
  return {**cifar10.cohort("", peers).to_dict(), **changes}


def batch(seed=0, step=5):
  rng = np.random.default_rng(seed)
  return {
    "id": np.arange(BATCH, dtype=np.int32),
    "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 1)).astype(np.uint8),
    "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
    "epoch": np.zeros(BATCH, np.int32),
    "step": jnp.int32(step),
  }


def cohort(count=3):
  net = models.create("mlp", CLASSES, hidden=(5,))
  model = models.cohort({f"peer_{i}": net for i in range(count)})
  start = model.init(jax.random.key(1), jnp.zeros((1, SIDE, SIDE, 1)))
  return model, start


def terms_of(settings, start, model, params=None, extra=None, **more):
  loss_fn = mutual_learning.make_loss(model, view(), settings, **more)
  frozen = {
    "view_key": jax.random.key(0),
    "hparams": {"temperature": T, "soft_weight": 0.5, "burn_in": 3},
    "extra": extra,
  }
  params = start["params"] if params is None else params
  state = {"model": start["state"]}
  return loss_fn({"model": params}, state, frozen, batch(), None)[0]


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  return np.sum(p * (np.log(p) - np.log(q)), -1)


def heads_of(model, start):
  out, _ = model.apply(start, augment.whole(jnp.asarray(batch()["image"])))
  return np.float64(out.heads)


@pytest.mark.parametrize("teach", [(), ((0, 1, 0.5), (0, 0, 0), (2, 0, 0))])
def test_the_loss_is_the_papers(teach):
  model, start = cohort()
  terms = terms_of(row(teach=teach), start, model)
  z, label = heads_of(model, start), batch()["label"]
  matrix = np.array(teach) if teach else (1 - np.eye(3)) / 2
  hard = -np.log(softmax(z))[:, np.arange(BATCH), label].sum(0)
  p = softmax(z / T)
  soft = T**2 * sum(
    matrix[i, j] * kl(p[j], p[i]) for i in range(3) for j in range(3)
  )
  np.testing.assert_allclose(terms["hard"].value, hard, rtol=1e-5)
  np.testing.assert_allclose(terms["soft"].value, soft, rtol=1e-4, atol=1e-6)
  assert terms["soft"].weight == 0.5


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_the_mean_of_the_others_can_teach(space):
  model, start = cohort()
  teach = ((0, 3, 1), (0, 0, 0), (1, 1, 0))  # the second listens to nobody
  settings = row(teach=teach, targets=f"mean_{space}")
  terms = terms_of(settings, start, model)
  z, weights = heads_of(model, start), np.array(teach, float)
  soft = 0.0
  for i in (0, 2):
    share = weights[i] / weights[i].sum()
    if space == "probability":
      mean = np.einsum("j,jbc->bc", share, softmax(z / T))
    else:
      mean = softmax(np.einsum("j,jbc->bc", share, z) / T)
    soft = soft + T**2 * kl(mean, softmax(z[i] / T))
  np.testing.assert_allclose(terms["soft"].value, soft, rtol=1e-4, atol=1e-6)


def test_before_the_burn_in_there_are_labels_alone():
  model, start = cohort(2)
  loss_fn = mutual_learning.make_loss(model, view(), row(2))
  frozen = {
    "view_key": jax.random.key(0),
    "hparams": {"temperature": T, "soft_weight": 0.5, "burn_in": 3},
  }
  for step, weight in ((2, 0.0), (3, 0.5)):
    terms, _ = loss_fn(
      {"model": start["params"]},
      {"model": start["state"]},
      frozen,
      batch(step=step),
      None,
    )
    assert terms["soft"].weight == weight


def gradient_of(settings, student, **more):
  """The norm of each peer's gradient by what one peer is taught."""
  model, start = cohort()
  alone = {**settings, "teach": np.zeros((3, 3))}
  alone["teach"][student] = (np.arange(3) != student) / 2
  alone["teach"] = alone["teach"].tolist()
  copies = jax.tree.map(lambda x: 1.1 * x, start["params"])
  extra = {"params": {"model": copies}, "state": {"model": start["state"]}}

  def loss(params):
    found = terms_of(alone, start, model, params, extra, **more)
    return found["soft"].value.mean()

  grads = jax.jit(jax.grad(loss))(start["params"])
  norm = lambda tree: max(
    float(jnp.abs(x).max()) for x in jax.tree.leaves(tree)
  )
  return [norm(grads[f"peer_{i}"]) for i in range(3)]


@pytest.mark.parametrize(
  "kind", ["each", "mean_probability", "mean_logit", "stale"]
)
def test_nobody_is_pulled_towards_a_student(kind):
  found = gradient_of(row(targets=kind), 1)
  assert found[1] > 1e-4
  assert found[0] == found[2] == 0.0


@pytest.mark.parametrize("kind", ["each", "mean_probability", "mean_logit"])
def test_unless_the_config_says_so(kind):
  found = gradient_of(row(targets=kind, differentiate=True), 1)
  assert min(found) > 1e-4


def test_the_mean_of_ones_own_weights_teaches_oneself():
  model, start = cohort()
  copies = jax.tree.map(lambda x: 0.9 * x, start["params"])
  extra = {"params": {"model": copies}, "state": {"model": start["state"]}}
  terms = terms_of(row(targets="ema"), start, model, extra=extra)
  z = heads_of(model, start)
  own = heads_of(model, {**start, "params": copies})
  expected = T**2 * kl(softmax(own / T), softmax(z / T)).sum(0)
  np.testing.assert_allclose(terms["soft"].value, expected, rtol=1e-3)


def tiny(rows, **changes):
  config = cifar10.get_config("peers+family+smoke")
  config.rows, config.devices = rows, 1
  for name in rows:
    config.cohorts[name].epochs = 3.0
  config.update_from_flattened_dict(changes)
  return config


def trained(config, name, images, count=4):
  """The parameters of a cohort after some steps."""
  settings = config.cohorts[name].to_dict()
  net = mutual_learning.network(config, settings, 10, 10)
  s = config.networks[settings["peers"][0]]
  part = images.part
  frozen, feed = part.feed(0, s.batch_size, keys=[train.view_key(0)])
  fields = ("temperature", "soft_weight", "burn_in")
  frozen["hparams"] = {k: settings[k] for k in fields}
  found = net.fit(
    frozen,
    {k: v[:16] for k, v in images.test.evaluated().items()},
    0,
    batch_size=s.batch_size,
    num_steps=count,
    progress=False,
    **feed,
  )
  return jax.device_get(found["params"])


@pytest.fixture(scope="module")
def images():
  return train.load_images(tiny(("alone_2",)))


def assert_close(got, want, rtol=2e-4, atol=2e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    got,
    want,
  )


def test_a_stacked_cohort_is_the_cohort(images):
  config = tiny(("mutual_2",))
  apart = trained(config, "mutual_2", images)
  config.cohorts.mutual_2.stacked = True
  together = trained(config, "mutual_2", images)
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: x[i], together)
    assert_close(one, apart[f"peer_{i}"])


@pytest.mark.parametrize(("devices", "groups"), [(4, 4), (8, 4), (8, 2)])
def test_peers_on_devices_of_their_own_are_the_stacked_cohort(
  images, devices, groups
):
  config = tiny(("mutual_2",), devices=devices)
  config.cohorts.mutual_2.update(
    peers=("student",) * 4, stacked=True, groups=groups
  )
  apart = trained(config, "mutual_2", images)
  config.devices, config.cohorts.mutual_2.groups = 1, 1
  assert_close(apart, trained(config, "mutual_2", images))


def moved_bytes(text):
  """The bytes that each collective of a compiled program gives a device."""
  found = {}
  for line in text.splitlines():
    match = re.search(
      r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|"
      r"reduce-scatter)(?:-start)?\(",
      line,
    )
    if match:
      sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
        for dims in re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1])
      ]
      found[match[2]] = found.get(match[2], 0) + 4 * sum(sizes)
  return found


def exchanged(images, hidden):
  """What a step of four peers on four devices moves between them."""
  config = tiny(("mutual_2",), devices=4)
  config.cohorts.mutual_2.update(peers=("student",) * 4, stacked=True, groups=4)
  config.networks.student.fields.hidden = (hidden,)
  settings = config.cohorts.mutual_2.to_dict()
  net = mutual_learning.network(config, settings, 10, 10)
  batch_size = config.networks.student.batch_size
  frozen, _ = images.part.feed(0, batch_size, keys=[train.view_key(0)])
  fields = ("temperature", "soft_weight", "burn_in")
  frozen["hparams"] = {k: settings[k] for k in fields}
  frozen["view_key"] = train.view_key(0)
  start = net.model.init(
    jax.random.key(0), augment.whole(frozen["data"]["image"][:1])
  )
  state = train.init_state(
    {"model": start["params"]},
    net.optimizer,
    jax.random.key(1),
    model_state={"model": start["state"]},
  )
  runner = net.runner
  index = train.index_batches(0, batch_size, images.part.n)(0)
  placed = runner.replicate(state)
  kernel = placed.params["model"]["Dense_0"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (1, *kernel.shape[1:])
  program = runner._run.lower(
    placed, runner.replicate(frozen), runner.shard(index)
  ).compile()
  return sum(moved_bytes(program.as_text()).values())


def test_peers_on_devices_of_their_own_exchange_logits_only(images):
  """Four times the network, the same bytes; its smallest kernel is more."""
  small, large = exchanged(images, 128), exchanged(images, 512)
  assert 0 < small == large < 4 * 64 * 128


def test_peers_that_do_not_listen_are_trained_as_if_alone(images):
  """Nor do those of a matrix of zeros."""
  config = tiny(("alone_2", "mutual_2"))
  config.cohorts.mutual_2.teach = ((0, 0), (0, 0))
  apart = trained(config, "alone_2", images)
  silent = trained(config, "mutual_2", images)
  assert_close(silent, apart)
  config.cohorts.mutual_2.teach = ((0, 1), (0, 0))
  one_way = trained(config, "mutual_2", images)
  assert_close(one_way["peer_1"], apart["peer_1"])
  with pytest.raises(AssertionError):
    assert_close(one_way["peer_0"], apart["peer_0"])


def test_in_turn_the_second_hears_what_the_first_has_become(images):
  """One step of two turns is a step of the first, then one of the second."""
  config = tiny(("turns", "mutual_2"))
  taken = trained(config, "turns", images, count=1)
  settings = config.cohorts.mutual_2.to_dict()
  model, start = None, None
  net = mutual_learning.network(config, settings, 10, 10)
  model = net.model
  start = model.init(
    jax.random.key(0), augment.whole(images.test.evaluated()["image"][:1])
  )
  s = config.networks.student
  inner = train.optimizer(10, **s.optimizer)
  data = images.part.arrays
  index = train.index_batches(0, s.batch_size, images.part.n)(0)
  rows = {k: v[index["index"]] for k, v in data.items()}
  rows |= {"epoch": index["epoch"], "step": jnp.int32(0)}
  frozen = {
    "view_key": train.view_key(0),
    "hparams": {"temperature": 1.0, "soft_weight": 1.0, "burn_in": 0},
  }
  params = start["params"]
  for peer in ("peer_0", "peer_1"):
    other = {"peer_0": "peer_1", "peer_1": "peer_0"}[peer]

    def loss(own, peer=peer, other=other, params=params):
      both = {peer: own, other: jax.lax.stop_gradient(params[other])}
      settings = row(2)
      loss_fn = mutual_learning.make_loss(
        model, config.view.to_dict(), settings
      )
      state = {"model": start["state"]}
      key = jax.random.fold_in(jax.random.key(0), 1)
      terms, _ = loss_fn({"model": both}, state, frozen, rows, key)
      # What the other learns has no gradient here.
      return sum(term.value.mean() for term in terms.values())

    grads = jax.jit(jax.grad(loss))(params[peer])
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    clip = min(1.0, s.clip_norm / norm)
    grads = jax.tree.map(lambda g, clip=clip: g * clip, grads)
    updates, _ = inner.update(grads, inner.init(params[peer]), params[peer])
    moved = jax.tree.map(jnp.add, params[peer], updates)
    params = {**params, peer: moved}
  assert_close(taken, params)


def test_a_whole_run_with_its_rows(tmp_path):
  config = tiny(("alone_2", "mutual_pair", "stale", "ema"))
  result = mutual_learning.run(config, tmp_path / "run")
  names = [r["name"] for r in result["rows"]]
  pair = "small and large, mutual"
  assert names == [
    "two, each alone",
    "two, each alone: ensemble",
    f"{pair}: small",
    f"{pair}: student",
    f"{pair}: ensemble",
    "two, codistillation",
    "two, codistillation: ensemble",
    "one, mean teacher",
    "one, mean teacher: mean of its weights",
  ]
  lines = train.workdir.read_metrics(tmp_path / "run/seed0/stale/metrics.jsonl")
  assert 0 <= lines[-1]["peer agreement"] <= 1


def test_stale_copies_survive_an_interruption(tmp_path, monkeypatch):
  """Killed between two exchanges, a run ends with the same scores."""
  config = tiny(("stale",))
  config.cohorts.stale.update(exchange_every=4, burn_in=1)
  whole = mutual_learning.run(config, tmp_path / "a")
  config.save_every = "3 steps"
  loop, real = train.loop, train.Checkpoints.save

  def killed(self, step, tree):
    real(self, step, tree)
    if step == 3:
      raise KeyboardInterrupt

  monkeypatch.setattr(loop.Checkpoints, "save", killed)
  with pytest.raises(KeyboardInterrupt):
    mutual_learning.run(config, tmp_path / "b")
  monkeypatch.undo()
  again = mutual_learning.run(config, tmp_path / "b")
  for one, other in zip(whole["rows"], again["rows"], strict=True):
    assert one["details"]["nll"] == other["details"]["nll"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"rows": ("nothing",)}, "rows is 'nothing'"),
    ({"cohorts.turns.targets": "teacher"}, r"cohorts\.turns\.targets is"),
    ({"cohorts.turns.updates": "never"}, r"cohorts\.turns\.updates is"),
    ({"cohorts.turns.teach": ((0, 1),)}, r"cohorts\.turns\.teach is"),
    ({"cohorts.turns.teach": ((0, -1), (1, 0))}, r"cohorts\.turns\.teach is"),
    ({"cohorts.turns.teach": ((1, 0), (1, 0))}, "with 0 on the diagonal"),
    ({"cohorts.turns.peers": ()}, r"cohorts\.turns\.peers is \(\)"),
    ({"cohorts.turns.peers": ("student",)}, "one has nobody to ask"),
    ({"cohorts.turns.peers": ("a", "b")}, r"cohorts\.turns\.peers\[0\] is 'a'"),
    ({"cohorts.turns.stacked": True}, r"cohorts\.turns\.stacked is True"),
    (
      {
        "cohorts.turns.groups": 3,
        "cohorts.turns.stacked": True,
        "cohorts.turns.updates": "together",
      },
      "both the number of peers, 2, and of devices, 1",
    ),
    ({"cohorts.turns.teach": ((0, 1), (1,))}, "should be 2 rows of 2"),
    ({"cohorts.turns.teach": (("a", "b"), ("c", "d"))}, "2 rows of 2"),
    ({"cohorts.turns.groups": 2, "devices": 2}, "unless peers are stacked"),
    ({"cohorts.turns.burn_in": -1}, r"cohorts\.turns\.burn_in is -1"),
    (
      {"rows": ("mutual_pair",), "networks.small.batch_size": 8},
      "peers see the same batches",
    ),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(
  tmp_path, change, message
):
  config = tiny(("turns",))
  for name, value in change.items():
    *groups, field = name.split(".")
    group = config
    for part in groups:
      group = group[part]
    with group.ignore_type():
      group[field] = value
  with pytest.raises(BadInput, match=message) as error:
    mutual_learning.run(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()
