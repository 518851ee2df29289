"""The model families that have been compared with transformers' own classes; a run with another one says that it is
untested.

`make sweep` and the other sweeps build every family at tiny size, and write the tables in docs/models.md and
docs/multimodal.md. Families that are equal there are listed here, by their `model_type`. A family that transformers
adds later is in no list: its row in the table is "untested", and its run says so.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

_NAMES = """
afmoe apertus arcee aria_text axk1 axk2 aya_vision bailing_hybrid bamba beam biogpt bitnet chameleon cohere cohere2
cohere2_moe cohere2_vision cohere_compass_text ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1
dots3_note_text emu3 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3
gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm4v
glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid
granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax idefics3 inkling_text internlm3
internvl iquestcoder jais2 jamba janus jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text llava
llava_next llava_onevision longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2
minimax_m3_vl_text ministral ministral3 mistral mistral3 mixtral moshi nanochat nemotron nemotron_h olmo olmo2 olmo3
olmo_hybrid olmoe opt ovis2 persimmon phi phi3 phimoe pixtral qwen2 qwen2_5_omni qwen2_5_omni_thinker qwen2_5_vl
qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_omni
qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp_text recurrent_gemma seed_oss smollm3 smolvlm solar_open stablelm
starcoder2 vaultgemma video_llama_3 youtu zamba zamba2 zaya
"""
"""Written by the sweeps (`tests.sweep.write_compared`)."""

COMPARED = frozenset(_NAMES.split())


def untested(config: PreTrainedConfig) -> str | None:
    """A log line for a model that has not been compared with its own class; None for any other."""
    if config.model_type in COMPARED:
        return None
    return (
        f"{config.model_type} is untested: this family has not been compared with transformers' own class (see "
        "docs/models.md); what is known to go wrong is refused, but compare a loss before you trust it"
    )
