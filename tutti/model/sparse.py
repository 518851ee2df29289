"""Native sparse attention in a Hugging Face model: its layers' modules, its config, and its restrictions.

`model.attn_implementation: native-sparse` adds a `NativeSparse` to each attention layer. Its sizes are the paper's, or
those under `native_sparse` in the model's config.json, where they are also written: so the folder or checkpoint of a
model trained this way records it, and is run this way whatever attention is requested.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tutti.attention.sparse import NAME, NativeSparse, SparseSizes
from tutti.attention.ulysses import projects_values
from tutti.config import ConfigError
from tutti.config.layout import Layout
from tutti.core.structure import ModelStructure
from tutti.model.structure import blocks

log = logging.getLogger(__name__)


def take_sparse_sizes(config: PreTrainedConfig, requested: str) -> None:
    """Write the sizes of native sparse attention into a model's config if it is `requested`, and fill in missing ones.

    Logs a line if the config has them and something else is requested.
    """
    text = config.get_text_config()
    entry = getattr(text, NAME, None)
    if entry is None and requested != "native-sparse":
        return
    if requested != "native-sparse":
        log.info("attention is native-sparse, as the model's config.json says")
    setattr(text, NAME, SparseSizes.read(entry or {})._asdict())


def add_sparse_attention(model: PreTrainedModel) -> None:
    """Add a `NativeSparse` to the attention layers of `model` if its config has sizes for it.

    ValueError: the model's attention is not causal attention to all previous tokens.
    """
    config: Any = model.config.get_text_config()
    entry = getattr(config, NAME, None)
    if entry is None:
        return
    sizes = SparseSizes.read(entry)
    layers: list[Any] = [layer for _, block in blocks(model) for layer in block.modules() if _is_attention(layer)]
    others = [name for name in _OTHER_ATTENTION if getattr(config, name, None)]
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if len(layers) != config.num_hidden_layers or others or windows:
        reason = ", ".join([*others, *sorted(windows)]) or "no q_proj, k_proj and v_proj with heads of one width"
        raise ValueError(
            f"model.attn_implementation: native-sparse takes the place of causal attention to all tokens; "
            f"{model.config.model_type} has {reason}; choose another implementation"
        )
    for layer in layers:
        width = layer.head_dim
        heads = layer.q_proj.out_features // width
        std = getattr(config, "initializer_range", None) or 0.02
        sparse = NativeSparse(layer.q_proj.in_features, heads, width, width, sizes, std)
        reference = layer.k_proj.weight
        layer.add_module(NAME, sparse.to(device=reference.device, dtype=reference.dtype))
        sparse.watch(layer)


_OTHER_ATTENTION = ("attn_logit_softcapping", "attention_chunk_size", "attention_dropout")
"""Config keys of features that this attention does not support."""


def _is_attention(module: Any) -> bool:
    return projects_values(module) and all(
        isinstance(item, nn.Linear) for item in (module.q_proj, module.k_proj, module.v_proj)
    )


def is_sparse(config: PreTrainedConfig) -> bool:
    """True if a model's config says that its attention is native-sparse."""
    return getattr(config.get_text_config(), NAME, None) is not None


def check_sparse(structure: ModelStructure, layout: Layout) -> None:
    """ConfigError for parallel axes that native sparse attention does not support."""
    if not is_sparse(structure.config):
        return
    kv_heads = structure.config.num_key_value_heads
    problems = [
        f"train.{name}: native-sparse attention selects by all query heads of a key/value head and all tokens of a "
        f"sample, which this axis divides; set 1, or another model.attn_implementation"
        for name, size in (("tensor_parallel_size", layout.tensor), ("context_parallel_size", layout.context))
        if size > 1
    ]
    if kv_heads % layout.ulysses:
        problems.append(
            f"train.ulysses_parallel_size: {layout.ulysses} does not divide the model's {kv_heads} key/value heads, "
            "which native-sparse attention keeps together; choose a divisor"
        )
    if problems:
        raise ConfigError(problems)
