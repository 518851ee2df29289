"""Initialization of a model on the meta device: allocating storage, and random values by its class's own rules.

Random initialization follows the class's `_init_weights`, but is bit-equal on every layout. A module's parameters are
created in full on the CPU, from a generator seeded with the seed and their name; each rank takes its own part, and they
are freed before the next module. The rules run on a twin of the model without storage:

1. Each module's rule is run on tensors without storage. Their version counters show which ones it writes; modules that
   write the same tensor (a projection, and the attention around it that rescales it) form one unit.
2. A unit's tensors get storage, its rules run in order, innermost first, and the values are cut and copied.

Values that no rule sets, but a constructor computes from numbers (the factors of Apertus's activation), are kept.

The same method recomputes buffers that checkpoints do not contain (rotary frequencies, embedding scales), and
initializes a classifier's new head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from tutti.attention.sparse import NativeSparse
from tutti.core.compat import (
    DtensorShardOperation,
    StridedShard,
    compute_local_shape_and_global_offset,
    device_constructors,
    no_tie_weights,
    truncated_normals_seen,
)
from tutti.core.tensors import local_part, seed_of
from tutti.model.sparse import add_sparse_attention
from tutti.model.structure import ADAPTER_MARK, model_class


def init_weights(model: PreTrainedModel, seed: int, device: torch.device) -> None:
    """Initialize `model` at random by its class's own rules, bit-equal on every layout and number of ranks."""
    materialize(model, device)
    persistent = set(model.state_dict()) - set(model.all_tied_weights_keys)
    fill_by_rules(model, {name for name in persistent if ADAPTER_MARK not in name}, seed)


def materialize(model: PreTrainedModel, device: torch.device) -> None:
    """Allocate everything that is on meta on `device`: parameters and saved buffers are uninitialized, buffers that
    checkpoints do not contain are recomputed."""
    there = {name for name, buffer in model.named_buffers() if not buffer.is_meta}
    give_storage(model, device)
    rebuild_buffers(model, there)


def give_storage(model: nn.Module, device: torch.device, *, only_trained: bool = False) -> None:
    """Allocate parameters and buffers that are on meta on `device`, uninitialized. Tied parameters stay tied.
    only_trained: leave frozen parameters, and buffers, on meta."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is None or (only_trained and not tensor.requires_grad):
                    continue
                if local_part(tensor).is_meta:
                    made.setdefault(id(tensor), _with_storage(tensor, device))
                    store[name] = made[id(tensor)]


def rebuild_buffers(model: PreTrainedModel, there: Set[str] = frozenset()) -> None:
    """Recompute the buffers that no checkpoint contains (rotary frequencies, embedding scales, position tables),
    except those in `there`."""
    names = {name for name, _ in model.named_buffers()} - set(model.state_dict()) - there
    fill_by_rules(model, names, seed=0)


def _with_storage(tensor: Tensor, device: torch.device) -> Tensor:
    # also for a DTensor, whose
    filled = torch.empty_like(tensor, device=device)
    return nn.Parameter(filled, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else filled


def own_block(target: Tensor) -> tuple[slice, ...] | None:
    """The slices of `target`'s full shape that this rank holds; None if they are not a single block.

    FSDP splits what other axes have already split, and describes this with a strided placement on its own, leftmost
    axis: the part is a block if the strides are exactly those splits.
    """
    if not isinstance(target, DTensor):
        return tuple(slice(0, size) for size in target.shape)
    mesh, placements = target.device_mesh, target.placements
    for axis, placement in enumerate(placements):
        if isinstance(placement, StridedShard):
            splits = (mesh.size(i) for i in range(axis + 1, mesh.ndim) if placements[i].is_shard(placement.dim))
            if math.prod(splits) != placement.split_factor:
                return None
    sizes, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def own_part(tensor: Any, target: Tensor) -> Tensor:
    """This rank's part of `target`, from a full `tensor` (or a lazy slice of a file)."""
    block = own_block(target)
    if block is None:
        assert isinstance(target, DTensor)
        part = DtensorShardOperation(target).shard_tensor(tensor)
        assert part is not None
        return part
    return tensor[block or ...]


