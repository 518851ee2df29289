"""Trained tokens per second: transformers' Trainer (padded and length-grouped) and a packed loop against Tutti.

`make bench`.

Each contender trains the same model (`--model`: a Qwen3 of 60 million parameters, the shape of SmolLM2-135M, or 64
experts) on the same samples of different lengths (see bench.workload), in its own process with two threads. All use
fp32 weights, compute in the faster of bf16 and fp32, and use AdamW without gradient checkpointing, with the same number
of micro batches per step and nearly the same number of tokens in them. Warm-up steps are not timed. Rounds are
interleaved (Trainer, Tutti, Trainer, Tutti ...), so that a machine that slows down affects all, and each round measures
the machine's rate of matrix products in that dtype. Reports medians over the rounds: trained tokens per second, the
model's operations relative to the matrix rate, the ratio to each other contender within a round, trained tokens per
second of core time, which depends less on other processes, and peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import workload
from bench.workload import MODELS, Workload, run_python

ROOT = Path(__file__).parents[1]
BATCH_SIZE = 10
LOOP = "packed loop by hand"
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Environment variables that make glibc keep freed memory, as the allocators do that PyTorch recommends for CPUs."""
CONTENDERS = (
    "Trainer, padded",
    "Trainer, length-grouped",
    LOOP,
    f"{LOOP}, memory kept",
    "Tutti",
    "Tutti, compiled",
)


@dataclass(frozen=True)
class Setup:
    """A round: the model's name, the compute dtype, micro batches per step, tokens per packed micro batch (slots), and
    the steps of Tutti that are not timed."""

    model: str
    dtype: str
    accumulation: int
    slots: int
    warmup_steps: int


