"""Rules, which make up the tables of `tutti.migrate`: each converts the value of one key to our settings.

A rule is a function of the value and of the file around it (`Source`). Most are made by a few builders, so that a table
reads as a list: `same` (their key under our name), `choice` (by a list of values), `changed` (ours means something
else, and the note says what), `none` (there is no counterpart, and the note says what to do), `needless` (nothing has
to be set here) and `off` (fine while it is off).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from tutti.config.train import TrackerName

MAPPED, CHANGED, NONE = "mapped", "changed", "none"


@dataclass(frozen=True)
class Result:
    """The settings for a value. kind: mapped, changed or none. ours: settings by dotted name."""

    kind: str
    ours: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Source:
    """The file: its values by dotted key, the number of ranks it was made for, and its folder."""

    values: Mapping[str, Any]
    ranks: int
    folder: Path

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value


Rule = Callable[[Any, Source], Result]


@dataclass(frozen=True)
class Framework:
    """A supported framework.

    sign: how its files are recognised, in words. is_meant: true if a file may be one of its files. rules: by its own
    dotted key. defaults: its defaults that differ from ours. counts_whole_run: its steps are those of all epochs
    together.
    """

    name: str
    sign: str
    is_meant: Callable[[Mapping[str, Any]], bool]
    rules: Mapping[str, Rule]
    defaults: Callable[[Source], Mapping[str, Any]]
    counts_whole_run: bool = True


def same(name: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """A rule for a setting that is the same under our name."""
    return lambda value, source: Result(MAPPED, {name: convert(value)})


def changed(note: str, *names: str) -> Rule:
    """Our nearest settings, with the difference."""
    return lambda value, source: Result(CHANGED, dict.fromkeys(names, value), note)


def none(note: str) -> Rule:
    """No counterpart; `note` says why, or what to do instead."""
    return lambda value, source: Result(NONE, note=note)


def needless(note: str) -> Rule:
    """Nothing to set: it always holds here, or does not arise."""
    return lambda value, source: Result(MAPPED, note=note)


def off(note: str) -> Rule:
    """Nothing to set while it is off; no counterpart when it is on."""

    def rule(value: Any, source: Source) -> Result:
        if not value or value in ("none", "no"):
            return Result(MAPPED, note="off, as it is here")
        return Result(NONE, note=note)

    return rule


def frozen(parts: Mapping[str, Sequence[str]], by_default: Sequence[str] = ()) -> Rule:
    """A rule for switches that freeze parts of a model: freezes the parts of all switches that are on.

    parts: names in our train.freeze, by their key. by_default: switches that are on if a file does not set them.
    """

    def rule(value: Any, source: Source) -> Result:
        if not value:
            return Result(MAPPED, note="trained, as it is here")
        on = [key for key in parts if source.get(key, key in by_default)]
        return Result(MAPPED, {"train.freeze": list(dict.fromkeys(part for key in on for part in parts[key]))})

    return rule


def quantized(kinds: Mapping[Any, str], adapted: Callable[[Source], bool]) -> Rule:
    """The precision of the base model beside adapters, by value."""

    def rule(value: Any, source: Source) -> Result:
        if not value:
            return Result(MAPPED, note="off, as it is here")
        if value not in kinds or not adapted(source):
            return Result(NONE, note="what is quantized is the base model beside adapters, to 8 or 4 bits")
        note = "just the layers that have adapters; scales are kept in fp32, and nothing but weights is quantized"
        return Result(CHANGED, {"train.lora_base_dtype": kinds[value]}, note)

    return rule


def choice(values: Mapping[Any, Mapping[str, Any] | tuple[Mapping[str, Any], str]], otherwise: str) -> Rule:
    """Settings by value; a pair has a note, and means something different. otherwise: the note for a value not
    listed."""

    def rule(value: Any, source: Source) -> Result:
        key = value.lower() if isinstance(value, str) else value
        if not isinstance(key, str | bool | int | float) or key not in values:
            return Result(NONE, note=otherwise)
        found = values[key]
        return Result(CHANGED, *found) if isinstance(found, tuple) else Result(MAPPED, found)

    return rule


def switch(on: Mapping[str, Any], without: Mapping[str, Any] | None = None, note: str = "") -> Rule:
    """Settings for true and for false."""
    return lambda value, source: Result(
        CHANGED if note and value else MAPPED, on if value else without or {}, note if value else ""
    )


_LOCAL = re.compile(r"^[./~]|^[^/]+$|^[^/]+/[^/]+/")


def looks_remote(path: str) -> bool:
    """True if a path has the form of a name on the Hugging Face hub, owner/name."""
    return not _LOCAL.match(path) and not re.search(r"\.(jsonl?|parquet|csv|txt|arrow|ya?ml)$", path)


def model_path(revision: str) -> Rule:
    """A model: a local folder, or a name on the hub, at the revision given by the key `revision`."""

    def rule(value: Any, source: Source) -> Result:
        at = source.get(revision)
        return Result(MAPPED, {"model.model_path": f"{value}@{at}" if at and looks_remote(str(value)) else value})

    return rule


def accumulation(micro: str, default: int) -> Rule:
    """Gradient accumulation is the quotient of the batch sizes: global = micro * accumulation * ranks."""

    def rule(value: Any, source: Source) -> Result:
        size = source.get(micro, default)
        if not all(isinstance(number, int) for number in (size, value)):
            return Result(NONE, note=f"must be a number of micro batches, got {value}")
        note = f"counts samples over all ranks: {micro} {size} * {value} * ranks {source.ranks} (--nproc says how many)"
        return Result(CHANGED, {"train.global_batch_size": size * value * source.ranks}, note)

    return rule


MUON_NOTE = "matrices of the blocks take train.lr, scaled to the size of AdamW's updates: choose it as for AdamW"


def optimizer(value: Any, source: Source) -> Result:
    """Any variant of AdamW, and Muon; there are no others."""
    name = str(value).lower()
    if name == "muon":
        return Result(CHANGED, {"train.optimizer": "muon"}, MUON_NOTE)
    if "anyprecision" in name:
        return Result(MAPPED, {"train.optimizer": "anyprecision_adamw"})
    if name in ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla"):
        return Result(MAPPED, {"train.optimizer": "adamw"})
    if "adamw" in name and "8bit" in name:
        return Result(CHANGED, {"train.optimizer": "adamw_8bit"}, "its state is in 8 bits, and is not paged")
    if "adamw" in name and ("4bit" in name or "paged" in name or "fp8" in name):
        note = "its state is not quantised so here; the optimizer adamw_8bit keeps it in 8 bits"
        return Result(CHANGED, {"train.optimizer": "adamw"}, note)
    return Result(NONE, note="AdamW is used; the learning rate may have to be chosen anew")


def schedule(value: Any, source: Source) -> Result:
    """The schedules of transformers, which decay to zero."""
    name = str(value).lower()
    if name in ("linear", "cosine"):
        return Result(MAPPED, {"train.lr_decay_style": name, "train.lr_min": 0.0})
    if name in ("constant", "constant_with_warmup"):
        return Result(MAPPED, {"train.lr_decay_style": "constant"})
    if name.startswith("cosine"):
        return Result(CHANGED, {"train.lr_decay_style": "cosine"}, "a plain cosine; see train.lr_min for where it ends")
    return Result(NONE, note="linear, cosine and constant are there; cosine is taken")


def min_lr_rate(value: Any, source: Source) -> Result:
    """The end of a cosine, as a fraction of the learning rate."""
    return Result(MAPPED, {"train.lr_min": float(value) * float(source.get("learning_rate", 5e-5))})


def warmup_steps(value: Any, source: Source) -> Result:
    """Warmup is a fraction of all steps here, whose number is known in advance only if the file counts steps."""
    if _is_constant(source):
        return Result(MAPPED, note="of no effect with the schedule constant")
    total = source.get("max_steps", source.get("training.steps", 0))
    if value == 0 or (isinstance(value, float) and value < 1):
        return Result(MAPPED, {"train.lr_warmup_ratio": float(value)})
    if isinstance(total, int) and total > 0:
        ratio = min(1.0, value / total)
        # A run's warmup is its fraction of the steps, rounded down.
        ratio = ratio if int(total * ratio) >= int(value) else math.nextafter(ratio, 1)
        return Result(CHANGED, {"train.lr_warmup_ratio": ratio}, f"a part of all {total} steps")
    return Result(
        NONE, note="a part of all steps here: `tutti check` says how many there are; set train.lr_warmup_ratio"
    )


def warmup_ratio(value: Any, source: Source) -> Result:
    """The fraction of all steps; the schedule `constant` has no warmup, whatever this is."""
    if _is_constant(source):
        return Result(MAPPED, note="of no effect with the schedule constant")
    return Result(MAPPED, {"train.lr_warmup_ratio": float(value)})


def _is_constant(source: Source) -> bool:
    return source.get("lr_scheduler_type", source.get("lr_scheduler")) == "constant"


def decay(value: Any, source: Source) -> Result:
    """Weight decay of transformers' Trainer, which excludes biases and norms."""
    spared = {"train.no_decay_params": ["bias", "norm"]} if float(value) else {}
    return Result(MAPPED, {"train.weight_decay": float(value), **spared})


