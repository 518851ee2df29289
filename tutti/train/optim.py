"""The optimizer: which parameters decay, and AdamW in two precisions.

`adamw` is torch's own, fused. `anyprecision_adamw` keeps momentum and variance in bf16, and for bf16 parameters a bf16
compensation beside each one: parameter and optimizer state take 8 bytes instead of the 12 of fp32. Two things would go
wrong in plain bf16, whose neighbouring values lie up to 0.8 % apart:

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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tutti.config import Config, TrainConfig

BUCKET_ELEMENTS = 1 << 25
"""Elements that are widened to fp32 at once: bounds the temporary memory, large enough that launches do not matter."""

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """The optimizer over `model`'s trainable parameters, as `config.train` describes it.

    Every parameter is in exactly one group, tied ones once; a group's weight decay is train.weight_decay or 0. The
    groups' learning rate is set by the loop, with `set_lr`. ValueError: a no_decay name that matches nothing.
    """
    train = config.train
    groups = _decay_groups(model, train)
    betas = (train.adam_beta1, train.adam_beta2)
    if train.optimizer == "anyprecision_adamw":
        return AnyPrecisionAdamW(groups, lr=train.lr, betas=betas, eps=train.adam_eps)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    kernel: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(groups, lr=train.lr, betas=betas, eps=train.adam_eps, **kernel)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Take the next step with learning rate `lr`, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _decay_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups by weight decay, and by plain tensor or DTensor, which one kernel cannot take together."""
    exempt = _exempt_parameters(model, train)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (parameter in exempt, isinstance(parameter, DTensor))
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter: everything is frozen")
    return [
        {"params": parameters, "weight_decay": 0.0 if no_decay else train.weight_decay}
        for (no_decay, _), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _exempt_parameters(model: nn.Module, train: TrainConfig) -> set[nn.Parameter]:
    """The parameters that train.no_decay_modules and train.no_decay_params name."""
    exempt: set[nn.Parameter] = set()
    for name in train.no_decay_modules:
        matches = [module for module in model.modules() if _class_name(module) == name]
        if not matches:
            known = sorted({_class_name(module) for module in model.modules()})
            raise ValueError(
                f"train.no_decay_modules: the model has no module of class {name}; it has {', '.join(known)}"
            )
        exempt.update(parameter for module in matches for parameter in module.parameters())
    named = list(model.named_parameters(remove_duplicate=False))
    for part in train.no_decay_params:
        found = [parameter for name, parameter in named if part in name]
        if not found:
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
            for bucket in _buckets(p for p in group["params"] if p.grad is not None):
                for parameter in bucket:
                    if not self.state[parameter]:
                        self.state[parameter] = self._fresh_state(parameter)
                _update(bucket, [self.state[parameter] for parameter in bucket], group)
        return loss

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


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters in lists of about BUCKET_ELEMENTS local elements."""
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += _local(parameter).numel()
        if size >= BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _update(parameters: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    """One AdamW step of a bucket, in fp32, on local shards."""
    lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
    stored = [_local(parameter) for parameter in parameters]
    averages = [_local(state["exp_avg"]) for state in states]
    squares = [_local(state["exp_avg_sq"]) for state in states]
    grads = [_local(parameter.grad).float() for parameter in parameters if parameter.grad is not None]
    torch._foreach_add_([state["step"] for state in states], 1)
    steps = [int(state["step"].item()) for state in states]

    # .float() of an fp32 tensor is that tensor: fp32 parameters and state are then updated in place.
    wide = [tensor.float() for tensor in stored]
    first = [tensor.float() for tensor in averages]
    second = [tensor.float() for tensor in squares]
    compensated = [i for i, state in enumerate(states) if "compensation" in state]
    compensation = [_local(states[i]["compensation"]) for i in compensated]
    if compensated:
        torch._foreach_add_([wide[i] for i in compensated], compensation)

    torch._foreach_mul_(wide, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, [math.sqrt(1 - beta2**step) for step in steps])
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_(wide, first, denominator, [-lr / (1 - beta1**step) for step in steps])

    for i, target in enumerate(squares):
        if target.dtype == torch.bfloat16:
            _round_by_step(second[i], steps[i])
        if target is not second[i]:
            averages[i].copy_(first[i])
            target.copy_(second[i])
    for i, kept in zip(compensated, compensation, strict=True):
        stored[i].copy_(wide[i])
        wide[i].sub_(stored[i])
        if kept.dtype == torch.bfloat16:
            _round_by_step(wide[i], steps[i])
        kept.copy_(wide[i])


def _round_by_step(tensor: Tensor, step: int) -> None:
    """Round fp32 `tensor` in place to bf16 values, away from zero where the lost fraction is above a threshold.

    bf16 is fp32 without its low 16 bits: adding an offset to them carries into the bits that stay, or is cut off.
    """
    bits = tensor.view(torch.int32)
    bits.add_(int((step * GOLDEN_RATIO) % 1 * (1 << 16))).bitwise_and_(-(1 << 16))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
