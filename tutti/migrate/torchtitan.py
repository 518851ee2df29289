"""torchtitan: a TOML file with sections, for pretraining on text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutti.migrate.rules import (
    CHANGED,
    MAPPED,
    NONE,
    Framework,
    Result,
    Rule,
    Source,
    changed,
    choice,
    needless,
    none,
    off,
    optimizer,
    same,
    trackers,
    warmup_steps,
)

_WHERE = {"c4": "allenai/c4:en/train", "c4_validation": "allenai/c4:en/validation"}
_SECTIONS = ("job", "training", "parallelism", "lr_scheduler", "metrics", "activation_checkpoint", "checkpoint")


def _data(key: str) -> Rule:
    """A data set by torchtitan's name for it; a path overrides it."""

    def rule(value: Any, source: Source) -> Result:
        section = "training" if key == "data.train_path" else "validation"
        path = source.get(f"{section}.dataset_path", _WHERE.get(str(value), value))
        ours = {key: path, "data.data_type": "plaintext", "data.text_keys": "text,content_split"}
        note = "documents are packed, and do not see each other"
        if path == value:
            return Result(CHANGED, ours, f"{note}; a file, a folder or a name on the hub is expected")
        return Result(CHANGED, ours, note)

    return rule


def _local(value: Any, source: Source) -> Result:
    return Result(MAPPED, {"train.micro_batch_size": value, "train.dyn_bsz": True})


def _global(value: Any, source: Source) -> Result:
    if value < 0:
        return Result(MAPPED, note="local_batch_size times the data-parallel ranks, as by default here")
    return Result(MAPPED, {"train.global_batch_size": value})


def _shards(value: Any, source: Source) -> Result:
    if value < 0:
        return Result(MAPPED, {"train.data_parallel_mode": "fsdp2"}, "all ranks, as by default here")
    if value == 1 and source.get("parallelism.data_parallel_replicate_degree", 1) > 1:
        return Result(MAPPED, {"train.data_parallel_mode": "ddp"})
    return Result(MAPPED, {"train.data_parallel_mode": "fsdp2", "train.data_parallel_shard_size": value})


def _reshard(value: Any, source: Source) -> Result:
    if value == "default":
        value = "never" if source.get("parallelism.pipeline_parallel_degree", 1) > 1 else "always"
    return Result(MAPPED, {"train.enable_full_shard": value == "always"})


def _checkpointing(value: Any, source: Source) -> Result:
    ours = {"train.enable_gradient_checkpointing": value != "none", "train.enable_reentrant": False}
    if value == "selective":
        return Result(CHANGED, ours, "blocks are recomputed as a whole")
    return Result(MAPPED, ours if value != "none" else {"train.enable_gradient_checkpointing": False})


def _min_factor(value: Any, source: Source) -> Result:
    return Result(MAPPED, {"train.lr_min": float(value) * float(source.get("optimizer.lr", 8e-4))})


def _decay_type(value: Any, source: Source) -> Result:
    if value in ("linear", "cosine"):
        return Result(MAPPED, {"train.lr_decay_style": value})
    return Result(NONE, note="linear, cosine and constant are there")


def _enabled(value: Any, source: Source) -> Result:
    return Result(MAPPED, note="by the other keys of its section" if value else "off, as it is here")


def _checkpoints(value: Any, source: Source) -> Result:
    enabled = source.get("checkpoint.enable", source.get("checkpoint.enable_checkpoint", False))
    return Result(MAPPED, {"train.save_steps": value if enabled else 0, "train.save_epochs": 0})


def _initial(value: Any, source: Source) -> Result:
    if source.get("checkpoint.initial_load_in_hf"):
        return Result(MAPPED, {"model.model_path": value})
    return Result(NONE, note="its checkpoints cannot be read: convert it to a Hugging Face folder (model.model_path)")


def _validation(value: Any, source: Source) -> Result:
    return Result(MAPPED, {"train.eval_steps": value if source.get("validation.enable") else 0})


def _tracker(name: str) -> Rule:
    """A switch for one tracker; sets all trackers that are on."""
    switches = {"metrics.enable_tensorboard": "tensorboard", "metrics.enable_wandb": "wandb"}
    return lambda value, source: (
        trackers([place for key, place in switches.items() if source.get(key)])
        if value
        else Result(MAPPED, note="off, as it is here")
    )


