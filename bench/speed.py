"""Trained tokens a second: transformers' Trainer, padded and length-grouped, and a packed loop, against Tutti.

`make bench`.

Each contender trains the same 60M-parameter model on the same ragged samples (bench.workload says which) in a process
of its own with the same two threads: fp32 weights, computed with in the faster of bf16 and fp32, AdamW, no gradient
checkpointing, the same number of micro batches a step and as near as possible the same tokens in them. Warm-up steps
are not timed. Rounds are interleaved (Trainer, Tutti, Trainer, Tutti ...), so that a machine that slows down does so
for all, and each round measures the machine's own rate of matrix products in that dtype. Reported are medians over the
rounds: trained tokens a second, the ratio to each other contender within a round, the share of the matrix rate that the
model's operations reach, and the peak of resident memory.
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
from bench.workload import Workload, run_python

ROOT = Path(__file__).parents[1]
BATCH_SIZE, ACCUMULATION = 10, 2
MICRO_BATCH_SLOTS = 2 * workload.MAX_LENGTH
WARMUP_STEPS = 4
LOOP = "packed loop by hand"
CONTENDERS = ("Trainer, padded", "Trainer, length-grouped", LOOP, "Tutti", "Tutti, compiled")


@dataclass(frozen=True)
class Result:
    """One contender in one round: trained tokens a second, its share of the matrix rate measured beside it, and its
    peak of memory."""

    tokens_per_second: float
    share: float
    memory_gib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds (3, quick: 1)")
    parser.add_argument("--steps", type=int, default=None, help="timed optimizer steps a round (8, quick: 4)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (2)")
    parser.add_argument("--only", default="", help="comma list of parts of contenders' names")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    steps = options.steps or (4 if options.quick else 8)
    wanted = [part.strip().lower() for part in options.only.split(",")]
    contenders = [name for name in CONTENDERS if any(part in name.lower() for part in wanted)]
    os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    rates = []
    dtype = workload.faster_dtype()
    for number in range(rounds):
        work = workload.make_workload(
            steps * ACCUMULATION, BATCH_SIZE, WARMUP_STEPS * BATCH_SIZE * ACCUMULATION, seed=number
        )
        for name in contenders:
            rates.append(_matrix_rate(dtype))
            speed, memory = _run(name, work, dtype)
            operations = workload.flops_per_token(work.measured) * work.tokens / (work.tokens - len(work.measured))
            results[name].append(Result(speed, speed * operations / rates[-1], memory))
            said = f"round {number + 1}/{rounds}  {name:24} {speed:8.1f} tokens/s {memory:6.2f} GiB"
            print(said, file=sys.stderr, flush=True)
    print(_table(results))
    low, middle, high = (rate / 1e9 for rate in (min(rates), statistics.median(rates), max(rates)))
    print(f"\n{dtype} matrix rate: median {middle:.0f} GFLOP/s, from {low:.0f} to {high:.0f} over the run")
    print(f"{rounds} rounds of {steps} timed steps, {options.threads} threads")


def _run(name: str, work: Workload, dtype: str) -> tuple[float, float]:
    """Trained tokens a second of one contender on `work`, computing in `dtype`, and its peak of memory in GiB."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        workload.write_model(folder)
        if name == LOOP:
            return _run_peer(folder, work, dtype, "bench._loop", str(folder))
        if name.startswith("Trainer"):
            mode = "grouped" if "grouped" in name else "padded"
            return _run_peer(folder, work, dtype, "bench._trainer", str(folder), mode)
        return _run_tutti(folder, work, dtype, compile="compiled" in name)


def _run_peer(folder: Path, work: Workload, dtype: str, *command: str) -> tuple[float, float]:
    plan = {
        "warmup": work.warmup,
        "measured": work.measured,
        "batch_size": BATCH_SIZE,
        "accumulation": ACCUMULATION,
        "compute_dtype": dtype,
        "slots": MICRO_BATCH_SLOTS,
    }
    (folder / "workload.json").write_text(json.dumps(plan))
    result = json.loads(run_python("-m", *command).splitlines()[-1])
    return result["trained_tokens"] / result["seconds"], result["memory_gib"]


def _run_tutti(folder: Path, work: Workload, dtype: str, *, compile: bool) -> tuple[float, float]:
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
        "train.micro_batch_size": MICRO_BATCH_SLOTS // workload.MAX_LENGTH,
        "train.global_batch_size": ACCUMULATION * MICRO_BATCH_SLOTS // workload.MAX_LENGTH,
        "train.compute_dtype": dtype,
        "train.lr": 1e-4,
        "train.lr_decay_style": "linear",
        "train.enable_gradient_checkpointing": False,
        "train.enable_compile": compile,
        "train.save_epochs": 0,
        "train.save_hf_weights": False,
    }
    run_python("-m", "tutti", "train", *(f"{name}={value}" for name, value in arguments.items()))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "step_seconds" in line and line["step"] > WARMUP_STEPS]
    shutil.rmtree(folder / "run")
    speed = sum(line["trained_tokens"] for line in timed) / sum(line["step_seconds"] for line in timed)
    return speed, max(line["memory_gib"] for line in timed)


def _matrix_rate(dtype: str) -> float:
    return float(run_python("-c", f"from bench.workload import matrix_rate; print(matrix_rate({dtype!r}))"))


def _table(results: dict[str, list[Result]]) -> str:
    """A Markdown table of medians over the rounds."""
    baselines = [name for name in results if not name.startswith("Tutti")]
    header = ["", "trained tokens/s", "of matrix rate", "peak memory, GiB", *(f"to {name}" for name in baselines)]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, rounds in results.items():
        ratios = [
            statistics.median(
                mine.tokens_per_second / other.tokens_per_second
                for mine, other in zip(rounds, results[baseline], strict=True)
            )
            for baseline in baselines
        ]
        speed = statistics.median(result.tokens_per_second for result in rounds)
        share = statistics.median(result.share for result in rounds)
        memory = statistics.median(result.memory_gib for result in rounds)
        rows.append([name, f"{speed:.0f}", f"{share:.0%}", f"{memory:.2f}", *(f"{ratio:.2f}" for ratio in ratios)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
