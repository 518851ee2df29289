"""Adapter folders: `adapter_config.json` and `adapter_model.safetensors`, in the names and layouts of peft.

We read what peft writes, and peft reads what we write. A key is `base_model.model.`, the layer's name in the model, and
`.lora_A.weight`, `.lora_B.weight` or (DoRA) `.lora_magnitude_vector`; fully trained modules have their own names. For a
stack of experts peft wraps the module once for each adapted parameter, the first one innermost, so that the keys of all
but the last contain `.base_layer`; A is [E * r, in] and B is [out, r * E]. peft has no layout for DoRA on stacks of
experts; it is written by the same rules, and only we can read it.

Which layers are adapted, and with which rank, is taken from the keys and shapes rather than from the patterns in the
config. Settings that would change the computation and are unknown are refused. Adapters are small, so every rank reads
all of one and takes its part. Next to the adapter of a composed model, composed.yaml lists the model's parts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tutti.checkpoint.hf_files import Checkpoint, weights_digest
from tutti.checkpoint.hf_save import first_holders, gather_from, prepare_folder
from tutti.config import Config, ModelConfig
from tutti.core.dist import World
from tutti.core.files import put_folder
from tutti.core.hub import path_of_base
from tutti.core.modules import attached
from tutti.core.tensors import local_part
from tutti.model.initialize import own_part
from tutti.model.lora import (
    Adapter,
    Lora,
    adapters,
    check_frozen,
    listed,
    lora_of,
    modules_to_save,
    row_norms,
)
from tutti.model.pipeline_folder import open_folder
from tutti.model.structure import ADAPTER_MARK, is_classifier, is_experts, new_parts

CONFIG = "adapter_config.json"
COMPOSED = "composed.yaml"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight", "offset": ".lora_magnitude_vector"}
_NOT_UNDERSTOOD = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)


def is_adapter_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_path(folder: Path) -> str:
    """The path, or hub name, of the base model of the adapter in `folder`. ValueError: none is recorded."""
    settings = _read_config(folder)
    path, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not path:
        raise ValueError(f"{folder / CONFIG} does not name its base model (base_model_name_or_path)")
    return path_of_base(path, revision)


def plan_adapters(config: Config, model: Any, read: Callable[..., Lora] | None = None) -> Lora | None:
    """The settings of the adapters for `model`: from train.lora_*, with new modules fully trained; or those of the
    adapter at model.adapter_path, read by `read` (default `read_lora`). Logs parts of train.freeze that have no
    effect."""
    train = config.train
    if train.architecture != "lora":
        return None
    # Preference training uses no dropout, like its reference model.
    dropout = 0.0 if config.data.data_type == "dpo" else train.lora_dropout
    if config.model.adapter_path is not None:
        lora = (read or read_lora)(Path(config.model.adapter_path), model, dropout=dropout)
    else:
        lora = Lora(
            rank=train.lora_rank,
            alpha=train.lora_alpha,
            dropout=dropout,
            rslora=train.lora_rslora,
            dora=train.lora_dora,
            targets=train.lora_targets,
            modules_to_save=(*train.lora_full_modules, *new_parts(model)),
        )
    check_frozen(model, lora, train.freeze, () if config.model.adapter_path else train.lora_full_modules)
    return lora


def read_lora(folder: Path, model: PreTrainedModel, dropout: float = 0.0) -> Lora:
    """The settings of the adapter in `folder` for `model`, which may be on the meta device.

    dropout: for the training. ValueError: it is not a LoRA adapter of this model, or of an unknown variant.
    """
    settings = _read_config(folder)
    ranks: dict[str, int] = {}
    full: dict[str, None] = {}
    modules, names = dict(model.named_modules()), model.state_dict()
    for key, tensor in _open(folder).meta().items():
        name = key.removeprefix(_PREFIX)
        if name.endswith(_SUFFIXES["A"]):
            target, num_experts = _target(name.removesuffix(_SUFFIXES["A"]), modules, settings)
            ranks[target] = tensor.shape[0] // num_experts
        elif ".lora_" not in name and name in names:
            full[name.rpartition(".")[0]] = None
    if not ranks:
        raise ValueError(f"model.adapter_path: {folder} adapts no layer")
    alphas = {}
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        alphas.update({name: float(alpha) for name in ranks if re.match(rf"(.*\.)?({pattern})$", name)})
    rank = int(settings.get("r", 8))
    return Lora(
        rank=rank,
        alpha=float(settings.get("lora_alpha", 8)),
        dropout=dropout,
        rslora=bool(settings.get("use_rslora")),
        dora=bool(settings.get("use_dora")),
        targets=tuple(ranks),
        modules_to_save=tuple(full),
        ranks={name: own for name, own in ranks.items() if own != rank},
        alphas=alphas,
    )


def load_adapter(model: PreTrainedModel, folder: Path, full_model: PreTrainedModel | None = None) -> None:
    """Load the adapters and fully trained modules of `model`, whose frozen weights are loaded, from `folder`.

    full_model: the complete model, on the meta device, if `model` is a part of it. Collective if the model is sharded.
    ValueError: keys are missing, unknown or of another shape.
    """
    checkpoint = _open(folder)
    given = checkpoint.meta()
    items = {item.key: item for item in _items(full_model or model)}
    # peft versions differ in whether the magnitude's key ends with the name of a parameter.
    stored = {key.removesuffix(".weight") if "lora_magnitude" in key else key: key for key in given}
    # Tied parameters may be stored under any of their keys.
    first = {id(item.tensor): key for key, item in reversed(items.items()) if key in stored}
    problems = {
        "it lacks": [key for key, item in items.items() if id(item.tensor) not in first],
        "it holds what the model has not": [key for key in stored if key not in items],
        "of another shape": [
            key for key, item in items.items() if key in stored and tuple(given[stored[key]].shape) != item.shape
        ],
    }
    found = "; ".join(f"{what}: {listed(keys)}" for what, keys in problems.items() if keys)
    if found:
        raise ValueError(f"model.adapter_path: {folder} does not fit {type(model).__name__}: {found}")
    sources = {key: first[id(item.tensor)] for key, item in items.items()}
    for key, source in sources.items():
        values = {stored[name] for name in (key, source) if name in stored}
        if len(values) > 1 and not torch.equal(*(checkpoint.read(value)[...] for value in values)):
            raise ValueError(
                f"model.adapter_path: {key} and {source} are one parameter in this model, but differ in {folder}"
            )
    for item in _items(model):
        value = item.unpack(checkpoint.read(stored[sources[item.key]])[...].float())
        local_part(item.tensor).copy_(own_part(value, item.tensor))


def export_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: Any,
    *,
    world: World,
    base: str | None,
    revision: str | None = None,
    full_model: PreTrainedModel | None = None,
    composed: ModelConfig | None = None,
) -> None:
    """Write the trained parts of an adapted `model` to `folder`, with the tokenizer, replacing the folder.

    base, revision: the folder of the base model, or its hub name and commit. full_model: the complete model, on the
    meta device, if the ranks' models are parts of it. composed: for a composed model, the description of its other
    parts, which peft does not support. Every rank must call it.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    world.run_on_all_ranks(lambda: prepare_folder(folder, partial) if world.is_main else None)
    held = {item.key: item for item in _items(model)}
    holders = first_holders(set(held), world)
    tensors: dict[str, Tensor] = {}
    for item in _items(full_model or model):
        own, holder = held.get(item.key), holders[item.key]
        full = gather_from(None if own is None else own.tensor, item.tensor, holder, world)
        if item.norms is not None:
            norms = None if own is None or own.norms is None else own.norms()
            full = full.float() + gather_from(norms, item.tensor.float(), holder, world)
        if world.is_main:
            tensors[item.key] = item.pack(full).contiguous().clone()

    def write() -> None:
        if world.is_main:
            save_file(tensors, partial / WEIGHTS[0], metadata={"format": "pt"})
            (partial / CONFIG).write_text(
                json.dumps(_config(full_model or model, base, revision), indent=2, sort_keys=True) + "\n"
            )
            if composed is not None:
                (partial / COMPOSED).write_text(yaml.safe_dump(_described(composed), sort_keys=False))
            tokenizer.save_pretrained(partial)
            put_folder(partial, folder)

    world.run_on_all_ranks(write)


