"""`tutti check`: what a run would do, without training: its data as the model sees it, its steps, layout and memory.

It is assembled from the same parts as a run, in one process, for any number of ranks: the model stays on the meta
device, and the data plan is the same whatever process looks at it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tutti.config import Config
from tutti.config.layout import Layout, fit
from tutti.core.batch import Batch, GlobalBatch, Sample
from tutti.core.device import pick_device
from tutti.core.dist import Dist
from tutti.core.log import setup_logging
from tutti.data.encode import describe
from tutti.data.loader import Data
from tutti.model.anatomy import anatomy
from tutti.model.plan import blocks, is_classifier, num_params
from tutti.parallel.fsdp import reshards
from tutti.train.setup import check_fits, open_data, tokenizer_and_model
from tutti.train.stages import parameters_by_rank, stage_blocks

SHOWN_SAMPLES = 4
SHOWN_CHARACTERS = 1200


def check(config: Config, world: int = 1) -> None:
    """Print what training with `config` on `world` ranks would do. ValueError: what is wrong with its files."""
    setup_logging(0)
    layout = fit(config, world)
    ranks = Dist(rank=0, world=1, local_rank=0, device=pick_device(config.train.init_device))
    tokenizer, model = tokenizer_and_model(config, ranks.device)
    check_fits(config, layout, model)
    data = open_data(config, tokenizer, model, ranks, dp_rank=0, dp_size=layout.data)
    first = next(iter(data.train()), None)
    if first is None:
        raise ValueError("the data gives no global batch: see data.train_size, data.train_sample and data.drop_last")
    out = Console(highlight=False)
    _show_batch(out, first.micro_batches[0], tokenizer, model, data.sources)
    out.print(_data_table(data, first))
    out.print(_plan_table(config, layout, model))
    out.print(_memory_table(config, layout, model))


def _samples(batch: Batch) -> Iterator[Sample]:
    borders = batch.cu_seqlens.tolist()
    for begin, end, source in zip(borders[:-1], borders[1:], batch.sample_sources.tolist(), strict=True):
        if source >= 0:
            yield Sample(batch.input_ids[begin:end].numpy(), batch.labels[begin:end].numpy(), source)


def _show_batch(
    out: Console, batch: Batch, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, sources: tuple[str, ...]
) -> None:
    samples = list(_samples(batch))
    legend = Text("First micro batch: ", style="bold")
    legend.append("trained on", style="bold green").append(", ").append("only read", style="dim")
    out.print(legend)
    for number, sample in enumerate(samples[:SHOWN_SAMPLES], 1):
        text = Text(f"  {number}. {sources[sample.source]}, {len(sample)} tokens: ", style="bold")
        left = SHOWN_CHARACTERS
        for piece, trained in describe(sample, tokenizer):
            text.append(piece[:left].replace("\n", "⏎\n"), style="green" if trained else "dim")
            left -= len(piece)
            if left <= 0:
                text.append(" ...", style="dim")
                break
        if is_classifier(model):
            text.append(f"  -> class {sample.labels[-1]}", style="bold green")
        out.print(text)
    if len(samples) > SHOWN_SAMPLES:
        out.print(f"  ... and {len(samples) - SHOWN_SAMPLES} more samples", style="dim")


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    return table


def _data_table(data: Data, first: GlobalBatch) -> Table:
    report, table = data.report, _table("Data")
    table.add_row("rows kept", f"{report.rows - sum(report.dropped.values()):,} of {report.rows:,}")
    for reason, count in sorted(report.dropped.items(), key=lambda item: -item[1]):
        table.add_row("  dropped", f"{count:,}: {reason}")
    table.add_row("samples", f"{report.samples:,}")
    share = report.trained_tokens / max(1, report.tokens)
    table.add_row("tokens", f"{report.tokens:,}, of which {share:.0%} trained on")
    if report.packing_efficiency is not None:
        table.add_row("packing", f"{report.packing_efficiency:.1%} of the slots hold a token")
    table.add_row("steps", data.steps_reason)
    counts = f"{first.num_samples:,} samples, {first.num_tokens:,} tokens, {first.trained_tokens:,} trained on"
    table.add_row("first step", counts)
    return table


def _plan_table(config: Config, layout: Layout, model: PreTrainedModel) -> Table:
    train, table = config.train, _table("Layout")
    table.add_row(
        "ranks", f"{layout.world}: {layout.replicate} replicas x {layout.shard} shards ({train.data_parallel_mode})"
    )
    table.add_row(
        "global batch",
        f"{layout.global_batch_size} = {train.micro_batch_size} a micro batch x {layout.data} ranks x "
        f"{layout.accumulation} accumulated",
    )
    if layout.pipeline > 1:
        stages = stage_blocks(model, anatomy(model), layout.pipeline * train.pipeline_stages_per_rank)
        described = ", ".join(f"{blocks[0]} to {blocks[-1]}" for blocks in stages)
        table.add_row(
            "stages", f"{len(stages)} on {layout.pipeline} ranks ({train.pipeline_schedule}): blocks {described}"
        )
    kept = "freed after the forward pass" if reshards(train) and layout.shard > 1 else "kept until the backward pass"
    table.add_row("parameters", f"{'fp32' if train.enable_mixed_precision else 'bf16'}, computed with in "
                  f"{train.compute_dtype}, {kept}")  # fmt: skip
    table.add_row("activations", "recomputed block by block" if train.enable_gradient_checkpointing else "kept")
    return table


def _memory_table(config: Config, layout: Layout, model: PreTrainedModel) -> Table:
    """Bytes of parameters, gradients and optimizer state on each rank: exact; activations depend on the data."""
    train, sizes, table = config.train, num_params(model), _table("Memory per rank")
    active = f" ({sizes.active:,} active)" if sizes.active != sizes.total else ""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = f", of which {trained:,} are trained" if trained != sizes.total else ""
    if layout.pipeline > 1:
        table.title = f"Memory per rank, on the fullest of {layout.pipeline} pipeline ranks"
    table.add_row("model", f"{type(model).__name__}, {sizes.total:,} parameters{active}{share}")
    computed = getattr(torch, train.compute_dtype).itemsize
    held = 4 if train.enable_mixed_precision else 2
    here = max(
        parameters_by_rank(model, layout, train.pipeline_stages_per_rank),
        key=lambda parameters: sum(item.numel() for item in parameters),
    )
    present = {id(item) for item in here}
    own = sum(item.numel() for item in here if item.requires_grad) / layout.shard
    state = {"adamw": 2 * held, "anyprecision_adamw": 4 + (2 if held == 2 else 0)}[train.optimizer]

    def gathered(parameters: Iterable[nn.Parameter]) -> int:
        return sum(item.numel() * (computed if item.is_floating_point() else 1) for item in parameters)

    together = gathered(here)
    if reshards(train) and layout.shard > 1:
        each = [list(block.parameters()) for _, block in blocks(model)]
        together -= gathered(item for block in each for item in block if id(item) in present)
        together += 2 * max((gathered(block) for block in each), default=0)
    rows = {
        "parameters": sum(item.nbytes for item in here) / layout.shard,
        "gradients": own * held,
        "optimizer": own * state,
        "gathered": together,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / 2**30:.3f} GiB")
    table.add_row("together", f"{sum(rows.values()) / 2**30:.3f} GiB, and the activations of a micro batch")
    return table