def fill_by_rules(model: PreTrainedModel, names: set[str], seed: int) -> None:
    """Initialize these parameters and buffers of `model` by its class's rules, each from its own seed."""
    if not names:
        return
    twin = _twin(model)
    units = _units(twin, names)
    uncovered = names - {name for unit in units for name in unit.names}
    constants = _constants(model, uncovered)
    if uncovered - constants.keys():
        missing = ", ".join(sorted(uncovered - constants.keys())[:20])
        raise ValueError(f"{model_class(model).__name__} has no rule to initialise {missing}")
    targets = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, value in constants.items():
        local_part(targets[name]).copy_(own_part(value, targets[name]))
    for unit in units:
        for name, value in unit.run(seed, {name: targets[name].dtype for name in unit.names}).items():
            local_part(targets[name]).copy_(own_part(value, targets[name]))


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model without storage, not divided and not tied."""
    with torch.device("meta"), no_tie_weights():
        twin: PreTrainedModel = model_class(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)
    add_sparse_attention(twin)
    return twin


class _NumbersKept(TorchFunctionMode):
    """Makes every tensor without storage, except those made of given numbers, and what is computed from them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in device_constructors() and func is not torch.tensor:
            kwargs = {"device": torch.device("meta")} | kwargs
        return func(*args, **kwargs)


def _constants(model: PreTrainedModel, names: set[str]) -> dict[str, Tensor]:
    """The values of those of `names` that the class's constructor computes from numbers and that no rule sets later."""
    if not names:
        return {}
    with _NumbersKept(), no_tie_weights():
        twin = model_class(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)
    made = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    return {name: made[name].detach() for name in names if name in made and not made[name].is_meta}


Rule = Callable[[nn.Module], None]


@dataclass
class _Unit:
    """Modules whose rules write the same tensors, innermost first, and the requested tensors among them."""

    steps: list[tuple[Rule, nn.Module]]
    names: dict[str, tuple[nn.Module, str]]

    def run(self, seed: int, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """The tensors' full values: parameters in fp32, buffers in the model's dtype."""
        made: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for name, (module, leaf) in self.names.items():
            kept[name] = getattr(module, leaf)
            is_parameter = leaf in module._parameters
            dtype = kept[name].dtype if is_parameter else dtypes[name]
            made[name] = torch.full(kept[name].shape, _blank(dtype), dtype=dtype)
            _store(module, leaf)[leaf] = nn.Parameter(made[name], requires_grad=False) if is_parameter else made[name]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed_of(f"{seed} {min(self.names)}"))
            for rule, module in self.steps:
                rule(module)
        for name, (module, leaf) in self.names.items():
            _store(module, leaf)[leaf] = kept[name]
            assert not _is_blank(made[name]), f"the rule for {name} did not set all of it"
        return made


def _store(module: nn.Module, leaf: str) -> dict[str, Any]:
    """The module's dictionary that contains this parameter or buffer."""
    return module._parameters if leaf in module._parameters else module._buffers


def _blank(dtype: torch.dtype) -> float | int | bool:
    """A value that no rule produces."""
    if dtype == torch.bool:
        return False
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _is_blank(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool:
        return False
    blank = tensor.isnan() if tensor.dtype.is_floating_point else tensor == torch.iinfo(tensor.dtype).min
    return bool(blank.any())


def _units(twin: PreTrainedModel, names: set[str]) -> list[_Unit]:
    """Group the twin's modules by which tensors their rules write, found by running each on tensors without storage."""
    unit_of: dict[str, _Unit] = {}
    rules = dict(_rules(twin))
    for path, module in reversed(list(twin.named_modules())):
        before = [(name, tensor, tensor._version) for name, tensor in _below(path, module) if name in names]
        if not before:
            continue
        with torch.no_grad(), truncated_normals_seen():
            rules[path](module)
        written = [name for name, tensor, version in before if tensor._version != version]
        if not written:
            continue
        merged = _Unit([], {})
        for unit in {id(unit_of[name]): unit_of[name] for name in written if name in unit_of}.values():
            merged.steps.extend(unit.steps)
            merged.names.update(unit.names)
        merged.steps.append((rules[path], module))
        for name in written:
            parent, _, leaf = name.rpartition(".")
            merged.names[name] = (twin.get_submodule(parent), leaf)
        unit_of.update(dict.fromkeys(merged.names, merged))
    return list({id(unit): unit for unit in unit_of.values()}.values())


def _below(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    prefix = path + "." if path else ""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield prefix + name, tensor


def _rules(model: PreTrainedModel) -> Iterator[tuple[str, Rule]]:
    """Each module's path and its rule: that of the innermost pretrained model around it, or of something added to
    its layers."""
    found: dict[str, Rule] = {}
    for path, module in model.named_modules():
        found[path] = (
            module._init_weights
            if isinstance(module, (PreTrainedModel, NativeSparse))
            else found[path.rpartition(".")[0]]
        )
        yield path, found[path]
