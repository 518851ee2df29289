"""Tiny models that take images, and samples with images for them, built by hand as their processors would.

`tiny(name)` gives a config for `AutoModelForMultimodalLM.from_config`: two layers of text and of vision, width 32.
`Picture` samples know the arguments that the family's own forward takes for one of them, and `pack_pictures` makes a
packed batch of several. Images are of different sizes where the family allows that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from tests.model.zoo import BASE, VOCAB
from tutti.core.batch import IGNORE, Batch, Sample, pack

IMAGE, VIDEO = 250, 251
_TEXT: dict[str, Any] = BASE | {"vocab_size": VOCAB, "initializer_range": 0.1}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.1,
}
_GRID: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.1,
}
_QWEN: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 252}


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


_QWEN3_VISION = _GRID | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

_WINDOWED = _GRID | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": _QWEN
    | {
        "text_config": _TEXT | _mrope(1, 1, 2),
        "vision_config": _GRID | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": _QWEN
    | {
        "text_config": _TEXT | _mrope(1, 1, 2) | {"tie_word_embeddings": True},
        "vision_config": _WINDOWED,
        "tie_word_embeddings": True,
    },
    "qwen3_vl": _QWEN | {"text_config": _TEXT | _mrope(3, 3, 2) | {"head_dim": 16}, "vision_config": _QWEN3_VISION},
    "qwen3_vl_moe": _QWEN
    | {
        "text_config": _TEXT
        | _mrope(3, 3, 2)
        | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "vision_config": _QWEN3_VISION,
    },
    "qwen3_5": _QWEN
    | {
        "text_config": _TEXT
        | _mrope(3, 3, 2)
        | {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "vision_config": {key: value for key, value in _QWEN3_VISION.items() if key != "deepstack_visual_indexes"},
    },
    "glm4v": {
        "text_config": _TEXT | _mrope(1, 1, 2),
        "vision_config": _GRID | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "image_size": 16},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    },
    "gemma3": {
        "text_config": _TEXT
        | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral", "head_dim": 8},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": IMAGE,
    },
    "internvl": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
    "idefics3": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "smolvlm": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
}
"""model_type -> what its config sets."""

_HEARING: dict[str, Any] = {
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "max_source_positions": 100,
    "initializer_range": 0.1,
}

_COHERE2 = _TEXT | {
    "model_type": "cohere2", "head_dim": 16, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip

_ENDS = {"vision_start_token_id": 252, "vision_end_token_id": 253, "audio_end_token_id": 254}

FROM_FILES: dict[str, dict[str, Any]] = {
    "qwen2_audio": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "audio_config": _HEARING | {"model_type": "qwen2_audio_encoder"},
    },
    "qwen2_5_omni_thinker": _ENDS
    | {
        "text_config": _TEXT | _mrope(1, 1, 2) | {"tie_word_embeddings": False},
        "vision_config": _WINDOWED,
        "audio_config": _HEARING | {"n_window": 20, "output_dim": 32},
    },
    "qwen3_omni_moe_thinker": _ENDS
    | {
        "text_config": _TEXT
        | _mrope(3, 3, 2)
        | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "vision_config": _QWEN3_VISION,
        "audio_config": _HEARING
        | {"n_window": 50, "output_dim": 32, "n_window_infer": 100, "downsample_hidden_size": 8},
    },
    "gemma4": {
        "text_config": _TEXT
        | {
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
            "initializer_range": 0.1,
        },
        "audio_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [32, 4],
            "output_proj_dims": 32,
            "initializer_range": 0.1,
        },
    },
    "llava_next": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
        "image_grid_pinpoints": [[16, 32], [32, 16]],
        "vision_feature_layer": -1,
    },
    "llava_onevision": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
    },
    "aya_vision": {
        "text_config": _COHERE2,
        "vision_config": _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "downsample_factor": 2,
    },
    "cohere2_vision": {
        "text_config": _COHERE2,
        "vision_config": _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "downsample_factor": 2,
        "alignment_intermediate_size": 48,
    },
    "ovis2": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _VISION | {"vocab_size": 64, "hidden_stride": 2},
        "hidden_size": 32,
    },
    "gemma4_unified": {
        "text_config": _TEXT
        | {
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 64,
            "output_proj_dims": 32,
            "initializer_range": 0.1,
        },
        "audio_config": {"initializer_range": 0.1},
    },
    "video_llama_3": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": {key: value for key, value in _VISION.items() if key != "image_size"},
    },
}
"""Families that are only tested with files and their own processor."""

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v")
"""Families that take images of any number of patches, and positions with three rows."""


def tiny(name: str, **text: Any) -> PreTrainedConfig:
    """The tiny config of family `name` (of FAMILIES or FROM_FILES), with `text` set on its language model's part."""
    values = (FAMILIES | FROM_FILES)[name]
    text = values["text_config"] | text
    if "vocab_size_per_layer_input" in text:
        text["vocab_size_per_layer_input"] = text["vocab_size"]
    return AutoConfig.for_model(name, **{**values, "text_config": text})


