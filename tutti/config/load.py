"""Reading a configuration: one YAML file, then overrides, into a checked and resolved `Config`.

The steps: split the command line into the file and the overrides; put both into one flat table from dotted names to
what was written for them, later entries winning; convert each entry to its argument's type; build the frozen classes
and fill in defaults that depend on other arguments; check rules between arguments. Every step adds to one list of
problems, and a configuration with problems is refused with all of them at once.
"""

import os
from dataclasses import replace
from typing import Any, NamedTuple

from tutti.config import ARGUMENTS, FOLLOW_WORLD, GROUPS, Config, ConfigError, away_from_default, get, resolve
from tutti.config.coerce import coerce, nearest
from tutti.config.rules import contradictions, unavailable
from tutti.config.synonyms import SYNONYMS
from tutti.config.yamlfile import parse_value, read_file, to_yaml

__all__ = ["ConfigError", "from_dict", "load", "to_yaml"]


_WRITTEN = ("train.output_dir", "train.profile_trace_dir")
"""The arguments for paths that a run writes to."""


class _Entry(NamedTuple):
    """A value as written for one argument. text: it is from the command line. where: the line and the file."""

    value: Any
    text: bool = False
    where: str = ""


class _Draft(NamedTuple):
    """A configuration being read: entries by dotted name, problems so far, and for a file written by a run the list
    of explicit names and the defaults that depended on the number of ranks."""

    entries: dict[str, _Entry]
    problems: list[str]
    explicit: list[frozenset[str]]
    derived: dict[str, Any]


def load(argv: list[str], verb: str | None = "train") -> Config:
    """Read `[FILE.yaml] [--a.b VALUE | --a.b=VALUE | a.b=VALUE ...]` into a resolved configuration.

    verb: the command, which determines the required arguments (None: none). ConfigError: lists every problem.
    """
    draft = _Draft({}, [], [], {})
    files, overrides = _split(argv, draft.problems)
    for path in files:
        tree, lines = read_file(path)
        _add_tree(draft, tree, {name: f" ({path}:{line})" for name, line in lines.items()})
        draft.problems.extend(_beside(draft, os.path.dirname(path)))
        if draft.explicit:
            _drop_defaults(draft)
    for name, value in overrides:
        _add_override(draft, name, value)
    return _build(draft, verb)


def _beside(draft: _Draft, folder: str) -> list[str]:
    """One problem for each path that does not exist relative to the working directory, but does relative to the
    file's `folder`."""
    problems = []
    for name, entry in draft.entries.items():
        path = entry.value
        if not (folder and ARGUMENTS[name].path and isinstance(path, str) and path) or name in _WRITTEN:
            continue
        if not os.path.exists(os.path.expanduser(path)) and os.path.exists(os.path.join(folder, path)):
            problems.append(
                f"{name}: {path} is not in the working directory, from which paths are taken, but in {folder}, where "
                f"the file lies: cd {folder}{entry.where}"
            )
    return problems


def from_dict(tree: dict[str, Any]) -> Config:
    """A resolved configuration from nested values, `{"train": {"lr": 1e-5}}`; nothing is required.

    ConfigError: lists every problem, by the rules of a YAML file.
    """
    draft = _Draft({}, [], [], {})
    _add_tree(draft, tree, {})
    return _build(draft, None)


