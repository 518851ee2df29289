"""A migration as text: the account of every key for the terminal, and our YAML with the origin of each setting."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from tutti.config import ARGUMENTS, GROUPS, get
from tutti.config.load import from_dict
from tutti.config.nouns import counted
from tutti.migrate import Migration, Row
from tutti.migrate.rules import CHANGED, MAPPED, NONE

_WIDTH = 110
_REQUIRED = ("data.train_path", "train.output_dir")


def account(migration: Migration, path: str) -> str:
    """Every key of the file at `path`, with its outcome."""
    counts = {kind: len(migration.of(kind)) for kind in (MAPPED, CHANGED, NONE)}
    lines = [
        f"{path} is of {migration.framework}: {counted(sum(counts.values()), 'key')}, of which {counts[MAPPED]} are "
        f"mapped, {counts[CHANGED]} changed meaning, and {counts[NONE]} have no counterpart"
    ]
    for title, rows in (
        ("mapped", migration.of(MAPPED)),
        ("changed meaning", migration.of(CHANGED)),
        ("no counterpart", migration.of(NONE)),
        (f"defaults of {migration.framework} that are not ours", migration.defaults),
    ):
        if rows:
            lines += ["", title, *(line for row in rows for line in _lines(row))]
    if missing := _missing(migration):
        lines += ["", "still to be set", *(f"  {name}: {ARGUMENTS[name].doc}" for name in missing)]
    return "\n".join(lines) + "\n"


def as_yaml(migration: Migration, path: str) -> str:
    """Our configuration as YAML, with the origin of each setting as a comment."""
    settings = migration.settings()
    lines = [f"# Made by `tutti migrate` from {path} ({migration.framework}). Check it with `tutti check`."]
    for row in migration.of(NONE):
        lines += textwrap.wrap(f"no counterpart: {row.key}: {_shown(row.value)} ({row.note})", _WIDTH, **_COMMENT)
    told: set[str] = set()
    for group in GROUPS:
        names = [name for name in ARGUMENTS if name in settings and name.startswith(f"{group}.")]
        if names:
            lines += ["", f"{group}:"]
        for name in names:
            value, row = settings[name]
            if row.kind == CHANGED and row.key not in told:
                told.add(row.key)
                lines += [f"  {line}" for line in textwrap.wrap(row.note, _WIDTH, **_COMMENT)]
            given = "" if row.given else ", by default"
            lines.append(f"  {name.partition('.')[2]}: {_shown(value)}   # {row.key}{given}")
    return "\n".join(lines) + "\n"


_COMMENT: dict[str, Any] = {"initial_indent": "# ", "subsequent_indent": "#   ", "break_on_hyphens": False}


def _lines(row: Row) -> Iterator[str]:
    ours = ", ".join(f"{name}: {_shown(value)}" for name, value in row.ours.items())
    head = f"  {row.key}: {_shown(row.value)}"
    # Keys that need no setting show the reason instead.
    yield f"{head}  ->  {ours or row.note or 'nothing to set'}" if row.kind == MAPPED or ours else head
    if row.note and (ours or row.kind != MAPPED):
        yield from textwrap.wrap(
            row.note, _WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
        )


def _missing(migration: Migration) -> list[str]:
    tree: dict[str, dict[str, Any]] = {}
    for name, (value, _) in migration.settings().items():
        group, _, leaf = name.partition(".")
        tree.setdefault(group, {})[leaf] = value
    config = from_dict(tree)
    missing = [name for name in _REQUIRED if get(config, name) is None]
    return [*missing, *(["model.model_path"] if config.model.config_path is None else [])]


def _shown(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("...").rstrip().replace("\n", " ")
