"""Layers other than attention that carry information along the tokens, in a packed row of samples.

Hybrid models have such layers in addition to attention, or instead: gated delta nets (Qwen3-Next, Qwen3.5,
OLMo-hybrid), Mamba (Granite 4, Bamba, Nemotron-H, Jamba), linear attention (MiniMax), short convolutions (LFM2). They
are found by inspecting classes: modules that keep a convolution's or recurrence's state in transformers' cache, or
contain a convolution over tokens. Attention is among them if it is written for a single sample: if an indexer selects
the keys of a query (DeepSeek-V3.2, GLM-5), which it would do from the whole row, or if it computes positions itself
(Llama 4). It runs transformers' own code, with a causal, windowed or chunked mask.

Here a *mixer* is the outermost such module in a block. It does not support packed samples, so it gets them as a batch:
`separate_mixers` wraps its forward, cuts the row at the samples' borders, and runs samples of similar length together,
padded at the end. This is exact: a mixer is causal, so padding after a sample does not affect it. The projections
around the recurrence are part of the mixer and process the padding too, which is why lengths that differ by more than a
fifth run separately.

The borders reach a mixer through a keyword argument of its block's forward, so that they are those of the right micro
batch when the block runs again in the backward pass. Without borders (in transformers' `generate`) mixers run
unchanged.

Shapes: T tokens of a packed row, of samples in groups of n, padded to L tokens.
"""

from __future__ import annotations

import copy
import dis
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial, wraps
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from tutti.config import ConfigError
from tutti.config.layout import Layout
from tutti.core.compat import tree_flatten, tree_unflatten
from tutti.core.modules import Forward, wrap_forward
from tutti.core.structure import ModelStructure

log = logging.getLogger(__name__)

_STATES = {"get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state", "get_linear_cache"}
"""Methods of transformers' caches with which a layer keeps more than keys and values."""

_INDEXER = "indexer"
"""The attribute of attention for the module that selects its keys."""

_BORDERS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "borders", "whole", "cache"}
"""Arguments about a packed row that do not apply to a mixer's batch."""