def _split(argv: list[str], problems: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The configuration file, if any, and the overrides in order."""
    files: list[str] = []
    overrides: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("-") and (not equals or os.path.isfile(token)):
            files.append(token)
        elif not token.startswith("--") and token.startswith("-"):
            problems.append(f"{token}: unknown option; an argument is written --a.b VALUE or a.b=VALUE")
        elif equals:
            overrides.append((name, value))
        elif rest and _is_value(name, rest[0]):
            overrides.append((name, rest.pop(0)))
        elif name in ARGUMENTS and ARGUMENTS[name].kind is not bool:
            problems.append(f"{name}: needs a value, as in --{name} VALUE")
        else:
            overrides.append((name, "true"))
    if len(files) > 1:
        problems.append(f"{files[1]}: unexpected; {files[0]} is the configuration file already, and there can be one")
    return files[:1], overrides


def _is_value(name: str, token: str) -> bool:
    """True if `token`, which follows `--name`, is its value; a switch can stand alone."""
    if token.startswith("--"):
        return False
    if name in ARGUMENTS and ARGUMENTS[name].kind is not bool:
        return True
    return "=" not in token and not os.path.isfile(token)


def _add_tree(draft: _Draft, tree: dict[str, Any], where: dict[str, str]) -> None:
    """Add the entries of a YAML file or a nested dict."""
    for group, values in tree.items():
        place = where.get(str(group), "")
        if group == "explicit" and isinstance(values, list):
            draft.explicit.append(frozenset(map(str, values)))
        elif group == "derived" and isinstance(values, dict):
            draft.derived.update(values)
        elif group in ARGUMENTS:
            above, _, leaf = group.partition(".")
            draft.problems.append(f"{group}: in a file it is written as `{leaf}:`, indented below `{above}:`{place}")
        elif group not in GROUPS:
            draft.problems.append(_unknown(str(group)) + place)
        elif values is None:
            continue
        elif not isinstance(values, dict):
            draft.problems.append(f"{group}: expects a mapping of arguments, got {values!r}{place}")
        else:
            for leaf, value in values.items():
                name = f"{group}.{leaf}"
                place = where.get(name, "")
                if name in ARGUMENTS:
                    draft.entries[name] = _Entry(value, where=place)
                else:
                    draft.problems.append(_unknown(name) + place)
    for name, value in draft.derived.items():
        if name in FOLLOW_WORLD and name in draft.entries and draft.entries[name].value == value:
            del draft.entries[name]


def _drop_defaults(draft: _Draft) -> None:
    """Drop entries of a file written by a run that only repeat defaults, so that these can depend on later
    overrides."""
    try:
        config = _build(draft._replace(problems=list(draft.problems)), None)
    except ConfigError:
        return
    for name in [name for name in draft.entries if name not in config.explicit]:
        del draft.entries[name]


def _add_override(draft: _Draft, name: str, value: str) -> None:
    if name in ARGUMENTS:
        draft.entries[name] = _Entry(value, text=True)
        return
    parent = ".".join(name.split(".")[:2])
    if parent not in ARGUMENTS or ARGUMENTS[parent].kind is not dict:
        draft.problems.append(_unknown(name))
        return
    before = draft.entries.get(parent, _Entry({}))
    path = name.removeprefix(f"{parent}.").split(".")
    try:
        tree = coerce(ARGUMENTS[parent], before.value, text=before.text)
        draft.entries[parent] = _Entry(_with(tree, path, parse_value(value)))
    except ValueError:
        draft.problems.append(f"{name}: {value!r} cannot be set here")


def _with(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy of `tree` with `value` at `path`, replacing anything that is not a mapping on the way."""
    first, *rest = path
    if rest:
        below = tree.get(first)
        value = _with(below if isinstance(below, dict) else {}, rest, value)
    return {**tree, first: value}


def _build(draft: _Draft, verb: str | None) -> Config:
    """Check the entries and build the configuration. ConfigError: lists every problem."""
    problems = list(draft.problems)
    values: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, entry in draft.entries.items():
        argument = ARGUMENTS[name]
        try:
            values[argument.group][argument.leaf] = coerce(argument, entry.value, text=entry.text)
        except ValueError as error:
            problems.append(f"{name}: {error}{entry.where}")
    config = resolve(Config(**{group: cls(**values[group]) for group, cls in GROUPS.items()}))
    explicit = frozenset(draft.entries)
    if draft.explicit:
        away = {name for name in explicit if away_from_default(config, name)}
        explicit = (draft.explicit[-1] & explicit) | away
    config = replace(config, explicit=explicit)
    problems += unavailable(config)
    problems += _missing(config, verb, refused=problems)
    problems += contradictions(config)
    if problems:
        raise ConfigError(problems)
    return config


def _missing(config: Config, verb: str | None, refused: list[str]) -> list[str]:
    """Required arguments without a value, except those whose value was rejected."""
    named = {problem.partition(":")[0] for problem in refused}
    problems = [
        f"{name}: required; {argument.doc}"
        for name, argument in ARGUMENTS.items()
        if verb in argument.required and get(config, name) is None and name not in named
    ]
    if verb in ("train", "check") and config.model.config_path is None and "model.model_path" not in named:
        problems.append("model.model_path: required, or model.config_path to start from random weights")
    return problems


def _unknown(name: str) -> str:
    """The problem line for an unknown name, with the one that was probably meant."""
    group, _, leaf = name.rpartition(".")
    leaf = leaf.lower()
    same_leaf = [known for known, argument in ARGUMENTS.items() if argument.leaf == leaf]
    elsewhere = SYNONYMS.get(leaf)
    if same_leaf:
        guess: str | None = same_leaf[0]
    elif elsewhere is None:
        guess = _nearest(group, name if not group else leaf)
    elif elsewhere in ARGUMENTS:
        guess = elsewhere
    else:
        return f"{name}: unknown argument; {elsewhere}"
    return (
        f"{name}: unknown argument; did you mean {guess}?" if guess else f"{name}: unknown argument; see `tutti args`"
    )


def _nearest(group: str, leaf: str) -> str | None:
    """The argument (or without `group` the group) with the most similar name, preferably of this group."""
    if not group and (guess := nearest(leaf, list(GROUPS))):
        return guess
    for groups in ({group}, set(GROUPS)):
        by_leaf = {argument.leaf: name for name, argument in ARGUMENTS.items() if argument.group in groups}
        if guess := nearest(leaf, list(by_leaf), cutoff=0.6):
            return by_leaf[guess]
    return None
