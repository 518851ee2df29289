"""Folders of tiny diffusion models of each class, and data with small pictures for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

QUICKSTART = Path(__file__).parents[1] / "data" / "quickstart"

_DIM = {"num_attention_heads": 2, "attention_head_dim": 8}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        **_DIM,
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 16,
    },
    "FluxTransformer2DModel": {
        **_DIM,
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": [2, 2, 4],
    },
    "QwenImageTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": [4, 6, 6],
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    },
    "LTXVideoTransformer3DModel": {
        **_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 16,
        "num_layers": 1,
        "caption_channels": 16,
    },
    "SanaTransformer2DModel": {
        **_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 8,
        "patch_size": 1,
    },
    "PixArtTransformer2DModel": {
        **_DIM,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 8,
        "patch_size": 2,
        "use_additional_conditions": False,
    },
}

_KL = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
}
_OF_VIDEOS = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
_STATISTICS = {"latents_mean": [0.1, 0.0, -0.1, 0.0], "latents_std": [1.0, 2.0, 1.0, 0.5]}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "QwenImageTransformer2DModel": {"_class_name": "AutoencoderKLQwenImage", **_OF_VIDEOS, **_STATISTICS},
    "WanTransformer3DModel": {"_class_name": "AutoencoderKLWan", **_OF_VIDEOS, **_STATISTICS},
    "LTXVideoTransformer3DModel": {
        "_class_name": "AutoencoderKLLTXVideo",
        "latent_channels": 4,
        "block_out_channels": [4] * 4,
        "decoder_block_out_channels": [4] * 4,
        "layers_per_block": [1] * 5,
        "decoder_layers_per_block": [1] * 5,
    },
}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_folder(root: Path, name: str = "SD3Transformer2DModel", **changes: Any) -> Path:
    """The folder of a model of the class `name`, of configs alone, with a small language model as its text encoder."""
    write_json(root / "transformer/config.json", {"_class_name": name, **TRANSFORMERS[name], **changes})
    write_json(root / "vae/config.json", AUTOENCODERS.get(name, _KL))
    encoder = json.loads((QUICKSTART.parents[1] / "configs/models/qwen3-quickstart/config.json").read_text())
    encoder |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    write_json(root / "text_encoder/config.json", encoder)
    (root / "tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / file, root / "tokenizer" / file)
    return root


def make_data(folder: Path, count: int = 6, sizes: tuple[tuple[int, int], ...] = ((16, 16),)) -> Path:
    """A file of `count` rows, with pictures of the sizes in turn."""
    folder.mkdir(exist_ok=True)
    rows = []
    draw = np.random.default_rng(0)
    for number in range(count):
        size = sizes[number % len(sizes)]
        pixels = draw.integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(folder / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "caption": f"picture {number}"}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path
