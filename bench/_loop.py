"""A packed training loop as an expert would write it by hand: `python -m bench._loop FOLDER`.

FOLDER holds config.json and workload.json, written by bench.speed. Samples are packed into rows of up to as many tokens
as Tutti's, and each attends to itself with torch's SDPA. Head and loss are computed for chunks of trained positions,
whose logits are overwritten with their gradient. Tokens are sorted by expert, with grouped products. The optimizer is
torch's fused AdamW in fp32. To compute in bf16, the model is a bf16 copy that is updated after each step, and its
gradients are accumulated in fp32. Prints JSON: trained tokens, wall and core seconds of the timed steps, and peak
memory.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface

from tutti.core.device import memory_gib

Pack = list[list[int]]

CHUNK = 512
"""Number of positions whose logits exist at a time."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, lengths: list[int], **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within samples of these lengths, [1, H, T, D] -> [1, T, H, D]."""
    made = []
    for q, k, v in zip(*(item.split(lengths, 2) for item in (query, key, value)), strict=True):
        made.append(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=options["scaling"]))
    return torch.cat(made, 2).transpose(1, 2), None


def by_expert(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's experts. hidden [N, H], chosen and weights [N, k] -> [N, H]."""
    experts, order = chosen.flatten().sort()
    ends = experts.bincount(minlength=module.num_experts).cumsum(0).int()
    tokens = order // chosen.shape[1]
    rows = grouped_mm(hidden.index_select(0, tokens), module.gate_up_proj.mT, offs=ends)
    gate, up = rows.chunk(2, -1)
    rows = grouped_mm(module.act_fn(gate) * up, module.down_proj.mT, offs=ends)
    rows = rows * weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros_like(hidden).index_add(0, tokens, rows)


class HeadAndLoss(torch.autograd.Function):
    """Sum of cross-entropies of hidden [N, H], head weight [V, H], targets [N]; the forward computes the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
        total = torch.zeros(())
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for rows, aims, out in zip(*(item.split(CHUNK) for item in (hidden, targets, grad_hidden)), strict=True):
            logits = rows @ weight.T
            probabilities = logits.float().log_softmax(-1)
            total -= probabilities.gather(1, aims[:, None]).sum()
            probabilities.exp_()[torch.arange(len(aims)), aims] -= 1
            grad = logits.copy_(probabilities.mul_(scale))
            torch.mm(grad, weight, out=out)
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad.T, rows)
            else:
                grad_weight += grad.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, None, None


def packs(samples: Pack, slots: int) -> list[Pack]:
    """Pack samples into rows of at most `slots` tokens, each into the first row with room (first fit)."""
    rows: list[Pack] = []
    left: list[int] = []
    for sample in samples:
        place = next((number for number, room in enumerate(left) if room >= len(sample)), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(slots)
        rows[place].append(sample)
        left[place] -= len(sample)
    return rows


class Loop:
    """The model in its compute dtype, its fp32 weights, and the optimizer."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        AttentionInterface.register("by_sample", attend)
        AttentionMaskInterface.register("by_sample", lambda *_, **__: None)
        ExpertsInterface.register("by_expert", by_expert)
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder)
        options = {"attn_implementation": "by_sample", "experts_implementation": "by_expert"}
        held = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        self.model = held if dtype == torch.float32 else copy.deepcopy(held)
        for parameter in self.model.parameters():  # not buffers: rotary frequencies stay fp32
            parameter.data = parameter.data.to(dtype)
        self.held = list(held.parameters())
        self.computed = list(self.model.parameters())
        if self.model is not held:
            for parameter, weight in zip(self.computed, self.held, strict=True):
                weight.grad = torch.empty_like(weight)
                parameter.register_post_accumulate_grad_hook(partial(self.move_gradient, weight.grad))
        self.optimizer = torch.optim.AdamW(self.held, lr=1e-4, fused=True)

    def step(self, rows: Sequence[Pack]) -> int:
        """Train one step on these rows, one micro batch each; returns the number of trained tokens."""
        count = sum(len(sample) - 1 for row in rows for sample in row)
        for number, row in enumerate(rows):
            self.is_first = number == 0
            ids = torch.tensor([token for sample in row for token in sample])
            places = torch.cat([torch.arange(len(sample)) for sample in row])
            inner = nn.functional.pad(places[1:] > 0, (0, 1))  # all but the last of each sample
            lengths = [len(sample) for sample in row]
            out = self.model.model(ids[None], position_ids=places[None], use_cache=False, lengths=lengths)
            hidden, targets = out.last_hidden_state[0, inner], ids[1:][inner[:-1]]
            HeadAndLoss.apply(hidden, self.model.lm_head.weight, targets, 1 / count).backward()
        nn.utils.clip_grad_norm_(self.held, 1.0)
        self.optimizer.step()
        if self.computed[0] is self.held[0]:
            self.optimizer.zero_grad()
        else:
            with torch.no_grad():
                torch._foreach_copy_(self.computed, self.held)
        return count

    def move_gradient(self, to: Tensor, given: Tensor) -> None:
        """Add the gradient of `given` to the step's fp32 gradient `to`, and free it."""
        assert given.grad is not None
        if self.is_first:
            to.copy_(given.grad)
        else:
            to += given.grad
        given.grad = None


def main(folder: Path) -> None:
    plan = json.loads((folder / "workload.json").read_text())
    loop = Loop(folder, getattr(torch, plan["compute_dtype"]))
    accumulation = plan["accumulation"]
    loop.step(packs(plan["warmup"], plan["slots"])[:accumulation])
    rows = packs(plan["measured"], plan["slots"])
    start, cores = time.perf_counter(), time.process_time()
    trained = sum(loop.step(rows[place : place + accumulation]) for place in range(0, len(rows), accumulation))
    seconds, cores = time.perf_counter() - start, time.process_time() - cores
    peak = memory_gib(torch.device("cpu"))
    print(json.dumps({"trained_tokens": trained, "seconds": seconds, "cores": cores, "memory_gib": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
