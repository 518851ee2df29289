"""AdamW with its state in two bytes a number, or as another class holds it (`tutti.train.adamw_8bit`).

`anyprecision_adamw` keeps momentum and variance in bf16, and for bf16 parameters a bf16 compensation beside each one:
parameter and optimizer state take 8 bytes instead of the 12 of fp32. Two things would go wrong in plain bf16, whose
neighbouring values lie up to 0.8 % apart:

1. An update smaller than half that gap is rounded away, and late in training nearly all are. Kahan's remedy
   ("Revisiting BFloat16 Training", arXiv 2010.06192): what rounding took away is kept in the compensation c and counted
   at the next step, so that p + c is the parameter to about 16 bits.
2. The variance shrinks by 0.1 % a step (beta2 = 0.999), which rounding to nearest undoes every time: it could grow but
   never fall. It is therefore rounded up or down by a threshold that wanders over (0, 1) with the step, along multiples
   of the golden ratio, so that over a few steps no fraction is favoured. The threshold depends on the step alone: the
   result knows nothing of the layout, and a resumed run needs no random state.

One step, for a bucket of parameters at a time: widen p + c, momentum and variance to fp32, do AdamW on them, round
back, and keep the parameter's rounding error as the new c. fp32 parameters are updated in place, without compensation.

An accelerator decides by itself whether a step is taken (`found_inf`), and therefore counts the steps as well: then
all is updated in a copy, from which nothing is stored if the step is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from tutti.core.device import on_accelerator
from tutti.core.tensors import local_part

BUCKET_ON_CPU, BUCKET_ON_DEVICE = 1 << 18, 1 << 24
"""Number of elements widened to fp32 at once: within a CPU's caches; on an accelerator, enough to hide launch costs.
"""

GOLDEN_RATIO = round((math.sqrt(5) - 1) / 2 * (1 << 32))
"""In units of 2^-32, so that a device multiplies by it exactly."""


class AnyPrecisionAdamW(Optimizer):
    """AdamW with momentum and variance in `state_dtype`, and compensation for parameters below fp32.

    Works on the local shards of DTensors. With fp32 parameters and `state_dtype` fp32 it is AdamW. State per parameter:
    `step` (a scalar on the parameter's device), `exp_avg`, `exp_avg_sq`, and `compensation` if the parameter is not
    fp32. As with torch's fused AdamW, a step changes nothing if `found_inf`, a tensor on the device, is 1.
    """

    _step_supports_amp_scaling = True  # torch's mark of optimizers that take `found_inf`

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
        refused = self._refused()
        for group in self.param_groups:
            for bucket in _buckets(self._advance(group["params"], refused)):
                _update(bucket, group, refused)
        return loss

    def _refused(self) -> Tensor | None:
        """True, as a tensor on the parameters' device, if the step must change nothing; None: the step is always
        taken."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        first = next(parameters, None)
        return None if found_inf is None or first is None else found_inf.bool().to(first.device)

    def _advance(self, parameters: Iterable[Tensor], refused: Tensor | None) -> Iterator[Part]:
        """Count the step of every parameter that has a gradient, and split the parameters into parts for the update."""
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter] = self._fresh_state(parameter)
            state = self.state[parameter]
            state["step"] += 1 if refused is None else ~refused
            on_host = refused is None and state["step"].device.type == "cpu"
            yield from self._parts(parameter, state, int(state["step"]) if on_host else state["step"].long())

    def _parts(self, parameter: Tensor, state: dict[str, Any], step: Tensor | int) -> Iterator[Part]:
        """The parts of a parameter with a gradient; if it is not contiguous, one part."""
        assert parameter.grad is not None
        whole = [local_part(tensor) for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        if "compensation" in state:
            whole.append(local_part(state["compensation"]))
        if all(tensor.is_contiguous() for tensor in whole):
            parts = zip(*(tensor.view(-1).split(bucket_size(tensor)) for tensor in whole), strict=True)
        else:
            parts = zip(*([tensor] for tensor in whole), strict=True)
        for stored, gradient, average, square, *compensation in parts:
            yield Part(stored, gradient, average, square, compensation[0] if compensation else None, step)

    def _fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=self._state_dtype),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=self._state_dtype),
        }
        if parameter.dtype != torch.float32:
            state["compensation"] = torch.zeros_like(parameter)
        return state


