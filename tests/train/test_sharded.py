"""A teacher of which each device keeps a share; what a step sends."""

import re

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from kd_jax import train
from tests.train.pair import WIDTH, Pair


@pytest.fixture(scope="module")
def pair():
  return Pair()


def on_each(tree):
  """Bytes that the first device holds."""
  return sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(tree))


def test_each_device_holds_its_share(pair):
  placed = pair.runner(sharded=("teacher",)).replicate(
    {"teacher": pair.known, "data": pair.data}
  )
  split, whole = train.split_bytes(pair.known, 8)
  total = sum(x.nbytes for x in jax.tree.leaves(pair.known))
  assert split == WIDTH * WIDTH * 4 / 8  # what is smaller stays whole
  assert 8 * split + whole == total
  assert on_each(placed["teacher"]) == split + whole
  assert on_each(placed["data"]) == sum(x.nbytes for x in pair.data.values())
  everywhere = pair.runner().replicate({"teacher": pair.known})
  assert on_each(everywhere) == total


def test_the_step_takes_an_eighth_of_a_deep_teacher():
  pair = Pair(teacher_depth=12)
  taken = [
    pair.lowered(pair.runner(sharded=sharded)).compile().memory_analysis()
    for sharded in ((), ("teacher",))
  ]
  arguments = [found.argument_size_in_bytes for found in taken]
  split, _ = train.split_bytes(pair.known, 8)
  assert arguments[0] - arguments[1] == 7 * split
  assert split == 11 * WIDTH * WIDTH * 4 / 8


@pytest.mark.parametrize("per_call", [1, 3])
def test_the_program_lets_layers_be_gathered_one_by_one(per_call):
  """That is up to the backend's scheduler: asked to save memory, it does."""
  pair = Pair(teacher_depth=12)
  runner = pair.runner(sharded=("teacher",), steps_per_call=per_call)
  options = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_experimental_ynn_fusion_type": "",  # makes one operation of all
  }
  try:
    compiled = pair.lowered(runner).compile(compiler_options=options)
  except Exception as error:
    pytest.skip(f"another XLA: {error}")
  split, _ = train.split_bytes(pair.known, 8)
  found = compiled.memory_analysis().temp_size_in_bytes
  assert found < 8 * split / 3, (found, split)


@pytest.mark.parametrize(
  "options", [{}, {"steps_per_call": 5, "parts": 2}], ids=str
)
def test_the_numbers_are_those_of_copies(pair, options):
  want = pair.fit(pair.runner(**options))
  got = pair.fit(pair.runner(sharded=("teacher",), **options))
  for a, b in zip(
    jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_run_goes_on_with_other_copies(pair, same, tmp_path):
  """The checkpoint knows nothing of how the teacher is kept."""
  split = pair.runner(sharded=("teacher",))
  whole = pair.fit(split)
  pair.fit(split, num_steps=5, workdir=tmp_path)
  state = pair.fit(split, workdir=tmp_path)
  same(state.params, whole.params, exact=True)


def test_a_step_that_is_not_finite_is_diagnosed(pair):
  bad = jax.tree.map(lambda x: x * np.nan, pair.known)
  with pytest.raises(FloatingPointError, match="step 0 is not .* soft = nan"):
    pair.fit(pair.runner(sharded=("teacher",)), teacher=bad)


def test_what_is_split():
  shapes = {
    "longest": np.zeros((16, 2048), np.float32),
    "divides": np.zeros((64, 1001), np.float32),
    "equals": np.zeros((256, 256), np.float32),
    "small": np.zeros((128, 127), np.float32),
    "odd": np.zeros((999, 1001), np.float32),
    "empty": np.zeros((0, 8), np.float32),
    "number": 3.0,
  }
  assert train.split_specs(shapes, 8) == {
    "longest": P(None, "batch"),
    "divides": P("batch"),
    "equals": P("batch"),
    **dict.fromkeys(("small", "odd", "empty", "number"), P()),
  }
  assert set(train.split_specs(shapes, 1).values()) == {P()}
  shaped = jax.eval_shape(lambda: shapes["equals"])
  assert train.split_bytes(shaped, 8) == (2**15, 0)
  with pytest.raises(ValueError, match="count is 0"):
    train.split_specs(shapes, 0)


def test_what_cannot_be_sharded_is_named(pair):
  with pytest.raises(ValueError, match="sharded is .'teacher',.*'pmap'"):
    pair.runner("pmap", sharded=("teacher",))
  with pytest.raises(ValueError, match="'teacher'; it should be a tuple"):
    pair.runner(sharded="teacher")
  with pytest.raises(ValueError, match="names master; .* holds data, teacher"):
    pair.fit(pair.runner(sharded=("teacher", "master")))


@pytest.mark.parametrize("how", ["jit", "pmap"])
def test_one_all_reduce_of_the_gradients_however_deep(how):
  """Beside it the counts of the masks, on which the gradients depend."""
  for depth in (2, 6):
    pair = Pair(depth)
    sent = train.collectives(pair.lowered(pair.runner(how)).compile().as_text())
    assert [found.kind for found in sent] == ["all-reduce"] * 2
    counts, gradients = sorted(found.bytes for found in sent)
    # With the gradients go the sums of loss and terms, in one number each.
    assert counts <= 8
    assert 0 < gradients - pair.student_bytes() <= 12


def test_a_sharded_teacher_is_gathered_once_and_nothing_else(pair):
  runner = pair.runner(sharded=("teacher",))
  sent = train.collectives(pair.lowered(runner).compile().as_text())
  gathered = [found.bytes for found in sent if found.kind == "all-gather"]
  assert gathered == [WIDTH * WIDTH * 4]
  assert sorted({found.kind for found in sent}) == ["all-gather", "all-reduce"]
  reduced = sum(found.bytes for found in sent if found.kind == "all-reduce")
  assert reduced <= pair.student_bytes() + 20


def test_microbatches_add_up_before_pmap_sends_them(pair):
  """With jit the compiler may send each part's gradients in the loop."""
  text = pair.lowered(pair.runner("pmap", parts=2)).compile().as_text()
  entry = text[re.search(r"^ENTRY", text, re.M).start() :]
  sent = sum(found.bytes for found in train.collectives(entry))
  assert pair.student_bytes() < sent <= pair.student_bytes() + 20
  assert train.collectives(text) == train.collectives(entry)


def test_collectives_reads_what_xla_prints():
  text = """
  %a = bf16[8,3]{1,0:T(8,128)} all-gather(%x), dimensions={0}
  %b = (f32[2]{0}, s32[], pred[5]{0}, /*index=3*/u4[3]{0}) all-reduce(%x, %y)
  ROOT %c = f8e4m3fn[7]{0} collective-permute-start(%x)
  %d = f32[2]{0} get-tuple-element(%all-reduce.1), index=0
  """
  assert train.collectives(text) == [
    ("all-gather", 48),
    ("all-reduce", 8 + 4 + 5 + 2),
    ("collective-permute", 7),
  ]
