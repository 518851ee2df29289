"""The Triton kernels of native sparse attention equal its definition with dense masks.

Where Triton is installed, which it is with torch for CUDA, they are run by its interpreter on the CPU: `python -m
tests.attention.test_sparse_triton` does so in a process of its own, as it has to be told before Triton is imported, and
prints by case how far results are from the definition. With a GPU they are compiled, and have to pass their trial.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy
import pytest
import torch

from tests.attention.test_sparse import LENGTHS, SCALE, SIZES, by_masks
from tutti.attention.sparse import NativeSparse
from tutti.attention.spec import SparseSizes

has_triton = importlib.util.find_spec("triton") is not None
interprets = has_triton and tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)

OVERLAPPING = SparseSizes(block=16, stride=2, selected_block=8, selected=5, window=24)
LONG = SparseSizes(block=32, stride=16, selected_block=64, selected=3, window=50)
CASES = {
    "groups of 2, values narrower": ((4, 2, 16, 12), LENGTHS[:2], SIZES),
    "one head, 64 wide": ((1, 1, 64, 64), (90, 33), SIZES),
    "groups of 4, 128 wide": ((4, 1, 128, 128), (200, 1, 9), LONG),
    "groups of 16": ((16, 1, 16, 16), (5, 90), SIZES),
    "groups of 3": ((6, 2, 24, 24), (97,), SIZES),
    "blocks of many strides": ((2, 1, 16, 16), (21, 100), OVERLAPPING),
    "nothing compressed": ((2, 2, 16, 16), (5, 3), SIZES),
    "in segments": ((2, 1, 16, 12), LENGTHS[:2], SIZES),
}


def difference(name: str) -> float:
    """The largest difference of output and gradients from the definition, relative to the largest value."""
    from tutti.attention import sparse_triton

    (heads, kv_heads, width, value_width), lengths, sizes = CASES[name]
    sparse_triton._MEMORY = 0 if name == "in segments" else 2**31
    torch.manual_seed(0)
    layer, total = NativeSparse(64, heads, width, value_width, sizes, 0.02), sum(lengths)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shapes = [(heads, total, width), (kv_heads, total, width), (kv_heads, total, value_width)]
    given = [torch.randn(shape).mul_(4 / width**0.5 + 0.5).requires_grad_() for shape in shapes]
    given.append(torch.rand(heads, total, 3).requires_grad_())
    weight = torch.randn(total, heads, value_width)
    got = layer._by_kernels(*given, torch.tensor([0, *lengths]).cumsum(0), SCALE)
    want = torch.cat([by_masks(layer, *sample) for sample in zip(*(x.split(lengths, 1) for x in given), strict=True)])
    learned = [*layer.keys.parameters(), *layer.values.parameters()]
    found = []
    for out in (got, want):
        grads = torch.autograd.grad((out * weight).sum(), [*given, *learned], allow_unused=True)
        found.append([out, *(torch.zeros(1) if grad is None else grad for grad in grads)])
    pairs = zip(*found, strict=True)
    return max(
        float((one - other).detach().abs().max() / other.detach().abs().max().clamp_min(1e-9)) for one, other in pairs
    )


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", __spec__.name]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not interprets, reason="needs Triton, and numpy before 2.4 for its interpreter")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_the_definition(interpreted, name):
    assert interpreted[name] < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("heads", "sizes", "dtype", "allowed"),
    [
        ((6, 2, 64, 48), LONG, torch.float32, 1e-5),
        ((4, 1, 128, 128), SparseSizes(), torch.float32, 1e-5),
        ((2, 2, 16, 16), SIZES, torch.float32, 1e-5),
        ((16, 4, 128, 128), SparseSizes(), torch.bfloat16, 0.03),
        ((16, 1, 64, 64), LONG, torch.bfloat16, 0.03),
        ((4, 2, 192, 128), LONG, torch.float16, 0.01),
    ],
    ids=str,
)
def test_kernels_equal_tensor_operations_on_a_gpu(heads, sizes, dtype, allowed):
    from tutti.attention import sparse_triton

    device = torch.device("cuda", torch.cuda.current_device())
    found = sparse_triton.try_kernels(device, dtype, heads, sizes, heads[2] ** -0.5)
    assert found is not None and found < allowed


if __name__ == "__main__":
    print(json.dumps({name: difference(name) for name in CASES}))
