"""Low-rank adapters: a frozen model with a trained low-rank change s * B A of each chosen weight W.

(LoRA, arXiv 2106.09685; rank-stabilized scaling, 2312.03732; DoRA, 2402.09353.)

Names, classes and code of the model do not change, so loading, sharding and exports are not affected. An adapted layer
holds the adapter's parameters next to its weight (`weight_lora_A` next to `weight`), and adds the adapter's output to
the weight's. Stacks of experts have no layer per expert; their grouped products ask for the adapter (`grouped`), whose
parameters are stacks too and are divided among ranks like the experts. The change s * B A is never computed: the input
goes through A, which leaves r numbers per token, and then through B.

1. `add_adapters` freezes a model on the meta device, stores the frozen weights in the compute dtype, and adds
   parameters;
2. the model is parallelized and its weights are loaded as usual; then `init_adapters` initializes A, and sets B to
   zero;
3. after the first backward pass `require_gradients` finds adapters whose output never reaches the loss;
4. `merge` adds the changes to the weights, which restores the original model classes.

DoRA scales each output by m / |W + s B A|, with the norm of the weight's row for that output:

- the norm is computed from |W|^2 + 2 s B.(W A^T) + s^2 B.(B A A^T), row by row, with nothing larger than [out, r];
- as in the paper, no gradient flows through the norm;
- the trained parameter is m - |W|, which starts at zero: it can be initialized without the weights, and rounding it to
  bf16 affects the change, not the norm.

If a weight is split among ranks (`tutti.parallel.tensor`), B and the offset are split like its outputs, and A like its
inputs. If inputs are split, each rank computes a part of a sum over ranks, of the change as of the product; only the
squares in the norm, which is that of whole rows, are summed before they are used.

Shapes: r rank, E experts; A [(E,) r, in], B [(E,) out, r], offset [(E,) out].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from transformers import PreTrainedModel

from tutti.core.compat import Conv1D
from tutti.core.dist import World
from tutti.core.modules import Forward, attach, attached, unwrap_forward, wrap_forward
from tutti.core.tensors import local_part, seed_of
from tutti.model.initialize import own_part
from tutti.model.mixers import indexers, mixers, uncalled, weights_read
from tutti.model.quantized import packing_of, product, whole_weight
from tutti.model.structure import ADAPTER_MARK, blocks, head, is_classifier, is_experts, part_parameters
from tutti.parallel.tensor import WHOLE, LinearShard

log = logging.getLogger(__name__)

LISTED = 20
"""Number of names that an error lists before it only counts."""


@dataclass(frozen=True)
class Lora:
    """Settings of adapters: which layers, rank and scale.

    targets: patterns of layer names (of parameter names, for experts); () means every linear layer and stack of experts
    in the blocks except `_left_out`. modules_to_save: patterns of modules that are fully trained. ranks, alphas: of
    single adapters, by name, if they differ from `rank` and `alpha`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        return self.ranks.get(name, self.rank)

    def scaling(self, name: str) -> float:
        """s: alpha / r, or alpha / sqrt(r) with rslora."""
        rank = self.rank_of(name)
        return self.alphas.get(name, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


class Factors(NamedTuple):
    """An adapter's parameters; `offset` with DoRA only."""

    A: Tensor
    B: Tensor
    offset: Tensor | None

    @staticmethod
    def names(weight: str) -> tuple[str, str, str]:
        """The names of the factors beside the weight of this name."""
        return tuple(f"{weight}{ADAPTER_MARK}{part}" for part in ("A", "B", "offset"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Adapter:
    """The adapter of one weight; its parameters belong to the layer.

    name: of the layer, or of the stack of experts. weight: the parameter's name within its module. transposed: the
    weight is stored as [(E,) in, out].
    """

    name: str
    weight: str
    scaling: float
    dropout: float
    transposed: bool

    def factors(self, module: Any) -> Factors:
        A, B, offset = Factors.names(self.weight)
        return Factors(getattr(module, A), getattr(module, B), getattr(module, offset, None))

    def by_output(self, module: Any) -> list[Tensor]:
        """The parameters with a row for each output."""
        return [part for part in self.factors(module)[1:] if part is not None]

    def by_input(self, module: Any) -> list[Tensor]:
        """The factors with a column for each input."""
        return [self.factors(module).A]

    def product(self, module: Any, inputs: Tensor, shard: LinearShard = WHOLE) -> Tensor:
        """The output of the adapted linear layer for `inputs` [.., in], without its bias: [.., out]."""
        A, *rest = self.factors(module)
        B, offset = (None if part is None else shard.rows(part) for part in rest)
        assert B is not None
        out = _frozen_product(module, inputs, shard)
        low = linear(dropout(inputs, self.dropout, module.training).to(A.dtype), A) * self.scaling
        changed = out + linear(low, B).to(out.dtype)
        if offset is None:
            return changed
        weight = shard.rows(self.weight_of(module))
        return (changed * self._ratio(weight, Factors(A, B, offset), shard)).to(out.dtype)

    def grouped(
        self, module: Any, rows: Tensor, out: Tensor, experts: Tensor, product: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The output of an adapted stack of experts, from its frozen output `out` [S, out], for `rows` [S, in] sorted
        by `experts` [S].

        product: multiplies each row [in] by its expert's matrix of a stack [E, in, out].
        """
        A, B, offset = factors = self.factors(module)
        low = product(dropout(rows, self.dropout, module.training), A.transpose(1, 2)) * self.scaling
        changed = out + product(low, B.transpose(1, 2)).to(out.dtype)
        if offset is None:
            return changed
        return (changed * self._ratio(self.weight_of(module), factors)[experts]).to(out.dtype)

    def weight_of(self, module: Any) -> Tensor:
        """The frozen weight, as [(E,) out, in]."""
        weight = whole_weight(module, self.weight)
        return weight.transpose(-2, -1) if self.transposed else weight

    def _ratio(self, weight: Tensor, factors: Factors, shard: LinearShard = WHOLE) -> Tensor:
        """DoRA's factor for each output, fp32 [(E,) out]; only the offset gets a gradient."""
        A, B, offset = factors
        assert offset is not None
        with torch.no_grad():
            a, b = A.float(), B.float()
            cross = ((weight.to(A.dtype) @ A.transpose(-2, -1)).float() * b).sum(-1)
            square = ((b @ (a @ a.transpose(-2, -1))) * b).sum(-1)
            change = 2 * self.scaling * cross + self.scaling**2 * square
            base, change = shard.total(torch.stack([row_norms(weight).square(), change]))
            norm = (base + change).clamp(min=0).sqrt()
        return (base.sqrt() + offset.float()) / norm

    def merge(self, module: nn.Module) -> None:
        """Replace the weight by W + s B A, scaled by DoRA if there is an offset; experts one at a time."""
        assert packing_of(module, self.weight) is None, "a quantized weight cannot take a change"
        weight = self.weight_of(module)
        factors = [part.detach().float() for part in self.factors(module) if part is not None]
        stacked = weight.ndim == 3
        for part, A, B, *offset in zip(weight, *factors, strict=True) if stacked else [(weight, *factors)]:
            changed = torch.addmm(part.float(), B, A, alpha=self.scaling)
            if offset:
                changed *= ((row_norms(part) + offset[0]) / row_norms(changed)).unsqueeze(-1)
            part.copy_(changed)


def row_norms(weight: Tensor) -> Tensor:
    """The row norms, fp32 [(E,) out], of a weight [(E,) out, in]."""
    return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32)


def add_adapters(model: PreTrainedModel, lora: Lora, frozen_dtype: torch.dtype) -> None:
    """Freeze `model` except for what `lora` trains, and add the adapters' parameters, in place. Parameters that are
    already frozen (train.freeze) stay so.

    Frozen parameters are stored in `frozen_dtype`; trained ones keep their dtype; new ones are uninitialized.
    ValueError: a pattern matches nothing, or experts use the model's own loop.
    """
    full = _full_modules(model, lora)
    trained = {parameter for parameter in _in_full(model, full) if parameter.requires_grad}
    targets = _targets(model, lora, trained)
    dtype = next(iter(trained), next(model.parameters())).dtype
    if any(is_experts(module) for module, _ in targets.values()) and "eager" in str(
        model.config._experts_implementation
    ):
        raise ValueError(
            "model.moe_implementation: eager is the model's own loop, which knows no adapters of experts; leave it "
            "unset, or name the layers to adapt without the experts in train.lora_targets"
        )
    _freeze(model, trained, frozen_dtype)
    attach(model, lora=lora)
    added: list[str] = []
    for name, (module, weight) in targets.items():
        transposed = isinstance(module, Conv1D) or bool(is_experts(module) and module.is_transposed)
        adapter = Adapter(name, weight, lora.scaling(name), lora.dropout, transposed)
        base = adapter.weight_of(module)
        shapes = _shapes(base.shape, lora.rank_of(name), dora=lora.dora)
        for leaf, shape in zip(Factors.names(weight), shapes, strict=False):
            module.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=dtype, device=base.device)))
            owner = name.removesuffix(f".{weight}") if is_experts(module) else name
            added.append(f"{owner}.{leaf}")
        attach(module, adapters=attached(module).adapters | {weight: adapter})
        if not is_experts(module):
            wrap_forward(module, "adapter", partial(_adapting, module))
    model._keys_to_ignore_on_save = [*(model._keys_to_ignore_on_save or ()), *added]


