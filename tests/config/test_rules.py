"""Settings without effect cause a warning with the reason; settings with an effect, and defaults, do not."""

import pytest

from tutti.config import ARGUMENTS, ConfigError
from tutti.config.load import from_dict, load, to_yaml
from tutti.config.rules import _RULES, contradictions, warnings, warnings_on_cpu, warnings_on_length

EVALUATED = ["data.eval_path=x", "train.eval_steps=5"]
PLAIN = ["data.data_type=plaintext"]
DRAWS = ["data.data_type=diffusion"]
CASES = [
    *(
        (["infer.do_sample=no", f"infer.{name}=0.5"], f"infer.{name}", "infer.do_sample")
        for name in ("temperature", "top_p")
    ),
    (["infer.do_sample=no", "infer.top_k=5"], "infer.top_k", "infer.do_sample"),
    (["infer.do_sample=no", "infer.seed=5"], "infer.seed", "infer.do_sample"),
    (["infer.temperature=0", "infer.seed=5"], "infer.seed", "infer.temperature is 0"),
    (["infer.temperature=0", "infer.top_p=0.5"], "infer.top_p", "infer.temperature is 0"),
    (["infer.top_p=0", "infer.temperature=0.5"], "infer.temperature", "infer.top_p is 0"),
    (["data.train_size=5"], "data.train_size", "train.dyn_bsz"),
    (["data.train_sample=5", "train.dyn_bsz=true"], "data.train_sample", "train.dyn_bsz"),
    (["data.dyn_bsz_buffer_size=5"], "data.dyn_bsz_buffer_size", "train.dyn_bsz"),
    (["train.bsz_warmup_ratio=0.5"], "train.bsz_warmup_ratio", "train.dyn_bsz"),
    (["train.bsz_warmup_init_mbtoken=5"], "train.bsz_warmup_init_mbtoken", "train.dyn_bsz"),
    (["train.bsz_warmup_init_mbtoken=5", "train.dyn_bsz=on"], "train.bsz_warmup_init_mbtoken", "bsz_warmup_ratio is 0"),
    (["data.prefetch_factor=5", "data.num_workers=0"], "data.prefetch_factor", "data.num_workers is 0"),
    (["data.chat_template=chatml", "data.data_type=plaintext"], "data.chat_template", "data.data_type"),
    (["data.chat_date=2026-01-31", "data.data_type=plaintext"], "data.chat_date", "data.data_type"),
    (["train.muon_momentum=0.5"], "train.muon_momentum", "train.optimizer is not muon"),
    (["train.dpo_beta=0.2"], "train.dpo_beta", "data.data_type"),
    (["train.dpo_loss=ipo"], "train.dpo_loss", "data.data_type"),
    (["train.dpo_label_smoothing=0.1"], "train.dpo_label_smoothing", "data.data_type"),
    (["train.dpo_reference=on_the_fly"], "train.dpo_reference", "data.data_type"),
    (
        ["data.data_type=dpo", "train.dpo_loss=ipo", "train.dpo_label_smoothing=0.1"],
        "train.dpo_label_smoothing",
        "train.dpo_loss",
    ),
    (
        ["data.data_type=dpo", "train.architecture=lora", "train.lora_dropout=0.5"],
        "train.lora_dropout",
        "data.data_type is dpo",
    ),
    (["data.shuffle_buffer_size=5"], "data.shuffle_buffer_size", "mapping"),
    (
        ["data.shuffle_buffer_size=5", "data.shuffle=no", "data.datasets_type=iterable"],
        "data.shuffle_buffer_size",
        "data.shuffle is off",
    ),
    (["data.drop_last=no", "data.datasets_type=iterable"], "data.drop_last", "data.train_size"),
    (["data.drop_last=no", "data.train_sample=9"], "data.drop_last", "data.train_sample"),
    (["model.num_labels=5"], "model.num_labels", "classification"),
    (["train.ep_outside=yes"], "train.ep_outside", "train.expert_parallel_size is 1"),
    (["train.save_async=yes", "train.save_epochs=0"], "train.save_async", "train.save_steps and train.save_epochs"),
    (["train.enable_full_shard=no"], "train.enable_full_shard", "ddp"),
    (["train.enable_reshard_after_forward=on"], "train.enable_reshard_after_forward", "ddp"),
    (["train.enable_reshard_after_backward=on"], "train.enable_reshard_after_backward", "ddp"),
    (
        ["train.enable_reshard_after_backward=on", "train.data_parallel_mode=fsdp2"],
        "train.enable_reshard_after_backward",
        "train.enable_full_shard",
    ),
    (["train.enable_fsdp_offload=on"], "train.enable_fsdp_offload", "ddp"),
    (["train.activation_gpu_limit=1.5"], "train.activation_gpu_limit", "train.enable_activation_offload"),
    (
        ["train.enable_reshard_after_forward=on", "train.data_parallel_mode=fsdp1"],
        "train.enable_reshard_after_forward",
        "fsdp1",
    ),
    (
        ["train.broadcast_model_weights_from_rank0=no"],
        "train.broadcast_model_weights_from_rank0",
        "no weights are read",
    ),
    (["train.lr_min=1e-5", "train.lr_decay_style=constant"], "train.lr_min", "constant"),
    (["train.lr_decay_ratio=0.5", "train.lr_decay_style=constant"], "train.lr_decay_ratio", "constant"),
    (["train.lr_start=1e-5"], "train.lr_start", "train.lr_warmup_ratio is 0"),
    (["train.no_decay_modules=A"], "train.no_decay_modules", "train.weight_decay is 0"),
    (["train.no_decay_params=A"], "train.no_decay_params", "train.weight_decay is 0"),
    (
        ["train.enable_reentrant=no", "train.enable_gradient_checkpointing=no"],
        "train.enable_reentrant",
        "train.enable_gradient_checkpointing is off",
    ),
    (["train.async_enabled=yes"], "train.async_enabled", "train.ulysses_parallel_size is 1"),
    (["train.eval_steps=5"], "train.eval_steps", "data.eval_path is unset"),
    (["train.eval_epochs=5"], "train.eval_epochs", "data.eval_path is unset"),
    (["data.eval_path=x"], "data.eval_path", "train.eval_steps and train.eval_epochs are 0"),
    (["train.early_stopping_patience=5"], "train.early_stopping_patience", "there is no evaluation"),
    (["train.keep_best=on", "train.max_checkpoints=2"], "train.keep_best", "there is no evaluation"),
    (["train.keep_best=on", *EVALUATED], "train.keep_best", "train.max_checkpoints is 0"),
    (
        ["train.early_stopping_min_delta=0.1", *EVALUATED],
        "train.early_stopping_min_delta",
        "train.early_stopping_patience is 0",
    ),
    (["train.spike_window=9"], "train.spike_window", "train.spike_sigma is 0"),
    (["train.skip_spikes=on"], "train.skip_spikes", "train.spike_sigma is 0"),
    (["train.lora_rank=5"], "train.lora_rank", "architecture is not lora"),
    (["train.lora_alpha=5"], "train.lora_alpha", "architecture is not lora"),
    (["train.lora_dropout=0.5"], "train.lora_dropout", "architecture is not lora"),
    (["train.lora_targets=a"], "train.lora_targets", "architecture is not lora"),
    (["train.lora_rslora=on"], "train.lora_rslora", "architecture is not lora"),
    (["train.lora_dora=on"], "train.lora_dora", "architecture is not lora"),
    (["train.lora_full_modules=a"], "train.lora_full_modules", "architecture is not lora"),
    (["model.adapter_path=x"], "model.adapter_path", "architecture is not lora"),
    (["train.lora_rank=5", "train.architecture=lora", "model.adapter_path=x"], "train.lora_rank", "has its own"),
    (["train.sample_tokens=5"], "train.sample_tokens", "no train.sample_prompts"),
    (["train.sample_tokens=5", "data.data_type=classification"], "train.sample_tokens", "gives numbers"),
    (["train.sample_prompts=Hi", "data.data_type=classification"], "train.sample_prompts", "gives numbers"),
    (["train.sample_prompts_path=x", "data.data_type=classification"], "train.sample_prompts_path", "gives numbers"),
    (["train.pipeline_schedule=zero_bubble"], "train.pipeline_schedule", "train.pipeline_parallel_size is 1"),
    (["train.pipeline_stages_per_rank=2"], "train.pipeline_stages_per_rank", "train.pipeline_parallel_size is 1"),
    (["train.wandb_name=x"], "train.wandb_name", "train.use_wandb is off, and there are no train.trackers"),
    (["train.wandb_project=x"], "train.wandb_project", "train.use_wandb is off, and there are no train.trackers"),
    (["train.wandb_id=x"], "train.wandb_id", "train.use_wandb is off"),
    (["data.image_min_pixels=9", *PLAIN], "data.image_min_pixels", "data.data_type is neither conversation nor dpo"),
    (["data.image_max_pixels=9", *PLAIN], "data.image_max_pixels", "data.data_type is neither conversation nor dpo"),
    (["data.video_fps=9", *PLAIN], "data.video_fps", "data.data_type is neither conversation nor dpo"),
    (["data.video_max_frames=9", *PLAIN], "data.video_max_frames", "data.data_type is neither conversation nor dpo"),
    (["data.video_min_pixels=9", *PLAIN], "data.video_min_pixels", "data.data_type is neither conversation nor dpo"),
    (["data.video_max_pixels=9", *PLAIN], "data.video_max_pixels", "data.data_type is neither conversation nor dpo"),
    (["data.audio_max_seconds=9", *PLAIN], "data.audio_max_seconds", "data.data_type is neither conversation nor dpo"),
    (["data.audio_in_video=on", *PLAIN], "data.audio_in_video", "data.data_type is neither conversation nor dpo"),
    (["data.media_root=x", *PLAIN], "data.media_root", "data.data_type is neither conversation nor dpo nor"),
    (["data.augment={flip: true}"], "data.augment", "data.data_type is not image"),
    *(
        ([f"{name}={value}"], name, "data.data_type is not diffusion")
        for name, value in (("train.cache_latents", "no"), ("model.condition_model_path", "x"))
    ),
    *(
        ([f"{name}={value}", *PLAIN], name, "data.data_type is neither diffusion nor conversation")
        for name, value in (
            ("train.flow_time_mean", 1),
            ("train.flow_time_std", 2),
            ("train.flow_shift", 3),
            ("train.sample_steps", 5),
            ("train.sample_guidance", 2),
        )
    ),
    ([*DRAWS, "train.sample_steps=5"], "train.sample_steps", "there are no train.sample_prompts"),
    ([*DRAWS, "data.audio_max_seconds=5"], "data.audio_max_seconds", "data.data_type is diffusion"),
    (
        [*DRAWS, "train.broadcast_model_weights_from_rank0=no", "model.model_path=x"],
        "train.broadcast_model_weights_from_rank0",
        "which every rank reads its own slices of",
    ),
    (["data.max_seq_len=9", "data.data_type=image"], "data.max_seq_len", "has no tokens"),
    (["train.pad_to_length=yes", "data.data_type=image"], "train.pad_to_length", "has no tokens"),
    (["model.tokenizer_path=x", "data.data_type=image"], "model.tokenizer_path", "has no tokens"),
    (["model.attn_implementation=sdpa", "data.data_type=image"], "model.attn_implementation", "has no tokens"),
    (["data.media_cache_mb=9", *PLAIN], "data.media_cache_mb", "neither conversation nor dpo nor"),
    (["data.row_template={user: a}", *PLAIN], "data.row_template", "data.data_type is not conversation"),
    (["train.cfg_dropout=0.3", *PLAIN], "train.cfg_dropout", "neither diffusion nor conversation"),
    (["train.profile_end_step=9"], "train.profile_end_step", "train.enable_profiling is off"),
    (["train.profile_with_stack=no"], "train.profile_with_stack", "train.enable_profiling is off"),
]


