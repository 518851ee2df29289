"""Data-flow analysis of chat templates: proving that a template writes messages' contents unchanged.

Most templates do little with contents: they write them, perhaps stripped, and look for a marker in them. For such a
template one can prove that the texts of two conversations with the same roles differ only in their contents, as long as
these have no whitespace at their edges and contain none of the markers. Then the text need not be rendered for each
conversation.

The proof is an abstract interpretation. Expressions are evaluated to *kinds*, starting from `messages`, over all
branches that some conversation of the given roles may take, until the kinds of variables no longer change. An operation
on a content must return the content itself, or a truth value that is the same for all contents that meet its condition,
which is added to the conditions found so far. For anything else (a slice, a length, an escape, a comparison of
contents, a macro) the proof fails, which only costs time. Messages have a role and a content and nothing else.

A content is a text, or a list of parts: `{"type": "text", "text": ...}`, and others that only have a type, such as
images. Conversations are only compared if, besides the roles, the form of contents and the types of parts are the same;
the condition then applies to the texts of the parts. The branches for `content is string` and for its opposite are
followed separately.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from jinja2 import nodes

_STRIPS = ("strip", "lstrip", "rstrip")
_OF_TEXT = dict.fromkeys(("string", "defined", "iterable", "sequence"), True)
_OF_TEXT |= dict.fromkeys(("undefined", "none", "mapping", "number", "boolean"), False)
"""Jinja tests that only depend on a value's type, and their result for a text."""
_OF_LISTS = _OF_TEXT | {"string": False}
_OF_BOTH = {name: said for name, said in _OF_TEXT.items() if name != "string"}

_KEYS = ("role", "content")
_SUBLISTS = {"list", "reverse", "selectattr", "rejectattr"}
_FUNCTIONS = {"raise_exception", "strftime_now", "namespace", "range"}


class Kind(Enum):
    """The kind of a value. OTHER: contains no content. CONTENT: the text of a content unchanged, or OTHER. TEXT:
    contents and other text concatenated. PIECES: a list whose first and last items are contents. MESSAGE, MESSAGES:
    as passed to the template, with roles and contents. PART, PARTS: of a content that is a list. EITHER: a content
    that is a text or a list of parts."""

    OTHER = 0
    CONTENT = 1
    TEXT = 2
    PIECES = 3
    MESSAGE = 4
    MESSAGES = 5
    PART = 6
    PARTS = 7
    EITHER = 8


Fact = tuple[nodes.Node, Kind]
"""An expression and its known kind."""


class Unproved(Exception):
    """Raised if the template does something unknown with a content."""


@dataclass(frozen=True)
class Condition:
    """A condition on contents. markers: texts that no content may contain. edged: no content may be empty or have
    whitespace at its edges."""

    markers: frozenset[str]
    edged: bool

    @cached_property
    def _marker(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.markers))) or "(?!)")

    def holds(self, contents: Sequence[str]) -> bool:
        if self.edged and any([not text or text[0].isspace() or text[-1].isspace() for text in contents]):
            return False
        return self._marker.search("\0".join(contents)) is None


_ITEMS = {Kind.MESSAGES: Kind.MESSAGE, Kind.PARTS: Kind.PART}


def condition_of(tree: nodes.Template, roles: Set[str], content: Kind = Kind.CONTENT) -> Condition | None:
    """The condition under which a template writes all contents of messages of these roles unchanged, and the same
    text around them; None if this is not proved. content: CONTENT if all are texts, PARTS if all are lists, else
    EITHER."""
    tracer = _Tracer(roles, content)
    try:
        tracer.trace(tree)
    except Unproved:
        return None
    return Condition(frozenset(tracer.markers), tracer.edged)