def _adapting(module: Any, forward: Forward) -> Forward:
    """Bind as a method, so that a copy of the module has its own; it replaces the class's forward."""
    return MethodType(_adapted, module)


def _adapted(module: Any, inputs: Tensor) -> Tensor:
    """The forward of a linear layer with an adapter, which may be switched off."""
    adapter = adapter_for(module, "weight")
    out = _frozen_product(module, inputs) if adapter is None else adapter.product(module, inputs)
    return out if module.bias is None else out + module.bias


def _frozen_product(module: Any, inputs: Tensor, shard: LinearShard = WHOLE) -> Tensor:
    """The product of a linear layer's weight with `inputs` [.., in], without bias and adapter: [.., out]."""
    rows_are_inputs = isinstance(module, Conv1D)
    if packing_of(module, "weight") is not None:
        assert shard == WHOLE, "the rows of a quantized weight are not split"
        return product(module, "weight", inputs, torch.matmul, rows_are_inputs=rows_are_inputs)
    weight = module.weight.T if rows_are_inputs else module.weight
    return linear(inputs, shard.rows(weight))


def adapter_for(module: Any, weight: str) -> Adapter | None:
    """The adapter of the parameter of this name in `module` (or in a stand-in); None if it has none."""
    return attached(module).adapters.get(weight)