@pytest.mark.parametrize(("argv", "name", "why"), CASES, ids=[f"{name}-{why}" for _, name, why in CASES])
def test_no_effect(argv: list[str], name: str, why: str) -> None:
    (warning,) = warnings(load(argv, None))
    assert warning.startswith(f"{name}: has no effect: ")
    assert why in warning


@pytest.mark.parametrize(
    "argv",
    [
        ["data.train_size=5", "train.dyn_bsz=true", "data.dyn_bsz_buffer_size=5", "train.bsz_warmup_ratio=0.1"],
        ["train.enable_reshard_after_forward=on", "train.data_parallel_mode=fsdp2", "train.enable_full_shard=no"],
        ["train.enable_full_shard=no", "train.enable_fsdp_offload=on", "train.data_parallel_mode=fsdp1"],
        ["train.enable_activation_offload=on", "train.activation_gpu_limit=1.5"],
        ["train.eval_steps=5", "data.eval_path=x"],
        ["train.keep_best=on", "train.max_checkpoints=2", "train.early_stopping_patience=2", *EVALUATED],
        ["train.spike_sigma=5", "train.spike_window=9", "train.skip_spikes=on"],
        ["train.use_wandb=on", "train.wandb_name=x"],
        ["train.lr_start=1e-5", "train.lr_warmup_ratio=0.1", "train.lr_min=0", "train.lr_decay_ratio=0.5"],
        ["train.weight_decay=0.1", "train.no_decay_params=bias"],
        ["train.broadcast_model_weights_from_rank0=no", "model.model_path=x", "model.safetensor_idx_path=y"],
        ["train.enable_reentrant=no"],
        ["train.ep_outside=yes", "train.expert_parallel_size=2", "train.data_parallel_mode=fsdp2"],
        ["train.async_enabled=yes", "train.ulysses_parallel_size=2"],
        ["train.save_async=yes"],
        [*DRAWS, "train.flow_shift=3", "data.image_max_pixels=9", "data.media_root=x", "data.max_seq_len=9"],
        [*DRAWS, "train.sample_prompts=x", "train.sample_steps=9", "train.sample_guidance=2"],
        ["model.safetensor_idx_path=x", "train.save_hf_weights=no"],
        ["infer.temperature=0.5", "infer.top_p=0.5", "infer.seed=5"],
        ["train.architecture=lora", "train.lora_rank=8", "train.lora_targets=q_proj"],
        ["train.architecture=lora", "train.lora_dropout=0.1", "model.adapter_path=x"],
        ["train.pad_to_length=yes", "data.drop_last=no"],
        ["train.wandb_project=VeOmni", "data.train_size=10_000_000"],
    ],
)
def test_an_effect_or_the_default(argv: list[str]) -> None:
    assert warnings(load(argv, None)) == []


