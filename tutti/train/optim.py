"""The optimizer: which parameters decay, and AdamW in two precisions.

`adamw` is torch's own, fused; `muon` is in `tutti.train.muon`. `anyprecision_adamw` keeps momentum and variance in
bf16, and for bf16 parameters a bf16 compensation beside each one: parameter and optimizer state take 8 bytes instead of
the 12 of fp32. Two things would go wrong in plain bf16, whose neighbouring values lie up to 0.8 % apart:

1. An update smaller than half that gap is rounded away, and late in training nearly all are. Kahan's remedy
   ("Revisiting BFloat16 Training", arXiv 2010.06192): what rounding took away is kept in the compensation c and counted
   at the next step, so that p + c is the parameter to about 16 bits.
2. The variance shrinks by 0.1 % a step (beta2 = 0.999), which rounding to nearest undoes every time: it could grow but
   never fall. It is therefore rounded up or down by a threshold that wanders over (0, 1) with the step, along multiples
   of the golden ratio, so that over a few steps no fraction is favoured. The threshold depends on the step alone: the
   result knows nothing of the layout, and a resumed run needs no random state.

One step, for a bucket of parameters at a time: widen p + c, momentum and variance to fp32, do AdamW on them, round
back, and keep the parameter's rounding error as the new c. fp32 parameters are updated in place, without compensation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tutti.config import Config, TrainConfig
from tutti.core.compute_dtype import compute_dtype
from tutti.core.device import on_accelerator
from tutti.core.tensors import local_part
from tutti.model.structure import part_parameters
from tutti.train.muon import Muon, block_matrices

BUCKET_ON_CPU, BUCKET_ON_DEVICE = 1 << 18, 1 << 24
"""Elements that are widened to fp32 at once: within a CPU's caches; on an accelerator, enough to hide the launches."""

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def build_optimizer(model: nn.Module, config: Config, *, is_complete: bool = True) -> Optimizer:
    """The optimizer over `model`'s trainable parameters, as `config.train` describes it.

    Every parameter is in exactly one group, tied ones once; a group's weight decay is train.weight_decay or 0. The
    groups' learning rate is set by the loop, with `set_lr`, times the group's `lr_scale` (train.part_lr). is_complete:
    `model` is not a stage of a pipeline. ValueError, if it is: a no_decay name or a part that matches nothing, or
    nothing to train.
    """
    train = config.train
    groups = decay_groups(model, train, is_complete=is_complete)
    betas = (train.adam_beta1, train.adam_beta2)
    if train.optimizer == "anyprecision_adamw":
        return AnyPrecisionAdamW(groups, lr=train.lr, betas=betas, eps=train.adam_eps)
    if train.optimizer == "muon":
        adam = {"lr": train.lr, "betas": betas, "eps": train.adam_eps}
        return Muon(groups, momentum=train.muon_momentum, dtype=compute_dtype(train), **adam)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    kernel: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(groups, lr=train.lr, betas=betas, eps=train.adam_eps, **kernel)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Take the next step with learning rate `lr`, in every group times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def decay_groups(model: nn.Module, train: TrainConfig, *, is_complete: bool = True) -> list[dict[str, Any]]:
    """Parameter groups by weight decay, by plain tensor or DTensor, which one kernel cannot take together, and by the
    scale of the learning rate; with muon also by `matrices`, those that it makes orthogonal."""
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
        groups[True, False, 1.0, False] = []  # an optimizer is never without a group
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
    """The learning rate of the parameters that train.part_lr names, over train.lr; of several parts that a parameter is
    in, the last one counts."""
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
    """The class the user knows; fully_shard puts a class of its own in front of it."""
    kinds = [kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule)]
    return kinds[0].__name__


