"""Position embeddings that would be wrong for a packed row, or that have a limited length.

- Rotary embeddings whose frequencies depend on a sequence's length (`dynamic`, `longrope`). transformers' modules
  choose them by the largest position in their input, which in a packed row is that of the longest sample, and `dynamic`
  ones keep those of the longest sequence so far. Here each sample is rotated according to its own length, starting from
  the state of a fresh module.
- Learned positions: a table with a limited number of rows.
"""

from __future__ import annotations

import re
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tutti.config import ConfigError
from tutti.config.layout import Layout
from tutti.core.compat import FakeTensor
from tutti.core.modules import Forward, wrap_forward
from tutti.core.structure import ModelStructure

_BY_LENGTH = ("dynamic", "longrope")


def depends_on_length(config: PreTrainedConfig) -> bool:
    """True if the frequencies of a text model's rotary embedding depend on the length of the sequence."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    return not kinds.isdisjoint(_BY_LENGTH)


def check_rotary(structure: ModelStructure, layout: Layout) -> None:
    """Raise ConfigError for axes along which a rank does not know the length of a sample, if positions depend on it."""
    axes = (("ulysses_parallel_size", layout.ulysses), ("context_parallel_size", layout.context))
    problems = [
        f"train.{name}: the rotary embedding of {structure.name} depends on a sample's length, which a rank with a "
        "part of its tokens does not see; set 1"
        for name, size in axes
        if size > 1 and depends_on_length(structure.config)
    ]
    if problems:
        raise ConfigError(problems)


def rotate_by_sample(model: nn.Module) -> None:
    """Make length-dependent rotary embeddings of `model` treat each sample of a packed row separately."""
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        if any(isinstance(name, str) and name in _BY_LENGTH for name in kinds):
            wrap_forward(module, "by sample", partial(_by_sample, module=module))


def _by_sample(forward: Forward, module: nn.Module) -> Forward:
    @wraps(forward)
    def run(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        first = position_ids[0]
        if first.is_meta or isinstance(first, FakeTensor):
            return forward(x, position_ids, *args, **kwargs)
        if len(position_ids) > 1 or int(first[0]) != 0:
            return forward(x, position_ids, *args, **kwargs)  # continued sequences
        starts = (first == 0).nonzero().flatten().tolist()
        found = []
        for begin, end in zip(starts, [*starts[1:], len(first)], strict=True):
            _forget(module)
            found.append(forward(x, position_ids[:, begin:end], *args, **kwargs))
        if isinstance(found[0], Tensor):
            return torch.cat(found, 1)
        return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))

    return run


def _forget(module: Any) -> None:
    """Reset `module` to its initial state, which a `dynamic` one leaves for good when it sees a longer sequence."""
    for name in [name for name in module._buffers if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        present = module._buffers[f"{prefix}inv_freq"]
        module._buffers[f"{prefix}inv_freq"] = module._buffers[name].to(present.device, copy=True)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def check_positions(structure: ModelStructure, max_seq_len: int) -> None:
    """Raise ValueError if samples may be longer than the model's table of learned positions."""
    config = structure.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    learned = [
        name
        for name, module in structure.text_model.named_modules()
        if isinstance(module, nn.Embedding) and _LEARNED.search(name.rpartition(".")[2])
    ]
    # A computed table (CTRL's) is limited too.
    tables = [*learned, *(name for name, _ in structure.text_model.named_buffers() if name == "pos_encoding")]
    if tables and limit is not None and max_seq_len > limit:
        kind = "learned" if learned else "computed"
        raise ValueError(
            f"data.max_seq_len: {structure.name} has {kind} positions ({tables[0]}) for {limit} tokens; set {limit} or "
            f"less, got {max_seq_len}"
        )


_LEARNED = re.compile("^wpe$|pos(ition)?_?emb|embed_positions")
"""Names of learned position tables."""
