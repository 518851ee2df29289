"""A run resumes in any layout from the checkpoint of any other: with the same tensors, losses and samples.

Eight layouts make 56 ordered pairs. Each layout trains three steps and saves after two; from there, each other layout
resumes in a separate folder. Right after loading it saves again, and this checkpoint must have the same tensors, bit
for bit. The losses must be those of the run that did not change its layout. By default eight pairs are tested, with
each layout once as source and once as target; `make soak` tests all.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, load

from tests.harness import regroup, run_ranks
from tests.parallel.grid import HYBRID, ZERO3, Layout, config_of, sizes, write_data
from tests.train.runs import records, train_quietly
from tutti.checkpoint import dcp
from tutti.config import Config

KIND = "experts"
LAYOUTS = {
    "one": Layout(KIND, 1, {}),
    "ddp": Layout(KIND, 2, sizes(replicate=2)),
    "fsdp2": Layout(KIND, 2, ZERO3),
    "hsdp": Layout(KIND, 4, HYBRID),
    "tp": Layout(KIND, 2, sizes(tensor=2)),
    "pp": Layout(KIND, 2, sizes(pipeline=2)),
    "ep": Layout(KIND, 2, ZERO3 | sizes(expert=2)),
    "ulysses": Layout(KIND, 2, sizes(ulysses=2)),
}
STEPS, MOVED = 3, 2
COMMON = {"global_batch_size": 4, "save_steps": MOVED, "max_steps": STEPS, "save_hf_weights": False}
ALL = list(itertools.permutations(LAYOUTS, 2))
PAIRS = ALL if os.environ.get("SOAK") else list(zip(LAYOUTS, [*LAYOUTS][1:] + [*LAYOUTS][:1], strict=True))


def train_each(configs: list[Config]) -> None:
    """Train by each of `configs`; what was loaded is saved again at once, to `echo` beside the run's output."""
    from tutti.checkpoint.manager import Checkpointer

    original = Checkpointer.resume

    def resume(self: Any, path: Any, model: Any, optimizer: Any) -> Any:
        state = original(self, path, model, optimizer)
        if state is not None:
            output = self._root.parent
            echo = Checkpointer(output.parent / "echo", self._world, save_async=False, documents=self._documents)
            echo.save(MOVED, model, optimizer, {})
        return state

    Checkpointer.resume = resume  # type: ignore[method-assign]
    for config in configs:
        regroup()
        train_quietly(config)


def train_all(configs: dict[Any, Config], world_of: dict[Any, int]) -> None:
    for world in sorted(set(world_of.values())):
        group = [config for name, config in configs.items() if world_of[name] == world]
        run_ranks(world, train_each, group, timeout=60 + 30 * len(group))


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """The configurations of all runs when they are done: of a layout by its name, of a change by both names."""
    root = tmp_path_factory.mktemp("elastic")
    write_data(root)

    def make(names: tuple[str, ...], **changes: Any) -> Config:
        folder = root / "-".join(names)
        layout = LAYOUTS[names[-1]]
        return config_of(folder, root, layout._replace(train=layout.train | COMMON | changes))

    unmoved = {name: make((name,)) for name in LAYOUTS}
    train_all(unmoved, {name: layout.world for name, layout in LAYOUTS.items()})
    paths = {name: f"{config.train.output_dir}/checkpoints/global_step_{MOVED}" for name, config in unmoved.items()}
    changed = {pair: make(pair, load_checkpoint_path=paths[pair[0]]) for pair in PAIRS}
    train_all(changed, {pair: LAYOUTS[pair[1]].world for pair in PAIRS})
    return unmoved | changed


def digests(checkpoint: Path) -> dict[str, str]:
    """A hash of each tensor of a checkpoint, by name."""
    index = dcp.read_index(checkpoint)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.state_dict_metadata.items()
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings(action="ignore"):  # that there is no process group
        load(tensors, checkpoint_id=checkpoint, planner=planner, no_dist=True)
    return {
        name: hashlib.sha256(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def weights_of(checkpoints: list[Path], folder: Path) -> list[dict[str, bytes]]:
    """The weight files of what `tutti export` makes of each of `checkpoints`."""
    import logging

    from tutti.kinds.export import export

    logging.disable(logging.INFO)
    os.environ.pop("RANK")  # each export makes a group of its own
    found = []
    for number, checkpoint in enumerate(checkpoints):
        out = folder / str(number)
        export(str(checkpoint), str(out))
        found.append({path.name: path.read_bytes() for path in out.iterdir() if "safetensors" in path.name})
    return found


EXPORTED = PAIRS if os.environ.get("SOAK") else [("ddp", "fsdp2"), ("tp", "pp"), ("ep", "ulysses")]


def test_checkpoints_of_other_layouts_are_exported_to_the_same_bytes(moved, tmp_path):
    name = f"checkpoints/global_step_{MOVED}"
    saved = [Path(moved[source].train.output_dir) / name for source, _ in EXPORTED]
    echoes = [Path(moved[pair].train.output_dir).with_name("echo") / name for pair in EXPORTED]
    weights = run_ranks(1, weights_of, saved + echoes, tmp_path)[0]
    assert all(weights)
    for pair, one, other in zip(EXPORTED, weights, weights[len(saved) :], strict=False):
        assert one == other, pair


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_a_run_moves_to_another_layout(moved, source, target):
    saved = digests(Path(moved[source].train.output_dir) / f"checkpoints/global_step_{MOVED}")
    echo = Path(moved[source, target].train.output_dir).with_name("echo")
    assert digests(echo / f"checkpoints/global_step_{MOVED}") == saved
    assert any(name.endswith(".exp_avg_sq") for name in saved)
    want = records(moved[source])[MOVED:]
    got = records(moved[source, target])
    assert [line["step"] for line in got] == list(range(MOVED + 1, STEPS + 1))
    for ours, theirs in zip(got, want, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), f"step {ours['step']}"
        for key in ("epoch", "lr", "tokens", "trained_tokens", "samples"):
            assert ours[key] == theirs[key], key