def mixers(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of `blocks` that carry a state along the tokens; the outermost ones, each once."""
    found: dict[nn.Module, None] = {}
    for block in blocks:
        for child in block.children():
            found |= dict.fromkeys(_outermost(child))
    return list(found)


def _outermost(module: nn.Module) -> list[nn.Module]:
    if _carries(module):
        return [module]
    return [found for child in module.children() for found in _outermost(child)]


def _carries(module: nn.Module) -> bool:
    kind: Any = type(module)
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return bool(_STATES & names_read(kind)) or convolves or attends_alone(module)


def attends_alone(module: Any) -> bool:
    """True for attention that computes positions itself, or attends to keys selected by an indexer, its own or an
    earlier layer's."""
    kind: Any = type(module)
    if "Attention" not in kind.__name__:
        return False
    names = names_read(kind)
    if _INDEXER in names:
        return getattr(module, _INDEXER, None) is not None or _borrows(module)
    return {"arange", "ALL_ATTENTION_FUNCTIONS"} <= names


def _borrows(module: nn.Module) -> bool:
    """True for attention without an indexer that uses the keys selected by an earlier layer."""
    handed = any("indices" in name for name in inspect.signature(module.forward).parameters)
    return handed and getattr(module, _INDEXER, None) is None


def indexers(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of `blocks` that select keys, through which no gradient flows."""
    found = (getattr(mixer, _INDEXER, None) for mixer in mixers(blocks))
    return [item for item in found if item is not None]


def _codes(cls: Any) -> list[CodeType]:
    """The code objects of the methods of a model class."""
    functions = [
        inspect.unwrap(item)
        for kind in cls.__mro__
        if kind.__module__.startswith("transformers.models.")
        for item in vars(kind).values()
        if callable(item)
    ]
    return [item.__code__ for item in functions if hasattr(item, "__code__")]


@lru_cache(maxsize=1024)
def weights_read(cls: Any) -> frozenset[str]:
    """The names of submodules whose weight is used directly by the methods of a class, rather than by calling the
    submodule."""
    found = set()
    for code in _codes(cls):
        steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
        for (_, part), (kind, name), (then, of_it) in zip(steps, steps[1:], steps[2:], strict=False):
            looked_at = then == "LOAD_ATTR" and of_it in ("data", "dtype", "device", "shape")
            if kind == "LOAD_ATTR" and name == "weight" and not looked_at and isinstance(part, str):
                found.add(part)
    return frozenset(found)


@lru_cache(maxsize=1024)
def names_read(cls: Any) -> frozenset[str]:
    """The names of attributes and globals that the methods of a model class look up, and of keyword arguments that
    they pass."""
    return names_passed(cls) | {name for code in _codes(cls) for name in code.co_names}


@lru_cache(maxsize=1024)
def names_passed(cls: Any) -> frozenset[str]:
    """The names of keyword arguments that the methods of a model class pass."""
    passed = [item for code in _codes(cls) for item in code.co_consts if isinstance(item, tuple)]
    return frozenset(item for names in passed for item in names if isinstance(item, str))


def check_mixers(structure: ModelStructure, layout: Layout) -> None:
    """Raise ConfigError for axes that divide a sample's tokens, which recurrences run through; or layers, if some
    reuse the keys that others have selected."""
    if not structure.mixers:
        return
    alone = all(map(attends_alone, structure.mixers))
    what = "attend to a whole sample at once" if alone else "carry a state from token to token"
    problems = [
        f"train.{name}: {structure.name} has layers that {what}, which ranks with parts of a sample cannot compute at "
        "once; set 1"
        for name, size in (("ulysses_parallel_size", layout.ulysses), ("context_parallel_size", layout.context))
        if size > 1
    ]
    if layout.pipeline > 1 and any(map(_borrows, structure.mixers)):
        problems.append(
            f"train.pipeline_parallel_size: {structure.name} has layers that attend to keys which a layer before them "
            "has chosen, maybe in another stage; set 1"
        )
    if problems:
        raise ConfigError(problems)


def separate_mixers(structure: ModelStructure) -> None:
    """Make the mixers of a model treat each sample of a packed row separately, in place."""
    if not structure.mixers:
        return
    row = _Row()
    structure.text_model.register_forward_pre_hook(row.note, with_kwargs=True)
    for _, block in structure.blocks:
        block.register_forward_pre_hook(row.tell, with_kwargs=True)
        kinds = [item.kind for item in inspect.signature(block.forward).parameters.values()]
        takes = inspect.Parameter.VAR_KEYWORD in kinds
        wrap_forward(block, "borders", partial(_told, row=row, takes=takes))
    for mixer in structure.mixers:
        if attends_alone(mixer):
            _attend_by_own_code(mixer, structure.text_model)
            wrap_forward(mixer, "mask", partial(_masked, mixer=mixer))
        wrap_forward(mixer, "samples", partial(_by_group, mixer=mixer, row=row))


def recurrence_flops(found: Iterable[nn.Module], width: int) -> float:
    """The operations per token, forward and backward, of mixers' products without parameters.

    width: of the hidden states. They are counted on the meta device, in the chunked form that runs without other
    packages' kernels. Elementwise recurrences (Mamba 1) contain no products.
    """
    counts: dict[Any, float] = {}
    total = 0.0
    for mixer in found:
        key = (type(mixer), *(item.shape for item in mixer.parameters()))
        if key not in counts:
            counts[key] = _count_products(mixer, width)
        total += counts[key]
    return total


def _count_products(mixer: nn.Module, width: int) -> float:
    try:
        with FlopCounterMode(display=False) as counter:
            _run(_on_meta(mixer), width)
    except Exception as error:
        log.debug("the products of %s are not counted: %s", type(mixer).__name__, error)
        return 0.0
    weights = sum(2 * item.numel() for item in mixer.parameters() if item.ndim > 1)
    return 3.0 * max(0.0, counter.get_total_flops() / _COUNTED - weights)


def uncalled(mixer: nn.Module, width: int) -> list[nn.Module]:
    """The linear layers of a mixer whose weights it uses without calling them (Mamba's dt_proj), so that wrappers
    around them would have no effect; empty if its forward does not run on the meta device. width: of hidden states.
    """
    twin = _on_meta(mixer)
    linears = {part: name for name, part in twin.named_modules() if isinstance(part, nn.Linear)}
    seen: set[nn.Module] = set()
    hooks = [part.register_forward_pre_hook(lambda module, args: seen.add(module)) for part in linears]
    try:
        _run(twin, width)
    except Exception as error:
        log.debug("what %s calls is not known: %s", type(mixer).__name__, error)
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return [mixer.get_submodule(name) for part, name in linears.items() if part not in seen]


def _on_meta(mixer: nn.Module) -> nn.Module:
    """`mixer`, or its copy on the meta device."""
    return mixer if all(item.is_meta for item in mixer.parameters()) else copy.deepcopy(mixer).to("meta")


def _run(mixer: nn.Module, width: int) -> None:
    """Run a mixer on the meta device on some hidden states."""
    _, *others = inspect.signature(mixer.forward).parameters.values()
    needed = {item.name: None for item in others if item.default is item.empty and item.kind is not item.VAR_KEYWORD}
    known = {"position_ids": torch.zeros(1, _COUNTED, dtype=torch.int64, device="meta"), "use_cache": False}
    given = needed | {item.name: known[item.name] for item in others if item.name in known}
    with torch.no_grad():
        mixer(torch.empty(1, _COUNTED, width, device="meta", dtype=next(mixer.parameters()).dtype), **given)


_COUNTED = 256
"""Number of tokens for which a mixer's products are counted: a multiple of the chunks of recurrences."""


class _Row:
    """The borders of the current row: those that the language model got, and those that the current block got."""

    def __init__(self) -> None:
        self.given: Tensor | None = None
        self.borders: Tensor | None = None
        self._measured: Tensor | None = None
        self._lengths: tuple[int, ...] = ()

    def lengths(self) -> tuple[int, ...]:
        """The samples' lengths, for which the host waits once per row rather than once per mixer."""
        if self.borders is not None and self.borders is not self._measured:
            self._measured, self._lengths = self.borders, tuple(self.borders.diff().tolist())
        return self._lengths

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward hook of the language model."""
        self.given = kwargs.get("borders")

    def tell(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward hook of a block, since not every model passes unknown arguments to its blocks."""
        return args, {"borders": self.given, **kwargs}


def _told(forward: Forward, row: _Row, takes: bool) -> Forward:
    @wraps(forward)
    def run(*args: Any, borders: Tensor | None = None, **kwargs: Any) -> Any:
        row.borders = borders
        return forward(*args, **(kwargs | {"borders": borders} if takes and borders is not None else kwargs))

    return run


def _by_group(forward: Forward, mixer: Any, row: _Row) -> Forward:
    @torch.compiler.disable
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name not in _BORDERS}
        if row.borders is None or len(row.borders) == 2:
            return forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        lengths = row.lengths()
        total = sum(lengths)
        device = next(leaf.device for leaf in leaves if _lies_along(leaf, 1, total))
        groups = _group(lengths, device)
        count = len(groups.shapes)
        cut = [groups.cut(leaf) if _lies_along(leaf, 1, total) else [leaf] * count for leaf in leaves]
        outputs = []
        for (_, longest), *own in zip(groups.shapes, *cut, strict=True):
            own_args, own_kwargs = tree_unflatten(own, spec)
            with _chunks_of(mixer, longest):
                outputs.append(tree_flatten(forward(*own_args, **own_kwargs)))
        columns = zip(*(made for made, _ in outputs), strict=True)
        return tree_unflatten([groups.join(column) for column in columns], outputs[0][1])

    return run


def _attend_by_own_code(mixer: nn.Module, language: Any) -> None:
    """Make attention run as in its class, with torch's attention if the language model supports it."""
    for part in mixer.modules():
        if isinstance(config := getattr(part, "config", None), PreTrainedConfig):
            own: Any = copy.copy(config)
            eager = config._attn_implementation == "eager" or not language._supports_sdpa
            own._attn_implementation = "eager" if eager else "sdpa"
            part.config = own


def _masked(forward: Forward, mixer: Any) -> Forward:
    """The forward of attention that is written for a single sample, with the mask of a batch of samples."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None:
            kwargs["attention_mask"] = _mask_of(mixer, args[0] if args else kwargs["hidden_states"])
        return forward(*args, **kwargs)

    return run


def _mask_of(mixer: Any, hidden: Tensor) -> Tensor:
    """The causal mask of samples [n, L, H]: bool [n, 1, L, L], or for eager attention the values added to scores."""
    (count, length, _), config = hidden.shape, mixer.config
    places = torch.arange(length, device=hidden.device)
    ago = places[:, None] - places
    seen = ago >= 0
    kinds = getattr(config, "layer_types", None)
    kind = kinds[mixer.layer_idx] if kinds else "full_attention"
    if (window := getattr(mixer, "sliding_window", None)) is not None:
        seen &= ago < window
    elif kind == "chunked_attention":
        chunks = places // config.attention_chunk_size
        seen &= chunks[:, None] == chunks
    seen = seen.expand(count, 1, -1, -1)
    if config._attn_implementation == "sdpa":
        return seen
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, lowest)


@contextmanager
def _chunks_of(mixer: Any, length: int) -> Iterator[None]:
    """Make a mixer process short samples in short chunks: Mamba 2 pads to whole chunks of 256 tokens."""
    own = vars(mixer).get("chunk_size")
    if isinstance(own, int):
        mixer.chunk_size = min(own, max(16, 1 << (length - 1).bit_length()))
    try:
        yield
    finally:
        if isinstance(own, int):
            mixer.chunk_size = own


def _lies_along(leaf: Any, rows: int, length: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim >= 2 and leaf.shape[:2] == (rows, length)


class _Groups(NamedTuple):
    """The samples of a row in groups of similar length.

    shapes: (n, L) of each group. places: int64, the position in the row of each token of all groups, T for padding.
    back: int64 [T], the index among these of each token of the row.
    """

    shapes: tuple[tuple[int, int], ...]
    places: Tensor
    back: Tensor

    def cut(self, row: Tensor) -> list[Tensor]:
        """Cut a tensor along the tokens [1, T, ..] into [n, L, ..] for each group; padding is zero."""
        padded = torch.cat([row[0], row.new_zeros(1, *row.shape[2:])])
        parts = padded.index_select(0, self.places).split([count * length for count, length in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, column: Sequence[Any]) -> Any:
        """Join the groups' outputs [n, L, ..] to the row's [1, T, ..]; None for anything else."""
        if not all(_lies_along(part, *shape) for part, shape in zip(column, self.shapes, strict=True)):
            return None
        parts = [part.flatten(0, 1) for part in column]
        widest = max(part.shape[-1] for part in parts)
        if any(part.shape[-1] < widest for part in parts):  # short samples have fewer keys to select
            parts = [torch.cat([part, part[:, :1].expand(-1, widest - part.shape[-1])], -1) for part in parts]
        return torch.cat(parts).index_select(0, self.back)[None]


@lru_cache(maxsize=64)
def _group(lengths: tuple[int, ...], device: torch.device) -> _Groups:
    begins = [sum(lengths[:number]) for number in range(len(lengths))]
    members: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        longest = lengths[members[-1][0]] if members else 0
        if not members or lengths[number] < 0.8 * longest - _FREE:
            members.append([])
        members[-1].append(number)
    total = sum(lengths)
    places: list[int] = []
    back = [0] * total
    for group in members:
        longest = lengths[group[0]]
        for number in group:
            begin, length = begins[number], lengths[number]
            back[begin : begin + length] = range(len(places), len(places) + length)
            places += [*range(begin, begin + length), *[total] * (longest - length)]
    shapes = tuple((len(group), lengths[group[0]]) for group in members)
    return _Groups(shapes, torch.tensor(places, device=device), torch.tensor(back, device=device))


_FREE = 32
"""Tokens of padding that cost less than a separate run: recurrences are computed in chunks of 64 or more."""
