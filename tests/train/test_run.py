"""Complete runs: every layout trains like one process, and the output can be used."""

import json
from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.train.runs import records, run, tiny_config

STEP_KEYS = {
    "step", "epoch", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "samples", "step_seconds", "data_seconds",
    "tokens_per_second", "mfu", "memory_gib", "packing",
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tiny_config(tmp_path_factory.mktemp("reference")))


def assert_same_training(got, want, rtol_loss=1e-5, rtol_norm=1e-4):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=rtol_loss), f"loss at step {ours['step']}"
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=rtol_norm), f"norm at step {ours['step']}"
        for key in ("step", "epoch", "lr", "tokens", "trained_tokens", "samples"):
            assert ours[key] == theirs[key], key


def test_metrics_have_every_field_and_the_loss_falls(reference):
    assert [line["step"] for line in reference] == [1, 2, 3, 4]
    for line in reference:
        assert set(line) == STEP_KEYS
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.05


ZERO2 = {"data_parallel_mode": "fsdp2", "enable_full_shard": False}
HYBRID = {"data_parallel_mode": "fsdp2", "data_parallel_replicate_size": 2, "data_parallel_shard_size": 2}
REMAT = {"enable_gradient_checkpointing": True}
LAYOUTS = {
    "remat-reentrant": (1, REMAT),
    "remat": (1, REMAT | {"enable_reentrant": False}),
    "built-on-cpu": (1, {"init_device": "cpu"}),
    "compile-remat": (1, REMAT | {"enable_compile": True}),
    "ddp-built-on-cpu": (2, {"data_parallel_mode": "ddp", "init_device": "cpu"}),
    "zero3-remat": (2, REMAT | {"data_parallel_mode": "fsdp2"}),
    "zero2": (2, ZERO2),
    "zero2-reshard-after-forward": (2, ZERO2 | {"enable_reshard_after_forward": True}),
    "zero2-reshard-after-backward": (2, ZERO2 | {"enable_reshard_after_backward": True}),
    "hybrid-accumulated": (4, HYBRID | {"data_parallel_shard_size": 1, "ulysses_parallel_size": 2}),
}


