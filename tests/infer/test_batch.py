"""Answering the rows of a file into another: in order, resumable, and without touching other output."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.infer.models import PROMPTS, infer_config, write_model
from tutti.infer import batch
from tutti.infer.generate import Token
from tutti.infer.run import InferenceJob, infer

ROWS = [
    *({"prompt": prompt, "id": number} for number, prompt in enumerate(PROMPTS)),
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Åsa?"}]},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "left out"}]},
    {"instruction": "Hello", "output": "left out"},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    {"content_split": "Once upon a time"},
    {"instruction": "Hello", "input": ""},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def answer(model: str, source: Path, output: Path, **settings) -> list[dict]:
    values = {"max_tokens": 8, "batch_tokens": 600} | settings
    infer(infer_config(model, **values), InferenceJob((), str(source), str(output)))
    return [json.loads(line) for line in output.read_text().split("\n")[:-1]]


def test_rows_keep_their_order_and_their_columns(tmp_path, model):
    got = answer(model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    assert [{key: value for key, value in row.items() if key != "response"} for row in got] == ROWS
    assert all(isinstance(row["response"], str) for row in got)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_every_shape_of_the_same_question_has_the_same_answer(tmp_path, model):
    got = answer(model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl", do_sample=False)
    same = [got[0]["response"], *(row["response"] for row in got[6:9]), got[10]["response"]]
    assert len(set(same)) == 1 and got[9]["response"] != same[0]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, model, monkeypatch):
    source = write(tmp_path / "in.jsonl", ["\n", *ROWS])
    whole = answer(model, source, tmp_path / "whole.jsonl")
    stream, started = batch.Generator.stream, []

    def breaking(self, requests):
        ended = 0
        for token in stream(self, requests):
            yield token
            ended += token.end is not None
            if ended == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(batch.Generator, "stream", breaking)
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(model, source, output)
    assert not output.exists()
    journal = tmp_path / "out.jsonl.partial"
    done = [json.loads(line)["line"] for line in journal.read_text().splitlines()[1:]]
    assert len(done) == 4
    kept = journal.read_bytes()
    journal.write_bytes(kept + b'{"line": 9, "respo')  # killed while writing

    def watched(self, requests):
        assert journal.read_bytes() == kept, "until the next answer the journal is as it was, less what is torn"
        started.extend(request.number for request in requests)
        return stream(self, requests)

    monkeypatch.setattr(batch.Generator, "stream", watched)
    assert answer(model, source, output) == whole
    assert sorted(started + done) == list(range(2, len(ROWS) + 2)), "rows that were done are not done again"
    started.clear()
    assert answer(model, source, output) == whole and started == [], "a finished output is left alone"


def test_what_a_run_with_other_settings_left_is_refused(tmp_path, model):
    source = write(tmp_path / "in.jsonl", ROWS[:2])
    (tmp_path / "out.jsonl.partial").write_text('{"input": "0", "infer": {}}\n{"line": 1, "response": "x"}\n')
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial is what a run with another input"):
        answer(model, source, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl.partial").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial is damaged; delete it"):
        answer(model, source, tmp_path / "out.jsonl")


def _interrupt(monkeypatch, model: str, source: Path, output: Path, **settings) -> None:
    """Answer the rows of `source` up to the second answer."""
    stream = batch.Generator.stream

    def breaking(self, requests):
        ended = 0
        for token in stream(self, requests):
            yield token
            ended += token.end is not None
            if ended == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batch.Generator, "stream", breaking)
        answer(model, source, output, **settings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"temperature": 0.5}, "another setting of infer"),
        ({"max_tokens": 7}, "another setting of infer"),
        ({"chat_template": "none"}, "another setting of infer"),
        ("weights", "another model"),
        ("tokenizer", "another chat template or tokenizer"),
    ],
)
def test_answers_to_another_question_are_not_mixed_in(tmp_path, model, monkeypatch, change, reason):
    own = str(tmp_path / "model")
    shutil.copytree(model, own)
    source, output = write(tmp_path / "in.jsonl", ROWS[:4]), tmp_path / "out.jsonl"
    _interrupt(monkeypatch, own, source, output)
    left = (tmp_path / "out.jsonl.partial").read_bytes()
    if change == "weights":
        tensors = load_file(f"{own}/model.safetensors")
        save_file(
            {name: tensor + 1e-3 for name, tensor in tensors.items()}, f"{own}/model.safetensors", {"format": "pt"}
        )
    elif change == "tokenizer":
        config = json.loads(Path(own, "tokenizer_config.json").read_text())
        config["chat_template"] = config["chat_template"].replace("user", "person") + " "
        Path(own, "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"out\.jsonl\.partial is what a run with {reason}"):
        answer(own, source, output, **(change if isinstance(change, dict) else {}))
    assert (tmp_path / "out.jsonl.partial").read_bytes() == left


def test_a_run_goes_on_from_another_place_and_with_another_budget(tmp_path, model, monkeypatch):
    source, output = write(tmp_path / "in.jsonl", ROWS[:4]), tmp_path / "out.jsonl"
    whole = answer(model, source, tmp_path / "whole.jsonl")
    _interrupt(monkeypatch, model, source, output)
    shutil.copytree(model, tmp_path / "moved")
    assert answer(str(tmp_path / "moved"), source, output, batch_tokens=300) == whole


def test_a_template_that_writes_the_date_keeps_it_through_an_interruption(tmp_path, model, monkeypatch):
    own = str(tmp_path / "model")
    shutil.copytree(model, own)
    config = json.loads(Path(own, "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%d %B %Y') }}\n" + config["chat_template"]
    Path(own, "tokenizer_config.json").write_text(json.dumps(config))

    class Day:
        @staticmethod
        def today():
            return date(2024, 1, number)

    monkeypatch.setattr(batch, "date", Day)
    source, output, number = write(tmp_path / "in.jsonl", ROWS[:4]), tmp_path / "out.jsonl", 1
    whole = answer(own, source, tmp_path / "whole.jsonl")
    _interrupt(monkeypatch, own, source, output)
    number = 2
    assert answer(own, source, output) == whole != answer(own, source, tmp_path / "later.jsonl")


def test_columns_are_kept_as_they_are(tmp_path, model):
    rows = [
        '{"prompt": "Hello", "half": "a\\ud800b", "twice": 0.1, "name": "\u2028Åsa"}\n',
        '{"prompt": "Hello", "none": NaN}\n',
    ]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    got = answer(model, source, output)
    assert got[0] == json.loads(rows[0]) | {"response": got[0]["response"]}
    before = output.read_bytes()
    answer(model, source, output)
    assert output.read_bytes() == before, "what is not equal to itself is recognised too"


def test_a_journal_that_was_left_beside_the_finished_output_goes(tmp_path, model):
    source, output = write(tmp_path / "in.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    answer(model, source, output)
    (tmp_path / "out.jsonl.partial").write_text("{}\n")
    answer(model, source, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("there", [[{"prompt": "other", "response": "x"}], ["no json\n"], [ROWS[0]], ["[1]\n"]])
def test_the_output_of_something_else_is_refused(tmp_path, model, there):
    source = write(tmp_path / "in.jsonl", ROWS[:1])
    output = write(tmp_path / "out.jsonl", there)
    before = output.read_text()
    with pytest.raises(ValueError, match=r"--output: .*out\.jsonl exists and is not the answers to this input"):
        answer(model, source, output)
    assert output.read_text() == before


BAD = [
    (["nonsense\n"], r"in\.jsonl:1: not valid JSON"),
    ([ROWS[0], "\n", "[1]\n"], r"in\.jsonl:3: a row must be an object with named columns, not list"),
    ([], r"--input: .*in\.jsonl has no rows"),
    ([ROWS[0], {"question": "x"}], r"in\.jsonl:2: has neither prompt nor messages; its columns are question"),
    ([{"prompt": 3}], r"in\.jsonl:1: prompt must be a text or a list of messages, not int"),
    (
        [{"messages": [{"role": "assistant", "content": "x"}]}],
        r"in\.jsonl:1: the conversation has no message to answer",
    ),
    ([{"messages": [{"role": "boss", "content": "x"}]}], r"in\.jsonl:1: message 0 has unknown role 'boss'"),
    (
        [{"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}],
        r"in\.jsonl:1: has image, and this model takes none",
    ),
    ([ROWS[0], {"prompt": "many words " * 200}], r"in\.jsonl:2: the prompt has \d+ tokens, which leaves no room"),
    ([{"prompt": "a\ud800"}], r"in\.jsonl:1: the prompt has half a surrogate pair, '\\ud800', which is no character"),
    ([{"content_split": ""}], r"in\.jsonl:1: the prompt is empty"),
]


@pytest.mark.parametrize(("rows", "error"), BAD, ids=range(len(BAD)))
def test_bad_rows_are_named_before_anything_is_generated(tmp_path, model, rows, error):
    with pytest.raises(ValueError, match=error):
        answer(model, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_missing_files_and_folders(tmp_path, model):
    with pytest.raises(ValueError, match="--input: there is no file"):
        answer(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="--output: there is no folder"):
        answer(model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "nowhere" / "out.jsonl")


def _tokens() -> Iterator[Token]:
    """Two answers, of two tokens and of one."""
    for token in (Token(1, 5, None), Token(1, 6, "length"), Token(2, 5, "stop")):
        time.sleep(0.25)
        yield token


def test_progress_on_a_terminal_is_a_bar_with_the_speed_and_the_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with batch._Progress(2, active=True, console=console) as bar:
        assert list(bar.watch(_tokens()))[-1].number == 2
    shown = console.file.getvalue()
    assert "1 of 2 rows" in shown and "2 of 2 rows" in shown and "tokens/s" in shown and "left" in shown


def test_progress_elsewhere_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(batch, "_LOG_SECONDS", 0.1)
    lines = []
    monkeypatch.setattr(batch.log, "info", lambda text, *parts: lines.append(text % parts))
    with batch._Progress(2, active=True, console=Console(file=io.StringIO())) as bar:
        list(bar.watch(_tokens()))
    assert "1 of 2 rows" in lines[1] and lines[1].endswith(" s left") and lines[-1].startswith("2 of 2 rows, ")
    lines.clear()
    with batch._Progress(2, active=False) as bar:
        list(bar.watch(_tokens()))
    assert not lines
