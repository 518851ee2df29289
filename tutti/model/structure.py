"""Facts about a Hugging Face model that training is planned by, read off the model itself rather than kept in a table.

`read_structure` collects into one record (`tutti.core.structure`):

- `blocks`: the repeated layers, which are compiled, checkpointed and sharded one by one.
- `text_model`, `towers`: of a model that takes more than text, its language model and what lies beside that.
- `decoder`, `head`, `logit_transform`: the model cut between its hidden states and its logits, so that the head can be
  fused with the loss. What a model does with its logits after the head (scaling, soft-capping) is declared by its
  config under a few names, and whether we have understood it is tried out: the class's own `forward` is run once with
  its decoder and head replaced by stubs of a few numbers, and must give what our transform gives. A model that does
  anything else is refused instead of being trained on another function than its own.

Beside it, `num_params` and `count_flops`: sizes and work, for the log and for the utilisation of the hardware.
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
"""Where sequence classifiers on a decoder keep the linear layer that gives the classes' logits."""

ADAPTER_MARK = "_lora_"
"""The mark in the names of low-rank adapters' parameters (`tutti.model.lora`), and no name of a model has."""


def read_structure(model: PreTrainedModel, basic: Iterable[str] = ()) -> ModelStructure:
    """The parts of `model`, which lies whole on the meta device. basic: names of the classes of model.basic_modules.

    ValueError: the model is not made of a decoder and a head that are known, or has no module of a class in `basic`.
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
    """The repeated units of the model's language model with their names, in the order they run: its
    `_no_split_modules`, outermost only.

    A model that names none has the members of its longest ModuleList.
    """
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
    """The repeated units of what encodes images, video and audio, the longest ModuleList of each tower, and of a
    diffusion decoder."""
    led = getattr(model, "flow_decoder", None)
    return [
        *_led_blocks(model),
        *(block for tower in towers(model) if tower is not led for _, block in _longest_list(tower)),
    ]


def _led_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated units of a diffusion decoder, which runs in every step, on every rank."""
    led = getattr(model, "flow_decoder", None)
    return [] if led is None else led.blocks()


def _longest_list(root: nn.Module) -> list[tuple[str, nn.Module]]:
    lists = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    prefix, longest = max(lists, key=lambda item: len(item[1]))
    return [(f"{prefix}.{name}", module) for name, module in longest.named_children()]


