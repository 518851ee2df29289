"""`parallelize`: all that is done to a model to train it on many ranks, in order.

1. Experts: each rank keeps its share of every experts layer, and tokens are exchanged.
2. Tensor parallelism: each rank keeps its share of every matrix, with collectives around attention and MLP.
3. Ulysses: with train.async_enabled, values are sent early. (Attention itself does the rest of Ulysses, and the ring.)
4. Compile: each repeated block's forward, on local parameters; one compilation serves all blocks of a shape.
5. Activation checkpointing around it.
6. Batch invariance: with train.enable_batch_invariant_mode, samples go through a block one by one.
7. Activation offload: tensors that are still saved for the backward pass go to host memory.
8. FSDP: parameters are sharded or replicated, in mixed precision, one unit per block. It gathers parameters outside of
   all of the above. A single rank needs no FSDP: its parameters stay plain tensors, cast (in step 4) where they are
   used in another dtype.

Steps 2 to 7 wrap forwards, in the order of `tutti.core.modules`; the log shows the result. The model may be on the meta
device; weights are loaded afterwards, each rank reading its own slices.
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
    """Prepare `root`, which contains a model of this structure, for training, in place.

    plan: what is split over the tensor axis; None if nothing is. Towers, for which not every batch has inputs, are only
    checkpointed and otherwise belong to the root unit; a diffusion decoder's blocks, which run on every batch, are
    units of their own.
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
            # Packed batches vary in length, unless they are padded.
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
    """Separate code that is compiled for this processor's vector instructions from others in torch's compile cache.

    torch looks code up by graph and settings only. If the cache is shared with a machine with wider vectors (a home
    folder, an image), code from there advances 16 numbers at a time, but computes only 8 of them when compiled here,
    and leaves the others uninitialized.
    """
    tag, instructions = torch.compiler.config.cache_key_tag, f"[{pick_vec_isa()}]"
    if not tag.endswith(instructions):
        torch.compiler.config.cache_key_tag = tag + instructions


def _in_parts(train: TrainConfig) -> bool:
    """True if a backward pass computes only some gradients at a time, which reentrant checkpointing does not support.

    Logs a line if so.
    """
    if postpones(train):
        log.info("zero_bubble needs checkpointing that is not reentrant: train.enable_reentrant counts as false")
    return postpones(train)


def hand_on_keys(blocks: Sequence[nn.Module]) -> bool:
    """True if blocks pass keys and values to later ones in a dict, whose gradients reentrant checkpointing does not
    see. Logs a line if so."""
    found = any(
        name.startswith("shared_kv") for block in blocks for name in inspect.signature(block.forward).parameters
    )
    if found:
        log.info("blocks share keys and values: train.enable_reentrant counts as false")
    return found


def _reads_within(root: nn.Module) -> bool:
    """True if the loss uses router logits, which blocks do not return, so that reentrant checkpointing gives them no
    gradient. Logs a line if so."""
    reads = bool(getattr(root, "has_router_loss", False))
    if reads:
        log.info("the router loss needs checkpointing that is not reentrant: train.enable_reentrant counts as false")
    return reads
