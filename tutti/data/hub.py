"""Data sets of the Hugging Face hub by name: which files a split has.

`org/name:split` is a split of a data set, `org/name` its split train, `org/name:subset/split` a split of one of its
subsets, and `org/name@revision:split` one at a branch, tag or commit. The files are downloaded as they are and read by
our own readers. Which files a split has, the repository's README says in its front matter (`configs`), or else their
names do, by the rules that the hub documents: `data/SPLIT-00000-of-00004.parquet`; folders, and then files, with train,
validation or test in their names; else all files are train. `hf://datasets/org/name/path` names files, folders or
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

from tutti.core.hub import NAME, HubFiles, Repo, repo_named

log = logging.getLogger(__name__)

IsData = Callable[[PurePosixPath], bool]
"""True if a path has the name of a file of rows."""

Splits = dict[str, dict[str, list[str]]]
"""By subset and split: the files."""

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
    """The `org/name` in a text of the form of a split's name."""
    match = _SPLIT.fullmatch(text)
    return None if match is None else match["name"]


def pin_split(argument: str, name: str, is_data: IsData) -> HubFiles | None:
    """The files of the split that `name`, which `argument` holds, stands for, downloaded; None: it names no data set.

    ValueError: it is not there, or it has no such split.
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
    """The data files that a URL hf://datasets/org/name[@revision]/path stands for, downloaded. ValueError: none."""
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
    log.info("%s: %s is commit %s, %d files", repo.argument, repo.name, commit, len(files))
    return found


def find_splits(paths: Iterable[str], readme: str, is_data: IsData) -> Splits:
    """The subsets of a data set and their splits, the default subset first. readme: the text of its README.md.

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
    """True if a file is one of rows, and neither hidden nor one that describes the data set."""
    parts = PurePosixPath(path).parts
    hidden = any(part.startswith((".", "__")) for part in parts)
    return not hidden and parts[-1] not in _NO_ROWS and is_data(PurePosixPath(path))


def _by_names(files: list[str]) -> dict[str, list[str]]:
    """Splits as the files' names say."""
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
    """The files of the commonest format: beside data there are often notes in another."""
    kinds = Counter(PurePosixPath(path).suffixes[0] for path in files)
    if not kinds:
        return []
    commonest = max(kinds, key=lambda kind: (kind != ".txt", kinds[kind]))
    return [path for path in files if PurePosixPath(path).suffixes[0] == commonest]


def _choose(where: str, subsets: Splits, wanted: str | None, default: str | None) -> list[str]:
    """The files of the split that is wanted, or of `default`; ValueError says which there are."""
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
    """The content of the YAML between the README's first two lines of dashes."""
    import yaml

    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"README.md of the data set: {str(error).splitlines()[0]}") from error
    return found if isinstance(found, dict) else {}


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """By split the patterns of its files, from any form that a README may list them in."""
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
    """The first file that the numbers in the others' names (-00001-of-00004) say there is, but is not among them."""
    there = set(files)
    for file in files:
        match = _SHARD.search(file)
        for number in range(int(match[2]) if match else 0):
            assert match is not None
            other = f"{file[: match.start()]}-{number:05d}-of-{match[2]}{file[match.end() :]}"
            if other not in there:
                return other
    return None
