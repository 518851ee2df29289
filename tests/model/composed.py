"""Tiny parts of composed models on disk: encoders by name, and configurations that combine them with a language
model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tests.model import zoo

_VIT: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.1,
}

TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("siglip_vision_model", _VIT),
    "clip": ("clip_vision_model", _VIT),
    "dinov2": ("dinov2", _VIT),
    "qwen2_vl": (
        "qwen2_vl",
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "num_heads": 2,
                "hidden_size": 24,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "initializer_range": 0.1,
            }
        },
    ),
}
"""name -> model_type and config values; the last is a full model that contains the encoder."""

WHISPER: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 16,
    "max_source_positions": 300,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "init_std": 0.1,
}


def write_tower(folder: Path, name: str) -> str:
    """Write the config of an encoder to `folder`/`name`, and return this path."""
    kind, values = ("whisper", WHISPER) if name == "whisper" else TOWERS[name]
    AutoConfig.for_model(kind, **values).save_pretrained(folder / name)
    return str(folder / name)


def write_foundation(folder: Path, name: str, *, vocab_size: int = 2048, **changes: Any) -> str:
    """Write the config of a language model of `zoo` to `folder`/`name`, and return this path."""
    config = zoo.tiny(name, vocab_size=vocab_size, initializer_range=0.1, **changes)
    config.save_pretrained(folder / name)
    return str(folder / name)
