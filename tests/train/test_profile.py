"""The profiler: recorded steps and ranks, and the effect of its options on the trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tutti.config import TrainConfig
from tutti.core.dist import World
from tutti.train.profile import make_profiler

MAIN = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
OTHER = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))


def train(folder: Path, steps: int, world: World = MAIN, start_step: int = 0, **options: Any) -> dict[str, list[dict]]:
    """The events of each trace file that a run of `steps` steps leaves."""
    config = TrainConfig(enable_profiling=True, profile_trace_dir=str(folder), **options)
    weight = torch.ones(3, 5)
    with make_profiler(config, world, start_step=start_step) as profiler:
        for _ in range(steps):
            torch.ones(7, 3) @ weight
            profiler.step()
    return {path.name: json.loads(path.read_text())["traceEvents"] for path in folder.glob("*")}


def spans(events: list[dict]) -> list[str]:
    names = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    return sorted(names)


def test_records_the_asked_steps(tmp_path: Path) -> None:
    traces = train(tmp_path / "traces", 6, profile_start_step=3, profile_end_step=5)
    assert list(traces) == ["rank0_steps3-4.json"]
    events = traces["rank0_steps3-4.json"]
    assert spans(events) == ["ProfilerStep#3", "ProfilerStep#4"]
    assert len([event for event in events if event.get("name") == "aten::mm"]) == 2


def test_defaults_record_the_first_step(tmp_path: Path) -> None:
    ((name, events),) = train(tmp_path, 3).items()
    assert (name, spans(events)) == ("rank0_steps1-1.json", ["ProfilerStep#1"])


def test_a_resumed_run_counts_from_its_step(tmp_path: Path) -> None:
    ((name, events),) = train(tmp_path, 3, start_step=10, profile_start_step=5, profile_end_step=13).items()
    assert (name, spans(events)) == ("rank0_steps11-12.json", ["ProfilerStep#11", "ProfilerStep#12"])


def test_a_run_that_ends_early_writes_what_it_has(tmp_path: Path) -> None:
    ((name, events),) = train(tmp_path, 3, profile_start_step=2, profile_end_step=9).items()
    assert name == "rank0_steps2-3.json"
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= set(spans(events))


def test_switches(tmp_path: Path) -> None:
    asked = {"profile_record_shapes": True, "profile_profile_memory": True, "profile_with_stack": True}
    (rich,) = train(tmp_path / "rich", 2, **asked).values()
    (plain,) = train(tmp_path / "plain", 2, **dict.fromkeys(asked, False)).values()

    def found(events: list[dict]) -> tuple[bool, bool, bool]:
        shapes = any("Input Dims" in event.get("args", {}) for event in events)
        memory = any(event.get("name") == "[memory]" for event in events)
        stack = any(event.get("cat") == "python_function" for event in events)
        return shapes, memory, stack

    assert found(rich) == (True, True, True)
    assert found(plain) == (False, False, False)
    products = [event["args"]["Input Dims"] for event in rich if event.get("name") == "aten::mm"]
    assert [dims[:2] for dims in products] == [[[7, 3], [3, 5]]]


def test_ranks(tmp_path: Path) -> None:
    assert train(tmp_path / "one", 2, OTHER) == {}
    assert list(train(tmp_path / "all", 2, OTHER, profile_rank0_only=False)) == ["rank1_steps1-1.json"]


def test_disabled_does_nothing(tmp_path: Path) -> None:
    config = TrainConfig(profile_trace_dir=str(tmp_path / "traces"))
    with make_profiler(config, MAIN) as profiler:
        profiler.step()
    assert not (tmp_path / "traces").exists()


def test_no_steps_to_profile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"train.profile_end_step \(3\) must be above train.profile_start_step \(3\)"):
        train(tmp_path, 1, profile_start_step=3, profile_end_step=3)
    with caplog.at_level("WARNING", "tutti"):
        assert train(tmp_path, 1, start_step=7) == {}
    assert "train.enable_profiling has no effect" in caplog.text
    with caplog.at_level("WARNING", "tutti"):
        train(tmp_path, 2, profile_start_step=4, profile_end_step=6)
    assert "train.enable_profiling had no effect: training ended before step 4" in caplog.text
