"""The configuration: frozen, inert, typed, documented. `tutti.config.load` reads it from YAML and overrides."""

from pydantic import BaseModel, ConfigDict, Field

from tutti.config.data import DataConfig
from tutti.config.infer import InferConfig
from tutti.config.model import ModelConfig
from tutti.config.train import TrainConfig

__all__ = ["Config", "DataConfig", "InferConfig", "ModelConfig", "TrainConfig"]


class Config(BaseModel):
    """Everything one run is made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    infer: InferConfig = Field(default_factory=InferConfig)
