"""Data parallelism and mixed precision, all of it on one engine: torch's `fully_shard` (FSDP2).

ddp is a mesh of copies with one shard each, ZeRO-2 and ZeRO-3 shard, hybrid sharding does both; a single process is a
mesh of one. So parameters are fp32 DTensors everywhere, computed with in bf16, and reduced in fp32, and a checkpoint
looks the same whatever made it. Each block is a unit that is gathered (and cast) just before it runs; what is left
(embedding, final norm, head) belongs to the root. Experts that are divided among ranks are units of their own, on a
mesh of their own.

Gradients are summed over ranks, not averaged: the loss is divided by the number of targets of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from tutti.config import TrainConfig
from tutti.parallel.expert import divided_experts, shard_dim
from tutti.parallel.mesh import Mesh


def shard(root: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, train: TrainConfig) -> None:
    """Apply `fully_shard` to each of `blocks` and to `root`, in place.

    Parameters are gathered in train.compute_dtype; gradients are reduced in fp32 with train.enable_mixed_precision.
    """
    reduce_dtype = torch.float32 if train.enable_mixed_precision else None
    compute_dtype = getattr(torch, train.compute_dtype)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    reshard = reshards(train) and mesh.num_shards > 1
    divided = divided_experts(root)
    for experts in divided:
        _shard_experts(experts, mesh, policy, reshard=reshard)
    for block in blocks:
        if block in divided:
            continue
        fully_shard(block, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=reshard)
    # The root's parameters are needed first in the backward pass, so they stay gathered in between.
    fully_shard(root, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=False)
    for module in fsdp_modules(root):
        if mesh.fsdp.size() > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_experts(experts: nn.Module, mesh: Mesh, policy: MixedPrecisionPolicy, *, reshard: bool) -> None:
    """Split a layer's experts further over the ranks that hold the same ones; its submodules (norms) are not divided
    by experts, and belong to all ranks."""
    num_shards = mesh.expert_fsdp.size(-1)
    for child in experts.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(
        experts,
        mesh=mesh.expert_fsdp,
        mp_policy=policy,
        reshard_after_forward=reshard and num_shards > 1,
        shard_placement_fn=lambda parameter: Shard(shard_dim(parameter, num_shards)),
    )


def reshards(train: TrainConfig) -> bool:
    """Whether a block's parameters are freed after its forward pass: ZeRO-3, or ZeRO-2 with FSDP2's own switch."""
    return train.data_parallel_mode != "ddp" and (train.enable_full_shard or train.enable_reshard_after_forward)


def fsdp_modules(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


class GradientSync:
    """Says before each micro batch of a step whether its gradients are reduced over the ranks at once.

    With ZeRO-3 each micro batch's are, so that only shards of gradients exist. Otherwise they are summed up locally and
    reduced once, with the step's last micro batch. Parameters stay gathered between micro batches where
    train.enable_reshard_after_backward (and ZeRO-3) leave them so; after the last one they are always freed, since the
    optimizer then changes them.
    """

    def __init__(self, root: nn.Module, mesh: Mesh, train: TrainConfig) -> None:
        self._root = root
        self._modules: Sequence[FSDPModule] = fsdp_modules(root)
        sharded = train.data_parallel_mode != "ddp" and mesh.num_shards > 1
        self._reduce_each = sharded and train.enable_full_shard
        self._reshard_each = self._reduce_each or train.enable_reshard_after_backward

    def before(self, *, last: bool) -> None:
        assert isinstance(self._root, FSDPModule)
        self._root.set_is_last_backward(last)
        for module in self._modules:
            module.set_requires_gradient_sync(last or self._reduce_each, recurse=False)
            module.set_reshard_after_backward(last or self._reshard_each, recurse=False)
