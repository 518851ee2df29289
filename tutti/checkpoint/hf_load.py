"""Loading a Hugging Face checkpoint into a model that is on the meta device and already divided among the ranks.

Parameters may be DTensors of any placement, or plain tensors; each rank fills its own part. Loading uses the
conversions that transformers registers for a family (renamed keys, experts stacked into one tensor, fused projections):

1. The headers of the files contain every key's shape. All conversions are run once on meta tensors of these shapes,
   which shows what the checkpoint provides before any data is read. Anything missing, unexpected or of another shape is
   an error that lists the keys; a wrong checkpoint never silently becomes random weights.
2. Each group of keys that makes one parameter (or a few) is read, converted and copied, while a thread reads the files
   ahead. A rank reads only its slice if
   a key maps to one parameter, and only its experts if a stack is divided by experts; other conversions are computed in
   full and cut. With `broadcast`, only rank 0 opens files, and sends tensors in pieces. Parameters that the model
   stores quantized are packed on the way, in whole rows.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tutti.attention.sparse import NAME as SPARSE
from tutti.checkpoint.hf_files import Checkpoint
from tutti.checkpoint.read_ahead import ReadAhead, Span
from tutti.core.compat import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from tutti.core.dist import World
from tutti.core.tensors import local_part
from tutti.model.initialize import fill_by_rules, materialize, own_block, own_part
from tutti.model.quantized import Packing, packings
from tutti.model.speech import THINKER, speech_of
from tutti.model.structure import ADAPTER_MARK, head, is_classifier, model_class, weight_conversions

log = logging.getLogger(__name__)

PIECE_BYTES = 256 * 2**20
"""Number of bytes that rank 0 sends at a time."""

LISTED = 20
"""Number of keys that an error lists before it only counts."""


def load_weights(
    model: PreTrainedModel,
    path: str | Path,
    *,
    world: World,
    device: torch.device | None = None,
    broadcast: bool = True,
    index_path: str | Path | None = None,
    seed: int = 0,
    full_model: PreTrainedModel | None = None,
) -> None:
    """Load `model` from the Hugging Face checkpoint at `path` (a folder, or one file).

    device: where the parameters are allocated (default world.device). broadcast: only rank 0 reads. index_path: the
    index of which file contains a tensor. seed: for a classifier's head that the checkpoint does not have. full_model:
    the complete model, on the meta device, if `model` is a part of it. Every rank must call it. ValueError, on all
    ranks: the checkpoint is damaged or does not fit.
    """
    load_opened(
        model,
        path,
        lambda: Checkpoint(Path(path), index_path),
        world=world,
        device=device,
        broadcast=broadcast,
        seed=seed,
        full_model=full_model,
    )


def load_opened(
    model: PreTrainedModel,
    path: str | Path,
    open_checkpoint: Callable[[], Checkpoint],
    *,
    world: World,
    device: torch.device | None = None,
    broadcast: bool = True,
    seed: int = 0,
    full_model: PreTrainedModel | None = None,
) -> None:
    """Load `model`, as `load_weights` does, from the checkpoint that `open_checkpoint` opens on the ranks that read
    it. path: its name in errors."""
    materialize(model, device or world.device)
    broadcast = broadcast and world.size > 1  # alone, a rank copies from the files right into its parameters
    reads = world.is_main or not broadcast
    checkpoint: Any = world.run_on_all_ranks(lambda: open_checkpoint() if reads else None)
    full_model = full_model or model
    plan: _Plan = world.run_on_all_ranks(lambda: _plan(full_model, checkpoint.meta()) if reads else None)
    if broadcast:
        plan = world.broadcast(plan if world.is_main else None)
    fresh = world.run_on_all_ranks(lambda: _check(full_model, plan, path))
    for each in (model, full_model):
        each._weight_conversions = plan.used(full_model)  # type: ignore[assignment]  # a plain attribute of the class
    targets = _tensors(model)
    filled: dict[int, str] = {}
    conflicts: list[str] = []
    spans = [list(group.spans(checkpoint, None if broadcast else targets)) if reads else [] for group in plan.groups]
    with ReadAhead(chain(*spans)) as ahead:
        for group, used in zip(plan.groups, spans, strict=True):
            parts: Iterable[tuple[str, Tensor | None]] = ()
            if broadcast:
                values = group.convert(model, checkpoint.read) if world.is_main else {}
                parts = (
                    (name, _receive(targets.get(name), values.get(name), spec, world)) for name, spec in group.targets
                )
            elif group.first in targets:
                parts = group.read_own_part(model, checkpoint, targets)
            for name, part in parts:
                if name in targets:
                    _settle(targets[name], part, name, filled, conflicts)
            for span in used:
                ahead.used(span)
    world.run_on_all_ranks(lambda: _refuse_conflicts(conflicts, path))
    if fresh:
        log.info("%s has no %s: initialised at random", path, _listed(sorted(fresh)))
        fill_by_rules(model, fresh & set(targets), seed)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that a checkpoint contains, by name; tied parameters under each of their names."""
    saved = model.state_dict()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if name in saved}