def adapters(model: nn.Module) -> list[tuple[nn.Module, Adapter]]:
    """Every adapter of `model` with its module, in the order of modules."""
    return [(module, item) for module in model.modules() for item in attached(module).adapters.values()]


def lora_of(model: nn.Module) -> Lora | None:
    """The settings of the adapters in `model`; None if there are none."""
    return attached(model).lora


def modules_to_save(model: nn.Module) -> dict[str, nn.Module]:
    """The fully trained modules, by name: those with a trained parameter of their own."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(p.requires_grad and ADAPTER_MARK not in leaf for leaf, p in module.named_parameters(recurse=False))
    }


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute without the adapters: as the base model, if no module is fully trained."""
    adapted = [(module, attached(module).adapters) for module in model.modules() if attached(module).adapters]
    for module, _ in adapted:
        attach(module, adapters={})
    try:
        yield
    finally:
        for module, before in adapted:
            attach(module, adapters=before)


def init_adapters(model: nn.Module, seed: int) -> None:
    """Initialize each A uniformly within 1 / sqrt(in), from the seed and its adapter's name, the same on every
    layout. The rest is zero, so that the adapted model starts as the base."""
    for module, adapter in adapters(model):
        A, B, offset = adapter.factors(module)
        generator = torch.Generator().manual_seed(seed_of(f"{seed} {adapter.name}"))
        bound = 1 / math.sqrt(A.shape[-1])
        drawn = torch.empty(A.shape).uniform_(-bound, bound, generator=generator)
        local_part(A).copy_(own_part(drawn, A))
        for part in (B, offset):
            if part is not None:
                local_part(part).zero_()


