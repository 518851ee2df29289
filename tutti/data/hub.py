"""Datasets of the Hugging Face hub by name: finding the files of a split.

`org/name:split` is a split of a dataset, `org/name` its split train, `org/name:subset/split` a split of a subset, and
`org/name@revision:split` one at a branch, tag or commit. The files are downloaded and read by our own readers. Which
files a split has is defined in the front matter of the repository's README (`configs`), or else by file names,
according to the hub's documented rules: `data/SPLIT-00000-of-00004.parquet`; folders, and then files, with train,
validation or test in their names; otherwise all files are train. `hf://datasets/org/name/path` names files, folders or
globs.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from tutti.config.nouns import counted
from tutti.core.hub import NAME, HubFiles, Repo, repo_named

log = logging.getLogger(__name__)

IsData = Callable[[PurePosixPath], bool]
"""A function that tells whether a path is named like a data file."""

Splits = dict[str, dict[str, list[str]]]
"""Files by subset and split."""

_SPLIT = re.compile(NAME + r"(?::(?P<split>[^:]+))?")
_PATH = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?")
_SHARDED = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\b")
_KEYWORDS = {
    "train": re.compile(r"(?<![a-zA-Z])(train|training)(?![a-zA-Z])"),
    "validation": re.compile(r"(?<![a-zA-Z])(validation|valid|dev|val)(?![a-zA-Z])"),
    "test": re.compile(r"(?<![a-zA-Z])(test|testing|eval|evaluation)(?![a-zA-Z])"),
}
_NO_ROWS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def repo_name(text: str) -> str | None:
    """The `org/name` in a split's name; None if the text has another form."""
    match = _SPLIT.fullmatch(text)
    return None if match is None else match["name"]


def pin_split(argument: str, name: str, is_data: IsData) -> HubFiles | None:
    """The downloaded files of the split `name`, from `argument`; None if it names no dataset.

    ValueError: the dataset does not exist, or has no such split.
    """
    match = _SPLIT.fullmatch(name)
    if match is None or os.path.exists(name):
        return None
    split = match["split"]
    repo = repo_named("dataset", name.removesuffix(f":{split}"), argument)
    if repo is None:
        return None
    commit = repo.commit()
    there = repo.files(commit)
    readme = repo.folder(commit) / "README.md"
    try:
        splits = find_splits(there, readme.read_text(encoding="utf-8") if readme.is_file() else "", is_data)
    except ValueError as error:
        raise ValueError(f"{argument}: {repo}: {error}") from error
    default = "train" if argument == "data.train_path" else None
    return _downloaded(repo, commit, _choose(f"{argument}: {repo}", splits, split, default))


def pin_path(argument: str, url: str, is_data: IsData) -> HubFiles:
    """The downloaded data files of a URL hf://datasets/org/name[@revision]/path. ValueError: there are none."""
    match = _PATH.fullmatch(url)
    if match is None:
        raise ValueError(f"{argument}: {url}: of the hub, files of data sets are read: hf://datasets/org/name/path")
    repo = Repo("dataset", match["name"], match["revision"] or "main", argument)
    commit, path = repo.commit(), (match["path"] or "").strip("/")
    there = repo.files(commit)
    patterns = [path, f"{path}/**"] if path else ["**"]
    files = [path] if path in there else [file for file in _matching(there, patterns) if is_rows(file, is_data)]
    if not files:
        raise ValueError(f"{argument}: {repo} has no data file {path}; it has {', '.join(list(there)[:8])}")
    return _downloaded(repo, commit, files)


def _downloaded(repo: Repo, commit: str, files: Sequence[str]) -> HubFiles:
    if gap := _missing_shard(files):
        raise ValueError(f"{repo.argument}: {repo} has {files[0]}, but {gap} is missing; download it again")
    found = HubFiles(repo, commit, tuple(files))
    found.local(download=True)
    log.info("%s: %s is commit %s, %s", repo.argument, repo.name, commit, counted(len(files), "file"))
    return found


