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
    changed,
    choice,
    frozen,
    model_path,
    names,
    needless,
    none,
    off,
    quantized,
    same,
    switch,
)
from tutti.migrate.trainer import TRAINER


def _files(key: str) -> Rule:
    """Data sets are names in dataset_info.json; here they are files."""

    def rule(value: Any, source: Source) -> Result:
        folder = Path(str(source.get("dataset_dir", "data")))
        registered = _registered(source.folder / folder)
        paths: list[str] = []
        notes: list[str] = []
        columns: dict[str, None] = {}
        for name in names(value):
            entry = registered.get(name, {})
            file = entry.get("file_name")
            paths.append(str(folder / (file or f"{name}.json")))
            if file is None:
                notes.append(f"{name}: a file is expected at {paths[-1]}")
            column = (entry.get("columns") or {}).get("messages", "messages")
            if column not in ("messages", "conversations"):
                columns[column] = None
            left = [item for item in entry if item not in ("file_name", "formatting")]
            if left:
                notes.append(f"{name}: {', '.join(left)} not read; the shape of a row is detected (docs/data.md)")
        ours = {key: ",".join(paths)} | ({"data.text_keys": ",".join(columns)} if columns else {})
        return Result(CHANGED, ours, "; ".join(notes) or "files instead of names in dataset_info.json")

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
    kinds = {"sft": "conversation", "pt": "plaintext", "dpo": "dpo", "rm": "reward"}
    if value not in kinds:
        return Result(NONE, note="pretraining, fine-tuning, reward models and preferences (dpo) are there")
    ours: dict[str, Any] = {"data.data_type": kinds[value]}
    if value == "pt":
        ours["data.text_keys"] = "text,content_split"
    return Result(MAPPED, ours)


def _method(value: Any, source: Source) -> Result:
    if value in ("full", "lora"):
        return Result(MAPPED, {"train.architecture": value})
    note = "all weights are trained, those that train.freeze leaves, or adapters (train.architecture lora)"
    return Result(NONE, note=note)


def _is_adapted(source: Source) -> bool:
    return source.get("finetuning_type", "lora") == "lora"


def _targets(value: Any, source: Source) -> Result:
    if value == "all":
        return Result(MAPPED, note="every linear layer, as by default here")
    return Result(MAPPED, {"train.lora_targets": names(value)})


def _packing(value: Any, source: Source) -> Result:
    if not value and not source.get("neat_packing"):
        return Result(MAPPED, {"train.dyn_bsz": False})
    note = "whole samples are packed and never see each other, as with neat_packing"
    return Result(MAPPED if source.get("neat_packing") else CHANGED, {"train.dyn_bsz": True}, note)


def _alpha(value: Any, source: Source) -> Result:
    return Result(MAPPED, {"train.lora_alpha": float(value)})


_FROZEN = {
    "freeze_vision_tower": ["towers"],
    "freeze_multi_modal_projector": ["projectors"],
    "freeze_language_model": ["language_model"],
}
_FROZEN_BY_DEFAULT = ("freeze_vision_tower", "freeze_multi_modal_projector")
_BOUNDS = ("image_min_pixels", "image_max_pixels", "video_min_pixels", "video_max_pixels")


_OTHER_OPTIMIZERS = tuple(
    f"{name}_{key}"
    for name, keys in {
        "galore": ("target", "rank", "update_interval", "scale", "proj_type", "layerwise"),
        "apollo": ("target", "rank", "update_interval", "scale", "proj", "proj_type", "scale_type", "layerwise"),
        "badam": ("mode", "start_block", "switch_mode", "switch_interval", "update_ratio", "mask_mode", "verbose"),
    }.items()
    for key in keys
)
_OTHER_STAGES = (
    *(f"ppo_{key}" for key in ("buffer_size", "epochs", "score_norm", "target", "whiten_rewards")),
    *(f"kto_{key}" for key in ("chosen_weight", "rejected_weight")),
    *(f"reward_model{key}" for key in ("", "_adapters", "_quantization_bit", "_type")),
    "simpo_gamma",
)


def _takes_media(source: Source) -> bool:
    """True if a file has settings that only a model of images or video makes sense of."""
    names = (*_FROZEN, *_BOUNDS, "video_fps", "video_maxlen", "media_dir")
    return any(source.values.get(name) is not None for name in names)


