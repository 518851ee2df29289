"""A base in 8 or 4 bits computes as bitsandbytes does, takes its size, and lets autograd save nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model.zoo import VOCAB, tiny
from tutti.checkpoint.hf_load import load_weights
from tutti.core.dist import World
from tutti.core.modules import attached
from tutti.model.experts import FUSED, resolve_experts
from tutti.model.lora import Lora, adapters, add_adapters, init_adapters
from tutti.model.quantized import Packing, hold_quantized, packings
from tutti.model.structure import count_flops, num_params

functional = pytest.importorskip("bitsandbytes.functional")

RANKS = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
IDS = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
KINDS = ("int8", "nf4")


def round_trip(weight, kind):
    """Each row through bitsandbytes on its own."""
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.reshape(-1, weight.shape[-1]))
        return functional.int8_vectorwise_dequant(codes, scales).view_as(weight)
    rows = [functional.dequantize_nf4(*functional.quantize_nf4(row)) for row in weight.reshape(-1, weight.shape[-1])]
    return torch.stack([row.flatten() for row in rows]).view_as(weight)


@pytest.mark.parametrize("columns", [64, 192, 48, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_packed_alone_and_unpacked_as_bitsandbytes_does(kind, columns):
    weight = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(0))
    weight[1, 2] = 0
    packing = Packing(kind, columns, torch.float32)
    packed = packing.pack(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, packing.row_bytes)
    assert torch.equal(packing.unpack(packed), round_trip(weight, kind))
    assert torch.equal(packing.pack(weight[1:, 2:3]), packed[1:, 2:3]), "a part packs to the part of the whole"
    assert torch.equal(packing.unpack(packed[1:, 2:3]), packing.unpack(packed)[1:, 2:3])
    half = Packing(kind, columns, torch.bfloat16)
    assert torch.equal(half.unpack(packed), packing.unpack(packed).bfloat16())


@pytest.fixture(params=["qwen2", "gpt2", "qwen3_moe", "gpt_oss"])
def base(request, tmp_path):
    """The folder of a model with biases, with transposed layers, with experts, or with transposed experts."""
    torch.manual_seed(0)
    resolve_experts(None)
    model = AutoModelForCausalLM.from_config(tiny(request.param), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path)
    return tmp_path


def adapted(folder, kind=None, broadcast=False, **settings):
    """The model in `folder` with adapters away from zero, on weights that are quantized, or rounded as if they were."""
    config = AutoModelForCausalLM.from_pretrained(folder).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation=FUSED
        )
    add_adapters(model, Lora(rank=4, alpha=8.0, **settings), torch.float32)
    if kind is not None:
        hold_quantized([(module, each.weight) for module, each in adapters(model)], kind)
    load_weights(model, folder, world=RANKS, broadcast=broadcast)
    init_adapters(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for module, adapter in adapters(model):
            B = adapter.factors(module).B
            B.add_(torch.randn(B.shape, generator=generator) * 0.05)
    return model.train()


def rounded(model, kind):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module, adapter in adapters(model):
            weight = getattr(module, adapter.weight)
            weight.copy_(round_trip(weight, kind))
    return model


def step(model):
    """Loss, logits and gradients."""
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    return out.loss, out.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_model_computes_and_learns_as_one_whose_weights_were_rounded(base, kind, dora):
    plain = adapted(base, dora=dora)
    loss, logits, gradients = step(adapted(base, kind, broadcast=dora, dora=dora))
    want_loss, want_logits, want = step(rounded(plain, kind))
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits, want_logits, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == want.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert (step(plain)[1] - want_logits).abs().max() > 1e-3, "rounding changes nothing, the test cannot fail"


def test_base_takes_the_room_of_its_codes_and_autograd_keeps_no_weight(base):
    model = adapted(base, "nf4")
    packed = packings(model)
    held = {name: parameter for name, parameter in model.named_parameters() if name in packed}
    assert held.keys() == packed.keys() and all(p.dtype == torch.uint8 for p in held.values())
    assert {f"{path}.{each.weight}" for path, module in model.named_modules() for each in _own(module)} == held.keys()
    for name, parameter in held.items():
        padded = -(-packed[name].columns // 64) * 64
        assert parameter.nbytes == parameter[..., 0].numel() * padded * (0.5 + 4 / 64), name
    assert num_params(model) == num_params(adapted(base))
    assert count_flops(model).per_token == count_flops(adapted(base)).per_token
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS, use_cache=False)
    shapes = {tuple(sorted((*p.shape[:-1], packed[name].columns))) for name, p in held.items()}
    assert any(tensor.dtype == torch.uint8 for tensor in saved)
    assert not [tensor.shape for tensor in saved if tuple(sorted(tensor.shape)) in shapes]


def _own(module):
    return attached(module).adapters.values()


def test_weights_of_another_width_are_refused(tmp_path):
    AutoModelForCausalLM.from_config(tiny("qwen2", intermediate_size=100)).save_pretrained(tmp_path / "narrow")
    AutoModelForCausalLM.from_config(tiny("qwen2", intermediate_size=128)).save_pretrained(tmp_path / "wide")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    add_adapters(model, Lora(rank=4, targets=("down_proj",)), torch.float32)
    hold_quantized([(module, each.weight) for module, each in adapters(model)], "nf4")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight \(32x100 in the checkpoint, 32x128"):
        load_weights(model, tmp_path / "narrow", world=RANKS, broadcast=False)
