"""The cost of parallel layouts: tokens per second, and bytes sent per step against theory. `python -m bench.scaling`.

1. Layouts. A small Qwen3 (and a Qwen3-MoE) trains on the same global batch of four samples of 1,024 tokens in every
   layout, with one thread per rank. For one step, the bytes and messages that a rank sends along each axis are counted
   (`tutti.check.comm_volume`), averaged over the ranks, and compared with the formulas of `bench.volume`. A ratio of
   bytes above 1.00 means that more is sent than necessary.
2. Ulysses with and without train.async_enabled, in turns.
3. Two processes of one thread against one process of two (`--headline`), in turns: the 60M model of `bench.workload`
   with fsdp2, 4,096 tokens per rank, the same global batch.

All ranks are processes of this machine. If there are more of them than cores, tokens per second mean little, but the
communication is still exact.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import workload
from bench._ranks import ByAxis, Job, Report, run
from bench.volume import Setting, volume

LENGTH, SAMPLES = 1024, 4
"""Tokens per sample, and samples per global batch."""

DENSE: dict[str, Any] = workload.MODEL | {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.0,
}
HEADLINE_TOKENS = 4096


@dataclass(frozen=True)
class Layout:
    """A row of the table. sizes: axis sizes, by their names in the configuration. train: further arguments."""

    name: str
    world: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    moe: bool = False

    @property
    def model(self) -> dict[str, Any]:
        return MOE if self.moe else DENSE

    @property
    def kind(self) -> str:
        """The name of its model's folder."""
        return "moe" if self.moe else "dense"

    @property
    def setting(self) -> Setting:
        """The bytes and messages by the formulas, in the same form as `counted`."""
        inner = {axis: self.sizes.get(axis, 1) for axis in ("tensor", "ulysses", "context", "pipeline", "expert")}
        data = self.world
        for axis in ("tensor", "ulysses", "context", "pipeline"):
            data //= inner[axis]
        ddp = self.train.get("data_parallel_mode") == "ddp"
        copies = data if ddp else self.sizes.get("replicate", 1)
        return Setting(
            tokens=LENGTH,
            micro_batches=SAMPLES // data,
            replicate=copies,
            shard=data // copies,
            zero3=self.train.get("enable_full_shard", True) and not ddp,
            early_values=self.train.get("async_enabled", False),
            **inner,
        )

    def job(self, folder: Path, warmup: int, steps: int) -> Job:
        names = {axis: f"{axis}_parallel_size" for axis in self.sizes if axis != "replicate"}
        arguments: dict[str, Any] = {names[axis]: size for axis, size in self.sizes.items() if axis in names}
        if "replicate" in self.sizes:
            arguments |= {
                "data_parallel_replicate_size": self.setting.replicate,
                "data_parallel_shard_size": self.setting.shard,
            }
        train = {f"train.{name}": value for name, value in (arguments | self.train).items()}
        return Job(
            _arguments(folder / self.kind, LENGTH, SAMPLES, micro_batch_size=1) | train, self.world, warmup, steps
        )


