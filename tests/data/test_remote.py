"""Remote data: splits of datasets on a local hub server, and files behind URLs in fsspec's memory file system."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.hub import HubServer, use_hub
from tests.infer.models import ONE
from tutti.config import Config
from tutti.config.load import from_dict
from tutti.data.hub import find_splits
from tutti.data.remote import fetch_data
from tutti.data.source import is_data, open_sources


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / "cache"))
    system = MemoryFileSystem()
    yield system
    system.rm("/", recursive=True)


def rows(*numbers: int) -> bytes:
    return "".join(json.dumps({"messages": [{"role": "user", "content": str(n)}]}) + "\n" for n in numbers).encode()


def config_of(train_path: str, **data: Any) -> Config:
    return from_dict({"data": {"train_path": train_path, **data}})


def read(train_path: str, **data: Any) -> dict[str, list[int]]:
    """The numbers in the rows of data.train_path, by source."""
    config = config_of(train_path, **data)
    sources = open_sources(config, elsewhere=fetch_data(config, ONE))
    return {
        source.name: [int(row.value["messages"][0]["content"]) for row in source.stream()]  # type: ignore[union-attr]
        for source in sources
    }


SHARDS = {"data/train-00000-of-00002.jsonl": rows(1), "data/train-00001-of-00002.jsonl": rows(2),
          "data/test-00000-of-00001.jsonl": rows(3), "notes.txt": b"notes"}  # fmt: skip


def test_a_split_by_name(hub: HubServer) -> None:
    hub.add("datasets/org/chats", SHARDS)
    assert read("org/chats") == {"chats": [1, 2]}
    assert hub.downloads() == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert read("org/chats:test") == {"chats": [3]}
    hub.add("datasets/org/chats", {"train.jsonl": rows(7)}, revision="v2")
    assert read("org/chats@v2:train") == {"chats": [7]}


def test_a_split_that_is_not_there(hub: HubServer) -> None:
    hub.add("datasets/org/chats", SHARDS)
    with pytest.raises(ValueError, match=r"^data.train_path: org/chats has no split dev; it has train, test$"):
        read("org/chats:dev")
    config = config_of("org/chats", eval_path="org/chats")
    with pytest.raises(ValueError, match=r"^data.eval_path: org/chats: name one of its splits, as in :train; it has"):
        fetch_data(config, ONE)
    hub.add("datasets/org/empty", {"a.bin": b"1"})
    with pytest.raises(ValueError, match=r"^data.train_path: org/empty has no file of rows$"):
        read("org/empty")
    with pytest.raises(ValueError, match=r"^data.train_path: org/none is not there, and .* shows no dataset"):
        read("org/none")


def test_offline_what_was_downloaded_is_read(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("datasets/org/chats", SHARDS)
    read("org/chats")
    use_hub(monkeypatch, hub.endpoint, tmp_path / "home", offline=True)
    hub.requests.clear()
    assert read("org/chats") == {"chats": [1, 2]}
    with pytest.raises(ValueError, match=r"^data.train_path: org/chats is not there, nor all .* HF_HUB_OFFLINE is set"):
        read("org/chats:test")
    assert not hub.requests


def test_a_cache_that_says_not_what_there_is_must_have_every_shard(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old versions of huggingface_hub did not cache a repository's file list."""
    commit = hub.add("datasets/org/chats", SHARDS)
    read("org/chats")
    folder = tmp_path / "home" / "hub" / "datasets--org--chats"
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    (folder / "trees" / f"{commit}.json").unlink()
    use_hub(monkeypatch, hub.endpoint, tmp_path / "home", offline=True)
    assert read("org/chats") == {"chats": [1, 2]}
    (folder / "snapshots" / commit / "data" / "train-00001-of-00002.jsonl").unlink()
    with pytest.raises(ValueError, match=r"org/chats has data/train-00000.*, but data/train-00001-of-00002.jsonl is"):
        read("org/chats")


def test_names_in_a_list_and_in_a_yaml_of_sources(hub: HubServer, tmp_path: Path) -> None:
    hub.add("datasets/org/one", {"train.jsonl": rows(1)})
    hub.add("datasets/org/two", {"train.jsonl": rows(2)})
    (tmp_path / "here.jsonl").write_bytes(rows(3))
    assert read(f"org/one,{tmp_path}/here.jsonl, org/two") == {"one": [1, 3, 2]}
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("sources: [org/one, here.jsonl, 'org/two:train']\nweights: [1, 1, 1]\n")
    assert read(str(mixture)) == {"one": [1], "here": [3], "two": [2]}
    hub.requests.clear()
    assert read(str(mixture), source_name="here") == {"here": [3]}
    assert not hub.requests


