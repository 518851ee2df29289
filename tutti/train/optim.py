"""The optimizer by name, and its parameter groups: weight decay and learning rate of each parameter.

`adamw` is torch's own, fused; `anyprecision_adamw` is in `tutti.train.adamw`, `adamw_8bit` and `muon` are in modules of
the same name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tutti.config import Config, TrainConfig
from tutti.core.compat import fused_devices
from tutti.core.compute_dtype import compute_dtype
from tutti.core.device import on_accelerator
from tutti.core.tensors import local_part
from tutti.model.structure import part_parameters
from tutti.train.adamw import AnyPrecisionAdamW
from tutti.train.adamw_8bit import AdamW8bit
from tutti.train.muon import Muon, block_matrices


def build_optimizer(model: nn.Module, config: Config, *, is_complete: bool = True) -> Optimizer:
    """The optimizer over `model`'s trainable parameters, as `config.train` describes it.

    Every parameter is in exactly one group, tied ones once. A group's weight decay is train.weight_decay or 0. The loop
    sets the groups' learning rate with `set_lr`, which multiplies by the group's `lr_scale` (train.part_lr).
    is_complete: `model` is not a pipeline stage; then a no_decay name or a part that matches nothing, and a model with
    nothing to train, raise ValueError.
    """
    train = config.train
    groups = decay_groups(model, train, is_complete=is_complete)
    betas = (train.adam_beta1, train.adam_beta2)
    if train.optimizer == "anyprecision_adamw":
        return AnyPrecisionAdamW(groups, lr=train.lr, betas=betas, eps=train.adam_eps)
    if train.optimizer == "adamw_8bit":
        return AdamW8bit(groups, lr=train.lr, betas=betas, eps=train.adam_eps)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= set(fused_devices())
    adam: dict[str, Any] = {"lr": train.lr, "betas": betas, "eps": train.adam_eps}
    adam |= {"fused": True} if fused else {"foreach": True}
    if train.optimizer == "muon":
        return Muon(groups, momentum=train.muon_momentum, dtype=compute_dtype(train), **adam)
    return torch.optim.AdamW(groups, **adam)


def room_for_state(optimizer: Optimizer) -> list[Tensor]:
    """Memory reserved on a CPU for the optimizer state of the first step, to be freed just before it.

    The memory is never written, so it takes no physical memory. Without it, the state would be scattered over the
    places of the first step's activations, and the gaps between would be too small for later activations.
    """
    held = (local_part(parameter) for group in optimizer.param_groups for parameter in group["params"])
    return [torch.empty_like(item) for item in held if not on_accelerator(item) for _ in range(2)]


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def decay_groups(model: nn.Module, train: TrainConfig, *, is_complete: bool = True) -> list[dict[str, Any]]:
    """Parameter groups by weight decay, by plain tensor or DTensor (one kernel cannot take both), and by learning rate
    scale; with muon also by `matrices`, which it orthogonalizes."""
    exempt = _exempt_parameters(model, train, is_complete)
    scales = _lr_scales(model, train, is_complete)
    matrices = block_matrices(model) if train.optimizer == "muon" else set()
    groups: dict[tuple[bool, bool, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            scale = scales.get(parameter, 1.0)
            key = (parameter in exempt, isinstance(parameter, DTensor), scale, parameter in matrices)
            groups.setdefault(key, []).append(parameter)
    if not groups and is_complete:
        raise ValueError("the model has no trainable parameter: everything is frozen")
    if not groups:
        groups[True, False, 1.0, False] = []  # an optimizer needs at least one group
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if no_decay else train.weight_decay,
            "lr_scale": scale,
            "matrices": is_matrices,
        }
        for (no_decay, _, scale, is_matrices), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _lr_scales(model: Any, train: TrainConfig, is_complete: bool) -> dict[nn.Parameter, float]:
    """The learning rate, relative to train.lr, of the parameters that train.part_lr names; if several parts contain a
    parameter, the last one counts."""
    return {
        parameter: rate / train.lr
        for part, rate in train.part_lr.items()
        for parameter in part_parameters(model, part, "train.part_lr", is_complete=is_complete).values()
    }


def _exempt_parameters(model: nn.Module, train: TrainConfig, is_complete: bool) -> set[nn.Parameter]:
    """The parameters that train.no_decay_modules and train.no_decay_params name."""
    exempt: set[nn.Parameter] = set()
    for name in train.no_decay_modules:
        matches = [module for module in model.modules() if _class_name(module) == name]
        if not matches and is_complete:
            known = sorted({_class_name(module) for module in model.modules()})
            raise ValueError(
                f"train.no_decay_modules: the model has no module of class {name}; it has {', '.join(known)}"
            )
        exempt.update(parameter for module in matches for parameter in module.parameters())
    named = list(model.named_parameters(remove_duplicate=False))
    for part in train.no_decay_params:
        found = [parameter for name, parameter in named if part in name]
        if not found and is_complete:
            known = sorted({".".join(name.split(".")[-2:]) for name, _ in named})
            raise ValueError(
                f"train.no_decay_params: no parameter's name contains {part}; the names end in {', '.join(known)}"
            )
        exempt.update(found)
    return exempt


def _class_name(module: nn.Module) -> str:
    """The class name that the user knows; fully_shard adds a class of its own in front of it."""
    kinds = [kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule)]
    return kinds[0].__name__
