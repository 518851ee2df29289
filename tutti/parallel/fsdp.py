"""Data parallelism and mixed precision, all of it with torch's `fully_shard` (FSDP2).

ddp is a mesh of copies with one shard each; ZeRO-2 and ZeRO-3 shard; hybrid sharding does both. Parameters are fp32
DTensors, cast to bf16 for computing, with gradients reduced in fp32. A single process uses no FSDP, since nothing is
gathered or reduced: its parameters are plain tensors, cast where they are used, and any layout can read its
checkpoints. Each block is a unit that is gathered (and cast) just before it runs. All other parameters (embedding,
final norm, head) belong to the root unit. Experts that are divided among ranks are units on a mesh of their own.

fsdp1 is a mode of this engine rather than torch's first FSDP, whose flat parameters would need a second implementation
of loading, saving and exporting. It has the properties that distinguish the first generation: a single switch for full
sharding, and gradients that are accumulated in full on each rank and reduced once per step (less traffic, more memory).
fsdp2 with full sharding reduces the gradients of every micro batch and keeps only its shard.

With train.enable_fsdp_offload shards are in host memory: a unit's parameters are copied to the device when it is
gathered, its reduced gradients are copied back, and the optimizer runs on the host. Gradients are then reduced for
every micro batch, since otherwise the whole model's gradients would stay on the device.

We do not ask FSDP to prefetch units earlier than by default (the next unit in the backward pass; in the forward pass
the host runs ahead). On CPUs this saved no time, since gloo's copies take the cores that compute. Its effect on several
accelerators has yet to be measured.

Gradients are summed over ranks, not averaged: the loss is divided by the number of targets of the global batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from tutti.config import TrainConfig
from tutti.core.compat import fsdp_groups
from tutti.core.compute_dtype import compute_dtype
from tutti.core.device import on_accelerator
from tutti.core.modules import attached
from tutti.parallel.expert import divided_experts, shard_dim, undivided_parts
from tutti.parallel.grads import sum_replicated
from tutti.parallel.mesh import Mesh
from tutti.parallel.tensor import with_local_parameters

log = logging.getLogger(__name__)


def shard(root: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, train: TrainConfig) -> None:
    """Apply `fully_shard` to each of `blocks` (the last of which runs last) and to `root`, in place.

    Parameters are gathered in train.compute_dtype; with train.enable_mixed_precision, gradients are reduced in fp32.
    """
    reduce_dtype = torch.float32 if train.enable_mixed_precision else None
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype(train), reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    unit = partial(fully_shard, mp_policy=precision, offload_policy=_offload_policy(train, mesh))
    frees = reshards(train)
    reshard = frees and mesh.num_shards > 1
    if train.data_parallel_mode == "fsdp1":
        log.info(
            "train.data_parallel_mode fsdp1 runs on the engine of fsdp2, with its rules: gathered parameters are %s, "
            "gradients reduced %s",
            "freed after each pass" if train.enable_full_shard else "kept until the step's last backward pass",
            "with every micro batch, as they are offloaded" if offloads(train) else "once, with the last micro batch",
        )
    divided = divided_experts(root)
    # The last block is needed first in the backward pass, like the root's own parameters: it stays gathered.
    last = set(blocks[-1].modules()) if blocks else set()
    for part in undivided_parts(divided):
        unit(part, mesh=mesh.fsdp, reshard_after_forward=reshard and part not in last)
    for experts in divided:
        unit(
            experts,
            mesh=mesh.expert_fsdp,
            reshard_after_forward=frees and mesh.num_expert_shards > 1 and experts not in last,
            shard_placement_fn=lambda parameter: Shard(shard_dim(parameter, mesh.num_expert_shards)),
        )
    for together in units_of([block for block in blocks if block not in divided]):
        stays = any(block in last for block in together)
        unit(together, mesh=mesh.fsdp, reshard_after_forward=reshard and not stays)
    unit(root, mesh=mesh.fsdp, reshard_after_forward=False)
    for module in fsdp_modules(root):
        if max(mesh.fsdp.size(), mesh.expert_fsdp.size()) > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def units_of(blocks: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Group `blocks` into units for `fully_shard`: blocks that share parameters (Zamba) form one unit."""
    groups: list[tuple[list[nn.Module], set[nn.Parameter]]] = []
    for block in blocks:
        members, held = [block], set(block.parameters())
        for other in [group for group in groups if not held.isdisjoint(group[1])]:
            groups.remove(other)
            members, held = [*other[0], *members], held | other[1]
        groups.append((members, held))
    return [members for members, _ in groups]


def _offload_policy(train: TrainConfig, mesh: Mesh) -> OffloadPolicy:
    """The policy for where shards are kept between uses. Logs a line if host and device are the same."""
    if not offloads(train):
        return OffloadPolicy()
    on_device = mesh.grid.device_type != "cpu"
    if not on_device:
        log.warning(
            "train.enable_fsdp_offload: this run computes on the CPU, whose memory is the host's: nothing moves"
        )
    return CPUOffloadPolicy(pin_memory=on_device)


def reshards(train: TrainConfig) -> bool:
    """True if a block's parameters are freed after its forward pass: ZeRO-3, or ZeRO-2 with FSDP2's own switch."""
    mode = train.data_parallel_mode
    asked = mode != "ddp" and (train.enable_full_shard or (mode == "fsdp2" and train.enable_reshard_after_forward))
    return asked and not postpones(train)


