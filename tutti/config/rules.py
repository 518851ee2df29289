"""Rules between arguments: values that contradict each other, that have no effect, or that are not supported together.

Each violation is one line that begins with the argument. Only values that the user set, and that differ from the
default, cause warnings; nothing is accepted and silently ignored.
"""

import re
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

from tutti.config import ARGUMENTS, Config, away_from_default, get
from tutti.config.nouns import counted
from tutti.config.tasks import TASKS

_CREDENTIALS = re.compile(r"://[^/?#\s]*:[^/?#\s]*@|[?&](sig|[\w-]*(signature|token|secret|password|api_?key))=", re.I)
"""Patterns of secrets in a URL: user:password@host, and signature parameters."""

NOT_TOGETHER: tuple[tuple[str, str], ...] = (("train.lora_base_dtype", "train.tensor_parallel_size"),)
"""Pairs of arguments (or `argument=value`) that work alone, but not together."""


def unavailable(config: Config) -> list[str]:
    """One problem for each pair of arguments that this version does not support together."""
    problems = []
    for first, second in NOT_TOGETHER:
        if _is_set(config, first) and _is_set(config, second):
            problems.append(f"{first}: not available yet together with {second}; leave one of them at its default")
    return problems


def _is_set(config: Config, row: str) -> bool:
    name, _, refused = row.partition("=")
    return str(get(config, name)) == refused if refused else away_from_default(config, name)


def contradictions(config: Config) -> list[str]:
    """One problem for each set of values that are valid alone but contradict each other."""
    train = config.train
    problems = [
        f"{name}: holds a password or a signature, which the run would write into its files; leave it out, and give it "
        "by the environment of the storage's package"
        for name, argument in ARGUMENTS.items()
        if argument.kind is str and name in config.explicit and _CREDENTIALS.search(str(get(config, name)))
    ]
    if train.ulysses_parallel_size * train.context_parallel_size > 1 and config.model.attn_implementation == "eager":
        problems.append(
            "model.attn_implementation: eager attention sees the tokens of one rank alone, and with "
            "train.ulysses_parallel_size or train.context_parallel_size they are split over ranks; choose sdpa"
        )
    if train.enable_batch_invariant_mode and train.enable_compile:
        problems.append(
            "train.enable_batch_invariant_mode: cannot go together with train.enable_compile, since which compiled "
            "kernel a sample runs through depends on the lengths of those before it; set one of them to false"
        )
    if train.async_enabled and train.enable_compile:
        problems.append(
            "train.async_enabled: an exchange that is under way cannot cross compiled code; leave it false, or set "
            "train.enable_compile to false"
        )
    if config.model.attn_implementation == "native-sparse" and train.architecture == "lora":
        problems.append(
            "model.attn_implementation: native-sparse gives a model new parameters, which adapters would leave as they "
            "are drawn; train it in full first, and then leave this at its default: the model's config.json names it"
        )
    if train.lora_base_dtype != "compute" and train.architecture != "lora":
        problems.append(
            f"train.lora_base_dtype: {train.lora_base_dtype} weights cannot be trained, only adapters beside them; set "
            "train.architecture to lora, or leave it at compute"
        )
    elif train.lora_base_dtype != "compute" and config.model.model_path is None:
        problems.append(
            f"train.lora_base_dtype: {train.lora_base_dtype} is what weights are quantized to as they are read, and "
            "random ones are not read; set model.model_path, or leave it at compute"
        )
    if train.lr_min > train.lr and "train.lr_min" in config.explicit and train.lr_decay_style != "constant":
        problems.append(f"train.lr_min: must not be above train.lr ({train.lr:g}), from which it is decayed to")
    if "" in config.infer.stop:
        problems.append("infer.stop: an empty text would end every answer before it begins; leave it out")
    problems += _of_numbers_by_name(config)
    for kind in ("image", "video"):
        least, most = (getattr(config.data, f"{kind}_{bound}_pixels") for bound in ("min", "max"))
        if least is not None and most is not None and least > most:
            problems.append(f"data.{kind}_min_pixels: must not be above data.{kind}_max_pixels ({most}), got {least}")
    problems += _of_pixels(config) if not config.data.task.has_tokens else []
    if train.enable_profiling and train.profile_end_step <= max(1, train.profile_start_step):
        problems.append(
            f"train.profile_end_step: must be above 1, which is the first step, and above train.profile_start_step "
            f"({train.profile_start_step}), got {train.profile_end_step}"
        )
    try:
        date.fromisoformat(config.data.chat_date or "2000-01-01")
    except ValueError:
        problems.append(f"data.chat_date: {config.data.chat_date!r} is no date; write it as 2026-01-31")
    return problems


