"""Local ranks without torchrun: environment, exit status, one error, signals. The ranks are tiny scripts."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tutti.core.launch import Failure, _watch, launch

ROOT = Path(__file__).parents[2]
LAUNCHER = "import sys; from tutti.core.launch import launch; sys.exit(launch(sys.argv[2:], int(sys.argv[1])))"


def start(folder: Path, nproc: int, script: str, **environment: str) -> subprocess.Popen:
    """A launcher of `nproc` ranks that run `script` in `folder`; `rank` and `say(text)` are defined for it."""
    head = f"""\
        import os, signal, sys, time
        from pathlib import Path
        rank = int(os.environ["RANK"])
        here = Path({str(folder)!r})
        def say(text):
            Path(os.environ["TUTTI_ERROR_FILE"]).write_text(text)
        """
    path = folder / "rank.py"
    path.write_text(textwrap.dedent(head) + textwrap.dedent(script))
    base = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(nproc), sys.executable, str(path)],
        cwd=ROOT,
        env=base | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_environment_of_the_ranks(tmp_path: Path) -> None:
    script = "import json; (here / f'{rank}.json').write_text(json.dumps(dict(os.environ)))"
    assert finish(start(tmp_path, 3, script)) == (0, "")
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, environment in enumerate(seen):
        assert environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert len({environment["MASTER_PORT"] for environment in seen}) == 1
    assert len({environment["TUTTI_ERROR_FILE"] for environment in seen}) == 3


def test_threads_that_are_set_stay(tmp_path: Path) -> None:
    script = "(here / 'threads').write_text(os.environ['OMP_NUM_THREADS'])"
    assert finish(start(tmp_path, 1, script, OMP_NUM_THREADS="7")) == (0, "")
    assert (tmp_path / "threads").read_text() == "7"


def test_an_error_that_all_ranks_meet_is_shown_once(tmp_path: Path) -> None:
    script = "say('tutti: error: no such file\\n'); sys.exit(1)"
    assert finish(start(tmp_path, 3, script)) == (1, "tutti: error: no such file\n")


def test_the_first_error_is_the_one_that_counts(tmp_path: Path) -> None:
    """Rank 2 fails, and the others fail because of it; rank 2's message and exit status are reported."""
    script = """
        if rank == 2:
            say("the cause\\n")
            (here / "failed").touch()
            sys.exit(3)
        while not (here / "failed").exists():
            time.sleep(0.01)
        time.sleep(0.05)
        say("connection lost\\n")
        sys.exit(1)
        """
    assert finish(start(tmp_path, 3, script)) == (3, "the cause\n")


def test_when_a_rank_fails_the_others_and_their_children_end(tmp_path: Path) -> None:
    script = """
        import subprocess
        if rank == 1:
            while not (here / "child").exists():
                time.sleep(0.01)
            sys.exit(7)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (here / "tmp").write_text(f"{os.getpid()} {child.pid}")
        (here / "tmp").rename(here / "child")
        time.sleep(600)
        """
    assert finish(start(tmp_path, 2, script)) == (7, "tutti: error: rank 1 ended with exit status 7\n")
    for pid in (tmp_path / "child").read_text().split():
        assert not is_alive(int(pid))


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    script = "os.kill(os.getpid(), signal.SIGKILL)"
    status, errors = finish(start(tmp_path, 1, script))
    assert status == 128 + signal.SIGKILL
    assert errors == "tutti: error: rank 0 was ended by SIGKILL (out of memory?)\n"


def test_a_killed_rank_is_the_cause_and_not_the_connection_that_others_lost(tmp_path: Path) -> None:
    script = """
        if rank == 1:
            (here / "gone").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not (here / "gone").exists():
            time.sleep(0.001)
        say("connection closed by peer\\n")
        sys.exit(1)
        """
    for _ in range(3):
        (tmp_path / "gone").unlink(missing_ok=True)
        status, errors = finish(start(tmp_path, 2, script))
        assert (status, errors) == (137, "tutti: error: rank 1 was ended by SIGKILL (out of memory?)\n")


def again(tmp_path: Path, failure: Failure) -> list[str] | None:
    with (tmp_path / "asked").open("a") as asked:
        asked.write(f"{failure.status} ")
    tries = len((tmp_path / "asked").read_text().split())
    return [sys.executable, "-c", f"import sys; sys.exit({0 if tries == 2 else 7})"] if tries < 3 else None


def test_what_failed_is_run_again_as_long_as_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch([sys.executable, "-c", "import sys; sys.exit(3)"], 2, partial(again, tmp_path)) == 0
    assert (tmp_path / "asked").read_text() == "3 7 " and "exit status 7" in capfd.readouterr().err


def test_what_was_told_to_end_is_not_run_again(tmp_path: Path) -> None:
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    assert launch(["sleep", "60"], 1, partial(again, tmp_path)) == 128 + signal.SIGTERM
    timer.join()
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    """Also for Ctrl-C, which a terminal sends to the whole process group: ranks get it only from the launcher."""
    script = """
        count = 0
        def on_signal(number, frame):
            global count
            count += 1
        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)
        (here / f"ready{rank}").touch()
        while not count:
            time.sleep(0.01)
        time.sleep(0.3)
        (here / f"count{rank}").write_text(str(count))
        """
    process = start(tmp_path, 2, script)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(number)
    assert finish(process) == (0, "")
    assert [(tmp_path / f"count{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_ranks_are_in_process_groups_of_their_own(tmp_path: Path) -> None:
    script = "(here / f'{rank}').write_text(f'{os.getpid()} {os.getpgrp()}')"
    assert finish(start(tmp_path, 2, script))[0] == 0
    for rank in range(2):
        pid, group = (tmp_path / f"{rank}").read_text().split()
        assert pid == group


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_ranks_are_told_to_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    script = """
        def on_signal(number, frame):
            (here / "told").touch()
            sys.exit()
        signal.signal(signal.SIGTERM, on_signal)
        (here / "ready").touch()
        time.sleep(600)
        """
    process = start(tmp_path, 1, script)
    wait_for(tmp_path / "ready")
    process.kill()
    wait_for(tmp_path / "told")
    process.communicate()


def test_a_signal_that_came_while_ranks_were_started_reaches_all() -> None:
    ranks = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    assert _watch(ranks, [signal.SIGTERM]) in (0, 1)
    assert [process.wait() for process in ranks] == [-signal.SIGTERM] * 2
