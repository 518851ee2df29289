"""Files of TRL, transformers' Trainer and torchtitan become equivalent configurations."""

from pathlib import Path

import pytest

from tests.migrate.files import TORCHTITAN, TRAINER, TRL, loaded, migrated, row
from tutti.migrate.show import account


def test_trl(tmp_path: Path) -> None:
    migration = migrated(tmp_path, TRL, ranks=2)
    config = loaded(tmp_path, migration)
    assert config.data.train_path == "trl-lib/Capybara:small/train"
    assert config.data.eval_path == "trl-lib/Capybara:small/test"
    assert (config.data.data_type, config.data.max_seq_len, config.train.dyn_bsz) == ("conversation", 1024, True)
    assert (config.train.global_batch_size, config.train.lr, config.train.num_train_epochs) == (32, 2e-4, 1)
    assert (config.train.lora_rank, config.train.lora_alpha, config.train.lora_dropout) == (32, 32.0, 0.05)
    assert (config.train.use_wandb, config.train.trackers) == (True, ("tensorboard",))
    assert (config.train.weight_decay, config.train.no_decay_params) == (0.01, ("bias", "norm"))
    assert (config.train.lr_decay_style, config.train.lr_warmup_ratio) == ("constant", 0), "constant knows no warmup"
    assert (config.train.data_parallel_mode, config.train.enable_full_shard) == ("fsdp2", False)
    assert row(migration, "assistant_only_loss").kind == "changed"
    assert "all of a conversation is trained on there" in account(migration, "x")
    pairs = migrated(
        tmp_path, "model_name_or_path: x\noutput_dir: o\ndataset_name: p.jsonl\nbeta: 0.3\nloss_type: ipo\n"
    )
    config = loaded(tmp_path, pairs)
    assert (config.data.data_type, config.train.dpo_beta, config.train.dpo_loss) == ("dpo", 0.3, "ipo")
    assert (config.train.lr, config.train.micro_batch_size) == (1e-6, 8)
    text = "model_name_or_path: x\noutput_dir: o\ndataset_name: p.jsonl\ndataset_text_field: body\n"
    config = loaded(tmp_path, migrated(tmp_path, text))
    assert (config.data.data_type, config.data.text_keys) == ("plaintext", "body")


def test_arguments_of_the_trainer_count_a_whole_run(tmp_path: Path) -> None:
    config = loaded(tmp_path, migrated(tmp_path, TRAINER, ranks=2))
    assert (config.train.max_steps, config.train.num_train_epochs, config.data.train_sample) == (500, 1, 4000)
    assert int(500 * config.train.lr_warmup_ratio) == 37
    ends = TRAINER.replace('"seed"', '"lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "seed"')
    assert loaded(tmp_path, migrated(tmp_path, ends)).train.lr_min == pytest.approx(3e-5)
    for steps in range(1, 60):
        text = f"output_dir: o\nper_device_train_batch_size: 1\nmax_steps: 59\nwarmup_steps: {steps}\n"
        assert int(59 * loaded(tmp_path, migrated(tmp_path, text)).train.lr_warmup_ratio) == steps


def test_torchtitan(tmp_path: Path) -> None:
    migration = migrated(tmp_path, TORCHTITAN, ranks=8)
    config = loaded(tmp_path, migration)
    assert (config.data.train_path, config.data.data_type) == ("allenai/c4:en/train", "plaintext")
    assert (config.train.micro_batch_size, config.train.dyn_bsz, config.data.max_seq_len) == (2, True, 8192)
    assert (config.train.max_steps, config.data.train_size) == (1000, 1000 * 2 * 4 * 8192)
    assert (config.train.lr, config.train.lr_min) == (3e-4, pytest.approx(3e-5))
    assert config.train.lr_warmup_ratio == 0.1
    assert (config.train.adam_beta2, config.train.weight_decay) == (0.95, 0.1)
    assert (config.train.tensor_parallel_size, config.train.data_parallel_mode) == (2, "fsdp2")
    assert (config.train.enable_full_shard, config.train.save_steps, config.train.save_async) == (False, 250, True)
    assert config.train.trackers == ("tensorboard",) and config.model.config_path == "./assets/Llama-3.1-8B"
    assert {found.key for found in migration.of("none")} == {"model.name", "model.flavor", "quantize"}
