"""Sources: all file formats by random access and in order, bad rows, setup errors, and multi-source YAML files."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tutti.config import Config, DataConfig
from tutti.data import formats
from tutti.data.source import BadRow, Row, open_sources

VALUES = [{"text": f'row {i}, "quoted" é' + ("\nsecond line" if i % 3 == 0 else ""), "label": i} for i in range(40)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / ".cache"))


def config(path: Path | str, **data: object) -> Config:
    return Config(data=DataConfig(**{"train_path": str(path), "data_type": "classification", **data}))


def open_one(path: Path | str, **data: object):
    (source,) = open_sources(config(path, **data))
    return source


def write(path: Path, values: list = VALUES) -> Path:
    """`values` in the format of the path's name."""
    lines = "".join(json.dumps(value) + "\n" for value in values)
    name = path.name
    if name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".jsonl.zst"):
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines.encode())
    elif name == "lines.json" or name.endswith(".jsonl"):
        path.write_text(lines)
    elif name == "data.json":
        path.write_text(json.dumps({"version": [1, {"data": []}], "data": values}, indent=1))
    elif name.endswith(".json"):
        path.write_text(json.dumps(values))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.Table.from_pylist(values), path, row_group_size=7)
    elif name == "stream.arrow":
        table = pa.Table.from_pylist(values)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(values)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    else:
        separator = "\t" if name.endswith(".tsv") else ","
        cells = [[str(cell).replace('"', '""') for cell in value.values()] for value in values]
        path.write_text(f"text{separator}label\n" + "".join(f'"{a}"{separator}{b}\r\n' for a, b in cells), newline="")
    return path


FORMATS = [
    "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "lines.json", "array.json", "data.json", "a.parquet", "a.arrow",
    "stream.arrow", "a.csv", "a.tsv",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same_rows(tmp_path: Path, name: str) -> None:
    source = open_one(write(tmp_path / name))
    expected = VALUES
    if name[-3:] in ("csv", "tsv"):
        expected = [{"text": value["text"], "label": str(value["label"])} for value in VALUES]
    assert len(source) == len(VALUES)
    assert [row.value for row in source.stream()] == expected
    assert [row.value for row in source.stream(17)] == expected[17:]
    ids = [5, 39, 0, 5, 21]
    assert [row.value for row in source.rows(ids)] == [expected[i] for i in ids]
    assert [row.line for row in source.rows(ids)] == [list(source.stream())[i].line for i in ids]
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 2000, "a pickled source carries what it opened"
    assert [row.value for row in copy.rows([3])] == [expected[3]]


def test_rows_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n   \n{"text": "b"}\r\n{"text": "c"}')
    source = open_one(path)
    for rows in (source.rows([0, 1, 2]), list(source.stream())):
        assert [(row.line, row.value["text"]) for row in rows] == [(1, "a"), (4, "b"), (5, "c")]
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",1\nb,2\n')
    assert [row.line for row in open_one(path).stream()] == [2, 4]
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a [,]{ \\" "},\n\n {"text": "b"}\n]')
    assert [(row.line, row.value["text"]) for row in open_one(path).stream()] == [(2, 'a [,]{ " '), (4, "b")]


def test_bad_rows_are_returned_with_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n[1, 2]\n{"text": "d"}\n')
    source = open_one(path)
    for rows in (source.rows(range(4)), list(source.stream())):
        assert [type(row) for row in rows] == [Row, BadRow, BadRow, Row]
        assert str(rows[1]) == f"{path}:2: not valid JSON: Expecting value at column 10"
        assert str(rows[2]) == f"{path}:3: a row must be an object with named columns, not list"
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,1\nb,2,3\n")
    assert open_one(path).rows([1]) == [BadRow(str(path), 3, "has 3 fields where the header names 2")]
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": nope}, {"text": "c"}]')
    assert [type(row) for row in open_one(path).rows(range(3))] == [Row, BadRow, Row]


