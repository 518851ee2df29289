"""The plan for splitting a model's matrices over the ranks of a tensor group, from its Hugging Face config.

Configs contain a plan: names of modules, with `*` for a layer's number, and a style for each (`base_model_tp_plan`).
Here it becomes a description of one model for `tutti.parallel.tensor`. Anything unknown is refused by name, before
anything is built:

- `Linear`: a projection that is split by its outputs (colwise) or by its inputs (rowwise).
- `Region`: a part of a block that mixes tokens or splits features (attention, MLP). It gets all tokens, and its output
  is reduced to a rank's own; everything else in a block (norms, residuals) runs on the rank's own tokens. A part with
  matrices that the plan does not split is a region too, and every rank computes it for all tokens.
- Mixers (`tutti.model.mixers`), and parts that mix features, are regions that every rank computes, whatever the plan
  says about their matrices.
- Experts are not split, and are not a region: they process tokens independently, so each rank sends its own through
  them (see `tutti.parallel.expert` for dividing whole experts among ranks).
- The input embedding and the output head are split by the vocabulary, whatever the plan says.

If a config has no plan, or only one for its experts, the usual one is assumed: parts of blocks that consist of the
usual projections are split, and any other part (GPT-BigCode's attention, JetMoE's, a fused gate) is run in full by
every rank. Matrices that are direct members of a block are not split (OPT's MLP), and run on a rank's own tokens.

A projection of heads is split between heads, never within one. If there are fewer key/value heads than ranks, several
ranks hold the same one. Parameters with one number per query head (sinks) are split like the heads, planned or not.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from tutti.config.layout import Piece
from tutti.core.structure import ModelStructure

COLWISE, GATHERED = "colwise", ("colwise_gather_output", "colwise_rep")
ROWWISE, SLICED = "rowwise", ("rowwise_split_input", "rowwise_rep")
_SPLITTING = {COLWISE, ROWWISE, *GATHERED, *SLICED}
_EXPERTS = {"moe_tp_experts", "packed_colwise", "packed_rowwise", "moe_identity_expert"}
"""Styles for splitting experts, which identify a part of a block as experts."""

_REPLICATED = {"replicated_with_grad_allreduce", "mla_kv_a_proj", "sequence_parallel", "replicate", "local_params"}
"""Styles of modules that every rank holds in full (gradients of such parameters are summed over the ranks anyway),
and of attention whose per-head numbers (sinks) are split like the heads."""

_HEAD_BY_HEAD = "query_key_value"
"""A projection to query, key and value interleaved by head, if it has three outputs per input."""

_USUAL = dict.fromkeys(
    ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3", "c_fc", "dense_h_to_4h", _HEAD_BY_HEAD), COLWISE
) | dict.fromkeys(("o_proj", "out_proj", "down_proj", "w2", "c_proj", "dense", "dense_4h_to_h"), ROWWISE)
"""Usual names of projections, and how these are split."""

_KEYS_AND_VALUES = ("k_proj", "v_proj")


class Linear(NamedTuple):
    """A projection that is split.

    units: number of equal pieces of its split dimension; a piece stays on one rank. shared: it projects keys or values,
    so that with more ranks than heads several hold the same head. region: the module that it belongs to.
    """

    name: str
    module: nn.Linear
    style: str
    units: int
    shared: bool
    region: nn.Module

    @property
    def dim(self) -> int:
        """The dimension of the weight that is split."""
        return 1 if self.style == ROWWISE or self.style in SLICED else 0

    @property
    def piece(self) -> Piece:
        """Its requirement for the number of ranks."""
        what = "heads" if self.units < self.module.weight.shape[self.dim] else "features"
        return Piece(self.name, self.units, what, self.shared)


class Region(NamedTuple):
    """A part of a block that gets all tokens. reduces: its last projection returns a rank's own tokens."""

    module: nn.Module
    reduces: bool


