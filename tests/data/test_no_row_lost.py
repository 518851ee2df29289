"""From files of any format to training steps, no row is lost, repeated or changed."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.json import read_json

from tests.data.fakes import build, configure, fake_encoder, ids, record
from tests.data.test_encode import encoder, trained_text
from tests.properties import examples
from tutti.config import Config, DataConfig
from tutti.core.batch import Sample
from tutti.data import index
from tutti.data.source import BadRow, open_sources

__all__ = ["fake_encoder"]  # a fixture that every test here uses


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        schema = pa.schema([("id", pa.int64()), ("n", pa.int64()), ("bad", pa.string())])
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=7)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


FILES = st.lists(
    st.tuples(st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"]), st.lists(st.integers(0, 40), min_size=1)),
    min_size=1,
    max_size=3,
)
"""Files by extension and the lengths of their rows; a length under 2 makes a bad row."""


@pytest.mark.parametrize("streamed", [False, True])
@examples(40)
@given(
    files=FILES,
    split=st.booleans(),
    dynamic=st.booleans(),
    buffer=st.integers(1, 20),
    layout=st.tuples(st.sampled_from([0, 0, 0, 2]), st.sampled_from([1, 2, 4])),
    keep=st.booleans(),
)
def test_every_row_is_trained_on_once_or_counted(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    streamed: bool,
    files: list[tuple[str, list[int]]],
    split: bool,
    dynamic: bool,
    buffer: int,
    layout: tuple[int, int],
    keep: bool,
) -> None:
    workers, ranks = layout
    folder = tmp_path_factory.mktemp("files")
    number, good, total = 0, [], 0
    for place, (kind, lengths) in enumerate(files):
        rows = []
        for length in lengths:
            rows.append({"id": number, "n": length} if length > 1 else {"bad": "too short"})
            good += [number] * (length > 1)
            number, total = number + 1, total + 1
        write(folder / f"{place}{kind}", rows)
    if not good:
        return
    path = str(folder)
    if split:
        path = str(folder / "sources.yaml")
        Path(path).write_text(json.dumps({"sources": [f"{place}{kind}" for place, (kind, _) in enumerate(files)]}))
    data = {"silent_exception": True, "drop_last": False, "shuffle_buffer_size": buffer, "num_workers": workers}
    train = {"micro_batch_size": 1, "global_batch_size": 4, "dyn_bsz": dynamic}
    if streamed:
        # So many samples are a whole pass and the part of a step that fills it up.
        data |= {"datasets_type": "iterable", "train_sample": len(good)}
        train["dyn_bsz"] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTTI_CACHE", str(folder / ".cache"))
        patch.setattr(index, "KEEP_TOKENS", 32_000_000 if keep else 0)
        whole = build(configure(path, data=data, **train))
        batches = list(whole.train())
        expected = record(batches)
        parts = [record(build(configure(path, data=data, **train), rank, ranks).train()) for rank in range(ranks)]
    found = ids(batches)
    assert sorted(found[: len(good)]) == good and (streamed or len(found) == len(good))
    if not streamed or total <= index.CHUNK:  # else a stream may not have read the bad rows at its end yet
        assert whole.report.rows == total
        assert sum(whole.report.dropped.values()) == total - len(good)
    for step, (*same, micro_batches) in enumerate(expected):
        assert all(list(part[step][:4]) == same for part in parts)
        assert sorted(one for part in parts for one in part[step][4]) == sorted(micro_batches)
        assert {len(part[step][4]) for part in parts} == {4 // ranks}


def samples(path: Path, **settings: Any) -> list[Sample | BadRow]:
    """The samples that the rows of a file are encoded to, one each: the same read in order and by random access."""
    made = encoder(**settings)
    (source,) = open_sources(Config(data=DataConfig(train_path=str(path), data_type="conversation", **settings)))
    found = [made([row])[0] for row in source.stream()]
    again = made(source.rows(range(len(source))))
    assert [result if isinstance(result, BadRow) else result[0].input_ids.tolist() for result in found] == [
        result if isinstance(result, BadRow) else result[0].input_ids.tolist() for result in again
    ]
    return [result if isinstance(result, BadRow) else result[0] for result in found]


def tool(name: str, **properties: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def chat(name: str, arguments: dict[str, Any], *, as_text: bool = False, **properties: str) -> dict[str, Any]:
    call = {"name": name, "arguments": json.dumps(arguments) if as_text else arguments}
    calls = [{"type": "function", "function": call}]
    return {
        "messages": [
            {"role": "user", "content": "Do it."},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "It is done."},
        ],
        "tools": [tool(name, **properties)],
    }


CHATS = [("mail", {"to": "me", "subject": "hi"}, {"to": "string", "subject": "string"}),
         ("add", {"a": 2, "b": 3}, {"a": "integer", "b": "integer"}),
         ("now", {}, {})]  # fmt: skip
TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("name", ["a.parquet", "text.parquet", "a.arrow", "a.csv", "arguments.jsonl"])
def test_chats_in_tables_are_those_of_json(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.data.test_encode.TEMPLATES", {"chatml": TEMPLATE})
    rows = [chat(name, arguments, **properties) for name, arguments, properties in CHATS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = samples(tmp_path / "rows.jsonl")
    path = tmp_path / name
    as_text = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    if name == "a.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([as_text[0], *(row.values() for row in as_text)])
    elif name == "arguments.jsonl":
        again = (chat(name, arguments, as_text=True, **properties) for name, arguments, properties in CHATS)
        path.write_text("".join(json.dumps(row) + "\n" for row in again))
    elif name == "a.arrow":
        datasets = pytest.importorskip("datasets")
        path = tmp_path / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        table = read_json(str(tmp_path / "rows.jsonl"))
        pyarrow.parquet.write_table(table if name == "a.parquet" else pa.Table.from_pylist(as_text), path)
    for one, other in zip(samples(path), expected, strict=True):
        assert isinstance(one, Sample) and isinstance(other, Sample), one
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()


def test_half_a_surrogate_pair_is_a_bad_row_or_replaced(tmp_path: Path) -> None:
    asks, answers = '{"role": "user", "content": "%s"}', '{"role": "assistant", "content": "ok\\udc00"}'
    turns = f'{{"messages": [{asks}, {answers}], "x": "\\ud83d"}}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([turns % "hi", turns.replace("\\udc00", "") % "\\ud83d\\ude00", turns % "cut \\ud83d"]))
    first, second, third = samples(path)
    assert isinstance(second, Sample), "another column may have one, and pairs are whole"
    for row, line, half in [(first, 1, "\\udc00"), (third, 3, "\\ud83d")]:
        assert isinstance(row, BadRow) and row.line == line
        assert row.reason == f"half a surrogate pair, '{half}', is no character (data.silent_exception makes it U+FFFD)"
    assert [trained_text(sample) for sample in samples(path, silent_exception=True)] == [
        "ok\ufffd<|im_end|>", "ok<|im_end|>", "ok\ufffd<|im_end|>",
    ]  # fmt: skip
    made = encoder(silent_exception=True)
    (source,) = open_sources(Config(data=DataConfig(train_path=str(path), data_type="conversation")))
    chunk = index.encode_chunk(made, 0, range(3), source.rows(range(3)))
    assert chunk.notes == {"halves of surrogate pairs, which are no characters, became U+FFFD": 2}