class _Spec(NamedTuple):
    """A parameter in the checkpoint's format. packing: the model's format, if it is quantized."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    packing: Packing | None = None

    def held(self) -> _Spec:
        """The shape and dtype in the model."""
        if self.packing is None:
            return self
        return _Spec((*self.shape[:-1], self.packing.row_bytes), torch.uint8)

    def own_part(self, source: Any, target: Tensor) -> Tensor:
        """This rank's part of `target`, from the full parameter (or a lazy slice of a file)."""
        block = own_block(target)
        return own_part(source, target) if block is None else self.cut(source, block)

    def cut(self, source: Any, block: tuple[slice, ...]) -> Tensor:
        """The block of the parameter in the model's format; for a packed parameter, all columns of its rows are
        read."""
        if self.packing is None:
            return source[block or ...]
        *rows, columns = block
        return self.packing.pack(source[(*rows, slice(None))])[..., columns]


@dataclass(frozen=True)
class _Group:
    """Keys of a checkpoint that together make one or a few parameters.

    keys: each with the pattern of the conversion that it matched. converter: None if the key is the parameter. first:
    the parameter after which the conversion names its results. targets: the resulting parameters.
    """

    keys: tuple[tuple[str, str], ...]
    converter: WeightConverter | None
    first: str
    targets: tuple[tuple[str, _Spec], ...] = ()

    def convert(self, model: PreTrainedModel, read: Callable[[str], Any]) -> dict[str, Tensor]:
        """The parameters in full, by name."""
        if self.converter is None:
            return {self.first: read(self.keys[0][0])[...]}
        return self._converted(model, self.keys, read)

    def _converted(
        self, model: PreTrainedModel, keys: Sequence[tuple[str, str]], read: Callable[[str], Any]
    ) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        assert converter is not None
        for key, pattern in keys:
            converter.add_tensor(self.first, key, pattern, read(key)[...])
        values = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    def read_own_part(
        self, model: PreTrainedModel, checkpoint: Checkpoint, targets: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of each parameter, reading no more than needed if the conversion allows it."""
        specs = dict(self.targets)
        if self.converter is None:
            if local_part(targets[self.first]).numel():
                yield self.first, specs[self.first].own_part(checkpoint.read(self.keys[0][0]), targets[self.first])
            return
        experts = self._own_experts(targets)
        if experts is None:
            values = self.convert(model, checkpoint.read)
            for name, spec in self.targets:
                if local_part(targets[name]).numel():
                    yield name, spec.own_part(values[name], targets[name])
        elif experts:
            block = own_block(targets[self.first])
            assert block is not None
            for name, value in self._converted(model, experts, checkpoint.read).items():
                yield name, specs[name].cut(value, (slice(None), *block[1:]))

    def spans(self, checkpoint: Checkpoint, targets: Mapping[str, Tensor] | None) -> Iterator[Span]:
        """The parts of the files that `read_own_part` reads, in its order; all of them if `targets` is None."""
        keys, rows = self.keys, None
        if targets is not None:
            if self.first not in targets or not local_part(targets[self.first]).numel():
                return
            if self.converter is not None:
                own = self._own_experts(targets)
                keys = keys if own is None else tuple(own)
            elif block := own_block(targets[self.first]):
                rows = block[0]
        for key, _ in keys:
            if (span := checkpoint.span(key, rows)) is not None:
                yield span

    def _own_experts(self, targets: Mapping[str, Tensor]) -> list[tuple[str, str]] | None:
        """The keys of this rank's experts, if these are enough to make its part of a stack of experts."""
        assert self.converter is not None
        stack, *others = self.converter.operations
        inner = all(
            (isinstance(op, Concatenate) and op.dim > 0) or (isinstance(op, Transpose) and min(op.dim0, op.dim1) > 0)
            for op in others
        )
        target = targets[self.first]
        block = own_block(target)
        if not isinstance(stack, MergeModulelist) or stack.dim != 0 or not inner or len(self.targets) > 1 or not block:
            return None
        lists: dict[str, list[str]] = {}
        for key, pattern in self.keys:
            lists.setdefault(pattern, []).append(key)
        if any(len(keys) != target.shape[0] for keys in lists.values()):
            return None
        return [(key, pattern) for pattern, keys in lists.items() for key in keys[block[0]]]


@dataclass
class _Plan:
    """The parameters that the checkpoint provides. matched: indices, among the model's conversions, of those that
    matched a key."""

    groups: list[_Group] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    matched: list[int] = field(default_factory=list)

    def used(self, model: PreTrainedModel) -> list[Any]:
        """The conversions to revert when saving."""
        mapping = weight_conversions(model)
        return [mapping[position] for position in self.matched]


def _plan(model: PreTrainedModel, source: Mapping[str, Tensor]) -> _Plan:
    """Run all conversions on meta tensors of the checkpoint's shapes."""
    names, packed = model.state_dict(), packings(model)
    mapping = weight_conversions(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    keys: dict[str, list[tuple[str, str | None]]] = {}
    plan = _Plan()
    for key in sorted(source, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        if name in names:
            keys.setdefault(name, []).append((key, pattern))
        else:
            plan.unexpected.append(key)
    for name, members in keys.items():
        pattern = members[0][1]
        converter = by_pattern[pattern] if pattern is not None else None
        if converter is None and len(members) > 1:
            plan.unexpected.extend(key for key, _ in members[1:])
        group = _Group(tuple((key, pattern or "") for key, pattern in members), converter, name)
        try:
            made = group.convert(model, source.__getitem__)
        except Exception as error:
            listed = _listed([key for key, _ in members])
            raise ValueError(f"the keys {listed} of the checkpoint do not combine into {name}: {error}") from error
        plan.unexpected.extend(set(made) - set(names))
        targets = tuple(
            (made_name, _Spec(tuple(t.shape), t.dtype, packed.get(made_name)))
            for made_name, t in made.items()
            if made_name in names
        )
        plan.groups.append(_Group(group.keys, converter, name, targets))
    plan.matched = [position for position, entry in enumerate(mapping) if entry.was_used()]
    return plan


def _check(model: PreTrainedModel, plan: _Plan, path: str | Path) -> set[str]:
    """The names that may be missing: what transformers allows for the family, a classifier's new head, and native
    sparse attention's additional parameters. ValueError: anything else does not fit."""
    targets = _tensors(model)
    given = {name: spec for group in plan.groups for name, spec in group.targets}
    satisfied = {id(targets[name]) for name in given}
    # Adapters are loaded or initialized separately.
    missing = {name for name, tensor in targets.items() if id(tensor) not in satisfied and ADAPTER_MARK not in name}
    fresh = missing - _without(missing, model._keys_to_ignore_on_load_missing)
    fresh |= {
        name for name in missing if is_classifier(model) and any(targets[name] is t for t in head(model).parameters())
    }
    added = {name for name in targets if f".{SPARSE}." in name}
    if added <= missing:  # all or none: if only some are missing, the checkpoint is damaged
        fresh |= added
    unexpected = _without(plan.unexpected, _old_buffers(model) | set(model._keys_to_ignore_on_load_unexpected or ()))
    if speech_of(model) is not None:
        unexpected = {key for key in unexpected if key.startswith(THINKER)}
    if is_classifier(model) and unexpected:
        unexpected -= _causal_names(model)
    mismatched = [
        f"{name} ({_shape(spec.shape)} in the checkpoint, {_shape(shape)} in the model)"
        for name, spec in given.items()
        if spec.shape != (shape := _full_shape(targets[name], spec.packing))
    ]
    problems = [
        f"{len(keys)} {kind}: {_listed(keys)}"
        for kind, keys in (
            ("missing", sorted(missing - fresh, key=dot_natural_key)),
            ("unexpected", sorted(unexpected, key=dot_natural_key)),
            ("of another shape", mismatched),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"model.model_path: the weights in {path} do not fit {_name(model)}: {'; '.join(problems)}")
    return fresh


def _full_shape(target: Tensor, packing: Packing | None) -> tuple[int, ...]:
    return tuple(target.shape) if packing is None else (*target.shape[:-1], packing.columns)


def _name(model: nn.Module) -> str:
    return model_class(model).__name__


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:LISTED]) + (f" and {len(keys) - LISTED} more" if len(keys) > LISTED else "")


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> set[str]:
    return {name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())}


def _old_buffers(model: nn.Module) -> set[str]:
    """Keys of buffers that old checkpoints contain and classes now compute."""
    buffers = [name for name, _ in model.named_buffers()]
    patterns = {r"rotary_emb\.inv_freq": "inv_freq", r"(^|\.)position_ids$": "position_ids"}
    return {pattern for pattern, suffix in patterns.items() if any(name.endswith(suffix) for name in buffers)}


def _causal_names(model: PreTrainedModel) -> set[str]:
    """The keys of the language model with the same config, whose head a classifier does not use."""
    with torch.device("meta"):
        return set(AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).state_dict())


