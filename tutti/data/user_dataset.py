"""Users' datasets (data.datasets_type: module:factory), as if they were data files.

The factory is called with the path and returns something with a length and items, or an iterable. Many iterable
datasets split themselves over the workers of a loader. Here all rows are needed, since what a rank and a worker get is
decided later, from all samples. So they are iterated only in the training process, never in a worker (see stream.py).
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch.utils.data import IterableDataset

from tutti.data.formats import BadRow, DataFile, Row, Rows

_TRIES = 100
"""After this many consecutive errors, an iterator is considered broken."""


class UserDataset(DataFile):
    """The dataset that the factory `name` makes of `path`. mapping: it has a length and random access.

    Its items are rows like those of files, or finished samples: `PreEncoded` distinguishes them.
    """

    def __init__(self, name: str, path: str) -> None:
        super().__init__(path or name)
        self.name = name
        dataset = self._dataset
        if isinstance(dataset, dict):
            raise ValueError(f"{name} returns a dict ({', '.join(map(str, dataset))}): let it return one dataset of it")
        has_items = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
        self.mapping = has_items and hasattr(dataset, "__len__")
        if not self.mapping and not hasattr(dataset, "__iter__"):
            raise ValueError(f"{name} returns a {type(dataset).__name__}, which has neither items nor can be iterated")

    def _make(self) -> Any:
        module, _, function = self.name.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            factory = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"data.datasets_type {self.name} can't be loaded ({error}): give mapping, iterable, or package.module:"
                "function, a function of the path that returns a dataset of rows"
            ) from None
        return factory(self.path)

    @cached_property
    def _dataset(self) -> Any:
        return self._make()

    @cached_property
    def _from_arrow(self) -> bool:
        """True for a Hugging Face dataset: its rows are from Arrow tables, in which all rows have all keys."""
        return type(self._dataset).__module__.partition(".")[0] == "datasets"

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, value: Any, line: int) -> Row | BadRow:
        if hasattr(value, "input_ids"):
            return Row(value, self.path, line)
        return super().row(_without_nulls(value) if self._from_arrow else value, line)

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        return [self._item(i) for i in ids]

    def _item(self, number: int) -> Row | BadRow:
        try:
            return self.row(self._dataset[number], number + 1)
        except Exception as error:  # the user's code may raise anything
            return BadRow(self.path, number + 1, _raised(error))

    def stream(self, start: int = 0) -> Rows:
        items = self._iterate()
        number = raised = 0
        while True:
            value = bad = None
            try:
                value = next(items)
                raised = 0
            except StopIteration:
                return min(start, number)
            except Exception as error:  # the user's code may raise anything
                bad = BadRow(self.path, number + 1, _raised(error))
                raised += 1
                if inspect.isgenerator(items) or raised == _TRIES:
                    raise ValueError(
                        f"{bad}, and can't go on: handle the error in it, or return a dataset with a length and items"
                    ) from error
            number += 1
            if number > start:
                yield bad or self.row(value, number)

    def _iterate(self) -> Iterator[Any]:
        """All items. An iterator supports only one pass, so the factory makes another for each."""
        items = iter(self._dataset)
        return iter(self._make()) if items is self._dataset else items


def _raised(error: Exception) -> str:
    return f"the dataset raised {type(error).__name__}: {error}"


def _without_nulls(value: Any) -> Any:
    """The value without null entries of dicts, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
