"""Settings made before torch is imported: one thread per test process, no network, deterministic hashing."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"


@pytest.fixture(autouse=True)
def package_logger() -> Iterator[None]:
    """Restore the package's logger after each test, because a run sets it up for its process."""
    logger = logging.getLogger("tutti")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, True
    logger.setLevel(level)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A `tests.hub.HubServer` that stands for the Hugging Face hub, with a cache of its own."""
    from tests.hub import hub_server, use_hub

    with hub_server() as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "home")
        yield server


if os.environ.get("PRETEND_ACCELERATOR"):
    from tests.accelerator import pretend_accelerator

    pretend_accelerator()