def _frozen(value: Any, source: Source) -> Result:
    if _is_adapted(source):
        note = "adapters alone are trained, those of the language model; train.lora_targets names layers of others"
        return Result(MAPPED if value else CHANGED, note=note)
    return frozen(_FROZEN, _FROZEN_BY_DEFAULT)(value, source)


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
    **TRAINER,
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
    **dict.fromkeys(
        ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
        none("train.freeze names what stays as it is, by patterns such as model.layers.1?.*"),
    ),
    "use_llama_pro": off("blocks are not added"),
    **dict.fromkeys(_FROZEN, _frozen),
    **{name: same(f"data.{name}") for name in _BOUNDS},
    "video_fps": same("data.video_fps", float),
    "video_maxlen": same("data.video_max_frames"),
    "image_do_pan_and_scan": off("set it in the model's preprocessor_config.json"),
    "crop_to_patches": off("set it in the model's preprocessor_config.json"),
    "use_audio_in_video": same("data.audio_in_video", bool),
    "audio_sampling_rate": needless("that of the model's processor"),
    **dict.fromkeys(("use_galore", "use_badam", "use_apollo", "use_adam_mini"), off("AdamW is used")),
    **dict.fromkeys(_OTHER_OPTIMIZERS, needless("it goes with an optimizer that is not there")),
    "use_muon": switch({"train.optimizer": "muon"}, note=MUON_NOTE),
    "pref_beta": same("train.dpo_beta", float),
    "pref_loss": choice(
        {"sigmoid": {"train.dpo_loss": "sigmoid"}, "ipo": {"train.dpo_loss": "ipo"}},
        "the losses sigmoid and ipo are there",
    ),
    "pref_ftx": off("no supervised loss is added"),
    "dpo_label_smoothing": same("train.dpo_label_smoothing", float),
    "pref_bco_weight": off("the losses sigmoid and ipo are there"),
    "ld_alpha": off("the losses sigmoid and ipo are there"),
    **dict.fromkeys(
        ("ref_model", "ref_model_adapters", "ref_model_quantization_bit"),
        off("the model as it is when training starts is the reference"),
    ),
    **dict.fromkeys(_OTHER_STAGES, needless("it goes with a stage that is not there")),
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
    "eval_packing": needless("evaluation packs as training does"),
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
    "disable_shuffling": lambda value, source: Result(MAPPED, {"data.shuffle": not value}),
    "plot_loss": needless("report.html has the charts"),
    "early_stopping_steps": same("train.early_stopping_patience"),
    "data_shared_file_system": needless("rank 0 of each machine prepares what is cached"),
    "print_param_status": needless("`tutti check` shows the model"),
    "use_swanlab": switch({"train.trackers": ["swanlab"]}),
    "swanlab_project": same("train.wandb_project"),
    "swanlab_run_name": same("train.wandb_name"),
    **dict.fromkeys(
        ("swanlab_workspace", "swanlab_mode", "swanlab_api_key", "swanlab_logdir"),
        off("set it in swanlab's environment (SWANLAB_...)"),
    ),
    **dict.fromkeys(
        ("infer_backend", "infer_dtype", "vllm_maxlen", "vllm_gpu_util"), needless("`tutti infer` generates")
    ),
    **dict.fromkeys(
        ("export_dir", "export_size", "export_device", "export_legacy_format"), needless("see `tutti export`")
    ),
    "hf_hub_token": needless("HF_TOKEN and `hf auth login` are honoured in any case"),
    "fp8": off("fp8 is not there"),
    "use_mca": off("train.*_parallel_size divide a model"),
    "pure_bf16": switch({"train.enable_mixed_precision": False}),
    "compute_accuracy": off("the loss alone is evaluated"),
    "max_new_tokens": same("infer.max_tokens"),
    "temperature": same("infer.temperature", float),
    "top_p": same("infer.top_p", float),
    "do_sample": same("infer.do_sample"),
    "top_k": same("infer.top_k"),
    "repetition_penalty": same("infer.repetition_penalty", float),
    **dict.fromkeys(
        ("num_beams", "length_penalty", "max_length"), off("answers are sampled, or greedy; see infer.max_tokens")
    ),
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
    if source.get("stage") == "pt":
        defaults["packing"] = True
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
