"""Configs of model families with their features at non-default values.

By default many features of a family are not there to be seen: multipliers are one, layers have no bias, windows and
caps are wider than any sample, experts are in one group. `varied_config` changes all that it knows by name: flags are
turned over, numbers are set such that they matter for a tiny model. What a class does not take it is left without.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from tests.sweep import TOKENS, Kind, require_tiny

FLAGS = {
    # biases
    "attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "attention_out_bias", "lm_head_bias", "conv_bias",
    "use_bias", "enable_bias", "add_bias_linear", "mamba_proj_bias", "projectors_bias",
    # norms, and how a block is wired
    "use_qk_norm", "qk_layernorm", "use_parallel_residual", "do_layer_norm_before", "use_post_norm",
    "use_sandwich_norm", "mamba_rms_norm", "mamba_norm_before_gate", "residual_in_fp32", "use_double_wide_mlp",
    # attention
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "multi_query",
    "rope_interleave", "use_mem_rope", "attn_temperature_tuning", "use_attention_gate", "attention_k_eq_v", "gating",
    "use_shared_attention_adapter", "linear_allow_neg_eigval", "kda_safe_gate", "use_sliding_window",
    # embeddings and heads
    "tie_word_embeddings", "mup_enabled", "scale_embedding", "altup_correct_scale",
    # experts
    "norm_topk_prob", "moe_renormalize", "use_expert_bias", "shared_expert_sink",
}  # fmt: skip
"""Names of flags, which are turned over."""

NUMBERS: dict[str, Any] = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.5,
    "logit_scale": 0.4, "lm_head_multiplier": 0.6, "key_multiplier": 0.7, "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8, "mlp_multipliers": [0.6, 1.2], "ssm_in_multiplier": 0.8,
    "ssm_out_multiplier": 1.4, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9], "logits_mup_width_multiplier": 3.0,
    "attention_value_scale": 0.4, "attn_scale": 0.7, "query_pre_attn_scalar": 20, "embedding_scale": 7.0,
    "scale_depth": 2.2, "scale_emb": 5, "dim_model_base": 8, "hc_magnitude": 1.3, "full_attn_alpha_factor": 1.3,
    "full_attn_beta_factor": 0.8, "linear_attn_alpha_factor": 1.2, "linear_attn_beta_factor": 0.9,
    "mlp_alpha_factor": 1.4, "mlp_beta_factor": 0.6, "rms_norm_eps": 1e-3, "layer_norm_eps": 1e-3,
    "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5, "logits_soft_cap": 0.5,
    "moe_router_logit_softcapping": 0.5, "clip_qkv": 0.1, "swiglu_alpha": 1.2, "swiglu_limit": 0.05,
    "time_step_limit": [0.001, 0.3], "kda_lower_bound": -3.0, "no_rope_layers": [1, 0], "max_window_layers": 1,
    "sliding_window": 8, "layer_rope_theta": [10_000.0, 500.0], "position_embedding_type": "rope", "n_group": 2,
    "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7, "moe_routed_scaling_factor": 1.7,
    "route_scale": 1.7, "router_scaling_factor": 1.7, "mlp_only_layers": [0], "mlp_layer_types": ["dense", "sparse"],
    "moe_norm_min": 0.4, "expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "sum",
    "moe_latent_size": 16,
}  # fmt: skip
"""Values by the names that configs have for them."""

STRETCHED = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 0.8,
}  # fmt: skip
"""Rotary embeddings in the place of plain ones."""


def varied_config(family: str, kind: Kind = TOKENS) -> PreTrainedConfig:
    """The tiny config of a family, changed in all that its class takes: together, else one after the other."""
    values = {
        name: value
        for name, value in kind.config(family).to_dict().items()
        if name not in ("model_type", "architectures", "dtype", "transformers_version")
    }
    changes = {name: new for name, value in values.items() if (new := _other(name, value, values)) is not None}
    try:
        return _made(family, values | changes, kind)
    except Exception:
        kept = values
        for name, value in changes.items():
            try:
                _made(family, kept | {name: value}, kind)
            except Exception:  # whatever its class raises
                continue
            kept = kept | {name: value}
        return _made(family, kept, kind)


def _other(name: str, value: Any, values: dict[str, Any]) -> Any:
    """The other value of an entry of a config; None where it stays."""
    if isinstance(value, bool):
        return not value if name in FLAGS else None
    if name == "num_key_value_heads":
        return {2: 4, 4: 2}.get(value)
    if name == "rope_parameters" and isinstance(value, dict):
        return _stretched(value)
    if name == "layer_types" and value == ["full_attention"] * 2 and "sliding_window" in values:
        return ["full_attention", "sliding_attention"]
    return NUMBERS.get(name)


def _stretched(rope: dict[str, Any]) -> dict[str, Any]:
    if "rope_type" not in rope:  # by kinds of layers
        return {kind: _stretched(part) if isinstance(part, dict) else part for kind, part in rope.items()}
    return rope | STRETCHED if rope["rope_type"] == "default" else rope


def _made(family: str, values: dict[str, Any], kind: Kind) -> PreTrainedConfig:
    """A config whose class's own model runs; or whatever it raises."""
    config = AutoConfig.for_model(family, **values)
    config.use_cache = False
    require_tiny(config, kind)
    model = kind.model(config, attn_implementation="eager", experts_implementation="eager").eval()
    model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    return config
