"""Files that several processes need: one of them creates the file, and no lock files are left behind."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tutti.core.files import make_once


def test_one_of_many_makes_the_file_and_no_lock_is_left(tmp_path):
    """Locks belong to open files, not to processes, so threads compete for them as processes do."""
    made: list[str] = []

    def write(draft: str) -> None:
        made.append(draft)
        Path(draft).write_text("whole")

    def want(path: Path) -> str:
        make_once(path, write)
        return path.read_text()

    paths = [tmp_path / str(number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(want, itertools.chain.from_iterable(zip(*[paths] * 8, strict=True)))) == {"whole"}
    assert sorted(made) == sorted(f"{path}.part" for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_the_next_one_tries_when_the_first_has_failed(tmp_path):
    tries = itertools.count(1)

    def write(draft: str) -> None:
        if next(tries) == 1:
            raise OSError("no space")
        Path(draft).write_text("whole")

    with pytest.raises(OSError, match="no space"):
        make_once(tmp_path / "file", write)
    make_once(tmp_path / "file", write)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