def max_steps(value: Any, source: Source) -> Result:
    """Theirs counts the entire run, ours an epoch, whose length `whole_run` then sets."""
    if not isinstance(value, int) or value <= 0:
        return Result(MAPPED, note="off, as it is here")
    return Result(MAPPED, {"train.max_steps": value, "train.num_train_epochs": 1})


_SHARING = ("tensor", "pipeline", "context", "ulysses")
"""Axes whose ranks get the same samples."""


def whole_run(steps: int, settings: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The settings for one epoch of exactly `steps` steps, in which shorter data is repeated; settings: ours, by
    name."""
    sharing = math.prod(settings.get(f"train.{axis}_parallel_size", 1) for axis in _SHARING)
    micro = settings.get("train.micro_batch_size", 1)
    samples = steps * settings.get("train.global_batch_size", micro * (ranks // sharing or 1))
    if settings.get("train.dyn_bsz"):
        return {"data.train_size": samples * settings.get("data.max_seq_len", 2048)}
    return {"data.train_sample": samples}


def epochs(value: Any, source: Source) -> Result:
    """Full passes; max_steps overrides it."""
    if (source.get("max_steps", 0) or 0) > 0:
        return Result(MAPPED, note="max_steps rules")
    if float(value).is_integer():
        return Result(MAPPED, {"train.num_train_epochs": int(value)})
    return Result(CHANGED, {"train.num_train_epochs": max(1, round(float(value)))}, "epochs are whole here")


def every(verb: str) -> Rule:
    """`save_steps` or `eval_steps` of transformers, used if the strategy is `steps`."""

    def rule(value: Any, source: Source) -> Result:
        strategy = source.get(f"{verb}_strategy") or source.get("evaluation_strategy" if verb == "eval" else "")
        if strategy in ("no", "epoch"):
            return Result(MAPPED, note=f"{verb}_strategy rules")
        if isinstance(value, float) and value < 1:
            return Result(NONE, note=f"a number of steps here: set train.{verb}_steps")
        return Result(MAPPED, {f"train.{verb}_steps": int(value), f"train.{verb}_epochs": 0})

    return rule


def strategy(verb: str) -> Rule:
    """`save_strategy` or `eval_strategy` of transformers."""

    def rule(value: Any, source: Source) -> Result:
        steps, per_epoch = f"train.{verb}_steps", f"train.{verb}_epochs"
        # YAML reads a bare `no` as false.
        if value in (False, "no"):
            return Result(MAPPED, {steps: 0, per_epoch: 0})
        if value == "epoch":
            return Result(MAPPED, {steps: 0, per_epoch: 1})
        if value == "steps":
            return Result(MAPPED, note=f"by train.{verb}_steps")
        return Result(CHANGED, {steps: 0, per_epoch: 1}, "by steps or epochs here; an epoch is taken")

    return rule


def resume(value: Any, source: Source) -> Result:
    """Resuming from a checkpoint, which must be one of ours."""
    if not value:
        return Result(MAPPED, note="off, as it is here")
    if value is True:
        note = "the newest checkpoint that Tutti wrote to train.output_dir, if there is one"
        return Result(CHANGED, {"train.load_checkpoint_path": "auto"}, note)
    return Result(NONE, note="its checkpoints cannot be resumed from: name the folder as model.model_path instead")


def fsdp(value: Any, source: Source) -> Result:
    """FSDP's sharding strategy: words such as full_shard, shard_grad_op, offload."""
    words = "full_shard" if value is True else " ".join(names(value)) if isinstance(value, list | str) else ""
    ours: dict[str, Any] = {"train.data_parallel_mode": "fsdp2"}
    if "shard_grad_op" in words:
        ours["train.enable_full_shard"] = False
    if "offload" in words:
        ours["train.enable_fsdp_offload"] = True
    if not words:
        return Result(MAPPED, note="off, as it is here")
    return Result(CHANGED, ours, "torch's FSDP2, with the blocks as its units")


def deepspeed(value: Any, source: Source) -> Result:
    """A DeepSpeed configuration: its ZeRO stage as FSDP2."""
    if not value:
        return Result(MAPPED, note="off, as it is here")
    stage, offload = _zero(value, source.folder)
    if stage is None:
        return Result(NONE, note="which ZeRO stage it asks for cannot be told; see train.data_parallel_mode")
    if stage < 2:
        return Result(
            CHANGED, {"train.data_parallel_mode": "ddp"}, f"ZeRO-{stage}; whole replicas (fsdp2 saves memory)"
        )
    ours: dict[str, Any] = {"train.data_parallel_mode": "fsdp2", "train.enable_full_shard": stage == 3}
    if stage == 3:
        ours |= {"train.init_device": "meta", "train.broadcast_model_weights_from_rank0": False}
    if offload:
        ours["train.enable_fsdp_offload"] = True
    return Result(CHANGED, ours, f"ZeRO-{stage} by torch's FSDP2; nothing else in the DeepSpeed file is read")


def _zero(value: Any, folder: Path) -> tuple[int | None, bool]:
    """The ZeRO stage of a DeepSpeed configuration (a mapping, a file, or what its name suggests), and offloading."""
    tree = value
    if isinstance(value, str):
        try:
            tree = json.loads((folder / value).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = re.search(r"z(?:ero)?[-_]?([0-3])", value.lower())
            return (int(found[1]) if found else None), "offload" in value.lower()
    zero = tree.get("zero_optimization", {}) if isinstance(tree, dict) else {}
    stage = zero.get("stage")
    offloads = [zero.get(part) or {} for part in ("offload_param", "offload_optimizer")]
    return (stage if isinstance(stage, int) else None), any(part.get("device") == "cpu" for part in offloads)


def bf16(value: Any, source: Source) -> Result:
    """bf16 with fp32 parameters; without it or a similar setting, everything is fp32."""
    if value in (True, "auto", "full", "true"):
        return Result(MAPPED, {"train.enable_mixed_precision": True})
    precise = not (source.get("fp16") or source.get("pure_bf16") or source.get("bfloat16") or source.get("float16"))
    return Result(MAPPED, {"train.compute_dtype": "float32"} if precise else {})


_TRACKERS = {"comet_ml": "comet"} | {name: name for name in get_args(TrackerName)}


def trackers(places: Sequence[str]) -> Result:
    """The settings by which a run logs to `places`, names of trackers."""
    ours: dict[str, Any] = {"train.use_wandb": "wandb" in places}
    known = [_TRACKERS[place] for place in places if place in _TRACKERS and place != "wandb"]
    if known:
        ours["train.trackers"] = known
    if others := [place for place in places if place not in (*_TRACKERS, "none", "all")]:
        return Result(CHANGED, ours, f"{', '.join(others)}: not there; see train.trackers")
    return Result(MAPPED, ours)


def report_to(value: Any, source: Source) -> Result:
    """A rule for the trackers that transformers logs to."""
    return trackers([str(place).lower() for place in (value if isinstance(value, list) else [value]) if place])


def names(value: Any) -> list[str]:
    """A list of names, which may be written as one text with commas."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]
