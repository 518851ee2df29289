"""Writing a model, however it is distributed, as a complete Hugging Face folder that plain transformers loads.

The tensors come one group at a time, from the ranks or from a checkpoint. A group is the set of parameters that the
reverted conversions turn into keys of the family's published checkpoints (a stack of experts becomes one tensor per
expert again). The keys, and their files, are known beforehand from reverting the conversions on meta tensors. So each
key is written where it belongs as soon as it is available, and never more than one group is in memory. All ranks
gather; rank 0 writes.

The folder is made under another name and renamed when it is complete, so a folder with the final name is always
complete.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tutti.checkpoint.hf_files import INDEX, SINGLE, Checkpoint, RestOfCheckpoint, TensorFile, read_index
from tutti.checkpoint.omni_files import connectors_of, write_connectors
from tutti.core.compat import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)
from tutti.core.dist import World
from tutti.core.files import describe_error, put_back_folder, put_folder, write_synced
from tutti.model.omni import OmniModel
from tutti.model.speech import THINKER, speech_of, whole_config
from tutti.model.structure import is_classifier, model_class, weight_conversions

Full = Callable[[str], Tensor]
"""Returns a full tensor of a model by name, on rank 0; every rank calls it for the same names."""

# A tensor that FSDP has split after other axes takes one gather for each axis, which torch would warn about on every
# rank.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def export_hf(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: Any,
    *,
    world: World,
    full: Full | None = None,
    index_path: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_gb: float = 5.0,
) -> None:
    """Write `model` to `folder`: config, generation config, weights, and what `tokenizer.save_pretrained` writes.

    full: returns a full tensor of `model` (which may then be on the meta device) by name, on rank 0; every rank calls
    it for the same names. index_path: an index whose layout to reproduce, same tensor to same file; without it, files
    of at most max_shard_gb. dtype: cast floating-point weights to it (default: no cast). Replaces `folder`. Every rank
    must call it. ValueError, on every rank: it cannot be written.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    full = full or gather_full_tensors(model, model, world)
    world.run_on_all_ranks(lambda: prepare_folder(folder, partial) if world.is_main else None)
    if isinstance(model, OmniModel):
        parts = [(part.module, partial / part.folder, _below(full, part.name)) for part in model.parts()]
        model.foundation.generation_config = model.generation_config
    else:
        parts = [(model, partial, full)]
    written = []
    for part, place, tensors in parts:
        groups = _Reverted(part, dtype)
        index = index_path if place == partial else None
        beside = world.run_on_all_ranks(functools.partial(_open_speech, part))
        keys = groups.keys if beside is None else groups.keys | beside.meta()
        layout = world.run_on_all_ranks(functools.partial(_layout, keys, index, max_shard_gb))
        writer, failure = _write(groups, _Writer(place, layout, keys), layout, tensors, world)
        if beside is not None and world.is_main and failure is None:
            for key in beside.meta():
                value = beside.read(key)
                writer.add({key: value if isinstance(value, Tensor) else value[...]})
        written.append((part, place, writer, failure))
    connectors = connectors_of(model, full, partial, world) if isinstance(model, OmniModel) else None

    def finish() -> None:
        try:
            for part, place, writer, failure in written:
                _finish(part, place, tokenizer, writer, failure)
            if connectors is not None:
                write_connectors(connectors, partial)
            tokenizer.save_pretrained(partial)
            put_folder(partial, folder)
        except OSError as error:
            raise ValueError(f"could not write {folder}: {describe_error(error)}") from error

    world.run_on_all_ranks(lambda: finish() if world.is_main else None)


def _open_speech(model: PreTrainedModel) -> Checkpoint | None:
    """Open the checkpoint that a thinker came from, for its speech modules; None for other models."""
    found = speech_of(model)
    return None if found is None else RestOfCheckpoint(found[0], THINKER)


def _below(full: Full, prefix: str) -> Full:
    return lambda name: full(f"{prefix}.{name}")


def _write(
    groups: _Reverted, writer: _Writer, layout: Mapping[str, str], full: Full, world: World
) -> tuple[_Writer, Exception | None]:
    """Write all groups of tensors, on rank 0; returns the writer, and the first error. Collective."""
    failure: Exception | None = None
    for names in groups.in_order_of(layout):
        tensors = {name: full(name) for name in names}
        if not world.is_main or failure is not None:
            continue
        try:
            writer.add(groups.revert(tensors))
        except Exception as error:  # the other ranks wait in the next gather: continue with them, raise later
            failure = error
    return writer, failure


def gather_full_tensors(part: PreTrainedModel, model: PreTrainedModel, world: World) -> Full:
    """A function that returns a full tensor of `model` by name, on rank 0, from the ranks that hold parts of it.

    part: this rank's pipeline stages of `model`, or `model` itself. Collective, as is the returned function.
    """
    held, like = dict(_saved(part)), dict(_saved(model))
    holders = first_holders(set(held), world)
    return lambda name: gather_from(held.get(name), like[name], holders[name], world)


