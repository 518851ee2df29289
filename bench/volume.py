"""The bytes that a rank has to send in one step, by axis of the mesh: closed formulas, made without looking at a run.

A step is A micro batches on each data-parallel rank, each one sample of T tokens; ranks that share it have t of them.
Bytes are those of the algorithms that send least (see `tutti.check.comm_volume`), averaged over the ranks, which differ
where keys travel in a ring and where a model is cut into stages. Compute is in bf16 (2 bytes), gradients are reduced in
fp32 (4 bytes).

- fsdp, over S ranks: with ZeRO-3 every micro batch gathers all parameters for the forward pass and all blocks but the
  last one again for the backward pass, and reduces and scatters gradients; else a step does both once.
- replicate: the gradients that a rank keeps are all-reduced once a step.
- tensor, over G ranks: in each layer and each pass, attention and MLP each gather all tokens and scatter their sums.
  The embedding scatters, the head gathers, and back. The loss needs three numbers for each target. The gradients of
  what every rank has whole (norms, routers, experts that are not divided) are summed once a step.
- ulysses, over U ranks: in each layer and each pass, tokens of queries, keys and values for heads, and heads of the
  output for tokens.
- context, over C ranks: of two chunks that each rank has of a causal sample, C (C - 1) early ones travel to the others
  and half as many late ones. Keys and values go there in both passes, their gradients back in one.
- pipeline, over P ranks: hidden states at each border, and their gradients back.
- expert, over G ranks: a token's row goes to each expert that it chose, comes back, and so do the gradients, but for
  the rows that stay on their rank; before that go the counts.
- expert_shard: as fsdp, of the experts that a rank has.

With several kinds of parameters on a mesh, the gradient norm is one number for each kind and axis that it is split on.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from bench._ranks import ByAxis

COMPUTE, REDUCE, COUNT = 2, 4, 8
"""Bytes of a number in forward and backward passes, of one that is added up over ranks, and of an integer."""


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
        """`times` collectives over `size` ranks, in each of which a rank sends (size - 1) / size of `whole` bytes
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
    """Numbers of parameters of one layer that are split over tensor ranks, that are whole on each, and of experts; and
    of the embedding or the head."""

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
    """Gathering parameters, reducing gradients, the gradient norm."""
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
    kinds = 2 if setting.tensor > 1 else 1  # what is split over tensor ranks, and what is not
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
