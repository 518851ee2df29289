"""Arguments: their declaration, and the record from which they are read, checked and documented.

The four groups (`model`, `data`, `train`, `infer`) are frozen dataclasses whose fields are declared with `arg`: a
default, one line of documentation with the unit, and the range. `arguments_of` turns such a class into `Argument`
records, which the loader uses to coerce values, and from which the reference tables are printed. Plain dataclasses keep
start-up fast: reading a configuration takes a few hundredths of a second.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin


class Open(NamedTuple):
    """An open set of names: any other value that contains one of `marks` (such as a path) is allowed too."""

    names: tuple[str, ...]
    other: str
    marks: str


@dataclasses.dataclass(frozen=True, slots=True)
class Argument:
    """One argument.

    kind: the type of its value: str, int, float, bool, dict or tuple (of str). values: the closed set of values (or of
    each element of a tuple), or (). examples: values to list in the reference although others are allowed. optional: it
    may be None. default: the class's. shown: the documented default, if that is not a value (it is required, or depends
    on another argument). low, high: inclusive bounds. required: the commands that need it. path: it names a file or
    folder, in which `~` and environment variables are expanded (in a mapping, in the entries `..._path`). added: it is
    not one of the 107 of the reference. prose: a list of texts, which a comma on the command line does not split.
    """

    name: str
    kind: type
    values: tuple[str, ...]
    examples: tuple[str, ...]
    optional: bool
    default: Any
    shown: Any
    doc: str
    low: float | None
    high: float | None
    open_set: Open | None
    required: tuple[str, ...]
    path: bool
    added: bool
    prose: bool

    @property
    def type(self) -> str:
        """The type in the notation of the reference: `int`, `List of str`, `str: {"a", "b"}`."""
        if self.kind is tuple:
            return "List of str"
        if listed := self.values or self.examples:
            return "str: {" + ", ".join(f'"{value}"' for value in listed) + "}"
        return self.kind.__name__

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.partition(".")[2]


def arg(default: Any, doc: str, **facts: Any) -> Any:
    """Declare a field: `lr: float = arg(5e-5, "Peak learning rate.", low=0)`.

    `facts` are fields of `Argument`: low, high, shown, values, examples, open_set, required, path, added,
    prose.
    """
    metadata = {"doc": doc, **facts}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def arguments_of(group: str, cls: type) -> list[Argument]:
    """The arguments that dataclass `cls` declares, in order, named `group.field`."""
    return [_describe(group, field) for field in dataclasses.fields(cls)]


def _describe(group: str, field: dataclasses.Field) -> Argument:
    facts = field.metadata
    hint: Any = field.type
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
        optional = True
    kind = str if get_origin(hint) is Literal else get_origin(hint) or hint
    one = get_args(hint)[0] if kind is tuple else hint
    values = get_args(one) if get_origin(one) is Literal else facts.get("values", ())
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    return Argument(
        name=f"{group}.{field.name}",
        kind=dict if kind is Mapping else kind,
        values=values,
        examples=facts.get("examples", ()),
        optional=optional,
        default=default,
        shown=facts.get("shown", default),
        doc=facts["doc"],
        low=facts.get("low"),
        high=facts.get("high"),
        open_set=facts.get("open_set"),
        required=facts.get("required", ()),
        path=facts.get("path", False),
        added=facts.get("added", False),
        prose=facts.get("prose", False),
    )
