"""The state in a checkpoint as one flat dictionary of named tensors, and the state of the random generators.

The names are `model.<parameter or buffer>` and `optimizer.<parameter>.<state>`, tied parameters once, on every layout.
The tensors are the live ones (DTensors if the model is sharded), so reading into them loads the model and the
optimizer; nothing is copied for a save. Since the optimizer's state is keyed by parameter name, its groups may be
formed and ordered differently when it is read.

An optimizer creates its state at a parameter's first step. Before a load it therefore takes one step with zero
gradients and a learning rate of zero, which changes no parameter.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tutti.core.tensors import local_part, seed_of
from tutti.model.lora import listed, lora_of

AVERAGE = "average"
"""The name, among a parameter's optimizer state, of the moving average of the weights (`tutti.train.ema`)."""


def model_entries(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of `model`, tied ones under each of their names.

    For an adapted model only the trained ones: the rest is its base model. Uses state_dict, which makes FSDP reshard
    gathered parameters.
    """
    entries = model.state_dict(keep_vars=True)
    if lora_of(model) is not None:
        entries = {name: entry for name, entry in entries.items() if entry.requires_grad}
    assert all(isinstance(entry, Tensor) for entry in entries.values()), "a checkpoint has room for tensors only"
    return entries


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`model.<name>` for every parameter and persistent buffer, tied ones under their first name."""
    first: dict[Tensor, str] = {}
    for name, tensor in model_entries(model).items():
        first.setdefault(tensor, name)
    return {f"model.{name}": tensor.detach() for tensor, name in first.items()}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """`optimizer.<parameter>.<state>` for every parameter that has been stepped."""
    return {
        f"optimizer.{name}.{key}": value.detach()
        for name, parameter in _optimized(model, optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def trained_parts(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """This rank's parts of everything that the optimizer changes, under the names of `model_tensors` and
    `optimizer_tensors`."""
    tensors = {f"model.{name}": parameter for name, parameter in _optimized(model, optimizer).items()}
    tensors |= optimizer_tensors(model, optimizer)
    return {name: local_part(tensor.detach()) for name, tensor in tensors.items()}


def require_finite(parts: Mapping[str, Tensor], step: int) -> None:
    """Raise ValueError if a number in `parts`, this rank's parts of tensors by name after `step` steps, is not
    finite."""
    parts = {name: part for name, part in parts.items() if part.is_floating_point() and part.numel()}
    # A sum is finite only if all its terms are, and is quick to compute; if it is not, it may be an overflow, and is
    # examined. An accelerator is waited for once: sums of offloaded parts go there, not the others to the host.
    device = max((part.device for part in parts.values()), key=lambda device: device.type != "cpu", default=None)
    sums = [part.sum(dtype=torch.float32).to(device, non_blocking=True) for part in parts.values()]
    if not sums or torch.stack(sums).isfinite().all():
        return
    broken = [name for name, part in parts.items() if not part.isfinite().all()]
    if broken:
        raise ValueError(
            f"step {step} left numbers that are not finite in {listed(broken)}, and is not saved: go on from the "
            "checkpoint before with a lower train.lr"
        )


def unstepped(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The parameters without optimizer state, because they never had a gradient."""
    return [name for name, parameter in _optimized(model, optimizer).items() if not optimizer.state.get(parameter)]


def create_optimizer_state(model: nn.Module, optimizer: Optimizer, skip: set[str]) -> None:
    """Create the optimizer state of every parameter except those in `skip`, without changing any parameter."""
    assert not any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for name, parameter in _optimized(model, optimizer).items() if name not in skip]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def _optimized(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The parameters in `optimizer`'s groups, by their first name."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named: dict[str, Tensor] = {}
    for name, tensor in model_entries(model).items():
        if tensor in held:
            named[name] = tensor
            held.remove(tensor)
    assert not held, "the optimizer holds parameters that are not in the model"
    return named


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of this process's generators (Python, NumPy, torch on the CPU and on `device`), as plain data."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _encode(torch.get_rng_state()),
    }
    if device.type != "cpu":
        state[device.type] = _encode(torch.get_device_module(device).get_rng_state(device))
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Restore the result of `rng_state`; an accelerator whose state was not saved is seeded from the CPU's."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_decode(state["torch"]))
    if device.type in state:
        torch.get_device_module(device).set_rng_state(_decode(state[device.type]), device)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(torch.initial_seed())


def derive_rng(origin: str, rank: int) -> None:
    """Seed all generators from `origin` and `rank`, for use when the ranks are not those that saved their state."""
    seed = seed_of(f"{origin}:{rank}")
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(state: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(state), dtype=np.uint8).copy())
