"""LLaMA-Factory: flat keys, those of transformers' trainer among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutti.migrate.rules import (
    CHANGED,
    MAPPED,
    MUON_NOTE,
    NONE,
    Framework,
    Result,
    Rule,
    Source,
    accumulation,
    bf16,
    changed,
    choice,
    deepspeed,
    epochs,
    every,
    frozen,
    max_steps,
    model_path,
    names,
    needless,
    none,
    off,
    optimizer,
    quantized,
    report_to,
    same,
    schedule,
    strategy,
    switch,
    warmup_steps,
)


def _files(key: str) -> Rule:
    """Data sets are names in dataset_info.json; here they are files."""

    def rule(value: Any, source: Source) -> Result:
        folder = Path(str(source.get("dataset_dir", "data")))
        registered = _registered(source.folder / folder)
        paths, notes = [], []
        for name in names(value):
            entry = registered.get(name, {})
            file = entry.get("file_name")
            paths.append(str(folder / (file or f"{name}.json")))
            if file is None:
                notes.append(f"{name}: a file is expected at {paths[-1]}")
            left = [item for item in entry if item not in ("file_name", "formatting")]
            if left:
                notes.append(f"{name}: {', '.join(left)} not read; the shape of a row is detected (docs/data.md)")
        return Result(
            CHANGED, {key: ",".join(paths)}, "; ".join(notes) or "files instead of names in dataset_info.json"
        )

    return rule


def _registered(folder: Path) -> dict[str, Any]:
    try:
        tree = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: entry for name, entry in tree.items() if isinstance(entry, dict)} if isinstance(tree, dict) else {}


def _template(value: Any, source: Source) -> Result:
    name = str(value)
    if name in ("chatml", "llama2"):
        return Result(MAPPED, {"data.chat_template": name})
    note = "the template in the tokenizer's own files is used, which for a chat model is this one"
    return Result(CHANGED, {"data.chat_template": "default"}, note)


def _stage(value: Any, source: Source) -> Result:
    kinds = {"sft": "conversation", "pt": "plaintext", "dpo": "dpo"}
    if value not in kinds:
        return Result(NONE, note="pretraining, fine-tuning and preferences (dpo) are there")
    ours: dict[str, Any] = {"data.data_type": kinds[value]}
    if value == "pt":
        ours["data.text_keys"] = "text,content_split"
    return Result(MAPPED, ours)


def _method(value: Any, source: Source) -> Result:
    if value in ("full", "lora"):
        return Result(MAPPED, {"train.architecture": value})
    return Result(NONE, note="all weights are trained, or adapters (train.architecture lora)")


def _is_adapted(source: Source) -> bool:
    return source.get("finetuning_type", "lora") == "lora"


def _targets(value: Any, source: Source) -> Result:
    if value == "all":
        return Result(MAPPED, note="every linear layer, as by default here")
    return Result(MAPPED, {"train.lora_targets": names(value)})


def _packing(value: Any, source: Source) -> Result:
    if not value:
        return Result(MAPPED, {"train.dyn_bsz": False})
    note = "whole samples are packed and never see each other, as with neat_packing"
    return Result(MAPPED if source.get("neat_packing") else CHANGED, {"train.dyn_bsz": True}, note)


def _alpha(value: Any, source: Source) -> Result:
    return Result(MAPPED, {"train.lora_alpha": float(value)})


def _resume(value: Any, source: Source) -> Result:
    if not value:
        return Result(MAPPED, note="off, and so it is here")
    if value is True:
        note = "the newest checkpoint that Tutti wrote to train.output_dir, if there is one"
        return Result(CHANGED, {"train.load_checkpoint_path": "auto"}, note)
    return Result(NONE, note="its checkpoints cannot be resumed from: name the folder as model.model_path instead")


_FROZEN = {
    "freeze_vision_tower": ["towers"],
    "freeze_multi_modal_projector": ["projectors"],
    "freeze_language_model": ["language_model"],
}
_FROZEN_BY_DEFAULT = ("freeze_vision_tower", "freeze_multi_modal_projector")
_BOUNDS = ("image_min_pixels", "image_max_pixels", "video_min_pixels", "video_max_pixels")


def _takes_media(source: Source) -> bool:
    """True if a file has settings that only a model of images or video makes sense of."""
    names = (*_FROZEN, *_BOUNDS, "video_fps", "video_maxlen", "media_dir")
    return any(source.values.get(name) is not None for name in names)


def _frozen(value: Any, source: Source) -> Result:
    if _is_adapted(source):
        note = "adapters alone are trained, those of the language model; train.lora_targets names layers of others"
        return Result(MAPPED if value else CHANGED, note=note)
    return frozen(_FROZEN, _FROZEN_BY_DEFAULT)(value, source)


_PRECISION = {
    "bf16": bf16,
    "fp16": switch({"train.enable_mixed_precision": True}, note="bf16 instead of fp16, without a loss scale"),
    "pure_bf16": switch({"train.enable_mixed_precision": False}),
    "tf32": needless("torch's own setting"),
}
_ATTENTION = choice(
    {
        "auto": {"model.attn_implementation": "flash_attention_2"},
        "fa2": {"model.attn_implementation": "flash_attention_2"},
        "fa3": {"model.attn_implementation": "flash_attention_3"},
        "sdpa": {"model.attn_implementation": "sdpa"},
        "disabled": {"model.attn_implementation": "eager"},
    },
    "see model.attn_implementation",
)

_RULES: dict[str, Rule] = {
    "model_name_or_path": model_path("model_revision"),
    "adapter_name_or_path": same("model.adapter_path"),
    "trust_remote_code": off("code in a model's folder is never run; the class must be one of transformers'"),
    "cache_dir": off("the environment variable HF_HOME says where downloads are kept"),
    "model_revision": needless("model.model_path names it, after an @"),
    "use_fast_tokenizer": needless("tokenizers are fast in any case"),
    "resize_vocab": off("the vocabulary stays as it is"),
    "new_special_tokens": off("the vocabulary stays as it is"),
    "split_special_tokens": off("special tokens in a text are read as such"),
    "rope_scaling": off("set it in the model's config.json"),
    "flash_attn": _ATTENTION,
    "shift_attn": off("it has no counterpart"),
    "use_unsloth": off("head and loss are fused and blocks can be compiled; see docs/recipes.md"),
    "use_unsloth_gc": off("see train.enable_activation_offload"),
    "enable_liger_kernel": needless("head and loss are fused in chunks in any case"),
    "moe_aux_loss_coef": none("set router_aux_loss_coef and output_router_logits in the model's config.json"),
    "disable_gradient_checkpointing": lambda value, source: Result(
        MAPPED, {"train.enable_gradient_checkpointing": not value}
    ),
    "gradient_checkpointing": same("train.enable_gradient_checkpointing"),
    "gradient_checkpointing_kwargs.use_reentrant": same("train.enable_reentrant"),
    "use_reentrant_gc": same("train.enable_reentrant"),
    "upcast_layernorm": needless("parameters are held in fp32, with mixed precision"),
    "upcast_lmhead_output": needless("the loss is computed in fp32"),
    "train_from_scratch": off("leave model.model_path out, and name the folder as model.config_path"),
    "low_cpu_mem_usage": needless("see train.init_device"),
    "quantization_bit": quantized({4: "nf4", 8: "int8"}, _is_adapted),
    "quantization_method": choice({"bnb": {}, "bitsandbytes": {}}, "weights are quantized by bitsandbytes"),
    "quantization_type": choice({"nf4": {}}, "4 bits are nf4"),
    "double_quantization": needless("see quantization_bit"),
    "stage": _stage,
    "do_train": choice({True: {}}, "`tutti train` trains; evaluation alone is not there"),
    "do_eval": needless("see train.eval_steps and train.eval_epochs"),
    "do_predict": off("see `tutti infer`"),
    "predict_with_generate": off("see train.sample_prompts_path, and `tutti infer`"),
    "finetuning_type": _method,
    "lora_rank": same("train.lora_rank"),
    "lora_alpha": _alpha,
    "lora_dropout": same("train.lora_dropout", float),
    "lora_target": _targets,
    "additional_target": same("train.lora_full_modules", names),
    "use_rslora": same("train.lora_rslora"),
    "use_dora": same("train.lora_dora"),
    "loraplus_lr_ratio": off("A and B learn at the same rate"),
    "pissa_init": off("A is drawn at random, and B is zero"),
    "create_new_adapter": off("the adapter that is named goes on being trained"),
    "freeze_trainable_layers": off("see train.architecture lora"),
    **dict.fromkeys(_FROZEN, _frozen),
    **{name: same(f"data.{name}") for name in _BOUNDS},
    "video_fps": same("data.video_fps", float),
    "video_maxlen": same("data.video_max_frames"),
    "image_do_pan_and_scan": off("set it in the model's preprocessor_config.json"),
    "crop_to_patches": off("set it in the model's preprocessor_config.json"),
    "use_audio_in_video": off("the sound of a video is left out"),
    "audio_sampling_rate": needless("that of the model's processor"),
    "use_galore": off("AdamW is used"),
    "use_badam": off("AdamW is used"),
    "use_apollo": off("AdamW is used"),
    "use_muon": switch({"train.optimizer": "muon"}, note=MUON_NOTE),
    "use_adam_mini": off("AdamW is used"),
    "pref_beta": same("train.dpo_beta", float),
    "pref_loss": choice(
        {"sigmoid": {"train.dpo_loss": "sigmoid"}, "ipo": {"train.dpo_loss": "ipo"}},
        "the losses sigmoid and ipo are there",
    ),
    "pref_ftx": off("no supervised loss is added"),
    "dpo_label_smoothing": same("train.dpo_label_smoothing", float),
    "ref_model": off("the model as it is when training starts is the reference"),
    "dataset": _files("data.train_path"),
    "eval_dataset": _files("data.eval_path"),
    "dataset_dir": needless("the data files' paths have it"),
    "media_dir": same("data.media_root"),
    "template": _template,
    "enable_thinking": none("set chat_template_kwargs in the rows; see docs/data.md"),
    "default_system": none("put a system message into the rows"),
    "tool_format": needless("the chat template writes tools"),
    "cutoff_len": changed("the end of a longer conversation is kept, not its beginning", "data.max_seq_len"),
    "train_on_prompt": off('set "loss_mask": 1 in the messages to train on; see docs/data.md'),
    "mask_history": off('set "loss_mask": 0 in the messages not to train on; see docs/data.md'),
    "packing": _packing,
    "neat_packing": switch({"train.dyn_bsz": True}),
    "streaming": switch({"data.datasets_type": "iterable"}, {"data.datasets_type": "mapping"}),
    "buffer_size": same("data.shuffle_buffer_size"),
    "mix_strategy": choice({"concat": {}}, "write a YAML of sources with weights, and name it as data.train_path"),
    "interleave_probs": none("weights of a YAML of sources; see docs/data.md"),
    "max_samples": none("all rows are used; train.max_steps ends a trial early"),
    "val_size": off("rows to evaluate on have a file of their own: data.eval_path, with train.eval_steps"),
    "tokenized_path": needless("rows are tokenised while the run goes on"),
    "overwrite_cache": needless("rows are tokenised while the run goes on"),
    "preprocessing_num_workers": needless("rows are tokenised while the run goes on, by data.num_workers processes"),
    "preprocessing_batch_size": needless("rows are tokenised while the run goes on"),
    "dataloader_num_workers": same("data.num_workers"),
    "dataloader_drop_last": same("data.drop_last"),
    "dataloader_pin_memory": same("data.pin_memory"),
    "dataloader_prefetch_factor": same("data.prefetch_factor"),
    "disable_shuffling": lambda value, source: Result(MAPPED, {"data.shuffle": not value}),
    "group_by_length": off("packing makes padding, and so grouping, needless"),
    "output_dir": same("train.output_dir"),
    "logging_dir": needless("everything is in train.output_dir"),
    "logging_steps": same("train.log_steps", lambda value: max(1, int(value))),
    "plot_loss": needless("report.html has the charts"),
    "overwrite_output_dir": off(
        "a folder that holds a run is never written over; choose another, or go on with the run"
    ),
    "save_steps": every("save"),
    "save_strategy": strategy("save"),
    "save_total_limit": same("train.max_checkpoints"),
    "save_only_model": off("checkpoints are whole, so that they can be resumed; see train.hf_save_steps"),
    "resume_from_checkpoint": _resume,
    "report_to": report_to,
    "run_name": same("train.wandb_name"),
    "per_device_train_batch_size": same("train.micro_batch_size"),
    "per_device_eval_batch_size": needless("evaluation packs as training does"),
    "gradient_accumulation_steps": accumulation("per_device_train_batch_size", 8),
    "learning_rate": same("train.lr", float),
    "num_train_epochs": epochs,
    "max_steps": max_steps,
    "lr_scheduler_type": schedule,
    "lr_scheduler_kwargs.min_lr": same("train.lr_min", float),
    "warmup_ratio": same("train.lr_warmup_ratio", float),
    "warmup_steps": warmup_steps,
    "weight_decay": changed(
        "norms and biases decay as well, unless train.no_decay_params names them", "train.weight_decay", convert=float
    ),
    "optim": optimizer,
    "adam_beta1": same("train.adam_beta1", float),
    "adam_beta2": same("train.adam_beta2", float),
    "adam_epsilon": same("train.adam_eps", float),
    "max_grad_norm": same("train.max_grad_norm", float),
    "neftune_noise_alpha": off("no noise is added"),
    "label_smoothing_factor": off("targets are not smoothed"),
    **_PRECISION,
    "seed": same("train.seed"),
    "data_seed": none("train.seed is that of the data's order as well"),
    "full_determinism": same("train.enable_full_determinism"),
    "torch_compile": same("train.enable_compile"),
    "ddp_timeout": needless("torch's own"),
    "ddp_find_unused_parameters": needless("FSDP2 does not ask"),
    "local_rank": needless("torchrun sets it"),
    "deepspeed": deepspeed,
    "fsdp": lambda value, source: Result(CHANGED, {"train.data_parallel_mode": "fsdp2"}, "FSDP2, full sharding"),
    "eval_strategy": strategy("eval"),
    "evaluation_strategy": strategy("eval"),
    "eval_steps": every("eval"),
    "eval_on_start": off("evaluation comes after a step"),
    "load_best_model_at_end": off("the last model is exported; the report shows the best evaluation"),
    "metric_for_best_model": needless("the report shows the best evaluation"),
    "compute_accuracy": off("the loss alone is evaluated"),
    "include_num_input_tokens_seen": needless("metrics.jsonl has tokens"),
    "remove_unused_columns": needless("other columns are ignored"),
    "push_to_hub": off("upload the folder yourself: hf upload"),
    "hub_model_id": off("upload the folder yourself: hf upload"),
    "max_new_tokens": same("infer.max_tokens"),
    "temperature": same("infer.temperature", float),
    "top_p": same("infer.top_p", float),
    "do_sample": same("infer.do_sample"),
    "ray_run_name": off("runs are started by torchrun"),
    "ray_num_workers": off("runs are started by torchrun"),
}


def _defaults(source: Source) -> Mapping[str, Any]:
    """The trainer's defaults that are not ours."""
    defaults: dict[str, Any] = {
        "stage": "sft",
        "finetuning_type": "lora",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "linear",
        "save_steps": 500,
        "dataloader_drop_last": False,
        "disable_gradient_checkpointing": False,
    }
    if source.get("max_steps", 0) and source.get("max_steps") > 0:
        del defaults["num_train_epochs"]
    if not any(source.get(key) for key in ("bf16", "fp16", "pure_bf16")):
        defaults["bf16"] = False
    if _takes_media(source):
        defaults |= dict.fromkeys(_FROZEN_BY_DEFAULT, True) | {
            "image_max_pixels": 768 * 768,
            "video_max_pixels": 256 * 256,
        }
        defaults |= {"video_fps": 2.0, "video_maxlen": 128}
    if source.get("save_strategy"):
        del defaults["save_steps"]
    if source.get("finetuning_type", "lora") == "lora":
        rank = source.get("lora_rank", 8)
        defaults |= {"lora_rank": 8, "lora_alpha": 2 * rank}
    return defaults


FRAMEWORK = Framework(
    "LLaMA-Factory",
    "model_name_or_path with stage, dataset, template or finetuning_type",
    lambda tree: (
        "model_name_or_path" in tree and any(key in tree for key in ("stage", "dataset", "template", "finetuning_type"))
    ),
    _RULES,
    _defaults,
)
