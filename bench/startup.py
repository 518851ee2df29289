"""Seconds from the start of the process to the first loss of a tiny job: transformers' Trainer against Tutti.

`python -m bench.startup [--rounds 5]`. Both build a one-layer model from the same config.json, read and tokenize the
same forty rows, and train. The time runs from the start of the process until the first loss is on disk. The first round
only warms the disk cache. Rounds are interleaved. Reports medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import workload

ROOT = Path(__file__).parents[1]
TINY = workload.MODEL | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
ROWS, LENGTH = 40, 32
PATIENCE = 120.0

_TRAINER = """
import json, sys
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers import Trainer, TrainerCallback, TrainingArguments

folder = Path(sys.argv[1])

class FirstLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            (folder / "run" / "metrics.jsonl").write_text(json.dumps(logs) + chr(10))

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
texts = [json.loads(line)["content_split"] for line in (folder / "rows.jsonl").read_text().splitlines()]
rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
arguments = TrainingArguments(
    output_dir=str(folder / "run"), per_device_train_batch_size=8, max_steps=2, logging_steps=1,
    bf16=sys.argv[2] == "bfloat16", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    dataloader_pin_memory=False,
)
(folder / "run").mkdir(exist_ok=True)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[FirstLoss()]).train()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    seconds: dict[str, list[float]] = {"Trainer": [], "Tutti": []}
    dtype = workload.faster_dtype()
    for number in range(options.rounds + 1):
        for name, times in seconds.items():
            taken = _first_loss(name, dtype)
            if number:
                times.append(taken)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    print("| | seconds to the first loss | from | to |\n| --- | ---: | ---: | ---: |")
    for name, times in seconds.items():
        print(f"| {name} | {middle[name]:.2f} | {min(times):.2f} | {max(times):.2f} |")
    print(f"\nTutti / Trainer: {middle['Tutti'] / middle['Trainer']:.2f}; {options.rounds} rounds")


def _first_loss(name: str, dtype: str) -> float:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        workload.write_model(folder, TINY)
        samples = [[1 + (row * 7 + token) % 500 for token in range(LENGTH)] for row in range(ROWS)]
        workload.write_text(folder / "rows.jsonl", samples)
        command = ["-c", _TRAINER, str(folder), dtype] if name == "Trainer" else _tutti(folder, dtype)
        return _wait_for_line(command, folder / "run" / "metrics.jsonl")


def _tutti(folder: Path, dtype: str) -> list[str]:
    arguments = {
        "model.config_path": folder,
        "data.train_path": folder / "rows.jsonl",
        "data.data_type": "plaintext",
        "data.max_seq_len": LENGTH,
        "data.num_workers": 0,
        "train.compute_dtype": dtype,
        "train.micro_batch_size": 8,
        "train.max_steps": 2,
        "train.output_dir": folder / "run",
        "train.init_device": "cpu",
        "train.save_epochs": 0,
        "train.save_hf_weights": False,
    }
    return ["-m", "tutti", "train", *(f"{name}={value}" for name, value in arguments.items())]


def _wait_for_line(command: list[str], path: Path) -> float:
    """Seconds from starting `python COMMAND` until `path` has a complete line with a loss; the process is then
    killed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output)
        try:
            while not _has_loss(path):
                if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                    if _has_loss(path):
                        break
                    output.seek(0)
                    sys.exit(f"no loss from {command[:3]}:\n{output.read()[-4000:]}")
                time.sleep(0.005)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def _has_loss(path: Path) -> bool:
    return path.exists() and any("loss" in json.loads(line) for line in path.read_text().split("\n")[:-1])


if __name__ == "__main__":
    main()
