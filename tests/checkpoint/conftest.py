"""The checkpoints of the zoo's families, as in the tests of models."""

from tests.model.conftest import folders, tokenizer

__all__ = ["folders", "tokenizer"]
