"""Runs on the simulated accelerator (`tests.accelerator`) equal the same runs on the CPU."""

import pytest

from tests.harness import regroup, run_ranks
from tests.model.zoo import tiny
from tests.train.runs import records, tiny_config, train_quietly, write_pairs

LOG = {"train/step.py reduce", "train/step.py reduce_sums", "train/step.py <dictcomp>", "model/experts.py take"}
"""The functions that read the values of a metrics line."""

SAVE = {"train/spike_guard.py state_dict", "train/step.py state_dict", "checkpoint/state.py require_finite"}
"""The functions that read a run's state, besides the copies of its tensors."""

ALONE = {
    "fused attention": {"train.compute_dtype": "bfloat16", "train.enable_gradient_checkpointing": True},
    "experts": {
        "model": "qwen3_moe",
        "train.compute_dtype": "bfloat16",
        "train.enable_gradient_checkpointing": True,
    },
    "offloaded activations": {"train.enable_activation_offload": True},
    "checkpoints": {"train.save_steps": 2, "train.save_async": True},
    "muon": {"train.optimizer": "muon"},
    "state in bf16": {"train.optimizer": "anyprecision_adamw", "train.enable_mixed_precision": False},
    "state in 8 bits": {"train.optimizer": "adamw_8bit"},
    "pairs, compared on the fly": {"data.data_type": "dpo", "train.dpo_reference": "on_the_fly"},
}
"""Runs on one rank, in which the host waits for the device only for metrics and saves."""

SHARDED = {"train.data_parallel_mode": "fsdp2"}
TOGETHER = {
    "offloaded parameters": SHARDED | {"train.enable_fsdp_offload": True},
    "offloaded state in 8 bits, built there": SHARDED
    | {"train.enable_fsdp_offload": True, "train.optimizer": "adamw_8bit", "train.init_device": "cuda"},
    "ulysses": SHARDED | {"train.ulysses_parallel_size": 2, "train.compute_dtype": "bfloat16"},
    "ring": SHARDED | {"train.context_parallel_size": 2, "train.compute_dtype": "bfloat16"},
}


def config_of(folder, world, changes):
    model = folder / "config"
    special = {"vocab_size": 2048, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    kept = {name: value for name, value in changes.items() if name != "model"}
    if changes.get("data.data_type") == "dpo":
        folder.mkdir(exist_ok=True)
        kept["data.train_path"] = write_pairs(folder / "pairs.jsonl", 24, 400)
        kept["data.max_seq_len"] = 256
    if not model.exists():
        # Tensors of ours are no longer tied once they are moved, as those of devices are.
        tiny(changes.get("model", "qwen3"), tie_word_embeddings=False, **special).save_pretrained(model)
    return tiny_config(
        folder, world=world, **{"model.config_path": str(model), "train.max_steps": 2, "train.lr": 1e-3} | kept
    )


def losses(config):
    train_quietly(config)
    return [(line["loss"], line["grad_norm"]) for line in records(config)]


def on_cpu(folder, cases):
    """The losses of each case on one rank, with what divides it over ranks left out."""
    found = {}
    for name, changes in cases.items():
        regroup()
        axes = [key for key in changes if key.endswith("_parallel_size") or key == "train.enable_fsdp_offload"]
        found[name] = losses(config_of(folder / f"cpu {name}", 1, changes | dict.fromkeys(axes)))
    return found


def on_accelerator(folder, cases, world):
    """The losses of each case there, and the functions for which the host waited."""
    from tests.accelerator import pretend_accelerator, waits

    pretend_accelerator()
    found = {}
    for name, changes in cases.items():
        regroup()
        waits.clear()
        found[name] = losses(config_of(folder / name, world, changes)), set(waits)
    return found


def assert_close(got, want, changes):
    tolerance = 1e-2 if changes.get("train.compute_dtype") == "bfloat16" else 1e-5
    assert got == [pytest.approx(step, rel=tolerance) for step in want]


def test_one_rank_equals_the_cpu_and_does_not_wait(tmp_path):
    (expected,) = run_ranks(1, on_cpu, tmp_path, ALONE)
    (found,) = run_ranks(1, on_accelerator, tmp_path, ALONE, 1)
    for name, (got, waited) in found.items():
        assert_close(got, expected[name], ALONE[name])
        saves = SAVE | {"checkpoint/dcp.py copy_to_host"} if "train.save_steps" in ALONE[name] else set()
        assert waited <= LOG | saves, name


def test_two_ranks_equal_the_cpu(tmp_path):
    (expected,) = run_ranks(1, on_cpu, tmp_path, TOGETHER)
    found, _ = run_ranks(2, on_accelerator, tmp_path, TOGETHER, 2)
    for name, (got, _) in found.items():
        assert_close(got, expected[name], TOGETHER[name])
