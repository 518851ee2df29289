"""Peak memory on a CPU: the prediction of `tutti check` against the measurement of the operating system.

`python -m bench.peak [CASE ...]`. The models are the quickstart's and one with 64 experts and 27 million parameters, on
batches of 4,096 tokens. Each case is predicted in one process and trained for a few steps of full micro batches in
another. The measured peak is compared with the sum of two predictions: the memory of the program before there is a
model, and the peak of the tensors of a step.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import workload

ROOT = Path(__file__).parents[1]
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 2_048,
    "tie_word_embeddings": True,
}
FREED = {"train.enable_gradient_checkpointing": True}
LONG = {"data.max_seq_len": 512, "train.micro_batch_size": 8, "train.global_batch_size": 16}
BF16 = {"train.compute_dtype": "bfloat16"}
LORA = {"train.architecture": "lora"}
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "quickstart": (None, {}),
    "experts": (MOE, LONG),
    "quickstart, 4,096 tokens": (None, LONG),
    "experts, checkpointing": (MOE, FREED | LONG),
    "quickstart, bf16": (None, BF16),
    "experts, bf16": (MOE, BF16 | LONG),
    "LoRA": (None, LORA | LONG),
    "LoRA, bf16, checkpointing": (None, LORA | BF16 | FREED | LONG),
}
"""A model's config (the quickstart's if None) and arguments, by name."""


PREDICTED = re.compile(r"on this CPU ([\d.]+) (GiB|MiB) resident, of which ([\d.]+) (GiB|MiB)")
UNITS = {"MiB": 2**20, "GiB": 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of: {'; '.join(CASES)}")
    names = parser.parse_args().cases or list(CASES)
    print("| run | predicted | of which the program | measured | ratio |\n| --- | --- | --- | --- | --- |")
    for name in names:
        program, tensors, measured = compare(*CASES[name])
        total = program + tensors
        mib = [f"{size / 2**20:,.0f} MiB" for size in (total, program, measured)]
        print(f"| {name} | {' | '.join(mib)} | {total / measured:.3f} |", flush=True)


def compare(model: dict[str, Any] | None, arguments: dict[str, Any]) -> tuple[int, int, int]:
    """Predicted bytes of the program and of a step's tensors, and the measured peak."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        values: dict[str, Any] = {
            "train.output_dir": folder / "out",
            "train.max_steps": 3,
            "train.num_train_epochs": 1,
            "train.compute_dtype": "float32",
            "train.eval_epochs": 0,
            "train.save_epochs": 0,
            "train.save_hf_weights": False,
            "train.sample_prompts_path": "null",
            "data.eval_path": "null",
            "data.num_workers": 0,
        }
        if model is not None:
            workload.write_model(folder, model)
            values["model.config_path"] = folder
        command = [f"{name}={value}" for name, value in (values | arguments).items()]
        tutti = [sys.executable, "-m", "tutti"]
        with ThreadPoolExecutor() as both:
            checked = both.submit(_run, [*tutti, "check", "configs/quickstart.yaml", *command])
            _, measured = _run([*tutti, "train", "configs/quickstart.yaml", *command])
            said, _ = checked.result()
    found = PREDICTED.search(" ".join(said.split()))
    assert found is not None, said
    total, program = (float(found[at]) * UNITS[found[at + 1]] for at in (1, 3))
    return int(program), int(total - program), measured


def _run(command: list[str]) -> tuple[str, int]:
    """The output of a process, and its peak resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{said[-4000:]}")
    return said, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