def _restore_state_dtype(optimizer: Optimizer) -> None:
    """Undo torch's load_state_dict, which casts all state but `step` to its parameter's dtype, and does not move
    `step`."""
    assert isinstance(optimizer, AnyPrecisionAdamW)
    for parameter, state in optimizer.state.items():
        state["step"] = state["step"].to(parameter.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(optimizer._state_dtype)


class Part(NamedTuple):
    """Part of a parameter on this rank, of at most a bucket's elements, with gradient and state.

    step: the number of steps including this one, an int64 tensor where the host would otherwise have to wait for it.
    """

    parameter: Tensor
    grad: Tensor
    average: Any
    square: Any
    compensation: Tensor | None
    step: Tensor | int


def bucket_size(tensor: Tensor) -> int:
    """The number of elements of a tensor widened at once, on its device: a multiple of every block size."""
    return BUCKET_ON_DEVICE if on_accelerator(tensor) else BUCKET_ON_CPU


def _buckets(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Consecutive parts in lists of about a bucket's elements."""
    bucket: list[Part] = []
    size = 0
    for part in parts:
        bucket.append(part)
        size += part.parameter.numel()
        if size >= bucket_size(part.parameter):
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _update(bucket: Sequence[Part], group: dict[str, Any], refused: Tensor | None) -> None:
    """One AdamW step of a bucket, in fp32, discarded if `refused`."""
    lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
    wide = [_widened(part.parameter, refused) for part in bucket]
    grads = [part.grad.float() for part in bucket]
    averages = [_widened(part.average, refused) for part in bucket]
    squares = [_widened(part.square, refused) for part in bucket]
    for tensor, part in zip(wide, bucket, strict=True):
        if part.compensation is not None:
            tensor.add_(part.compensation)

    torch._foreach_mul_(wide, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(averages, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, [_correction(beta2, part.step) ** 0.5 for part in bucket])
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(averages, denominators)
    torch._foreach_mul_(updates, [lr / _correction(beta1, part.step) for part in bucket])
    torch._foreach_sub_(wide, updates)

    for part, parameter, average, square in zip(bucket, wide, averages, squares, strict=True):
        if part.square.dtype == torch.bfloat16:
            _round_by_step(square, part.step)
        store(part.average, average, refused)
        store(part.square, square, refused)
        if part.compensation is None:
            store(part.parameter, parameter, refused)
            continue
        rounded = parameter.to(part.parameter.dtype)
        store(part.parameter, rounded, refused)
        parameter.sub_(rounded)
        if part.compensation.dtype == torch.bfloat16:
            _round_by_step(parameter, part.step)
        store(part.compensation, parameter, refused)


def _widened(held: Any, refused: Tensor | None) -> Tensor:
    """`held` in fp32: itself, if it is fp32 and the step is always taken."""
    wide: Tensor = held.float()
    return wide.clone() if wide is held and refused is not None else wide


def store(held: Any, new: Tensor, refused: Tensor | None) -> None:
    """Store `new` in `held`, a tensor or other holder of state, unless the step is `refused`."""
    if not isinstance(held, Tensor):
        held.store(new, refused)
    elif refused is not None:
        held.copy_(torch.where(refused, held, new.to(held.dtype)))
    elif held is not new:
        held.copy_(new)


def _correction(beta: float, step: Tensor | int) -> Any:
    """1 - beta^step, in more digits than fp32 has: a number, or a tensor if `step` is one."""
    if not isinstance(step, Tensor):
        return 1 - beta**step
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))


def _round_by_step(tensor: Tensor, step: Tensor | int) -> None:
    """Round fp32 `tensor` in place to bf16 values, away from zero if the lost fraction is above a threshold.

    bf16 is fp32 without its low 16 bits: an offset added to them carries into the remaining bits or is cut off.
    """
    bits = tensor.view(torch.int32)
    bits.add_((step * GOLDEN_RATIO >> 16) & ((1 << 16) - 1)).bitwise_and_(-(1 << 16))