@dataclass(frozen=True)
class Picture:
    """A sample, and what the family's forward takes beside its tokens; nothing for a sample of text alone."""

    sample: Sample
    inputs: dict[str, Tensor]


def picture(family: str, seed: int, length: int, num_images: int, *, video: bool = False) -> Picture:
    """A sample of `length` tokens of text and `num_images` images between them, from `seed`."""
    rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    ids = rng.integers(3, 240, length).astype(np.int32)
    pixels, grids, types = [], [], np.zeros(length, np.int32)
    for number in range(num_images):
        if family in GRIDS:
            grid = (2, 4, 4) if video else ((1, 4, 4), (1, 2, 6), (1, 6, 4))[number % 3]
            frames, rows, columns = grid
            grids.append(grid)
            pixels.append(torch.randn(frames * rows * columns, 3 * 2 * 4 * 4, generator=torch_rng))
            count = frames * rows * columns // 4
        else:
            pixels.append(torch.randn(1, 3, 16, 16, generator=torch_rng))
            count = 16 if family == "llava" else 4
        place = int(rng.integers(1, len(ids)))
        while types[place] or types[place - 1]:  # not within or beside another image
            place = int(rng.integers(1, len(ids)))
        ids = np.insert(ids, place, np.full(count, VIDEO if video else IMAGE))
        types = np.insert(types, place, np.full(count, 2 if video else 1))
    labels = np.append(ids[1:], IGNORE).astype(np.int32)
    labels[rng.random(len(ids)) < 0.3] = IGNORE
    sample = Sample(ids.astype(np.int32), labels)
    if not pixels:
        return Picture(sample, {})
    if family in GRIDS:
        kind, name = ("video", "pixel_values_videos") if video else ("image", "pixel_values")
        inputs = {name: torch.cat(pixels), f"{kind}_grid_thw": torch.tensor(grids)}
        return Picture(sample, inputs | {"mm_token_type_ids": torch.from_numpy(types).long()[None]})
    values = torch.cat(pixels)
    inputs = {"pixel_values": values[None] if family in ("idefics3", "smolvlm") else values}
    if family == "mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16]] * num_images)
    if family == "gemma3":
        inputs["token_type_ids"] = torch.from_numpy(types).long()[None]
    return Picture(sample, inputs)


def pack_pictures(pictures: list[Picture], *, pad_to: int | None = None) -> Batch:
    """A packed batch of all samples, with what they take beside tokens laid end to end."""
    batch = pack([item.sample for item in pictures], pad_to=pad_to)
    extras: dict[str, list[Tensor]] = {}
    along = {name for item in pictures for name in item.inputs if name.endswith("token_type_ids")}
    for item in pictures:
        absent = {name: torch.zeros(1, len(item.sample), dtype=torch.int64) for name in along}
        for name, value in (absent | item.inputs).items():
            extras.setdefault(name, []).append(value)
    padding = len(batch.input_ids) - sum(len(item.sample) for item in pictures)
    for name in along:
        extras[name].append(torch.zeros(1, padding, dtype=torch.int64))
    dims = dict.fromkeys(along, 1)
    joined = {
        name: torch.cat(values, dims.get(name, 1 if values[0].ndim == 5 else 0)) for name, values in extras.items()
    }
    return replace(batch, extras=joined)
