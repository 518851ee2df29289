"""Keys of transformers' TrainingArguments, which LLaMA-Factory, TRL and plain scripts share."""

from __future__ import annotations

from tutti.migrate.rules import (
    Rule,
    accumulation,
    bf16,
    choice,
    decay,
    deepspeed,
    epochs,
    every,
    fsdp,
    max_steps,
    min_lr_rate,
    needless,
    none,
    off,
    optimizer,
    report_to,
    resume,
    same,
    schedule,
    strategy,
    switch,
    warmup_ratio,
    warmup_steps,
)

_UPLOAD = off("upload the folder yourself: hf upload")
_STEP_METRICS = needless("metrics.jsonl has the numbers of every step")
_SEVERAL_RANKS = needless("torch's own, and torchrun's")

_PRECISION: dict[str, Rule] = {
    "bf16": bf16,
    "fp16": switch({"train.enable_mixed_precision": True}, note="bf16 instead of fp16, without a loss scale"),
    "tf32": needless("torch's own setting"),
    **dict.fromkeys(("half_precision_backend", "fp16_opt_level", "fp16_backend"), needless("bf16 by torch")),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), needless("evaluation computes as training does")),
    "auto_find_batch_size": off("`tutti check` says what a run would take"),
}

_STEPS: dict[str, Rule] = {
    "per_device_train_batch_size": same("train.micro_batch_size"),
    "per_device_eval_batch_size": needless("evaluation packs as training does"),
    "eval_accumulation_steps": needless("sums are kept on the device"),
    "gradient_accumulation_steps": accumulation("per_device_train_batch_size", 8),
    "learning_rate": same("train.lr", float),
    "num_train_epochs": epochs,
    "max_steps": max_steps,
    "lr_scheduler_type": schedule,
    "lr_scheduler_kwargs.min_lr": same("train.lr_min", float),
    "lr_scheduler_kwargs.min_lr_rate": min_lr_rate,
    "lr_scheduler_kwargs.num_cycles": off("the cosine falls once"),
    "lr_scheduler_kwargs": needless("empty"),
    "warmup_ratio": warmup_ratio,
    "warmup_steps": warmup_steps,
    "weight_decay": decay,
    "optim": optimizer,
    "optim_args": off("see train.adam_beta1 and those beside it"),
    "optim_target_modules": off("AdamW is used"),
    "adam_beta1": same("train.adam_beta1", float),
    "adam_beta2": same("train.adam_beta2", float),
    "adam_epsilon": same("train.adam_eps", float),
    "max_grad_norm": same("train.max_grad_norm", float),
    "neftune_noise_alpha": off("no noise is added"),
    "label_smoothing_factor": off("targets are not smoothed"),
    "average_tokens_across_devices": needless("the loss is the mean over all trained tokens of a step in any case"),
    "seed": same("train.seed"),
    "data_seed": none("train.seed is that of the data's order as well"),
    "full_determinism": same("train.enable_full_determinism"),
    "gradient_checkpointing": same("train.enable_gradient_checkpointing"),
    "gradient_checkpointing_kwargs.use_reentrant": same("train.enable_reentrant"),
    "torch_compile": same("train.enable_compile", bool),
    "torch_compile_backend": choice({"inductor": {}}, "inductor is used"),
    "torch_compile_mode": off("inductor's default mode is used"),
    "use_liger_kernel": needless("head and loss are fused in chunks in any case"),
    "liger_kernel_config": needless("head and loss are fused in chunks in any case"),
    "torch_empty_cache_steps": same("train.empty_cache_steps"),
}

