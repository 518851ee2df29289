"""transformers' Trainer and TRL: keys of TrainingArguments, and of the scripts around them (`trl sft --config`)."""

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
    looks_remote,
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

_PAIRS = ("beta", "loss_type", "precompute_ref_log_probs", "max_prompt_length", "label_smoothing", "reference_free")
_REWARD = ("center_rewards_coefficient",)
_SCRIPT = ("block_size", "train_file", "preprocessing_num_workers", "config_overrides", "validation_split_percentage")
_SFT = (
    "packing",
    "packing_strategy",
    "assistant_only_loss",
    "completion_only_loss",
    "dataset_text_field",
    "max_length",
)
_OTHERS = {"num_generations": "GRPO", "reward_funcs": "GRPO", "vllm_mode": "GRPO", "desirable_weight": "KTO"}
_PER_ROW = needless("rows are tokenised while the run goes on")
_OF_TRAINING = "the answer's tokens are trained on, in all rows"


def _objective(source: Source) -> str:
    """The data_type of a file, by the keys that only one of TRL's trainers has."""
    kinds = ((_PAIRS, "dpo"), (_REWARD, "reward"), (_SCRIPT, "plaintext"), (_SFT, "conversation"))
    return next((kind for keys, kind in kinds if any(key in source.values for key in keys)), "conversation")


def _kind(value: Any, source: Source) -> Result:
    """The data_type, which follows from whose file it is; a column of text alone is plain text."""
    ours: dict[str, Any] = {"data.data_type": value}
    field = source.get("dataset_text_field")
    if value == "conversation" and field is not None:
        note = "rows that have the column messages (or prompt and completion) are data_type conversation"
        return Result(CHANGED, {"data.data_type": "plaintext", "data.text_keys": field}, note)
    if value == "plaintext":
        ours["data.text_keys"] = "text,content_split"
    return Result(CHANGED, ours, "by the keys of the file")


def _dataset(key: str, split_key: str, split: str) -> Rule:
    """A data set of the hub or a folder, with the configuration and the split that other keys name."""

    def rule(value: Any, source: Source) -> Result:
        if not looks_remote(str(value)):
            return Result(MAPPED, {key: value})
        at, part = source.get("dataset_config", source.get("dataset_config_name")), source.get(split_key, split)
        path = f"{value}:{at}/{part}" if at else f"{value}:{part}"
        return Result(MAPPED, {key: path} | _held_out(value, at, source))

    return rule


def _held_out(name: Any, at: Any, source: Source) -> dict[str, Any]:
    """The split to evaluate on, where the file evaluates."""
    if source.get("eval_strategy", "no") in (False, "no"):
        return {}
    split = source.get("dataset_test_split", "test")
    return {"data.eval_path": f"{name}:{at}/{split}" if at else f"{name}:{split}"}


def _attention(value: Any, source: Source) -> Result:
    name = str(value)
    for ours in ("flash_attention_2", "flash_attention_3", "sdpa", "eager"):
        if name == ours:
            return Result(MAPPED, {"model.attn_implementation": ours})
    if "flash" in name:
        return Result(
            CHANGED, {"model.attn_implementation": "flash_attention_2"}, "the package, or torch's own kernels"
        )
    return Result(NONE, note="see model.attn_implementation")


def _packing(value: Any, source: Source) -> Result:
    if not value:
        return Result(MAPPED, {"train.dyn_bsz": False})
    if source.get("packing_strategy", "bfd") == "wrapped":
        return Result(CHANGED, {"train.dyn_bsz": True}, "samples are packed whole, and never see each other")
    return Result(MAPPED, {"train.dyn_bsz": True})


def _assistant_only(value: Any, source: Source) -> Result:
    if value:
        return Result(MAPPED, note="the assistant's turns are trained on, as by default here")
    note = "all of a conversation is trained on there, the assistant's turns here (others by loss_mask: docs/data.md)"
    return Result(CHANGED, {}, note)


def _peft(value: Any, source: Source) -> Result:
    return Result(MAPPED, {"train.architecture": "lora" if value else "full"})


