"""Imports that the fork server does once for every rank of every test."""

import transformers.models.qwen3.modeling_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "transformers"]