def _described(model: ModelConfig) -> dict[str, Any]:
    """The settings of `model` that describe a composed model's parts besides its foundation, with absolute paths."""
    return {
        **{
            group: {
                kind: {key: _absolute(value) if key.endswith("_path") else value for key, value in spec.items()}
                for kind, spec in getattr(model, group).items()
            }
            for group in ("encoders", "decoders")
        },
        "input_encoder": model.input_encoder,
        "output_encoder": model.output_encoder,
    }


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def read_composed(folder: Path) -> dict[str, Any]:
    """The settings of model.* for the parts of a composed model, from the adapter in `folder`; empty if it is not
    composed."""
    file = folder / COMPOSED
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def base_of(config: Config, world: World) -> dict[str, str] | None:
    """Facts that identify the base model of a run with adapters: its path, and a digest of samples of its weight
    files and of its storage format, or of config and seed if it is random. None without adapters. Every rank must
    call it."""
    if config.train.architecture != "lora":
        return None
    return world.broadcast(world.run_on_all_ranks(lambda: _fingerprint(config) if world.is_main else None))


def _fingerprint(config: Config) -> dict[str, str]:
    digest = hashlib.sha256(config.train.lora_base_dtype.encode())
    name = config.model.model_path or config.model.config_path
    assert name is not None
    path = Path(name)
    if config.model.model_path is None:
        file = path if path.is_file() else path / "config.json"
        if config.data.task.kind == "denoiser":
            file = open_folder(config).transformer / "config.json"
        digest.update(f"{config.train.seed} {json.dumps(json.loads(file.read_text()), sort_keys=True)}".encode())
        return {"path": name, "digest": digest.hexdigest()}
    weights = open_folder(config).weights if config.data.task.kind == "denoiser" else path
    digest.update(weights_digest(weights).encode())
    return {"path": name, "digest": digest.hexdigest()}


