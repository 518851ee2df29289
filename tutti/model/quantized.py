"""Frozen weights in 8 or 4 bits: what adapters are trained beside, at an eighth to a quarter of fp32's memory.

(QLoRA, arXiv 2305.14314; LLM.int8(), 2208.07339. The codes and their kernels are those of bitsandbytes.)

A quantized weight stays one frozen parameter under its own name, of bytes: each row holds its scales (fp32) and then
its codes. Rows know nothing of one another, so that a weight can be cut by rows, or into experts, before or after it is
quantized, with the same result; and since FSDP gathers bytes as they are, shards are of the size of the codes too.

- int8: one scale a row, the row's largest magnitude; a code is the weight in 127ths of it.
- nf4: a scale for each 64 weights of a row; a code of 4 bits is one of 16 quantiles of a normal distribution. A row
  that does not divide by 64 is filled up with zeros, which no scale depends on.

1. `hold_quantized` replaces parameters on the meta device, and says on their modules how to read them (`Packing`);
2. weights are packed one tensor at a time, on the CPU, as they are read from their files (`tutti.checkpoint.hf_load`);
3. `product` unpacks a matrix just before it is used, to the dtype it would have been held in, and again in the backward
   pass, so that no more than one is there at a time, and autograd keeps none.

Shapes: a weight [.., rows, columns], its packed form uint8 [.., rows, bytes].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from tutti.core.modules import attach, attached

BLOCK = 64
"""Weights of a row that share a scale, with nf4."""


@dataclass(frozen=True)
class Packing:
    """The layout of a packed weight with rows of `columns` numbers. kind: int8 or nf4; dtype: of the unpacked
    weight."""

    kind: str
    columns: int
    dtype: torch.dtype

    @property
    def _padded(self) -> int:
        return -(-self.columns // BLOCK) * BLOCK

    @property
    def _scale_bytes(self) -> int:
        return 4 * (1 if self.kind == "int8" else self._padded // BLOCK)

    @property
    def row_bytes(self) -> int:
        return self._scale_bytes + (self.columns if self.kind == "int8" else self._padded // 2)

    def pack(self, weight: Tensor) -> Tensor:
        """[.., rows, columns], in memory of the host -> uint8 [.., rows, bytes]."""
        rows = weight.reshape(-1, self.columns).float()
        if self.kind == "int8":
            codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(rows)
        else:
            rows = pad(rows, (0, self._padded - self.columns))
            codes, scales = torch.ops.bitsandbytes.quantize_4bit(rows, BLOCK, "nf4", torch.uint8)
        parts = [part.reshape(len(rows), -1).view(torch.uint8) for part in (scales, codes)]
        return torch.cat(parts, dim=1).view(*weight.shape[:-1], self.row_bytes)

    def unpack(self, packed: Tensor) -> Tensor:
        """The way back, to `dtype`."""
        rows = packed.reshape(-1, self.row_bytes)
        scales = rows[:, : self._scale_bytes].clone(memory_format=torch.contiguous_format).view(torch.float32)
        codes = rows[:, self._scale_bytes :].contiguous()
        if self.kind == "int8":
            dequantize = torch.ops.bitsandbytes.int8_vectorwise_dequant
            weight = dequantize(codes.view(torch.int8), scales.flatten()).to(self.dtype)
        else:
            dequantize, shape = torch.ops.bitsandbytes.dequantize_4bit, (len(rows), self._padded)
            weight = dequantize(codes, scales.flatten(), BLOCK, "nf4", shape, self.dtype)[:, : self.columns]
        return weight.reshape(*packed.shape[:-1], self.columns)


def hold_quantized(weights: Iterable[tuple[nn.Module, str]], kind: str) -> None:
    """Make each module hold its frozen parameter of this name, on the meta device, as `kind`: int8 or nf4.

    Whoever multiplies with it from here on does so by `product`. ValueError: bitsandbytes is not installed.
    """
    require_bitsandbytes("train.lora_base_dtype: int8 and nf4 need", "leave it at compute")
    for module, name in weights:
        weight = getattr(module, name)
        assert weight.is_meta and not weight.requires_grad and not isinstance(weight, DTensor)
        packing = Packing(kind, weight.shape[-1], weight.dtype)
        packed = torch.empty((*weight.shape[:-1], packing.row_bytes), dtype=torch.uint8, device="meta")
        module._parameters[name] = nn.Parameter(packed, requires_grad=False)
        attach(module, packed=attached(module).packed | {name: packing})


def packing_of(module: Any, name: str) -> Packing | None:
    """The packing of the module's parameter of this name; None for one that is not packed."""
    return attached(module).packed.get(name)


def packings(model: nn.Module) -> dict[str, Packing]:
    """Every packed parameter of `model`, by name."""
    return {
        f"{path}.{name}": packing
        for path, module in model.named_modules()
        for name, packing in attached(module).packed.items()
    }


def whole_weight(module: Any, name: str) -> Tensor:
    """The parameter of this name without its gradient, unpacked if it is packed, and then gathered if it is sharded."""
    weight, packing = getattr(module, name).detach(), packing_of(module, name)
    if packing is None:
        return weight
    return packing.unpack(weight.full_tensor() if isinstance(weight, DTensor) else weight)


def num_weights(model: nn.Module) -> dict[nn.Parameter, int]:
    """The numbers that each parameter of `model` stands for: its elements, unless it is packed."""
    counts = {parameter: parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        for name, packing in attached(module).packed.items():
            packed = getattr(module, name)
            counts[packed] = packed.numel() // packing.row_bytes * packing.columns
    return counts


def product(
    module: Any, name: str, inputs: Tensor, multiply: Callable[[Tensor, Tensor], Tensor], *, rows_are_inputs: bool
) -> Tensor:
    """`multiply(inputs, W)` with the matrix (or stack) W [.., in, out] that `module` holds under this name, packed or
    not; of what is packed nothing gets a gradient.

    rows_are_inputs: it is held as it is; else as [.., out, in].
    """
    weight, packing = getattr(module, name), packing_of(module, name)
    if packing is None:
        return multiply(inputs, weight if rows_are_inputs else weight.transpose(-2, -1))
    return _Product.apply(inputs, weight, packing, multiply, rows_are_inputs)


class _Product(torch.autograd.Function):
    """multiply(inputs, W), and multiply(grad, W^T) for the gradient of the inputs; W is made anew for each."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        packed: Tensor,
        packing: Packing,
        multiply: Callable[[Tensor, Tensor], Tensor],
        rows_are_inputs: bool,
    ) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.packing, ctx.multiply, ctx.rows_are_inputs = packing, multiply, rows_are_inputs
        weight = packing.unpack(packed)
        return multiply(inputs, weight if rows_are_inputs else weight.transpose(-2, -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        weight = ctx.packing.unpack(packed)
        return ctx.multiply(grad, weight.transpose(-2, -1) if ctx.rows_are_inputs else weight), None, None, None, None


def require_bitsandbytes(needing: str, instead: str) -> None:
    """Import bitsandbytes, which registers its operators with torch. It takes seconds, and need not be installed.

    ValueError, if it is not: who is `needing` it, and what to do `instead`.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of optional kernels that are not used here
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{needing} bitsandbytes, which is not installed; pip install 'tutti-train[quantized]', or {instead}"
        ) from error
    finally:
        logger.setLevel(level)
