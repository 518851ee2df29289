"""Files: whatever their bytes, every row comes out once, as a row or as a bad row with its line, in the same way by
random access and in order; what can't be read is an error that names the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tutti.data import formats
from tutti.data.formats import BadRow, Csv, DataFile, JsonArray, JsonLines, Row, Text
from tutti.data.tables import Arrow, Parquet

BLOCKS = st.sampled_from([1, 2, 7, 64, 1 << 22, 1 << 22])
READERS = {
    ".jsonl": JsonLines, ".json": JsonArray, ".csv": Csv, ".tsv": Csv, ".parquet": Parquet, ".arrow": Arrow,
    ".txt": lambda path: Text(path, "text"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / ".cache"))


def open_file(path: Path) -> DataFile:
    kind = next(suffix for suffix in reversed(path.suffixes) if suffix not in (".gz", ".zst"))
    return READERS[kind](str(path))


def read(path: Path, block: int = 1 << 22, start: int = 0) -> list[Row | BadRow]:
    """The rows of a file from `start` on, checked to be equal by random access and in order."""
    before, formats._BLOCK = formats._BLOCK, block
    try:
        streamed = list(open_file(path).stream())
        file = open_file(path)
        assert len(file) == len(streamed)
        assert file.read(range(len(file))) == streamed
        rest = open_file(path).stream(start)
        assert list(rest) == streamed[start:]
        return streamed
    finally:
        formats._BLOCK = before


def values(rows: list[Row | BadRow]) -> list[Any]:
    return [row.value if isinstance(row, Row) else row.reason for row in rows]


def compress(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(data)
    return path


CELLS = st.text(st.sampled_from("ab\"'\n\r,\t;é\u2028 "), max_size=8)


@examples(200)
@given(st.text(st.sampled_from('ab""\n\n\r,,é\u2028 '), max_size=60), BLOCKS, st.booleans(), st.integers(0, 5))
def test_csv_is_what_the_csv_module_reads(tmp_path: Path, text: str, block: int, bom: bool, start: int) -> None:
    text = "text,label\n" + text
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    rows = read(path, block, start)
    reader = csv.reader(io.StringIO(text, newline=""))
    next(reader)
    expected, line = [], 2
    for fields in reader:
        if fields:
            expected.append((line, fields, reader.line_num))
        line = reader.line_num + 1
    assert [row.line for row in rows] == [line for line, _, _ in expected]
    for row, (line, fields, last) in zip(rows, expected, strict=True):
        if isinstance(row, Row):
            assert list(row.value.values()) == fields
        elif last > line and "quotation mark" in row.reason:
            record = "".join(io.StringIO(text, newline="").readlines()[line - 1 : last])
            with pytest.raises(csv.Error):
                next(csv.reader(io.StringIO(record, newline=""), strict=True))
        else:
            assert row.reason == f"has {len(fields)} fields where the header names 2"


@examples(100)
@given(st.lists(st.tuples(CELLS, CELLS), max_size=6), st.sampled_from(["csv", "tsv", "csv.gz"]), BLOCKS)
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, cells: list, name: str, block: int) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t" if name == "tsv" else ",").writerows([("text", "label"), *cells])
    path = compress(tmp_path / f"a.{name}", text.getvalue().encode())
    assert values(read(path, block)) == [{"text": a, "label": b} for a, b in cells]


def test_a_quotation_mark_alone_takes_no_row(tmp_path: Path) -> None:
    lines = [f'{n} is a 5" screen\t{n}' if n in (500, 1500) else f"{n}\t{n}" for n in range(2000)]
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(["text\tlabel", *lines]))
    assert [row.value["text"] + "\t" + row.value["label"] for row in read(path)] == lines
    lines[500], lines[1500] = '"Yes\t500', '"No\t1500'
    path.write_text("\n".join(["text\tlabel", *lines]))
    rows = read(path)
    assert [row.line for row in rows if isinstance(row, BadRow)] == [502]
    assert "a quotation mark is missing, or one too many, up to line 1502" in rows[500].reason
    path.write_text("\n".join(["label\ttext", *lines[:400], '500\t"Yes', *lines[600:1400]]))
    (bad,) = [row for row in read(path) if isinstance(row, BadRow)]
    assert bad.line == 402 and "unexpected end of data" in bad.reason


def test_csv_cells_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{'x' * 200_000},1\n")
    assert read(path)[0].value == {"text": "x" * 200_000, "label": "1"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.sampled_from('ab"\\[]{},:\n\u2028é🙂'), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.sampled_from(["text", "data", "x"]), JSON, max_size=3), max_size=6)


@examples(200)
@given(OBJECTS, st.sampled_from([None, 1]), st.booleans(), BLOCKS, st.integers(0, 4))
def test_json_arrays_are_read_whole(
    tmp_path: Path, objects: list, indent: int | None, nested: bool, block: int, start: int
) -> None:
    path = tmp_path / "a.json"
    document: Any = {"x": {"data": ["no"]}, "data": objects, "after": [1, {"y": []}]} if nested else objects
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    rows = read(path, block, start)
    assert values(rows) == objects
    if indent:
        lines = text.split("\n")
        assert all(lines[row.line - 1].strip().startswith("{") for row in rows)


@examples(200)
@given(
    st.lists(st.sampled_from(['{"text": "a"}', "{nope}", '{"a": [}, 3]}', "7", '{"x": "]"}', '"é', '"s"']), max_size=6),
    BLOCKS,
)
def test_malformed_rows_of_an_array_are_bad_rows(tmp_path: Path, rows: list[str], block: int) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join(rows) + "]", encoding="utf-8")
    if '"é' in rows or '{"a": [}, 3]}' in rows:
        return
    found = read(path, block)
    assert [row.line for row in found] == list(range(1, len(rows) + 1))
    assert [isinstance(row, Row) for row in found] == [text in ('{"text": "a"}', '{"x": "]"}') for text in rows]


@pytest.mark.parametrize("more", ['[{"text": "b"}]', ', {"text": "b"}', "x"])
@pytest.mark.parametrize("whole", ['[{"text": "a"}]', '{"data": [{"text": "a"}], "more": {"x": []}}'])
def test_what_follows_an_array_is_an_error(tmp_path: Path, whole: str, more: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"{whole}\n \n{more}")
    for block in (1, 5, 1 << 22):
        with pytest.raises(ValueError, match=r"a\.json:3: not valid JSON: something follows the array of rows"):
            read(path, block)


LINES = st.lists(
    st.binary(max_size=12).map(lambda line: line.replace(b"\n", b""))
    | st.sampled_from(
        [
            b"",
            b" ",
            b" " * 80,
            b"\x0b\t\r",
            b'{"text": "a"}',
            b' {"text": "\xff"}',
            b"[" * 3000,
            b'{"n": %s}' % (b"9" * 4301),
        ]
    ),
    max_size=8,
)


@examples(300)
@given(LINES, BLOCKS, st.integers(0, 4))
def test_lines_are_rows_or_bad_rows_or_blank(tmp_path: Path, lines: list[bytes], block: int, start: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return
    rows = read(path, block, start)
    assert [row.line for row in rows] == [number for number, line in enumerate(lines, 1) if line.strip()]
    for row in rows:
        try:
            value = json.loads(lines[row.line - 1].decode("utf-8-sig"))
        except (ValueError, RecursionError):
            value = None
        assert isinstance(row, Row) == isinstance(value, dict)


KINDS = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst"]


@examples(300)
@given(st.sampled_from(KINDS), st.binary(max_size=80), BLOCKS)
def test_any_bytes_are_rows_or_an_error_that_names_the_file(tmp_path: Path, name: str, data: bytes, block: int) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    try:
        rows = read(path, block)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(row.file == str(path) and row.line > 0 for row in rows)


@examples(150)
@given(st.sampled_from(KINDS), st.integers(0), st.integers(1, 255), st.booleans())
def test_a_damaged_file_is_rows_or_an_error_that_names_it(
    tmp_path: Path, name: str, place: int, change: int, cut: bool
) -> None:
    path = example(tmp_path / name)
    data = bytearray(path.read_bytes())
    place %= len(data)
    if cut:
        del data[place:]
    else:
        data[place] ^= change
    path.write_bytes(data)
    try:
        rows = list(open_file(path).stream())
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(row.file == str(path) and row.line > 0 for row in rows)


def example(path: Path) -> Path:
    """A file of 40 rows in the format of its name."""
    rows = [{"text": f"row {number} é", "label": number} for number in range(40)]
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=9, compression="zstd")
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    elif ".csv" in path.suffixes or ".tsv" in path.suffixes:
        mark = "\t" if ".tsv" in path.suffixes else ","
        lines = ["text" + mark + "label", *(f"{row['text']}{mark}{row['label']}" for row in rows)]
        compress(path, "\n".join(lines).encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        compress(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "is UTF-16 or UTF-32 text: convert it to UTF-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16 or UTF-32 text"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), "is UTF-16 or UTF-32 text"),
        ("a.csv", "caf\xe9,label\na,1\n".encode("latin-1"), r"csv:1: the header is not UTF-8 text: .* byte 0xe9"),
        ("a.csv", b"\ntext,text\na,1\n", "has two columns named text: rename one of them"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}', mtime=0)[:-9],
            "can't be decompressed: Compressed file ended before",
        ),
        ("a.jsonl.gz", b"\x1f\x8b\x08" + b"\xff" * 40, "can't be decompressed"),
        ("a.csv.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "can't be decompressed"),
    ],
)
def test_unreadable_text_is_an_error_that_names_the_file(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for act in (lambda: list(open_file(path).stream()), lambda: open_file(path).read([0])):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert str(path) in str(error.value)


def test_a_broken_part_of_a_compressed_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    data = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(5000)), mtime=0))
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz can't be decompressed"):
        list(open_file(path).stream())


def test_rows_that_are_not_utf8_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\na,1\n\xff\xfe,2\nc,3\n")
    assert [(row.line, isinstance(row, Row)) for row in read(path)] == [(2, True), (3, False), (4, True)]
    path = tmp_path / "a.txt"
    path.write_bytes("a".encode("utf-16"))
    assert "not UTF-8 text" in read(path)[0].reason


def test_cells_of_tables_that_python_cannot_hold_are_bad_rows(tmp_path: Path) -> None:
    text = pa.array([b"a", b"\xff", b"c"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, text.buffers())
    time = pa.array([0, 1, 1 << 62], pa.int64()).cast(pa.timestamp("s"))
    table = pa.table({"text": text, "time": time})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    pyarrow.parquet.write_table(pa.table({"text": text, "time": pa.array([0, 1, 2])}), tmp_path / "a.parquet")
    for name, good in [("a.arrow", [True, False, False]), ("a.parquet", [True, False, True])]:
        rows = read(tmp_path / name)
        assert [row.line for row in rows] == [1, 2, 3]
        assert [isinstance(row, Row) for row in rows] == good
        assert "can't be read" in rows[1].reason


# All values of a column have one type, with keys that some values lack.
ARGUMENTS = st.fixed_dictionaries({}, optional={"to": st.text(max_size=2), "n": st.integers(0, 9)})
CALLS = st.lists(st.fixed_dictionaries({"name": st.text(max_size=2)}, optional={"arguments": ARGUMENTS}), max_size=3)
TABLE_ROWS = st.lists(
    st.fixed_dictionaries({}, optional={"text": st.text(max_size=3), "calls": CALLS, "tool": ARGUMENTS}), min_size=1
)


@examples(150)
@given(TABLE_ROWS, st.sampled_from(["a.parquet", "a.arrow"]), st.integers(1, 4), st.integers(0, 6))
def test_tables_give_the_rows_that_json_gives(
    tmp_path: Path, rows: list[dict], name: str, size: int, start: int
) -> None:
    kind = pa.struct([("to", pa.string()), ("n", pa.int64())])
    calls = pa.list_(pa.struct([("name", pa.string()), ("arguments", kind)]))
    table = pa.Table.from_pylist(rows, pa.schema([("text", pa.string()), ("calls", calls), ("tool", kind)]))
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=size)
    else:
        with pa.OSFile(str(tmp_path / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=size)
    assert values(read(tmp_path / name, start=start)) == rows


def test_nulls_of_lists_and_maps_stay(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.struct([("x", pa.int64()), ("y", pa.int64())]))
    rows = [{"list": [None, 1], "map": [("a", {"x": 1}), ("b", None)]}, {"list": []}]
    table = pa.Table.from_pylist(rows, pa.schema([("list", pa.list_(pa.int64())), ("map", kind)]))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert values(read(tmp_path / "a.parquet")) == [
        {"list": [None, 1], "map": {"a": {"x": 1}, "b": None}},
        {"list": []},
    ]


def test_explicit_nulls_of_json_stay(tmp_path: Path) -> None:
    row = {"calls": [{"arguments": {"to": None}}], "x": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert values(read(tmp_path / "a.jsonl")) == [row]


def test_columns_of_categories_are_read(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(list("abcabd")).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert [row.value["text"] for row in read(tmp_path / "a.parquet")] == list("abcabd")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.csv.zst"])
def test_the_places_of_a_large_files_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(formats, "KEEP_PLACES", 1)
    path = example(tmp_path / name)
    expected = open_file(path).read(range(40))
    with monkeypatch.context() as again:
        again.setattr(formats._TextFile, "_write_places", lambda *_: pytest.fail("found again"))
        again.setattr(formats.JsonLines, "_write_places", lambda *_: pytest.fail("found again"))
        assert open_file(path).read(range(40)) == expected
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    assert open_file(path).read([39, 2]) == [expected[39], expected[2]]


def test_places_are_found_anew_where_they_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "KEEP_PLACES", 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / "file" / "folder"))
    file = open_file(example(tmp_path / "a.jsonl"))
    assert len(file.read(range(40))) == 40 and file.checksum() == zlib.crc32((tmp_path / "a.jsonl").read_bytes())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.csv.zst", "a.parquet"])
def test_streaming_unpacks_and_indexes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "a.json.gz":
        compress(tmp_path / name, json.dumps([{"text": "a"}] * 40).encode())
    else:
        example(tmp_path / name)

    def fail(*_: object) -> None:
        raise AssertionError("unpacked")

    for module in ("formats", "tables"):
        monkeypatch.setattr(sys.modules[f"tutti.data.{module}"], "unpacked", fail)
    file = open_file(tmp_path / name)
    assert len(list(file.stream())) == 40
    assert len(list(file.stream(30))) == 10
    assert list(vars(file)) in (["path"], ["path", "_header"])