def test_a_folder_of_that_name_wins(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("datasets/org/chats", SHARDS)
    (tmp_path / "org" / "chats").mkdir(parents=True)
    (tmp_path / "org" / "chats" / "rows.jsonl").write_bytes(rows(9))
    monkeypatch.chdir(tmp_path)
    assert read("org/chats") == {"chats": [9]}
    assert not hub.requests


def test_files_on_the_hub_by_path(hub: HubServer) -> None:
    hub.add("datasets/org/chats", SHARDS | {"more/a.jsonl": rows(4), "more/b.jsonl": rows(5)})
    assert read("hf://datasets/org/chats/data/test-00000-of-00001.jsonl") == {"test-00000-of-00001": [3]}
    assert list(read("hf://datasets/org/chats/more").values()) == [[4, 5]]
    assert list(read("hf://datasets/org/chats@main/data/train-*.jsonl").values()) == [[1, 2]]
    with pytest.raises(ValueError, match=r"^data.train_path: org/chats has no data file none.jsonl; it has data/"):
        read("hf://datasets/org/chats/none.jsonl")
    with pytest.raises(ValueError, match=r"^data.train_path: hf://org/model: of the hub, files of data sets are read"):
        read("hf://org/model")


README = """---
configs:
- config_name: small
  data_files: [{split: train, path: "small/*.jsonl"}, {split: held_out, path: [b.jsonl]}]
- config_name: main
  default: true
  data_dir: big
  data_files: {train: "**", test: gone.jsonl}
- config_name: flat
  data_files: b.jsonl
---
# A data set
"""


def test_splits_as_the_readme_says(hub: HubServer) -> None:
    names = {"small/1.jsonl": rows(1), "small/2.jsonl": rows(2), "b.jsonl": rows(3), "big/x/4.jsonl": rows(4)}
    hub.add("datasets/org/chats", names | {"README.md": README.encode(), "other.jsonl": rows(5)})
    assert read("org/chats") == {"chats": [4]}
    assert read("org/chats:small/train") == {"chats": [1, 2]}
    assert read("org/chats:small/held_out") == {"chats": [3]}
    assert read("org/chats:flat") == {"chats": [3]}
    with pytest.raises(ValueError, match=r"it has main/train, main/test, small/train, small/held_out, flat/train$"):
        read("org/chats:none")
    with pytest.raises(ValueError, match="its README names files of the split test that are not there"):
        read("org/chats:test")
    hub.add("datasets/org/bad", {"README.md": b"---\na: [\n---\n", "train.jsonl": rows(1)})
    with pytest.raises(ValueError, match=r"^data.train_path: org/bad: README.md of the data set: "):
        read("org/bad")


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (["data/train-00000-of-00001.parquet", "data/extra-00000-of-00001.parquet"],
         {"train": ["data/train-00000-of-00001.parquet"], "extra": ["data/extra-00000-of-00001.parquet"]}),
        (["train/a.jsonl", "dev/a.jsonl", "other.jsonl"], {"train": ["train/a.jsonl"], "validation": ["dev/a.jsonl"]}),
        (["my_train_file.csv", "eval.csv"], {"train": ["my_train_file.csv"], "test": ["eval.csv"]}),
        (["trainer.jsonl", "contest.jsonl"], {"train": ["trainer.jsonl", "contest.jsonl"]}),
        (["rows.jsonl", "LICENSE.txt", "other.txt", ".hidden/train.jsonl", "dataset_infos.json"],
         {"train": ["rows.jsonl"]}),
        (["a.jsonl.gz", "b.jsonl.gz", "c.csv"], {"train": ["a.jsonl.gz", "b.jsonl.gz"]}),
        ([], {}),
    ],
    ids=["shards", "folders", "names", "parts of words", "notes", "two formats", "none"],
)  # fmt: skip
def test_splits_as_the_files_names_say(paths: list[str], splits: dict[str, list[str]]) -> None:
    assert find_splits(paths, "", is_data) == {"default": splits}


def test_a_url_is_copied_once(memory: MemoryFileSystem, tmp_path: Path) -> None:
    memory.pipe("/rows/a.jsonl", rows(1))
    memory.pipe("/rows/deep/b.jsonl", rows(2))
    memory.pipe("/rows/notes.md", b"notes")
    assert read("memory://rows/a.jsonl") == {"a": [1]}
    assert list(read("memory://rows").values()) == [[1, 2]]
    assert list(read("memory://rows/*.jsonl").values()) == [[1]]
    copies = [path for path in (tmp_path / "cache").rglob("*.jsonl")]
    assert sorted(path.name for path in copies) == ["a.jsonl", "b.jsonl"]
    memory.pipe("/rows/a.jsonl", rows(8))
    assert read("memory://rows/a.jsonl") == {"a": [8]}, "another version is another file"


def test_a_download_that_breaks_off_leaves_nothing(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/rows.jsonl", rows(1))

    def break_off(self: Any, remote: str, local: str, **_: Any) -> None:
        Path(local).write_bytes(b"{")
        raise TimeoutError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", break_off)
        with pytest.raises(ValueError, match=r"^data.train_path: memory:///rows.jsonl cannot be read: TimeoutError no"):
            read("memory://rows.jsonl")
    assert not list((tmp_path / "cache").rglob("rows.jsonl"))
    assert read("memory://rows.jsonl") == {"rows": [1]}


def test_what_is_wrong_with_a_url(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^data.train_path: memory://none.jsonl does not exist$"):
        read("memory://none.jsonl")
    with pytest.raises(ValueError, match=r"^data.train_path: memory://none/\*.jsonl holds no data file$"):
        read("memory://none/*.jsonl")
    with pytest.raises(ValueError, match=r"^data.train_path: nosuch://a.jsonl cannot be read: ValueError Protocol not"):
        read("nosuch://a.jsonl")
    real = builtins.__import__

    def without_s3fs(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "s3fs":
            raise ImportError("No module named 's3fs'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_s3fs)
    with pytest.raises(ValueError, match=r"^data.train_path: to read s3:// install the package s3fs \(pip"):
        read("s3://bucket/a.jsonl")


def test_is_data() -> None:
    assert is_data(PurePosixPath("a/b.jsonl.zst"))
    assert not is_data(PurePosixPath("README.md"))
