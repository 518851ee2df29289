"""Adapters of diffusion transformers: `pytorch_lora_weights.safetensors`, with the names of diffusers.

diffusers' `load_lora_weights` reads what is written here, and we read what its `save_lora_weights` writes. A key is
`transformer.`, the layer's name in the transformer, and `.lora_A.weight` or `.lora_B.weight`. Ranks are those of the
tensors; alpha and other settings are in the file's metadata, or in older files in tensors `.alpha`; without either,
alpha is the rank. We also record the base model in the metadata, as peft's adapters do. Other programs' names
(lora_down, lora_up) are refused; diffusers can convert them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutti.checkpoint.hf_save import gather_full, prepare_folder
from tutti.core.dist import World
from tutti.core.files import describe_error, put_folder
from tutti.core.hub import path_of_base
from tutti.core.tensors import local_part
from tutti.model.denoiser import Denoiser
from tutti.model.initialize import own_part
from tutti.model.lora import Lora, adapters, listed, lora_of
from tutti.model.pipeline_folder import TRANSFORMER

ADAPTERS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
_PREFIX = "net."


def holds_adapters(folder: Path) -> bool:
    """True if `folder` contains adapters of a diffusion transformer."""
    return (folder / ADAPTERS).is_file()


def base_of_adapters(folder: Path) -> str | None:
    """The path, or hub name, of the base model of the adapters in `folder`; None if it is not recorded. ValueError:
    the file cannot be read."""
    _, settings = _read(folder)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    return path_of_base(base, revision) if base else None


def read_lora(folder: Path, model: Denoiser, dropout: float = 0.0) -> Lora:
    """The settings of the adapter in `folder` for `model`, which may be on the meta device.

    dropout: for the training. ValueError: it is not an adapter of this model, or of an unknown variant.
    """
    tensors, settings = _read(folder)
    layers = {name for name, part in tensors if part != "alpha"}
    modules = dict(model.net.named_modules())
    if unknown := sorted(name for name in layers if name not in modules):
        raise ValueError(f"model.adapter_path: {folder} adapts {listed(unknown)}, which this model does not have")
    ranks = {name: len(tensor) for (name, part), tensor in tensors.items() if part == "A"}
    usual = int(settings.get("r") or Counter(ranks.values()).most_common(1)[0][0])
    alpha = float(settings.get("lora_alpha") or usual)
    alphas = {} if settings else {name: float(rank) for name, rank in ranks.items()}
    alphas |= {name: float(value) for (name, part), value in tensors.items() if part == "alpha"}
    alphas |= {name: float(value) for name, value in (settings.get("alpha_pattern") or {}).items()}
    return Lora(
        rank=usual,
        alpha=alpha,
        dropout=dropout,
        rslora=bool(settings.get("use_rslora")),
        targets=tuple(f"{_PREFIX}{name}" for name in ranks),
        ranks={f"{_PREFIX}{name}": rank for name, rank in ranks.items() if rank != usual},
        alphas={f"{_PREFIX}{name}": value for name, value in alphas.items() if value != alpha},
    )


def load_adapters(model: Denoiser, folder: Path) -> None:
    """Load the adapters of `model`, whose settings are from `read_lora`, from `folder`. ValueError: one has another
    shape."""
    tensors, _ = _read(folder)
    for module, adapter in adapters(model):
        name = adapter.name.removeprefix(_PREFIX)
        A, B, _ = adapter.factors(module)
        for part, target in (("A", A), ("B", B)):
            value = tensors[name, part]
            if value.shape != target.shape:
                found, wanted = list(value.shape), list(target.shape)
                raise ValueError(f"model.adapter_path: {name}.lora_{part} in {folder} is {found}, not {wanted}")
            with torch.no_grad():
                local_part(target).copy_(own_part(value.float(), target))


def _read(folder: Path) -> tuple[dict[tuple[str, str], Tensor], dict[str, Any]]:
    """The tensors in the adapter file of `folder`, by layer and part (A, B, alpha), and the settings beside them."""
    file = folder / ADAPTERS
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            described = json.loads((content.metadata() or {}).get(METADATA, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"model.adapter_path: there is no {ADAPTERS} that can be read in {folder}: {error}") from None
    found: dict[tuple[str, str], Tensor] = {}
    odd = []
    for key, tensor in tensors.items():
        owner, _, rest = key.partition(".")
        for part, suffix in (("A", ".lora_A.weight"), ("B", ".lora_B.weight"), ("alpha", ".alpha")):
            if owner == TRANSFORMER and rest.endswith(suffix):
                found[rest.removesuffix(suffix), part] = tensor
                break
        else:
            odd.append(key)
    layers = {name for name, _ in found}
    odd += [f"{name} without A and B" for name in sorted(layers) if not {(name, "A"), (name, "B")} <= found.keys()]
    if odd or not found:
        raise ValueError(
            f"model.adapter_path: {file} holds {listed(odd) or 'nothing'}; understood are pairs of "
            f"{TRANSFORMER}.LAYER.lora_A.weight and lora_B.weight, as diffusers' save_lora_weights writes them"
        )
    prefix = f"{TRANSFORMER}."
    settings = {key.removeprefix(prefix): value for key, value in described.items() if key.startswith(prefix)}
    if not_ours := [name for name in ("use_dora", "lora_bias", "modules_to_save") if settings.get(name)]:
        raise ValueError(f"model.adapter_path: {file} sets what is not understood: {', '.join(not_ours)}")
    return found, settings


def export_adapters(
    model: Denoiser, folder: Path, world: World, base: str | None = None, revision: str | None = None
) -> None:
    """Write the adapters of `model` to `folder`, which is replaced. Collective.

    base, revision: the folder of the base model, or its hub name and commit. ValueError, on all ranks: they cannot be
    written.
    """
    lora = lora_of(model)
    assert lora is not None
    partial = folder.with_name(f".{folder.name}.partial")
    world.run_on_all_ranks(lambda: prepare_folder(folder, partial) if world.is_main else None)
    tensors: dict[str, Tensor] = {}
    names = []
    for module, adapter in adapters(model):
        name = adapter.name.removeprefix(_PREFIX)
        names.append(name)
        factors = adapter.factors(module)
        for part, tensor in (("A", factors.A), ("B", factors.B)):
            full = gather_full(tensor, keep=world.is_main)
            if world.is_main:
                tensors[f"{TRANSFORMER}.{name}.lora_{part}.weight"] = full.contiguous()
    settings = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": {name.removeprefix(_PREFIX): rank for name, rank in lora.ranks.items()},
        "alpha_pattern": {name.removeprefix(_PREFIX): alpha for name, alpha in lora.alphas.items()},
        "use_rslora": lora.rslora,
        "target_modules": names,
        "base_model_name_or_path": base,
        "revision": revision,
    }
    described = json.dumps({f"{TRANSFORMER}.{name}": value for name, value in settings.items()}, sort_keys=True)

    def write() -> None:
        try:
            save_file(tensors, partial / ADAPTERS, metadata={"format": "pt", METADATA: described})
            put_folder(partial, folder)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"could not write {folder}: {describe_error(error)}") from error

    world.run_on_all_ranks(lambda: write() if world.is_main else None)
