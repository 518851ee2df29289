"""Axolotl: flat keys, and lists of data sets that each have keys of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tutti.migrate.rules import (
    CHANGED,
    MAPPED,
    NONE,
    Framework,
    Result,
    Rule,
    Source,
    accumulation,
    bf16,
    changed,
    choice,
    decay,
    deepspeed,
    epochs,
    every,
    frozen,
    looks_remote,
    max_steps,
    model_path,
    names,
    needless,
    none,
    off,
    optimizer,
    quantized,
    same,
    schedule,
    strategy,
    switch,
    warmup_ratio,
    warmup_steps,
)
from tutti.migrate.trainer import FSDP

_CHATS = ("chat_template", "sharegpt", "alpaca", "openai", "messages", "instruct", "gpteacher", "chat")
_TAKEN = {"path", "type", "data_files", "ds_type", "split", "field", "name", "revision"}
_FILE_KINDS = ("json", "csv", "parquet", "arrow", "text")


def _never(value: Any) -> bool:
    return False


_AS_HERE: dict[str, Callable[[Any], bool]] = {
    "field_messages": bool,
    "message_property_mappings": lambda value: all(key == column for key, column in value.items()),
    "message_field_role": lambda value: value in ("role", "from"),
    "message_field_content": lambda value: value in ("content", "value"),
    "roles_to_train": lambda value: set(value) <= {"assistant", "gpt", "model"},
    "train_on_eos": lambda value: value == "turn",
    "chat_template": lambda value: value == "tokenizer_default",
}
"""Keys of a data set that mean what is done here in any case, if their value is such."""


def _datasets(key: str) -> Rule:
    """A list of data sets: their paths, and how rows are read, in one setting each for all of them."""

    def rule(value: Any, source: Source) -> Result:
        listed = value if isinstance(value, list) else [value]
        entries = [entry if isinstance(entry, dict) else {"path": entry} for entry in listed]
        paths, notes, kinds = [], [], set()
        for entry in entries:
            files = entry.get("data_files") if entry.get("path") in _FILE_KINDS or entry.get("data_files") else None
            files = names(files) if files else [_on_hub(entry)]
            paths += files
            kinds.add(_kind(entry.get("type"), source))
            left = sorted(str(item) for item in set(entry) - _TAKEN if not _AS_HERE.get(item, _never)(entry[item]))
            if left:
                notes.append(f"{files[0]}: {', '.join(left)} not read; the shape of a row is detected (docs/data.md)")
        ours: dict[str, Any] = {key: ",".join(paths)}
        if key == "data.train_path":
            ours |= _shape(kinds, entries, notes)
        columns = dict.fromkeys(str(entry["field_messages"]) for entry in entries if entry.get("field_messages"))
        if columns and set(columns) - {"messages", "conversations"}:
            ours["data.text_keys"] = ",".join(columns)
        return Result(CHANGED if notes else MAPPED, ours, "; ".join(dict.fromkeys(notes)))

    return rule


def _on_hub(entry: Mapping[str, Any]) -> str:
    """The path of a data set; of one on the hub with revision, subset and split (`org/name@revision:subset/split`)."""
    path, split = str(entry.get("path")), entry.get("split", "train")
    if not looks_remote(path):
        return path
    at = f"@{entry['revision']}" if entry.get("revision") else ""
    return f"{path}{at}:{entry['name']}/{split}" if entry.get("name") else f"{path}{at}:{split}"


def _kind(kind: Any, source: Source) -> str:
    """Our data_type for a data set's type."""
    if source.get("rl") == "dpo":
        return "dpo"
    name = kind if isinstance(kind, str) else "alpaca" if kind is None or isinstance(kind, dict) else str(kind)
    if name.startswith(("completion", "pretrain")):
        return "plaintext"
    return "conversation" if name.startswith(_CHATS) else f"unknown type {name}"