def _receive(target: Tensor | None, value: Tensor | None, spec: _Spec, world: World) -> Tensor | None:
    """Send rank 0's `value` to all ranks, in pieces of rows; returns this rank's part of `target` (None if it has
    none).

    A part that is not a single block needs the whole tensor at once. Quantized parameters are packed before they are
    sent.
    """
    if value is not None and spec.packing is not None:
        value = spec.packing.pack(value)
    spec = spec.held()
    shape = spec.shape or (1,)
    target = torch.empty((0, *shape[1:])) if target is None else target
    block = own_block(target) if spec.shape else (slice(0, len(local_part(target).view(-1))),)
    row_bytes = max(1, spec.dtype.itemsize * torch.Size(shape[1:]).numel())
    rows = shape[0] if block is None else max(1, PIECE_BYTES // row_bytes)
    part = torch.empty_like(local_part(target), dtype=spec.dtype)
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        if value is not None:
            piece = value.view(shape)[start:stop].to(world.device).contiguous()
        else:
            piece = torch.empty((stop - start, *shape[1:]), dtype=spec.dtype, device=world.device)
        if world.size > 1:
            torch_dist.broadcast(piece, src=0)
        if block is None:
            return own_part(piece, target)
        low, high = max(start, block[0].start), min(stop, block[0].stop)
        if low < high:
            taken = piece[(slice(low - start, high - start), *block[1:])]
            part.view(-1, *part.shape[1:])[low - block[0].start : high - block[0].start].copy_(taken)
    return part if part.numel() else None


def _settle(target: Tensor, part: Tensor | None, name: str, filled: dict[int, str], conflicts: list[str]) -> None:
    """Copy `part` into this rank's part of `target`. If the checkpoint contains a tied parameter twice, both must be
    equal."""
    local = local_part(target)
    first = filled.setdefault(id(target), name)
    if part is None:
        return
    if first == name:
        local.copy_(part)
    elif not torch.equal(local, part.to(local)):
        conflicts.append(f"{first} and {name}")


def _refuse_conflicts(conflicts: Sequence[str], path: str | Path) -> None:
    if conflicts:
        raise ValueError(
            f"model.model_path: the config ties {_listed(conflicts)}, but the weights in {path} differ; "
            "set tie_word_embeddings to false in config.json"
        )
