"""Manifests: they define which folders are checkpoints, and whether their files are intact.

A checkpoint is a folder `global_step_N` with a `manifest.json`: the step, facts about the run that wrote it, and the
size and SHA-256 of every other file. The manifest is written last, into a folder that still has a temporary name, so a
folder without a valid one is not a checkpoint, whatever else is in it. Nothing is read from a checkpoint before
`verify` has compared every file with the manifest; the ranks share the hashing.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tutti.core.dist import World
from tutti.core.files import sha256, sync_folder, write_synced

NAME = "manifest.json"
FORMAT = 1

_FOLDER = re.compile(r"global_step_\d+")


@dataclass(frozen=True, slots=True)
class File:
    """size in bytes; sha256 in hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Description of a checkpoint, written into it.

    step: number of optimizer steps taken. saved: when it was committed, in nanoseconds since 1970, later than for older
    checkpoints next to it. facts: about the run (layout, configuration digest, versions). files: by name, except the
    manifest. start: id of the start of the run that wrote it. parent: the checkpoint before it in its run, the last one
    saved or the one resumed from: {"path", "saved"}; None for a run's first.
    """

    step: int
    facts: Mapping[str, Any]
    files: Mapping[str, File]
    saved: int = field(default_factory=time.time_ns)
    start: str = ""
    parent: Mapping[str, Any] | None = None


def folder_name(step: int) -> str:
    """The name of the checkpoint of `step`."""
    return f"global_step_{step}"


def is_folder_name(name: str) -> bool:
    """True if a folder of this name is meant to be a checkpoint."""
    return _FOLDER.fullmatch(name) is not None


def step_of(name: str) -> int:
    """The step of the checkpoint in a folder of this name."""
    return int(name.removeprefix("global_step_"))


def describe(path: Path) -> File:
    """Size and hash of a file."""
    return File(path.stat().st_size, sha256(path))


def write(folder: Path, manifest: Manifest) -> None:
    """Write `manifest`, with a hash of its own, into `folder`, on stable storage when this returns."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_synced(folder / NAME, json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")
    sync_folder(folder)


def read(folder: Path) -> Manifest:
    """The manifest of `folder`, without checking its files. ValueError: there is none, or it is not one of ours."""
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"written in a format other than {FORMAT}")
        if "sha256" in content and content.pop("sha256") != _digest(content):
            raise ValueError("its content is not what was written (SHA-256 differs)")
        del content["format"]
        files = {name: File(**entry) for name, entry in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
        if not isinstance(manifest.step, int) or not isinstance(manifest.saved, int):
            raise ValueError("step and saved are not integers")
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint: it has no {NAME}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{path} is damaged: it names a file outside its folder: {name}")
    if is_folder_name(folder.name) and step_of(folder.name) != manifest.step:
        raise ValueError(f"{folder} is of step {manifest.step}, and its name says otherwise")
    return manifest


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(folder: Path, world: World) -> Manifest:
    """The manifest of `folder`, after checking all of its files. Every rank calls this and hashes its share.

    ValueError, on every rank: the first file that is missing, or of another size or content.
    """
    manifest = world.run_on_all_ranks(lambda: _read_with_sizes(folder))
    mine = sorted(manifest.files.items())[world.rank :: world.size]
    world.run_on_all_ranks(lambda: _check_hashes(folder, mine))
    return manifest


def _read_with_sizes(folder: Path) -> Manifest:
    manifest = read(folder)
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != file.size:
            raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes instead of {file.size}")
    return manifest


def _check_hashes(folder: Path, files: Sequence[tuple[str, File]]) -> None:
    for name, file in files:
        if sha256(folder / name) != file.sha256:
            raise ValueError(f"{folder / name} is damaged: its content is not what was written (SHA-256 differs)")


def by_age(root: Path) -> tuple[list[tuple[Path, Manifest]], dict[Path, str]]:
    """The checkpoints under `root`, last committed first; and folders that are only named like one, with what is
    wrong."""
    found: list[tuple[Path, Manifest]] = []
    broken: dict[Path, str] = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and is_folder_name(folder.name):
            try:
                found.append((folder, read(folder)))
            except ValueError as error:
                broken[folder] = str(error)
    return sorted(found, key=lambda entry: (entry[1].saved, entry[0]), reverse=True), broken


def after(root: Path, manifest: Manifest) -> Manifest:
    """`manifest` with a time of saving later than that of all checkpoints under `root`, in case the clock was set
    back."""
    newest = by_age(root)[0]
    return replace(manifest, saved=max(manifest.saved, newest[0][1].saved + 1)) if newest else manifest
