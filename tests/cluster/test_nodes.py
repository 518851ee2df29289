"""Runs on several machines: if some fail, the others resume from the newest checkpoint and report the problem."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import Nodes, available, enter_network
from tests.harness import run_ranks
from tests.train.runs import tiny_config, train_quietly
from tutti.config import Config
from tutti.config.yamlfile import to_yaml
from tutti.core.dist import shutdown_world
from tutti.core.launch import ERROR_FILE

pytestmark = pytest.mark.skipif(not available(), reason="needs root and network namespaces")
STEPS, HANG = 12, 8
soak = pytest.mark.skipif(not os.environ.get("SOAK"), reason="runs with make soak")


SETTINGS: dict[str, Any] = {
    "train.max_steps": STEPS, "train.save_steps": 1, "train.max_checkpoints": 3, "data.max_seq_len": 64,
    "train.global_batch_size": 6, "train.micro_batch_size": 1, "train.hang_timeout": HANG,
    "train.load_checkpoint_path": "auto", "train.data_parallel_mode": "fsdp2",
}  # fmt: skip


@pytest.fixture
def arguments(tmp_path):
    """The command line of a run that saves after every step, and its output folder."""
    config = tiny_config(tmp_path, **SETTINGS)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return [str(tmp_path / "run.yaml")], Path(config.train.output_dir)


def newest(output: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name.rpartition("_")[2]) for path in output.glob("checkpoints/global_step_*")), default=0)


def wait_for_step(nodes: Nodes, output: Path, step: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while newest(output) < step:
        assert time.monotonic() < deadline, said(nodes)
        time.sleep(0.05)


def wait_for_ranks(nodes: Nodes, output: Path, count: int, seconds: float = 100) -> None:
    """Wait until the run has `count` ranks, one on each machine, and has taken three steps with them."""
    layout = "one rank" if count == 1 else f"shard {count};"
    deadline = time.monotonic() + seconds
    while layout not in nodes.log("node1").read_text().rpartition("parallelize: ")[2].partition("\n")[0]:
        assert time.monotonic() < deadline, said(nodes)
        time.sleep(0.05)
    wait_for_step(nodes, output, newest(output) + 3)


def said(nodes: Nodes) -> str:
    return "\n".join(
        f"{name}: {nodes.log(name).read_text()[-3000:]}" for name in nodes.names if nodes.log(name).exists()
    )


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def all_steps_once(output: Path) -> bool:
    return [line["step"] for line in lines(output)] == list(range(1, STEPS + 1))


def train_there(spaces: list[str], address: str, config: Config, folder: Path) -> None:
    """Train as this rank from now on in the network namespace of its number, with the first one's at `address`."""
    rank = int(os.environ["RANK"])
    shutdown_world()
    enter_network(f"/var/run/netns/{spaces[rank]}")
    os.environ |= {"GLOO_SOCKET_IFNAME": "eth0", "MASTER_ADDR": address, "MASTER_PORT": "29455"}
    os.environ[ERROR_FILE] = str(folder / f"said-{rank}")
    train_quietly(config)


def test_a_cut_link_ends_the_ranks_on_both_sides_in_time(tmp_path):
    config = tiny_config(tmp_path, world=2, **SETTINGS | {"train.max_steps": 200, "train.hang_timeout": 3})
    output = Path(config.train.output_dir)
    cut: list[float] = []
    with Nodes(2, tmp_path) as nodes:

        def cut_later() -> None:
            wait_for_step(nodes, output, 2)
            nodes.link("node2", "down")
            cut.append(time.time())

        thread = threading.Thread(target=cut_later)
        thread.start()
        spaces = [nodes.space(name) for name in nodes.names]
        with pytest.raises(AssertionError, match="died"):
            run_ranks(2, train_there, spaces, nodes.address("node1"), config, tmp_path)
        thread.join()
    said = tmp_path / "said-0"
    assert said.read_text().endswith("rank 1 does not answer\n"), said.read_text()
    assert said.stat().st_mtime - cut[0] < 3 + 5


