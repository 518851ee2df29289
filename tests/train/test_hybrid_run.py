"""Runs of hybrid models: equal in every layout, with resume, adapters, export and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.infer.models import write_model
from tests.parallel.layouts import family_config, train_all
from tests.train.adapted import lora_config
from tests.train.runs import QUICKSTART, records, run
from tests.train.test_run import assert_same_training, train_until
from tutti.config import Config

ZERO3 = {"data_parallel_mode": "fsdp2"}
REMAT = {"enable_gradient_checkpointing": True}
LAYOUTS = {
    "batch invariant": (1, {"enable_batch_invariant_mode": True}),
    "zero3 x expert": (2, ZERO3 | REMAT | {"expert_parallel_size": 2}),
    "tensor": (2, {"tensor_parallel_size": 2}),
    "pipeline": (2, {"pipeline_parallel_size": 2} | REMAT),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The configuration and the metrics of a run in one process, with samples on the way and an export."""
    changes = {"save_hf_weights": True, "save_steps": 2, "enable_full_determinism": True}
    config = family_config(tmp_path_factory.mktemp("hybrid"), "qwen3_next", **changes)
    return config, run(config)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """The metrics of the run in every layout."""
    made: dict[str, list[dict]] = {}
    for world in (1, 2):
        names = [name for name, (size, _) in LAYOUTS.items() if size == world]
        configs = [
            family_config(tmp_path_factory.mktemp("layout"), "qwen3_next", world, **LAYOUTS[name][1]) for name in names
        ]
        made |= dict(zip(names, train_all(configs, world), strict=True))
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_one_process(trained, laid_out, name):
    assert_same_training(laid_out[name], trained[1])


def test_resume_is_bit_equal(tmp_path, trained):
    changes: dict[str, Any] = {"save_steps": 2, "enable_full_determinism": True}
    run_ranks(1, train_until, family_config(tmp_path, "qwen3_next", **changes), 2)
    resumed = run(family_config(tmp_path, "qwen3_next", **changes, load_checkpoint_path="auto"))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in trained[1]]


def test_what_is_exported_is_what_was_trained(trained):
    config: Config = trained[0]
    folder = Path(config.train.output_dir or "") / "hf" / "final"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen3_next"
    out = model.generate(torch.arange(5, 9)[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 8)


@pytest.mark.parametrize("family", ["granite4", "lfm2"])
def test_adapters_and_evaluation_packed_equal_one_sample_at_a_time(tmp_path, family):
    base = Path(write_model(tmp_path / family, family))
    common = {"dyn_bsz": False, "data.train_sample": 16, "max_steps": 2, "eval_steps": 1, "sample_prompts": ["Hello"]}
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join((QUICKSTART / "chat.jsonl").read_text().splitlines(keepends=True)[-8:]))
    common |= {"data.eval_path": str(held_out), "sample_tokens": 3}
    runs = [lora_config(tmp_path / str(size), base, **common, micro_batch_size=size) for size in (1, 4)]
    train_all(runs, 1)
    alone, packed = (records(config) for config in runs)
    assert_same_training(*([line for line in lines if "loss" in line] for lines in (packed, alone)))
    evaluated = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in (packed, alone)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5) and len(evaluated[0]) >= 2