def require_base(saved: dict[str, str] | None, base: dict[str, str] | None) -> None:
    """Raise ValueError unless the base of a checkpoint's adapters is the one of this run."""
    if (saved or {}).get("digest") != (base or {}).get("digest"):
        assert base is not None or saved is not None
        raise ValueError(
            "train.load_checkpoint_path: the checkpoint holds adapters of another base model than this run's: "
            f"{(saved or {}).get('path')} then, {(base or {}).get('path')} now (weights, train.lora_base_dtype or seed "
            "differ)"
        )


@dataclass(frozen=True)
class _Item:
    """A trained tensor, and its format in an adapter file. norms: added to it there (DoRA)."""

    key: str
    tensor: Tensor
    shape: tuple[int, ...]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]
    norms: Callable[[], Tensor] | None = None


def _items(model: PreTrainedModel) -> Iterator[_Item]:
    """Yield every trained tensor of an adapted model, with its key in a file."""
    for module, adapter in adapters(model):
        parts = adapter.factors(module)._asdict()
        for part, tensor in parts.items():
            if tensor is not None:
                yield _item(_key(module, adapter) + _SUFFIXES[part], part, tensor, module, adapter)
    for name, module in modules_to_save(model).items():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and ADAPTER_MARK not in leaf:
                yield _Item(f"{_PREFIX}{name}.{leaf}", parameter, tuple(parameter.shape), _same, _same)


def _item(key: str, part: str, tensor: Tensor, module: nn.Module, adapter: Adapter) -> _Item:
    shape = tuple(tensor.shape)
    if part == "offset":

        def norms() -> Tensor:
            return row_norms(adapter.weight_of(module))

        return _Item(key, tensor, shape, _same, lambda value: value - _whole(norms()).to(value.device), norms)
    if len(shape) == 2:
        return _Item(key, tensor, shape, _same, _same)
    if part == "A":
        flat = (shape[0] * shape[1], shape[2])
        return _Item(key, tensor, flat, lambda value: value.reshape(flat), lambda value: value.reshape(shape))
    experts, rows, rank = shape
    return _Item(
        key,
        tensor,
        (rows, rank * experts),
        lambda value: value.permute(1, 2, 0).reshape(rows, rank * experts),
        lambda value: value.reshape(rows, rank, experts).permute(2, 0, 1),
    )


