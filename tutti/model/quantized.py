"""Frozen weights in 8 or 4 bits, next to which adapters are trained, with an eighth to a quarter of fp32's memory.

(QLoRA, arXiv 2305.14314; LLM.int8(), 2208.07339. The formats and kernels are those of bitsandbytes.)

A quantized weight stays one frozen parameter under its own name, of bytes: each row contains its scales (fp32) and then
its codes. Rows are independent of each other, so a weight can be cut by rows, or into experts, before or after it is
quantized, with the same result. FSDP gathers the bytes as they are, so shards have the size of the codes too.

- int8: one scale per row, the row's largest magnitude; a code is the weight in 127ths of it.
- nf4: a scale for each 64 weights of a row; a code of 4 bits is one of 16 quantiles of a normal distribution. A row
  whose length is not a multiple of 64 is padded with zeros, which affect no scale.

1. `hold_quantized` replaces parameters on the meta device, and attaches their format (`Packing`) to their modules;
2. weights are packed one tensor at a time, on the CPU, as they are read from their files (`tutti.checkpoint.hf_load`);
3. `product` unpacks a matrix just before it is used, to the dtype it would otherwise have, and again in the backward
   pass, so that at most one unpacked matrix exists at a time, and autograd keeps none.

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
"""Number of weights of a row that share a scale, for nf4."""


@dataclass(frozen=True)
class Packing:
    """The format of a packed weight with rows of `columns` numbers. kind: int8 or nf4. dtype: of the unpacked
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
        """Pack [.., rows, columns], on the host, into uint8 [.., rows, bytes]."""
        rows = weight.reshape(-1, self.columns).float()
        if self.kind == "int8":
            codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(rows)
        else:
            rows = pad(rows, (0, self._padded - self.columns))
            codes, scales = torch.ops.bitsandbytes.quantize_4bit(rows, BLOCK, "nf4", torch.uint8)
        parts = [part.reshape(len(rows), -1).view(torch.uint8) for part in (scales, codes)]
        return torch.cat(parts, dim=1).view(*weight.shape[:-1], self.row_bytes)

    def unpack(self, packed: Tensor) -> Tensor:
        """Unpack to `dtype`."""
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
    """Make each module hold its frozen parameter of this name (on the meta device) in the format `kind`: int8 or nf4.

    From then on, use `product` to multiply with it. ValueError: bitsandbytes is not installed.
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
    """The format of the module's parameter of this name; None if it is not packed."""
    return attached(module).packed.get(name)


def packings(model: nn.Module) -> dict[str, Packing]:
    """Every packed parameter of `model`, by name."""
    return {
        f"{path}.{name}": packing
        for path, module in model.named_modules()
        for name, packing in attached(module).packed.items()
    }


def whole_weight(module: Any, name: str) -> Tensor:
    """The parameter of this name, detached, unpacked if it is packed, and then gathered if it is sharded."""
    weight, packing = getattr(module, name).detach(), packing_of(module, name)
    if packing is None:
        return weight
    return packing.unpack(weight.full_tensor() if isinstance(weight, DTensor) else weight)


def num_weights(model: nn.Module) -> dict[nn.Parameter, int]:
    """The number of weights that each parameter of `model` stands for: its elements, unless it is packed."""
    counts = {parameter: parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        for name, packing in attached(module).packed.items():
            packed = getattr(module, name)
            counts[packed] = packed.numel() // packing.row_bytes * packing.columns
    return counts


def product(
    module: Any, name: str, inputs: Tensor, multiply: Callable[[Tensor, Tensor], Tensor], *, rows_are_inputs: bool
) -> Tensor:
    """`multiply(inputs, W)` with the matrix (or stack) W [.., in, out] that `module` has under this name, packed or
    not; a packed one gets no gradient.

    rows_are_inputs: it is stored as W; otherwise as [.., out, in].
    """
    weight, packing = getattr(module, name), packing_of(module, name)
    if packing is None:
        return multiply(inputs, weight if rows_are_inputs else weight.transpose(-2, -1))
    return _Product.apply(inputs, weight, packing, multiply, rows_are_inputs)


class _Product(torch.autograd.Function):
    """multiply(inputs, W), and multiply(grad, W^T) for the gradient of the inputs; W is unpacked for each."""

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
    """Import bitsandbytes, which registers its operators with torch. This takes seconds.

    ValueError if it is not installed. needing: the argument that needs it. instead: what to do otherwise.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about optional kernels that are not used here
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{needing} bitsandbytes, which is not installed; pip install 'tutti-train[quantized]', or {instead}"
        ) from error
    finally:
        logger.setLevel(level)