class _Reverted:
    """The model's tensors, and the corresponding keys of a published checkpoint.

    tensors: the saved ones, by name; a tied parameter only under its first name. keys: the resulting keys in order, as
    meta tensors.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        self._model = model
        self._dtype = dtype
        mapping = getattr(model, "_weight_conversions", None)
        if mapping is None:
            # A model that was not loaded has the published names, without any prefix that others add or drop.
            entries = weight_conversions(model, add_legacy=False)
            mapping = [entry for entry in entries if not isinstance(entry, PrefixChange)]
        backward = [entry.reverse_transform() for entry in reversed(mapping)]
        self._renamings = [entry for entry in backward if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in backward if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self.tensors = dict(_saved(model))
        self._groups: dict[str, list[str]] = {}
        for name in sorted(self.tensors, key=dot_natural_key):
            self._groups.setdefault(apply_converters(name, self._converters)[0], []).append(name)
        self._made: dict[str, list[str]] = {}
        self.keys: dict[str, Tensor] = {}
        for first, names in self._groups.items():
            blank = {
                name: torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype, device="meta")
                for name in names
            }
            made = self.revert(blank)
            self._made[first] = list(made)
            self.keys.update(made)

    def revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The keys and values that one group of full tensors becomes."""
        first, pattern = apply_converters(next(iter(tensors)), self._converters)
        if pattern is None:
            made = {apply_renamings(first, self._renamings): tensors[first]}
        else:
            converter = copy.deepcopy(self._by_pattern[pattern])
            for name, tensor in tensors.items():
                matched: Any = apply_converters(name, self._converters)[1]
                converter.add_tensor(first, name, matched, tensor)  # accepts tensors too
            values = converter.convert(first, model=self._model, config=self._model.config)
            made = {
                apply_renamings(key, self._renamings): value[0] if isinstance(value, list) else value
                for key, value in values.items()
            }
        return {key: self._cast(tensor) for key, tensor in made.items()}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor

    def in_order_of(self, layout: Mapping[str, str]) -> Iterator[list[str]]:
        """The names of each group, ordered by the files of their keys."""
        yield from (
            self._groups[first] for first in sorted(self._groups, key=lambda first: layout[self._made[first][0]])
        )


def _saved(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict()
    for target, source in model.all_tied_weights_keys.items():
        if target in saved and source in saved and model.get_parameter(target) is model.get_parameter(source):
            del saved[target]
    for name in model._keys_to_ignore_on_save or ():
        saved.pop(name, None)
    yield from saved.items()


def _layout(keys: Mapping[str, Tensor], index_path: str | Path | None, max_shard_gb: float) -> dict[str, str]:
    """The file that each key goes to."""
    if index_path is not None:
        known = read_index(Path(index_path))
        last = max(known.values())
        return {key: known.get(key, last) for key in keys}
    numbers: dict[str, int] = {}
    number, held = 1, 0
    for key, tensor in keys.items():
        if held and held + tensor.nbytes > max_shard_gb * 10**9:
            number, held = number + 1, 0
        numbers[key] = number
        held += tensor.nbytes
    if number == 1:
        return dict.fromkeys(keys, SINGLE)
    return {key: f"model-{position:05d}-of-{number:05d}.safetensors" for key, position in numbers.items()}


def gather_full(tensor: Tensor, *, keep: bool) -> Tensor:
    """The full tensor on the CPU of the rank that keeps it; every rank takes part."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return tensor.to("cpu") if keep else tensor.new_empty(0)


def first_holders(names: set[str], world: World) -> dict[str, int]:
    """The first rank that has each name. Every rank must call it."""
    return {name: rank for rank, held in reversed(list(enumerate(world.gather(names)))) for name in held}


def gather_from(tensor: Tensor | None, like: Tensor, holder: int, world: World) -> Tensor:
    """The full tensor on the CPU of rank 0, from the ranks that have parts of it, of which `holder` is the first.

    like: has its shape and dtype. Every rank takes part.
    """
    full = like.new_empty(0) if tensor is None else gather_full(tensor, keep=world.rank == holder)
    if holder == 0:
        return full
    if world.rank == holder:
        torch_dist.send(full.contiguous(), dst=0)
    if not world.is_main:
        return full
    received = torch.empty(like.shape, dtype=like.dtype)
    torch_dist.recv(received, src=holder)
    return received


class _Writer:
    """Writes each key to its file, which is created with its first key."""

    def __init__(self, folder: Path, layout: Mapping[str, str], keys: Mapping[str, Tensor]) -> None:
        self._folder, self._layout, self._keys = folder, layout, keys
        self._open: dict[str, TensorFile] = {}
        self.dtype = next((tensor.dtype for tensor in keys.values() if tensor.is_floating_point()), None)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for key, tensor in tensors.items():
            file = self._layout[key]
            if file not in self._open:
                content = {key: self._keys[key] for key, name in self._layout.items() if name == file}
                self._open[file] = TensorFile(self._folder / file, content)
            if self._open[file].write(key, tensor):
                del self._open[file]

    def finish(self) -> None:
        """Write the index, if there are several files, or one with another name."""
        assert not self._open, f"{sorted(self._open)} were never complete"
        if set(self._layout.values()) == {SINGLE}:
            return
        totals = {
            "total_parameters": sum(tensor.numel() for tensor in self._keys.values()),
            "total_size": sum(tensor.nbytes for tensor in self._keys.values()),
        }
        index = {"metadata": totals, "weight_map": dict(sorted(self._layout.items()))}
        write_synced(self._folder / INDEX, json.dumps(index, indent=2) + "\n")


def prepare_folder(folder: Path, partial: Path) -> None:
    """Create the empty folder `partial`, which becomes `folder` when it is complete."""
    try:
        put_back_folder(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"train.output_dir: {partial.parent} cannot be written to: {error.strerror}") from error


def _finish(model: PreTrainedModel, folder: Path, tokenizer: Any, writer: _Writer, failure: Exception | None) -> None:
    """Write everything except the weights to `folder`."""
    if failure is not None:
        raise failure
    writer.finish()
    config = whole_config(model)
    if speech_of(model) is None:
        config.architectures = [model_class(model).__name__]
    config.dtype = writer.dtype
    if getattr(config, "pad_token_id", None) is None and is_classifier(model):
        config.pad_token_id = getattr(tokenizer, "pad_token_id", None)  # classifiers use it to find the last real token
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.to_json_file(folder / "generation_config.json")
