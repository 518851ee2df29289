"""The dtype that a run computes in: train.compute_dtype, with `auto` resolved once.

bf16 halves memory traffic and is faster wherever there are instructions for its matrix products: on accelerators, and
on CPUs with AMX or AVX-512 bf16. On other CPUs a product is 30 to 500 times slower than in fp32. So on a CPU both are
measured, with one small product each. Rank 0 decides for all. For exactness, a run that resumes from a checkpoint
computes in the checkpoint's dtype, unless that is clearly slower here.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from tutti.config import Config, TrainConfig
from tutti.core.device import faster_dtype, product_rates
from tutti.core.dist import World

log = logging.getLogger(__name__)

_ANOTHER_MACHINE = 2.0
"""The factor by which a checkpoint's dtype must be slower for `auto` to change it: more than measurements vary."""


def settle_compute_dtype(config: Config, world: World, *, before: str | None = None) -> Config:
    """`config` with train.compute_dtype set to bfloat16 or float32, the same on every rank, with a log line.
    Collective.

    before: the compute dtype of the checkpoint that the run resumes from, if there is one.
    """
    chosen = world.broadcast(_choose(config.train, world.device, before) if world.is_main else None)
    return replace(config, train=replace(config.train, compute_dtype=chosen))


def compute_dtype(train: TrainConfig) -> torch.dtype:
    """train.compute_dtype, already resolved, as a torch dtype."""
    assert train.compute_dtype != "auto", "train.compute_dtype was not settled"
    return getattr(torch, train.compute_dtype)


def slow_dtypes(world: World) -> frozenset[torch.dtype]:
    """The 16-bit dtypes whose matrix products are slower than fp32's on rank 0's device. Collective."""
    if world.device.type != "cpu":
        return frozenset()
    rates = world.broadcast(product_rates(torch.float32, torch.bfloat16, torch.float16) if world.is_main else None)
    return frozenset(dtype for dtype, rate in rates.items() if rate < rates[torch.float32])


def _choose(train: TrainConfig, device: torch.device, before: str | None) -> str:
    """Choose train.compute_dtype for `device`, with a log line about the measurement."""
    all_bf16 = train.compute_dtype == "auto" and not train.enable_mixed_precision
    asked = "bfloat16" if all_bf16 else train.compute_dtype
    if device.type != "cpu":
        return _name(faster_dtype(device)) if asked == "auto" else asked
    rates = {_name(dtype): rate for dtype, rate in product_rates(torch.float32, torch.bfloat16).items()}
    faster = max(rates, key=lambda name: rates[name])
    measured = " and ".join(f"{rate / 1e9:.3g} GFLOP/s in {name}" for name, rate in rates.items())
    if asked == "auto":
        goes_on = before in rates and rates[before] * _ANOTHER_MACHINE > rates[faster]
        chosen, why = (before, ", as the checkpoint was") if before and goes_on else (faster, "")
        log.info("computing in %s%s: a core multiplies matrices at %s", chosen, why, measured)
        return chosen
    if asked == "bfloat16" and faster != asked:
        advice = "leave train.compute_dtype at auto" + " and train.enable_mixed_precision true" * all_bf16
        log.warning("computing in bfloat16 is slow here, a core multiplies matrices at %s: %s", measured, advice)
    return asked


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