@dataclass(frozen=True)
class Result:
    """One contender in one round: trained tokens per second of wall time and of core time, and peak memory."""

    tokens_per_second: float
    tokens_per_core_second: float
    memory_gib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen3", help="the model to train (qwen3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="compute dtype (the faster one here)")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds (3, quick: 1)")
    parser.add_argument("--steps", type=int, default=None, help="timed optimizer steps per round (8, quick: 4)")
    parser.add_argument("--warmup-steps", type=int, default=4, help="steps of Tutti that are not timed (4)")
    parser.add_argument("--accumulation", type=int, default=2, help="micro batches per step (2)")
    parser.add_argument("--slots", type=int, default=2048, help="tokens per packed micro batch (2048)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (2)")
    parser.add_argument("--only", default="", help="comma-separated names of contenders, or parts of names")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    steps = options.steps or (4 if options.quick else 8)
    wanted = [part.strip().lower() for part in options.only.split(",")]
    contenders = [name for name in CONTENDERS if any(_means(part, name.lower()) for part in wanted)]
    os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    results: dict[str, list[tuple[Result, float]]] = {name: [] for name in contenders}
    rates = []
    dtype = options.dtype or workload.faster_dtype()
    setup = Setup(options.model, dtype, options.accumulation, options.slots, options.warmup_steps)
    for number in range(rounds):
        batches = setup.accumulation * max(1, setup.slots // 2048)
        work = workload.make_workload(steps * batches, BATCH_SIZE, setup.warmup_steps * BATCH_SIZE * batches, number)
        for name in contenders:
            rates.append(_matrix_rate(dtype))
            found = _run(name, work, setup)
            operations = workload.flops_per_token(work.measured, MODELS[setup.model])
            operations *= work.tokens / (work.tokens - len(work.measured))
            results[name].append((found, found.tokens_per_second * operations / rates[-1]))
            said = f"round {number + 1}/{rounds}  {name:24} {found.tokens_per_second:8.1f} tokens/s"
            print(said, file=sys.stderr, flush=True)
    print(_table(results))
    low, middle, high = (rate / 1e9 for rate in (min(rates), statistics.median(rates), max(rates)))
    print(f"\n{dtype} matrix rate: median {middle:.0f} GFLOP/s, between {low:.0f} and {high:.0f} during the run")
    print(f"{setup.model}: {rounds} rounds of {steps} timed steps, {options.threads} threads")


def _means(part: str, name: str) -> bool:
    """True if `part` is `name`, or is contained in it and is not the full name of a contender."""
    return part == name or (part in name and part not in map(str.lower, CONTENDERS))


def _run(name: str, work: Workload, setup: Setup) -> Result:
    """Run one contender on `work`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        workload.write_model(folder, MODELS[setup.model])
        if name.startswith(LOOP):
            return _run_peer(folder, work, setup, "bench._loop", str(folder), **(KEEPING if name != LOOP else {}))
        if name.startswith("Trainer"):
            mode = "grouped" if "grouped" in name else "padded"
            return _run_peer(folder, work, setup, "bench._trainer", str(folder), mode)
        return _run_tutti(folder, work, setup, compile="compiled" in name)


def _run_peer(folder: Path, work: Workload, setup: Setup, *command: str, **environment: str) -> Result:
    plan = {
        "warmup": work.warmup,
        "measured": work.measured,
        "batch_size": BATCH_SIZE,
        "accumulation": setup.accumulation,
        "compute_dtype": setup.dtype,
        "slots": setup.slots,
    }
    (folder / "workload.json").write_text(json.dumps(plan))
    result = json.loads(run_python("-m", *command, **environment).splitlines()[-1])
    trained = result["trained_tokens"]
    return Result(trained / result["seconds"], trained / result["cores"], result["memory_gib"])


def _run_tutti(folder: Path, work: Workload, setup: Setup, *, compile: bool) -> Result:
    workload.write_text(folder / "rows.jsonl", work.warmup + work.measured)
    arguments = {
        "model.config_path": folder,
        "data.train_path": folder / "rows.jsonl",
        "data.data_type": "plaintext",
        "data.max_seq_len": workload.MAX_LENGTH,
        "data.num_workers": 0,
        "data.shuffle": False,
        "data.drop_last": False,
        "train.output_dir": folder / "run",
        "train.dyn_bsz": True,
        "train.micro_batch_size": setup.slots // workload.MAX_LENGTH,
        "train.global_batch_size": setup.accumulation * setup.slots // workload.MAX_LENGTH,
        "train.compute_dtype": setup.dtype,
        "train.lr": 1e-4,
        "train.lr_decay_style": "linear",
        "train.enable_gradient_checkpointing": False,
        "train.enable_compile": compile,
        "train.save_epochs": 0,
        "train.save_hf_weights": False,
    }
    given = (f"{name}={value}" for name, value in arguments.items())
    run_python("-m", "bench._tutti", "train", *given, BENCH_CORES=str(folder / "cores.json"))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "step_seconds" in line and line["step"] > setup.warmup_steps]
    shutil.rmtree(folder / "run")
    trained = sum(line["trained_tokens"] for line in timed)
    ends = json.loads((folder / "cores.json").read_text())
    return Result(
        trained / sum(line["step_seconds"] for line in timed),
        trained / (ends[-1] - ends[setup.warmup_steps - 1]),
        max(line["memory_gib"] for line in timed),
    )


def _matrix_rate(dtype: str) -> float:
    return float(run_python("-c", f"from bench.workload import matrix_rate; print(matrix_rate({dtype!r}))"))


def _table(results: dict[str, list[tuple[Result, float]]]) -> str:
    """A Markdown table of medians over the rounds. Each entry is a result and its fraction of the matrix rate."""
    baselines = [name for name in results if not name.startswith("Tutti")]
    ratios = [f"relative to {name}" for name in baselines]
    header = ["", "trained tokens/s", "of matrix rate", *ratios, "tokens per core second", "peak memory, GiB"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, rounds in results.items():
        speeds = [
            statistics.median(
                mine.tokens_per_second / other.tokens_per_second
                for (mine, _), (other, _) in zip(rounds, results[baseline], strict=True)
            )
            for baseline in baselines
        ]
        rows.append(
            [
                name,
                f"{statistics.median(result.tokens_per_second for result, _ in rounds):.0f}",
                f"{statistics.median(share for _, share in rounds):.0%}",
                *(f"{ratio:.2f}" for ratio in speeds),
                f"{statistics.median(result.tokens_per_core_second for result, _ in rounds):.0f}",
                f"{statistics.median(result.memory_gib for result, _ in rounds):.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
