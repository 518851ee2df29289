"""Imports that the fork server does once for every rank of every test: all that a run imports, before it computes.

What is there then is left out of garbage collections, which in a rank would take a third of a second each.
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
