"""Set before torch is imported anywhere: one thread a test process, no network, deterministic hashing."""

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"


@pytest.fixture(autouse=True)
def package_logger() -> Iterator[None]:
    """A run sets up the package's logger for its process; the next test finds it as it was."""
    logger = logging.getLogger("tutti")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, True
    logger.setLevel(level)


if os.environ.get("PRETEND_ACCELERATOR"):
    from tests.accelerator import pretend_accelerator

    pretend_accelerator()