@dataclass(frozen=True)
class TensorPlan:
    """The parts of one model that are split.

    head: None if it is small and replicated (a classifier's). per_head: parameters with one number per query head.
    counting: attention modules that reshape heads with their own `num_heads`. blocks: in order; the row of tokens is
    cut among the ranks at the first. reshaping: the decoder, if it reshapes its last hidden states to its number of
    input tokens (`tutti.model.stage_trace` finds out).
    """

    embedding: nn.Embedding
    head: nn.Linear | None
    linears: tuple[Linear, ...]
    regions: tuple[Region, ...]
    per_head: tuple[nn.Parameter, ...]
    counting: tuple[nn.Module, ...]
    blocks: tuple[nn.Module, ...]
    reshaping: nn.Module | None = None


def read_plan(structure: ModelStructure) -> TensorPlan:
    """Apply the plan in a model's config.

    ValueError: the config has no plan, or one with something unknown.
    """
    decoder, config = structure.text_model, structure.config
    head = None if structure.classifies else structure.head
    blocks = [block for _, block in structure.blocks]
    refuse = f"train.tensor_parallel_size: {structure.name} cannot be split into tensors: "
    names = {module: path for path, module in decoder.named_modules()}
    inner = [block for block in blocks if block in names]
    heads = (getattr(config, "num_attention_heads", 0),)
    embedding: Any = decoder.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"{refuse}its tokens are not embedded by a table; leave it at 1")
    if len({name.rpartition(".")[0] for name, _ in structure.blocks}) > 1:
        raise ValueError(f"{refuse}its blocks are not one list, at whose begin tokens are divided; leave it at 1")
    # The embedding is always split; since transformers 5.24 plans name it, and some name nothing else.
    given = {path: style for path, style in (config.base_model_tp_plan or {}).items() if path != names[embedding]}
    splits = any(style in _SPLITTING and ".experts." not in path for path, style in given.items())
    styles: dict[str, str] = given if splits else given | _usual_plan(structure, names, heads)
    if not styles:
        raise ValueError(f"{refuse}its config has no base_model_tp_plan; leave it at 1")
    unknown = sorted(set(styles.values()) - _SPLITTING - _REPLICATED - _EXPERTS)
    if unknown:
        raise ValueError(f"{refuse}its plan has {', '.join(unknown)}, which is not known here; leave it at 1")
    sparse = {path for path, style in styles.items() if style in _EXPERTS}
    linears: list[Linear] = []
    regions: list[Region] = []
    per_head: list[nn.Parameter] = []
    not_split: list[str] = []
    for block in inner:
        for region in _regions(block):
            if region in structure.undivided or any(module in structure.mixers for module in region.modules()):
                not_split.append(names[region] + ".")
                regions.append(Region(region, False))
                continue
            if any(path.startswith(_wildcards(names[region]) + ".") for path in sparse) and _has_experts(region):
                not_split.append(names[region] + ".")
                continue
            if isinstance(region, nn.Linear) and _wildcards(names[region]) not in styles:
                continue  # a matrix of the block itself processes tokens independently
            found = [
                _linear(names[module], module, style, region, config)
                for module in region.modules()
                if (style := styles.get(_wildcards(names[module]))) in _SPLITTING
            ]
            ends = [linear for linear in found if linear.dim == 1]
            if len(ends) > 1 or region is block or (found and found[0].module is region):
                raise ValueError(f"{refuse}{type(region).__name__} is not made of a pair of projections; leave it at 1")
            linears += found
            regions.append(Region(region, bool(ends)))
            per_head += [item for item in region.parameters(recurse=False) if found and item.shape == heads]
    planned = {linear.name for linear in linears}
    missed = [
        path
        for path in names.values()
        if styles.get(_wildcards(path)) in _SPLITTING and path not in planned and not path.startswith(tuple(not_split))
    ]
    if missed or not (linears or sparse):
        raise ValueError(f"{refuse}its plan splits {', '.join(missed[:4]) or 'nothing'} outside of its blocks")
    # Classes with their own plan reshape heads by width, so their number may be smaller.
    split = {linear.region for linear in linears if linear.units == heads[0]}
    counting = [] if splits else [region for region in split if getattr(region, "num_heads", None) == heads[0]]
    return TensorPlan(
        embedding, head, tuple(linears), tuple(regions), tuple(per_head), tuple(counting), blocks=tuple(inner)
    )