def find_splits(paths: Iterable[str], readme: str, is_data: IsData) -> Splits:
    """The subsets of a dataset and their splits, the default subset first. readme: the text of its README.md.

    ValueError: the README's front matter cannot be read.
    """
    files = [path for path in paths if is_rows(path, is_data)]
    subsets: Splits = {}
    for entry in _front_matter(readme).get("configs") or ():
        if isinstance(entry, dict) and "data_files" in entry:
            base = str(entry.get("data_dir") or "")
            splits = {
                split: _matching(files, [str(PurePosixPath(base, str(pattern))) for pattern in patterns])
                for split, patterns in _patterns(entry["data_files"]).items()
            }
            name = str(entry.get("config_name", "default"))
            first = name == "default" or bool(entry.get("default"))
            subsets = {name: splits, **subsets} if first else {**subsets, name: splits}
    return subsets or {"default": _by_names(_of_one_kind(files))}


def is_rows(path: str, is_data: IsData) -> bool:
    """True if a file is a data file, and neither hidden nor metadata."""
    parts = PurePosixPath(path).parts
    hidden = any(part.startswith((".", "__")) for part in parts)
    return not hidden and parts[-1] not in _NO_ROWS and is_data(PurePosixPath(path))


def _by_names(files: list[str]) -> dict[str, list[str]]:
    """Splits according to file names."""
    sharded = [(match[1], path) for path in files if (match := _SHARDED.fullmatch(path))]
    in_folders = [(split, path) for split, word in _KEYWORDS.items() for path in files
                  if word.search(str(PurePosixPath(path).parent))]  # fmt: skip
    in_names = [(split, path) for split, word in _KEYWORDS.items() for path in files
                if word.search(PurePosixPath(path).name)]  # fmt: skip
    splits: dict[str, list[str]] = {}
    for split, path in sharded or in_folders or in_names or [("train", path) for path in files]:
        splits.setdefault(split, []).append(path)
    return splits


def _of_one_kind(files: list[str]) -> list[str]:
    """The files of the most common format, since there are often notes in another one."""
    kinds = Counter(PurePosixPath(path).suffixes[0] for path in files)
    if not kinds:
        return []
    commonest = max(kinds, key=lambda kind: (kind != ".txt", kinds[kind]))
    return [path for path in files if PurePosixPath(path).suffixes[0] == commonest]


def _choose(where: str, subsets: Splits, wanted: str | None, default: str | None) -> list[str]:
    """The files of the wanted split, or of `default`; the ValueError lists the existing ones."""
    subset, split = next(iter(subsets)), wanted
    if wanted and "/" in wanted:
        subset, _, split = wanted.partition("/")
    elif wanted in subsets and wanted not in subsets[subset]:
        subset, split = wanted, None
    splits = subsets.get(subset, {})
    if split is None:
        split = default if default in splits else next(iter(splits)) if len(splits) == 1 else None
    if files := splits.get(split or ""):
        return files
    names = [f"{name}/{split}" if len(subsets) > 1 else split for name, splits in subsets.items() for split in splits]
    if not names:
        raise ValueError(f"{where} has no file of rows")
    if wanted is None:
        raise ValueError(f"{where}: name one of its splits, as in :{names[0]}; it has {', '.join(names)}")
    if split in splits:
        raise ValueError(f"{where}: its README names files of the split {wanted} that are not there")
    raise ValueError(f"{where} has no split {wanted}; it has {', '.join(names)}")


def _front_matter(readme: str) -> dict[str, Any]:
    """The YAML between the README's first two lines of dashes."""
    import yaml

    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"README.md of the data set: {str(error).splitlines()[0]}") from error
    return found if isinstance(found, dict) else {}


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """File patterns by split, from any of the forms that a README may use."""
    if isinstance(data_files, dict):
        return {str(split): _listed(patterns) for split, patterns in data_files.items()}
    entries = _listed(data_files)
    named = [entry for entry in entries if isinstance(entry, dict)]
    if named:
        return {str(entry.get("split")): _listed(entry.get("path")) for entry in named}
    return {"train": entries}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matching(files: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The files that match any of the glob patterns, in order."""
    from fsspec.utils import glob_translate

    whole = [re.compile(glob_translate(pattern)) for pattern in patterns]
    return [file for file in files if any(pattern.match(file) for pattern in whole)]


def _missing_shard(files: Sequence[str]) -> str | None:
    """The first file that is missing according to the numbers in the others' names (-00001-of-00004)."""
    there = set(files)
    for file in files:
        match = _SHARD.search(file)
        for number in range(int(match[2]) if match else 0):
            assert match is not None
            other = f"{file[: match.start()]}-{number:05d}-of-{match[2]}{file[match.end() :]}"
            if other not in there:
                return other
    return None