def postpones(train: TrainConfig) -> bool:
    """True if gradients of parameters are computed later than the rest of the backward pass. FSDP's hooks do not see
    this, so everything that a step gathers stays until its end, when gradients are reduced."""
    return train.pipeline_parallel_size > 1 and train.pipeline_schedule == "zero_bubble"


def holds_whole(mesh: Mesh, train: TrainConfig) -> bool:
    """True if this is the only rank and its parameters stay on their device, so that FSDP has nothing to do."""
    return mesh.grid.size() == 1 and not offloads(train)


def offloads(train: TrainConfig) -> bool:
    """True if parameters, gradients and optimizer state are in host memory."""
    return train.data_parallel_mode != "ddp" and train.enable_fsdp_offload


def run_as_forward(root: nn.Module, method: str) -> None:
    """Gather the parameters of `root` for calls of `method` as for its forward."""
    if isinstance(root, FSDPModule):
        register_fsdp_forward_method(root, method)
    elif attached(root).local_parameters is not None and method not in root.__dict__:
        setattr(root, method, with_local_parameters(getattr(root, method), root))


def fsdp_modules(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


class GradientSync(Protocol):
    """Controls when FSDP gathers parameters and reduces gradients, as far as a step's executor has to."""

    def before(self, *, last: bool) -> None:
        """Called before each forward and backward pass of a micro batch. last: it is the last one of the step."""
        ...

    def finish(self) -> None:
        """Complete the step's gradients, once its last backward pass is over. A collective call."""
        ...


def gradient_sync(root: nn.Module, mesh: Mesh, train: TrainConfig) -> GradientSync:
    """The synchronisation of gradients over the ranks that `parallelize` has prepared `root` for."""
    return NoSync(root) if holds_whole(mesh, train) else FSDPSync(root, mesh, train)


class NoSync:
    """Of a rank that is alone: gradients are complete as they are.

    On a CPU they are moved to memory of their own, which they keep from step to step, before a second micro batch adds
    to them. Where the backward pass made them they would lie scattered among activations, and the room between them
    would fit hardly any of the next ones.
    """

    def __init__(self, root: nn.Module) -> None:
        self._parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
        self._kept: list[Tensor] = []

    def before(self, *, last: bool) -> None:
        if not (self._kept or last or any(map(on_accelerator, self._parameters))):
            self._kept = [torch.empty_like(parameter) for parameter in self._parameters]
        for parameter, kept in zip(self._parameters, self._kept, strict=False):
            if parameter.grad is not None and parameter.grad is not kept:
                parameter.grad = kept.copy_(parameter.grad)

    def finish(self) -> None:
        pass


class FSDPSync:
    """Tells FSDP before each micro batch of a step whether to reduce its gradients over the ranks, and ends the step.

    With fsdp2's ZeRO-3, and where gradients are offloaded, each micro batch's are reduced, so that only shards of them
    exist. Otherwise they are summed locally and reduced once, with the step's last micro batch. Copies (HSDP) sum their
    shards of them with the last one, too, where that can be. Parameters stay gathered between micro batches where
    train.enable_reshard_after_backward (and ZeRO-3) leave them so; after the last one they are always freed, since the
    optimizer then changes them.
    """

    def __init__(self, root: nn.Module, mesh: Mesh, train: TrainConfig) -> None:
        self._root, self._mesh = root, mesh
        self._modules: Sequence[FSDPModule] = fsdp_modules(root)
        several = max(mesh.num_shards, mesh.num_expert_shards) > 1
        zero3 = train.data_parallel_mode != "ddp" and train.enable_full_shard and several
        second = train.data_parallel_mode != "fsdp1"
        self._postpones = postpones(train)
        at_once = not self._postpones
        self._reduce_each = at_once and ((zero3 and second) or offloads(train))
        self._reshard_each = at_once and (zero3 or (second and train.enable_reshard_after_backward))
        # Of several stages on a rank only one still has gradients when the last backward pass runs.
        self._copies_each = offloads(train) or train.pipeline_stages_per_rank > 1
        self._is_first = True

    def before(self, *, last: bool) -> None:
        assert isinstance(self._root, FSDPModule)
        if self._is_first:
            left = [group for group in fsdp_groups(self._root) if group._partial_reduce_output is not None]
            assert not left, "a unit without gradients in the last micro batch had some before"
        self._is_first = last
        self._root.set_is_last_backward(last)
        for module in self._modules:
            module.set_requires_gradient_sync(last or self._reduce_each, recurse=False)
            module.set_requires_all_reduce(last or self._copies_each, recurse=False)
            module.set_reshard_after_backward(last or self._reshard_each, recurse=False)

    def finish(self) -> None:
        """Complete the step's gradients, once its last backward pass is over. A collective call.

        Where gradients of parameters are postponed, FSDP's hooks had run before there were any: they are reduced now.
        """
        if self._postpones:
            self.before(last=True)
            for group in fsdp_groups(self._root):
                group.post_backward()
            fully_shard.state(self._root)._root_post_backward_final_callback()  # type: ignore[attr-defined]
        sum_replicated(self._root.parameters(), self._mesh)
