"""Sources: named collections of rows with weights, in any kind of files.

`data.train_path` and `data.eval_path` name a file, a folder (all data files in it, sorted), a glob, a comma-separated
list of those, or a YAML that lists several sources with weights. `open_sources` turns a path into `Source`s. A source
is the concatenation of its files' rows: `rows(ids)` reads any of them, `stream(start)` all in order. Rows that cannot
be parsed are returned as `BadRow`; errors in the set-up (no such file, no rows, an unknown format) are raised here.
"""

from __future__ import annotations

import codecs
import glob
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from tutti.config import Config
from tutti.config.coerce import expand_path
from tutti.config.yamlfile import read_file
from tutti.data.formats import BadRow, Csv, DataFile, JsonArray, JsonLines, Row, Text, read_blocks, suffixes
from tutti.data.hub import repo_name
from tutti.data.tables import Arrow, Parquet
from tutti.data.tars import Tar
from tutti.data.user_dataset import UserDataset

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
    ".tar": Tar,
}
_COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

LocalCopies = Callable[[str, str], Sequence[str] | None]
"""Function of an argument and a part of its path that returns local copies of the remote files it names; None if it
names none."""


class Source:
    """A named stream of rows with its share in the mix.

    name: for logging its loss and token counts. mapping: it has a length and random access. weight: its share of the
    samples at step 0, relative to the other sources'; `weight_at(step)` for later steps. weighted: the user gave
    weights; otherwise every sample is used once a pass, whatever its source. own: it is a user's dataset.
    """

    def __init__(self, name: str, files: Sequence[DataFile], schedule: Sequence[tuple[int, float, bool]] = ()) -> None:
        self.name = name
        self.files = tuple(files)
        self.schedule = tuple(schedule)
        self.own = any(isinstance(file, UserDataset) for file in files)
        self.mapping = all(not isinstance(file, UserDataset) or file.mapping for file in files)

    @property
    def weighted(self) -> bool:
        return bool(self.schedule)

    @property
    def weight(self) -> float:
        return self.weight_at(0)

    def weight_at(self, step: int) -> float:
        """The weight at optimizer step `step` (from 0): that of the last entry begun, or interpolated to the next
        one."""
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
        """Rows by index, in the given order; IndexError outside of [0, len)."""
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
        """Read all rows from index `start` on, in order, holding only a few of them at a time."""
        for file in self.files:
            start -= yield from file.stream(start)


def text_columns(config: Config) -> tuple[str, ...]:
    """The possible text columns, in order of preference: data.text_keys, else the default for data.data_type."""
    keys = config.data.text_keys or config.data.task.columns
    return tuple(key.strip() for key in keys.split(",") if key.strip())


def open_sources(
    config: Config, path: str | None = None, *, elsewhere: LocalCopies = lambda argument, part: None
) -> list[Source]:
    """The sources that `path` (default: data.train_path) names. ValueError: says what is missing and what would work.

    data.source_name selects one source of a training YAML, and is the name of any other training data. elsewhere: finds
    the local copies of remote files.
    """
    key = "data.train_path" if path is None else "data.eval_path"
    path = config.data.train_path if path is None else path
    if not path:
        raise ValueError(f"{key} is not set: give a file, a folder, a comma list of those, or a multi-source YAML")
    if ":" in config.data.datasets_type:
        name = config.data.source_name or Path(path).stem
        return [Source(name, [UserDataset(config.data.datasets_type, path)])]
    if _is_yaml(path):
        return _from_yaml(config, key, Path(path), elsewhere)
    return [_source(config, key, config.data.source_name or _stem(path.split(",")[0]), path, elsewhere)]


def _is_yaml(path: str | None) -> bool:
    return path is not None and path.endswith((".yaml", ".yml"))


def _source(
    config: Config,
    key: str,
    name: str,
    path: str,
    elsewhere: LocalCopies,
    schedule: Sequence[tuple[int, float, bool]] = (),
    folder: str = "",
) -> Source:
    found = _files(key, path, folder, elsewhere)
    for file in sorted({file for file in found if found.count(file) > 1}):
        log.warning("%s: %s names %s twice, so that its rows come twice", key, path, file)
    source = Source(name, [_open_file(config, file) for file in found], schedule)
    if next(source.stream(), None) is None:
        raise ValueError(f"{key}: {path} holds no rows")
    return source


