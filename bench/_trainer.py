"""transformers' Trainer on the samples of the speed benchmark: `python -m bench._trainer FOLDER MODE`.

FOLDER holds config.json and workload.json, written by bench.speed. Weights are fp32, with autocast for bf16, and
samples are padded to the longest of their batch. With MODE `grouped` they stay in the length-grouped micro batches of
the workload, with `padded` they are shuffled. Prints JSON: trained tokens, wall and core seconds of the timed steps,
and peak memory.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tutti.core.device import memory_gib

IGNORE = -100


class Timer(TrainerCallback):
    """Wall and core seconds from the end of step `after` to the end of the last step."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.start = self.end = self.start_cores = self.end_cores = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end, self.end_cores = time.perf_counter(), time.process_time()
        if state.global_step == self.after:
            self.start, self.start_cores = self.end, self.end_cores


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad to the longest row."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    return {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        for name, fill in batch.items()
    }


def training_arguments(folder: Path, batch_size: int, accumulation: int, **options: Any) -> TrainingArguments:
    """The training arguments that all benchmarks share."""
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=not torch.accelerator.is_available(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        num_train_epochs=1,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=1_000_000,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )


def main(folder: Path, mode: str) -> None:
    plan = json.loads((folder / "workload.json").read_text())
    measured = plan["measured"]
    if mode == "padded":
        random.Random(0).shuffle(measured)
    samples = plan["warmup"][: plan["batch_size"] * plan["accumulation"]] + measured
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in samples]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    timer = Timer(after=1)
    arguments = training_arguments(
        folder,
        plan["batch_size"],
        plan["accumulation"],
        bf16=plan["compute_dtype"] == "bfloat16",
        gradient_checkpointing=plan.get("gradient_checkpointing", False),
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[timer]).train()
    trained = sum(len(ids) - 1 for ids in measured)
    peak = memory_gib(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    seconds, cores = timer.end - timer.start, timer.end_cores - timer.start_cores
    print(json.dumps({"trained_tokens": trained, "seconds": seconds, "cores": cores, "memory_gib": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
