"""A packed training loop as one would write it by hand, as a process of its own: `python -m bench._loop FOLDER`.

FOLDER holds what bench.speed put there: config.json and workload.json. Samples are laid end to end in rows of up to as
many tokens as Tutti's; each attends to itself with torch's SDPA, the loss is of all of a row's logits at once, and
AdamW is torch's fused one. Weights are fp32, with autocast if bf16 is what it is to compute in. Prints a line of JSON:
trained tokens and seconds of the timed steps, and the peak of memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from tutti.core.device import memory_gib

Pack = list[list[int]]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, lengths: list[int], **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within samples of these lengths, [1, H, T, D] -> [1, T, H, D]."""
    made, kernel = [], nn.functional.scaled_dot_product_attention
    for q, k, v in zip(*(item.split(lengths, 2) for item in (query, key, value)), strict=True):
        made.append(kernel(q, k, v, is_causal=True, enable_gqa=True, scale=options["scaling"]))
    return torch.cat(made, 2).transpose(1, 2), None


def packs(samples: Pack, slots: int) -> list[Pack]:
    """The samples in their order, in rows of at most `slots` tokens."""
    rows: list[Pack] = [[]]
    for sample in samples:
        if sum(map(len, rows[-1])) + len(sample) > slots:
            rows.append([])
        rows[-1].append(sample)
    return rows


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[Pack], dtype: str) -> int:
    """Train on these rows; the number of trained tokens."""
    count = sum(len(sample) - 1 for row in rows for sample in row)
    for row in rows:
        ids = torch.tensor([token for sample in row for token in sample])
        places = torch.cat([torch.arange(len(sample)) for sample in row])
        inner = nn.functional.pad(places[1:] > 0, (0, 1))  # all but the last of each sample
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            logits = model(ids[None], position_ids=places[None], use_cache=False, lengths=list(map(len, row))).logits
        loss = nn.functional.cross_entropy(logits[0, inner].float(), ids[1:][inner[:-1]], reduction="sum")
        (loss / count).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return count


def main(folder: Path) -> None:
    plan = json.loads((folder / "workload.json").read_text())
    AttentionInterface.register("by_sample", attend)
    AttentionMaskInterface.register("by_sample", lambda *_, **__: None)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="by_sample")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    accumulation, dtype = plan["accumulation"], plan["compute_dtype"]
    step(model, optimizer, packs(plan["warmup"], plan["slots"])[:accumulation], dtype)
    rows = packs(plan["measured"], plan["slots"])
    start = time.perf_counter()
    trained = sum(
        step(model, optimizer, rows[place : place + accumulation], dtype) for place in range(0, len(rows), accumulation)
    )
    seconds = time.perf_counter() - start
    peak = memory_gib(torch.device("cpu"))
    print(json.dumps({"trained_tokens": trained, "seconds": seconds, "memory_gib": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