@pytest.mark.parametrize("window", [1, 5, 64, 1000])
def test_json_arrays_are_read_alike_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(formats, "_BLOCK", window)
    values = [{"text": 'é🙂 "[{,]}"\\', "label": [i, {"a": [i]}], "more": "日本" * i} for i in range(9)]
    path = tmp_path / "a.json"
    path.write_text("\n" + json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")
    source = open_one(path)
    assert [row.value for row in source.stream()] == values
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [lines[row.line - 1].strip() for row in source.rows(range(9))] == ["{"] * 9
    path.write_text('[{"text": "a"}, {"text": nope, "é": [1]}, {"text": "c"}]', encoding="utf-8")
    assert [type(row) for row in open_one(path).stream()] == [Row, BadRow, Row]
    path.write_text('[{"text": "a"},\n{"text": [1}, {"text": "c"}]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.json:2: not valid JSON: .* a row that begins here, never ends"):
        list(open_one(path).stream())


def test_text_is_a_document_a_file(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n{name}")
    source = open_one(tmp_path, data_type="plaintext")
    assert [row.value for row in source.rows([0, 1])] == [{"content_split": "a\n\na"}, {"content_split": "b\n\nb"}]
    assert [row.value for row in source.stream(1)] == [{"content_split": "b\n\nb"}]
    with pytest.raises(ValueError, match=r"which data.data_type plaintext reads, not classification"):
        open_one(tmp_path)


def test_folders_lists_and_globs(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, values in [("b.jsonl", VALUES[:2]), ("a.parquet", VALUES[2:4]), ("deep/c.json", VALUES[4:5])]:
        write(tmp_path / name, values)
    (tmp_path / "readme.md").write_text("not data")
    (tmp_path / "empty.jsonl").touch()
    labels = [row.value["label"] for row in open_one(tmp_path).stream()]
    assert labels == [2, 3, 0, 1, 4]
    listed = open_one(f"{tmp_path}/b.jsonl, {tmp_path}/deep")
    assert [row.value["label"] for row in listed.rows([2, 0])] == [4, 0]
    assert [row.value["label"] for row in listed.stream(2)] == [4]
    assert [row.value["label"] for row in open_one(f"{tmp_path}/*.jsonl", source_name="mine").stream()] == [0, 1]
    assert open_one(f"{tmp_path}/b.jsonl", source_name="mine").name == "mine"
    assert open_one(f"{tmp_path}/b.jsonl").name == "b"


def test_folder_of_save_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(VALUES).save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert [row.value for row in open_one(tmp_path / "one").stream()] == VALUES
    datasets.DatasetDict(train=datasets.Dataset.from_list(VALUES)).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(ValueError, match=r"several splits; give .*dict/train"):
        open_one(tmp_path / "dict")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nope.jsonl", r"data.train_path: .*nope.jsonl does not exist; .* has a.jsonl, folder"),
        ("none/x.jsonl", r"neither does the folder .*none"),
        ("*.parquet", "nothing matches"),
        ("empty.jsonl", "empty.jsonl is empty"),
        ("blank.jsonl", "blank.jsonl holds no rows"),
        ("empty.json", "empty.json holds no rows"),
        ("folder", r"folder .*folder holds no data file \(known are .jsonl, "),
        ("file.xyz", r"file.xyz has no known format: known are .jsonl, .*\.txt"),
        ("broken.parquet", "not a readable parquet file"),
        ("broken.arrow", "not a readable Arrow file"),
        ("object.json", 'must hold an array of rows, {"data": .rows.}, or one row a line'),
        ("open.json", r"open.json:2: not valid JSON: the array of rows, .* never ends"),
    ],
)
def test_what_is_wrong_with_a_path(tmp_path: Path, path: str, message: str) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "folder").mkdir()
    contents = {
        "empty.jsonl": "",
        "blank.jsonl": "\n \n",
        "file.xyz": "x",
        "broken.parquet": "x" * 64,
        "empty.json": "[]",
    }
    contents |= {"broken.arrow": "x" * 64, "object.json": '{"rows":\n[]}', "open.json": '[{"text": "a"},\n'}
    if path in contents:
        (tmp_path / path).write_text(contents[path])
    with pytest.raises(ValueError, match=message):
        list(open_one(tmp_path / path).stream())


def test_multi_source_yaml(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", VALUES[:3])
    write(tmp_path / "b.jsonl", VALUES[3:5])
    mix = tmp_path / "mix.yaml"
    mix.write_text("sources: [a.jsonl, b.jsonl]\nnames: [one, two]\nweights: [3, 1]\n")
    one, two = open_sources(config(mix))
    assert [(s.name, s.weight, len(s)) for s in (one, two)] == [("one", 3, 3), ("two", 1, 2)]
    assert [s.name for s in open_sources(config(mix, source_name="two"))] == ["two"]
    with pytest.raises(ValueError, match=r"data.source_name three is none of the sources in .*: one, two"):
        open_sources(config(mix, source_name="three"))
    mix.write_text(
        "sources: [a.jsonl, b.jsonl]\nschedule:\n- {weights: [1, 0]}\n"
        "- {step: 10, weights: [1, 1], schedule_type: linear}\n- {step: 20, weights: [0, 2]}\n"
    )
    a, b = open_sources(config(mix))
    assert [a.name, b.name] == ["a", "b"]
    assert [a.weight_at(step) for step in (0, 9, 10, 15, 20, 99)] == [1, 1, 1, 0.5, 0, 0]
    assert [b.weight_at(step) for step in (0, 9, 10, 15, 20, 99)] == [0, 0, 1, 1.5, 2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paths: []", "must have `sources`"),
        ("sources: [a.jsonl]\nnam: [x]", "unknown nam; known are sources, names, weights, schedule"),
        ("sources: [a.jsonl, a.jsonl]", "`names` must be 2 different names"),
        ("sources: [a.jsonl]\nweights: [-1]", "weights must be 1 numbers >= 0"),
        (
            "sources: [a.jsonl]\nschedule: [{step: 5, weights: [1]}]",
            "must be whole, start at 0 and increase; 5 does not",
        ),
        ("sources: [a.jsonl]\nweights: [1]\nschedule: [{weights: [1]}]", "not both"),
        ("sources: [gone.jsonl]", "gone.jsonl does not exist"),
        ("sources: [", "not valid YAML"),
        ("- a.jsonl", "mix.yaml:1: expects `sources`: a list of paths, not a single value"),
        ("sources: a.jsonl", "`sources` must be a list of texts, not 'a.jsonl'"),
        ("sources: [{path: a.jsonl}]", "`sources` must be a list of texts"),
        ("sources: [a.jsonl]\nsources: [b.jsonl]", "mix.yaml:2: sources is given twice"),
        ("sources: [a.jsonl]\nnames: a", "`names` must be a list of texts, not 'a'"),
        ("sources: [a.jsonl]\nschedule: [0]", r"`schedule` must be a list such as .*, not \[0\]"),
        ("sources: [a.jsonl]\nschedule: {weights: [1]}", "`schedule` must be a list such as"),
        ("sources: [a.jsonl]\nschedule: []", "`schedule` must be a list such as"),
        ("sources: [a.jsonl]\nschedule: [{steps: 0, weights: [1]}]", "unknown steps in `schedule`; known: step, "),
        ("sources: [a.jsonl]\nschedule: [{step: a, weights: [1]}]", "must be whole, start at 0 and increase; 'a' does"),
        ("sources: [a.jsonl]\nschedule: [{weights: [1]}, {step: 0, weights: [1]}]", "start at 0 and increase; 0 does"),
        ("sources: [a.jsonl]\nweights: [.inf]", "weights must be 1 numbers >= 0"),
        ("sources: [a.jsonl]\nweights: [true]", "weights must be 1 numbers >= 0"),
        ("sources: [a.jsonl]\nweights: 1", "weights must be 1 numbers >= 0"),
        ("sources: [$NOT_SET/a.jsonl]", "the environment variable NOT_SET in .* is not set"),
    ],
)
def test_what_is_wrong_with_a_yaml(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_sources(config(tmp_path / "mix.yaml"))


def test_a_yaml_is_read_as_configurations_are(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", VALUES[:3])
    write(tmp_path / "b.jsonl", VALUES[3:5])
    (tmp_path / "mix.yaml").write_text("sources: [a.jsonl, b.jsonl]\nnames: [1, 2]\nweights: [5e-1, 1e-1]\n")
    assert [(one.name, one.weight) for one in open_sources(config(tmp_path / "mix.yaml"))] == [("1", 0.5), ("2", 0.1)]
    assert [one.name for one in open_sources(config(tmp_path / "mix.yaml", source_name="2"))] == ["2"]


def test_globs_lists_and_homes_in_a_yaml_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set[1]"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.jsonl", "b.jsonl", "deep/c.jsonl", "d, e.jsonl"]):
        write(folder / name, VALUES[number : number + 1])
    write(tmp_path / "home.jsonl", VALUES[7:8])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(folder))
    paths = ["[ab].jsonl", "a.jsonl, deep", "**/*.jsonl", "d, e.jsonl", "~/home.jsonl", "$PLACE/b.jsonl"]
    (folder / "mix.yaml").write_text(json.dumps({"sources": paths, "names": list("uvwxyz")}))
    labels = [[row.value["label"] for row in one.stream()] for one in open_sources(config(folder / "mix.yaml"))]
    assert labels == [[0, 1], [0, 2], [0, 1, 3, 2], [3], [7], [1]]
    monkeypatch.chdir(tmp_path)
    (folder / "mix.yaml").write_text("sources: ['home.jsonl']")
    assert [one.name for one in open_sources(config(folder / "mix.yaml"))] == ["home"]
    (folder / "mix.yaml").write_text("sources: ['deep/x.jsonl']")
    with pytest.raises(ValueError, match=r"deep/x.jsonl does not exist; .*deep has c.jsonl"):
        open_sources(config(folder / "mix.yaml"))


