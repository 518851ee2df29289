"""Sources: where rows come from, by name and weight, whatever files they lie in.

`data.train_path` and `data.eval_path` name a file, a folder (every data file in it, sorted), a glob, a comma list of
those, or a YAML that lists several sources with weights. `open_sources` turns a path into `Source`s. A source is the
concatenation of its files' rows: `rows(ids)` reads any of them, `stream(start)` all in order. Rows that can't be parsed
come back as `BadRow`; what is wrong with the set-up (no such file, nothing in it, an unknown format) is an error here.
"""

from __future__ import annotations

import glob
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tutti.config import Config
from tutti.data.formats import Arrow, BadRow, Csv, DataFile, JsonArray, JsonLines, Parquet, Row, Text

__all__ = ["BadRow", "Row", "Source", "open_sources", "text_columns"]

log = logging.getLogger(__name__)

_FORMATS: dict[str, Callable[[str], DataFile]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": lambda path: JsonLines(path) if _has_row_per_line(path) else JsonArray(path),
    ".csv": Csv,
    ".tsv": Csv,
    ".parquet": Parquet,
    ".arrow": Arrow,
}
_COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class Source:
    """A named stream of rows with its share in the mix.

    name: what its loss and token counts are logged under. mapping: whether it has a length and random access.
    weight: its share of the samples at step 0, relative to the other sources'; `weight_at(step)` for later steps.
    weighted: whether the user gave weights; without, every sample is due once a pass, whatever its source.
    """

    def __init__(self, name: str, files: Sequence[DataFile], schedule: Sequence[tuple[int, float, bool]] = ()) -> None:
        self.name = name
        self.files = tuple(files)
        self.schedule = tuple(schedule)
        self.mapping = all(not isinstance(file, _Custom) or file.mapping for file in files)

    @property
    def weighted(self) -> bool:
        return bool(self.schedule)

    @property
    def weight(self) -> float:
        return self.weight_at(0)

    def weight_at(self, step: int) -> float:
        """The weight at optimizer step `step`, from 0: that of the last entry begun, or on the line to the next."""
        if not self.schedule:
            return 1.0
        begun = max(i for i, (start, _, _) in enumerate(self.schedule) if start <= max(step, 0))
        start, weight, linear = self.schedule[begun]
        if not linear or begun + 1 == len(self.schedule):
            return weight
        end, target, _ = self.schedule[begun + 1]
        return weight + (target - weight) * (step - start) / (end - start)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(file) for file in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, ids: Sequence[int]) -> list[Row | BadRow]:
        """Rows by position, in the order asked for; IndexError outside [0, len)."""
        wanted = np.asarray(ids, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"source {self.name} has rows 0 to {len(self) - 1}")
        if len(self.files) == 1:
            return self.files[0].read(wanted.tolist())
        owner = np.searchsorted(self._ends, wanted, side="right")
        rows: list[Any] = [None] * len(wanted)
        for number in np.unique(owner):
            places = np.flatnonzero(owner == number)
            first = int(self._ends[number - 1]) if number else 0
            read = self.files[number].read((wanted[places] - first).tolist())
            for place, row in zip(places, read, strict=True):
                rows[place] = row
        return rows

    def stream(self, start: int = 0) -> Iterator[Row | BadRow]:
        """All rows from position `start` on, in order, holding only a few of them at a time."""
        for file in self.files:
            if start and len(self.files) > 1 and start >= len(file):
                start -= len(file)
                continue
            yield from file.stream(start)
            start = 0


class _Custom(DataFile):
    """The user's own dataset: anything with a length and items, or anything that can be iterated.

    Its items are rows like those of files, or samples that need no encoding: `ready.ReadyMade` tells them apart.
    """

    def __init__(self, name: str, path: str) -> None:
        super().__init__(path or name)
        self.name = name
        self.mapping = hasattr(self._dataset, "__getitem__") and hasattr(self._dataset, "__len__")

    @cached_property
    def _dataset(self) -> Any:
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

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, value: Any, line: int) -> Row | BadRow:
        return Row(value, self.path, line) if hasattr(value, "input_ids") else super().row(value, line)

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        return [self.row(self._dataset[i], i + 1) for i in ids]

    def stream(self, start: int = 0) -> Iterator[Row | BadRow]:
        for number, value in enumerate(self._dataset, 1):
            if number > start:
                yield self.row(value, number)