def _is_adapted(source: Source) -> bool:
    return bool(source.get("use_peft"))


def _targets(value: Any, source: Source) -> Result:
    if not _is_adapted(source):
        return Result(MAPPED, note="use_peft is off")
    if value in ("all-linear", ["all-linear"]):
        return Result(MAPPED, note="every linear layer, as by default here")
    return Result(MAPPED, {"train.lora_targets": names(value)})


def _adapter(name: str, convert: Any = lambda value: value) -> Rule:
    """A setting of adapters, which is of no effect without them."""
    return lambda value, source: (
        Result(MAPPED, {name: convert(value)}) if _is_adapted(source) else Result(MAPPED, note="use_peft is off")
    )


_MODEL: dict[str, Rule] = {
    "model_name_or_path": model_path("model_revision"),
    "model_revision": needless("model.model_path names it, after an @"),
    "config_name": same("model.config_path"),
    "tokenizer_name": same("model.tokenizer_path"),
    "config_overrides": off("set it in the model's config.json"),
    "model_type": needless("the model's config.json says what it is"),
    "trust_remote_code": off("code in a model's folder is never run; the class must be one of transformers'"),
    "attn_implementation": _attention,
    **dict.fromkeys(
        ("dtype", "torch_dtype", "model_init_kwargs"),
        changed("parameters are fp32 with mixed precision, and bf16 with train.enable_mixed_precision: false"),
    ),
    **dict.fromkeys(
        ("low_cpu_mem_usage", "use_fast_tokenizer", "device_map"), needless("see train.init_device and docs/models.md")
    ),
    **dict.fromkeys(
        ("cache_dir", "token", "use_auth_token"), off("HF_HOME and HF_TOKEN say where downloads are kept, and who asks")
    ),
    "use_peft": _peft,
    "lora_r": _adapter("train.lora_rank"),
    "lora_alpha": _adapter("train.lora_alpha", float),
    "lora_dropout": _adapter("train.lora_dropout", float),
    "lora_target_modules": _targets,
    "lora_modules_to_save": _adapter("train.lora_full_modules", names),
    "lora_task_type": needless("it follows from data.data_type"),
    "use_rslora": _adapter("train.lora_rslora"),
    "use_dora": _adapter("train.lora_dora"),
    "load_in_8bit": quantized({True: "int8"}, _is_adapted),
    "load_in_4bit": quantized({True: "nf4"}, _is_adapted),
    "bnb_4bit_quant_type": choice({"nf4": {}}, "4 bits are nf4"),
    "use_bnb_nested_quant": needless("see load_in_4bit"),
}

_ROWS: dict[str, Rule] = {
    "dataset_name": _dataset("data.train_path", "dataset_train_split", "train"),
    "dataset_config": needless("data.train_path names it, before the split"),
    "dataset_config_name": needless("data.train_path names it, before the split"),
    "dataset_train_split": needless("data.train_path names it, after a colon"),
    "dataset_test_split": needless("data.eval_path names it, after a colon"),
    "dataset_streaming": switch({"data.datasets_type": "iterable"}, {"data.datasets_type": "mapping"}),
    "streaming": switch({"data.datasets_type": "iterable"}, {"data.datasets_type": "mapping"}),
    "datasets": none("write a YAML of sources, and name it as data.train_path; see docs/data.md"),
    "train_file": same("data.train_path"),
    "validation_file": same("data.eval_path"),
    "validation_split_percentage": off("rows to evaluate on have a file of their own: data.eval_path"),
    **dict.fromkeys(
        ("max_train_samples", "max_eval_samples"), off("all rows are used; train.max_steps ends a trial early")
    ),
    **dict.fromkeys(("preprocessing_num_workers", "dataset_num_proc", "overwrite_cache"), _PER_ROW),
    "keep_linebreaks": needless("texts are taken as they are"),
    "dataset_text_field": needless("data.text_keys names it, where rows are texts"),
    "dataset_kwargs": off("see docs/data.md"),
    **dict.fromkeys(
        ("max_length", "max_seq_length"), changed("the end of a longer conversation is kept", "data.max_seq_len")
    ),
    "block_size": same("data.max_seq_len"),
    "max_prompt_length": changed("a pair that is longer than data.max_seq_len loses the first tokens of its prompt"),
    "max_completion_length": changed(
        "a pair that is longer than data.max_seq_len loses the first tokens of its prompt"
    ),
    "truncation_mode": choice({"keep_end": {}}, "a longer conversation keeps its end"),
    "packing": _packing,
    "packing_strategy": needless("see packing"),
    "eval_packing": needless("evaluation packs as training does"),
    "padding_free": switch({}, note="samples are laid end to end without padding in any case"),
    "pad_to_multiple_of": needless("nothing is padded"),
    "pad_token": needless("nothing is padded"),
    "eos_token": off("the end of a turn is found in the chat template"),
    "chat_template_path": same("data.chat_template"),
    "assistant_only_loss": _assistant_only,
    "completion_only_loss": needless(_OF_TRAINING),
    "activation_offloading": same("train.enable_activation_offload"),
}