LAYOUTS = (
    Layout("one process"),
    Layout("ddp 2", 2, train={"data_parallel_mode": "ddp"}),
    Layout("zero-2, 2", 2, train={"enable_full_shard": False}),
    Layout("zero-3, 2", 2),
    Layout("tensor 2", 2, {"tensor": 2}),
    Layout("pipeline 2", 2, {"pipeline": 2}),
    Layout("ulysses 2", 2, {"ulysses": 2}),
    Layout("ulysses 2, async", 2, {"ulysses": 2}, {"async_enabled": True}),
    Layout("context 2", 2, {"context": 2}),
    Layout("MoE, one process", moe=True),
    Layout("MoE, zero-3, 2", 2, moe=True),
    Layout("MoE, expert 2", 2, {"expert": 2}, moe=True),
    Layout("MoE, tensor 2", 2, {"tensor": 2}, moe=True),
    Layout("ddp 4", 4, train={"data_parallel_mode": "ddp"}),
    Layout("zero-3, 4", 4),
    Layout("replicate 2 x zero-3, 2", 4, {"replicate": 2}),
    Layout("replicate 2 x ulysses 2", 4, {"replicate": 2, "ulysses": 2}),
    Layout("tensor 4", 4, {"tensor": 4}),
    Layout("zero-3, 2 x tensor 2", 4, {"tensor": 2}),
    Layout("zero-3, 2 x pipeline 2", 4, {"pipeline": 2}),
    Layout("tensor 2 x pipeline 2", 4, {"tensor": 2, "pipeline": 2}),
    Layout("ulysses 4", 4, {"ulysses": 4}),
    Layout("context 4", 4, {"context": 4}),
    Layout("ulysses 2 x context 2", 4, {"ulysses": 2, "context": 2}),
    Layout("zero-3, 2 x ulysses 2", 4, {"ulysses": 2}),
    Layout("MoE, expert 4", 4, {"expert": 4}, moe=True),
    Layout("MoE, zero-3, 4 x expert 2", 4, {"expert": 2}, moe=True),
    Layout("MoE, zero-3, 2 x tensor 2 x expert 4", 4, {"tensor": 2, "expert": 4}, moe=True),
    Layout("MoE, zero-3, 2 x ulysses 2 x expert 4", 4, {"ulysses": 2, "expert": 4}, moe=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="layouts of up to two ranks, few steps, one round")
    parser.add_argument("--only", default="", help="comma-separated parts of layout names")
    parser.add_argument("--steps", type=int, default=None, help="timed steps of each layout (3, quick: 2)")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of the comparisons in turns (3, quick: 1)")
    parser.add_argument("--headline", action="store_true", help="run only two processes against one with two threads")
    options = parser.parse_args()
    steps = options.steps or (2 if options.quick else 3)
    rounds = options.rounds or (1 if options.quick else 3)
    wanted = [part.strip().lower() for part in options.only.split(",")]
    layouts = [
        layout
        for layout in LAYOUTS
        if any(part in layout.name.lower() for part in wanted) and not (options.quick and layout.world > 2)
    ]
    with TemporaryDirectory() as place:
        folder = Path(place)
        if not options.headline:
            write_samples(folder / "dense", DENSE, LENGTH, SAMPLES * 64)
            write_samples(folder / "moe", MOE, LENGTH, SAMPLES * 64)
            print(_layouts_table(list(_measure(layouts, folder, steps))), flush=True)
            if not options.only:
                print("\n" + _in_turns(folder, steps, rounds), flush=True)
        if not options.only:
            print("\n" + _headline(folder, rounds), flush=True)
    print(f"\n{rounds} rounds of the comparisons in turns; {steps} timed steps of each layout")


def write_samples(folder: Path, model: dict[str, Any], length: int, count: int) -> None:
    """Write a model folder and `count` samples of exactly `length` tokens."""
    import numpy as np

    workload.write_model(folder, model)
    rows = np.random.default_rng(0).integers(1, model["vocab_size"], (count, length - 1))
    workload.write_text(folder / "rows.jsonl", [[*row, workload.EOS] for row in rows.tolist()])


def _arguments(folder: Path, length: int, global_batch_size: int, micro_batch_size: int) -> dict[str, Any]:
    return {
        "model.config_path": str(folder),
        "data.train_path": str(folder / "rows.jsonl"),
        "data.data_type": "plaintext",
        "data.max_seq_len": length,
        "data.num_workers": 0,
        "data.shuffle": False,
        "train.output_dir": str(folder / "run"),
        "train.data_parallel_mode": "fsdp2",
        "train.compute_dtype": "bfloat16",
        "train.micro_batch_size": micro_batch_size,
        "train.global_batch_size": global_batch_size,
        "train.lr": 1e-4,
        "train.init_device": "meta",
        "train.enable_gradient_checkpointing": False,
    }


def _measure(layouts: Sequence[Layout], folder: Path, steps: int) -> Iterator[tuple[Layout, list[Report]]]:
    for layout in layouts:
        reports = run(layout.job(folder, warmup=2, steps=steps))
        print(f"{layout.name:40} {_speed(reports):8.0f} tokens/s", file=sys.stderr, flush=True)
        yield layout, reports


def _speed(reports: list[Report]) -> float:
    """Tokens per second of the median step."""
    return reports[0].tokens / statistics.median(reports[0].seconds)


def mean_sent(reports: list[Report]) -> ByAxis:
    """Bytes and messages by axis, averaged over the ranks."""
    axes = sorted({axis for report in reports for axis in report.sent})
    columns = {axis: zip(*(report.sent.get(axis, (0.0, 0.0)) for report in reports), strict=True) for axis in axes}
    return {axis: (statistics.mean(sizes), statistics.mean(counts)) for axis, (sizes, counts) in columns.items()}


def _layouts_table(measured: list[tuple[Layout, list[Report]]]) -> str:
    """A Markdown table with one row per layout and axis."""
    header = ["", "tokens/s", "axis", "KiB per rank and step", "by formula", "ratio", "messages", "by formula"]
    rows = [header, ["---", "---:", "---", *["---:"] * 5]]
    for layout, reports in measured:
        first = [layout.name, f"{_speed(reports):.0f}"]
        sent, formula = mean_sent(reports), volume(layout.model, layout.setting)
        for axis in sorted(sent.keys() | formula.keys()):
            (size, count), (least, fewest) = sent.get(axis, (0.0, 0.0)), formula.get(axis, (0.0, 0.0))
            ratio = f"{size / least:.3f}" if least else "-"
            rows.append([*first, axis, _kib(size), _kib(least), ratio, f"{count:.1f}", f"{fewest:.1f}"])
            first = ["", ""]
        if not sent:
            rows.append([*first, "-", *[""] * 5])
    return _markdown(rows)


def _kib(size: float) -> str:
    return f"{size / 1024:,.1f}"


def _in_turns(folder: Path, steps: int, rounds: int) -> str:
    """A table of Ulysses with and without train.async_enabled."""
    contenders = [layout for layout in LAYOUTS if layout.name in ("ulysses 2", "ulysses 2, async")]
    speeds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for layout, found in zip(contenders, speeds, strict=True):
            found.append(_speed(run(layout.job(folder, warmup=2, steps=steps))))
    return _turns_table([layout.name for layout in contenders], speeds)


def _headline(folder: Path, rounds: int) -> str:
    """A table of two ranks with one thread against one process with two; one timed step per round, after a warm-up."""
    samples = HEADLINE_TOKENS // LENGTH
    write_samples(folder / "60m", workload.MODEL, LENGTH, 2 * samples * 3)
    arguments = _arguments(folder / "60m", LENGTH, 2 * samples, micro_batch_size=samples)
    speeds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for world, found in ((1, speeds[0]), (2, speeds[1])):
            found.append(_speed(run(Job(arguments, world, warmup=1, steps=1, threads=2 // world))))
            print(f"{world} processes {found[-1]:8.1f} tokens/s", file=sys.stderr, flush=True)
    return _turns_table(["one process, two threads", "two processes, one thread each (fsdp2)"], speeds)


def _turns_table(names: Sequence[str], speeds: Sequence[Sequence[float]]) -> str:
    """Medians over the rounds, and the ratio to the first contender within a round."""
    rows = [["", "tokens/s", f"relative to {names[0]}"], ["---", "---:", "---:"]]
    for name, found in zip(names, speeds, strict=True):
        ratio = statistics.median(mine / first for mine, first in zip(found, speeds[0], strict=True))
        rows.append([name, f"{statistics.median(found):.0f}", f"{ratio:.2f}"])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
