"""Convert what a user wrote to a value of the argument's type, or to a one-line error.

Values from YAML are already typed, and are checked strictly: `"3"` is not a number and `3` not a string. Values from
the command line are texts, which are read according to the argument's type. `none`, `null` and an empty value mean None
for optional arguments, and an empty list or mapping.
"""

import difflib
import math
import os
import re
from typing import Any

from tutti.config.argument import Argument
from tutti.config.yamlfile import parse_value

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NONE = ("none", "null", "~", "")
_WANTED = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    tuple: "a list of strings",
}


def coerce(argument: Argument, value: Any, *, text: bool = False) -> Any:
    """`value` as the argument's type; text: it is from the command line. ValueError: what is wrong with it."""
    if value is None or (isinstance(value, str) and value.lower() in _NONE):
        if argument.optional:
            return None
        if argument.kind in (tuple, dict):
            return argument.kind()
        if value is None:
            raise ValueError(f"expects {_WANTED[argument.kind]}, got null; leave it out for its default")
    typed = _from_text(argument, value) if text else value
    typed = _of_type(argument, typed)
    if argument.path:
        typed = _expand_paths(typed)
    _check_set(argument, typed)
    _check_range(argument, typed)
    return typed


def nearest(word: str, names: list[str] | tuple[str, ...], cutoff: float = 0.5) -> str | None:
    """The element of `names` most similar to `word`; cutoff: minimum similarity, up to 1."""
    matches = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def expand_path(path: str) -> str:
    """A path, or a comma-separated list of paths, with `~` and environment variables expanded.

    ValueError: a variable is not set, or its braces contain more than a name, and no file has this name.
    """
    if os.path.exists(path):
        return path
    if odd := re.search(r"\$\{(?!\w+\})[^}]*\}?", path):
        raise ValueError(
            f"{odd.group()} in {path} is not replaced by anything: variables are written $NAME or ${{NAME}}"
        )
    for name in re.findall(r"\$(\w+)|\$\{(\w+)\}", path):
        if "".join(name) not in os.environ:
            raise ValueError(f"the environment variable {''.join(name)} in {path} is not set")
    parts = os.path.expandvars(path).split(",")
    return ",".join(part[: len(part) - len(part.lstrip())] + os.path.expanduser(part.lstrip()) for part in parts)


def _expand_paths(value: Any, name: str = "_path") -> Any:
    if isinstance(value, dict):
        return {key: _expand_paths(item, str(key)) for key, item in value.items()}
    return expand_path(value) if isinstance(value, str) and name.endswith("_path") else value


def _from_text(argument: Argument, text: str) -> Any:
    """Read command-line text by the argument's type; unreadable text is returned unchanged, for `_of_type` to
    reject."""
    kind = argument.kind
    if kind is str:
        return text
    if kind is bool:
        return _WORDS.get(text.lower(), text)
    if kind is tuple and not text.lstrip().startswith("["):
        return [text] if argument.prose else [part.strip() for part in text.split(",") if part.strip()]
    if kind in (int, float):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
        return text
    try:
        return parse_value(text)
    except ValueError:
        return [text] if argument.prose else text


def _of_type(argument: Argument, value: Any) -> Any:
    kind = argument.kind
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        raise ValueError(f"expects a finite number, got {value}")
    if kind is tuple and isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(value)
    if type(value) is kind and kind is not tuple:
        return value
    raise ValueError(f"expects {_WANTED[kind]}, got {_show(value)}{_hint(argument, value)}")


def _hint(argument: Argument, value: Any) -> str:
    """The end of an error message about `value`, which has the wrong type, that says how to write it if the
    intention is clear."""
    kind = argument.kind
    if kind is str and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind is bool and value in (0, 1, "0", "1"):
        return f"; write {str(bool(int(value))).lower()}"
    if kind is tuple and isinstance(value, str | int | float):
        return f"; write [{', '.join(part.strip() for part in str(value).split(','))}]"
    if isinstance(value, str) and type(_from_text(argument, value)) in (kind, int if kind is float else kind):
        return "; leave the quotes out"
    return ""


def _check_set(argument: Argument, value: Any) -> None:
    known, other = argument.values, ""
    if argument.open_set and not any(mark in value for mark in argument.open_set.marks):
        known, other = argument.open_set.names, f", nor {argument.open_set.other}"
    for one in value if argument.kind is tuple else (value,):
        if known and one not in known:
            guess = nearest(one, known)
            hint = f"; did you mean {guess}?" if guess else ""
            raise ValueError(f"{_show(one)} is not one of {', '.join(known)}{other}{hint}")


def _check_range(argument: Argument, value: Any) -> None:
    if argument.low is not None and value < argument.low:
        raise ValueError(f"must be at least {argument.low}, got {value}")
    if argument.high is not None and value > argument.high:
        raise ValueError(f"must be at most {argument.high}, got {value}")


def _show(value: Any) -> str:
    """A value as the user would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
