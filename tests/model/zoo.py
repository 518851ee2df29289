"""Tiny configurations of many Hugging Face families: two layers, width 32, fractions of a second to build and run.

`tiny(name)` gives a config for `AutoModelForCausalLM.from_config`. Each family is here for something of its own: tied
weights, soft-capped or scaled logits, sliding windows, learned positions, fused projections, experts of every layout.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCAB = 256
BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE: dict[str, Any] = {**BASE, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE),
    "llama3_rope": (
        "llama",
        {
            **BASE,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "smollm2": ("llama", {**BASE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", BASE),
    "qwen3": ("qwen3", {**BASE, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**BASE, "sliding_window": 8}),
    "gemma2": ("gemma2", {**BASE, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {**BASE, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
    "phi3": ("phi3", BASE),
    "granite": ("granite", {**BASE, "logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "cohere": ("cohere", {**BASE, "logit_scale": 0.0625}),
    "olmo2": ("olmo2", BASE),
    "gpt_neox": (
        "gpt_neox",
        {key: value for key, value in BASE.items() if key != "num_key_value_heads"},
    ),
    "mixtral": ("mixtral", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "head_dim": 16, "num_experts": 4, "decoder_sparse_step": 1}),
    "gpt_oss": (
        "gpt_oss",
        {
            **BASE,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
}
"""Family name -> (model_type, what its config sets)."""

_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16}

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "qwen3_next",
        {
            **_MOE,
            "head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "granite4": (
        "granitemoehybrid",
        {
            **BASE,
            **_MAMBA,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_intermediate_size": 48,
            "num_local_experts": 0,
        },
    ),
    "lfm2": ("lfm2", {**BASE, "layer_types": ["conv", "full_attention"]}),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
}
"""Families with layers that mix tokens otherwise than by attention."""

EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
"""The families with experts."""


def tiny(name: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny config of family `name` (of FAMILIES or HYBRIDS), with `overrides`; the vocabulary is VOCAB."""
    model_type, values = (FAMILIES | HYBRIDS)[name]
    return AutoConfig.for_model(model_type, **{"vocab_size": VOCAB, **values, **overrides})