@dataclass
class _Tracer:
    """The condition found so far, and what is known about variables: their kinds, where they are not OTHER, and
    which of them may (also) be OTHER. _narrowed: expressions whose kind is known more exactly at the current point.
    """

    roles: Set[str]
    content: Kind = Kind.CONTENT
    markers: set[str] = field(default_factory=set)
    edged: bool = False
    _kinds: dict[str, Kind] = field(default_factory=dict)
    _others: set[str] = field(default_factory=set)
    _narrowed: list[Fact] = field(default_factory=list)
    _changed: bool = False

    def trace(self, tree: nodes.Template) -> None:
        """Follow contents through a template. Unproved: its texts may differ in more than contents."""
        self._changed, self._kinds = True, {"messages": Kind.MESSAGES}
        while self._changed:
            self._changed = False
            self._run(tree.body)

    def _run(self, statements: Iterable[nodes.Node]) -> None:
        for node in statements:
            match node:
                case nodes.Output():
                    for written in node.nodes:
                        if not isinstance(written, nodes.TemplateData):
                            self._text(written)
                case nodes.If():
                    self._branch(node)
                case nodes.For():
                    self._loop(node)
                case nodes.Assign():
                    self._assign(node.target, self._kind(node.node))
                case nodes.CallBlock(call=nodes.Call(node=nodes.ExtensionAttribute())):
                    self._run(node.body)  # {% generation %}
                case nodes.ExprStmt():
                    self._text(node.node)
                case nodes.Break() | nodes.Continue():
                    pass
                case _:
                    raise Unproved(type(node).__name__)

    def _branch(self, node: nodes.If) -> None:
        with ExitStack() as known:
            for branch in (node, *node.elif_):
                certain = self._certain(branch.test)
                if certain is None:
                    self._truth(branch.test)
                true, false = self._facts(branch.test, node)
                if certain is not False:
                    with self._knowing(true):
                        self._run(branch.body)
                if certain:
                    return
                known.enter_context(self._knowing(false))
            self._run(node.else_)

    def _facts(self, test: nodes.Node, within: nodes.Node) -> tuple[Fact | None, Fact | None]:
        """The kind of a content if a test of its type is true, and if it is false; None if the test is another one,
        or `within` may change the tested expression."""
        if isinstance(test, nodes.Not):
            true, false = self._facts(test.node, within)
            return false, true
        if not (isinstance(test, nodes.Test) and test.name == "string" and self._kind(test.node) is Kind.EITHER):
            return None, None
        names = {name.name for name in (test.node, *test.node.find_all(nodes.Name)) if isinstance(name, nodes.Name)}
        stored = {name.name for name in within.find_all(nodes.Name) if name.ctx == "store"}
        if names & (stored | {name.name for name in within.find_all(nodes.NSRef)}):
            return None, None
        return (test.node, Kind.CONTENT), (test.node, Kind.PARTS)

    @contextmanager
    def _knowing(self, fact: Fact | None) -> Iterator[None]:
        """Assume a fact within this context."""
        before = self._narrowed
        self._narrowed = before if fact is None else [*before, fact]
        yield
        self._narrowed = before

    def _loop(self, node: nodes.For) -> None:
        over = self._kind(node.iter)
        if over is not Kind.OTHER and over not in _ITEMS:
            raise Unproved("a loop over a content")
        self._assign(node.target, _ITEMS.get(over, over))
        if node.test is not None:
            self._truth(node.test)
        self._run([*node.body, *node.else_])

    def _assign(self, target: nodes.Node, kind: Kind) -> None:
        match target:
            case nodes.Name():
                name = target.name
            case nodes.NSRef():
                name = f"{target.name}.{target.attr}"
            case nodes.Tuple() if kind is Kind.OTHER:
                for item in target.items:
                    self._assign(item, kind)
                return
            case _:
                raise Unproved("several variables at once")
        if kind is Kind.OTHER and name not in self._others:
            self._others.add(name)
            self._changed = True
        before = self._kinds.get(name, Kind.OTHER)
        if (after := _joined(before, kind)) is not before:
            self._kinds[name], self._changed = after, True

    def _text(self, node: nodes.Node) -> Kind:
        """The kind of an expression that is written or joined with text."""
        kind = self._kind(node)
        if kind.value > Kind.TEXT.value:
            raise Unproved("a list or an object as text")
        return kind

    def _truth(self, node: nodes.Node) -> None:
        """Evaluate an expression for whether it is true."""
        if self._kind(node) in (Kind.CONTENT, Kind.TEXT, Kind.EITHER):
            self.edged = True

    def _certain(self, test: nodes.Node) -> bool | None:
        """The truth of a condition if it is the same for all conversations; None if unknown."""
        match test:
            case nodes.Not():
                inner = self._certain(test.node)
                return None if inner is None else not inner
            case nodes.And() | nodes.Or():
                decisive = isinstance(test, nodes.Or)
                found = {self._certain(test.left), self._certain(test.right)}
                return decisive if decisive in found else None if None in found else not decisive
            case nodes.Test() if test.name in _OF_TEXT and self._is(Kind.CONTENT, test.node):
                return _OF_TEXT[test.name]
            case nodes.Test() if test.name in _OF_TEXT and self._is(Kind.PARTS, test.node):
                return _OF_LISTS[test.name]
            case nodes.Test() if test.name in _OF_BOTH and self._is(Kind.EITHER, test.node):
                return _OF_BOTH[test.name]
            case nodes.Test(name="defined" | "undefined") if (key := self._key(test.node)) is not None:
                return (key in _KEYS) == (test.name == "defined")
            case nodes.Compare(expr=left, ops=[nodes.Operand(op="eq" | "in", expr=right)]):
                return self._equals(left, right, test.ops[0].op)
            case nodes.Compare(expr=left, ops=[nodes.Operand(op="ne" | "notin", expr=right)]):
                equal = self._equals(left, right, "eq" if test.ops[0].op == "ne" else "in")
                return None if equal is None else not equal
            case nodes.Call(
                node=nodes.Getattr(node=owner, attr="startswith" | "endswith"), args=[nodes.Const(value=str() as text)]
            ):
                return self._holds_marker(owner, text)
            case _ if any(self._is(kind, test) for kind in (Kind.CONTENT, Kind.PARTS, Kind.EITHER)):
                self.edged = True
                return True
            case _:
                return None if (key := self._key(test)) is None else key in _KEYS

    def _equals(self, left: nodes.Node, right: nodes.Node, op: str) -> bool | None:
        """The truth of `left == right` or `left in right` if it is the same for all conversations."""
        if isinstance(left, nodes.Const) and isinstance(left.value, str):
            if op == "in" and self._is(Kind.MESSAGE, right):
                return left.value in _KEYS
            return self._holds_marker(right, left.value)
        values = [_constant(item) for item in (right.items if isinstance(right, nodes.List | nodes.Tuple) else [right])]
        if self._key(left) == "role" and all(isinstance(value, str) for value in values):
            return None if self.roles & set(values) else False
        return self._holds_marker(left, values[0]) if op == "eq" and isinstance(values[0], str) else None

    def _holds_marker(self, node: nodes.Node, marker: str) -> bool | None:
        """False for a content, which from now on must not contain `marker`; None for anything else."""
        if not marker or not self._is(Kind.CONTENT, node):
            return None
        self.markers.add(marker)
        return False

    def _key(self, node: nodes.Node) -> str | None:
        """The key of a message from which an expression certainly reads."""
        match node:
            case nodes.Getattr(node=owner, attr=key) | nodes.Getitem(node=owner, arg=nodes.Const(value=str() as key)):
                return key if self._is(Kind.MESSAGE, owner) else None
            case _:
                return None

    def _is(self, kind: Kind, node: nodes.Node) -> bool:
        """True if an expression certainly is a content, a message, or the list of messages."""
        match node:
            case nodes.Name():
                return self._kinds.get(node.name) is kind and node.name not in self._others
            case nodes.Getitem(arg=nodes.Const(value=int())):
                return kind is Kind.MESSAGE and self._is(Kind.MESSAGES, node.node)
            case _:
                return kind is self.content and self._key(node) == "content"

    def _plain(self, *parts: nodes.Node | None) -> Kind:
        """OTHER, for an expression all of whose `parts` must be OTHER."""
        if any(part is not None and self._kind(part) is not Kind.OTHER for part in parts):
            raise Unproved("a content where something else is expected")
        return Kind.OTHER

    def _kind(self, node: nodes.Node) -> Kind:
        for known, kind in self._narrowed:
            if known == node:
                return kind
        match node:
            case nodes.Const() | nodes.TemplateData():
                return Kind.OTHER
            case nodes.Name():
                if node.name == "loop" or self._is_namespace(node.name):
                    raise Unproved("all of a namespace at once")
                return self._kinds.get(node.name, Kind.OTHER)
            case nodes.Getattr(node=nodes.Name(name="loop"), attr=attr) if attr not in ("previtem", "nextitem"):
                return Kind.OTHER
            case nodes.Getattr(node=nodes.Name(name=name), attr=attr) if self._is_namespace(name):
                return self._kinds.get(f"{name}.{attr}", Kind.OTHER)
            case nodes.Getattr():
                return self._item(self._kind(node.node), nodes.Const(node.attr))
            case nodes.Getitem():
                return self._item(self._kind(node.node), node.arg)
            case nodes.Call():
                return self._call(node)
            case nodes.Filter():
                return self._filter(node)
            case nodes.Test():
                return self._test(node)
            case nodes.Compare():
                return self._compare(node)
            case _:
                return self._operation(node)

    def _operation(self, node: nodes.Node) -> Kind:
        """The kind of an operator expression; for unknown operators all operands must be OTHER."""
        match node:
            case nodes.Not():
                self._truth(node.node)
                return Kind.OTHER
            case nodes.And() | nodes.Or():
                self._truth(node.left)
                return _joined(self._kind(node.left), self._kind(node.right))
            case nodes.CondExpr():
                certain = self._certain(node.test)
                if certain is None:
                    self._truth(node.test)
                facts = zip((node.expr1, node.expr2), self._facts(node.test, node), (False, True), strict=True)
                kinds = []
                for one, fact, skipped in facts:
                    with self._knowing(fact):
                        kinds += [Kind.OTHER if one is None else self._kind(one)] if certain is not skipped else []
                return _joined(kinds[0], kinds[-1])
            case nodes.Add():
                both = {self._text(node.left), self._text(node.right)}
                return Kind.OTHER if both == {Kind.OTHER} else Kind.TEXT
            case nodes.Concat():
                every = {self._text(part) for part in node.nodes}
                return Kind.OTHER if every == {Kind.OTHER} else Kind.TEXT
            case _:
                return self._plain(*node.iter_child_nodes())

    def _is_namespace(self, name: str) -> bool:
        """True if a variable is a namespace that contains a content or a message."""
        return any(key.startswith(f"{name}.") for key in self._kinds)

    def _item(self, owner: Kind, key: nodes.Node) -> Kind:
        """The kind of `owner[key]`."""
        if owner in _ITEMS:
            self._plain(*key.iter_child_nodes()) if isinstance(key, nodes.Slice) else self._plain(key)
            return owner if isinstance(key, nodes.Slice) else _ITEMS[owner]
        if owner is Kind.MESSAGE and isinstance(key, nodes.Const):
            return self.content if key.value == "content" else Kind.OTHER
        if owner is Kind.PART and isinstance(key, nodes.Const):
            return Kind.CONTENT if key.value == "text" else Kind.OTHER
        if owner is Kind.PIECES and _constant(key) in (0, -1):
            return Kind.CONTENT
        if owner is not Kind.OTHER:
            raise Unproved("a part of a content")
        return self._plain(key)

    def _call(self, node: nodes.Call) -> Kind:
        args = [_constant(arg) for arg in node.args]
        match node.node:
            case nodes.Getattr(attr=method):
                owner = self._kind(node.node.node)
                if owner is Kind.OTHER:
                    return self._plain(*node.args, *node.kwargs)
                if owner in (Kind.MESSAGE, Kind.PART) and method == "get" and args:
                    return _joined(self._item(owner, node.args[0]), self._plain(*node.args[1:]))
                if owner is Kind.CONTENT and not node.kwargs:
                    return self._method(method, args)
                raise Unproved(f"a call of {method}")
            case nodes.Name(name=name) if name in _FUNCTIONS:
                return self._plain(*node.args, *(pair.value for pair in node.kwargs))
            case _:
                raise Unproved("a call")

    def _method(self, name: str, args: list[Any]) -> Kind:
        """The kind of the result of a string method on a content, with constant arguments."""
        if name in _STRIPS and all(isinstance(arg, str) for arg in args):
            self.edged = True
            self.markers |= {char for arg in args for char in arg if not char.isspace()}
            return Kind.CONTENT
        if not args or not all(isinstance(arg, str) and arg for arg in args[:1]):
            raise Unproved(f"a call of {name}")
        if name in ("startswith", "endswith") and len(args) == 1:
            self.markers.add(args[0])
            return Kind.OTHER
        if name in ("split", "rsplit") and all(isinstance(arg, int) for arg in args[1:]):
            self.markers.add(args[0])
            return Kind.PIECES
        if name == "replace" and len(args) == 2 and isinstance(args[1], str):
            self.markers.add(args[0])
            return Kind.CONTENT
        raise Unproved(f"a call of {name}")

    def _filter(self, node: nodes.Filter) -> Kind:
        if node.node is None or node.dyn_args or node.dyn_kwargs or node.name == "attr":
            raise Unproved(f"the filter {node.name}")
        kind = self._kind(node.node)
        if node.name in ("default", "d") and kind in (Kind.OTHER, Kind.CONTENT) and node.args:
            self.edged = self.edged or kind is Kind.CONTENT
            return _joined(kind, _joined(self._kind(node.args[0]), self._plain(*node.args[1:])))
        self._plain(*node.args, *(pair.value for pair in node.kwargs))
        if kind is Kind.OTHER:
            return kind
        if kind in _ITEMS and node.name in ("length", "count"):
            return Kind.OTHER
        if kind in _ITEMS and node.name in ("first", "last"):
            return _ITEMS[kind]
        selects = "type" if kind is Kind.PARTS else "role"
        if kind in _ITEMS and node.name in _SUBLISTS and not (node.args and _constant(node.args[0]) != selects):
            return kind
        if kind in (Kind.CONTENT, Kind.TEXT) and node.name in ("trim", "string") and not node.args and not node.kwargs:
            self.edged = True
            return kind
        raise Unproved(f"the filter {node.name}")

    def _test(self, node: nodes.Test) -> Kind:
        kind = self._kind(node.node)
        if kind is not Kind.OTHER and node.name not in _OF_TEXT:
            raise Unproved(f"the test {node.name}")
        return self._plain(*node.args)

    def _compare(self, node: nodes.Compare) -> Kind:
        if len(node.ops) > 1:
            return self._plain(node.expr, *(part.expr for part in node.ops))
        operand = node.ops[0]
        left, right = self._kind(node.expr), self._kind(operand.expr)
        if left is Kind.CONTENT and operand.op in ("eq", "ne"):
            left, right, marker = right, left, _constant(operand.expr)
        else:
            marker = _constant(node.expr)
        if left is Kind.OTHER and right is Kind.OTHER:
            return Kind.OTHER
        if right in (Kind.MESSAGE, Kind.PART) and operand.op in ("in", "notin") and isinstance(marker, str):
            return Kind.OTHER
        if right is Kind.CONTENT and operand.op in ("in", "notin", "eq", "ne") and isinstance(marker, str):
            self.markers |= {marker} - {""}
            self.edged = self.edged or not marker
            return Kind.OTHER
        raise Unproved("a comparison of contents")


def _joined(one: Kind, other: Kind) -> Kind:
    """The kind of a value that has either kind."""
    if one is other or other is Kind.OTHER:
        return one
    if one is Kind.OTHER:
        return other
    if {one, other} == {Kind.CONTENT, Kind.TEXT}:
        return Kind.TEXT
    raise Unproved("a value that may be a content or a message")


def _constant(node: nodes.Node | None) -> Any:
    """The value of a constant expression; None for others."""
    match node:
        case nodes.Const():
            return node.value
        case nodes.Neg(node=nodes.Const(value=int() as value)):
            return -value
        case _:
            return None