def _same(value: Tensor) -> Tensor:
    return value


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _key(module: nn.Module, adapter: Adapter) -> str:
    """The layer's name in the file."""
    if not is_experts(module):
        return _PREFIX + adapter.name
    adapted = [leaf for leaf, _ in module.named_parameters(recurse=False) if leaf in attached(module).adapters]
    depth = len(adapted) - 1 - adapted.index(adapter.weight)
    return _PREFIX + adapter.name.removesuffix(f".{adapter.weight}") + ".base_layer" * depth


def _target(name: str, modules: dict[str, nn.Module], settings: dict[str, Any]) -> tuple[str, int]:
    """The layer's name in the model for a key, and its number of experts (1 for a separate layer)."""
    owner = name.replace(".base_layer", "")
    module = modules.get(owner)
    if module is None:
        raise ValueError(f"model.adapter_path: it adapts {owner}, which this model does not have")
    if not is_experts(module):
        return owner, 1
    patterns = settings.get("target_parameters") or ()
    stacks = [
        leaf
        for leaf, _ in module.named_parameters(recurse=False)
        if any(f".{owner}.{leaf}".endswith(f".{pattern}") for pattern in patterns)
    ]
    depth = name.count(".base_layer")
    if depth >= len(stacks):
        raise ValueError(f"model.adapter_path: its target_parameters do not name what it adapts of {owner}")
    return f"{owner}.{stacks[-1 - depth]}", int(module.num_experts)  # type: ignore[arg-type]  # a plain attribute


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(settings, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ValueError(f"model.adapter_path: there is no {CONFIG} that can be read in {folder}") from error
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"model.adapter_path: {folder} holds an adapter of kind {kind}; LORA is understood")
    unknown = [f"{name} = {settings[name]}" for name in _NOT_UNDERSTOOD if settings.get(name)]
    if settings.get("bias", "none") != "none":
        unknown.append(f"bias = {settings['bias']}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        unknown.append(f"init_lora_weights = {start}, which changes the base model")
    if unknown:
        raise ValueError(f"model.adapter_path: {file} sets what is not understood: {', '.join(unknown)}")
    return settings


def _open(folder: Path) -> Checkpoint:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"model.adapter_path: there is no {WEIGHTS[0]} in {folder}")
    try:
        return Checkpoint(file)
    except ValueError as error:
        raise ValueError(str(error).replace("model.model_path", "model.adapter_path")) from error


def _config(model: PreTrainedModel, base: str | None, revision: str | None) -> dict[str, Any]:
    """adapter_config.json of an adapted model."""
    lora = lora_of(model)
    assert lora is not None
    every = adapters(model)
    layers = [adapter.name for module, adapter in every if not is_experts(module)]
    stacks = [adapter.name for module, adapter in every if is_experts(module)]
    full = list(modules_to_save(model))
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {
        "alpha_pattern": {name: _number(alpha) for name, alpha in lora.alphas.items()},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(adapter.transposed and not is_experts(module) for module, adapter in every),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(lora.alpha),
        # peft does not support dropout with stacks of experts; to read an adapter, it is not needed.
        "lora_dropout": 0.0 if stacks else lora.dropout,
        "modules_to_save": full or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": dict(lora.ranks),
        "revision": revision,
        "target_modules": _shortened(layers, [name for name, _ in model.named_modules()], 1),
        "target_parameters": _shortened(stacks, parameters, 3) or None,
        "task_type": "SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
    }


def _shortened(names: Sequence[str], every: Sequence[str], parts: int) -> list[str]:
    """The last `parts` parts of `names`, if they are unambiguous among `every`; otherwise the full names."""
    ends = {".".join(name.split(".")[-parts:]) for name in names}
    meant = {name for name in every if any(f".{name}".endswith(f".{end}") for end in ends)}
    return sorted(ends) if meant == set(names) else list(names)


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
