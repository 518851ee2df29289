"""Tar archives of samples: the same rows by random access and in order, and media inside the archive."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.processors import PROCESSORS
from tests.data.recordings import video
from tests.data.test_odd_media import encoder_of, picture
from tests.train.runs import tiny_config
from tutti.core.dist import World
from tutti.data.formats import BadRow
from tutti.data.index import encode_span
from tutti.data.loader import build_data
from tutti.data.tars import Tar

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
CHAT = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Yes."}]}


def write(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def values(path: Path) -> list[Any]:
    """The rows of an archive, checked to be equal by random access and in order, from any row."""
    file = pickle.loads(pickle.dumps(Tar(str(path))))
    rows = file.read(range(len(file)))
    assert list(Tar(str(path)).stream()) == rows and list(Tar(str(path)).stream(1)) == rows[1:]
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    return [row.reason if isinstance(row, BadRow) else row.value for row in rows]


def test_members_of_one_stem_are_a_row(tmp_path: Path) -> None:
    shot = {"bytes": b"one", "path": "a/0001.jpg"}
    found = values(write(tmp_path / "a.tar", {
        "a/0001.jpg": b"one", "a/0001.json": '{"caption": "x"}', "a/.hidden.json": "{}",
        "a/0002.left.png": b"two", "a/0002.right.png": b"three", "a/0002.txt": "a text",
        "b/0002.mp4": b"four", "b/0002.wav": b"five", "b/0003.json": "[1]", "b/0004.json": "{", "b/0005.txt": b"\xff",
    }))  # fmt: skip
    assert found[0] == {"caption": "x", "images": [shot]}
    assert [one["bytes"] for one in found[1]["images"]] == [b"two", b"three"] and found[1]["txt"] == "a text"
    assert found[2]["videos"][0]["bytes"] == b"four" and found[2]["audios"][0]["bytes"] == b"five"
    assert found[3] == "b/0003.json must hold an object, not list"
    assert found[4].startswith("b/0004.json is not valid JSON") and found[5].startswith("b/0005.txt is not text")


def test_a_column_may_name_the_members_of_its_row(tmp_path: Path) -> None:
    columns = {"images": ["1.b.png", "1.a.png"], "image": None}
    (found,) = values(write(tmp_path / "a.tar", {"1.a.png": b"a", "1.b.png": b"b", "1.json": json.dumps(columns)}))
    assert [one["bytes"] for one in found["images"]] == [b"b", b"a"]


def test_what_is_no_archive_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no archive" * 100)
    whole = write(tmp_path / "b.tar", {"1.txt": "x" * 5000, "2.txt": "y" * 5000}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:7000])
    for name in ("a.tar", "b.tar"):
        for use in (len, lambda file: list(file.stream())):
            with pytest.raises(ValueError, match=rf"{name} can't be read as a tar archive"):
                use(Tar(str(tmp_path / name)))


def test_an_index_holds_no_bytes_of_media(tmp_path: Path) -> None:
    class Rows:
        def rows(self, numbers: Any) -> Any:
            return Tar(str(tmp_path / "a.tar")).read(numbers)

    def chunk(size: tuple[int, int]) -> Any:
        write(tmp_path / "a.tar", {"1.json": json.dumps(CHAT), "1.png": picture(size=size)})
        return encode_span([Rows()], encoder_of("image"), (0, 0, 1))

    one, other = chunk((48, 40)), chunk((40, 48))
    assert [medium.source for found in one.media for medium in found] == [b""] and one.crc != other.crc


@pytest.mark.parametrize("streams", [False, True])
def test_archives_are_data(tmp_path: Path, streams: bool) -> None:
    members: dict[str, bytes | str] = {}
    for number in range(4):
        members |= {f"{number}.jpg": picture("JPEG"), f"{number}.txt": f"Picture {number}."}
    watched = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A video."}]}
    members |= {"4.json": json.dumps(CHAT), "4.png": picture(), "5.mp4": video(), "5.json": json.dumps(watched)}
    write(tmp_path / "shard-000.tar", members)
    processor = PROCESSORS["qwen2_5_vl"]()
    options = {"data.datasets_type": "iterable", "data.train_sample": 6} if streams else {}
    config = tiny_config(tmp_path, **{
        "data.train_path": str(tmp_path / "shard-000.tar"), "data.shuffle": False, "data.max_seq_len": 512,
        "data.row_template": {"user": "<image>What is this?", "assistant": "{txt}"}, "train.dyn_bsz": False,
        "train.global_batch_size": 2, **options,
    })  # fmt: skip
    data = build_data(config, processor.tokenizer, world=ALONE, dp_rank=0, dp_size=1, vocab_size=4096,
                      processor=processor)  # fmt: skip
    found = [micro.extras for step in data.train() for micro in step.micro_batches]
    assert [sorted(key for key in extras if key.endswith("thw")) for extras in found] == [
        ["image_grid_thw"], ["image_grid_thw"], ["image_grid_thw", "video_grid_thw"],
    ]  # fmt: skip
