"""Facts about a Hugging Face model that training needs, found by inspecting the model rather than kept in a table.

`read_structure` collects them in one record (`tutti.core.structure`):

- `blocks`: the repeated layers, which are compiled, checkpointed and sharded one by one.
- `text_model`, `towers`: in a multimodal model, the language model and the media encoders.
- `decoder`, `head`, `logit_transform`: the model cut between its hidden states and its logits, so that the head can be
  fused with the loss. What a model does with its logits after the head (scaling, soft-capping) is declared in its
  config under a few names. Whether we understood it correctly is tested: the class's own `forward` runs once with small
  stubs for decoder and head, and must give the result of our transform. A model that does anything else is refused,
  rather than trained on a different function.

Also here: `num_params` and `count_flops`, the model's size and work, for the log and the utilization (MFU).
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tutti.attention.sparse import NAME as SPARSE
from tutti.attention.sparse import SparseSizes
from tutti.core.compat import get_model_conversion_mapping
from tutti.core.structure import LogitTransform, ModelStructure
from tutti.model.mixers import mixers, names_read, recurrence_flops
from tutti.model.quantized import num_weights

log = logging.getLogger(__name__)

HEAD_NAMES = ("score",)
"""The attributes in which sequence classifiers keep the linear layer for the classes' logits."""

ADAPTER_MARK = "_lora_"
"""The mark in the names of low-rank adapters' parameters (`tutti.model.lora`); no model uses it in a name."""


def read_structure(model: PreTrainedModel, basic: Iterable[str] = ()) -> ModelStructure:
    """The parts of `model`, which is complete and on the meta device. basic: class names from model.basic_modules.

    ValueError: the model does not consist of a known decoder and head, or has no module of a class in `basic`.
    """
    return ModelStructure(
        name=_class_name(causal_lm(model)),
        config=model.config.get_text_config(),
        decoder=decoder(model),
        text_model=text_model(model),
        blocks=tuple(blocks(model)),
        basic=(*_led_blocks(model), *(module for _, module in basic_modules(model, basic))),
        head=head(model),
        classifies=is_classifier(model),
        transform=logit_transform(model),
        towers=tuple(towers(model)),
        tower_blocks=tuple(tower_blocks(model)),
        experts=tuple(experts(model)),
        mixers=tuple(mixers(block for _, block in blocks(model))),
        undivided=tuple(_undivided(block for _, block in blocks(model))),
        by_keyword=getattr(model, "flow_decoder", None) is not None,
    )


def blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The repeated layers of the model's language model with their names, in running order: the outermost modules in
    its `_no_split_modules`, or the members of its longest ModuleList if it names none."""
    names = set(causal_lm(model)._no_split_modules or ())
    inside = text_model(model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is inside), "")
    found = [(prefix + name, module) for name, module in inside.named_modules() if _class_name(module) in names]
    if not found:
        found = [(prefix + name, module) for name, module in _longest_list(inside)]
    outer: list[tuple[str, nn.Module]] = []
    for name, module in found:
        if not outer or not name.startswith(outer[-1][0] + "."):
            outer.append((name, module))
    return outer


def tower_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers of media encoders (the longest ModuleList of each tower) and of a diffusion decoder."""
    led = getattr(model, "flow_decoder", None)
    return [
        *_led_blocks(model),
        *(block for tower in towers(model) if tower is not led for _, block in _longest_list(tower)),
    ]


def _led_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers of a diffusion decoder, which runs in every step on every rank."""
    led = getattr(model, "flow_decoder", None)
    return [] if led is None else led.blocks()


def _longest_list(root: nn.Module) -> list[tuple[str, nn.Module]]:
    lists = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    prefix, longest = max(lists, key=lambda item: len(item[1]))
    return [(f"{prefix}.{name}", module) for name, module in longest.named_children()]


def _undivided(units: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The parts of blocks, around projections, that average over their features (Gemma 3n's MLP, which keeps the
    largest ones); attention averages only over heads."""
    for part in (part for unit in units for part in unit.modules()):
        kind: Any = model_class(part)
        projects = any(isinstance(child, nn.Linear) for child in part.children())
        if projects and "Attention" not in kind.__name__ and {"mean", "std", "var"} & names_read(kind):
            yield part


