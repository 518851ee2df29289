"""Soft-capped attention with FlexAttention (not compiled) equals tiled attention; its block mask; its trial."""

import logging
import warnings

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module

from tests.attention.test_varlen import assert_equals_tiles
from tutti.attention import flex, interface
from tutti.attention.packed_cpu import packed_attention
from tutti.attention.spec import AttentionSpec

RULES = {
    "causal": AttentionSpec(0.2, softcap=5.0),
    "window": AttentionSpec(0.2, window=40, softcap=5.0),
    "wide window": AttentionSpec(0.2, window=300, softcap=5.0),
    "both ways": AttentionSpec(0.2, causal=False, softcap=5.0),
    "both ways in a window": AttentionSpec(0.2, causal=False, window=40, softcap=5.0),
}
BORDERS = torch.tensor([0, 1, 30, 31, 77, 96], dtype=torch.int32)
LONG_BORDERS = torch.tensor([0, 1, 130, 256, 650, 1000], dtype=torch.int32)


@pytest.fixture
def eager(monkeypatch):
    """FlexAttention's uncompiled form on the CPU, where it normally refuses a backward pass because that is slow."""
    monkeypatch.setattr(flex, "_kernel", lambda: flex._capped)
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    works = flex._works
    works.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield
    works.cache_clear()


@pytest.mark.parametrize("spec", RULES.values(), ids=RULES)
def test_it_equals_tiles(eager, spec):
    assert_equals_tiles(spec, (16, 8), lambda *rows: flex._attend(*rows, BORDERS, spec))


def test_it_passes_its_trial(eager):
    assert flex._trial(torch.device("cpu"), torch.bfloat16, (2, 1, 8, 8), RULES["causal"]) < 0.02


def as_grid(numbers, indices):
    """bool [n, n] of the listed key blocks of each query block."""
    grid = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (number, found) in enumerate(zip(numbers[0, 0].tolist(), indices[0, 0], strict=True)):
        grid[row, found[:number].long()] = True
    return grid


@pytest.mark.parametrize("spec", RULES.values(), ids=RULES)
def test_blocks_are_left_out_where_nothing_is_seen_and_unmasked_where_all_is(spec):
    mask = flex.packed_block_mask(LONG_BORDERS, 1024, spec)
    places = torch.arange(1024)
    sample = torch.bucketize(places, LONG_BORDERS[1:], right=True)
    ago = places[:, None] - places
    seen = sample[:, None] == sample
    if spec.causal:
        seen &= ago >= 0
    if spec.window:
        seen &= ago.abs() < spec.window
    blocks = seen.view(8, 128, 8, 128).transpose(1, 2)
    some, every = blocks.flatten(2).any(-1), blocks.flatten(2).all(-1)
    full = as_grid(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = as_grid(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(full, every)
    assert not (full & partial).any()
    assert torch.equal(full | partial, some)
    assert torch.equal(mask.mask_mod(0, 0, places[:, None], places), seen)


def test_layers_of_one_batch_share_a_mask():
    spec = RULES["causal"]
    one, same = (flex._mask(LONG_BORDERS, 1024, spec) for _ in range(2))
    assert one is same
    assert flex._mask(LONG_BORDERS, 1024, RULES["window"]) is not one
    assert flex._mask(LONG_BORDERS.clone(), 1024, spec) is not one


def rows(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(heads, 96, 8, dtype=dtype) for heads in (4, 2, 2)]


def test_models_that_cap_scores_go_to_it(eager, monkeypatch):
    called = []
    monkeypatch.setattr(flex, "takes", lambda query: True)
    monkeypatch.setattr(flex, "_works", lambda *asked: True)
    monkeypatch.setattr(flex, "_attend", lambda *given, run=flex._attend: called.append(given[-1]) or run(*given))
    known = {"cu_seq_lens_q": BORDERS, "max_length_q": 46}
    for spec in (RULES["window"], AttentionSpec(0.2, window=40)):
        out = interface._attend(*rows(), spec, None, known)
        torch.testing.assert_close(out, packed_attention(*rows(), BORDERS, spec), rtol=2e-2, atol=2e-2)
    assert set(called) == {RULES["window"]}


def fails(*given):
    raise RuntimeError("no such instruction")


def gives_other_values(query, key, value, *given):
    return query.tanh() * value.sum() + key.sum()


@pytest.mark.parametrize("kernel, said", [(fails, "no such instruction"), (gives_other_values, "other values")])
def test_tiles_take_its_place_where_the_trial_fails(eager, monkeypatch, caplog, kernel, said):
    monkeypatch.setattr(flex, "_kernel", lambda: kernel)
    spec = RULES["causal"]
    with caplog.at_level(logging.WARNING):
        outs = [flex.capped_attention(*rows(), BORDERS, BORDERS, spec) for _ in range(2)]
    assert all(torch.equal(out, packed_attention(*rows(), BORDERS, spec)) for out in outs)
    (record,) = (item for item in caplog.records if item.name == flex.__name__)
    assert said in record.getMessage() and "tiles" in record.getMessage()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", RULES.values(), ids=RULES)
def test_the_compiled_kernel_passes_its_trial_on_a_gpu(spec):
    device = torch.device("cuda", torch.cuda.current_device())
    assert flex._trial(device, torch.bfloat16, (8, 4, 256, 256), spec) < 0.02
