"""The memory cost of a vocabulary of 152,000: peak memory of a packed batch of 16,384 tokens, with and without head.

`python -m bench.memory [--quick]` runs `tutti train` twice on the same text, each in its own process, whose peak
resident memory the operating system reports. The first is a language model, whose head scores every token against the
vocabulary; the second is a two-class classifier with the same backbone, which has no such head. Full fp32 logits and
their gradient would take 18.6 GiB. The reported difference includes the head's weight, gradient and optimizer state.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench import workload

ROOT = Path(__file__).parents[1]
VOCABULARY = 152_000
MODEL: dict[str, Any] = workload.MODEL | {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4,096 tokens instead of 16,384")
    options = parser.parse_args()
    tokens = 4_096 if options.quick else 16_384
    os.environ.update(OMP_NUM_THREADS="2", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        workload.write_model(folder, MODEL)
        _write_rows(folder / "rows.jsonl", tokens)
        headless = _peak_gib(folder, "classification", tokens)
        full = _peak_gib(folder, "plaintext", tokens)
    print(f"packed batch of {tokens:,} tokens, vocabulary {VOCABULARY:,}, peak resident memory of one step:\n")
    print(f"| without a head | {headless:.2f} GiB |\n| with the head and its loss | {full:.2f} GiB |")
    print(f"| difference | {full - headless:.2f} GiB |")


def _write_rows(path: Path, tokens: int) -> None:
    """Write texts of up to 1,024 words that fill two batches of `tokens`, with labels for the classifier."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(2 * tokens // workload.MAX_LENGTH):
            words = rng.integers(1, VOCABULARY, workload.MAX_LENGTH - 1)
            text = " ".join(f"w{word}" for word in words)
            file.write(json.dumps({"content_split": text, "text": text, "label": int(rng.integers(2))}) + "\n")


def _peak_gib(folder: Path, data_type: str, tokens: int) -> float:
    """Peak resident memory of a `tutti train` run of one step, in GiB."""
    arguments = {
        "model.config_path": folder,
        "data.train_path": folder / "rows.jsonl",
        "data.data_type": data_type,
        "data.max_seq_len": workload.MAX_LENGTH,
        "data.num_workers": 0,
        "train.output_dir": folder / data_type,
        "train.dyn_bsz": True,
        "train.micro_batch_size": tokens // workload.MAX_LENGTH,
        "train.max_steps": 1,
        "train.init_device": "cpu",
        "train.enable_gradient_checkpointing": False,
        "train.save_epochs": 0,
        "train.save_hf_weights": False,
    }
    if data_type == "classification":
        arguments["model.num_labels"] = 2
    command = [sys.executable, "-m", "tutti", "train", *(f"{name}={value}" for name, value in arguments.items())]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{data_type} failed:\n{output.read()[-4000:]}")
    return usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    main()
