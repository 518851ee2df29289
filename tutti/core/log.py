"""Logging: one line per event on rank 0, warnings on every rank, no progress bars in files."""

from __future__ import annotations

import logging
import sys


def setup_logging(rank: int) -> None:
    """Send `tutti.*` records to stderr: rank 0 from INFO, the others from WARNING with their rank in front."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname).1s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("tutti")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