def _schedule(value: Any, source: Source) -> Result:
    ours = {"1f1b": "1f1b", "interleaved1f1b": "interleaved", "interleavedzerobubble": "zero_bubble"}
    name = str(value).lower()
    if name in ours:
        return Result(MAPPED, {"train.pipeline_schedule": ours[name]})
    return Result(NONE, note="see train.pipeline_schedule")


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("job.description", "job.print_config", "job.config_file"), needless("config.yaml has it")),
    "job.dump_folder": same("train.output_dir"),
    "job.custom_config_module": off("code of one's own is not run"),
    "profiling.enable_profiling": same("train.enable_profiling"),
    "profiling.save_traces_folder": same("train.profile_trace_dir"),
    "profiling.profile_freq": changed("once, of the steps from train.profile_start_step to profile_end_step"),
    "profiling.enable_memory_snapshot": off("see train.profile_profile_memory"),
    "metrics.log_freq": same("train.log_steps"),
    "metrics.enable_tensorboard": _tracker("tensorboard"),
    "metrics.enable_wandb": _tracker("wandb"),
    **dict.fromkeys(
        ("metrics.save_tb_folder", "metrics.disable_color_printing", "metrics.save_for_all_ranks"),
        needless("rank 0 writes metrics to train.output_dir"),
    ),
    **dict.fromkeys(
        ("model.name", "model.flavor"),
        none("a Hugging Face config says what the model is (model.config_path, or model.model_path with weights)"),
    ),
    "model.tokenizer_path": same("model.tokenizer_path"),
    "model.hf_assets_path": changed(
        "its config.json says what the model is, in place of name and flavor",
        "model.tokenizer_path",
        "model.config_path",
    ),
    "model.converters": off("fp8 is not there"),
    "model.print_after_conversion": needless("`tutti check` shows the model"),
    "optimizer.name": optimizer,
    "optimizer.lr": same("train.lr", float),
    "optimizer.beta1": same("train.adam_beta1", float),
    "optimizer.beta2": same("train.adam_beta2", float),
    "optimizer.eps": same("train.adam_eps", float),
    "optimizer.weight_decay": same("train.weight_decay", float),
    "optimizer.implementation": needless("fused where there is one"),
    "optimizer.early_step_in_backward": off("the step comes after the backward pass"),
    "lr_scheduler.warmup_steps": warmup_steps,
    "lr_scheduler.decay_type": _decay_type,
    "lr_scheduler.decay_ratio": none("decay begins after the warmup; train.lr_decay_ratio says where it ends"),
    "lr_scheduler.min_lr_factor": _min_factor,
    "lr_scheduler.lr_min": _min_factor,
    **dict.fromkeys(("training.local_batch_size", "training.batch_size"), _local),
    "training.global_batch_size": _global,
    "training.seq_len": same("data.max_seq_len"),
    "training.max_norm": same("train.max_grad_norm", float),
    "training.steps": lambda value, source: Result(MAPPED, {"train.max_steps": value, "train.num_train_epochs": 1}),
    "training.dataset": _data("data.train_path"),
    "training.dataset_path": needless("data.train_path"),
    "training.mixed_precision_param": choice(
        {"bfloat16": {"train.compute_dtype": "bfloat16"}, "float32": {"train.compute_dtype": "float32"}},
        "see train.compute_dtype",
    ),
    "training.mixed_precision_reduce": choice({"float32": {}}, "gradients are reduced in fp32"),
    "training.dtype": choice(
        {"float32": {}, "bfloat16": {"train.enable_mixed_precision": False}}, "see train.enable_mixed_precision"
    ),
    "training.gc_freq": same("train.gc_steps"),
    "training.gc_debug": needless("nothing to set"),
    **dict.fromkeys(("training.seed", "debug.seed"), same("train.seed")),
    **dict.fromkeys(("training.deterministic", "debug.deterministic"), same("train.enable_full_determinism")),
    **dict.fromkeys(("training.compile", "compile.enable"), same("train.enable_compile")),
    "compile.components": needless("the blocks are compiled"),
    "training.enable_cpu_offload": same("train.enable_fsdp_offload"),
    "parallelism.data_parallel_replicate_degree": same("train.data_parallel_replicate_size"),
    "parallelism.data_parallel_shard_degree": _shards,
    "parallelism.fsdp_reshard_after_forward": _reshard,
    "parallelism.tensor_parallel_degree": same("train.tensor_parallel_size"),
    "parallelism.pipeline_parallel_degree": same("train.pipeline_parallel_size"),
    "parallelism.pipeline_parallel_schedule": _schedule,
    "parallelism.context_parallel_degree": same("train.context_parallel_size"),
    "parallelism.expert_parallel_degree": same("train.expert_parallel_size"),
    "parallelism.expert_tensor_parallel_degree": off("see train.expert_parallel_size"),
    **dict.fromkeys(
        (
            "parallelism.enable_async_tensor_parallel",
            "parallelism.pipeline_parallel_microbatch_size",
            "parallelism.context_parallel_rotate_method",
            "parallelism.pipeline_parallel_layers_per_stage",
            "parallelism.disable_loss_parallel",
            "parallelism.enable_compiled_autograd",
            "parallelism.module_fqns_per_model_part",
            "comm.init_timeout_seconds",
            "comm.train_timeout_seconds",
            "comm.trace_buf_size",
        ),
        needless("chosen by the layout; see docs/parallelism.md and train.hang_timeout"),
    ),
    **dict.fromkeys(("checkpoint.enable", "checkpoint.enable_checkpoint"), _enabled),
    "checkpoint.interval": _checkpoints,
    "checkpoint.folder": needless("checkpoints are in train.output_dir"),
    "checkpoint.initial_load_path": _initial,
    **dict.fromkeys(
        ("checkpoint.initial_load_in_hf", "checkpoint.initial_load_model_only"), needless("see initial_load_path")
    ),
    "checkpoint.last_save_in_hf": same("train.save_hf_weights"),
    "checkpoint.last_save_model_only": needless("checkpoints are whole, and the model is exported beside them"),
    "checkpoint.export_dtype": off("exports have the dtype of the model's config"),
    "checkpoint.async_mode": lambda value, source: Result(MAPPED, {"train.save_async": value != "disabled"}),
    "checkpoint.keep_latest_k": same("train.max_checkpoints"),
    "checkpoint.load_step": off("name the folder global_step_N as train.load_checkpoint_path"),
    "checkpoint.exclude_from_loading": off("checkpoints are read whole"),
    "activation_checkpoint.mode": _checkpointing,
    "activation_checkpoint.selective_ac_option": needless("see mode"),
    "validation.enable": _enabled,
    "validation.dataset": _data("data.eval_path"),
    "validation.dataset_path": needless("data.eval_path"),
    "validation.freq": _validation,
    "validation.steps": off("all of data.eval_path is evaluated"),
    **dict.fromkeys(("validation.local_batch_size", "validation.seq_len"), needless("as in training")),
    "float8": off("fp8 is not there"),
    "quantize": off("fp8 is not there"),
    "mx": off("fp8 is not there"),
    "fault_tolerance": off("see --max-restarts and docs/cluster.md"),
    "experimental": off("code of one's own is not run"),
}


def _defaults(source: Source) -> Mapping[str, Any]:
    """torchtitan's defaults that differ from ours."""
    return {
        "training.local_batch_size": 8,
        "training.seq_len": 2048,
        "training.steps": 10000,
        "optimizer.lr": 8e-4,
        "optimizer.beta2": 0.95,
        "optimizer.weight_decay": 0.1,
        "lr_scheduler.warmup_steps": 200,
        "lr_scheduler.decay_type": "linear",
        "lr_scheduler.min_lr_factor": 0.0,
        "parallelism.data_parallel_shard_degree": -1,
        "activation_checkpoint.mode": "selective",
        "checkpoint.interval": 500,
        "checkpoint.last_save_in_hf": False,
        "job.dump_folder": "./outputs",
    }


FRAMEWORK = Framework(
    "torchtitan",
    "a TOML with the sections training and parallelism, optimizer or lr_scheduler",
    lambda tree: (
        isinstance(tree.get("training"), dict) and any(isinstance(tree.get(key), dict) for key in _SECTIONS[2:])
    ),
    _RULES,
    _defaults,
)