@pytest.mark.parametrize("start", [Nodes.fork, pytest.param(Nodes.start, marks=soak)])
def test_a_machine_that_dies_is_gone_on_without(tmp_path, arguments, start):
    words, output = arguments
    with Nodes(2, tmp_path) as nodes:
        for name in nodes.names:
            start(nodes, name, "1-2", words)
        wait_for_step(nodes, output, 2)
        nodes.kill("node2")
        assert nodes.wait("node1", 90) == 0, said(nodes)
        log = nodes.log("node1").read_text()
    assert "saved by 2 ranks" in log and "parallelize: one rank" in log
    assert all_steps_once(output)


@soak
def test_a_cut_link_is_noticed_and_the_rest_goes_on(tmp_path, arguments):
    """No connection is closed, so the failure shows only in missing messages."""
    words, output = arguments
    with Nodes(2, tmp_path) as nodes:
        for name in nodes.names:
            nodes.start(name, "1-2", words)
        wait_for_step(nodes, output, 2)
        nodes.link("node2", "down")
        cut = time.monotonic()
        while "no progress for" not in nodes.log("node1").read_text():
            assert time.monotonic() - cut < HANG + 5 + 2, said(nodes)
            time.sleep(0.1)
        assert nodes.wait("node1", 180) == 0, said(nodes)
        log = nodes.log("node1").read_text()
    assert "rank 1 does not answer" in log and "saved by 2 ranks" in log
    assert all_steps_once(output)


@soak
@pytest.mark.parametrize(("count", "how"), [(2, "killed"), (3, "killed"), (2, "told"), (3, "told")])
def test_a_machine_that_comes_back_takes_part_again(tmp_path, arguments, count, how):
    """The run continues without its last machine, then with all of them again, until all are told to stop."""
    words, output = arguments
    words = [*words, "--train.max_steps=9999", "--train.num_train_epochs=200"]
    last = f"node{count}"
    with Nodes(count, tmp_path) as nodes:
        for name in nodes.names:
            nodes.start(name, f"1-{count}", words)
        wait_for_ranks(nodes, output, count)
        if how == "killed":
            nodes.kill(last)
        else:
            nodes.signal(last, signal.SIGTERM)
            nodes.wait(last, 20)
        wait_for_ranks(nodes, output, count - 1)
        nodes.start(last, f"1-{count}", words)
        wait_for_ranks(nodes, output, count)
        for name in nodes.names:
            nodes.signal(name, signal.SIGTERM)
        for name in nodes.names:
            nodes.wait(name, 20)
        text = nodes.log("node1").read_text()
    assert "no progress" not in text and f"saved by {count} ranks" in text and f"saved by {count - 1} rank" in text
    steps = [line["step"] for line in lines(output)]
    assert steps == list(range(1, len(steps) + 1))
    assert (output / "checkpoints/latest").read_text() == f"global_step_{len(steps)}\n"


@soak
def test_a_slow_link_is_no_fault(tmp_path, arguments):
    words, output = arguments
    with Nodes(2, tmp_path) as nodes:
        nodes.slow("node2", "tbf rate 8mbit burst 16kbit latency 200ms")
        for name in nodes.names:
            nodes.start(name, "2", words)
        assert [nodes.wait(name, 180) for name in nodes.names] == [0, 0], said(nodes)
        assert "no progress" not in said(nodes) and "Traceback" not in said(nodes)
    assert all_steps_once(output)


@soak
def test_a_machine_that_does_not_see_the_output_folder_is_named(tmp_path, arguments):
    words, output = arguments
    output.mkdir()
    with Nodes(2, tmp_path) as nodes:
        nodes.start("node1", "2", [*words, "--train.load_checkpoint_path=none"])
        nodes.start("node2", "2", [*words, "--train.load_checkpoint_path=none"], private=output)
        deadline = time.monotonic() + 120
        while "all machines must see the same folder" not in said(nodes):
            assert time.monotonic() < deadline, said(nodes)
            time.sleep(0.1)
        text = said(nodes)
    assert f"tutti: error: train.output_dir {output}, as rank 0 has it on node" in text
