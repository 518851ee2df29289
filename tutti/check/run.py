"""`tutti check`: shows what a run would do without training: its data as the model sees it, its steps, layout and
memory.

It is assembled from the same parts as a run, in one process, for any number of ranks: the model stays on the meta
device, and the data plan is the same in every process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tutti.check.dry_run import Unpredictable, full_batch_of, predict
from tutti.checkpoint.hf_files import Checkpoint
from tutti.checkpoint.hub import with_local_paths
from tutti.config import Config
from tutti.config.layout import Layout, fit
from tutti.config.nouns import counted
from tutti.config.rules import warnings_on_length
from tutti.core.batch import Batch, GlobalBatch, Sample
from tutti.core.compute_dtype import settle_compute_dtype
from tutti.core.device import KERNELS_BYTES, pick_device, resident_bytes
from tutti.core.dist import World
from tutti.core.log import setup_logging
from tutti.core.structure import ModelStructure
from tutti.data.encode import describe
from tutti.data.loader import Data
from tutti.data.media_processor import MediaProcessor
from tutti.data.rows import RowError
from tutti.kinds import Inputs, kind_of
from tutti.model.stage_trace import trace_stages
from tutti.model.stages import describe_stages, stage_blocks
from tutti.model.structure import is_classifier, num_params, towers
from tutti.parallel.fsdp import offloads, reshards
from tutti.parallel.mesh import AXES
from tutti.train.inputs import open_data
from tutti.train.run_parts import model_name

log = logging.getLogger(__name__)

SHOWN_SAMPLES = 4
SHOWN_CHARACTERS = 1200


def check(config: Config, world: int = 1) -> None:
    """Print what training with `config` on `world` ranks would do. ValueError: its files are wrong."""
    setup_logging(0)
    layout = fit(config, world)
    ranks = World(rank=0, size=1, local_rank=0, device=pick_device(config.train.init_device))
    config = settle_compute_dtype(config, ranks)
    if (folder := config.model.model_path) and config.data.task.kind == "language" and Path(folder).is_dir():
        Checkpoint(Path(folder), config.model.safetensor_idx_path)  # ValueError: weights are missing or damaged
    config = with_local_paths(config, ranks, weights=False)
    kind = kind_of(config)
    tokenizer, model = kind.build(config, ranks.device)
    structure = kind.inspect(config, layout, model)
    inputs = kind.read_inputs(config, tokenizer, structure)
    data = open_data(config, inputs, model, ranks, dp_rank=0, dp_size=layout.data)
    for warning in warnings_on_length(config, data.total_steps):
        log.warning("%s", warning)
    first = next(iter(data.train()), None)
    if first is None:
        raise ValueError("the data gives no global batch: see data.train_size, data.train_sample and data.drop_last")
    out = Console(highlight=False)
    if config.data.task.has_tokens:
        _show_data(out, config, data, first, inputs, model)
    out.print(_data_table(data, first))
    out.print(_plan_table(config, layout, model, structure))
    name, largest = model_name(model, structure), _largest(config, data, inputs)
    _show_prediction(out, config, layout, model, name, largest, on_cpu=ranks.device.type == "cpu")


def _show_data(
    out: Console, config: Config, data: Data, first: GlobalBatch, inputs: Inputs, model: PreTrainedModel
) -> None:
    """Print samples of the first micro batch as the model sees them."""
    media = None if inputs.processor is None else MediaProcessor(inputs.processor, config.data)
    samples = (data.read(first.names[0]) if media and data.has_media else None) or list(
        _samples(first.micro_batches[0])
    )
    halves = [half for one in samples for half in _halves(one)]
    _show_samples(out, halves, inputs.tokenizer, model, data.sources, media)


def _samples(batch: Batch) -> Iterator[Sample]:
    borders = batch.cu_seqlens.tolist()
    for begin, end, source in zip(borders[:-1], borders[1:], batch.segment_sources.tolist(), strict=True):
        if source >= 0:
            yield Sample(batch.input_ids[begin:end].numpy(), batch.labels[begin:end].numpy(), source)


def _halves(sample: Sample) -> list[Sample]:
    """The sequences of a sample: both answers of a pair, or the sample itself."""
    if not sample.split:
        return [sample]
    at, media = sample.split, sample.media[: len(sample.media) // 2]
    halves = ((sample.input_ids[:at], sample.labels[:at]), (sample.input_ids[at:], sample.labels[at:]))
    return [Sample(ids, labels, sample.source, media=media) for ids, labels in halves]


def _show_samples(
    out: Console,
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    sources: tuple[str, ...],
    media: MediaProcessor | None,
) -> None:
    legend = Text("First micro batch: ", style="bold")
    legend.append("trained on", style="bold green").append(", ").append("only read", style="dim")
    out.print(legend)
    for number, sample in enumerate(samples[:SHOWN_SAMPLES], 1):
        text = Text(f"  {number}. {sources[sample.source]}, {counted(len(sample), 'token')}: ", style="bold")
        left = SHOWN_CHARACTERS
        for piece, trained in describe(sample, tokenizer, media):
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
    for kind, number in report.media.numbers.items():
        tokens = report.media.tokens[kind]
        table.add_row(f"  {kind}", f"{tokens:,} tokens ({tokens / report.tokens:.0%}) in {number:,}")
    for tokens, kind, what in report.media.largest:
        table.add_row("  largest", f"{kind} of {counted(tokens, 'token')}: {what}")
    if report.packing_efficiency is not None:
        table.add_row("packing", f"{report.packing_efficiency:.1%} of the slots hold a token")
    table.add_row("steps", data.steps_reason)
    counts = counted(first.num_samples, "sample"), counted(first.num_tokens, "token")
    table.add_row("first step", f"{', '.join(counts)}, {first.trained_tokens:,} trained on")
    return table


def _plan_table(config: Config, layout: Layout, model: PreTrainedModel, structure: ModelStructure) -> Table:
    train, table = config.train, _table("Layout")
    divided = " x ".join(f"{axis} {size}" for axis in AXES if (size := getattr(layout, axis)) > 1)
    experts = f", experts over {layout.expert}" if layout.expert > 1 else ""
    table.add_row("ranks", f"{layout.world}{': ' * bool(divided)}{divided}{experts} ({train.data_parallel_mode})")
    table.add_row(
        "global batch",
        f"{layout.global_batch_size} = {train.micro_batch_size} a micro batch x {layout.data} ranks x "
        f"{layout.accumulation} accumulated",
    )
    if layout.pipeline > 1:
        stages = stage_blocks(
            model, structure, trace_stages(structure), layout.pipeline * train.pipeline_stages_per_rank
        )
        where = f"{len(stages)} on {layout.pipeline} ranks ({train.pipeline_schedule})"
        table.add_row("stages", f"{where}: blocks {describe_stages(stages)}")
    stored = "fp32" if train.enable_mixed_precision else "bf16"
    kept = ", kept until the backward pass"
    if layout.world == 1 and not offloads(train):
        kept = ""
    elif reshards(train) and layout.shard > 1:
        kept = ", freed after the forward pass"
    table.add_row("parameters", f"{stored}, computing in {train.compute_dtype}{kept}")
    table.add_row("activations", "recomputed block by block" if train.enable_gradient_checkpointing else "kept")
    return table


def _largest(config: Config, data: Data, inputs: Inputs) -> Batch | None:
    """The largest micro batch with media; None if there is none, or if a medium in it cannot be decoded."""
    samples = data.largest() if inputs.processor is not None else []
    try:
        return full_batch_of(config, samples, MediaProcessor(inputs.processor, config.data)) if samples else None
    except RowError:
        return None


def _show_prediction(
    out: Console,
    config: Config,
    layout: Layout,
    model: PreTrainedModel,
    name: str,
    largest: Batch | None,
    *,
    on_cpu: bool,
) -> None:
    """Print what a step takes of a rank: memory, and traffic along each axis. name: of the model. largest: the micro
    batch that it takes most for, where that has media. on_cpu: this machine has no accelerator, and what its own memory
    would hold is told too."""
    program = resident_bytes() + (KERNELS_BYTES if config.train.compute_dtype == "bfloat16" else 0)
    sizes, memory = num_params(model), _table("Memory per rank")
    active = f" ({sizes.active:,} active)" if sizes.active != sizes.total else ""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = f", of which {trained:,} are trained" if trained != sizes.total else ""
    memory.add_row("model", f"{name}, {sizes.total:,} parameters{active}{share}")
    try:
        with out.status("rehearsing a step"):
            found = predict(config, model, layout.world, largest)
            here = predict(config, model, layout.world, largest, on_cpu=True) if on_cpu else None
    except Unpredictable as error:
        memory.add_row("", str(error))
        out.print(memory)
        return
    if layout.pipeline > 1:
        stage = found.rank * layout.pipeline // layout.world + 1
        memory.title = f"Memory per rank, on the fullest of {layout.pipeline} pipeline ranks, number {stage}"
    held = ", in host memory" if offloads(config.train) else ""
    for name in ("parameters", "gradients", "optimizer"):
        memory.add_row(name, _size(getattr(found, name)) + held)
    memory.add_row("gathered", f"{_size(found.gathered)}, parameters gathered for computing")
    memory.add_row("activations", f"{_size(found.activations)}, and buffers")
    device = found.gathered + found.activations if held else found.peak
    memory.add_row("total", f"{_size(device)} of device memory, at the peak of a full step")
    if here is not None:
        total = (
            f"{_size(program + here.peak)} resident, of which {_size(program).strip()} are used by the program itself"
        )
        memory.add_row("on this CPU", total)
    compares = config.data.data_type == "dpo" and config.train.dpo_reference == "on_the_fly"
    left_out = ["images"] * (largest is None and bool(towers(model))) + ["the reference model"] * compares
    if left_out:
        memory.add_row("not counted", " and ".join(left_out))
    out.print(memory)
    if found.sent:
        traffic = _table("Sent per rank and step")
        for axis, sent in sorted(found.sent.items(), key=lambda item: -item[1].bytes):
            traffic.add_row(axis, f"{_size(sent.bytes)} in {sent.messages:,} messages")
        out.print(traffic)


def _size(num_bytes: int) -> str:
    """Format a number of bytes in GiB, or in MiB if that would be zero."""
    return f"{num_bytes / 2**30:9.3f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:9.3f} MiB"
