"""Rows of a file answered into another: in order, going on after an interruption, and nobody else's output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.infer.models import PROMPTS, infer_config, no_checkpoint, write_model
from tutti.infer import batch as table
from tutti.infer.run import Job, infer

ROWS = [
    *({"prompt": prompt, "id": number} for number, prompt in enumerate(PROMPTS)),
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Åsa?"}]},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "left out"}]},
    {"instruction": "Hello", "output": "left out"},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    {"content_split": "Once upon a time"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def answer(model: str, source: Path, output: Path, **settings) -> list[dict]:
    values = {"max_tokens": 8, "batch_tokens": 600} | settings
    infer(infer_config(model, **values), Job((), str(source), str(output)), no_checkpoint)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_rows_keep_their_order_and_their_columns(tmp_path, model):
    got = answer(model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    assert [{key: value for key, value in row.items() if key != "response"} for row in got] == ROWS
    assert all(isinstance(row["response"], str) for row in got)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_every_shape_of_the_same_question_has_the_same_answer(tmp_path, model):
    got = answer(model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl", do_sample=False)
    same = [got[0]["response"], *(row["response"] for row in got[6:9])]
    assert len(set(same)) == 1 and got[9]["response"] != same[0]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, model, monkeypatch):
    source = write(tmp_path / "in.jsonl", ["\n", *ROWS])
    whole = answer(model, source, tmp_path / "whole.jsonl")
    stream, started = table.Generator.stream, []

    def breaking(self, requests):
        ended = 0
        for token in stream(self, requests):
            yield token
            ended += token.end is not None
            if ended == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(table.Generator, "stream", breaking)
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(model, source, output)
    assert not output.exists()
    journal = tmp_path / "out.jsonl.partial"
    done = [json.loads(line)["line"] for line in journal.read_text().splitlines()[1:]]
    assert len(done) == 4
    journal.write_bytes(journal.read_bytes() + b'{"line": 9, "respo')  # killed while writing

    def watched(self, requests):
        started.extend(request.number for request in requests)
        return stream(self, requests)

    monkeypatch.setattr(table.Generator, "stream", watched)
    assert answer(model, source, output) == whole
    assert sorted(started + done) == list(range(2, len(ROWS) + 2)), "rows that were done are not done again"
    started.clear()
    assert answer(model, source, output) == whole and started == [], "a finished output is left alone"


def test_what_a_run_with_other_settings_left_is_refused(tmp_path, model):
    source = write(tmp_path / "in.jsonl", ROWS[:2])
    (tmp_path / "out.jsonl.partial").write_text('{"input": "0", "infer": {}}\n{"line": 1, "response": "x"}\n')
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial is what a run with another input"):
        answer(model, source, tmp_path / "out.jsonl")


@pytest.mark.parametrize("there", [[{"prompt": "other", "response": "x"}], ["no json\n"], [ROWS[0]], ["[1]\n"]])
def test_the_output_of_something_else_is_refused(tmp_path, model, there):
    source = write(tmp_path / "in.jsonl", ROWS[:1])
    output = write(tmp_path / "out.jsonl", there)
    before = output.read_text()
    with pytest.raises(ValueError, match=r"--output: .*out\.jsonl exists and is not the answers to this input"):
        answer(model, source, output)
    assert output.read_text() == before


BAD = [
    (["nonsense\n"], r"in\.jsonl:1: is not JSON"),
    ([ROWS[0], "\n", "[1]\n"], r"in\.jsonl:3: must be a JSON object, not list"),
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
        r"in\.jsonl:1: message 0 has a part of type image; a model can be given only text so far",
    ),
    ([ROWS[0], {"prompt": "many words " * 200}], r"in\.jsonl:2: the prompt has \d+ tokens, which leaves no room"),
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


def test_progress_counts_rows(tmp_path, model, capsys):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with table._Progress(2, active=True, stream=Terminal()) as bar:
        bar.token()
        bar.row()
        bar._show()
        shown = bar._stream.getvalue()
    assert "1 of 2 rows" in shown and "tokens/s" in shown and "left" in shown