def _shape(kinds: set[str], entries: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    known = sorted(kind for kind in kinds if not kind.startswith("unknown"))
    notes += sorted(f"{kind}: rows must be of a shape in docs/data.md" for kind in kinds - set(known))
    if len(known) > 1:
        notes.append(f"a run has one data_type, not {' and '.join(known)}; bring all rows into one shape")
    ours: dict[str, Any] = {"data.data_type": known[0] if known else "conversation"}
    if ours["data.data_type"] == "plaintext":
        fields = [str(entry["field"]) for entry in entries if entry.get("field")]
        ours["data.text_keys"] = ",".join(dict.fromkeys([*fields, "text"]))
    return ours


def _template(value: Any, source: Source) -> Result:
    name = str(value)
    if name == "tokenizer_default":
        return Result(MAPPED, {"data.chat_template": "default"})
    if name == "chatml":
        return Result(MAPPED, {"data.chat_template": "chatml"})
    if name == "jinja":
        return Result(NONE, note="put the template into a file and name it as data.chat_template")
    note = "the template in the tokenizer's own files is used, which for a chat model is this one"
    return Result(CHANGED, {"data.chat_template": "default"}, note)


def _adapter(value: Any, source: Source) -> Result:
    if not value:
        return Result(MAPPED, note="off, as it is here")
    if value in ("lora", "qlora"):
        return Result(MAPPED, {"train.architecture": "lora"})
    return Result(NONE, note="low-rank adapters are there (lora)")


def _is_adapted(source: Source) -> bool:
    return source.get("adapter") in ("lora", "qlora")


def _checkpointing(value: Any, source: Source) -> Result:
    ours: dict[str, Any] = {"train.enable_gradient_checkpointing": bool(value)}
    if isinstance(value, str) and value.startswith("offload"):
        ours["train.enable_activation_offload"] = True
        return Result(CHANGED, ours, "activations go to host memory, of all that is kept")
    return Result(MAPPED, ours)


def _image_size(value: Any, source: Source) -> Result:
    if value is None:
        return Result(MAPPED, note="images keep their size, and so they do here")
    width, height = value if isinstance(value, list | tuple) else (value, value)
    note = "larger images are made smaller, their aspect kept, to at most as many pixels"
    return Result(CHANGED, {"data.image_max_pixels": int(width) * int(height)}, note)


def _packing(value: Any, source: Source) -> Result:
    return Result(MAPPED, {"train.dyn_bsz": bool(value)})


def _watch(value: Any, source: Source) -> Result:
    return Result(MAPPED, {"train.wandb_project": value, "train.use_wandb": True} if value else {})


def _tracker(value: Any, source: Source) -> Result:
    """A switch for one of several trackers; the setting is that of all that are on."""
    if not value:
        return Result(MAPPED, note="off, as it is here")
    names = ("tensorboard", "mlflow", "comet", "swanlab", "trackio")
    return Result(MAPPED, {"train.trackers": [name for name in names if source.get(f"use_{name}")]})


def _per_epoch(verb: str) -> Rule:
    def rule(value: Any, source: Source) -> Result:
        ours = {f"train.{verb}_steps": 0, f"train.{verb}_epochs": 1 if value else 0}
        if not isinstance(value, int) or value <= 1:
            return Result(MAPPED, ours)
        note = f"once an epoch; for {value} times set train.{verb}_steps (`tutti check` says how many steps there are)"
        return Result(CHANGED, ours, note)

    return rule


def _min_ratio(value: Any, source: Source) -> Result:
    lr_min = float(value) * float(source.get("learning_rate", 0))
    return Result(CHANGED, {"train.lr_min": lr_min}, "a learning rate here, not a part of one")


_ON_HUB = off("upload the folder yourself: hf upload")
_DATA_ONCE = needless("rows are tokenised while the run goes on")
_KERNELS = needless("head and loss are fused in chunks in any case, and other kernels are torch's")

_RULES: dict[str, Rule] = {
    "base_model": model_path("revision_of_model"),
    "base_model_config": same("model.config_path"),
    "tokenizer_config": same("model.tokenizer_path"),
    "model_type": needless("the model's config.json says what it is"),
    "tokenizer_type": needless("the tokenizer's files say what it is"),
    "tokenizer_use_fast": needless("tokenizers are fast in any case"),
    "tokenizer_legacy": needless("the tokenizer's files say what it is"),
    "revision_of_model": needless("model.model_path names it, after an @"),
    "trust_remote_code": off("code in a model's folder is never run; the class must be one of transformers'"),
    "is_falcon_derived_model": needless("the model's config.json says what it is"),
    "is_llama_derived_model": needless("the model's config.json says what it is"),
    "is_qwen_derived_model": needless("the model's config.json says what it is"),
    "is_mistral_derived_model": needless("the model's config.json says what it is"),
    "random_init_weights": off("leave model.model_path out, and name the folder as model.config_path"),
    "resize_token_embeddings_to_32x": off("the vocabulary stays as it is"),
    "special_tokens": off("set them in the tokenizer's own files; the end of a turn is found in the chat template"),
    "tokens": off("the vocabulary stays as it is"),
    "added_tokens_overrides": off("the vocabulary stays as it is"),
    "eot_tokens": needless("the end of a turn is found in the chat template"),
    "overrides_of_model_config": off("set it in the model's config.json"),
    "load_in_8bit": quantized({True: "int8"}, _is_adapted),
    "load_in_4bit": quantized({True: "nf4"}, _is_adapted),
    "gptq": off("the base model is not quantised"),
    "plugins": off("there are no plugins; head and loss are fused in any case"),
    "liger_rope": _KERNELS,
    "liger_rms_norm": _KERNELS,
    "liger_glu_activation": _KERNELS,
    "liger_layer_norm": _KERNELS,
    "liger_fused_linear_cross_entropy": _KERNELS,
    "cut_cross_entropy": _KERNELS,
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "datasets": _datasets("data.train_path"),
    "test_datasets": _datasets("data.eval_path"),
    "pretraining_dataset": _datasets("data.train_path"),
    "val_set_size": off("rows to evaluate on have a file of their own: data.eval_path, with train.eval_steps"),
    "dataset_prepared_path": _DATA_ONCE,
    **dict.fromkeys(("dataset_processes", "dataset_num_proc", "dataset_shard_num"), _DATA_ONCE),
    "dataset_keep_in_memory": _DATA_ONCE,
    "dataset_exact_deduplication": off("rows are taken as they are"),
    "shuffle_merged_datasets": same("data.shuffle"),
    "shuffle_before_merging_datasets": needless("all rows are shuffled together"),
    "curriculum_sampling": switch({"data.shuffle": False}),
    "skip_prepare_dataset": _DATA_ONCE,
    "streaming": switch({"data.datasets_type": "iterable"}, {"data.datasets_type": "mapping"}),
    "dataloader_num_workers": same("data.num_workers"),
    "dataloader_pin_memory": same("data.pin_memory"),
    "dataloader_prefetch_factor": same("data.prefetch_factor"),
    "dataloader_drop_last": same("data.drop_last"),
    "chat_template": _template,
    "chat_template_jinja": none("put the template into a file and name it as data.chat_template"),
    "default_system_message": none("put a system message into the rows"),
    "train_on_inputs": off('set "loss_mask": 1 in the messages to train on; see docs/data.md'),
    "sequence_len": changed("the end of a longer conversation is kept", "data.max_seq_len"),
    "excess_length_strategy": none("a longer conversation keeps its last data.max_seq_len tokens"),
    "sample_packing": _packing,
    "eval_sample_packing": needless("evaluation packs as training does"),
    "sample_packing_eff_est": needless("packing is planned exactly"),
    "sample_packing_group_size": needless("see data.dyn_bsz_buffer_size"),
    "sample_packing_bin_size": needless("as many samples as fit"),
    "multipack_real_batches": needless("a micro batch is one row"),
    "pad_to_sequence_len": same("train.pad_to_length", bool),
    "roles_to_train": none(
        'the assistant\'s turns are trained on; "loss_mask" in a message says otherwise (docs/data.md)'
    ),
    "train_on_eos": choice({"turn": {}}, "the end of each turn that is trained on is trained on as well"),
    "group_by_length": off("packing makes padding, and so grouping, needless"),
    "adapter": _adapter,
    "lora_model_dir": same("model.adapter_path"),
    "lora_r": same("train.lora_rank"),
    "lora_alpha": same("train.lora_alpha", float),
    "lora_dropout": same("train.lora_dropout", float),
    "lora_target_modules": same("train.lora_targets", names),
    "lora_target_linear": needless("every linear layer is adapted by default; train.lora_targets narrows it"),
    "lora_modules_to_save": same("train.lora_full_modules", names),
    "lora_fan_in_fan_out": needless("read off the layer"),
    "peft_use_dora": same("train.lora_dora"),
    "peft_use_rslora": same("train.lora_rslora"),
    "peft_init_lora_weights": choice({True: {}}, "A is drawn at random, and B is zero"),
    "peft_layers_to_transform": none("name the layers by patterns: train.lora_targets (layers.3.*)"),
    "loraplus_lr_ratio": off("A and B learn at the same rate"),
    "relora_steps": off("adapters are not restarted"),
    "rl": choice(
        {"dpo": {"data.data_type": "dpo"}, "ipo": {"data.data_type": "dpo", "train.dpo_loss": "ipo"}},
        "of preferences dpo and ipo are there",
    ),
    "rl_beta": same("train.dpo_beta", float),
    "reward_model": switch({"data.data_type": "reward"}),
    **dict.fromkeys(("dpo_use_weighting", "dpo_norm_loss", "rpo_alpha", "orpo_alpha"), off("dpo and ipo are there")),
    "dpo_label_smoothing": same("train.dpo_label_smoothing", float),
    "trl": off("reinforcement learning is not there"),
    "unfrozen_parameters": off("train.freeze names what stays as it is instead, by patterns such as model.layers.1?.*"),
    "processor_type": needless("the processor in the model's folder is used for rows with media"),
    "processor_config": off("put its files into the model's folder"),
    "image_size": _image_size,
    "image_resize_algorithm": changed("images are resized bicubically"),
    "freeze_mm_modules": frozen({"freeze_mm_modules": ["towers", "projectors"]}),
    "wandb_project": _watch,
    "wandb_name": same("train.wandb_name"),
    "wandb_run_id": same("train.wandb_id"),
    "wandb_entity": off("set WANDB_ENTITY in the environment"),
    "wandb_mode": off("set WANDB_MODE in the environment"),
    "wandb_watch": off("gradients are not recorded one by one"),
    "wandb_log_model": off("models are not uploaded"),
    **dict.fromkeys(("use_tensorboard", "use_mlflow", "use_comet", "use_swanlab", "use_trackio"), _tracker),
    **dict.fromkeys(("mlflow_experiment_name", "comet_project_name", "swanlab_project"), same("train.wandb_project")),
    **dict.fromkeys(
        ("mlflow_tracking_uri", "comet_workspace", "comet_api_key", "swanlab_workspace", "swanlab_mode"),
        off("set it in the tracker's own environment"),
    ),
    "output_dir": same("train.output_dir"),
    "hub_model_id": _ON_HUB,
    "hub_strategy": _ON_HUB,
    "push_dataset_to_hub": _ON_HUB,
    "hf_use_auth_token": needless("HF_TOKEN and `hf auth login` are honoured in any case"),
    "micro_batch_size": same("train.micro_batch_size"),
    "gradient_accumulation_steps": accumulation("micro_batch_size", 1),
    "eval_batch_size": needless("evaluation packs as training does"),
    "auto_find_batch_size": off("`tutti check` says what a run would take"),
    "num_epochs": epochs,
    "max_steps": max_steps,
    "learning_rate": same("train.lr", float),
    "lr_scheduler": schedule,
    "cosine_min_lr_ratio": _min_ratio,
    "cosine_constant_lr_ratio": same("train.lr_decay_ratio", float),
    "warmup_ratio": warmup_ratio,
    "warmup_steps": warmup_steps,
    "optimizer": optimizer,
    "optim_args": off("see train.adam_beta1 and those beside it"),
    "weight_decay": decay,
    "adam_beta1": same("train.adam_beta1", float),
    "adam_beta2": same("train.adam_beta2", float),
    "adam_epsilon": same("train.adam_eps", float),
    "max_grad_norm": same("train.max_grad_norm", float),
    "neftune_noise_alpha": off("no noise is added"),
    "noisy_embedding_alpha": off("no noise is added"),
    "bf16": bf16,
    "fp16": switch({"train.enable_mixed_precision": True}, note="bf16 instead of fp16, without a loss scale"),
    "bfloat16": switch({"train.enable_mixed_precision": False}),
    "float16": switch({"train.enable_mixed_precision": False}, note="everything in bf16, not in fp16"),
    "tf32": needless("torch's own setting"),
    "gradient_checkpointing": _checkpointing,
    "gradient_checkpointing_kwargs.use_reentrant": same("train.enable_reentrant"),
    "activation_offloading": same("train.enable_activation_offload", bool),
    "flash_attention": switch({"model.attn_implementation": "flash_attention_2"}),
    "sdp_attention": switch({"model.attn_implementation": "sdpa"}),
    "xformers_attention": switch(
        {"model.attn_implementation": "sdpa"}, note="torch's own attention instead of xformers'"
    ),
    "eager_attention": switch({"model.attn_implementation": "eager"}),
    "attn_implementation": same("model.attn_implementation"),
    "flex_attention": switch(
        {"model.attn_implementation": "flash_attention_2"}, note="packed attention instead of flex"
    ),
    "s2_attention": off("it has no counterpart"),
    "flash_attn_cross_entropy": _KERNELS,
    "flash_attn_rms_norm": _KERNELS,
    "flash_attn_fuse_qkv": _KERNELS,
    "flash_attn_fuse_mlp": _KERNELS,
    "torch_compile": same("train.enable_compile", bool),
    "torch_compile_backend": choice({"inductor": {}}, "inductor is used"),
    "logging_steps": same("train.log_steps"),
    "eval_steps": every("eval"),
    "eval_strategy": strategy("eval"),
    "evals_per_epoch": _per_epoch("eval"),
    "save_steps": every("save"),
    "save_strategy": strategy("save"),
    "saves_per_epoch": _per_epoch("save"),
    "save_total_limit": same("train.max_checkpoints"),
    "save_only_model": off("checkpoints are whole, so that they can be resumed; see train.hf_save_steps"),
    "save_safetensors": needless("exports are safetensors"),
    "eval_table_size": off("see train.sample_prompts_path"),
    "eval_max_new_tokens": same("train.sample_tokens"),
    "early_stopping_patience": same("train.early_stopping_patience"),
    "loss_watchdog_threshold": off("see train.spike_sigma, and train.max_nonfinite_steps"),
    "loss_watchdog_patience": off("see train.spike_sigma, and train.max_nonfinite_steps"),
    "resume_from_checkpoint": off(
        "its checkpoints cannot be resumed from: name the folder as model.model_path instead"
    ),
    "auto_resume_from_checkpoints": switch(
        {"train.load_checkpoint_path": "auto"}, note="of checkpoints that Tutti wrote"
    ),
    "deepspeed": deepspeed,
    **FSDP,
    "sequence_parallel_degree": changed("a ring of attention blocks", "train.context_parallel_size"),
    "context_parallel_size": changed("a ring of attention blocks", "train.context_parallel_size"),
    "tensor_parallel_size": same("train.tensor_parallel_size"),
    "dp_shard_size": same("train.data_parallel_shard_size"),
    "dp_replicate_size": same("train.data_parallel_replicate_size"),
    "expert_parallel_size": same("train.expert_parallel_size"),
    "heads_k_stride": needless("chosen by the layout"),
    "ring_attn_func": needless("chosen by the layout"),
    "ddp_timeout": needless("torch's own"),
    "local_rank": needless("torchrun sets it"),
    "device_map": off("ranks hold shards; see train.data_parallel_mode"),
    "low_cpu_mem_usage": needless("see train.init_device"),
    "profiler_steps": switch(
        {"train.enable_profiling": True}, note="see train.profile_start_step and profile_end_step"
    ),
    "gc_steps": same("train.gc_steps", lambda value: max(0, int(value))),
    "seed": same("train.seed"),
    "debug": off("see --debug"),
    **dict.fromkeys(
        ("ddp", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "world_size"), needless("chosen by the layout")
    ),
    "gpu_memory_limit": off("`tutti check` says what a run would take"),
    "lora_on_cpu": off("adapters are on the device"),
    "embeddings_skip_upcast": needless("parameters are held in fp32, with mixed precision"),
    "tokenizer_save_jinja_files": needless("exports have chat_template.jinja"),
    "fix_untrained_tokens": off("embeddings are trained as they are"),
    "save_first_step": off("see train.save_steps"),
    "include_tokens_per_second": needless("metrics.jsonl has it"),
    **dict.fromkeys(
        ("lr_quadratic_warmup", "lr_groups", "embedding_lr", "embedding_lr_scale"), off("see train.part_lr")
    ),
    **dict.fromkeys(
        ("do_bench_eval", "do_causal_lm_eval", "eval_causal_lm_metrics"),
        off("the loss is evaluated, and train.sample_prompts"),
    ),
    "strict": needless("an unknown key is an error in any case"),
}


def _defaults(source: Source) -> Mapping[str, Any]:
    """Axolotl's defaults that are not ours."""
    defaults: dict[str, Any] = {
        "sequence_len": 512,
        "sample_packing": False,
        "lr_scheduler": "cosine",
        "gradient_checkpointing": False,
        "output_dir": "./model-out",
    }
    if _is_adapted(source):
        defaults |= {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
    if not any(source.get(key) for key in ("bf16", "fp16", "bfloat16", "float16")):
        defaults["bf16"] = False
    return defaults


FRAMEWORK = Framework("Axolotl", "base_model", lambda tree: "base_model" in tree, _RULES, _defaults)