def _undivided(units: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The parts of blocks around projections that take a mean over their features (Gemma 3n's MLP, which keeps the
    largest); attention's are over heads."""
    for part in (part for unit in units for part in unit.modules()):
        kind: Any = model_class(part)
        projects = any(isinstance(child, nn.Linear) for child in part.children())
        if projects and "Attention" not in kind.__name__ and {"mean", "std", "var"} & names_read(kind):
            yield part


def basic_modules(model: PreTrainedModel, class_names: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """The modules of these classes (model.basic_modules) with their names, inner ones first; ValueError for a name
    that the model has no module of."""
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
    """The attribute that holds the decoder: not every class has it where its base_model_prefix says (Llama 4)."""
    inner = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if isinstance(getattr(model, model.base_model_prefix, None), nn.Module):
        return model.base_model_prefix
    if len(inner) != 1:
        raise ValueError(f"{_class_name(model)} has no inner model to take hidden states from")
    return inner[0]


def text_model(model: PreTrainedModel) -> nn.Module:
    """The language model within the decoder: all of it, unless the model takes images, video or audio too."""
    inner = decoder(model)
    config = model.config.get_text_config()
    if config is model.config:
        return inner
    return next((part for part in inner.modules() if getattr(part, "config", None) is config), inner)


def towers(model: PreTrainedModel) -> list[nn.Module]:
    """The encoders of images, video and audio that a decoder has beside its language model, and their projectors."""
    return list(_beside(decoder(model), text_model(model)))


def _beside(module: nn.Module, inside: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules below `module` with parameters that neither are, nor are around, `inside`."""
    if module is inside:
        return
    for child in module.children():
        if any(part is inside for part in child.modules()):
            yield from _beside(child, inside)
        elif any(True for _ in child.parameters()):
            yield child


def drawing_parts(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of a decoder that make images (Janus): towers that nothing runs where images are only seen, and where
    the model draws what makes images of codes."""
    used = set(codes.modules()) if (codes := getattr(model, "code_decoder", None)) is not None else set()
    found = [part for name, part in decoder(model).named_children() if _DRAWS.match(name)]
    return [part for part in found if used.isdisjoint(part.modules())]


def new_parts(model: Any) -> tuple[str, ...]:
    """The names of modules that low-rank adapters leave to be trained whole: of a composed model what joins its parts
    and what it draws by, and towers without weights; of a ready-made one what it draws by beside its vocabulary
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
    """Leave parts of `model` untrained (train.freeze), and what makes images, which weight decay would wear away.
    ValueError: the model has no such part."""
    for drawing in drawing_parts(model):
        drawing.requires_grad_(False)
    for part in parts:
        for parameter in part_parameters(model, part, "train.freeze").values():
            parameter.requires_grad_(False)


def part_parameters(
    model: PreTrainedModel, part: str, argument: str, *, is_complete: bool = True
) -> dict[str, nn.Parameter]:
    """The parameters of a part of `model` by name: of its towers, its projectors, its language_model (of a model
    without one its transformer), or those whose name matches a pattern with * and ?.

    ValueError, in the name of `argument`: the model has no such part, although it is_complete (no stage of a pipeline).
    """
    named = dict(model.named_parameters())
    beside = {id(item) for tower in towers(model) for item in tower.parameters()}
    drawing = {id(item) for module in drawing_parts(model) for item in module.parameters()}
    decoders = getattr(model, "code_decoder", None)
    codes = set() if decoders is None else {id(item) for item in decoders.parameters()}
    beside -= drawing | codes
    # Within a tower's blocks some call a matrix of their attention a projection.
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
"""Names of modules that make images, or codes of them."""

_PROJECTOR = re.compile("projector|projection|merger|connector|aligner|multi_modal|embed_vision")
"""Names of modules that take a tower's features to the language model's width."""


def head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer from hidden states to logits: the output embedding, or a classifier's `score`."""
    model = causal_lm(model)
    found = next((getattr(model, name) for name in HEAD_NAMES if hasattr(model, name)), None)
    found = model.get_output_embeddings() if found is None else found
    if not isinstance(found, nn.Linear):
        raise ValueError(f"{_class_name(model)} has no linear head on its last hidden states; it cannot be trained")
    return found


def is_classifier(model: PreTrainedModel) -> bool:
    """True if the model gives logits of classes rather than of tokens."""
    return any(hasattr(model, name) for name in HEAD_NAMES)


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """The transform from the head's output to the model's logits; ValueError where that is more than scale and
    softcap."""
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
    """The first and the last + 1 of the tokens whose logits say that they are never predicted."""
    ids = (logits == torch.finfo(logits.dtype).min).flatten(0, -2).all(0).nonzero().flatten()
    return (int(ids[0]), int(ids[-1]) + 1) if len(ids) else None


def _scales(config: PreTrainedConfig) -> list[float]:
    """Factors on the logits that configs declare, as they are and inverted, after the most likely one."""
    names = ("logits_scaling", "logit_scale", "lm_head_multiplier", "logits_mup_width_multiplier", "output_multiplier")
    values = [float(value) for name in names if (value := getattr(config, name, None))]
    return [1.0, *values, *(1.0 / value for value in values)]


def _softcaps(config: PreTrainedConfig) -> list[float]:
    names = ("final_logit_softcapping", "logits_soft_cap", "final_logit_softcap", "logit_softcap")
    return [0.0, *(float(value) for name in names if (value := getattr(config, name, None)))]


class _StubOutput(tuple):
    """A decoder's output with hidden states and nothing else, whatever it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class _StubDecoder(nn.Module):
    """Gives back what it is given as hidden states, under whatever path the class calls it by."""

    def __getattr__(self, name: str) -> Any:
        return self

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return _StubOutput((inputs_embeds,))


class _StubHead(nn.Module):
    """A head of full width and rank two: [.., H] -> [.., V] without a weight of H x V."""

    def __init__(self, num_logits: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.stack([torch.linspace(-9, 7, num_logits), torch.ones(num_logits)]))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., [0, -1]] @ self.weight


def _probe(model: PreTrainedModel, num_logits: int) -> tuple[PreTrainedModel, _StubHead]:
    """An instance of the model's class around stubs, with the model's own plain attributes, on the CPU."""
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
    """The class as transformers wrote it: fully_shard derives a class of its own from it."""
    from torch.distributed.fsdp import FSDPModule

    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def weight_conversions(model: nn.Module, **options: Any) -> list[Any]:
    """The conversions from a checkpoint's keys that transformers registers for `model`: by the names of its classes,
    which are other ones once `fully_shard` has derived classes from them. options: transformers' own."""
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
    """Parameters in all, and those that take part in computing one token (of the experts, only the chosen ones)."""

    total: int
    active: int


def num_params(model: PreTrainedModel) -> ParamCount:
    """The model's size; tied parameters count once."""
    share, counts = _active_share(model), num_weights(model)
    active = sum(int(count * share.get(id(parameter), 1.0)) for parameter, count in counts.items())
    return ParamCount(sum(counts.values()), active)


def part_sizes(model: PreTrainedModel, parts: Iterable[nn.Module]) -> list[ParamCount]:
    """For each of some modules of `model`: its parameters, and those that a token is multiplied with."""
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
    """The share of each expert parameter, by its id, that one token runs through.

    Experts that compute nothing (LongCat's) are chosen among the others, and not all of a stack's matrices have a slice
    for them.
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
    """The model's stacks of experts, in the order they run."""
    return [module for module in model.modules() if is_experts(module)]


def is_experts(module: nn.Module) -> bool:
    """True if the module is a stack of experts behind transformers' ExpertsInterface."""
    return "_is_expert_parallel" in module.__dict__


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations of training on a batch, forward and backward, recomputation not counted.

    per_token: matrix products with parameters, 6 for each active one (4 if it is frozen), and those of recurrences
    (`tutti.model.mixers`). pairs: for every attention
    layer the operations for one query-key pair, and the layer's window (0 = none). per_value: the towers' matrix
    products (their attention is not counted), by the values of images that they are given: one patch, of so many
    values, is one of a tower's tokens.
    """

    per_token: float
    pairs: tuple[tuple[float, int], ...]
    per_value: float = 0.0

    def batch(self, lengths: Sequence[int], num_values: int = 0) -> float:
        """The work on samples of these lengths, causal attention within each, with images of so many values in all."""
        total = self.per_token * sum(lengths) + self.per_value * num_values
        windows: dict[int, float] = {}
        for flops, window in self.pairs:
            windows[window] = windows.get(window, 0.0) + flops
        for window, flops in windows.items():
            total += flops * sum(_num_pairs(length, window) for length in lengths)
        return total


def _num_pairs(length: int, window: int) -> int:
    """Query-key pairs of causal attention over `length` tokens, each seeing the last `window` ones (0 = all)."""
    seen = min(length, window) if window else length
    return seen * (seen + 1) // 2 + (length - seen) * seen


def count_flops(model: PreTrainedModel) -> FlopCount:
    """The work of one training step a token and a query-key pair, from the model's parameters and config."""
    share = _active_share(model)
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # Of the three products of a matrix, forward, and backward for the input and the weight, a frozen one has two.
    work = {
        id(p): (6.0 if p.requires_grad else 4.0) * count * share.get(id(p), 1.0)
        for p, count in num_weights(model).items()
        if p.ndim >= 2
    }
    lookups -= {id(head(model).weight)}
    uses, runs = _uses(model), defaultdict[int, float](float)
    for (_, block), times in zip(blocks(model), uses, strict=True):
        for parameter in block.parameters():  # which several blocks may share (Zamba)
            runs[id(parameter)] += times
    work = {key: flops * runs.get(key, 1.0) for key, flops in work.items()}
    beside = {id(p): p for tower in towers(model) for p in tower.parameters()}
    # A diffusion decoder sees latents, which are neither tokens nor values of images: its task counts its work.
    led = getattr(model, "flow_decoder", None) or nn.Module()
    lookups |= {id(p) for p in led.parameters()}
    per_token = sum(flops for key, flops in work.items() if key not in lookups and key not in beside)
    per_patch = sum(flops for key, flops in work.items() if key not in lookups and key in beside)
    # What embeds patches is the towers' one convolution.
    patch = next((p[0].numel() for key, p in beside.items() if p.ndim > 3 and key not in lookups), 0)
    per_value = per_patch / patch if patch else 0.0
    config = model.config.get_text_config()
    per_token += recurrence_flops(mixers(block for _, block in blocks(model)), config.hidden_size)
    pairs = _pair_flops(config)
    if any(times != 1.0 for times in uses):
        pairs = [(pairs[0][0] * times, pairs[0][1]) for times in uses]
    return FlopCount(per_token, tuple(pairs), per_value)


def _uses(model: PreTrainedModel) -> list[float]:
    """Runs of each block of a model: more than once where it is a loop (HRM). What is not trained through, since
    it runs without gradients, is a third of a run.

    The model's own forward runs with stand-ins for its blocks, if these are not as many as its layers.
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
    # Heads may differ from layer to layer (Gemma 4), which such a config's own attributes do not say.
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
    # Some attention's scores are computed for all keys, and masked.
    windows |= {"indexed_attention": 0, "minimax_m3_sparse": 0, "chunked_attention": 0}
    return [(flops, windows[kind]) for flops, kind in zip(each, kinds, strict=False) if kind in windows]


def _flops_of_pair(config: PreTrainedConfig) -> float:
    """The operations of one layer for a query and a key, forward and backward."""
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    keys = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    values = getattr(config, "v_head_dim", None) or width
    return 6.0 * heads * ((keys or width) + values)
