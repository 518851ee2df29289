"""VeOmni: most of its flat arguments are ours, name by name; its newer nested ones are the same in other places."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tutti.config import ARGUMENTS, GROUPS
from tutti.migrate.rules import (
    CHANGED,
    MAPPED,
    MUON_NOTE,
    NONE,
    Framework,
    Result,
    Rule,
    Source,
    choice,
    frozen,
    names,
    needless,
    none,
    off,
    same,
    switch,
)

_MOVED = {
    "data.dataloader.type": "data.dataloader_type",
    "data.dataloader.num_workers": "data.num_workers",
    "data.dataloader.prefetch_factor": "data.prefetch_factor",
    "data.dataloader.drop_last": "data.drop_last",
    "data.dataloader.pin_memory": "data.pin_memory",
    "train.gradient_checkpointing.enable": "train.enable_gradient_checkpointing",
    "train.gradient_checkpointing.enable_reentrant": "train.enable_reentrant",
    "train.torch_compile.enable": "train.enable_compile",
    "train.accelerator.tp_size": "train.tensor_parallel_size",
    "train.accelerator.ep_size": "train.expert_parallel_size",
    "train.accelerator.ep_outside": "train.ep_outside",
    "train.accelerator.pp_size": "train.pipeline_parallel_size",
    "train.accelerator.ulysses_size": "train.ulysses_parallel_size",
    "train.accelerator.enable_async": "train.async_enabled",
    "train.accelerator.cp_size": "train.context_parallel_size",
    "train.accelerator.fsdp_config.fsdp_mode": "train.data_parallel_mode",
    "train.accelerator.fsdp_config.full_shard": "train.enable_full_shard",
    "train.accelerator.fsdp_config.reshard_after_forward": "train.enable_reshard_after_forward",
    "train.accelerator.fsdp_config.reshard_after_backward": "train.enable_reshard_after_backward",
    "train.accelerator.fsdp_config.offload": "train.enable_fsdp_offload",
    "train.accelerator.offload_config.enable_activation": "train.enable_activation_offload",
    "train.accelerator.offload_config.activation_gpu_limit": "train.activation_gpu_limit",
    "train.optimizer.type": "train.optimizer",
    "train.wandb.enable": "train.use_wandb",
    "train.profile.enable": "train.enable_profiling",
    "train.profile.profile_memory": "train.profile_profile_memory",
    "train.checkpoint.manager": "train.ckpt_manager",
    "train.checkpoint.load_path": "train.load_checkpoint_path",
}
_SAME_LEAVES = {
    "train.optimizer.": (
        "lr lr_min lr_start lr_warmup_ratio lr_decay_style lr_decay_ratio weight_decay no_decay_modules "
        "no_decay_params max_grad_norm"
    ),
    "train.checkpoint.": (
        "output_dir save_async save_steps save_epochs hf_save_steps hf_save_epochs save_hf_weights load_checkpoint_path"
    ),
}
_NESTED = (
    "train.optimizer", "train.accelerator", "train.checkpoint", "train.wandb", "train.gradient_checkpointing",
    "data.dataloader", "model.ops_implementation", "model.network",
)  # fmt: skip


def _template(value: Any, source: Source) -> Result:
    name = str(value)
    if name in ("default", "chatml", "llama2") or any(mark in name for mark in "/\\."):
        return Result(MAPPED, {"data.chat_template": name})
    note = f"{name} is not built in: the tokenizer's own template is used, or name a Jinja file"
    return Result(CHANGED, {"data.chat_template": "default"}, note)


def _dyn_bsz(value: Any, source: Source) -> Result:
    if value and not source.get("train.rmpad_with_pos_ids", True) and not source.get("train.rmpad", False):
        return Result(CHANGED, {"train.dyn_bsz": True}, "samples are packed without padding in any case")
    return Result(MAPPED, {"train.dyn_bsz": value})


def _attention(value: Any, source: Source) -> Result:
    if value in ARGUMENTS["model.attn_implementation"].values:
        return Result(MAPPED, {"model.attn_implementation": value})
    return Result(CHANGED, {"model.attn_implementation": "flash_attention_2"}, f"{value} is not there")


def _experts(value: Any, source: Source) -> Result:
    if value == "eager":
        return Result(MAPPED, {"model.moe_implementation": "eager"})
    return Result(
        MAPPED if value == "fused" else CHANGED, {"model.moe_implementation": "fused"}, "one fused kernel here"
    )


def _size(axis: str) -> Rule:
    """A part of the data axis; -1 is what is left, as our 1 is where both are left alone."""

    def rule(value: Any, source: Source) -> Result:
        if value == -1:
            return Result(MAPPED, note="what the other sizes leave, as by default here")
        return Result(MAPPED, {f"train.data_parallel_{axis}_size": value})

    return rule


def _precision(value: Any, source: Source) -> Result:
    ours = {"bfloat16": "bfloat16", "float32": "float32"}.get(str(value))
    if ours is None:
        return Result(CHANGED, {"train.compute_dtype": "bfloat16"}, f"{value} is not there; bfloat16 or float32")
    return Result(MAPPED, {"train.compute_dtype": ours})


def _resume(value: Any, source: Source) -> Result:
    if not value:
        return Result(MAPPED, note="off, as it is here")
    if value == "auto":
        return Result(CHANGED, {"train.load_checkpoint_path": "auto"}, "of checkpoints that Tutti wrote")
    return Result(
        NONE, note="checkpoints of VeOmni cannot be resumed from: export one, and name it as model.model_path"
    )


def _lora(value: Any, source: Source) -> Result:
    """model.lora_config, as one mapping."""
    if not value:
        return Result(MAPPED, note="no adapters, as it is here")
    taken = {
        "rank": "train.lora_rank", "r": "train.lora_rank", "alpha": "train.lora_alpha",
        "lora_alpha": "train.lora_alpha", "lora_dropout": "train.lora_dropout", "dropout": "train.lora_dropout",
        "use_rslora": "train.lora_rslora", "use_dora": "train.lora_dora", "lora_modules": "train.lora_targets",
        "target_modules": "train.lora_targets", "modules_to_save": "train.lora_full_modules",
        "lora_adapter": "model.adapter_path", "adapter_path": "model.adapter_path",
    }  # fmt: skip
    ours: dict[str, Any] = {"train.architecture": "lora"}
    left = []
    for key, item in dict(value).items():
        name = taken.get(key)
        if name is None:
            left.append(key)
        elif item is not None:
            ours[name] = names(item) if name in ("train.lora_targets", "train.lora_full_modules") else item
            if name == "train.lora_alpha":
                ours[name] = float(item)
    note = f"without a counterpart in it: {', '.join(left)}" if left else ""
    return Result(CHANGED if left else MAPPED, ours, note)


_MEDIA = {
    "image_min_pixels": "data.image_min_pixels",
    "image_max_pixels": "data.image_max_pixels",
    "video_min_pixels": "data.video_min_pixels",
    "video_max_pixels": "data.video_max_pixels",
    "fps": "data.video_fps",
    "max_frames": "data.video_max_frames",
}
"""Keys of data.mm_configs and ours."""


def _media(value: Any, source: Source) -> Result:
    """data.mm_configs, as one mapping."""
    given = {key: item for key, item in dict(value or {}).items() if item is not None}
    left = sorted(set(given) - set(_MEDIA))
    ours = {_MEDIA[key]: float(item) if key == "fps" else item for key, item in given.items() if key in _MEDIA}
    note = f"without a counterpart in it: {', '.join(left)}" if left else ""
    return Result(CHANGED if left else MAPPED, ours, note)


def _encoders(value: Any, source: Source) -> Result:
    """model.encoders, whose features are always as wide as the language model here."""
    parts = {kind: dict(spec or {}) for kind, spec in dict(value or {}).items()}
    ours = {kind: {key: item for key, item in spec.items() if key != "output_size"} for kind, spec in parts.items()}
    return Result(MAPPED, {"model.encoders": ours} if ours else {})


_OF_DIFFUSION = {
    "ultra_edit": ("transformer_config", "patch_size1", "patch_size2", "proj_hidden_dim"),
    "instruct_pix2pix": ("unet_config", "force_zeros_for_empty_prompt", "is_cosxl_edit"),
}
"""model_type of decoders by diffusion, and the fields that their configs alone have."""


def _diffusion_kind(spec: Mapping[str, Any], source: Source) -> str | None:
    """The model_type of a decoder by diffusion, by the fields that are set, its folder's config.json or its name; None
    of a tokenizer of pictures."""
    path = str(spec.get("config_path") or spec.get("model_path") or "")
    found = spec.get("model_type")
    with suppress(OSError, ValueError):  # it may lie on another machine
        found = found or json.loads((source.folder / path / "config.json").read_text("utf-8")).get("model_type")
    for kind, fields in _OF_DIFFUSION.items():
        if found == kind or any(field in spec for field in fields) or kind.replace("_", "") in _letters(path):
            return kind
    return None


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _by_diffusion(kind: str, spec: Mapping[str, Any]) -> Result:
    """model.decoders, of a language model that leads a diffusion model."""
    if kind == "instruct_pix2pix":
        return Result(
            NONE, note="a UNet is no decoder here: name the pipeline of a diffusion transformer (SD3, Flux ...)"
        )
    ours = {key: spec[key] for key in ("model_path", "config_path") if spec.get(key)}
    left = sorted(set(spec) - {"model_path", "config_path", "output_size"})
    note = (
        "give the folder of a pipeline of diffusers with transformer/, vae/ and scheduler/, such as Stable Diffusion "
        "3's; VeOmni's holds all three in one. Learned queries lead it, not a tower's features"
    )
    note += f"; without {', '.join(left)}" if left else ""
    return Result(CHANGED, {"model.decoders": {"image": ours}}, note)


def _leads_diffusion(source: Source) -> bool:
    parts = dict(source.get("model.decoders", {}))
    return any(_diffusion_kind(dict(spec or {}), source) for spec in parts.values())


def _output_encoder(value: Any, source: Source) -> Result:
    """model.output_encoder: a diffusion model is led by queries here, whoever embeds pictures."""
    if value == "encoder" and _leads_diffusion(source):
        note = "a diffusion model is led by queries, and there is no loss of features beside it"
        return Result(CHANGED, {"model.output_encoder": "decoder"}, note)
    return Result(MAPPED, {"model.output_encoder": value})


def _decoders(value: Any, source: Source) -> Result:
    """model.decoders: a tokenizer of pictures stays as it is, and has a head and embeddings of ours; a diffusion model
    is trained."""
    parts = {kind: dict(spec or {}) for kind, spec in dict(value or {}).items()}
    if not parts:
        return Result(MAPPED, note="none, as it is here")
    kind = next((found for spec in parts.values() if (found := _diffusion_kind(spec, source))), None)
    if kind is not None:
        return _by_diffusion(kind, next(iter(parts.values())))
    if not all(spec.get("model_path") for spec in parts.values()):
        return Result(NONE, note="name a trained one by model_path: codes of one that is not trained say nothing")
    ours = {kind: {"model_path": spec["model_path"]} for kind, spec in parts.items()}
    left = sorted({key for spec in parts.values() for key in spec} - {"model_path", "output_size"})
    note = "the folder of a VQModel, a Janus or a JanusVQVAE, as diffusers and transformers have them"
    note += f"; it is used as it is, without {', '.join(left)}" if left else ""
    return Result(CHANGED, {"model.decoders": ours}, note)


def _diffusion_task(value: Any, source: Source) -> Result:
    """train.training_task: where a diffusion model's latents come from."""
    if value == "online_training":
        return Result(MAPPED, {"train.cache_latents": False})
    if value == "offline_training":
        note = "latents are encoded once, by the run itself: name the pictures and captions, since pickles are not read"
        return Result(CHANGED, {"train.cache_latents": True}, note)
    return Result(NONE, note="latents are encoded by the run that trains on them (train.cache_latents)")


