"""Which chat templates only lay the messages' contents between fixed texts: a proof over the syntax tree.

Every expression gets a kind: the list of messages, one message, a content, a text that a content was joined into, or
free of them. Contents may be joined, trimmed, written out, and asked whether they are empty or which type they have;
all else that could look into them is refused, and so are statements that this proof does not know. What is accepted
then writes the same text around contents of any words, as long as the roles are the same and no content is blank.
"""

from __future__ import annotations

from enum import Enum

from jinja2 import Environment, nodes

_TYPE_TESTS = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "number", "boolean"}
_COUNTS = {"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"}
_ROUNDS = 10  # a name takes on a kind at most a few times


class Kind(Enum):
    """What an expression may hold of the messages."""

    FREE = 0
    CONTENT = 1
    JOINED = 2
    MESSAGE = 3
    MESSAGES = 4


_TEXTS = {Kind.FREE, Kind.CONTENT, Kind.JOINED}


class _OpaqueError(Exception):
    """The template may look into a content."""


def lays_contents_out(environment: Environment, source: str) -> bool:
    """Whether what surrounds the contents depends on the messages' roles alone."""
    proof = _Proof()
    try:
        tree = environment.parse(source)
        for _ in range(_ROUNDS):
            before = dict(proof.names)
            proof.block(tree.body)
            if proof.names == before:
                return True
    except _OpaqueError:
        pass
    return False


class _Proof:
    """One pass over the statements; `names` holds what any assignment may have put into a variable."""

    def __init__(self) -> None:
        self.names = {"messages": Kind.MESSAGES}

    def block(self, statements: list[nodes.Node]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: nodes.Node) -> None:
        match node:
            case nodes.Output():
                self._demand(node.nodes, _TEXTS)
            case nodes.If():
                self._kind(node.test)
                for body in (node.body, node.elif_, node.else_):
                    self.block(list(body))
            case nodes.For(recursive=False):
                kind = self._kind(node.iter)
                if kind not in (Kind.FREE, Kind.MESSAGES):
                    raise _OpaqueError
                self._assign(node.target, Kind.MESSAGE if kind == Kind.MESSAGES else kind)
                if node.test is not None:
                    self._kind(node.test)
                self.block(node.body)
                self.block(node.else_)
            case nodes.Assign():
                self._assign(node.target, self._kind(node.node))
            case nodes.Break() | nodes.Continue():
                pass
            case _:
                raise _OpaqueError

    def _assign(self, target: nodes.Node, kind: Kind) -> None:
        if isinstance(target, nodes.Name) and target.name != "loop":
            self.names[target.name] = _joined([self.names.get(target.name, kind), kind])
        elif kind == Kind.FREE and isinstance(target, nodes.Tuple):
            for item in target.items:
                self._assign(item, kind)
        elif kind != Kind.FREE or not isinstance(target, nodes.NSRef):
            raise _OpaqueError

    def _demand(self, expressions: list[nodes.Expr], allowed: set[Kind]) -> list[Kind]:
        kinds = [self._kind(expression) for expression in expressions]
        if not allowed.issuperset(kinds):
            raise _OpaqueError
        return kinds

    def _kind(self, node: nodes.Node) -> Kind:
        match node:
            # A loop shows its neighbours' messages, too: only what it counts is free.
            case nodes.Getattr(node=nodes.Name(name="loop"), attr=str(name)) if name in _COUNTS:
                return Kind.FREE
            case nodes.Name(name="loop" | "lipsum") | nodes.Filter(name="random"):
                raise _OpaqueError
            case nodes.Name():
                return self.names.get(node.name, Kind.FREE)
            case nodes.Getitem(arg=nodes.Const(value=str(name))) | nodes.Getattr(attr=str(name)):
                return self._member(self._kind(node.node), name)
            case nodes.Getitem():
                self._demand(_children(node.arg), {Kind.FREE})
                kind = self._kind(node.node)
                if kind == Kind.MESSAGES:
                    return kind if isinstance(node.arg, nodes.Slice) else Kind.MESSAGE
                return self._only_free([kind])
            case nodes.Call(node=nodes.Getattr() as method):
                return self._method(method, node)
            case nodes.Filter():
                return self._filter(node)
            case nodes.Test(name=name) if name in _TYPE_TESTS:
                self._kind(node.node)
                return Kind.FREE
            case nodes.Add() | nodes.Concat():
                parts = [node.left, node.right] if isinstance(node, nodes.Add) else node.nodes
                return Kind.FREE if set(self._demand(parts, _TEXTS)) == {Kind.FREE} else Kind.JOINED
            case nodes.And() | nodes.Or():
                return _joined([self._kind(node.left), self._kind(node.right)])
            case nodes.Not():
                self._kind(node.node)
                return Kind.FREE
            case nodes.CondExpr():
                self._kind(node.test)
                return _joined([self._kind(part) for part in (node.expr1, node.expr2) if part is not None])
            case _:
                return self._only_free([self._kind(child) for child in node.iter_child_nodes()])

    def _member(self, owner: Kind, name: str) -> Kind:
        if owner == Kind.MESSAGE and not hasattr(dict, name):
            return Kind.CONTENT if name == "content" else Kind.FREE
        return self._only_free([owner])

    def _method(self, method: nodes.Getattr, call: nodes.Call) -> Kind:
        kind = self._kind(method.node)
        bare = not (call.kwargs or call.dyn_args or call.dyn_kwargs)
        if kind == Kind.CONTENT and method.attr == "strip" and bare and not call.args:
            return kind
        if kind == Kind.MESSAGE and method.attr == "get" and bare:
            match call.args:
                case [nodes.Const(value=str(name))]:
                    return self._member(kind, name)
                case [nodes.Const(value=str(name)), nodes.Const()]:
                    return self._member(kind, name)
        return self._only_free([kind, *map(self._kind, call.iter_child_nodes(exclude=("node",)))])

    def _filter(self, node: nodes.Filter) -> Kind:
        if node.node is None:
            raise _OpaqueError
        kind = self._kind(node.node)
        if not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs):
            if kind == Kind.CONTENT and node.name in ("trim", "string"):
                return kind
            if kind == Kind.MESSAGES and node.name in ("length", "count"):
                return Kind.FREE
        return self._only_free([kind, *map(self._kind, node.iter_child_nodes(exclude=("node",)))])

    @staticmethod
    def _only_free(kinds: list[Kind]) -> Kind:
        if set(kinds) - {Kind.FREE}:
            raise _OpaqueError
        return Kind.FREE


def _children(node: nodes.Node) -> list[nodes.Expr]:
    """The expressions of an index or a slice."""
    found = list(node.iter_child_nodes()) if isinstance(node, nodes.Slice) else [node]
    return [child for child in found if isinstance(child, nodes.Expr)]


def _joined(kinds: list[Kind]) -> Kind:
    """One of these: what is allowed for the strictest of them is right for all."""
    held = set(kinds) - {Kind.FREE}
    if held == {Kind.CONTENT, Kind.JOINED}:
        return Kind.JOINED
    if len(held) > 1:
        raise _OpaqueError
    return held.pop() if held else Kind.FREE
