"""Ulysses for diffusion transformers: ranks share the tokens of a batch, and exchange them for heads in attention.

diffusers' classes declare where their sequences are split and gathered (`_cp_plan`), and its attention does the
exchange, with its own backward pass. Each rank ends with the output for all tokens, and gets the gradients of its own
tokens; summed over the ranks, as FSDP does, they are those of one process. Both parts are applied here rather than by
diffusers' `enable_parallelism`, which requires an accelerator.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tutti.core.dist import World
from tutti.model.denoiser import Denoiser
from tutti.parallel.mesh import Mesh


def check_shares(model: Denoiser, ranks: int) -> None:
    """Raise ValueError if the tokens of `model` cannot be shared by this many ranks."""
    if ranks == 1:
        return
    name = type(model.net).__name__
    if getattr(model.net, "_cp_plan", None) is None or not _attentions(model.net):
        raise ValueError(f"train.ulysses_parallel_size: diffusers has no plan to share the tokens of {name}; set 1")
    if model.family.mask == "encoder_attention_mask":
        raise ValueError(
            f"train.ulysses_parallel_size: the attention of {name} makes its mask of captions for all heads, of which "
            "each rank would have a share; set 1"
        )
    heads = model.net.config.num_attention_heads
    if heads % ranks:
        raise ValueError(f"train.ulysses_parallel_size: {ranks} does not divide the {heads} attention heads of {name}")


def share_tokens(model: Denoiser, mesh: Mesh, world: World) -> None:
    """Make the ranks of the ulysses axis share the tokens of `model`, in place. A collective call."""
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    size = mesh.size("ulysses")
    if size == 1:
        return
    # The axis is the innermost one in use, so its ranks are neighbors.
    grid = init_device_mesh(
        world.device.type, (world.size // size, 1, size), mesh_dim_names=("data", "ring", "ulysses")
    )
    shares = ContextParallelConfig(ulysses_degree=size, mesh=grid["ring", "ulysses"])
    settings: Any = ParallelConfig(context_parallel_config=shares)
    settings.setup(world.rank, world.size, world.device, mesh=grid["ring", "ulysses"])
    for processor in _attentions(model.net):
        processor._parallel_config = settings
    apply_context_parallel(model.net, shares, model.net._cp_plan)


def _attentions(net: nn.Module) -> list[Any]:
    """The attention processors that support sharing tokens."""
    found = (getattr(module, "processor", None) for module in net.modules())
    return [processor for processor in found if hasattr(processor, "_parallel_config")]