_FREEZES = {
    "train.freeze_vit": ("towers",),
    "train.freeze_audio_tower": ("towers",),
    "train.freeze_encoder": ("towers",),
    "train.freeze_encoder_all": ("towers", "projectors"),
    "train.freeze_foundation": ("language_model",),
}
"""Switches, and the parts that ours names."""


def _freezes(value: Any, source: Source) -> Result:
    """Each of the switches that freeze parts of a model."""
    decoder = {"train.freeze_decoder": ("decoders.image.net.*",)} if _leads_diffusion(source) else {}
    return frozen({**_FREEZES, **decoder})(value, source)


def _freeze_decoder(value: Any, source: Source) -> Result:
    """train.freeze_decoder: a diffusion transformer may be trained or not, a tokenizer of pictures never is."""
    if _leads_diffusion(source):
        return _freezes(value, source)
    return choice({True: {}}, "what a model draws by stays as it is")(value, source)


def _rules() -> dict[str, Rule]:
    contract = [name for name, argument in ARGUMENTS.items() if argument.group in GROUPS and not argument.added]
    rules: dict[str, Rule] = {name: same(name) for name in contract if name != "train.optimizer"}
    rules |= {their: same(ours) for their, ours in _MOVED.items()}
    for prefix, leaves in _SAME_LEAVES.items():
        rules |= {f"{prefix}{leaf}": same(f"train.{leaf}") for leaf in leaves.split()}
    for leaf in ("project", "name", "id"):
        rules[f"train.wandb.{leaf}"] = same(f"train.wandb_{leaf}")
    for leaf in ("start_step", "end_step", "trace_dir", "record_shapes", "with_stack", "rank0_only"):
        rules[f"train.profile.{leaf}"] = same(f"train.profile_{leaf}")
    fused = needless("head and loss are fused in chunks, and the model's other code is transformers' own")
    for kernel in (
        "cross_entropy_loss", "rms_norm", "swiglu_mlp", "rotary_pos_emb", "rotary_pos_emb_vision",
        "load_balancing_loss", "rms_norm_gated", "causal_conv1d", "chunk_gated_delta_rule",
    ):  # fmt: skip
        rules[f"model.ops_implementation.{kernel}_implementation"] = fused
    for group in ("model.ops_implementation", "model.network"):
        rules[f"{group}.attn_implementation"] = _attention
        rules[f"{group}.moe_implementation"] = _experts
    for path in ("model_path", "config_path", "tokenizer_path", "condition_model_path"):
        rules[f"model.{path}"] = same(f"model.{path}")
    return rules | dict.fromkeys(_FREEZES, _freezes) | _CHANGES


