"""Fused experts equal each model's own loop, for every layout of weights."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tutti.model.experts as module
from tests.model.zoo import EXPERTS, tiny
from tutti.core.batch import IGNORE, Batch, Sample, pack
from tutti.core.modules import attached
from tutti.model.experts import EAGER, FUSED, ExpertLoad, fused_experts, resolve_experts
from tutti.model.fuse_modules import fuse_modules
from tutti.model.structure import blocks, experts, is_experts


def _run(
    name: str, implementation: str, dtype: torch.dtype = torch.float32, *, compiled: bool = False, **overrides: int
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny(name, **overrides), dtype=dtype, experts_implementation=implementation, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for _, block in blocks(model) if compiled else ():
        block.forward = torch.compile(block.forward, backend="eager")
    ids = torch.randint(0, 256, (1, 37))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        **{key: value.grad for key, value in model.named_parameters() if value.grad is not None},
    }


@pytest.mark.parametrize("name", EXPERTS)
def test_loss_and_gradients_equal_the_models_own_loop(name: str) -> None:
    resolve_experts(None)
    eager, fused = _run(name, "eager"), _run(name, FUSED)
    assert eager.keys() == fused.keys()
    for key, value in eager.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


LAYOUTS = {
    "gate and up in halves": ("qwen3_moe", "Qwen3MoeExperts"),
    "interleaved, transposed, with biases": ("gpt_oss", "GptOssExperts"),
    "transposed": ("aria", "AriaExperts"),
    "transposed, with biases, in halves": ("openai_privacy_filter", "OpenAIPrivacyFilterExperts"),
    "no gate": ("nemotron_h", "NemotronHExperts"),
    "a norm after each expert": ("muse_spark", "MuseSparkExperts"),
    "clamped gate": ("deepseek_v4", "DeepseekV4Experts"),
}
"""Every combination of options of transformers' decorator for experts, with a class that uses it."""


GATED_IN_HALVES = {"gate and up in halves", "transposed", "a norm after each expert"}
"""The layouts whose gate has a kernel."""


def build_experts(layout: str) -> torch.nn.Module:
    family, class_name = LAYOUTS[layout]
    experts_class = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), class_name)
    config = MagicMock(
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), 32),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 16),
        **dict.fromkeys(("hidden_act", "mlp_hidden_act"), "silu"),
        moe_latent_size=None,
        post_norm_eps=1e-6,
        swiglu_alpha=1.7,
        swiglu_limit=7.0,
        _experts_implementation="eager",
    )
    torch.manual_seed(0)
    experts = experts_class(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_models_own_loop(layout: str) -> None:
    experts = build_experts(layout)
    fuse_modules(experts, None, torch.float32)
    assert attached(experts).gated_by == ("silu" if layout in GATED_IN_HALVES else None)
    hidden, weights = torch.randn(37, 32), torch.rand(37, 2)
    chosen = torch.rand(37, 4).topk(2, dim=1).indices
    results = []
    for function in (experts, partial(fused_experts, experts)):
        leaves = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        output = function(leaves[0], chosen, leaves[1])
        gradients = torch.autograd.grad((output * torch.arange(32)).sum(), [*leaves, *experts.parameters()])
        results.append([output, *gradients])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", EXPERTS)
def test_bf16_is_no_further_from_fp32_than_the_models_own_loop(name: str) -> None:
    resolve_experts(None)
    exact = _run(name, "eager")
    eager, fused = (_run(name, kind, torch.bfloat16) for kind in ("eager", FUSED))

    def distance(run: dict[str, Tensor]) -> float:
        return sum((run[key].float() - value).norm().item() for key, value in exact.items())

    assert distance(fused) <= 1.25 * distance(eager)


def test_widths_without_a_kernel_go_through_plain_products() -> None:
    resolve_experts(None)
    odd = {"moe_intermediate_size": 27}
    eager, fused = _run("qwen3_moe", "eager", **odd), _run("qwen3_moe", FUSED, **odd)
    for key, value in eager.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-5, atol=1e-5)


def test_experts_that_no_token_chose_get_no_gradient() -> None:
    resolve_experts(None)
    model = AutoModelForCausalLM.from_config(tiny("mixtral"), experts_implementation=FUSED)
    experts = next(module for module in model.modules() if is_experts(module))
    chosen = torch.tensor([[1, 2]] * 5)
    fused_experts(experts, torch.randn(5, 32), chosen, torch.rand(5, 2)).square().sum().backward()
    grads = experts.gate_up_proj.grad.flatten(1).norm(dim=1)
    assert (grads[[1, 2]] > 0).all() and (grads[[0, 3]] == 0).all()


@pytest.mark.parametrize("implementation", [FUSED, EAGER])
def test_a_compiled_block_runs_its_experts_as_they_are(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that traced them would have to stop for sizes anew with each batch, and torch 2.11 gave them no
    gradient."""
    resolve_experts(None)
    expected = _run("qwen3_moe", implementation)
    traced = []
    monkeypatch.setattr(module, "_count", lambda *args: traced.append(torch.compiler.is_compiling()))
    found = _run("qwen3_moe", implementation, compiled=True)
    assert traced and not any(traced)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


def test_names() -> None:
    assert resolve_experts("eager") == EAGER
    assert resolve_experts("fused") == resolve_experts(None) == FUSED


class Root(torch.nn.Module):
    """Calls each of `layers` with a choice of experts for every token of a batch."""

    def __init__(self, layers: list) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, batch: Batch, choices: list) -> None:
        for layer, chosen in zip(self.layers, choices, strict=True):
            layer(torch.randn(len(chosen), 32), chosen, torch.rand(len(chosen), 2))


def mesh_of_one() -> MagicMock:
    return MagicMock(size=lambda axis: 1, rank=lambda axis: 0)


@pytest.mark.parametrize("implementation", [FUSED, EAGER])
def test_load_is_counted_in_training_and_told_as_multiples_of_an_even_share(implementation: str) -> None:
    """Padding, which would all go to expert 3, is not counted, and recomputed layers count once."""
    resolve_experts(None)
    model = AutoModelForCausalLM.from_config(tiny("mixtral"), experts_implementation=implementation)
    root = Root(experts(model))
    load = ExpertLoad(root, experts(model), mesh_of_one(), torch.device("cpu"))
    batch = pack([Sample(np.array([5, 6]), np.array([6, IGNORE]))], pad_to=4)
    padding = torch.tensor([[3, 1], [3, 1]])
    even, skewed = (torch.cat([torch.tensor(real), padding]) for real in ([[0, 1], [2, 3]], [[0, 1], [0, 2]]))
    root.train()(batch, [even, skewed])
    root.eval()(batch, [padding.repeat(2, 1)] * 2)
    root.train().layers[0](torch.randn(4, 32), skewed, torch.rand(4, 2))
    assert load.take() == {"expert_load_max": 2.0, "expert_load_min": 0.0}
    root(batch, [even, even])
    assert load.take() == {"expert_load_max": 1.0, "expert_load_min": 1.0}


def test_a_model_without_experts_has_no_load() -> None:
    assert ExpertLoad(Root([]), [], mesh_of_one(), torch.device("cpu")).take() == {}