def _of_numbers_by_name(config: Config) -> list[str]:
    """One problem for each invalid number in a mapping by name."""
    train, known = config.train, config.data.task.losses
    problems = []
    for argument, numbers in (("part_lr", train.part_lr), ("loss_weights", train.loss_weights)):
        what = "learning rate" if argument == "part_lr" else "weight"
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
                problems.append(f"train.{argument}: {name} must have a {what} of 0 or more, got {number!r}")
    if train.part_lr and train.lr == 0:
        problems.append("train.part_lr: rates of parts follow train.lr's course, which is 0; set train.lr")
    for kind in sorted(train.loss_weights.keys() - known):
        has = f"losses of {', '.join(known)}" if known else "one loss alone"
        problems.append(f"train.loss_weights: data_type {config.data.data_type} has {has}, none of {kind}")
    return problems


_OF_TOKENS = {
    "model.encoders": "it takes no media beside its own inputs",
    "train.enable_batch_invariant_mode": "set train.micro_batch_size to 1, and every picture is computed by itself",
    "train.pipeline_parallel_size": "its blocks are not cut into stages",
    "train.context_parallel_size": "no ring is written for its attention",
    "train.tensor_parallel_size": "its matrices are not split",
    "train.expert_parallel_size": "it has no experts",
}
"""Arguments about the layers or tokens of a language model, and why they do not apply to a model of pixels."""

_OF_AUTOENCODERS = {
    "model.adapter_path": "it is trained in full",
    "model.basic_modules": "it has no blocks, and is one unit",
    "train.architecture": "it is trained in full; leave lora out",
    "train.freeze": "all of it is trained",
    "train.part_lr": "all of it is trained alike",
    "train.enable_compile": "it has no repeated blocks, which are what is compiled",
    "train.enable_activation_offload": "it has no repeated blocks, whose activations move",
    "train.ulysses_parallel_size": "it has no tokens that ranks could share",
}

_OF_DENOISERS_ALONE = {
    "train.dyn_bsz": "a micro batch has train.micro_batch_size pictures of one size, so that nothing is padded anyway",
    "train.pad_to_length": "pictures of a micro batch have one size",
    "train.lora_base_dtype": "its files are read as they are, not quantized",
    "train.lora_dora": "diffusers' adapter files have no place for the magnitudes",
    "train.lora_full_modules": "diffusers' adapter files hold adapters alone",
}


def _of_pixels(config: Config) -> list[str]:
    """One problem for each argument that does not apply to a model of pixels."""
    kind, draws = config.data.data_type, config.data.task.kind == "denoiser"
    reasons = _OF_TOKENS | (_OF_DENOISERS_ALONE if draws else _OF_AUTOENCODERS)
    if draws:
        reasons["train.context_parallel_size"] += "; train.ulysses_parallel_size shares its tokens"
    return [
        f"{name}: not for a model of data_type {kind}: {why}"
        for name, why in reasons.items()
        if away_from_default(config, name)
    ]


class _Rule(NamedTuple):
    names: tuple[str, ...]
    idle: Callable[[Config], bool]
    why: str


def _prefixed(prefix: str) -> tuple[str, ...]:
    return tuple(name for name in ARGUMENTS if name.startswith(prefix))


def _has_fixed_steps(config: Config) -> bool:
    size = "data.train_size" if config.train.dyn_bsz else "data.train_sample"
    return config.data.datasets_type == "iterable" or size in config.explicit


def _draws(config: Config) -> bool:
    return config.data.task.kind == "denoiser"


_OF_DENOISERS = (*_prefixed("train.flow_"), "train.sample_steps", "train.sample_guidance")
"""Arguments about diffusion models, and about diffusion decoders of a language model (model.decoders)."""
_OF_DIFFUSION = ("train.cache_latents",)
_LIMITS = (*_prefixed("data.image_"), *_prefixed("data.video_"), *_prefixed("data.audio_"))
_OF_ADAPTERS = tuple(name for name in _prefixed("train.lora_") if name != "train.lora_base_dtype")