class AnyPrecisionAdamW(Optimizer):
    """AdamW whose momentum and variance are kept in `state_dtype`, with compensation for parameters below fp32.

    Works on the local shards of DTensors. With fp32 parameters and `state_dtype` fp32 it is AdamW. State per parameter:
    `step` (a scalar on the CPU), `exp_avg`, `exp_avg_sq`, and `compensation` where the parameter is not fp32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._state_dtype = state_dtype
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.register_load_state_dict_post_hook(_restore_state_dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for bucket in _buckets(self._advance(group["params"])):
                _update(bucket, group)
        return loss

    def _advance(self, parameters: Iterable[Tensor]) -> Iterator[_Part]:
        """Count the step of every parameter that has a gradient, and cut it up for the update."""
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter] = self._fresh_state(parameter)
            state = self.state[parameter]
            state["step"] += 1
            yield from _parts(parameter, parameter.grad, state)

    def _fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter, dtype=self._state_dtype),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=self._state_dtype),
        }
        if parameter.dtype != torch.float32:
            state["compensation"] = torch.zeros_like(parameter)
        return state


def _restore_state_dtype(optimizer: Optimizer) -> None:
    """Undo that torch's load_state_dict casts all state to its parameter's type."""
    assert isinstance(optimizer, AnyPrecisionAdamW)
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(optimizer._state_dtype)


class _Part(NamedTuple):
    """At most a bucket's elements of a parameter on this rank, with gradient and state; `step` counts its steps."""

    parameter: Tensor
    grad: Tensor
    average: Tensor
    square: Tensor
    compensation: Tensor | None
    step: int


def _parts(parameter: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Iterator[_Part]:
    """The parts of a parameter; of one that is not contiguous, the whole."""
    step = int(state["step"].item())
    whole = [local_part(tensor) for tensor in (parameter, grad, state["exp_avg"], state["exp_avg_sq"])]
    if "compensation" in state:
        whole.append(local_part(state["compensation"]))
    if all(tensor.is_contiguous() for tensor in whole):
        parts = zip(*(tensor.view(-1).split(_bucket_size(tensor)) for tensor in whole), strict=True)
    else:
        parts = zip(*([tensor] for tensor in whole), strict=True)
    for stored, gradient, average, square, *compensation in parts:
        yield _Part(stored, gradient, average, square, compensation[0] if compensation else None, step)


def _bucket_size(tensor: Tensor) -> int:
    return BUCKET_ON_DEVICE if on_accelerator(tensor) else BUCKET_ON_CPU


def _buckets(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Consecutive parts in lists of about a bucket's elements."""
    bucket: list[_Part] = []
    size = 0
    for part in parts:
        bucket.append(part)
        size += part.parameter.numel()
        if size >= _bucket_size(part.parameter):
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _update(bucket: Sequence[_Part], group: dict[str, Any]) -> None:
    """One AdamW step of a bucket, in fp32."""
    lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
    # .float() of an fp32 tensor is that tensor: fp32 parameters and state are updated in place.
    wide = [part.parameter.float() for part in bucket]
    grads = [part.grad.float() for part in bucket]
    averages = [part.average.float() for part in bucket]
    squares = [part.square.float() for part in bucket]
    for tensor, part in zip(wide, bucket, strict=True):
        if part.compensation is not None:
            tensor.add_(part.compensation)

    torch._foreach_mul_(wide, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(averages, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, [math.sqrt(1 - beta2**part.step) for part in bucket])
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(wide, averages, denominators, [-lr / (1 - beta1**part.step) for part in bucket])

    for part, parameter, average, square in zip(bucket, wide, averages, squares, strict=True):
        if part.square.dtype == torch.bfloat16:
            _round_by_step(square, part.step)
        if part.square is not square:
            part.average.copy_(average)
            part.square.copy_(square)
        if part.compensation is not None:
            part.parameter.copy_(parameter)
            parameter.sub_(part.parameter)
            if part.compensation.dtype == torch.bfloat16:
                _round_by_step(parameter, part.step)
            part.compensation.copy_(parameter)


def _round_by_step(tensor: Tensor, step: int) -> None:
    """Round fp32 `tensor` in place to bf16 values, away from zero where the lost fraction is above a threshold.

    bf16 is fp32 without its low 16 bits: adding an offset to them carries into the bits that stay, or is cut off.
    """
    bits = tensor.view(torch.int32)
    bits.add_(int((step * GOLDEN_RATIO) % 1 * (1 << 16))).bitwise_and_(-(1 << 16))