@pytest.mark.parametrize(
    ("url", "is_refused"),
    [
        ("s3://user:hunter2@bucket/rows.jsonl", True),
        ("https://host/rows.jsonl?X-Amz-Date=1&X-Amz-Signature=abc", True),
        ("https://host/rows.jsonl?sv=2&sig=abc", True),
        ("https://host/rows.jsonl?access_token=abc", True),
        ("s3://bucket/a:b@c/rows.jsonl", False),
        ("hf://datasets/org/name@main/rows.jsonl", False),
        ("https://host/rows.jsonl?download=true", False),
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_shown(url: str, is_refused: bool) -> None:
    for name in ("data.train_path", "data.eval_path", "model.model_path"):
        problems = contradictions(load([f"{name}={url}"], None)) if not is_refused else []
        if is_refused:
            with pytest.raises(ConfigError) as error:
                load([f"{name}={url}"], None)
            problems = error.value.problems
            assert len(problems) == 1 and "hunter2" not in problems[0] and "abc" not in problems[0]
        assert any(f"{name}: holds a password or a signature" in line for line in problems) == is_refused


def test_what_never_comes_in_a_run_of_so_many_steps_has_no_effect() -> None:
    asked = ["train.eval_steps=11", "train.save_epochs=3", "train.log_steps=20", "train.lr_warmup_ratio=0.05"]
    asked += ["train.enable_profiling=yes", "train.profile_start_step=11", "train.profile_end_step=12"]
    found = [line.partition(": has no effect: ") for line in warnings_on_length(load(asked, None), 10)]
    names = {name: why for name, _, why in found}
    assert names.keys() == {
        "train.eval_steps", "train.save_epochs", "train.log_steps", "train.lr_warmup_ratio", "train.profile_start_step"
    }  # fmt: skip
    assert names["train.eval_steps"] == "the run ends with step 10"
    assert names["train.save_epochs"] == "train.num_train_epochs is 1"
    assert warnings_on_length(load(asked, None), 20)[0].startswith("train.save_epochs")
    assert warnings_on_length(load(["train.eval_steps=10", "train.save_epochs=1"], None), 10) == []


def test_a_learning_rate_does_not_rise_to_its_least() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr_min: must not be above train\.lr \(1e-06\)"):
        load(["train.lr=1e-6", "train.lr_min=1e-5"], None)
    assert load(["train.lr=1e-6", "train.lr_min=1e-5", "train.lr_decay_style=constant"], None).train.lr_min == 1e-5


def test_what_is_about_an_accelerator_has_no_effect_on_a_cpu() -> None:
    asked = ["data.pin_memory=no", "train.empty_cache_steps=3", "train.gc_steps=3"]
    found = [line.partition(": has no effect: ")[0] for line in warnings_on_cpu(load(asked, None))]
    assert found == ["data.pin_memory", "train.empty_cache_steps"]
    assert warnings_on_cpu(load([], None)) == []


def test_every_rule_names_arguments_and_is_tested() -> None:
    names = {name for rule in _RULES for name in rule.names}
    assert names <= set(ARGUMENTS)
    tested = {name for _, name, _ in CASES}
    assert {name for name in names - tested if not name.startswith("train.profile_")} == set()


def test_reading_a_written_file_back_warns_of_nothing_new() -> None:
    config = from_dict({"train": {"lr": 1.0}})
    assert warnings(config) == []
    import yaml

    assert warnings(from_dict(yaml.safe_load(to_yaml(config)))) == []