_OUTPUT: dict[str, Rule] = {
    "output_dir": same("train.output_dir"),
    "overwrite_output_dir": off(
        "a folder that holds a run is never written over; choose another, or go on with the run"
    ),
    "logging_dir": needless("everything is in train.output_dir"),
    "logging_steps": same("train.log_steps", lambda value: max(1, int(value))),
    "logging_strategy": choice({"steps": {}}, "by train.log_steps"),
    "logging_first_step": needless("the first step is in the log"),
    "logging_nan_inf_filter": needless(
        "steps that are not finite are left out and counted; see train.max_nonfinite_steps"
    ),
    **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm"), needless("rank 0 speaks")),
    **dict.fromkeys(("include_num_input_tokens_seen", "include_tokens_per_second"), _STEP_METRICS),
    "save_steps": every("save"),
    "save_strategy": strategy("save"),
    "save_total_limit": same("train.max_checkpoints", lambda value: value or 0),
    "save_only_model": off("checkpoints are whole, so that they can be resumed; see train.hf_save_steps"),
    "save_safetensors": needless("exports are safetensors"),
    "save_on_each_node": needless("each rank writes what is its own"),
    "resume_from_checkpoint": resume,
    "eval_strategy": strategy("eval"),
    "evaluation_strategy": strategy("eval"),
    "eval_steps": every("eval"),
    "eval_delay": off("evaluation begins with the first that is due"),
    "eval_on_start": off("evaluation comes after a step"),
    "load_best_model_at_end": switch(
        {"train.keep_best": True},
        note="the last model is exported; with train.max_checkpoints the checkpoint of lowest evaluation loss is kept, "
        "for `tutti export`",
    ),
    "metric_for_best_model": choice({"eval_loss": {}, "loss": {}}, "the evaluation loss says which is best"),
    "greater_is_better": off("the lowest evaluation loss is the best"),
    "prediction_loss_only": needless("the loss is evaluated"),
    "report_to": report_to,
    "run_name": same("train.wandb_name"),
    "push_to_hub": _UPLOAD,
    **dict.fromkeys(("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_revision"), _UPLOAD),
}

_DATA: dict[str, Rule] = {
    "dataloader_num_workers": same("data.num_workers"),
    "dataloader_drop_last": same("data.drop_last"),
    "dataloader_pin_memory": same("data.pin_memory"),
    "dataloader_prefetch_factor": same("data.prefetch_factor"),
    "dataloader_persistent_workers": needless("workers live as long as the run"),
    "group_by_length": off("packing (train.dyn_bsz) makes padding, and so grouping, needless"),
    "length_column_name": needless("lengths are counted"),
    "remove_unused_columns": needless("other columns are ignored"),
    "label_names": off("labels follow from data.data_type"),
    "split_batches": needless("see train.global_batch_size"),
    "ignore_data_skip": off("a run that is resumed goes on in the data where it was"),
}

_PLACE: dict[str, Rule] = {
    "do_train": choice({True: {}}, "`tutti train` trains; evaluation alone is not there"),
    "do_eval": needless("see train.eval_steps and train.eval_epochs"),
    "do_predict": off("see `tutti infer`"),
    "deepspeed": deepspeed,
    "ddp_timeout": needless("train.hang_timeout is how long ranks wait for each other"),
    "ddp_find_unused_parameters": needless("parameters without a gradient are found by themselves"),
    **dict.fromkeys(("ddp_backend", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "local_rank"), _SEVERAL_RANKS),
    "use_cpu": switch({"train.init_device": "cpu"}),
    "no_cuda": switch({"train.init_device": "cpu"}),
    "accelerator_config": off("see train.* for the layout"),
}

FSDP: dict[str, Rule] = {
    "fsdp": fsdp,
    "fsdp_version": needless("FSDP2 is used"),
    "fsdp_config.offload_params": same("train.enable_fsdp_offload"),
    "fsdp_config.fsdp_offload_params": same("train.enable_fsdp_offload"),
    "fsdp_config.cpu_ram_efficient_loading": switch({"train.init_device": "meta"}),
    "fsdp_config.fsdp_cpu_ram_efficient_loading": switch({"train.init_device": "meta"}),
    "fsdp_config.reshard_after_forward": same("train.enable_full_shard"),
    "fsdp_config.fsdp_reshard_after_forward": same("train.enable_full_shard"),
    "fsdp_config.activation_checkpointing": same("train.enable_gradient_checkpointing"),
    "fsdp_config.fsdp_activation_checkpointing": same("train.enable_gradient_checkpointing"),
    **{
        f"fsdp_config.{prefix}{key}": needless("the blocks are the units, and checkpoints are sharded")
        for prefix in ("", "fsdp_")
        for key in (
            "auto_wrap_policy",
            "transformer_layer_cls_to_wrap",
            "state_dict_type",
            "final_state_dict_type",
            "limit_all_gathers",
            "sync_module_states",
            "use_orig_params",
            "backward_prefetch",
            "forward_prefetch",
            "min_num_params",
            "xla",
            "xla_fsdp_v2",
            "xla_fsdp_grad_ckpt",
            "version",
            "sharding_strategy",
        )
    },
}
"""The keys of FSDP, which Axolotl has as well."""

TRAINER: dict[str, Rule] = {**_STEPS, **_PRECISION, **_OUTPUT, **_DATA, **_PLACE, **FSDP}
