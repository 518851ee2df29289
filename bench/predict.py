"""Predicted memory and communication per rank for training three published models on 8 to 4,096 GPUs.

`python -m bench.predict [MODEL ...]`, where MODEL is qwen3-8b, qwen3-30b-a3b or qwen2.5-72b. For each row, one process
runs a step of the real training code on tensors without values (`tutti.check.dry_run`); `tutti check` does the same for
any configuration. Nothing is downloaded: the published config values of the models are below.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tutti.check.dry_run import predict
from tutti.config import Config
from tutti.config.layout import fit, resolve_sizes
from tutti.config.load import from_dict
from tutti.model.build import build_model
from tutti.model.structure import num_params

TOKENS = 8_192
"""Number of tokens in a micro batch."""

_QWEN3: dict[str, Any] = {
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
    "vocab_size": 151_936,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-8b": _QWEN3
    | {
        "model_type": "qwen3",
        "hidden_size": 4_096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": _QWEN3
    | {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "hidden_size": 2_048,
        "intermediate_size": 6_144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
    },
    "qwen2.5-72b": {
        "model_type": "qwen2",
        "hidden_size": 8_192,
        "intermediate_size": 29_568,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": False,
        "vocab_size": 152_064,
    },
}

_HYBRID = {
    512: {"data_parallel_replicate_size": 8, "data_parallel_shard_size": 64},
    4096: {"data_parallel_replicate_size": 64, "data_parallel_shard_size": 64},
}
_EXPERTS = {"expert_parallel_size": 8}
LAYOUTS: dict[str, dict[int, dict[str, Any]]] = {
    "qwen3-8b": {8: {}, 64: {}, **_HYBRID},
    "qwen3-30b-a3b": {
        8: _EXPERTS,
        64: _EXPERTS,
        512: _EXPERTS | _HYBRID[512],
        4096: _EXPERTS | _HYBRID[4096],
    },
    "qwen2.5-72b": {
        8: {"enable_fsdp_offload": True},
        64: {"tensor_parallel_size": 8},
        512: {"tensor_parallel_size": 8, "pipeline_parallel_size": 4, "global_batch_size": 16 * 16},
        4096: {
            "tensor_parallel_size": 8,
            "pipeline_parallel_size": 8,
            "data_parallel_replicate_size": 4,
            "data_parallel_shard_size": 16,
            "global_batch_size": 64 * 32,
        },
    },
}
"""Settings for each number of GPUs; the default is to shard everything over all of them, with one micro batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    names = parser.parse_args().models or list(MODELS)
    if unknown := set(names) - set(MODELS):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(MODELS)}")
    sizes = "parameters | gradients | optimizer | gathered | activations | total"
    print(f"| model | GPUs | layout | {sizes} | sent (messages) | seconds to predict |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |", flush=True)
    for name in names:
        for world in LAYOUTS[name]:
            print(_row(name, world), flush=True)


def _row(name: str, world: int) -> str:
    """One row of the table, with sizes in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
        config = _config(folder, LAYOUTS[name][world], world)
        model = build_model(config, device=torch.device("cpu"))
    begin = time.process_time()
    found = predict(config, model, world)
    seconds = time.process_time() - begin
    on_device = found.gathered + found.activations if config.train.enable_fsdp_offload else found.peak
    held = (found.parameters, found.gradients, found.optimizer)
    sizes = [f"{size / 2**30:.2f}" for size in (*held, found.gathered, found.activations, on_device)]
    by_size = sorted(found.sent.items(), key=lambda item: -item[1].bytes)
    sent = ", ".join(f"{axis} {volume.bytes / 2**30:.2f} ({volume.messages:,})" for axis, volume in by_size)
    described = f"{name} ({num_params(model).total / 1e9:.1f}B)"
    return f"| {' | '.join([described, f'{world:,}', _layout(config, world), *sizes, sent, f'{seconds:.0f}'])} |"


def _config(folder: str, changes: dict[str, Any], world: int) -> Config:
    train = {
        "output_dir": folder,
        "data_parallel_mode": "fsdp2",
        "compute_dtype": "bfloat16",
        "enable_gradient_checkpointing": True,
        "init_device": "meta",
    }
    tree = {
        "model": {"config_path": folder, "tokenizer_path": folder},
        "data": {"train_path": folder, "max_seq_len": TOKENS},
        "train": train | changes,
    }
    return resolve_sizes(from_dict(tree), world)


def _layout(config: Config, world: int) -> str:
    """The axes with more than one rank, and the number of micro batches per step."""
    layout = fit(config, world)
    axes = ("pipeline", "replicate", "shard", "context", "ulysses", "tensor", "expert")
    sizes = [f"{axis} {getattr(layout, axis)}" for axis in axes if getattr(layout, axis) > 1]
    if config.train.enable_fsdp_offload:
        sizes.append("offloaded")
    if layout.accumulation > 1:
        sizes.append(f"{layout.accumulation} micro batches")
    return ", ".join(sizes)


if __name__ == "__main__":
    main()
