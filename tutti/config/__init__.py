"""The configuration: frozen, inert, typed, documented. `tutti.config.load` reads it from YAML and overrides."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from tutti.config.argument import Argument, arguments_of
from tutti.config.data import DataConfig
from tutti.config.infer import InferConfig
from tutti.config.model import ModelConfig
from tutti.config.train import TrainConfig

__all__ = [
    "ARGUMENTS",
    "FOLLOW_WORLD",
    "GROUPS",
    "Config",
    "ConfigError",
    "DataConfig",
    "InferConfig",
    "ModelConfig",
    "TrainConfig",
    "away_from_default",
    "get",
    "resolve",
]


@dataclass(frozen=True)
class Config:
    """The complete configuration of a run.

    explicit: the dotted names that the user set, as opposed to defaults.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    explicit: frozenset[str] = field(default=frozenset(), compare=False, repr=False)


class ConfigError(ValueError):
    """Raised for an invalid configuration, with one line per problem that begins with the dotted argument."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


GROUPS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "infer": InferConfig}

ARGUMENTS: dict[str, Argument] = {
    argument.name: argument for group, cls in GROUPS.items() for argument in arguments_of(group, cls)
}

_DERIVED: dict[str, Callable[[Config], Any]] = {
    "model.config_path": lambda config: config.model.model_path,
    "model.tokenizer_path": lambda config: config.model.model_path or config.model.config_path,
    "data.text_keys": lambda config: config.data.task.columns,
    "infer.tokenizer_path": lambda config: config.model.model_path or config.infer.model_path,
}
"""Defaults that depend on other arguments."""

FOLLOW_WORLD = ("train.global_batch_size",)
"""Defaults that depend on the number of ranks: `layout.resolve_sizes` fills them in."""


def get(config: Config, name: str) -> Any:
    """The value of the argument with this dotted name."""
    return attrgetter(name)(config)


def resolve(config: Config) -> Config:
    """The configuration with defaults that depend on other arguments filled in."""
    for name, derive in _DERIVED.items():
        if get(config, name) is None:
            group, leaf = name.split(".")
            config = replace(config, **{group: replace(getattr(config, group), **{leaf: derive(config)})})
    return config


def away_from_default(config: Config, name: str) -> bool:
    """True if the argument's value differs from its resolved default."""
    value = get(config, name)
    if name in _DERIVED:
        return value is not None and value != _DERIVED[name](config)
    return value != ARGUMENTS[name].default
