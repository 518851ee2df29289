"""Closed formulas for the bytes that a rank has to send in one step along each axis of the mesh.

A step has A micro batches on each data-parallel rank, each with one sample of T tokens; of ranks that share a sample,
each has t tokens. Bytes are those of the algorithms that send the least (see `tutti.check.comm_volume`), averaged over
the ranks, which differ for ring attention and pipeline stages. Compute is in bf16 (2 bytes), and gradients are reduced
in fp32 (4 bytes).

- fsdp, over S ranks: with ZeRO-3, each micro batch all-gathers all parameters for the forward pass and all blocks
  except the last again for the backward pass, and reduce-scatters gradients. Otherwise each happens once per step.
- replicate: the gradients that a rank keeps are all-reduced once per step.
- tensor, over G ranks: in each layer and pass, attention and MLP each gather all tokens and reduce-scatter their sums.
  The embedding scatters and the head gathers, and the reverse backward. The loss needs three numbers per target. The
  gradients of replicated parameters (norms, routers, experts that are not divided) are summed once per step.
- ulysses, over U ranks: in each layer and pass, queries, keys and values are exchanged from tokens to heads, and the
  output from heads to tokens.
- context, over C ranks: each rank has an early and a late chunk of a causal sample. C (C - 1) early chunks travel to
  other ranks, and half as many late ones. Keys and values travel in both passes, their gradients back in one.
- pipeline, over P ranks: hidden states at each stage boundary, and their gradients back.
- expert, over G ranks: a token's row travels to each expert that it chose and back, and so do gradients, except for
  rows that stay on their rank; the counts are exchanged first.
- expert_shard: as fsdp, for the experts of a rank.

With several kinds of parameters on a mesh, the gradient norm takes one number for each kind and each axis that splits
it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from bench._ranks import ByAxis

COMPUTE, REDUCE, COUNT = 2, 4, 8
"""Bytes per number in forward and backward passes, per number that is reduced over ranks, and per integer."""


@dataclass(frozen=True)
class Setting:
    """The sizes of the axes, and one step: micro_batches (A) on each data-parallel rank, of `tokens` (T) each.

    zero3: blocks are freed after each pass, and gradients reduced for every micro batch.
    """

    tokens: int
    micro_batches: int
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    ulysses: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1
    zero3: bool = True
    early_values: bool = False

    @property
    def dense_shards(self) -> int:
        return self.shard * self.context * self.ulysses

    @property
    def expert_shards(self) -> int:
        return self.dense_shards * self.tensor // self.expert


class _Volume:
    """Sums of bytes and messages by axis."""

    def __init__(self) -> None:
        self.by_axis: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, axis: str, size: int, whole: float, times: float = 1, *, twice: bool = False) -> None:
        """Add `times` collectives over `size` ranks, in each of which a rank sends (size - 1) / size of `whole` bytes
        (twice: an all-reduce)."""
        if size > 1:
            self.by_axis[axis][0] += times * whole * (size - 1) / size * (2 if twice else 1)
            self.by_axis[axis][1] += times


def volume(model: dict[str, Any], setting: Setting) -> ByAxis:
    """The bytes that a rank sends in one step of the model of a Qwen3 (or Qwen3-MoE) config `model`, untied."""
    total = _Volume()
    _parameters(total, model, setting)
    _tensor(total, model, setting)
    _attention(total, model, setting)
    _experts(total, model, setting)
    hidden_states = COMPUTE * setting.tokens * model["hidden_size"] / setting.tensor
    if setting.pipeline > 1:
        borders = (setting.pipeline - 1) / setting.pipeline  # that a rank has on average
        there_and_back = 2 * borders * setting.micro_batches
        held = setting.context * setting.ulysses
        total.by_axis["pipeline"] = [there_and_back * hidden_states / held + 2 * borders * REDUCE, there_and_back + 1]
    return {axis: (size, messages) for axis, (size, messages) in total.by_axis.items()}


@dataclass(frozen=True)
class _Sizes:
    """Parameter counts: of one layer's parameters that are split over tensor ranks, that are replicated, and of
    experts; and of the embedding or the head."""

    split: int
    whole: int
    experts: int
    vocabulary: int


def _sizes(model: dict[str, Any]) -> _Sizes:
    hidden, width = model["hidden_size"], model["head_dim"]
    heads, kv = model["num_attention_heads"], model["num_key_value_heads"]
    norms = 2 * hidden + 2 * width
    attention = 2 * hidden * width * (heads + kv)
    count = model.get("num_experts", 0)
    if count:
        experts = 3 * hidden * model["moe_intermediate_size"] * count
        return _Sizes(attention, norms + hidden * count, experts, hidden * model["vocab_size"])
    return _Sizes(attention + 3 * hidden * model["intermediate_size"], norms, 0, hidden * model["vocab_size"])


def _parameters(total: _Volume, model: dict[str, Any], setting: Setting) -> None:
    """Add parameter gathers, gradient reductions and the gradient norm."""
    sizes, layers = _sizes(model), model["num_hidden_layers"] // setting.pipeline
    divided = setting.expert > 1
    block = sizes.split / setting.tensor + sizes.whole + (0 if divided else sizes.experts)
    ends = (2 * sizes.vocabulary / setting.tensor + model["hidden_size"]) / setting.pipeline
    reductions = setting.micro_batches if setting.zero3 else 1

    def shard(axis: str, size: int, parameters: float, count: float, gathers: float) -> None:
        total.add(axis, size, COMPUTE * parameters, count * gathers)
        total.add(axis, size, REDUCE * parameters, count * reductions)

    twice = 2 - 1 / layers if setting.zero3 else 1
    shard("fsdp", setting.dense_shards, block, layers, twice * reductions)
    shard("fsdp", setting.dense_shards, ends, 1, reductions)
    own = layers * block + ends
    total.add(
        "replicate", setting.replicate, REDUCE * own / setting.dense_shards / (layers + 1), layers + 1, twice=True
    )
    if divided:
        own_experts = sizes.experts / setting.expert
        shard("expert_shard", setting.expert_shards, own_experts, layers, twice * reductions)
        total.add("replicate", setting.replicate, REDUCE * own_experts / setting.expert_shards, layers, twice=True)
    kinds = 2 if setting.tensor > 1 else 1  # parameters that are split over tensor ranks, and those that are not
    total.add("fsdp", setting.dense_shards, REDUCE, kinds, twice=True)
    total.add("tensor", setting.tensor, REDUCE, twice=True)
    if divided:
        total.add("expert", setting.expert, REDUCE, twice=True)
        total.add("expert_shard", setting.expert_shards, REDUCE, twice=True)


def _tensor(total: _Volume, model: dict[str, Any], setting: Setting) -> None:
    size, layers = setting.tensor, model["num_hidden_layers"] // setting.pipeline
    held = setting.tokens // (setting.context * setting.ulysses)
    hidden_states, batches = COMPUTE * held * model["hidden_size"], setting.micro_batches
    regions = 1 if model.get("num_experts", 0) else 2
    total.add("tensor", size, hidden_states, batches * layers * regions * 2 * 2)
    total.add("tensor", size, hidden_states, batches * 4 / setting.pipeline)
    targets, losses = (setting.tokens - 1) / (setting.context * setting.ulysses), batches / setting.pipeline
    total.add("tensor", size, REDUCE * targets, losses, twice=True)
    total.add("tensor", size, REDUCE * 2 * targets, losses, twice=True)
    sizes = _sizes(model)
    block = sizes.whole + (sizes.experts if setting.expert == 1 else 0)
    whole = layers * block + model["hidden_size"] / setting.pipeline
    total.add("tensor", size, REDUCE * whole / setting.dense_shards, 1, twice=True)


def _attention(total: _Volume, model: dict[str, Any], setting: Setting) -> None:
    layers, batches = model["num_hidden_layers"] // setting.pipeline, setting.micro_batches
    width, shared = model["head_dim"], setting.tensor
    heads, kv = model["num_attention_heads"] / shared, model["num_key_value_heads"] / shared
    held = setting.tokens / (setting.context * setting.ulysses)
    passes = 2 * layers * batches
    if setting.early_values:
        total.add("ulysses", setting.ulysses, COMPUTE * held * width * (heads + kv), passes)
        total.add("ulysses", setting.ulysses, COMPUTE * held * width * kv, passes)
    else:
        total.add("ulysses", setting.ulysses, COMPUTE * held * width * (heads + 2 * kv), passes)
    total.add("ulysses", setting.ulysses, COMPUTE * held * width * heads, passes)
    if setting.context > 1:
        ranks = setting.context
        chunks = 1.5 * (ranks - 1)
        chunk = setting.tokens / (2 * ranks) * 2 * kv / setting.ulysses * width * COMPUTE
        trips = 3 * layers * batches
        total.by_axis["context"] = [trips * chunks * chunk, trips * (ranks - 1)]


def _experts(total: _Volume, model: dict[str, Any], setting: Setting) -> None:
    if setting.expert == 1:
        return
    layers, batches = model["num_hidden_layers"] // setting.pipeline, setting.micro_batches
    held = setting.tokens / (setting.context * setting.ulysses * setting.tensor)
    rows = held * model["num_experts_per_tok"] * model["hidden_size"]
    total.add("expert", setting.expert, COUNT * model["num_experts"], layers * batches)
    total.add("expert", setting.expert, COMPUTE * rows, layers * batches * 4)