def text_columns(config: Config) -> tuple[str, ...]:
    """The columns that may hold a row's text, first choice first: data.text_keys, else what data.data_type implies."""
    keys = config.data.text_keys or config.data.task.columns
    return tuple(key.strip() for key in keys.split(",") if key.strip())


def open_sources(config: Config, path: str | None = None) -> list[Source]:
    """The sources that `path` (default: data.train_path) names; ValueError says what is missing and what would work."""
    key = "data.train_path" if path is None else "data.eval_path"
    path = config.data.train_path if path is None else path
    if not path:
        raise ValueError(f"{key} is not set: give a file, a folder, a comma list of those, or a multi-source YAML")
    name = config.data.source_name
    if ":" in config.data.datasets_type:
        return [Source(name or Path(path).stem, [_Custom(config.data.datasets_type, path)])]
    if Path(path).suffix in (".yaml", ".yml"):
        return _from_yaml(config, key, Path(path))
    return [_source(config, key, name or _stem(path.split(",")[0]), path)]


def _source(config: Config, key: str, name: str, path: str, schedule: Sequence[tuple[int, float, bool]] = ()) -> Source:
    files = [_open_file(config, file) for file in _files(key, path)]
    source = Source(name, files, schedule)
    if next(source.stream(), None) is None:
        raise ValueError(f"{key}: {path} holds no rows")
    return source


def _files(key: str, path: str) -> list[str]:
    """The data files that `path` stands for, in order."""
    found: list[str] = []
    for part in [path] if os.path.exists(path) else [part.strip() for part in path.split(",") if part.strip()]:
        if os.path.isdir(part):
            found += _folder(key, part)
        elif os.path.exists(part):
            if not os.path.getsize(part):
                raise ValueError(f"{key}: {part} is empty")
            found.append(part)
        else:
            matches = sorted(glob.glob(part, recursive=True))
            if not matches:
                raise ValueError(f"{key}: {part} does not exist{_nearest(part)}")
            found += [match for match in matches if os.path.isfile(match)]
    return found


def _folder(key: str, folder: str) -> list[str]:
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        splits = json.loads(Path(folder, "dataset_dict.json").read_text())["splits"]
        choices = " or ".join(os.path.join(folder, split) for split in splits)
        raise ValueError(f"{key}: {folder} holds several splits; give {choices}")
    state = Path(folder, "state.json")
    if state.exists():
        return [os.path.join(folder, file["filename"]) for file in json.loads(state.read_text())["_data_files"]]
    files = []
    for path in sorted(Path(folder).rglob("*")):
        hidden = any(part[0] in "._" for part in path.relative_to(folder).parts)
        if hidden or path.name in _NOT_DATA or not path.is_file() or not _format(path):
            continue
        if path.stat().st_size:
            files.append(str(path))
        else:
            log.warning("%s is empty and passed over", path)
    if not files:
        raise ValueError(f"{key}: folder {folder} holds no data file ({_known()})")
    return files


def _open_file(config: Config, path: str) -> DataFile:
    kind = _format(Path(path))
    if not kind:
        raise ValueError(f"{path} has no known format: {_known()}")
    if kind != ".txt":
        return _FORMATS[kind](path)
    if config.data.data_type != "plaintext":
        raise ValueError(f"{path} is plain text, which data.data_type plaintext reads, not {config.data.data_type}")
    return Text(path, text_columns(config)[0])


