"""Fixtures for tests of model kinds, shared with the checkpoint tests."""

from tests.checkpoint.conftest import folders, one_rank, tokenizer, warnings

__all__ = ["folders", "one_rank", "tokenizer", "warnings"]
