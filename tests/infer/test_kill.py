"""`--input` under SIGKILL: no written answer is lost, and the final output equals that of an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import signal
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.harness import run_ranks
from tests.infer.models import ONE, infer_config
from tests.train.runs import QUICKSTART
from tutti.data.template import read_template
from tutti.infer.batch import answer_rows, read_rows
from tutti.infer.generate import Token
from tutti.infer.load import LoadedModel
from tutti.infer.prompts import PromptFormat

ROWS, TOKENS, PAUSE = 20, 3, 0.002


def answer_slowly(folder: Path, most: int, seconds: float) -> None:
    """Answer the rows in `folder` as `tutti infer` does, by a model that takes its time, and be killed on the way.

    That happens after `most` tokens or `seconds`, whichever comes first.
    """
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    form = PromptFormat(tokenizer, read_template(tokenizer), True, None)
    loaded = LoadedModel(model=None, logits=None, form=form, stop_ids=frozenset(), weights="")  # type: ignore[arg-type]

    def stream(requests):
        for request in requests:
            for place in range(TOKENS):
                time.sleep(PAUSE)
                if next(made) == most:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield Token(request.number, request.ids[-5 - place], "length" if place == TOKENS - 1 else None)

    made = itertools.count()
    generator: Any = SimpleNamespace(world=ONE, drawing=None, stream=stream)
    source = folder / "in.jsonl"
    killer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    killer.daemon = True
    killer.start()
    answer_rows(infer_config("x"), loaded, generator, read_rows(source), source, folder / "out.jsonl")


def run(folder: Path, most: int = -1, seconds: float = 60) -> None:
    """Run `answer_slowly` in a process of its own."""
    child = os.fork()
    if not child:
        try:
            answer_slowly(folder, most, seconds)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)


def write_rows(folder: Path) -> Path:
    folder.mkdir()
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [{"prompt": " ".join(words[number % 7 :][: 1 + number % 3]), "id": number} for number in range(ROWS)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def kill_again_and_again(tmp: Path, seed: int) -> int:
    """The number of runs that it took to complete the output."""
    logging.disable(logging.INFO)
    run(write_rows(tmp / "whole"))
    whole = (tmp / "whole/out.jsonl").read_bytes()
    folder, draw = write_rows(tmp / "killed"), random.Random(seed)
    output, journal = folder / "out.jsonl", folder / "out.jsonl.partial"
    before: list[bytes] = []
    runs = 0
    while True:
        runs += 1
        run(folder, draw.randrange(ROWS * TOKENS // 3), draw.uniform(0, ROWS * TOKENS * PAUSE))
        if output.exists():
            break
        there = journal.read_bytes() if journal.exists() else b""
        lines = there.split(b"\n")[:-1]
        assert lines[: len(before)] == before, "answers are kept, in the order in which they came"
        before = lines
        if there and draw.random() < 0.5:  # as if the machine had failed too: the last line is incomplete
            journal.write_bytes(there + b'{"line": 7, "response": "on'[: draw.randrange(1, 27)])
    assert output.read_bytes() == whole
    run(folder)
    assert output.read_bytes() == whole and not journal.exists()
    return runs


@pytest.mark.parametrize("seed", range(3))
def test_whenever_a_run_is_killed_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    (runs,) = run_ranks(1, kill_again_and_again, tmp_path, seed)
    assert runs > 3