def _format(path: Path) -> str:
    """The extension that says how `path` is read, without compression; empty if it is none of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in _COMPRESSIBLE else ""
    return suffixes[-1] if suffixes and (suffixes[-1] in _FORMATS or suffixes[-1] == ".txt") else ""


def _known() -> str:
    return f"known are {', '.join([*_FORMATS, '.txt'])}, and {', '.join(_COMPRESSIBLE)} with .gz or .zst"


def _has_row_per_line(path: str) -> bool:
    """Whether a .json file holds an object a line, as many do."""
    with open(path, "rb") as file:
        if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return False
    first = next(JsonLines(path).stream(), None)
    return isinstance(first, Row) and not isinstance(first.value.get("data"), list)


def _nearest(path: str) -> str:
    """What is there instead of a path that is not."""
    parent = Path(path).parent
    if any(letter in path for letter in "*?["):
        return ": nothing matches"
    if not parent.is_dir():
        return f" (neither does the folder {parent})"
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or _format(entry))[:8]
    return f"; {parent} has {', '.join(names)}" if names else ""


def _stem(path: str) -> str:
    name = Path(path.strip().rstrip("/")).name
    return name.split(".")[0] or name


def _from_yaml(config: Config, key: str, path: Path) -> list[Source]:
    """The sources of a YAML with `sources`, and optionally `names` and `weights` or `schedule`."""
    import yaml

    if not path.exists():
        raise ValueError(f"{key}: {path} does not exist{_nearest(str(path))}")
    try:
        spec = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    paths = spec.get("sources") if isinstance(spec, dict) else None
    if not paths or not isinstance(paths, list):
        raise ValueError(f"{path} must have `sources`: a list of paths")
    if unknown := sorted(set(spec) - {"sources", "names", "weights", "schedule"}):
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; known are sources, names, weights, schedule")
    names = spec.get("names") or [_stem(str(source)) for source in paths]
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise ValueError(f"{path}: `names` must be {len(paths)} different names, one a source, not {names}")
    schedules = _schedules(path, spec, len(paths))
    chosen = config.data.source_name
    if chosen and chosen not in names:
        raise ValueError(f"data.source_name {chosen} is none of the sources in {path}: {', '.join(names)}")
    beside = [_beside(path, str(source)) for source in paths]
    return [
        _source(config, key, str(name), source, schedule)
        for name, source, schedule in zip(names, beside, schedules, strict=True)
        if chosen in (None, name)
    ]


def _beside(yaml_path: Path, source: str) -> str:
    """A source's path: relative to the YAML's folder where that exists, else to the working directory."""
    near = os.path.join(yaml_path.parent, source)
    return near if os.path.exists(near) else source


def _schedules(path: Path, spec: dict[str, Any], count: int) -> list[list[tuple[int, float, bool]]]:
    """Per source its (first step, weight, whether it moves on a line to the next weight)."""
    if "weights" in spec and "schedule" in spec:
        raise ValueError(f"{path}: give `weights` or `schedule`, not both")
    if "weights" not in spec and "schedule" not in spec:
        return [[] for _ in range(count)]
    entries = spec.get("schedule") or [{"weights": spec.get("weights")}]
    steps = [entry.get("step", 0) for entry in entries]
    if steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(f"{path}: the steps of `schedule` must start at 0 and increase, not {steps}")
    schedules: list[list[tuple[int, float, bool]]] = [[] for _ in range(count)]
    for step, entry in zip(steps, entries, strict=True):
        weights, kind = entry.get("weights"), entry.get("schedule_type", "const")
        if kind not in ("const", "linear"):
            raise ValueError(f"{path}: schedule_type is const or linear, not {kind}")
        numbers = isinstance(weights, list) and all(isinstance(w, int | float) and w >= 0 for w in weights)
        if not numbers or len(weights) != count or not sum(weights):
            raise ValueError(f"{path}: weights must be {count} numbers >= 0, not all 0, one a source, not {weights}")
        for schedule, weight in zip(schedules, weights, strict=True):
            schedule.append((step, float(weight), kind == "linear"))
    return schedules