def require_gradients(model: nn.Module, world: World) -> None:
    """Check, after the first backward pass, that every adapter has a gradient. Collective.

    ValueError, on all ranks: names the adapters whose B has no gradient on any rank. For a diffusion transformer, whose
    last blocks compute unused text outputs, they are only logged.
    """
    if lora_of(model) is None:
        return
    flags = {
        adapter.name: grad is not None and bool((local_part(grad) != 0).any())
        for module, adapter in adapters(model)
        for grad in [adapter.factors(module).B.grad]
    }
    gathered = world.gather(flags)
    names = {name: None for part in gathered for name in part}
    dead = [name for name in names if not any(part.get(name) for part in gathered)]
    if dead and getattr(model, "main_part", "language_model") != "language_model":
        log.info("adapters of %s stay as they are: nothing takes what these layers compute", listed(dead))
    elif dead:
        raise ValueError(
            f"the adapters of {listed(dead)} got no gradient in the first step: what these layers compute does not "
            "reach the loss (they are unused, or the model reads their weights without calling them); name the layers "
            "to adapt without them in train.lora_targets"
        )


def merge(model: PreTrainedModel) -> None:
    """Add every adapter's change to its weight, in place, and remove the adapters. Parameters must not be sharded."""
    for module, adapter in adapters(model):
        adapter.merge(module)
        for leaf in Factors.names(adapter.weight):
            module._parameters.pop(leaf, None)
    for module in model.modules():
        if attached(module).adapters:
            unwrap_forward(module)
            attach(module, adapters={})
    attach(model, lora=None)


