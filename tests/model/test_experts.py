"""Fused experts give what each model's own loop gives, in every layout of weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.model.zoo import EXPERTS, tiny
from tutti.model.experts import FUSED, fused_experts, resolve_experts
from tutti.model.plan import is_experts


def _run(name: str, implementation: str, dtype: torch.dtype = torch.float32, **overrides: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny(name, **overrides), dtype=dtype, experts_implementation=implementation, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(0, 256, (1, 37))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        **{key: value.grad for key, value in model.named_parameters() if value.grad is not None},
    }


@pytest.mark.parametrize("name", [*EXPERTS, "nemotron_h", "aria"])
def test_loss_and_gradients_equal_the_models_own_loop(name: str) -> None:
    resolve_experts(None)
    eager, fused = _run(name, "eager"), _run(name, FUSED)
    assert eager.keys() == fused.keys()
    for key, value in eager.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


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


def test_names() -> None:
    assert resolve_experts("eager") == "eager"
    assert resolve_experts("fused") == resolve_experts(None) == FUSED