_RULES = (
    _Rule(
        ("infer.temperature", "infer.top_p", "infer.top_k", "infer.seed"),
        lambda config: not config.infer.do_sample,
        "infer.do_sample is off: the most likely token is always taken",
    ),
    _Rule(
        ("infer.top_p", "infer.top_k", "infer.seed"),
        lambda config: config.infer.do_sample and config.infer.temperature == 0,
        "infer.temperature is 0: the most likely token is always taken",
    ),
    _Rule(
        ("infer.temperature", "infer.top_k", "infer.seed"),
        lambda config: config.infer.do_sample and config.infer.temperature > 0 and config.infer.top_p == 0,
        "infer.top_p is 0: the most likely token is always taken",
    ),
    _Rule(
        ("data.train_size",),
        lambda config: not config.train.dyn_bsz,
        "without train.dyn_bsz steps are counted in samples; see data.train_sample",
    ),
    _Rule(
        ("data.train_sample",),
        lambda config: config.train.dyn_bsz,
        "with train.dyn_bsz steps are counted in tokens; see data.train_size",
    ),
    _Rule(
        ("data.dyn_bsz_buffer_size", "train.bsz_warmup_ratio", "train.bsz_warmup_init_mbtoken"),
        lambda config: not config.train.dyn_bsz,
        "train.dyn_bsz is off",
    ),
    _Rule(
        ("train.bsz_warmup_init_mbtoken",),
        lambda config: config.train.dyn_bsz and config.train.bsz_warmup_ratio == 0,
        "train.bsz_warmup_ratio is 0",
    ),
    _Rule(("data.prefetch_factor",), lambda config: config.data.num_workers == 0, "data.num_workers is 0"),
    _Rule(
        ("data.chat_template", "data.chat_date"),
        lambda config: not config.data.task.holds_chats,
        "data.data_type is neither " + " nor ".join(name for name, row in TASKS.items() if row.holds_chats),
    ),
    _Rule(
        ("data.row_template",),
        lambda config: config.data.task.rows != "conversations",
        "data.data_type is not conversation",
    ),
    _Rule(
        _LIMITS,
        lambda config: not config.data.task.holds_chats and not _draws(config),
        "data.data_type is neither "
        + " nor ".join(name for name, row in TASKS.items() if row.holds_chats or row.rows == "captions"),
    ),
    _Rule(
        (*_prefixed("data.audio_"), "data.media_cache_mb", "train.sample_tokens"),
        lambda config: _draws(config),
        "data.data_type is diffusion",
    ),
    _Rule(
        ("train.broadcast_model_weights_from_rank0",),
        lambda config: _draws(config) and config.model.model_path is not None,
        "data.data_type is diffusion: weights are files which every rank reads its own slices of",
    ),
    _Rule(
        ("train.cfg_dropout",),
        lambda config: config.data.data_type not in ("diffusion", "conversation"),
        "data.data_type is neither diffusion nor conversation",
    ),
    _Rule(
        _OF_DIFFUSION,
        lambda config: not _draws(config),
        "data.data_type is not diffusion",
    ),
    _Rule(
        ("model.condition_model_path",),
        lambda config: not _draws(config) and config.infer.model_path is None,
        "data.data_type is not diffusion",
    ),
    _Rule(
        _OF_DENOISERS,
        lambda config: config.data.data_type not in ("diffusion", "conversation"),
        "data.data_type is neither diffusion nor conversation",
    ),
    _Rule(
        ("train.sample_steps", "train.sample_guidance"),
        lambda config: _draws(config) and not (config.train.sample_prompts or config.train.sample_prompts_path),
        "there are no train.sample_prompts",
    ),
    _Rule(
        ("data.media_root", "data.media_cache_mb"),
        lambda config: not config.data.task.holds_chats and config.data.task.has_tokens,
        "data.data_type is neither "
        + " nor ".join(name for name, row in TASKS.items() if row.holds_chats or not row.has_tokens),
    ),
    _Rule(("data.augment",), lambda config: config.data.task.rows != "images", "data.data_type is not image"),
    _Rule(
        ("train.pad_to_length", "model.tokenizer_path", "model.attn_implementation"),
        lambda config: not config.data.task.has_tokens,
        "the model of this data.data_type has no tokens",
    ),
    _Rule(
        ("data.max_seq_len",),
        lambda config: not config.data.task.has_tokens and not _draws(config),
        "the model of this data.data_type has no tokens",
    ),
    _Rule(
        ("data.shuffle_buffer_size",),
        lambda config: config.data.datasets_type == "mapping",
        "data.datasets_type mapping shuffles all of the data",
    ),
    _Rule(
        ("data.shuffle_buffer_size",),
        lambda config: config.data.datasets_type != "mapping" and not config.data.shuffle,
        "data.shuffle is off",
    ),
    _Rule(
        ("data.drop_last",),
        _has_fixed_steps,
        "the steps of an epoch are given by data.train_size or data.train_sample, so that nothing remains",
    ),
    _Rule(("train.muon_momentum",), lambda config: config.train.optimizer != "muon", "train.optimizer is not muon"),
    _Rule(_prefixed("train.dpo_"), lambda config: config.data.data_type != "dpo", "data.data_type is not dpo"),
    _Rule(
        ("train.dpo_label_smoothing",),
        lambda config: config.data.data_type == "dpo" and config.train.dpo_loss == "ipo",
        "train.dpo_loss is ipo, which knows no wrong labels",
    ),
    _Rule(
        ("train.lora_dropout",),
        lambda config: config.data.data_type == "dpo" and config.train.architecture == "lora",
        "data.data_type is dpo, which compares the model with one that drops nothing",
    ),
    _Rule(
        ("model.num_labels",),
        lambda config: config.data.task.head != "classes",
        "data.data_type is not classification",
    ),
    _Rule(
        (*_prefixed("train.enable_reshard_after_"), "train.enable_full_shard"),
        lambda config: config.train.data_parallel_mode == "ddp",
        "train.data_parallel_mode is ddp, which does not shard",
    ),
    _Rule(
        ("train.enable_fsdp_offload",),
        lambda config: config.train.data_parallel_mode == "ddp",
        "train.data_parallel_mode is ddp, which keeps all parameters on the device; fsdp1 and fsdp2 offload",
    ),
    _Rule(
        ("train.activation_gpu_limit",),
        lambda config: not config.train.enable_activation_offload,
        "train.enable_activation_offload is off: all activations stay on the device",
    ),
    _Rule(
        _prefixed("train.enable_reshard_after_"),
        lambda config: config.train.data_parallel_mode == "fsdp1",
        "train.data_parallel_mode is fsdp1, which goes by train.enable_full_shard alone",
    ),
    _Rule(
        _prefixed("train.enable_reshard_after_"),
        lambda config: config.train.data_parallel_mode == "fsdp2" and config.train.enable_full_shard,
        "train.enable_full_shard frees gathered parameters after both passes anyway",
    ),
    _Rule(
        ("train.broadcast_model_weights_from_rank0",),
        lambda config: config.model.model_path is None,
        "without model.model_path no weights are read",
    ),
    _Rule(
        ("train.ep_outside",),
        lambda config: config.train.expert_parallel_size == 1,
        "train.expert_parallel_size is 1",
    ),
    _Rule(
        ("train.save_async",),
        lambda config: config.train.save_steps == config.train.save_epochs == 0,
        "train.save_steps and train.save_epochs are 0",
    ),
    _Rule(
        ("train.lr_min", "train.lr_decay_ratio"),
        lambda config: config.train.lr_decay_style == "constant",
        "train.lr_decay_style is constant",
    ),
    _Rule(("train.lr_start",), lambda config: config.train.lr_warmup_ratio == 0, "train.lr_warmup_ratio is 0"),
    _Rule(
        ("train.no_decay_modules", "train.no_decay_params"),
        lambda config: config.train.weight_decay == 0,
        "train.weight_decay is 0",
    ),
    _Rule(
        ("train.async_enabled",),
        lambda config: config.train.ulysses_parallel_size == 1,
        "train.ulysses_parallel_size is 1, so that nothing is exchanged",
    ),
    _Rule(
        ("train.enable_reentrant",),
        lambda config: not config.train.enable_gradient_checkpointing,
        "train.enable_gradient_checkpointing is off",
    ),
    _Rule(
        ("train.eval_steps", "train.eval_epochs"),
        lambda config: config.data.eval_path is None,
        "data.eval_path is unset",
    ),
    _Rule(
        ("data.eval_path",),
        lambda config: config.train.eval_steps == config.train.eval_epochs == 0,
        "train.eval_steps and train.eval_epochs are 0",
    ),
    _Rule(
        (*_prefixed("train.early_stopping_"), "train.keep_best"),
        lambda config: config.data.eval_path is None or config.train.eval_steps == config.train.eval_epochs == 0,
        "there is no evaluation (data.eval_path with train.eval_steps or train.eval_epochs)",
    ),
    _Rule(
        ("train.early_stopping_min_delta",),
        lambda config: config.train.early_stopping_patience == 0,
        "train.early_stopping_patience is 0",
    ),
    _Rule(
        ("train.keep_best",),
        lambda config: config.train.max_checkpoints == 0,
        "train.max_checkpoints is 0: all checkpoints are kept",
    ),
    _Rule(
        ("train.spike_window", "train.skip_spikes"),
        lambda config: config.train.spike_sigma == 0,
        "train.spike_sigma is 0: no spikes are looked for",
    ),
    _Rule(
        (*_OF_ADAPTERS, "model.adapter_path"),
        lambda config: config.train.architecture != "lora",
        "train.architecture is not lora",
    ),
    _Rule(
        tuple(name for name in _OF_ADAPTERS if name != "train.lora_dropout"),
        lambda config: config.train.architecture == "lora" and config.model.adapter_path is not None,
        "the adapter at model.adapter_path has its own",
    ),
    _Rule(
        tuple(name for name in _prefixed("train.sample_") if name not in _OF_DENOISERS),
        lambda config: config.data.task.head != "tokens" and not _draws(config),
        "the model of this data.data_type gives numbers, and writes nothing",
    ),
    _Rule(
        ("train.sample_tokens",),
        lambda config: (
            config.data.task.head == "tokens" and not (config.train.sample_prompts or config.train.sample_prompts_path)
        ),
        "there are no train.sample_prompts",
    ),
    _Rule(
        ("train.pipeline_schedule", "train.pipeline_stages_per_rank"),
        lambda config: config.train.pipeline_parallel_size == 1,
        "train.pipeline_parallel_size is 1",
    ),
    _Rule(
        ("train.wandb_project", "train.wandb_name"),
        lambda config: not (config.train.use_wandb or config.train.trackers),
        "train.use_wandb is off, and there are no train.trackers",
    ),
    _Rule(
        ("train.wandb_id",),
        lambda config: not (config.train.use_wandb or "wandb" in config.train.trackers),
        "train.use_wandb is off",
    ),
    _Rule(
        _prefixed("train.profile_"), lambda config: not config.train.enable_profiling, "train.enable_profiling is off"
    ),
)


