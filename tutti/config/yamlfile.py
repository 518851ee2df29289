"""YAML for configurations: read with line numbers and without surprises, and written back.

Differences from PyYAML: `5e-5` is a float (YAML 1.1 requires `5.0e-5`), dates stay strings, so do times (YAML 1.1 reads
`1:30` as 90), and duplicate keys are an error. The file is parsed into nodes first, which know their lines; `lines`
keeps them by dotted path, so that errors can name the line.
"""

import re
from dataclasses import fields
from typing import Any

import yaml

from tutti.config import FOLLOW_WORLD, GROUPS, Config, ConfigError, get

_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$|[-+]?(?:\d[\d_]*)?\.\d[\d_]*(?:[eE][-+]?\d+)?$"
    r"|[-+]?\d[\d_]*\.$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$")
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Reads `5e-5` as a float, and dates and times as strings."""


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_file(path: str, expects: str = "groups such as `train:`") -> tuple[dict, dict[str, int]]:
    """The mapping in the YAML file, and the line of every key by dotted path.

    expects: what it should contain, for messages. ConfigError: the file does not exist, is not YAML, is not a mapping,
    or has a key twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text in UTF-8"
        raise ConfigError([f"{path}: {reason}"]) from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError([f"{path}:{node.start_mark.line + 1}: expects {expects}, not a single value"])
        lines: dict[str, int] = {}
        twice: list[str] = []
        _walk(node, "", lines, twice)
        if twice:
            raise ConfigError([f"{path}:{problem}" for problem in twice])
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else path
        problem = error.problem or error.context or ""
        hint = ": indent with spaces, not tabs" if "\\t" in problem else ""
        raise ConfigError([f"{place}: is not valid YAML: {problem}{hint}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: is not valid YAML: {' '.join(str(error).split())}"]) from None
    finally:
        loader.dispose()


def parse_value(text: str) -> Any:
    """The value of an override that is a list or a mapping, or is inside one. ValueError: it is not valid YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ValueError(text) from None


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML, including defaults; reading it gives an equal configuration.

    `explicit` at its end lists what the user set, so that the rest can be recognized as defaults. `derived` contains
    defaults that depended on the run's number of ranks: if they are read back unchanged, they are computed again.
    """
    tree: dict[str, Any] = {}
    for group, cls in GROUPS.items():
        values = ((field.name, getattr(getattr(config, group), field.name)) for field in fields(cls))
        tree[group] = {name: list(value) if isinstance(value, tuple) else value for name, value in values}
    tree["explicit"] = sorted(config.explicit)
    sizes = {name: get(config, name) for name in FOLLOW_WORLD if name not in config.explicit}
    tree["derived"] = {name: size for name, size in sizes.items() if size is not None}
    head = "# The whole configuration of a run, to be passed to `tutti train` again. `explicit` lists what was set.\n"
    return head + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


def _walk(node: yaml.MappingNode, prefix: str, lines: dict[str, int], twice: list[str]) -> None:
    """Record the line of every key below `node`, and duplicate keys."""
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        path = f"{prefix}{name}"
        if name in seen and key.tag != _MERGE:
            twice.append(f"{line}: {path} is given twice, before on line {seen[name]}")
        seen[name] = line
        lines[path] = line
        if isinstance(value, yaml.MappingNode):
            _walk(value, f"{path}.", lines, twice)
