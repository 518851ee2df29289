"""Fixtures of tests of kinds of model: what the tests of checkpoints have."""

from tests.checkpoint.conftest import folders, one_rank, tokenizer, warnings

__all__ = ["folders", "one_rank", "tokenizer", "warnings"]