_ON_CPU = _Rule(
    ("data.pin_memory", "train.empty_cache_steps"),
    lambda config: True,
    "this machine has no accelerator, whose memory it is about",
)


def warnings(config: Config) -> list[str]:
    """One line for each argument that was set and has no effect, saying why."""
    return [line for rule in _RULES for line in _apply(rule, config)]


def warnings_on_cpu(config: Config) -> list[str]:
    """One line for each argument that was set and has no effect on a CPU."""
    return _apply(_ON_CPU, config)


def warnings_on_length(config: Config, total_steps: int) -> list[str]:
    """One line for each argument that was set and whose step is never reached in a run of `total_steps`."""
    train = config.train
    late = {
        f"train.{name}_{unit}": why
        for unit, have, why in (
            ("steps", total_steps, f"the run ends with step {total_steps:,}"),
            ("epochs", train.num_train_epochs, f"train.num_train_epochs is {train.num_train_epochs}"),
        )
        for name in ("save", "hf_save", "eval")
        if getattr(train, f"{name}_{unit}") > have
    }
    if train.log_steps > total_steps:
        late["train.log_steps"] = f"the run ends with step {total_steps:,}, which is logged"
    if train.enable_profiling and train.profile_start_step > total_steps:
        late["train.profile_start_step"] = f"the run ends with step {total_steps:,}"
    if 0 < train.lr_warmup_ratio * total_steps < 1:
        late["train.lr_warmup_ratio"] = f"it is less than one of {counted(total_steps, 'step')}"
    return [f"{name}: has no effect: {why}" for name, why in late.items() if name in config.explicit]


def _apply(rule: _Rule, config: Config) -> list[str]:
    return [
        f"{name}: has no effect: {rule.why}"
        for name in rule.names
        if name in config.explicit and away_from_default(config, name) and rule.idle(config)
    ]
