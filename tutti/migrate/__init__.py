"""Migration: converts the configuration of another framework into ours, with an account of every key.

Each framework has a table (`veomni`, `llamafactory`, `axolotl`, `huggingface`, `torchtitan`) from its dotted keys to
rules: a rule is a function of the key's value that returns our settings and says if they mean the same. The steps:
recognise the framework by its keys; flatten the file to dotted keys; apply the rules; write out its defaults that
differ from ours; then load the result like any configuration, and drop what this version refuses, with the reason.
Every key of the file ends up in exactly one of three lists: mapped, changed, or without a counterpart. Nothing is
dropped silently.

The tables were written from the public documentation of these frameworks.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tutti.config import ARGUMENTS, ConfigError
from tutti.config.coerce import nearest
from tutti.config.load import from_dict
from tutti.config.yamlfile import read_file
from tutti.migrate import axolotl, huggingface, llamafactory, torchtitan, veomni
from tutti.migrate.rules import CHANGED, MAPPED, NONE, Framework, Result, Source, none, whole_run

__all__ = ["Migration", "Row", "migrate", "recognised"]

FRAMEWORKS: tuple[Framework, ...] = (
    veomni.FRAMEWORK,
    llamafactory.FRAMEWORK,
    axolotl.FRAMEWORK,
    huggingface.FRAMEWORK,
    torchtitan.FRAMEWORK,
)


@dataclass(frozen=True)
class Row:
    """The outcome for one key. kind: mapped, changed or none. ours: settings by dotted name. note: what to know about
    it.

    given: true if the file has the key; false for a default of the framework that differs from ours.
    """

    key: str
    value: Any
    kind: str
    ours: Mapping[str, Any]
    note: str
    given: bool = True


@dataclass(frozen=True)
class Migration:
    """The outcomes for a file of `framework`, key by key."""

    framework: str
    rows: tuple[Row, ...]

    def of(self, kind: str) -> list[Row]:
        """The file's own keys of this kind, in its order."""
        return [row for row in self.rows if row.given and row.kind == kind]

    @property
    def defaults(self) -> list[Row]:
        """Defaults of the framework that differ from ours."""
        return [row for row in self.rows if not row.given and (row.ours or row.kind != MAPPED)]

    def settings(self) -> dict[str, tuple[Any, Row]]:
        """Our settings, each with the row it comes from; a key of the file overrides a default, and a later key an
        earlier one."""
        ranked = sorted(self.rows, key=lambda row: row.given)
        return {name: (value, row) for row in ranked for name, value in row.ours.items()}


def migrate(path: str, ranks: int = 1) -> Migration:
    """Read the file at `path`, made for `ranks` ranks. ConfigError: it is not YAML or TOML, or of no known
    framework."""
    tree = _read(path)
    framework = _recognise(tree, path)
    source = Source(_flatten(tree, framework), ranks, Path(path).parent)
    rows = [_row(framework, source, key, value, given=True) for key, value in source.values.items()]
    for key, value in framework.defaults(source).items():
        if key not in source.values:
            rows.append(_row(framework, source, key, value, given=False))
    return _loadable(_with_length(Migration(framework.name, tuple(rows)), framework, ranks))


def recognised(path: str) -> str | None:
    """The framework of the YAML or TOML file at `path`, if it has keys of one framework that are none of ours."""
    try:
        tree = _read(path)
        framework = _recognise(tree, path)
    except ConfigError:
        return None
    keys = _flatten(tree, framework)
    return framework.name if any(key in framework.rules and key not in ARGUMENTS for key in keys) else None


def _read(path: str) -> Mapping[str, Any]:
    """The mapping in a YAML, JSON or TOML file. ConfigError: there is none."""
    if not path.endswith(".toml"):
        return read_file(path, "the keys of another framework")[0]
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError([f"{path}: is not valid TOML: {error}"]) from None


def _with_length(migration: Migration, framework: Framework, ranks: int) -> Migration:
    """The migration with the length of its single epoch, if the framework counts the steps of an entire run."""
    settings = {name: value for name, (value, _) in migration.settings().items()}
    steps = settings.get("train.max_steps")
    if not framework.counts_whole_run or steps is None:
        return migration
    length = whole_run(steps, settings, ranks)
    rows = [
        replace(row, ours={**row.ours, **length}) if row.ours.get("train.max_steps") == steps else row
        for row in migration.rows
    ]
    return replace(migration, rows=tuple(rows))


def _recognise(tree: Mapping[str, Any], path: str) -> Framework:
    """The framework that knows the most keys of the file, including one that no other framework has."""
    scores = {
        framework.name: sum(key in framework.rules for key in _flatten(tree, framework))
        for framework in FRAMEWORKS
        if framework.is_meant(tree)
    }
    if not scores:
        names = ", ".join(f"{framework.name} ({framework.sign})" for framework in FRAMEWORKS)
        raise ConfigError([f"{path}: is of none of the frameworks whose files can be turned into ours: {names}"])
    best = max(scores, key=lambda name: scores[name])
    return next(framework for framework in FRAMEWORKS if framework.name == best)


def _flatten(tree: Mapping[str, Any], framework: Framework, prefix: str = "") -> dict[str, Any]:
    """The tree's leaves by dotted key; a mapping that has a rule of its own is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        below = any(known.startswith(f"{name}.") for known in framework.rules)
        if isinstance(value, dict) and value and (below or name not in framework.rules):
            flat |= _flatten(value, framework, f"{name}.")
        else:
            flat[name] = value
    return flat


def _row(framework: Framework, source: Source, key: str, value: Any, *, given: bool) -> Row:
    rule = framework.rules.get(key)
    if value is None:
        result = Result(MAPPED, note="unset, as it is here")
    elif rule is None:
        guess = nearest(key, list(framework.rules), cutoff=0.75)
        hint = f"; did you mean {guess}?" if guess else ""
        result = none(f"is no key of {framework.name} that is known here{hint}")(value, source)
    else:
        result = rule(value, source)
    return Row(key, value, result.kind, result.ours, result.note, given)


def _loadable(migration: Migration) -> Migration:
    """The migration without what `tutti.config.load` refuses; a refused setting's row says why."""
    while True:
        settings = migration.settings()
        problems = _problems({name: value for name, (value, _) in settings.items()})
        refused = {name: text for name, text in problems.items() if name in settings}
        if not refused:
            if problems:
                raise ConfigError(list(problems.values()))
            return migration
        migration = replace(migration, rows=tuple(_without(row, refused) for row in migration.rows))


def _without(row: Row, refused: Mapping[str, str]) -> Row:
    """The row without its refused settings; its kind is none if nothing is left."""
    lost = [text for name, text in refused.items() if name in row.ours]
    if not lost:
        return row
    ours = {name: value for name, value in row.ours.items() if name not in refused}
    note = "; ".join([*([row.note] if row.note and ours else []), *(f"refused: {text}" for text in lost)])
    return replace(row, kind=CHANGED if ours else NONE, ours=ours, note=note)


def _problems(settings: Mapping[str, Any]) -> dict[str, str]:
    """The problems with our settings, by dotted name."""
    tree: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, _, leaf = name.partition(".")
        tree.setdefault(group, {})[leaf] = value
    try:
        from_dict(tree)
    except ConfigError as error:
        return {problem.partition(":")[0]: problem for problem in error.problems}
    return {}