def basic_modules(model: PreTrainedModel, class_names: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """The modules of these classes (model.basic_modules) with their names, inner ones first. ValueError: the model
    has no module of a class."""
    wanted = set(class_names)
    found = [(name, module) for name, module in model.named_modules() if _class_name(module) in wanted]
    unknown = wanted - {_class_name(module) for _, module in found}
    if unknown:
        known = sorted({_class_name(module) for module in model.modules() if any(True for _ in module.parameters())})
        raise ValueError(
            f"model.basic_modules: this model has no {', '.join(sorted(unknown))}; it is made of {', '.join(known)}"
        )
    inside = {id(part) for tower in towers(model) for part in tower.modules()}
    beside = sorted({_class_name(module) for _, module in found if id(module) in inside})
    if beside:
        raise ValueError(
            f"model.basic_modules: {', '.join(beside)} is part of what encodes images, which not every rank runs in "
            "every step, and cannot be gathered on its own; leave it out"
        )
    return found[::-1]


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The model that the head belongs to: the foundation of a composed model (`tutti.model.omni`), else `model`."""
    return getattr(model, "foundation", model)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The inner model, from tokens to `last_hidden_state`."""
    return getattr(model, _decoder_name(model))


def _decoder_name(model: PreTrainedModel) -> str:
    """The attribute that holds the decoder; not every class has it under its base_model_prefix (Llama 4)."""
    inner = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if isinstance(getattr(model, model.base_model_prefix, None), nn.Module):
        return model.base_model_prefix
    if len(inner) != 1:
        raise ValueError(f"{_class_name(model)} has no inner model to take hidden states from")
    return inner[0]


def text_model(model: PreTrainedModel) -> nn.Module:
    """The language model within the decoder; the decoder itself unless the model is multimodal."""
    inner = decoder(model)
    config = model.config.get_text_config()
    if config is model.config:
        return inner
    return next((part for part in inner.modules() if getattr(part, "config", None) is config), inner)


def towers(model: PreTrainedModel) -> list[nn.Module]:
    """The media encoders of a decoder, and their projectors."""
    return list(_beside(decoder(model), text_model(model)))


def _beside(module: nn.Module, inside: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules with parameters below `module` that are neither `inside` nor around it."""
    if module is inside:
        return
    for child in module.children():
        if any(part is inside for part in child.modules()):
            yield from _beside(child, inside)
        elif any(True for _ in child.parameters()):
            yield child


def drawing_parts(model: PreTrainedModel) -> list[nn.Module]:
    """The image generation modules of a decoder (Janus): unused towers if images are only inputs; if the model
    draws, the modules that decode codes to images."""
    used = set(codes.modules()) if (codes := getattr(model, "code_decoder", None)) is not None else set()
    found = [part for name, part in decoder(model).named_children() if _DRAWS.match(name)]
    return [part for part in found if used.isdisjoint(part.modules())]


def new_parts(model: Any) -> tuple[str, ...]:
    """The names of modules that are fully trained next to low-rank adapters: in a composed model the connectors, the
    drawing modules, and towers without weights; in a ready-made model its drawing modules outside of the vocabulary
    (Janus)."""
    if getattr(model, "foundation", None) is not None:
        names = [
            f"encoders.{kind}" if model.weights[kind] is None else f"encoders.{kind}.projector"
            for kind in model.encoders
        ]
        names += [f"decoders.{name}" for name in model.decoders]
    else:
        codes = getattr(model, "code_decoder", None)
        used = set() if codes is None else set(codes.modules())
        found = [name for name, part in decoder(model).named_children() if not used.isdisjoint(part.modules())]
        names = [f"{model.base_model_prefix}.{name}" for name in found if _DRAWS.match(name)]
    return tuple(names)


def freeze_parts(model: PreTrainedModel, parts: Iterable[str]) -> None:
    """Freeze parts of `model` (train.freeze), and unused image generation modules, which weight decay would shrink.
    ValueError: the model has no such part."""
    for drawing in drawing_parts(model):
        drawing.requires_grad_(False)
    for part in parts:
        for parameter in part_parameters(model, part, "train.freeze").values():
            parameter.requires_grad_(False)


def part_parameters(
    model: PreTrainedModel, part: str, argument: str, *, is_complete: bool = True
) -> dict[str, nn.Parameter]:
    """The parameters of a part of `model` by name. A part is `towers`, `projectors`, `language_model` (of a model
    without one, its transformer), `decoders`, or a pattern for parameter names with * and ?.

    ValueError, naming `argument`: the model has no such part, although it is_complete (not a pipeline stage).
    """
    named = dict(model.named_parameters())
    beside = {id(item) for tower in towers(model) for item in tower.parameters()}
    drawing = {id(item) for module in drawing_parts(model) for item in module.parameters()}
    decoders = getattr(model, "code_decoder", None)
    codes = set() if decoders is None else {id(item) for item in decoders.parameters()}
    beside -= drawing | codes
    # Some towers call an attention matrix within a block a projection.
    outer = {name: re.split(r"\.(?:layers|blocks)\.", name)[0] for name, item in named.items() if id(item) in beside}
    joins = {name for name, stem in outer.items() if _PROJECTOR.search(stem)}
    groups = {
        "towers": outer.keys() - joins,
        "projectors": joins,
        getattr(model, "main_part", "language_model"): {
            name for name, item in named.items() if id(item) not in beside | drawing | codes
        },
        "decoders": {name for name, item in named.items() if id(item) in codes},
    }
    found = groups.get(part) or set(fnmatch.filter(named, part))
    if not found and is_complete:
        known = ", ".join(name for name, members in groups.items() if members)
        raise ValueError(f"{argument}: this model has no {part}; it has {known}, and names of parameters")
    return {name: item for name, item in named.items() if name in found}


_DRAWS = re.compile("vqmodel|generation_")
"""Names of modules that generate images, or codes of images."""

_PROJECTOR = re.compile("projector|projection|merger|connector|aligner|multi_modal|embed_vision")
"""Names of modules that project a tower's features to the language model's width."""


def head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer from hidden states to logits: the output embedding, or a classifier's `score`."""
    model = causal_lm(model)
    found = next((getattr(model, name) for name in HEAD_NAMES if hasattr(model, name)), None)
    found = model.get_output_embeddings() if found is None else found
    if not isinstance(found, nn.Linear):
        raise ValueError(f"{_class_name(model)} has no linear head on its last hidden states; it cannot be trained")
    return found


def is_classifier(model: PreTrainedModel) -> bool:
    """True if the model's logits are over classes rather than tokens."""
    return any(hasattr(model, name) for name in HEAD_NAMES)


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """The transform from the head's output to the model's logits. ValueError: it is more than scaling and
    soft-capping."""
    model = causal_lm(model)
    head(model)
    if is_classifier(model):
        return LogitTransform()
    config = model.config.get_text_config()
    hidden = torch.linspace(-2.0, 3.0, 3 * config.hidden_size).view(1, 3, config.hidden_size)
    probe, raw = _probe(model, config.vocab_size)
    try:
        with torch.no_grad():
            logits = type(probe).forward(probe, inputs_embeds=hidden, use_cache=False).logits
            output = raw(hidden)
    except Exception as error:
        raise ValueError(f"{_class_name(model)} cannot be cut between its hidden states and its head") from error
    masked = _masked(logits)
    for scale, softcap in product(_scales(config), _softcaps(config)):
        transform = LogitTransform(scale, softcap, masked)
        if logits.shape == output.shape and torch.allclose(transform(output), logits, rtol=1e-5, atol=1e-6):
            return transform
    raise ValueError(f"{_class_name(model)} does something to its logits that is not known here; it cannot be trained")


def _masked(logits: Tensor) -> tuple[int, int] | None:
    """The first and the last + 1 of the token ids that are never predicted, judging by their logits."""
    ids = (logits == torch.finfo(logits.dtype).min).flatten(0, -2).all(0).nonzero().flatten()
    return (int(ids[0]), int(ids[-1]) + 1) if len(ids) else None


def _scales(config: PreTrainedConfig) -> list[float]:
    """Logit scales that the config declares, as they are and inverted, the most likely one first."""
    names = ("logits_scaling", "logit_scale", "lm_head_multiplier", "logits_mup_width_multiplier", "output_multiplier")
    values = [float(value) for name in names if (value := getattr(config, name, None))]
    return [1.0, *values, *(1.0 / value for value in values)]


def _softcaps(config: PreTrainedConfig) -> list[float]:
    names = ("final_logit_softcapping", "logits_soft_cap", "final_logit_softcap", "logit_softcap")
    return [0.0, *(float(value) for name in names if (value := getattr(config, name, None)))]


class _StubOutput(tuple):
    """A decoder's output with only hidden states, whatever attribute is requested."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class _StubDecoder(nn.Module):
    """Returns its input as hidden states, under whatever path the class calls it."""

    def __getattr__(self, name: str) -> Any:
        return self

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return _StubOutput((inputs_embeds,))


class _StubHead(nn.Module):
    """A head of full width and rank two: [.., H] -> [.., V] without an H x V weight."""

    def __init__(self, num_logits: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.stack([torch.linspace(-9, 7, num_logits), torch.ones(num_logits)]))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., [0, -1]] @ self.weight


def _probe(model: PreTrainedModel, num_logits: int) -> tuple[PreTrainedModel, _StubHead]:
    """An instance of the model's class with stubs and the model's own plain attributes, on the CPU."""
    cls = model_class(model)
    probe: PreTrainedModel = object.__new__(cls)
    nn.Module.__init__(probe)
    internal = set(probe.__dict__)
    probe.__dict__.update({key: value for key, value in model.__dict__.items() if key not in internal})
    output = _StubHead(num_logits)
    original = head(model)
    for name, child in model.named_children():
        if child is original:
            setattr(probe, name, output)
    inner = _StubDecoder()
    inner.__dict__.update({key: value for key, value in decoder(model).__dict__.items() if key not in internal})
    setattr(probe, _decoder_name(model), inner)
    return probe, output


def model_class(model: nn.Module) -> type[Any]:
    """The class as transformers defines it; fully_shard derives its own class from it."""
    from torch.distributed.fsdp import FSDPModule

    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def weight_conversions(model: nn.Module, **options: Any) -> list[Any]:
    """The conversions of checkpoint keys that transformers registers for `model` by the names of its classes, which
    `fully_shard` would hide. options: passed to transformers."""
    originals = {type(module): model_class(module) for module in model.modules()}
    derived = [(cls, cls.__name__, cls.__module__) for cls, original in originals.items() if cls is not original]
    try:
        for cls, *_ in derived:
            cls.__name__, cls.__module__ = originals[cls].__name__, originals[cls].__module__
        return list(get_model_conversion_mapping(model, **options))
    finally:
        for cls, name, module in derived:
            cls.__name__, cls.__module__ = name, module


def _class_name(module: nn.Module) -> str:
    return model_class(module).__name__


class ParamCount(NamedTuple):
    """All parameters, and those that take part in computing one token (only the chosen experts')."""

    total: int
    active: int


def num_params(model: PreTrainedModel) -> ParamCount:
    """The model's size; tied parameters count once."""
    share, counts = _active_share(model), num_weights(model)
    active = sum(int(count * share.get(id(parameter), 1.0)) for parameter, count in counts.items())
    return ParamCount(sum(counts.values()), active)


def part_sizes(model: PreTrainedModel, parts: Iterable[nn.Module]) -> list[ParamCount]:
    """For each of these modules of `model`: its parameters, and those that a token is multiplied with."""
    share = _active_share(model)
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    lookups -= {id(head(model).weight)}
    sizes = []
    for part in parts:
        counts = num_weights(part)
        active = sum(
            int(count * share.get(id(p), 1.0)) for p, count in counts.items() if p.ndim >= 2 and id(p) not in lookups
        )
        sizes.append(ParamCount(sum(counts.values()), active))
    return sizes


def _active_share(model: PreTrainedModel) -> dict[int, float]:
    """The share of each expert parameter, by its id, that one token uses.

    Some models have experts that compute nothing (LongCat), which are chosen like the others; not all matrices of a
    stack have a slice for them.
    """
    shares: dict[int, float] = {}
    config = model.config.get_text_config()
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "experts_per_token")
    chosen = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    counts = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
    known = {value for name in counts if isinstance(value := getattr(config, name, None), int)}
    for module in model.modules():
        stacks = [item for item in module.parameters(recurse=False) if item.ndim == 3]
        if chosen is None or isinstance(module, nn.Conv1d):
            continue
        if is_experts(module):
            num_experts: Any = module.num_experts
            shares.update((id(parameter), chosen / num_experts) for parameter in module.parameters(recurse=False))
        elif stacks and known & {len(item) for item in stacks}:
            computing, every = min(map(len, stacks)), max(map(len, stacks))
            shares.update((id(item), chosen * computing / every / len(item)) for item in stacks)
    return shares


def experts(model: nn.Module) -> list[nn.Module]:
    """The model's stacks of experts, in running order."""
    return [module for module in model.modules() if is_experts(module)]


def is_experts(module: nn.Module) -> bool:
    """True if the module is a stack of experts behind transformers' ExpertsInterface."""
    return "_is_expert_parallel" in module.__dict__


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations of training on a batch, forward and backward, without recomputation.

    per_token: products with parameters, 6 for each active one (4 if it is frozen), and recurrences
    (`tutti.model.mixers`). pairs: for every attention layer the operations per query-key pair, and the layer's window
    (0: none). per_value: the towers' products (without their attention), per value of their images; one patch counts as
    one token of the tower.
    """

    per_token: float
    pairs: tuple[tuple[float, int], ...]
    per_value: float = 0.0

    def batch(self, lengths: Sequence[int], num_values: int = 0) -> float:
        """The operations for samples of these lengths, with causal attention within each, and images with this many
        values in all."""
        total = self.per_token * sum(lengths) + self.per_value * num_values
        windows: dict[int, float] = {}
        for flops, window in self.pairs:
            windows[window] = windows.get(window, 0.0) + flops
        for window, flops in windows.items():
            total += flops * sum(_num_pairs(length, window) for length in lengths)
        return total


def _num_pairs(length: int, window: int) -> int:
    """The number of query-key pairs of causal attention over `length` tokens, each seeing the last `window` ones (0:
    all)."""
    seen = min(length, window) if window else length
    return seen * (seen + 1) // 2 + (length - seen) * seen


def count_flops(model: PreTrainedModel) -> FlopCount:
    """The training operations per token and per query-key pair, from the model's parameters and config."""
    share = _active_share(model)
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # A matrix takes part in three products (forward, backward for the input, backward for the weight); a frozen one
    # in two.
    work = {
        id(p): (6.0 if p.requires_grad else 4.0) * count * share.get(id(p), 1.0)
        for p, count in num_weights(model).items()
        if p.ndim >= 2
    }
    lookups -= {id(head(model).weight)}
    uses, runs = _uses(model), defaultdict[int, float](float)
    for (_, block), times in zip(blocks(model), uses, strict=True):
        for parameter in block.parameters():  # several blocks may share parameters (Zamba)
            runs[id(parameter)] += times
    work = {key: flops * runs.get(key, 1.0) for key, flops in work.items()}
    beside = {id(p): p for tower in towers(model) for p in tower.parameters()}
    # A diffusion decoder's inputs are latents, neither tokens nor image values: its task counts its work.
    led = getattr(model, "flow_decoder", None) or nn.Module()
    lookups |= {id(p) for p in led.parameters()}
    per_token = sum(flops for key, flops in work.items() if key not in lookups and key not in beside)
    per_patch = sum(flops for key, flops in work.items() if key not in lookups and key in beside)
    # The patch embedding is the towers' only convolution.
    patch = next((p[0].numel() for key, p in beside.items() if p.ndim > 3 and key not in lookups), 0)
    per_value = per_patch / patch if patch else 0.0
    config = model.config.get_text_config()
    per_token += recurrence_flops(mixers(block for _, block in blocks(model)), config.hidden_size)
    pairs = _pair_flops(config)
    if any(times != 1.0 for times in uses):
        pairs = [(pairs[0][0] * times, pairs[0][1]) for times in uses]
    return FlopCount(per_token, tuple(pairs), per_value)


def _uses(model: PreTrainedModel) -> list[float]:
    """The number of runs of each block of a model: more than one if it is in a loop (HRM). A run without gradients
    counts as a third.

    If the model has fewer blocks than layers, its own forward runs with stand-ins for its blocks to find out.
    """
    units, language = [block for _, block in blocks(model)], text_model(model)
    counts = dict.fromkeys(units, 0.0)
    if len(units) == getattr(model.config.get_text_config(), "num_hidden_layers", None):
        return [1.0] * len(units)

    def stand_in(unit: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        counts[unit] += 1.0 if torch.is_grad_enabled() else 1 / 3
        return hidden

    held = [vars(unit).get("forward") for unit in units]
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=next(language.parameters()).device)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=tokens.device)
    try:
        for unit in units:
            vars(unit)["forward"] = partial(stand_in, unit)
        with torch.enable_grad():
            language(input_ids=tokens, position_ids=tokens, attention_mask=mask, use_cache=False)
    except Exception as error:
        log.debug("how often the blocks of %s run is not known: %s", _class_name(model), error)
        return [1.0] * len(units)
    finally:
        for unit, forward in zip(units, held, strict=True):
            vars(unit).pop("forward", None)
            if forward is not None:
                vars(unit)["forward"] = forward
    return list(counts.values())


def _pair_flops(config: PreTrainedConfig) -> list[tuple[float, int]]:
    # The number of heads may vary between layers (Gemma 4), which the config's own attributes do not say.
    by_layer = getattr(config, "per_layer_config", None)
    numbers = range(config.num_hidden_layers)
    each = [_flops_of_pair(config if by_layer is None else by_layer[number]) for number in numbers]
    window = getattr(config, "sliding_window", None) or 0
    entry = getattr(config, SPARSE, None)
    if entry is not None:
        sizes = SparseSizes.read(entry)
        spans = ((sizes.stride, 0), (1, sizes.reach), (1, sizes.window))
        return [(flops / stride, span) for flops in each for stride, span in spans]
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [(flops, window) for flops in each]
    windows = {"full_attention": 0, "hybrid": 0, "sliding_attention": window, "hybrid_sliding": window}
    # Some attention computes the scores for all keys and masks them.
    windows |= {"indexed_attention": 0, "minimax_m3_sparse": 0, "chunked_attention": 0}
    return [(flops, windows[kind]) for flops, kind in zip(each, kinds, strict=False) if kind in windows]


def _flops_of_pair(config: PreTrainedConfig) -> float:
    """The operations of one layer for a query and a key, forward and backward."""
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    keys = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    values = getattr(config, "v_head_dim", None) or width
    return 6.0 * heads * ((keys or width) + values)
