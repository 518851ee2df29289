"""Everything that a run imports, imported once by the fork server for all ranks of all tests.

These objects are excluded from garbage collection, which would otherwise take a third of a second each time in a rank.
"""

import gc

import transformers.models.qwen3.modeling_qwen3
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

import tutti.infer.run
import tutti.train.run

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "SD3Transformer2DModel",
    "StableDiffusion3Pipeline",
    "transformers",
    "tutti",
]

gc.collect()
gc.freeze()