def listed(names: Sequence[str], most: int = LISTED) -> str:
    """The first `most` of `names`, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shapes(weight: Sequence[int], rank: int, *, dora: bool) -> list[tuple[int, ...]]:
    """The shapes of A, B and, with DoRA, the offset."""
    *stack, rows, columns = weight
    shapes = [(*stack, rank, columns), (*stack, rows, rank)]
    return [*shapes, (*stack, rows)] if dora else shapes


def _freeze(model: nn.Module, trained: set[nn.Parameter], dtype: torch.dtype) -> None:
    """Freeze parameters that are not in `trained`, and store them in `dtype`. Tied parameters stay tied."""
    frozen: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter in trained:
                continue
            if parameter not in frozen:
                kind = dtype if parameter.is_floating_point() else parameter.dtype
                frozen[parameter] = nn.Parameter(parameter.detach().to(kind), requires_grad=False)
            module._parameters[leaf] = frozen[parameter]


def _candidates(model: PreTrainedModel) -> dict[str, tuple[nn.Module, str]]:
    """Everything that can have an adapter, by name: linear layers except the head, and stacks of experts."""
    found: dict[str, tuple[nn.Module, str]] = {}
    output = model.get_output_embeddings() and head(model)
    for name, module in model.named_modules():
        if is_experts(module):
            stacks = [leaf for leaf, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
            found.update({f"{name}.{leaf}": (module, leaf) for leaf in stacks})
        elif type(module) in (nn.Linear, Conv1D) and module is not output:
            found[name] = (module, "weight")
    return found


def _left_out(model: PreTrainedModel) -> set[str]:
    """The names of linear layers that are not adapted by default: routers of experts and of attention keys, and
    layers whose weight is read without calling them."""
    units = [block for _, block in blocks(model)]
    found = {id(part) for chooser in indexers(units) for part in chooser.modules()}
    mixing = mixers(units)
    # Only language models have mixers and a known width.
    found |= {id(part) for mixer in mixing for part in uncalled(mixer, model.config.get_text_config().hidden_size)}
    inside = {part for mixer in mixing for part in mixer.modules()}
    for part in (part for block in units for part in block.modules() if part not in inside):
        kind: Any = type(part)
        found |= {id(child) for name, child in part.named_children() if name in weights_read(kind)}
    for block in units:
        for part in block.modules():
            beside = [child for child in part.modules() if isinstance(child, nn.Linear)]
            children = [child for child in part.children() if not isinstance(child, nn.Conv1d)]
            stacks = {len(p) for child in children for p in child.parameters(recurse=False) if p.ndim == 3}
            found |= {id(child) for child in beside if child.out_features in stacks}
    return {name for name, module in model.named_modules() if id(module) in found}


def _targets(model: PreTrainedModel, lora: Lora, trained: set[nn.Parameter]) -> dict[str, tuple[nn.Module, str]]:
    """The layers that `lora` adapts (none of them fully `trained`), each with its module and the name of its weight
    there."""
    candidates = {name: item for name, item in _candidates(model).items() if getattr(*item) not in trained}
    if not lora.targets:
        inside = tuple(f"{name}." for name, _ in blocks(model))
        left_out = _left_out(model)
        chosen = {name: item for name, item in candidates.items() if name.startswith(inside) and name not in left_out}
        if not chosen:
            raise ValueError(f"train.architecture: lora, but the blocks of {type(model).__name__} have no linear layer")
        return chosen
    kinds = ", ".join(dict.fromkeys(_kind(name) for name in candidates))
    for pattern in lora.targets:
        if any(matches(pattern, name) for name in candidates):
            continue
        if any(matches(pattern, name) for name, _ in model.named_modules()):
            raise ValueError(
                f"train.lora_targets: {pattern} is no layer that an adapter goes beside ({kinds}); embeddings, heads "
                "and norms are trained whole by train.lora_full_modules"
            )
        raise ValueError(f"train.lora_targets: nothing is called {pattern}; there are {kinds}")
    return {name: item for name, item in candidates.items() if any(matches(pattern, name) for pattern in lora.targets)}


def _full_modules(model: PreTrainedModel, lora: Lora) -> dict[str, nn.Module]:
    """The modules that `lora` fully trains."""
    candidates = {
        name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    }
    found: dict[str, nn.Module] = {}
    for pattern in lora.modules_to_save:
        hits = {name: module for name, module in candidates.items() if matches(pattern, name)}
        if not hits:
            kinds = ", ".join(dict.fromkeys(_kind(name) for name in candidates if not _kind(name).isdecimal()))
            raise ValueError(f"train.lora_full_modules: nothing is called {pattern}; there are {kinds}")
        found.update(hits)
    return found


def _in_full(model: PreTrainedModel, full: Mapping[str, nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters of the modules `full`, and of a classifier's head, which is always fully trained."""
    for module in (*full.values(), *([head(model)] if is_classifier(model) else ())):
        yield from module.parameters()


def check_frozen(model: PreTrainedModel, lora: Lora, parts: Iterable[str], asked: Iterable[str]) -> None:
    """Warn about frozen `parts` (train.freeze) that contain nothing `lora` would fully train. ValueError: a module
    in `asked` (train.lora_full_modules) is frozen."""
    whole = set(_in_full(model, _full_modules(model, lora)))
    for part in parts:
        if whole.isdisjoint(part_parameters(model, part, "train.freeze").values()):
            log.warning(
                "train.freeze: %s has no effect: of that part train.architecture lora trains adapters alone; "
                "train.lora_targets says which",
                part,
            )
    for pattern in asked:
        modules = _full_modules(model, replace(lora, modules_to_save=(pattern,))).values()
        if not any(parameter.requires_grad for module in modules for parameter in module.parameters()):
            raise ValueError(
                f"train.lora_full_modules: {pattern} is frozen, by train.freeze or because it makes pictures of codes"
            )


def matches(pattern: str, name: str) -> bool:
    """True if `name`, or its end after some dot, matches `pattern` (with * and ?)."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _kind(name: str) -> str:
    """A layer's name within its block: the last part of its name, and for a stack of experts the one before."""
    *_, before, last = f".{name}".split(".")
    return f"{before}.{last}" if before == "experts" else last
