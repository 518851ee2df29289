"""Runs that train adapters on a base in 8 or 4 bits: equal on every layout, exact resume, and merging."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.train.adapted import export_quietly, lora_config, open_merged, write_bases
from tests.train.runs import records, run
from tests.train.test_run import HYBRID, REMAT, assert_same_training, train_until
from tutti.checkpoint.dcp import read_index
from tutti.config import ConfigError
from tutti.config.load import from_dict

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def make(bases, tmp_path):
    def config(name="run", base="dense", world=1, **train):
        defaults = {"lora_base_dtype": "nf4", "max_steps": 3}
        return lora_config(tmp_path / name, bases / base, world, **(defaults | train))

    return config


@pytest.fixture(scope="module")
def references():
    return {}


SHARDED = {"data_parallel_mode": "fsdp2", "broadcast_model_weights_from_rank0": False}

LAYOUTS = {
    "remat-built-on-cpu": ("dense", "nf4", 1, REMAT | {"init_device": "cpu"}),
    "ddp-dora": ("dense", "nf4", 2, {"data_parallel_mode": "ddp"}),
    "zero3-remat": ("dense", "int8", 2, REMAT | SHARDED),
    "hybrid": ("dense", "nf4", 4, HYBRID),
    "fsdp1-offload": ("dense", "int8", 2, {"data_parallel_mode": "fsdp1", "enable_fsdp_offload": True}),
    "experts-zero3": ("moe", "nf4", 2, REMAT | SHARDED),
    "pipeline-dora": ("dense", "nf4", 2, {"pipeline_parallel_size": 2}),
    "zero-bubble": ("dense", "int8", 2, {"pipeline_parallel_size": 2, "pipeline_schedule": "zero_bubble"}),
    "divided-experts": ("moe", "nf4", 2, SHARDED | {"expert_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(make, references, layout):
    base, kind, world, train = LAYOUTS[layout]
    common = {"lora_base_dtype": kind, "lora_dora": "dora" in layout}
    reference = (base, *common.values())
    if reference not in references:
        references[reference] = lines = run(make("reference", base, **common))
        assert lines[-1]["loss"] < lines[0]["loss"]
    assert_same_training(run(make("other", base, world, **common, **train), world), references[reference])


def test_resume_is_bit_equal_and_another_precision_is_another_base(make):
    changes = {"world": 2, "data_parallel_mode": "fsdp2", "save_steps": 2, "enable_full_determinism": True}
    expected = run(make("whole", **changes), 2)
    run_ranks(2, train_until, make("half", **changes), 2)
    resumed = run(make("half", **changes, load_checkpoint_path="auto"), 2)
    for ours, theirs in zip(resumed, expected, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"]), f"step {ours['step']}"
    checkpoint = Path(make("half", **changes).train.output_dir) / "checkpoints" / "global_step_2"
    assert not [name for name in read_index(checkpoint).state_dict_metadata if "_lora_" not in name]
    with pytest.raises(AssertionError, match=r"another base model .*train\.lora_base_dtype"):
        run(make("half", save_steps=2, lora_base_dtype="int8", load_checkpoint_path="auto"))


def test_adapter_is_exported_and_merged_into_the_weights_as_they_were(make, tmp_path):
    config = make(save_hf_weights=True, save_epochs=1, lora_dora=True, world=2, data_parallel_mode="fsdp2")
    run(config, 2)
    output = Path(config.train.output_dir)
    run_ranks(1, export_quietly, str(output), str(tmp_path / "adapter"), False)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / weights).read_bytes() == (output / "hf" / "final" / weights).read_bytes()
    plain = make("plain", save_hf_weights=True, save_epochs=1, lora_base_dtype="int8")
    run(plain)
    output = Path(plain.train.output_dir)
    run_ranks(1, export_quietly, str(output), str(tmp_path / "merged"), True)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want = open_merged(output / "hf" / "final").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    torch.testing.assert_close(merged, want, rtol=0, atol=1e-5)


def test_samples_are_written_by_the_quantized_model(make):
    lines = run(make(sample_prompts=["Hello"], sample_tokens=4, max_steps=1))
    assert lines and records(make())[-1] == lines[-1]


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"architecture": "full"}, r"train\.lora_base_dtype: nf4 weights cannot be trained"),
        ({"tensor_parallel_size": 2}, r"train\.lora_base_dtype: not available yet together"),
    ],
)
def test_what_cannot_be_is_refused(make, train, said):
    with pytest.raises(ConfigError, match=said):
        make(world=2, **train)


def test_a_random_base_is_refused():
    train = {"architecture": "lora", "lora_base_dtype": "int8", "output_dir": "out"}
    with pytest.raises(ConfigError, match=r"train\.lora_base_dtype: .* set model\.model_path"):
        from_dict({"model": {"config_path": "x"}, "train": train})


def test_without_bitsandbytes_the_run_ends_at_once(make):
    with pytest.raises(AssertionError, match=r"pip install 'tutti-train\[quantized\]'"):
        run_ranks(1, train_without_bitsandbytes, make())


def train_without_bitsandbytes(config):
    import sys

    from tests.train.runs import train_quietly

    sys.modules["bitsandbytes"] = None
    train_quietly(config)