@pytest.mark.parametrize(("world", "train"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_equals_one_process(tmp_path, reference, world, train):
    changes = {f"train.{name}": value for name, value in train.items()}
    assert_same_training(run(tiny_config(tmp_path, world=world, **changes), world), reference)


@pytest.mark.parametrize("changes", [{"model.attn_implementation": "eager"}, {"model.basic_modules": ["Qwen3MLP"]}])
def test_neither_kernels_nor_units_change_training(tmp_path, reference, changes):
    assert_same_training(run(tiny_config(tmp_path, **changes)), reference)


def test_bf16_stays_close_to_fp32(tmp_path, reference):
    got = run(
        tiny_config(tmp_path, world=2, **{"train.compute_dtype": "bfloat16", "train.data_parallel_mode": "fsdp2"}), 2
    )
    assert_same_training(got, reference, rtol_loss=2e-2, rtol_norm=2e-2)


def test_packing_and_accumulation_do_not_change_the_gradient(tmp_path):
    """Eight samples a step give one loss, however they are grouped into micro batches."""
    common = {"train.dyn_bsz": False, "data.train_sample": 32}
    alone = run(tiny_config(tmp_path / "a", **common, **{"train.micro_batch_size": 1}))
    packed = run(tiny_config(tmp_path / "b", **common, **{"train.micro_batch_size": 8}))
    assert_same_training(packed, alone)


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_bit_equal(tmp_path, world):
    changes = {"train.data_parallel_mode": "fsdp2", "train.save_steps": 2, "train.enable_full_determinism": True}
    whole = tiny_config(tmp_path / "whole", world=world, **changes)
    expected = run(whole, world)
    half = tiny_config(tmp_path / "half", world=world, **changes)
    run_ranks(world, train_until, half, 2)
    assert [line["step"] for line in records(half)] == [1, 2]
    resumed = run(
        tiny_config(tmp_path / "half", world=world, **changes, **{"train.load_checkpoint_path": "auto"}), world
    )
    for ours, theirs in zip(resumed, expected, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"]), f"step {ours['step']}"


def test_resume_on_another_layout_goes_on(tmp_path, reference):
    run_ranks(2, train_until, tiny_config(tmp_path, world=2, **{"train.data_parallel_mode": "fsdp2"}), 2)
    assert_same_training(run(tiny_config(tmp_path, **{"train.load_checkpoint_path": "auto"})), reference)


def test_a_finished_run_is_done_and_a_longer_one_goes_on_by_its_own_schedule(tmp_path):
    settings = {"train.save_steps": 2, "train.lr_decay_style": "linear", "train.lr_min": 0.0}
    short = tiny_config(tmp_path, **settings)
    run(short)
    before = records(short)
    again = {**settings, "train.load_checkpoint_path": "auto"}
    assert run(tiny_config(tmp_path, **again)) == before
    longer = tiny_config(tmp_path, **again, **{"train.max_steps": 8})
    (said,) = run_ranks(1, train_and_listen, longer)
    assert "the run has 8 steps now, and had 4 when the checkpoint was made: from step 5 the learning rate" in said
    lines = records(longer)
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[:4] == before
    straight = run(tiny_config(tmp_path / "straight", **settings, **{"train.max_steps": 8}))
    assert [line["lr"] for line in lines[4:]] == [line["lr"] for line in straight[4:]]


def test_a_checkpoint_beyond_the_runs_end_and_a_larger_batch(tmp_path):
    """The reported number of remaining steps equals the steps taken."""
    settings = {"train.save_steps": 2, "train.max_steps": None, "train.global_batch_size": 16}
    first = run(tiny_config(tmp_path, **settings))
    resumed = {
        "train.load_checkpoint_path": str(tmp_path / "out" / "checkpoints" / "global_step_2"),
        "train.output_dir": str(tmp_path / "other"),
    }
    double = tiny_config(tmp_path, **(settings | resumed | {"train.global_batch_size": 32}))
    (said,) = run_ranks(1, train_and_listen, double)
    steps = records(double)[-1]["step"]
    assert steps < first[-1]["step"]
    assert f"the run has {steps} steps now, and had {first[-1]['step']} when" in said
    short = settings | resumed | {"train.max_steps": 1, "train.output_dir": str(tmp_path / "short")}
    (said,) = run_ranks(1, train_and_listen, tiny_config(tmp_path, **short))
    assert "nothing is left to train after step 2, which" in said


def train_and_listen(config):
    """Train; what was logged."""
    import contextlib
    import io

    from tutti.train.run import train

    with contextlib.redirect_stderr(io.StringIO()) as said:
        train(config)
    return said.getvalue()


def train_until(config, step):
    """Train, and be asked to stop (as by SIGTERM, on the last rank alone) within `step`."""
    import os
    import signal

    from tests.train.runs import train_quietly
    from tutti.train.step import TrainStep

    original = TrainStep.step

    def step_and_signal(self, batch, totals):
        original(self, batch, totals)
        if batch.step == step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    TrainStep.step = step_and_signal
    train_quietly(config)


def test_exported_model_loads_in_transformers_and_continues_the_loss(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tiny_config(
        tmp_path / "first", **{"train.save_hf_weights": True, "train.hf_save_steps": 2, "train.max_steps": 3}
    )
    run(config)
    made = list(Path(config.train.output_dir).rglob("*"))
    assert len(made) > 15 and all(path.stat().st_mode & 0o027 == 0 for path in made), "others may not read it"
    final = Path(config.train.output_dir) / "hf" / "final"
    assert (Path(config.train.output_dir) / "hf" / "global_step_2" / "config.json").exists()
    AutoModelForCausalLM.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final).chat_template
    again = run(
        tiny_config(tmp_path / "second", **{"model.model_path": str(final), "model.tokenizer_path": str(final)})
    )
    assert again[0]["loss"] < records(config)[0]["loss"]


def test_evaluation_is_the_token_mean_on_any_layout(tmp_path):
    quickstart_eval = tiny_config(tmp_path).data.train_path.replace("chat.jsonl", "chat_eval.jsonl")
    changes = {"data.eval_path": quickstart_eval, "train.eval_steps": 2, "train.max_steps": 2}
    lines = [
        next(
            line
            for line in run(tiny_config(tmp_path / str(world), world=world, **changes), world)
            if "eval_loss" in line
        )
        for world in (1, 2)
    ]
    assert lines[0]["step"] == 2 and lines[0]["eval_tokens"] == lines[1]["eval_tokens"] > 0
    assert lines[1]["eval_loss"] == pytest.approx(lines[0]["eval_loss"], rel=1e-5)


def test_evaluation_has_a_loss_for_each_of_its_sources_however_many_are_trained_on(tmp_path):
    rows = Path(tiny_config(tmp_path).data.train_path).with_name("chat_eval.jsonl").read_text().splitlines()
    for name, part in [("a", rows[:4]), ("b", rows[:4]), ("c", rows[4:7])]:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    (tmp_path / "eval.yaml").write_text("sources: [a.jsonl, b.jsonl, c.jsonl]")
    found = {}
    for path in ("eval.yaml", "a.jsonl", "c.jsonl"):
        changes = {"data.eval_path": str(tmp_path / path), "train.eval_steps": 1, "train.max_steps": 1}
        _, found[path] = run(tiny_config(tmp_path / path.replace(".", "_"), **changes))
    losses = {name: found["eval.yaml"].pop(f"eval_source_loss/{name}") for name in "abc"}
    assert losses["a"] == pytest.approx(losses["b"], rel=1e-6) == pytest.approx(found["a.jsonl"]["eval_loss"], rel=1e-6)
    assert losses["c"] == pytest.approx(found["c.jsonl"]["eval_loss"], rel=1e-6) != losses["a"]
    assert not [name for line in found.values() for name in line if "source" in name]


def test_classification_learns_and_reports_accuracy(tmp_path):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} thing number {i % 7}", "label": i % 2} for i in range(64)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    changes = {
        "data.data_type": "classification", "data.train_path": str(path), "data.eval_path": str(path),
        "model.num_labels": 2, "train.eval_epochs": 1, "train.max_steps": None, "train.num_train_epochs": 4,
        "train.dyn_bsz": False, "train.lr": 1e-2, "train.lr_decay_style": "constant",
    }  # fmt: skip
    lines = run(tiny_config(tmp_path, **changes))
    final = [line for line in lines if "eval_accuracy" in line][-1]
    assert final["eval_accuracy"] == 1.0 and final["eval_tokens"] == 64


def test_output_folder_of_another_run_is_refused(tmp_path):
    config = tiny_config(tmp_path, **{"train.max_steps": 1})
    run(config)
    with pytest.raises(AssertionError, match="holds a run already"):
        run(config)


def test_gradient_that_is_not_finite_changes_nothing(tmp_path):
    lines = run_ranks(1, poisoned_step, tiny_config(tmp_path, **{"train.max_steps": 3}))[0]
    assert lines["before"] == lines["after"] and lines["skipped"] == 1


def poisoned_step(config):
    import torch

    from tests.train.runs import train_quietly
    from tutti.core.tensors import local_part
    from tutti.train import step as module

    seen = {}
    original = module.TrainStep.step

    def step(self, batch, totals):
        poison = batch.step == 2
        norm = self._executor.gradient_norm
        self._executor.gradient_norm = lambda parameters: norm(parameters) * (float("nan") if poison else 1.0)
        weight = self._parameters[0]
        before = local_part(weight).clone(), totals.skipped.item()
        original(self, batch, totals)
        self._executor.gradient_norm = norm
        if poison:
            seen["before"], seen["after"] = before[0].sum().item(), local_part(weight).sum().item()
            seen["skipped"] = totals.skipped.item() - before[1]
            assert torch.equal(before[0], local_part(weight))

    module.TrainStep.step = step
    train_quietly(config)
    return seen
