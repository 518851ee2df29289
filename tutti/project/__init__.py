"""`tutti init`: a folder with everything for a first run, small enough to train on a laptop in a minute.

The files are packaged with Tutti and copied unchanged: a config.yaml with comments, conversations that were written for
it, a model config with a tokenizer of 512 tokens, and a README with the next commands. The JSON schema, to which
config.yaml refers for editors, is generated from Tutti's arguments.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from tutti.config.docs import as_schema

SCHEMA = "tutti.schema.json"


def make_project(folder: Path) -> list[str]:
    """Write the project to `folder` and return the names of its files. ValueError: the folder is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: give the name of a new folder")
    files = _copy(resources.files("tutti.project") / "files", folder, folder)
    (folder / SCHEMA).write_text(as_schema(), encoding="utf-8")
    return sorted([*files, SCHEMA])


def _copy(source: Traversable, target: Path, root: Path) -> list[str]:
    if source.is_file():
        target.write_bytes(source.read_bytes())
        return [target.relative_to(root).as_posix()]
    target.mkdir(parents=True, exist_ok=True)
    return [name for item in source.iterdir() for name in _copy(item, target / item.name, root)]
