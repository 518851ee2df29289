"""Every path of training on an accelerator equals the same run on the CPU, in fp32.

Skipped where there is no accelerator. `python -m tests.train.test_gpu FOLDER` trains all cases on whatever device there
is and writes the losses of each to FOLDER/NAME.json; one such process, to which no accelerator is visible, works beside
the tests.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from tests.infer.models import infer_config
from tests.model.zoo import tiny
from tests.train.runs import records, tiny_config, write_pairs
from tutti.core.dist import World
from tutti.infer.generate import Generator
from tutti.infer.load import load_model
from tutti.infer.prompts import prompt_request
from tutti.infer.sampling import Sampler
from tutti.train.run import train

needs_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")

SPARSE = {"native_sparse": {"block": 4, "stride": 2, "selected_block": 8, "selected": 3, "window": 8}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "varlen": ("qwen3", {}, {}),
    "flash-or-instead": ("qwen3", {}, {"model.attn_implementation": "flash_attention_2"}),
    "eager": ("qwen3", {}, {"model.attn_implementation": "eager"}),
    "native-sparse": ("qwen3", SPARSE, {"model.attn_implementation": "native-sparse"}),
    "sliding-window": ("mistral", {}, {}),
    "softcap": ("gemma2", {}, {"train.lr": 1e-3}),
    "sinks": ("gpt_oss", {}, {}),
    "wide-keys": ("deepseek_v3", {}, {}),
    "experts": ("qwen3_moe", {}, {}),
    "experts-eager": ("qwen3_moe", {}, {"model.moe_implementation": "eager"}),
    "compiled": ("qwen3", {}, {"train.enable_compile": True}),
    "compiled-experts": ("qwen3_moe", {}, {"train.enable_compile": True, "train.enable_gradient_checkpointing": True}),
    "checkpointed": ("qwen3", {}, {"train.enable_gradient_checkpointing": True}),
    "checkpointed-again": (
        "qwen3",
        {},
        {"train.enable_gradient_checkpointing": True, "train.enable_reentrant": False},
    ),
    "offloaded-activations": ("qwen3", {}, {"train.enable_activation_offload": True}),
    "fsdp2": ("qwen3", {}, {"train.data_parallel_mode": "fsdp2"}),
    "offloaded-parameters": ("qwen3", {}, {"train.data_parallel_mode": "fsdp2", "train.enable_fsdp_offload": True}),
    "fsdp1": ("qwen3", {}, {"train.data_parallel_mode": "fsdp1"}),
    "deterministic": ("qwen3", {}, {"train.enable_full_determinism": True}),
    "batch-invariant": ("qwen3", {}, {"train.enable_batch_invariant_mode": True}),
    "anyprecision": ("qwen3", {}, {"train.optimizer": "anyprecision_adamw"}),
    "built-there": ("qwen3", {}, {"train.init_device": "cuda"}),
    "padded": ("qwen3", {}, {"train.pad_to_length": True}),
    "lora": ("qwen3", {}, {"train.architecture": "lora"}),
    "lora-on-4-bits": ("qwen3", {}, {"train.architecture": "lora", "train.lora_base_dtype": "nf4"}),
    "dpo": ("qwen3", {}, {"data.data_type": "dpo", "train.lr": 1e-3}),
    "checkpoints": ("qwen3", {}, {"train.save_steps": 2, "train.save_async": True}),
}
"""Family, changes of its config, and of the run's."""


def case_config(folder: Path, name: str) -> Any:
    family, of_model, of_run = CASES[name]
    model = folder / name / "config"
    model.mkdir(parents=True)
    special = {"vocab_size": 2048, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    tiny(family, **special | of_model).save_pretrained(model)
    changes: dict[str, Any] = {"model.config_path": str(model), "train.global_batch_size": 4} | of_run
    if changes.get("data.data_type") == "dpo":
        changes["data.train_path"] = write_pairs(folder / name / "pairs.jsonl", 32, longest=200)
    if changes.get(
        "train.lora_base_dtype"
    ):  # of a base that is equal to the last bit, as a number may round up or down
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny(family, **special | of_model)).save_pretrained(folder / name / "base")
        changes |= {"model.model_path": str(folder / name / "base"), "model.config_path": None}
    return tiny_config(folder / name, **changes)


def losses(folder: Path, name: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of one case."""
    logging.disable(logging.INFO)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    config = case_config(folder, name)
    train(config)
    return [(line["loss"], line["grad_norm"]) for line in records(config)]


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory) -> Iterator[Callable[[str], Any]]:
    """The losses of a case on the CPU, which the first of the test processes starts a process for."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if parallel else base) / "on_cpu"
    process = None
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
            process = subprocess.Popen([sys.executable, "-m", __spec__.name, str(folder)], env=environment)

    def expected(name: str) -> Any:
        end = time.monotonic() + 300
        while not (folder / f"{name}.json").exists():
            assert time.monotonic() < end and not (process and process.poll()), "the CPU has not come to this case"
            time.sleep(0.1)
        return json.loads((folder / f"{name}.json").read_text())

    yield expected
    if process:
        process.wait()


@needs_accelerator
@pytest.mark.parametrize("name", CASES)
def test_a_run_equals_that_on_the_cpu(tmp_path, on_cpu, name):
    found = losses(tmp_path, name)
    expected = on_cpu(name)
    if isinstance(expected, str):
        pytest.skip(f"the CPU says: {expected}")
    for step, (got, want) in enumerate(zip(found, expected, strict=True), start=1):
        assert got == pytest.approx(want, rel=1e-4), f"loss and gradient norm at step {step}"


@needs_accelerator
def test_a_run_in_bf16_stays_close(tmp_path):
    config = tiny_config(tmp_path, **{"train.compute_dtype": "bfloat16", "train.global_batch_size": 4})
    train(config)
    fp32 = tiny_config(tmp_path / "fp32", **{"train.global_batch_size": 4})
    train(fp32)
    for got, want in zip(records(config), records(fp32), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=2e-2)


@needs_accelerator
def test_determinism_is_bit_equal(tmp_path):
    first, again = (losses(tmp_path / place, "deterministic") for place in ("first", "again"))
    assert first == again


@needs_accelerator
def test_generation_with_a_cache_is_what_the_cpu_generates(tmp_path):
    config = tiny_config(tmp_path, **{"train.save_hf_weights": True})
    train(config)
    made = {}
    for device in ("cpu", torch.accelerator.current_accelerator().type):
        world = World(rank=0, size=1, local_rank=0, device=torch.device(device))
        asked = infer_config(str(Path(config.train.output_dir) / "hf" / "final"), do_sample=False)
        loaded = load_model(asked, world)
        generator = Generator(loaded.logits, Sampler.of(asked.infer), loaded.stop_ids, world, 10_000)
        requests = [prompt_request(loaded.form, text, number, 12) for number, text in enumerate(("Hello", "Where is"))]
        made[device] = [(token.number, token.id) for token in generator.stream(requests)]
    first, second = made.values()
    assert sorted(first) == sorted(second)


def _write(folder: Path) -> None:
    """Write the losses of all cases, or why one cannot run here."""
    from torch.distributed import is_initialized

    from tutti.core.dist import shutdown_world

    for name in CASES:
        found: Any
        try:
            found = losses(folder, name)
        except ValueError as error:
            found = str(error)
        if is_initialized():
            shutdown_world()
        written = folder / f"{name}.part"
        written.write_text(json.dumps(found))
        written.rename(folder / f"{name}.json")


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
