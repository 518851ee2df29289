"""Complete runs on pairs: layouts, accumulation, both reference modes and resumes agree, and preferences are
learned."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.harness import run_ranks
from tests.train.runs import records, run, tiny_config, write_model_config, write_pairs
from tests.train.test_run import STEP_KEYS, assert_same_training, train_until
from tutti.train.tasks.reference import FILE

REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Quickstart's answers preferred to their words in reverse."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 64, 400)


def config_of(folder, rows, *, world=1, **changes):
    values = {
        "data.data_type": "dpo", "data.train_path": rows, "data.max_seq_len": 256, "train.max_steps": 3,
        "train.lr": 1e-3, "train.lr_decay_style": "constant",
    }  # fmt: skip
    return tiny_config(folder, world=world, **values | changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, rows):
    return run(config_of(tmp_path_factory.mktemp("reference"), rows))


def assert_same(got, want):
    assert_same_training(got, want)
    for ours, theirs in zip(got, want, strict=True):
        for key in REWARDS - {"rewards/accuracy"} if ours["step"] == 1 else REWARDS:  # at first there are ties
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), f"{key} at step {ours['step']}"


def test_metrics_begin_at_an_even_chance(reference):
    for line in reference:
        assert set(line) == STEP_KEYS | REWARDS
    assert reference[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert reference[0]["rewards/margin"] == pytest.approx(0, abs=1e-3)
    assert reference[0]["trained_tokens"] > reference[0]["samples"]


@pytest.mark.parametrize("reference", ["precompute", "on_the_fly"])
def test_a_model_with_dropout_begins_at_an_even_chance_too(tmp_path, rows, reference):
    model = {"attention_dropout": 0.3} if reference == "precompute" else {"model_type": "gpt2", "resid_pdrop": 0.3}
    changes = {
        "model.config_path": write_model_config(tmp_path / "model", **model), "train.dpo_reference": reference,
        "model.attn_implementation": "eager", "train.max_steps": 1,
    }  # fmt: skip
    (line,) = run(config_of(tmp_path, rows, **changes))
    assert line["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert line["rewards/chosen"] == pytest.approx(0, abs=1e-5)


LAYOUTS = {
    "zero3": (2, {"data_parallel_mode": "fsdp2"}),
    "zero3-on-the-fly": (2, {"data_parallel_mode": "fsdp2", "dpo_reference": "on_the_fly"}),
    "on-the-fly": (1, {"dpo_reference": "on_the_fly"}),
    "ulysses": (2, {"data_parallel_mode": "fsdp2", "ulysses_parallel_size": 2}),
    "context": (2, {"data_parallel_mode": "fsdp2", "context_parallel_size": 2}),
    "tensor": (2, {"data_parallel_mode": "fsdp2", "tensor_parallel_size": 2}),
    "pipeline": (2, {"pipeline_parallel_size": 2}),
    "pipeline-on-the-fly": (2, {"pipeline_parallel_size": 2, "dpo_reference": "on_the_fly"}),
}


@pytest.mark.parametrize(("world", "train"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_equals_one_process(tmp_path, rows, reference, world, train):
    changes = {f"train.{name}": value for name, value in train.items()}
    assert_same(run(config_of(tmp_path, rows, world=world, **changes), world), reference)


def test_packing_and_accumulation_do_not_change_the_gradient(tmp_path, rows):
    """Eight pairs a step give one loss, one in a micro batch or all."""
    common = {"train.dyn_bsz": False}
    alone = run(config_of(tmp_path / "a", rows, **common, **{"train.micro_batch_size": 1}))
    packed = run(config_of(tmp_path / "b", rows, **common, **{"train.micro_batch_size": 8}))
    assert_same(packed, alone)


@pytest.mark.parametrize(("how", "world"), [("precompute", 2), ("on_the_fly", 1), ("lost", 1)])
def test_resume_is_bit_equal(tmp_path, rows, how, world):
    """lost: the precomputed file is gone, and computed again by the model as it was."""
    changes = {
        "train.data_parallel_mode": "fsdp2", "train.save_steps": 2, "train.enable_full_determinism": True,
        "train.dpo_reference": "on_the_fly" if how == "on_the_fly" else "precompute",
    }  # fmt: skip
    expected = run(config_of(tmp_path / "whole", rows, world=world, **changes), world)
    half = config_of(tmp_path / "half", rows, world=world, **changes)
    run_ranks(world, train_until, half, 2)
    assert [line["step"] for line in records(half)] == [1, 2]
    file = Path(half.train.output_dir) / FILE
    assert file.exists() == (how != "on_the_fly")
    if how == "lost":
        file.unlink()
    again = config_of(tmp_path / "half", rows, world=world, **changes, **{"train.load_checkpoint_path": "auto"})
    for ours, theirs in zip(run(again, world), expected, strict=True):
        keys = ("loss", "grad_norm", *REWARDS)
        assert [ours[key] for key in keys] == [theirs[key] for key in keys], f"step {ours['step']}"


def test_a_run_that_goes_on_takes_what_it_computed(tmp_path, rows):
    """A file that belongs to other data is not used."""
    config = config_of(tmp_path, rows, **{"train.save_steps": 1, "train.max_steps": 1})
    run(config)
    path = Path(config.train.output_dir) / FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    right = load_file(path)
    wrong = {name: table + 1000 for name, table in right.items()}
    wrong["train"][:, 1] -= 1000
    again = {"train.max_steps": 1, "train.num_train_epochs": 2, "train.load_checkpoint_path": "auto"}
    save_file(wrong, path, metadata={"key": "another"})
    line = run(config_of(tmp_path, rows, **again))[-1]
    assert line["step"] == 2 and line["rewards/chosen"] > -1
    assert load_file(path)["train"].equal(right["train"])
    save_file(wrong, path, metadata=metadata)
    line = run(config_of(tmp_path, rows, **again))[-1]
    assert line["step"] == 2 and line["rewards/chosen"] < -50


@pytest.mark.parametrize("dpo_reference", ["precompute", "on_the_fly"])
def test_preferences_are_learnt(tmp_path, rows, dpo_reference):
    changes = {
        "train.max_steps": None, "train.num_train_epochs": 4, "train.lr": 4e-3,
        "data.eval_path": rows, "train.eval_epochs": 4, "train.dpo_reference": dpo_reference,
    }  # fmt: skip
    *_, last, evaluation = run(config_of(tmp_path, rows, **changes))
    assert last["rewards/margin"] > 0.5 and last["loss"] < 0.5
    assert evaluation["eval_accuracy"] > 0.9 and evaluation["eval_loss"] < 0.5
    assert evaluation["eval_tokens"] > 64


def test_adapters_are_their_own_reference(tmp_path, rows):
    """Precomputed by the adapted model as it began, or on the fly with adapters off: the same training."""
    changes = {"train.architecture": "lora", "train.lora_rank": 4, "train.lr": 1e-2}
    computed = run(config_of(tmp_path / "a", rows, **changes))
    changes["train.dpo_reference"] = "on_the_fly"
    assert_same(run(config_of(tmp_path / "b", rows, **changes)), computed)
    changes |= {"train.tensor_parallel_size": 2, "train.pipeline_parallel_size": 2}
    assert_same(run(config_of(tmp_path / "c", rows, world=4, **changes), 4), computed)
    assert computed[-1]["rewards/margin"] > 0.05


def test_streamed_pairs_need_a_reference_on_the_fly(tmp_path, rows):
    changes = {"data.datasets_type": "iterable", "data.train_size": 4000}
    with pytest.raises(AssertionError, match=r"train\.dpo_reference"):
        run(config_of(tmp_path / "a", rows, **changes))
    lines = run(config_of(tmp_path / "b", rows, **changes, **{"train.dpo_reference": "on_the_fly"}))
    assert lines[-1]["rewards/margin"] > 0


def test_several_sources_have_losses_of_their_own(tmp_path, rows):
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(json.dumps({"sources": [rows, rows], "names": ["a", "b"]}))
    line = run(config_of(tmp_path, str(mixture), **{"train.max_steps": 1}))[0]
    assert line["source_loss/a"] == pytest.approx(0.6931, abs=1e-3)
    assert line["source_loss/b"] == pytest.approx(0.6931, abs=1e-3)
    assert line["source_tokens/a"] + line["source_tokens/b"] == line["trained_tokens"]