def _usual_plan(structure: ModelStructure, names: Mapping[nn.Module, str], heads: tuple[int]) -> dict[str, str]:
    """The plan for blocks without one: parts that consist of the usual projections, norms of tokens or heads and
    per-head numbers (of the query `heads`) are split, and experts are marked; empty if no part is like this."""
    plan: dict[str, str] = {}
    for block in (block for _, block in structure.blocks if block in names):
        for region in _regions(block):
            if isinstance(region, nn.Linear) or any(module in structure.mixers for module in region.modules()):
                continue
            if _has_experts(region) and not _is_attention(region):
                stacks = [part for part in region.modules() if any(p.ndim > 2 for p in part.parameters(recurse=False))]
                plan |= {_wildcards(names[module]): "moe_tp_experts" for module in stacks}
            else:
                plan |= {_wildcards(names[module]): style for module, style in _usual_styles(region, heads).items()}
    return plan


def _usual_styles(region: nn.Module, heads: tuple[int]) -> dict[nn.Module, str]:
    """The splits of a region's projections; empty if it has anything unusual, and is to be run in full."""
    if "residual" in inspect.signature(region.forward).parameters:
        return {}  # a residual added to the last product would not be reduced to a rank's own tokens
    styles: dict[nn.Module, str] = {}
    width = (getattr(region, "head_dim", 0),)
    for path, module in region.named_modules():
        leaf, own = path.rpartition(".")[2], list(module.parameters(recurse=False))
        if isinstance(module, nn.ModuleList):
            return {}  # for example a norm per head
        if isinstance(module, nn.Linear) and leaf in _USUAL:
            if leaf == _HEAD_BY_HEAD and module.out_features != 3 * module.in_features:
                return {}
            styles[module] = _USUAL[leaf]
        elif any(item.shape != (heads if module is region else width) for item in own):
            return {}
    return styles if {COLWISE, ROWWISE} <= set(styles.values()) else {}


def _is_attention(region: nn.Module) -> bool:
    return "Attention" in type(region).__name__


def _wildcards(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _regions(block: nn.Module) -> list[nn.Module]:
    """The block's children with matrices, and members of its lists; norms and the like only have vectors."""
    children: list[nn.Module] = []
    for child in block.children():
        children += child if isinstance(child, nn.ModuleList) else [child]
    return [child for child in children if any(parameter.ndim > 1 for parameter in child.parameters())]


def _has_experts(region: nn.Module) -> bool:
    """True for a region of experts in this block: some families also have dense blocks, under the same name."""
    return any(parameter.ndim > 2 and len(parameter) > 1 for parameter in region.parameters())


def _linear(path: str, module: Any, style: str, region: nn.Module, config: PreTrainedConfig) -> Linear:
    leaf = path.rpartition(".")[2]
    if not isinstance(module, nn.Linear):
        raise ValueError(f"train.tensor_parallel_size: {path} is no linear layer that can be split; leave it at 1")
    linear = Linear(path, module, style, 0, False, region)
    features = module.weight.shape[linear.dim]
    if style in GATHERED or style in SLICED or not _is_attention(region):
        return linear._replace(units=features)
    shared = leaf in _KEYS_AND_VALUES
    heads = config.num_attention_heads
    if shared:
        width = getattr(region, "head_dim", None)
        heads = features // width if width else config.num_key_value_heads
    return linear._replace(units=heads if features % heads == 0 else features, shared=shared)
