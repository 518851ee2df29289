"""The model of diffusion training: a transformer of diffusers, wrapped like other models.

`net` is the class named in the folder's config.json, built and called as in diffusers. Its parameters start on the meta
device; buffers and tables, which these classes compute in their constructors, exist at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tutti.config import Config
from tutti.core.structure import ModelStructure, structure_without_tokens
from tutti.core.tensors import seed_of
from tutti.model.diffusion import Family, family_of, require_diffusers
from tutti.model.structure import basic_modules


class DenoiserConfig(PreTrainedConfig):
    """The config of a diffusion transformer. net: the content of its config.json, with `_class_name`."""

    model_type = "tutti_denoiser"

    def __init__(self, net: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = net or {}


class Denoiser(PreTrainedModel):
    """A diffusion transformer, `net`, as a model that a run can train."""

    config: DenoiserConfig
    config_class = DenoiserConfig
    net: Any
    base_model_prefix = "net"
    main_part = "transformer"
    """The name of the whole model, for train.freeze and train.part_lr."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        self.net = make_net(config.net)
        self._no_split_modules = [*(self.net._repeated_blocks or ()), *(self.net._no_split_modules or ())]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave `module` as its class initialized it."""

    def forward(self, **inputs: Any) -> Any:
        """The transformer's output."""
        return self.net(**inputs)

    def get_output_embeddings(self) -> None:
        """None: a diffusion transformer has no head."""
        return

    @property
    def family(self) -> Family:
        """The row of its class."""
        return family_of(self.config.net["_class_name"])


def make_net(net: dict[str, Any]) -> Any:
    """A module of the diffusers class named in a config. ValueError: the class rejects it."""
    name = net["_class_name"]
    factory = getattr(require_diffusers(), name)
    try:
        return factory.from_config({key: value for key, value in net.items() if not key.startswith("_")})
    except (ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"{name} cannot be made of its config.json: {error}") from None


def build_denoiser(config: Config, folder: Path) -> Denoiser:
    """The transformer in `folder`, with parameters on the meta device, in training mode: in fp32, or (without
    train.enable_mixed_precision) in bf16."""
    net = read_net(folder)
    with parameters_on_meta():
        model = Denoiser(DenoiserConfig(net=net))
    if not config.train.enable_mixed_precision:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(parameter.detach().to(torch.bfloat16))
    return model.train()


def cast_to_infer(net: Any, dtype: torch.dtype) -> None:
    """Cast a transformer's weights to `dtype`, except for what its class keeps in fp32 (`_keep_in_fp32_modules`), as
    diffusers' `from_pretrained` does."""
    kept = set(net._keep_in_fp32_modules or ())
    for name, item in net.state_dict(keep_vars=True).items():
        if item.is_floating_point():
            item.data = item.data.to(dtype if kept.isdisjoint(name.split(".")) else torch.float32)


def read_net(folder: Path) -> dict[str, Any]:
    """The config of the transformer in `folder`, with its `_class_name`."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name != "_name_or_path"}


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within this context, modules are built with parameters on the meta device, and everything else as usual."""
    register = nn.Module.register_parameter

    def without_storage(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = without_storage  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def random_net(config: DenoiserConfig, seed: int) -> nn.Module:
    """A transformer of this config on the CPU, initialized at random as its class does, from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(f"{seed} net"))
        return make_net(config.net)


def denoiser_structure(model: Denoiser, basic: Iterable[str] = ()) -> ModelStructure:
    """The structure of a diffusion transformer: its repeated blocks, and a placeholder head. basic: class names from
    model.basic_modules. ValueError: it has no module of such a class."""
    blocks = [(f"net.{name}", block) for name, block in net_blocks(model.net)]
    units = [module for _, module in basic_modules(model, basic)]
    return structure_without_tokens(model, model.config.net["_class_name"], blocks, units, by_keyword=True)


def net_blocks(net: Any) -> list[tuple[str, nn.Module]]:
    """The repeated layers of a transformer with their names, in running order."""
    kinds = {*(net._repeated_blocks or ()), *(net._no_split_modules or ())}
    lists = [(name, part) for name, part in net.named_modules() if isinstance(part, nn.ModuleList)]
    return [
        (f"{name}.{number}", block)
        for name, part in lists
        for number, block in part.named_children()
        if type(block).__name__ in kinds
    ]
