"""User-defined datasets: each row once for any workers, ranks and epochs; items that raise count as bad rows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import IterableDataset, get_worker_info

from tests.data.fakes import ALONE, build, configure, encode, fake_encoder, ids, record
from tutti.data import index, loader
from tutti.data.formats import BadRow, Row
from tutti.data.user_dataset import UserDataset

__all__ = ["fake_encoder"]  # a fixture that every test here uses


def rows(count: int) -> list[dict[str, int]]:
    return [{"id": number, "n": 2 + number % 5} for number in range(count)]


def hub_stream(path: str) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows(int(path))).to_iterable_dataset(num_shards=4)


class SharesItself(IterableDataset):
    """Gives each worker of a loader a part, as torch's documentation recommends; its length counts all rows."""

    def __init__(self, path: str) -> None:
        self.rows = rows(int(path))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return iter(self.rows if worker is None else self.rows[worker.id :: worker.num_workers])


def generator(path: str) -> Iterator[Any]:
    yield from rows(int(path))


def iterator(path: str) -> Iterator[Any]:
    return iter(rows(int(path)))


@pytest.mark.parametrize("factory", ["hub_stream", "SharesItself", "generator", "iterator"])
def test_a_stream_gives_each_row_once_whatever_the_workers_ranks_and_epochs(factory: str) -> None:
    data = {"datasets_type": f"{__name__}:{factory}", "train_sample": 200, "shuffle_buffer_size": 30}
    expected = None
    for workers in (0, 1, 3):
        config = configure("200", data=data | {"num_workers": workers}, micro_batch_size=2, global_batch_size=8)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_train_epochs=2))
        batches = list(build(config).train())
        for epoch in (0, 1):
            assert Counter(ids(one for one in batches if one.epoch == epoch)) == Counter(range(200))
        given = record(batches)
        assert expected in (None, given)
        expected = given
    parts = [record(build(config, rank, 2).train()) for rank in range(2)]
    for step, (*same, micro_batches) in enumerate(expected or ()):
        assert all(list(part[step][:4]) == same for part in parts)
        assert sorted(parts[0][step][4] + parts[1][step][4]) == sorted(micro_batches)


@pytest.mark.parametrize("factory", ["hub_stream", "generator"])
def test_a_stream_resumes(factory: str) -> None:
    data = {"datasets_type": f"{__name__}:{factory}", "train_sample": 150, "num_workers": 2}
    config = configure("100", data=data, micro_batch_size=5)
    running = build(config)
    batches = running.train()
    for _ in range(7):
        next(batches)
    state, rest = running.state_dict(), record(batches)
    resumed = build(config)
    resumed.load_state_dict(state)
    assert record(resumed.train()) == rest


class Raises:
    """Items of which every tenth raises."""

    def __init__(self, path: str) -> None:
        self.rows = rows(int(path))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        if number % 10 == 7:
            raise OSError("no such picture")
        return self.rows[number]


class RaisesInOrder:
    """An iterator of which every tenth item raises, and which goes on after that."""

    def __init__(self, path: str) -> None:
        self.items, self.next = Raises(path), 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.next == len(self.items):
            raise StopIteration
        self.next += 1
        return self.items[self.next - 1]


@pytest.mark.parametrize("factory", ["Raises", "RaisesInOrder"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_raises_is_a_bad_row(factory: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "KEEP_TOKENS", 0)
    data = {"datasets_type": f"{__name__}:{factory}", "train_sample": 90, "num_workers": workers}
    with pytest.raises(ValueError, match=r"100, line 8: the dataset raised OSError: no such picture.*silent_exception"):
        list(build(configure("100", data=data)).train())
    built = build(configure("100", data=data | {"silent_exception": True}))
    assert sorted(ids(built.train())) == [number for number in range(100) if number % 10 != 7]
    assert built.report.dropped == {"the dataset raised OSError: no such picture": 10}
    assert built.report.rows == 100


def broken_generator(path: str) -> Iterator[Any]:
    yield {"id": 1, "n": 3}
    raise KeyError("gone")


class NeverGoesOn:
    def __init__(self, path: str) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise KeyError("gone")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("broken_generator", r"x:2: the dataset raised KeyError: 'gone', and can't go on: handle the error in it"),
        ("NeverGoesOn", r"x:100: the dataset raised KeyError: 'gone', and can't go on"),
    ],
)
def test_a_stream_that_cannot_go_on_is_an_error_even_if_bad_rows_are_skipped(factory: str, message: str) -> None:
    data = {"datasets_type": f"{__name__}:{factory}", "silent_exception": True}
    with pytest.raises(ValueError, match=message):
        list(build(configure("x", data=data)).train())


def splits(path: str) -> Any:
    return {"train": [], "test": []}


def number(path: str) -> Any:
    return 7


def test_what_is_no_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"splits returns a dict \(train, test\): let it return one dataset of it"):
        UserDataset(f"{__name__}:splits", "x")
    with pytest.raises(ValueError, match=r"number returns a int, which has neither items nor can be iterated"):
        UserDataset(f"{__name__}:number", "x")


CALLS = [{"calls": [{"arguments": {"to": "me"}}], "list": []}, {"calls": [{"arguments": {"n": 3}}], "list": [None, 1]}]


def calls(path: str) -> Any:
    import datasets

    found = datasets.Dataset.from_list(CALLS)
    return found if path == "map" else found.to_iterable_dataset()


def test_nulls_of_a_hugging_face_dataset_are_left_out() -> None:
    assert [row.value for row in UserDataset(f"{__name__}:calls", "map").read([0, 1])] == CALLS
    assert [row.value for row in UserDataset(f"{__name__}:calls", "stream").stream()] == CALLS


def with_null(path: str) -> Any:
    return [{"text": None}, 3]


def test_nulls_of_other_datasets_stay() -> None:
    first, second = UserDataset(f"{__name__}:with_null", "x").read([0, 1])
    assert isinstance(first, Row) and first.value == {"text": None}
    assert isinstance(second, BadRow)


@pytest.mark.parametrize("factory", ["generator", "rows_of"])
def test_other_rows_on_other_ranks_are_refused(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = dataclasses.replace(ALONE, size=2)
    monkeypatch.setattr(type(world), "run_on_all_ranks", lambda self, action: action())
    monkeypatch.setattr(type(world), "gather", lambda self, value: [value, [(0, 0)]])
    config = configure("20", data={"datasets_type": f"{__name__}:{factory}"})
    with pytest.raises(ValueError, match=f"{factory} gives other rows on other ranks"):
        loader._require_same_rows(config, loader.open_sources(config), encode, world)


def rows_of(path: str) -> Any:
    return rows(int(path))