def test_a_source_name_labels_data_and_picks_from_a_yaml_trained_on(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        write(tmp_path / f"{name}.jsonl", VALUES[number : number + 1])
    (tmp_path / "ab.yaml").write_text("sources: [a.jsonl, b.jsonl]")
    (tmp_path / "bc.yaml").write_text("sources: [b.jsonl, c.jsonl]")

    def names(train: str, evaluation: str, name: str) -> list[str]:
        settings = config(tmp_path / train, source_name=name)
        return [one.name for one in open_sources(settings, str(tmp_path / evaluation))]

    assert names("a.jsonl", "bc.yaml", "mine") == ["b", "c"]
    assert names("a.jsonl", "b.jsonl", "mine") == ["mine"]
    assert names("ab.yaml", "bc.yaml", "b") == ["b"]
    assert names("ab.yaml", "bc.yaml", "a") == ["b", "c"]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"_data_files": [3]}', '{"_data_files": "x", "splits": 1}', "{", "1"])
def test_files_named_as_those_of_save_to_disk(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a.jsonl", VALUES[:2])
    (tmp_path / "state.json").write_text(text)
    (tmp_path / "dataset_dict.json").write_text(text)
    assert [row.value for row in open_one(tmp_path).stream()] == VALUES[:2]


def test_what_a_folder_passes_over_and_what_is_named_twice_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", VALUES[:2])
    (tmp_path / "b.jsonl.bz2").write_bytes(b"x")
    with caplog.at_level("INFO", "tutti"):
        assert len(open_one(tmp_path)) == 2
        assert "no data files in" in caplog.text and "b.jsonl.bz2" in caplog.text
        assert len(open_one(f"{path},{tmp_path}/*.jsonl")) == 4
        assert "so that its rows come twice" in caplog.text


@pytest.mark.parametrize("line", ['{"data": [{"text": "x"}]}', '{"data": [1], "text": "a"}'])
def test_lines_with_a_column_called_data_are_rows(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"{line}\n{line}\n")
    assert [row.value for row in open_one(path).stream()] == [json.loads(line)] * 2
    compressed = tmp_path / "a.json.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row.value for row in open_one(compressed).stream()] == [json.loads(line)] * 2


def test_streaming_several_files_from_the_middle_unpacks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, values in [("a.jsonl.gz", VALUES[:9]), ("b.parquet", VALUES[9:20]), ("c.csv", VALUES[20:])]:
        write(tmp_path / name, values)
    monkeypatch.setenv("TUTTI_CACHE", "/dev/null/none")
    source = open_one(tmp_path)
    rows = list(source.stream())
    for start in (0, 5, 9, 15, 20, 33, 40, 50):
        assert list(source.stream(start)) == rows[start:]
    assert not any("_index" in vars(file) for file in source.files)


def test_own_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_rows.py").write_text(
        "def rows(path):\n    return [{'text': path, 'label': i} for i in range(3)]\n"
        "class Endless:\n    def __init__(self, path): pass\n"
        "    def __iter__(self):\n        return iter([{'text': 'x', 'label': 0}, 7])\n"
    )
    monkeypatch.chdir(tmp_path)
    source = open_one("anything", datasets_type="mine_rows:rows")
    assert source.mapping and len(source) == 3
    assert source.rows([2])[0].value == {"text": "anything", "label": 2}
    stream = open_one("anything", datasets_type="mine_rows:Endless")
    assert not stream.mapping
    assert [type(row) for row in stream.stream()] == [Row, BadRow]
    with pytest.raises(ValueError, match=r"data.datasets_type mine_rows:gone can't be loaded"):
        open_one("anything", datasets_type="mine_rows:gone")


def test_json_lines_cost_no_heavy_import(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    code = (
        "import sys; from tutti.config import Config, DataConfig; from tutti.data.source import open_sources\n"
        f"s, = open_sources(Config(data=DataConfig(train_path={str(path)!r}, data_type='classification')))\n"
        "s.rows([1]); print(sorted({'datasets', 'pyarrow', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
