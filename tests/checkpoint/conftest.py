"""Fixtures for checkpoint tests, and the model folders of the zoo's families, as in the model tests."""

import logging

import pytest
import torch

from tests.model.conftest import folders, tokenizer
from tutti.core.dist import init_world, shutdown_world

__all__ = ["folders", "tokenizer"]


@pytest.fixture
def one_rank():
    yield init_world(torch.device("cpu"))
    shutdown_world()


@pytest.fixture
def warnings(caplog):
    """Records of the package's logger, whether or not a test before this one has set up logging."""
    logger = logging.getLogger("tutti")
    kept, logger.propagate = logger.propagate, True
    caplog.set_level(logging.INFO, logger="tutti")
    yield caplog
    logger.propagate = kept
