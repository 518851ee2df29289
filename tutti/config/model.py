from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    config_path: str | None = None
    """Path to the model huggingface configuration, like `config.json`"""
    model_path: str | None = None
    """Path to the model parameter file. If empty, random initialization will be performed"""
    tokenizer_path: str | None = None
    """Path to the tokenizer"""
    safetensor_idx_path: str | None = None
    """Path to the safetensor index file"""
    encoders: dict[str, Any] = Field(default_factory=dict)
    """Configuration file for multi-modal encoders"""
    decoders: dict[str, Any] = Field(default_factory=dict)
    """Configuration file for multi-modal decoders"""
    input_encoder: Literal["encoder", "decoder"] = "encoder"
    """Use the encoder or decoder to encode the input image"""
    output_encoder: Literal["encoder", "decoder"] = "decoder"
    """Use the encoder or decoder to encode the output image"""
    encode_target: bool = False
    """Whether to encode the training data for the diffusion model"""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "native-sparse"] = (
        "flash_attention_2"
    )
    """The attention implementation to use."""
    moe_implementation: Literal["eager", "fused"] | None = None
    """The MoE implementation to use."""
    basic_modules: tuple[str, ...] = ()
    """Basic modules beyond model._no_split_modules to be sharded in FSDP."""