def _files(key: str, path: str, folder: str, elsewhere: LocalCopies) -> list[str]:
    """The data files for `path`, in order; its parts are relative to `folder` if they exist there."""
    found: list[str] = []
    whole = _matches(path, folder)
    for part in [path] if whole else [part.strip() for part in path.split(",") if part.strip()]:
        matches = _matches(part, folder)
        if not matches and (copies := elsewhere(key, part)) is not None:
            found += copies
            continue
        if not matches:
            raise ValueError(f"{key}: {part} does not exist{_nearest(part, folder)}")
        for match in [match for match in matches if os.path.isfile(match)] or matches:
            if os.path.isdir(match):
                found += _folder(key, match)
            elif os.path.getsize(match):
                found.append(match)
            elif len(matches) > 1:
                log.warning("%s is empty and passed over", match)
            else:
                raise ValueError(f"{key}: {match} is empty")
    return found


def _matches(path: str, folder: str) -> list[str]:
    """The file or folder of that name, or those that match it as a glob: within `folder`, or else as given."""
    for root in dict.fromkeys((folder, "")):
        if os.path.exists(os.path.join(root, path)):
            return [os.path.join(root, path)]
        if found := sorted(glob.glob(os.path.join(glob.escape(root), path), recursive=True)):
            return found
    return []


def _folder(key: str, folder: str) -> list[str]:
    splits = _field(Path(folder, "dataset_dict.json"), "splits")
    if splits:
        choices = " or ".join(os.path.join(folder, str(split)) for split in splits)
        raise ValueError(f"{key}: {folder} holds several splits; give {choices}")
    saved = _field(Path(folder, "state.json"), "_data_files")
    if saved and all(isinstance(file, dict) and isinstance(file.get("filename"), str) for file in saved):
        return [os.path.join(folder, file["filename"]) for file in saved]
    files, others = [], []
    for path in sorted(Path(folder).rglob("*")):
        if any(part[0] in "._" for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        if path.name in _NOT_DATA or not _format(path):
            others.append(path.name)
        elif path.stat().st_size:
            files.append(str(path))
        else:
            log.warning("%s is empty and passed over", path)
    if not files:
        raise ValueError(f"{key}: folder {folder} holds no data file ({_known()})")
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        log.info("%s: no data files in %s: %s%s", key, folder, ", ".join(others[:5]), more)
    return files


def _field(path: Path, name: str) -> list[Any]:
    """A list in a JSON file that `datasets.save_to_disk` writes; empty for any other file."""
    try:
        found = json.loads(path.read_bytes())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found if isinstance(found, list) else []


def _open_file(config: Config, path: str) -> DataFile:
    kind = _format(Path(path))
    if not kind:
        raise ValueError(f"{path} has no known format: {_known()}")
    if kind != ".txt":
        return _FORMATS[kind](path)
    if config.data.data_type != "plaintext":
        raise ValueError(f"{path} is plain text, which data.data_type plaintext reads, not {config.data.data_type}")
    return Text(path, text_columns(config)[0])


def is_data(path: PurePath) -> bool:
    """True if a path is named like a data file."""
    return bool(_format(path))


def _format(path: PurePath) -> str:
    """The extension that determines how `path` is read, without compression; empty if it is unknown."""
    *before, kind = suffixes(str(path)) or [""]
    if kind in (".gz", ".zst"):
        return before[-1] if before and before[-1] in _COMPRESSIBLE else ""
    return kind if kind in _FORMATS or kind == ".txt" else ""


def _known() -> str:
    return f"known are {', '.join([*_FORMATS, '.txt'])}, and {', '.join(_COMPRESSIBLE)} with .gz or .zst"


def _has_row_per_line(path: str) -> bool:
    """True if a .json file (possibly compressed) contains one object per line, as many do."""
    start = next(read_blocks(path), b"").removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        return False
    first, second = [*islice(JsonLines(path).stream(), 2), None, None][:2]
    holds_rows = isinstance(first, Row) and isinstance(first.value.get("data"), list)
    return isinstance(first, Row) and not (holds_rows and second is None)


def _nearest(path: str, folder: str) -> str:
    """A hint about files next to a path that does not exist."""
    if any(letter in path for letter in "*?["):
        return ": nothing matches"
    parent = Path(folder, path).parent
    if not parent.is_dir():
        return f" (neither does the folder {parent})"
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or _format(entry))[:8]
    return f"; {parent} has {', '.join(names)}" if names else ""


