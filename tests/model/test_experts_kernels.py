"""The kernels for experts equal the plain form. Without a GPU they run in Triton's interpreter, if it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from tutti.model import experts as plain

has_gpu = torch.cuda.is_available()

CASES = {
    "many experts": (torch.bfloat16, 300, 96, 60, 8),
    "one choice": (torch.float32, 77, 40, 4, 1),
    "more experts than pairs": (torch.float32, 5, 64, 300, 2),
    "one expert": (torch.bfloat16, 33, 16, 1, 1),
    "no token": (torch.float32, 0, 32, 8, 2),
    "weights in fp32": (torch.bfloat16, 65, 32, 8, 3),
}
"""Dtype, tokens, hidden size, experts and choices of each case."""


def draw(name: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [N, H], choices [N, k], weights [N, k], and a gradient of the sums [N, H]."""
    dtype, num_tokens, hidden_size, num_experts, num_chosen = CASES[name]
    generator = torch.Generator().manual_seed(0)
    hidden, grad = torch.randn(2, num_tokens, hidden_size, generator=generator).to(dtype)
    scores = torch.randn(num_tokens, num_experts, generator=generator)
    scores[:, 0] += 3  # nearly all tokens choose the first expert
    weights, chosen = scores.softmax(1).topk(num_chosen)
    weights = weights if name == "weights in fp32" else weights.to(dtype)
    return hidden.to(device), chosen.to(device), weights.to(device), grad.to(device)


def check(device: str) -> None:
    from tutti.model import experts_kernels as kernels

    for name, (*_, num_experts, _) in CASES.items():
        hidden, chosen, weights, grad = draw(name, device)
        sorted_, again = (sort(chosen, num_experts) for sort in (kernels.sort, plain._sort))
        for got, want in zip(sorted_, again, strict=True):
            assert torch.equal(got.long(), want), name
        _, order, places, _ = again
        results = []
        for used in (None, kernels):
            leaves = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
            lie = places.view_as(chosen) if used is None else sorted_[2].view_as(chosen)
            rows = plain._Spread.apply(leaves[0], order, lie, used)
            out = plain._Combine.apply(rows * 2, leaves[1], order, lie, hidden.dtype, used)
            results.append([rows, out, *torch.autograd.grad(out, leaves, grad)])
        for got, want in zip(results[1], results[0], strict=True):
            assert got.dtype == want.dtype
            # The interpreter truncates to bf16, a GPU rounds.
            bound = 2**-6 if want.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got, want, rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.skipif(not find_spec("triton"), reason="needs triton")
def test_kernels_equal_the_plain_form() -> None:
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}  # read when triton is imported
    subprocess.run([sys.executable, "-m", __spec__.name], env=interpreted, check=True)


@pytest.mark.skipif(not has_gpu, reason="needs a GPU")
def test_kernels_equal_the_plain_form_on_a_gpu() -> None:
    check("cuda")


if __name__ == "__main__":
    check("cpu")