_PREFERENCES: dict[str, Rule] = {
    "beta": same("train.dpo_beta", float),
    "loss_type": choice(
        {"sigmoid": {"train.dpo_loss": "sigmoid"}, "ipo": {"train.dpo_loss": "ipo"}, "nll": {}},
        "the losses sigmoid and ipo are there",
    ),
    "label_smoothing": same("train.dpo_label_smoothing", float),
    "precompute_ref_log_probs": lambda value, source: Result(
        MAPPED, {"train.dpo_reference": "precompute" if value else "on_the_fly"}
    ),
    "precompute_ref_batch_size": needless("the reference packs as training does"),
    **dict.fromkeys(
        ("reference_free", "sync_ref_model", "use_weighting", "rpo_alpha", "ld_alpha"), off("DPO and IPO are there")
    ),
    "disable_dropout": needless("nothing is dropped"),
    "center_rewards_coefficient": off("scores are not pulled to zero"),
}


def _other(trainer: str) -> Rule:
    return none(f"{trainer} is not there; fine-tuning, DPO and reward models are")


_RULES: dict[str, Rule] = {
    **TRAINER,
    **_MODEL,
    **_ROWS,
    **_PREFERENCES,
    **{key: _other(trainer) for key, trainer in _OTHERS.items()},
    "objective": _kind,
}


def _defaults(source: Source) -> Mapping[str, Any]:
    """The trainer's defaults that are not ours, and TRL's where the file is one of TRL's."""
    objective = _objective(source)
    of_trl = objective != "plaintext" and "model_name_or_path" in source.values
    defaults: dict[str, Any] = {
        "objective": objective,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "linear",
        "dataloader_drop_last": False,
        "dataloader_num_workers": 0,
        "gradient_checkpointing": of_trl,
        "save_steps": 500,
    }
    if of_trl:
        defaults |= {"learning_rate": {"dpo": 1e-6, "reward": 1e-4}.get(objective, 2e-5), "max_length": 1024}
        defaults |= {"assistant_only_loss": False} if objective == "conversation" else {}
        defaults |= {"precompute_ref_log_probs": False} if objective == "dpo" else {}
        if _is_adapted(source):
            defaults |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    elif not source.get("fp16"):
        defaults["bf16"] = False
    if (source.get("max_steps", 0) or 0) > 0:
        del defaults["num_train_epochs"]
    if "save_strategy" in source.values:
        del defaults["save_steps"]
    if source.get("eval_strategy") == "steps" and "eval_steps" not in source.values:
        defaults["eval_steps"] = source.get("logging_steps", 500)
    if "dataset_text_field" in source.values:
        defaults.pop("assistant_only_loss", None)
    if "max_seq_length" in source.values:
        defaults.pop("max_length", None)
    return defaults


FRAMEWORK = Framework(
    "transformers and TRL",
    "model_name_or_path, or per_device_train_batch_size with output_dir",
    lambda tree: "model_name_or_path" in tree or {"per_device_train_batch_size", "output_dir"} <= tree.keys(),
    _RULES,
    _defaults,
)
