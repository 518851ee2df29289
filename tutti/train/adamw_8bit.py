"""AdamW with momentum and variance in 8 bits: 2 bytes per parameter instead of fp32's 8 (arXiv 2110.02861).

Each block of at most 256 consecutive numbers in a row is stored as one-byte codes and one fp32 scale, the block's
largest magnitude. A code is an index into a table that spans seven decades, with more digits near the largest ("dynamic
quantization"). Table and kernels are those of bitsandbytes. A step widens a bucket of state to fp32, does AdamW on it,
and encodes it again; `AnyPrecisionAdamW` sees to it that the parameters lose nothing.

bitsandbytes' own optimizer makes blocks of a rank's local data, and does not support DTensor. Here a block is within a
row: codes and scales are sharded like the parameter, so that a step, a checkpoint, and a run resumed on other ranks are
the same in every layout. Rows whose length 64 does not divide, vectors, and small parameters keep fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tutti.core.tensors import local_part
from tutti.model.quantized import require_bitsandbytes
from tutti.train.adamw import AnyPrecisionAdamW, Part, bucket_size, store

SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256
SMALLEST = 4096
"""Number of elements below which a parameter's state stays in fp32."""

STATES = {"exp_avg": True, "exp_avg_sq": False}
"""The state stored as codes; True if signed."""


class AdamW8bit(AnyPrecisionAdamW):
    """AdamW whose state is stored as codes if that saves memory.

    State per parameter: `step`, `exp_avg` and `exp_avg_sq` (uint8 in the parameter's shape, each with a `..._scale`
    [.., columns / block], or else fp32), and `compensation` if the parameter is not fp32.
    """

    def __init__(self, params: Any, **adam: Any) -> None:
        require_bitsandbytes("train.optimizer: adamw_8bit needs", "choose another")
        from bitsandbytes.functional import create_dynamic_map

        self._tables = {name: create_dynamic_map(signed=signed).float() for name, signed in STATES.items()}
        self._zero_codes = {name: int((table == 0).nonzero()) for name, table in self._tables.items()}
        self._loading: dict[str, Any] = {}
        super().__init__(params, state_dtype=torch.float32, **adam)
        self.register_load_state_dict_pre_hook(_keep_state)
        self.register_load_state_dict_post_hook(_restore_state)

    def _fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = super()._fresh_state(parameter)
        block = block_of(parameter)
        for name in STATES if block else ():
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
            local_part(state[name]).fill_(self._zero_codes[name])
            state[f"{name}_scale"] = _zero_scales(parameter, block)
        return state

    def _parts(self, parameter: Tensor, state: dict[str, Tensor], step: Tensor | int) -> Iterator[Part]:
        if "exp_avg_scale" not in state:
            yield from super()._parts(parameter, state, step)
            return
        block = block_of(parameter)
        size = bucket_size(parameter)
        assert parameter.grad is not None
        whole = [local_part(parameter), local_part(parameter.grad)]
        assert all(tensor.is_contiguous() for tensor in whole), "matrices of models are contiguous"
        pieces = [tensor.view(-1).split(size) for tensor in whole]
        for name in STATES:
            codes = local_part(state[name]).view(-1).split(size)
            scales = local_part(state[f"{name}_scale"]).view(-1).split(size // block)
            table = self._tables[name] = self._tables[name].to(whole[0].device)
            pieces.append([Coded(*pair, table, block) for pair in zip(codes, scales, strict=True)])
        if "compensation" in state:
            pieces.append(local_part(state["compensation"]).view(-1).split(size))
        for stored, gradient, average, square, *rest in zip(*pieces, strict=True):
            yield Part(stored, gradient, average, square, rest[0] if rest else None, step)


class Coded:
    """A part of the state as codes, [n] bytes and [n / block] scales, that is read and written as fp32."""

    dtype = torch.uint8

    def __init__(self, codes: Tensor, scales: Tensor, table: Tensor, block: int) -> None:
        self._codes, self._scales, self._table, self._block = codes, scales, table, block

    def float(self) -> Tensor:
        """The numbers, fp32 [n]."""
        decode = torch.ops.bitsandbytes.dequantize_blockwise
        wide: Tensor = decode(self._codes, self._scales, self._table, self._block, torch.float32)
        return wide

    def store(self, wide: Tensor, refused: Tensor | None) -> None:
        """Store these numbers, fp32 [n], as the nearest codes, unless the step is `refused`."""
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(wide, self._table, self._block)
        store(self._codes, codes, refused)
        store(self._scales, scales, refused)


def block_of(parameter: Tensor) -> int:
    """The block size in the state of a parameter of this (full) shape; 0 if it is not stored as codes.

    ValueError: ranks split the rows within blocks.
    """
    if parameter.ndim < 2 or parameter.numel() < SMALLEST:
        return 0
    block = math.gcd(parameter.shape[-1], LARGEST_BLOCK)
    if block < SMALLEST_BLOCK:
        return 0
    columns = local_part(parameter).shape[-1]
    if columns % block:
        raise ValueError(
            f"train.optimizer: adamw_8bit holds rows of {parameter.shape[-1]} in blocks of {block}, which ranks that "
            f"have {columns} of them would cut; set another train.tensor_parallel_size, or choose another optimizer"
        )
    return block


def _zero_scales(parameter: Tensor, block: int) -> Tensor:
    """fp32 zeros [.., columns / block], sharded like `parameter`."""
    part = local_part(parameter)
    shapes: Tensor = torch.empty(*part.shape[:-1], part.shape[-1] // block, device="meta")
    if isinstance(parameter, DTensor):
        shape = torch.Size([*parameter.shape[:-1], parameter.shape[-1] // block])
        stride = torch.empty(shape, device="meta").stride()
        shapes = DTensor.from_local(
            shapes, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )
    return torch.zeros_like(shapes, device=part.device)


def _keep_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Keep the state about to be loaded, which torch casts to the parameters' dtype."""
    assert isinstance(optimizer, AdamW8bit)
    optimizer._loading = state_dict


def _restore_state(optimizer: Optimizer) -> None:
    """Undo that cast for codes and scales."""
    assert isinstance(optimizer, AdamW8bit)
    loaded, optimizer._loading = optimizer._loading, {}
    groups: Sequence[dict[str, Any]] = optimizer.param_groups
    pairs = zip(groups, loaded["param_groups"], strict=True)
    for group, saved in pairs:
        for parameter, key in zip(group["params"], saved["params"], strict=True):
            for name, value in loaded["state"].get(key, {}).items():
                if name.startswith("exp_avg"):
                    held = optimizer.state[parameter][name]
                    optimizer.state[parameter][name] = value.detach().clone().to(held.device)