def _stem(path: str) -> str:
    path = path.strip().rstrip("/")
    name = Path(repo_name(path) or path).name
    return name.split(".")[0] or name


def _from_yaml(config: Config, key: str, path: Path, elsewhere: LocalCopies) -> list[Source]:
    """The sources in a YAML with `sources`, and optionally `names` and `weights` or `schedule`."""
    if not path.exists():
        raise ValueError(f"{key}: {path} does not exist{_nearest(str(path), '')}")
    spec, _ = read_file(str(path), expects="`sources`: a list of paths")
    paths = _texts(path, "sources", spec.get("sources"))
    if not paths:
        raise ValueError(f"{path} must have `sources`: a list of paths")
    if unknown := sorted(map(str, set(spec) - {"sources", "names", "weights", "schedule"})):
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; known are sources, names, weights, schedule")
    names = _texts(path, "names", spec.get("names")) or [_stem(source) for source in paths]
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise ValueError(f"{path}: `names` must be {len(paths)} different names, one a source, not {names}")
    schedules = _schedules(path, spec, len(paths))
    chosen = config.data.source_name
    if key == "data.eval_path" and (chosen not in names or not _is_yaml(config.data.train_path)):
        chosen = None
    if chosen and chosen not in names:
        raise ValueError(f"data.source_name {chosen} is none of the sources in {path}: {', '.join(names)}")
    return [
        _source(config, key, name, expand_path(source), elsewhere, schedule, str(path.parent))
        for name, source, schedule in zip(names, paths, schedules, strict=True)
        if chosen in (None, name)
    ]


def _texts(path: Path, name: str, values: Any) -> list[str]:
    """A list of texts in a YAML; numbers are accepted as texts."""
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise ValueError(f"{path}: `{name}` must be a list of texts, not {values!r}")
    return [str(value) for value in values]


def _schedules(path: Path, spec: dict[str, Any], count: int) -> list[list[tuple[int, float, bool]]]:
    """For each source, its entries (first step, weight, whether it is interpolated to the next one)."""
    if "weights" in spec and "schedule" in spec:
        raise ValueError(f"{path}: give `weights` or `schedule`, not both")
    if "weights" not in spec and "schedule" not in spec:
        return [[] for _ in range(count)]
    entries = spec.get("schedule", [{"weights": spec.get("weights")}])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: `schedule` must be a list such as [{{step: 0, weights: [...]}}], not {entries!r}")
    schedules: list[list[tuple[int, float, bool]]] = [[] for _ in range(count)]
    last = -1
    for entry in entries:
        if unknown := sorted(map(str, set(entry) - {"step", "weights", "schedule_type"})):
            raise ValueError(f"{path}: unknown {', '.join(unknown)} in `schedule`; known: step, weights, schedule_type")
        step, weights, kind = entry.get("step", 0), entry.get("weights"), entry.get("schedule_type", "const")
        if type(step) is not int or step <= last or (last < 0 and step):
            raise ValueError(
                f"{path}: the steps of `schedule` must be whole, start at 0 and increase; {step!r} does not"
            )
        if kind not in ("const", "linear"):
            raise ValueError(f"{path}: schedule_type is const or linear, not {kind}")
        numbers = isinstance(weights, list) and all(type(w) in (int, float) and 0 <= w < math.inf for w in weights)
        if not numbers or len(weights) != count or not sum(weights):
            raise ValueError(f"{path}: weights must be {count} numbers >= 0, not all 0, one a source, not {weights}")
        for schedule, weight in zip(schedules, weights, strict=True):
            schedule.append((step, float(weight), kind == "linear"))
        last = step
    return schedules
