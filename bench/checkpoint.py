"""Seconds for which a save blocks training: `train.save_async` against a synchronous save.

`python -m bench.checkpoint [--rounds 4] [--layers 8]`. One process trains the model of the speed benchmark (60 million
parameters, about 730 MB with AdamW's moments) and saves it with the run's own `Checkpointer`, in turns both ways. For
the synchronous save and for the asynchronous call, it reports the minimum of several tries, as wall time and as core
time (which other processes do not affect), and the median time that the three steps after the call take longer in
total. The first asynchronous save, which allocates the buffers for its copies, is reported separately.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from bench import workload
from tutti.checkpoint.manager import Checkpointer
from tutti.core.dist import World, init_world, shutdown_world

_STEPS = 3
"""Steps that are timed after each call."""
_MARK = 0.10
"""The goal: the maximum time of the asynchronous call relative to a synchronous save."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where to save, which chooses the file system (default: a temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = init_world(device)
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            _compare(Path(folder), options.rounds, options.layers, world)
    finally:
        shutdown_world()


def _compare(folder: Path, rounds: int, layers: int, world: World) -> None:
    config = Qwen3Config(**{**workload.MODEL, "num_hidden_layers": layers})
    with torch.device(world.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tokens = torch.randint(0, workload.VOCABULARY, (1, 128))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> float:
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    plain = statistics.median([step() for _ in range(6)][1:])
    keepers = {
        how: Checkpointer(folder / how, world, save_async=how == "async", max_checkpoints=1)
        for how in ("sync", "async")
    }
    clock: dict[str, list[float]] = {"sync": [], "async": []}
    cores: dict[str, list[float]] = {"sync": [], "async": []}
    slower = []
    for number in range(1, rounds + 2):
        for how, keeper in keepers.items():
            began, used = time.perf_counter(), time.process_time()
            keeper.save(number, model, optimizer, {})
            clock[how].append(time.perf_counter() - began)
            cores[how].append(time.process_time() - used)
        slower.append(sum(step() - plain for _ in range(_STEPS)))
        keepers["async"].wait()
    size = sum(path.stat().st_size for path in (folder / "sync").rglob("*") if path.is_file())
    (sync, sync_cores), (call, call_cores) = ((min(clock[how][1:]), min(cores[how][1:])) for how in ("sync", "async"))
    print(f"{size / 1e6:.0f} MB on {world.device}; a step takes {plain:.3f} s")
    print(f"synchronous save          {sync:.3f} s, {sync_cores:.3f} s of core time")
    print(
        f"call with save_async      {call:.3f} s, {call_cores:.3f} s of core time: {call / sync:.1%} and "
        f"{call_cores / sync_cores:.1%} of that (goal: {_MARK:.0%})"
    )
    print(f"the first such call       {clock['async'][0]:.3f} s, {cores['async'][0]:.3f} s of core time")
    after = statistics.median(slower)
    print(f"{_STEPS} steps after a call     {after:.3f} s longer in total, {after / sync:.1%}")


if __name__ == "__main__":
    main()
