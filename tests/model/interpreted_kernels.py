"""Run the Triton kernels in Triton's interpreter on the CPU: `python -m tests.model.interpreted_kernels` prints the
failures of each case as JSON, by its name.

This needs a separate process, since Triton chooses the interpreter when it is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.model.zoo import tiny
from tutti.model import fuse_modules, fused

FAMILIES = {"qwen3": (torch.float32, torch.bfloat16), "gemma2": (torch.float32,), "phi3": (torch.bfloat16,)}
"""Families and their dtypes: a norm that rounds before its weight and one that adds one to it, silu and gelu, gate and
up in two matrices and in one."""


def mend_interpreter() -> None:
    """Make the interpreter round to bf16 as a GPU does, instead of truncating, and work with any numpy version."""
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16)

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float, interpreter._patch_lang_tensor = rounded, patched


def difference(kernel: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> str:
    """The differences between two functions without gradients."""
    with torch.no_grad():
        first, second = (function(*args) for function in (kernel, plain))
    pairs = zip([first], [second], strict=True) if isinstance(first, Tensor) else zip(first, second, strict=True)
    return " ".join(
        f"result {number} by {(one.float() - other.float()).abs().max()}"
        for number, (one, other) in enumerate(pairs)
        if one.shape != other.shape or (one.numel() and not fuse_modules.is_close(one, other))
    )


def cases(kernels: ModuleType) -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {}
    ops: Any = torch.ops.tutti
    for dtype in (torch.float32, torch.bfloat16):
        for rows, width in ((7, 40), (3, 1100)):
            x, grad = (torch.randn(rows, width).to(dtype) for _ in range(2))
            weight, rstd = torch.randn(width).to(dtype), torch.rand(rows) + 0.5
            for rule in ((0, True), (0, False), (1, False)):
                name = f"norm {dtype} {rows} {width} {rule}"
                args: tuple[Any, ...] = (x, weight, 1e-6, *rule)
                found[name] = lambda args=args: difference(kernels.rms_norm, ops.rms_norm, *args)
                args = (grad, x, weight, rstd, *rule, True)
                back = kernels.rms_norm_backward, ops.rms_norm_backward
                found[f"{name} backward"] = lambda args=args, back=back: difference(*back, *args)
            args = (grad, x, weight, rstd, 0, True, False)
            found[f"frozen norm {dtype} {rows} {width}"] = lambda args=args, back=back: difference(*back, *args)
        for rows, width in ((5, 128), (3, 40)):
            both, grad = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
            gate, up = both.chunk(2, -1)
            for activation in fused.ACTIVATIONS:
                name = f"{activation} {dtype} {rows} {width}"
                for given in ((gate, up), (gate.contiguous(), up)):
                    args = (*given, activation)
                    found[f"{name} {given[0].is_contiguous()}"] = lambda args=args: difference(
                        kernels.gated, ops.gated, *args
                    )
                    for joined in (True, False):
                        args = (grad, *given, activation, joined)
                        found[f"{name} {given[0].is_contiguous()} backward {joined}"] = lambda args=args: difference(
                            kernels.gated_backward, ops.gated_backward, *args
                        )
        for heads, kv_heads, width, batch, turned, of in (
            (5, 2, 16, 1, 16, dtype),
            (1, 3, 12, 2, 12, torch.float32),
            (3, 1, 20, 2, 8, dtype),
        ):
            query, key = (torch.randn(batch, 3, n, width).to(dtype).transpose(1, 2) for n in (heads, kv_heads))
            cos, sin = (torch.randn(batch if turned < width else 1, 3, turned).to(of) for _ in range(2))
            for is_inverse in (True, False):
                args = (query, key.contiguous(), cos, sin, is_inverse)
                found[f"rotary {dtype} {heads} {kv_heads} {width} {batch} {is_inverse}"] = lambda args=args: difference(
                    kernels.rotate, ops.rotate, *args
                )
    return found


def model_case(family: str, dtype: torch.dtype) -> str:
    """The difference of a family's loss and gradients with and without the kernels."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny(family), dtype=dtype)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = AutoModelForCausalLM.from_config(tiny(family), dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    fuse_modules.fuse_modules(ours, None, dtype)
    ids = torch.randint(0, 256, (1, 5))
    for model in (plain, ours):
        logits = model(input_ids=ids, use_cache=False).logits
        logits.float().square().mean().backward()
    worst = 0.0
    for (name, one), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        worst = max(worst, float((one.grad - other.grad).norm() / one.grad.norm()))
    return f"gradients differ by {worst}" if worst > (1e-5 if dtype == torch.float32 else 0.02) else ""


def main() -> None:
    mend_interpreter()
    torch.manual_seed(0)
    kernels = fused.load_kernels()
    assert kernels is not None
    results = {name: case() for name, case in cases(kernels).items()}
    fused._kernels = lambda tensor: kernels
    fused.fits = lambda *tensors: True
    for family, dtypes in FAMILIES.items():
        for dtype in dtypes:
            results[f"model {family} {dtype}"] = model_case(family, dtype)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
