"""Fused norms, gated MLPs and rotary embeddings: what is recognized in each family, with unchanged values."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as wide
from transformers.models.qwen3_next.modeling_qwen3_next import apply_rotary_pos_emb as partial

from tests.model.zoo import tiny
from tutti.check.rehearsal import rehearse
from tutti.core.modules import attached
from tutti.model import fused
from tutti.model.fuse_modules import fuse_modules, recognise_activation, recognise_norm, recognise_rotary
from tutti.model.fused import Norm
from tutti.model.lora import Lora, add_adapters

needs_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")

FAMILIES = {
    "llama": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "qwen3_moe": (9, 0, 2),
    "gemma2": (9, 2, 2),
    "gemma3": (13, 2, 2),
    "olmo2": (9, 2, 2),
    "phi3": (5, 2, 2),
    "cohere": (0, 2, 0),
    "gpt_oss": (5, 0, 0),
    "deepseek_v3": (9, 2, 2),
    "qwen3_next": (7, 2, 1),
    "gpt2": (0, 0, 0),
}
"""Family -> its fused norms, gated MLPs (not those of experts) and rotary embeddings."""


def built(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(family), dtype=dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def counts(model: nn.Module) -> tuple[int, int, int]:
    worn = [type(part).__name__ for part in model.modules() if attached(part).wrappers == ("fused",)]
    norms, attentions = (sum(kind in name for name in worn) for kind in ("Norm", "Attention"))
    return norms, len(worn) - norms - attentions, attentions


def results(model: Any, ids: Tensor) -> list[Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().square().mean().backward()
    return [logits.detach(), *(item.grad for item in model.parameters() if item.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_fused(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny(family))
    fuse_modules(model, None, torch.bfloat16)
    assert counts(model) == FAMILIES[family]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "olmo2", "deepseek_v3", "gpt_neox"])
def test_plain_forms_give_the_models_values(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    theirs, ours = built(family), built(family)
    fuse_modules(ours, None, torch.float32)
    monkeypatch.setattr(fused, "fits", lambda *tensors: True)
    copied = copy.deepcopy(ours)
    want, got = results(theirs, ids), results(ours, ids)
    for first, second in zip(want, got, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6 * float(first.abs().max()) + 1e-8)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    assert all(map(torch.equal, results(copied, ids), got)), "a copy runs on what it was copied from"


def test_nothing_happens_on_a_cpu_or_to_what_is_wrapped(caplog: pytest.LogCaptureFixture) -> None:
    model = built("llama")
    fuse_modules(model, torch.device("cpu"), torch.float32)
    assert counts(model) == (0, 0, 0)
    model.model.norm.forward = lambda hidden: hidden
    with caplog.at_level(logging.INFO, "tutti"):
        fuse_modules(model, None, torch.float32)
    assert counts(model) == (4, 2, 2)
    assert "fused kernels: 4 norms, 2 gated MLPs, 2 rotary embeddings" in caplog.text


class Halved(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 0.5


class Clipped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=2) * self.up_proj(x))


class Dropping(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_what_differs_stays() -> None:
    config = tiny("llama")
    model = nn.ModuleDict({"mlp": Clipped(config), "dropping": Dropping(config), "norm": nn.LayerNorm(8, bias=False)})
    model["halved"] = Halved(8)
    before = torch.get_rng_state()
    fuse_modules(model.eval(), None, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert counts(model) == (0, 0, 0)
    model["gelu"], model["mine"] = LlamaMLP(tiny("llama", hidden_act="gelu")), LlamaMLP(config)
    fuse_modules(model, None, torch.float32)
    assert counts(model) == (0, 1, 0), "gelu by the error function has no kernel"


def test_rules_of_norms_and_rotations() -> None:
    assert recognise_norm(LlamaRMSNorm(40, eps=1e-5)) == Norm(1e-5, 0, True)
    assert recognise_norm(built("gemma3").model.norm) == Norm(1e-6, 1, False)
    assert recognise_norm(built("olmo2").model.norm) == Norm(1e-5, 0, False)
    assert recognise_rotary(apply_rotary_pos_emb) == [(False, False)] and not recognise_rotary(interleaved)
    assert recognise_rotary(partial) == [(False, False), (True, False)]
    assert recognise_rotary(wide) == [(False, False), (False, True)]
    assert recognise_activation(nn.SiLU()) == "silu" and recognise_activation(nn.ReLU()) is None


def test_adapters_beside_the_matrices_count(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = built("llama"), built("llama")
    for model in (theirs, ours):
        add_adapters(model, Lora(rank=2, alpha=4.0, dropout=0.0, targets=("gate_proj", "down_proj")), torch.float32)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.constant_(parameter, 0.1)
    fuse_modules(ours, None, torch.float32)
    assert counts(ours) == (5, 2, 2)
    monkeypatch.setattr(fused, "fits", lambda *tensors: True)
    ids = torch.arange(8)[None]
    want, got = results(theirs, ids), results(ours, ids)
    for first, second in zip(want, got, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)


def test_a_rehearsal_counts_what_is_kept() -> None:
    rows, width, heads = 64, 256, 4
    with rehearse() as memory:
        x, gate, up = (torch.empty(1, rows, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        weight = torch.empty(width, dtype=torch.bfloat16, requires_grad=True)
        query = x.view(1, rows, heads, -1).transpose(1, 2)
        cos = torch.empty(1, rows, width // heads, dtype=torch.bfloat16)
        start, size = memory.now, rows * width * 2
        normed = fused.rms_norm(x, weight, Norm(1e-6, 0, True))
        assert memory.now - start == size + 4 * rows
        opened = fused.gated(gate, up, "silu")
        assert memory.now - start == 2 * size + 4 * rows
        turned = fused.rotate(query, query, cos, cos)
        assert memory.now - start == 4 * size + 4 * rows
        assert turned[0].transpose(1, 2).is_contiguous()
        before = memory.now
        del normed, opened, turned
        assert before - memory.now == 4 * size + 4 * rows


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    command = [sys.executable, "-m", "tests.model.interpreted_kernels"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("kind", ["norm", "silu", "gelu", "rotary", "model"])
def test_kernels_in_the_interpreter(interpreted: dict[str, str], kind: str) -> None:
    said = {name: problem for name, problem in interpreted.items() if name.startswith(kind)}
    assert said and not {name: problem for name, problem in said.items() if problem}


@needs_accelerator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_a_gpu_keeps_its_values(family: str, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    device = torch.device("cuda", torch.accelerator.current_device_index())
    ids = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(1)).to(device)
    theirs, ours = (built(family, dtype).to(device) for _ in range(2))
    fuse_modules(ours, device, dtype)
    assert counts(ours) == FAMILIES[family]
    want, got = results(theirs, ids), results(ours, ids)
    for first, second in zip(want, got, strict=True):
        difference = (first.float() - second.float()).norm() / first.float().norm().clamp(min=1e-6)
        assert difference < (1e-4 if dtype == torch.float32 else 0.05)
    ours.zero_grad()
    assert all(map(torch.equal, results(ours, ids), got)), "another run gives other values"
