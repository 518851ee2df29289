"""`parallelize`: everything that is done to a model so that it trains on many ranks, in one order, on one page.

1. Experts: each rank keeps its share of every experts layer, and tokens travel.
2. Tensor: each rank keeps its share of every matrix, and collectives go around attention and MLP.
3. Ulysses: with train.async_enabled, values are sent early. (Attention itself does the rest of Ulysses, and the ring.)
4. Compile: each repeated block's forward, on local parameters; one compilation serves all blocks of a shape.
5. Activation checkpointing around it.
6. Batch invariance: with train.enable_batch_invariant_mode, samples go through it one by one.
7. Activation offload: tensors that are still kept for the backward pass go to host memory.
8. FSDP: parameters are sharded or copied, in mixed precision, a unit a block. It gathers outside of all the above. A
   rank that is alone needs none of it: its parameters stay plain tensors, cast (step 4) where they are used in another
   dtype.

Steps 2 to 7 wrap forwards, in the order of `tutti.core.modules`; the log says how. The model may be on the meta device;
weights are loaded afterwards, each rank reading its own slices.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from tutti.attention.ulysses import overlap_values
from tutti.config import TrainConfig
from tutti.core.compat import pick_vec_isa
from tutti.core.compute_dtype import compute_dtype
from tutti.core.modules import describe_wrappers, wrap_forward
from tutti.core.structure import ModelStructure
from tutti.parallel.activation_checkpoint import checkpoint_activations
from tutti.parallel.activation_offload import offload_activations
from tutti.parallel.batch_invariant import separate_samples
from tutti.parallel.expert import divide_experts, divided_experts, undivided_parts
from tutti.parallel.fsdp import holds_whole, postpones, shard
from tutti.parallel.mesh import Mesh
from tutti.parallel.sequence import sequence_ranks
from tutti.parallel.tensor import is_cast, split_tensors, use_local
from tutti.parallel.tp_plan import TensorPlan

log = logging.getLogger(__name__)


def parallelize(
    root: nn.Module, structure: ModelStructure, mesh: Mesh, train: TrainConfig, plan: TensorPlan | None = None
) -> None:
    """Prepare `root`, which holds a model of this structure, for training, in place.

    plan: what is split over the tensor axis; None if nothing is. Towers, which not every batch has inputs for, are
    checkpointed, and else belong to the root; a diffusion decoder's blocks, which every batch runs, are units as well.
    """
    blocks, basic, towers = [block for _, block in structure.blocks], structure.basic, structure.tower_blocks
    divide_experts(structure.experts, mesh, isolated=train.enable_batch_invariant_mode)
    if plan is not None:
        split_tensors(root, plan, mesh)
    sharing = sequence_ranks(mesh)
    if train.async_enabled and sharing is not None and sharing.ulysses_size > 1:
        overlap_values(blocks, sharing)
    if train.enable_compile:
        if mesh.grid.device_type == "cpu":
            name_instructions()
        for block in blocks:
            # Packed batches differ in length from one to the next, unless they are padded.
            wrap_forward(block, "compile", partial(torch.compile, dynamic=None if train.pad_to_length else True))
    alone = holds_whole(mesh, train)
    casts = alone and any(is_cast(parameter, compute_dtype(train)) for parameter in root.parameters())
    if plan is not None or casts:
        divided = divided_experts(root)
        use_local(
            tuple(dict.fromkeys((*undivided_parts(divided), *basic, *towers, *blocks, root))),
            skip=divided,
            dtype=compute_dtype(train) if casts else None,
        )
    if train.enable_gradient_checkpointing:
        checkpoint_activations(
            (*towers, *blocks),
            reentrant=train.enable_reentrant
            and not (_reads_within(root) or _in_parts(train) or hand_on_keys(blocks) or structure.by_keyword),
        )
    if train.enable_batch_invariant_mode:
        separate_samples(root, blocks)
    if train.enable_activation_offload:
        offload_activations(root, blocks, mesh.grid.device_type, train.activation_gpu_limit)
    if not alone:
        shard(root, (*basic, *blocks), mesh, train)
    if blocks:
        worn = describe_wrappers(blocks[0]) or "nothing"
        log.info("parallelize: %s; around the first of %d blocks: %s", mesh, len(blocks), worn)


def name_instructions() -> None:
    """Keep what is compiled for this processor's vector instructions apart from others in torch's cache of code.

    torch looks code up by graph and settings. A cache that is shared with a machine of wider vectors (a home folder, an
    image) gives code that steps over 16 numbers at a time; compiled here it computes 8 of them, and leaves the others
    as they were in memory.
    """
    tag, instructions = torch.compiler.config.cache_key_tag, f"[{pick_vec_isa()}]"
    if not tag.endswith(instructions):
        torch.compiler.config.cache_key_tag = tag + instructions


def _in_parts(train: TrainConfig) -> bool:
    """True where a backward pass asks for some gradients alone, which reentrant checkpointing cannot give.

    Logs a line where it is so.
    """
    if postpones(train):
        log.info("zero_bubble needs checkpointing that is not reentrant: train.enable_reentrant counts as false")
    return postpones(train)


def hand_on_keys(blocks: Sequence[nn.Module]) -> bool:
    """True where blocks give later ones their keys and values in a dict, whose gradients reentrant checkpointing does
    not see. Logs a line where it is so."""
    found = any(
        name.startswith("shared_kv") for block in blocks for name in inspect.signature(block.forward).parameters
    )
    if found:
        log.info("blocks share keys and values: train.enable_reentrant counts as false")
    return found


def _reads_within(root: nn.Module) -> bool:
    """True where the loss reads routers' logits, which blocks do not return: reentrant checkpointing gives them no
    gradient. Logs a line where it is so."""
    reads = bool(getattr(root, "has_router_loss", False))
    if reads:
        log.info("the router loss needs checkpointing that is not reentrant: train.enable_reentrant counts as false")
    return reads