_CHANGES: dict[str, Rule] = {
    "train.optimizer": choice(
        {name: {"train.optimizer": name} for name in ("adamw", "anyprecision_adamw")}, "AdamW is used"
    ),
    "train.optimizer.type": choice(
        {name: {"train.optimizer": name} for name in ("adamw", "anyprecision_adamw")}
        | {"muon": ({"train.optimizer": "muon"}, MUON_NOTE)},
        "AdamW is used; the learning rate may have to be chosen anew",
    ),
    "train.dyn_bsz": _dyn_bsz,
    "train.rmpad": needless("samples are packed without padding in any case"),
    "train.rmpad_with_pos_ids": needless("samples are packed without padding in any case"),
    "train.dyn_bsz_margin": needless("micro batches are planned ahead, with no margin"),
    "train.dyn_bsz_runtime": needless("the position in the data is saved exactly in any case"),
    "train.dyn_bsz_count_mode": choice(
        {"total": {}}, "micro batches are filled by all their tokens, not by the trained ones"
    ),
    "train.dyn_bsz_physical_overflow_ratio": none("a micro batch never has more than its budget of tokens"),
    "train.sync_each_train_step": needless("nothing waits for the device between two lines of metrics"),
    "train.ep_sharded_stream_load": needless(
        "each rank reads its own slices (broadcast_model_weights_from_rank0: false)"
    ),
    "train.moe_load_balance_monitor_interval": off("the load of the experts is not recorded"),
    "train.channel_loss.enable": needless(
        "source_loss/<name> and source_tokens/<name> are logged with several sources"
    ),
    "train.chunk_mbs_config.enable": off("layers run on whole micro batches; lower train.micro_batch_size"),
    "train.gradient_checkpointing.debug": off("there is no such mode"),
    "train.gradient_checkpointing.early_stop": needless("torch's own setting"),
    "train.torch_compile.backend": choice({"inductor": {}}, "inductor is used"),
    "train.torch_compile.dynamic": off("left to torch.compile"),
    "train.torch_compile.fullgraph": needless("left to torch.compile"),
    "train.accelerator.dp_replicate_size": _size("replicate"),
    "train.accelerator.dp_shard_size": _size("shard"),
    "train.accelerator.fsdp_config.forward_prefetch": needless("torch's FSDP2 prefetches by itself"),
    "train.accelerator.fsdp_config.max_load_broadcast_size": needless("weights are sent on one by one"),
    "train.accelerator.fsdp_config.mixed_precision.enable": same("train.enable_mixed_precision"),
    "train.accelerator.fsdp_config.mixed_precision.param_dtype": _precision,
    "train.accelerator.fsdp_config.mixed_precision.reduce_dtype": choice(
        {"float32": {}}, "gradients are reduced in fp32 with mixed precision"
    ),
    "train.checkpoint.save_rolling_num": same("train.max_checkpoints"),
    "train.enable_rank0_init": switch(
        {"train.init_device": "meta", "train.broadcast_model_weights_from_rank0": True},
        note="rank 0 reads the weights and sends them on; nothing is built whole",
    ),
    "train.profile.with_modules": off("not recorded"),
    "train.profile_with_memory": same("train.profile_profile_memory"),
    "train.load_checkpoint_path": _resume,
    "train.checkpoint.load_path": _resume,
    "train.checkpoint.load_checkpoint_path": _resume,
    "data.chat_template": _template,
    "data.dataloader.persistent_workers": needless("workers live as long as the run"),
    "data.dataloader.in_order": choice({True: {}}, "batches keep their order, so that a run can be resumed exactly"),
    "data.dataloader.use_background_prefetcher": needless("workers prepare data.prefetch_factor batches ahead"),
    "data.dataloader.worker_num_threads": needless("a worker has one thread"),
    "data.mm_configs": _media,
    "train.training_task": _diffusion_task,
    "model.encoders": _encoders,
    "model.decoders": _decoders,
    "model.output_encoder": _output_encoder,
    "train.vit_lr": same("train.part_lr", lambda value: {"towers": float(value)}),
    "train.freeze_decoder": _freeze_decoder,
    "model.model_config": off("change the model's config.json instead, and name it as model.config_path"),
    "model.foundation": off("change the model's config.json instead, and name it as model.config_path"),
    "model.lora_config": _lora,
    "model.force_use_huggingface": needless("models are transformers' own in any case"),
    "dpo_config.beta": same("train.dpo_beta"),
    "dpo_config.loss_type": same("train.dpo_loss"),
    "dpo_config.label_smoothing": same("train.dpo_label_smoothing"),
}


def _is_meant(tree: Mapping[str, Any]) -> bool:
    groups = [tree[name] for name in ("model", "data", "train") if tree.get(name) is not None]
    return bool(groups) and all(isinstance(group, dict) for group in groups)


def _defaults(source: Source) -> Mapping[str, Any]:
    """The newer, nested arguments have other defaults than the flat ones, which are ours."""
    if not any(key.startswith(f"{group}.") for group in _NESTED for key in source.values):
        return {}
    return {
        "train.dyn_bsz": True,
        "train.init_device": "meta",
        "train.eval_epochs": 1,
        "train.optimizer.lr_decay_style": "constant",
        "train.gradient_checkpointing.enable_reentrant": False,
        "train.accelerator.fsdp_config.fsdp_mode": "fsdp2",
        "train.checkpoint.output_dir": "output",
        "data.dataloader.num_workers": 2,
    }


FRAMEWORK = Framework("VeOmni", "groups model, data and train", _is_meant, _rules(), _defaults, counts_whole_run=False)
