"""Small changes of a module's source, each of which a good test notices."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_SQL = re.compile(r"\b(select|from|where|having|group by|order by|join|coalesce|filter)\b|\b(sum|count|min|max)\(")
_SQL_CHANGES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<=", "<"),
        (r">=", ">"),
        (r"(?<![<-])<(?![=>])", "<="),
        (r"(?<![-=])>(?!=)", ">="),
        (r"!=", "="),
        (r"(?<![<>!=:])=(?![=>])", "!="),
        (r" \+ ", " - "),
        (r" - ", " + "),
        (r"\band\b", "or"),
        (r"\bor\b", "and"),
        (r"\bmin\(", "max("),
        (r"\bmax\(", "min("),
        (r"\bis null\b", "is not null"),
        (r"\bis not null\b", "is null"),
        (r"\bis distinct from\b", "is not distinct from"),
        (r"\bis not distinct from\b", "is distinct from"),
        (r"\bsemi join\b", "anti join"),
        (r"\banti join\b", "semi join"),
        (r"\bleft join\b", "join"),
        (r"\bunion all\b", "union"),
        (r"\bdesc\b", ""),
        (r"\bdistinct\b(?! from)", ""),
    )
]
# Calls that only tell a person something, or only save time.
_TOLD = re.compile(r"^(self\.)?_?(say|note|progress|report|log\w*|logger\.\w+|debug|warn\w*)\(")


@dataclass(frozen=True)
class Mutant:
    """The ``number``-th change of a module. ``before`` and ``after`` are the changed statement, ``line`` where it starts."""

    number: int
    line: int
    before: str
    after: str


def mutants(source: str) -> list[Mutant]:
    """Return all mutants of a module's source, in the order of the source."""
    changes = _Changes(None)
    changes.visit(ast.parse(source))
    return changes.found


def mutated(source: str, number: int) -> ast.Module:
    """Return the module with the change of one mutant."""
    tree = _Changes(number).visit(ast.parse(source))
    assert isinstance(tree, ast.Module)
    return ast.fix_missing_locations(tree)


class _Changes(ast.NodeTransformer):
    """Numbers all changes of a tree, and makes the one with the number ``wanted``."""

    def __init__(self, wanted: int | None) -> None:
        self._wanted = wanted
        self._count = 0
        self._statements: list[ast.stmt] = []
        self.found: list[Mutant] = []

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal) or _is_docstring(node):
            return node
        if isinstance(node, ast.stmt):
            self._statements.append(node)
        for changed in _alternatives(node):
            number, self._count = self._count, self._count + 1
            if self._wanted is None:
                self.found.append(self._mutant(number, node, changed))
            elif self._wanted == number:
                changed = ast.copy_location(changed, node)
                self._pop(node)
                return changed
        made = self._visit_children(node)
        self._pop(node)
        return made

    def _pop(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            self._statements.pop()

    def _visit_children(self, node: ast.AST) -> ast.AST:
        """Visit what is evaluated when the module runs, and no types."""
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                node.value = self._expression(node.value)
            return node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.args.defaults = [self._expression(default) for default in node.args.defaults]
            node.args.kw_defaults = [None if default is None else self._expression(default) for default in node.args.kw_defaults]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):  # not their decorators
            node.body = [made for one in node.body if isinstance(made := self.visit(one), ast.stmt)]
            return node
        if isinstance(node, ast.JoinedStr):
            for value in node.values:
                if isinstance(value, ast.FormattedValue):
                    value.value = self._expression(value.value)
            return node
        return self.generic_visit(node)

    def _expression(self, node: ast.expr) -> ast.expr:
        made = self.visit(node)
        assert isinstance(made, ast.expr)
        return made

    def _mutant(self, number: int, node: ast.AST, changed: ast.AST) -> Mutant:
        statement = self._statements[-1] if self._statements else None
        if statement is None or statement is node:
            return Mutant(number, getattr(node, "lineno", 1), _text(node), _text(changed))
        whole = copy.deepcopy(statement)
        # the copy has the same shape, so the node is at the same place in it
        place = next(at for at, one in enumerate(ast.walk(statement)) if one is node)
        twin = next(one for at, one in enumerate(ast.walk(whole)) if at == place)
        return Mutant(number, getattr(node, "lineno", statement.lineno), _text(statement), _text(_Swap(twin, changed).visit(whole)))


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self._new if node is self._old else self.generic_visit(node)


def _text(node: ast.AST) -> str:
    """Return the source of a statement; of one with a body, its first line."""
    text = ast.unparse(node)
    return text.split("\n")[0] if hasattr(node, "body") and isinstance(node, ast.stmt) else text


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _alternatives(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(left, [operator], right) if type(operator) in _COMPARISONS:
            yield ast.Compare(left, [_COMPARISONS[type(operator)]()], right)
        case ast.Compare(left, [first, *rest], right) if rest and type(first) in _COMPARISONS:
            yield ast.Compare(left, [_COMPARISONS[type(first)](), *rest], right)
            if type(rest[0]) in _COMPARISONS:
                yield ast.Compare(left, [first, _COMPARISONS[type(rest[0])](), *rest[1:]], right)
        case ast.BinOp(left, operator, right) if type(operator) in _ARITHMETIC and not _is_text(left) and not _is_text(right):
            yield ast.BinOp(left, _ARITHMETIC[type(operator)](), right)
        case ast.AugAssign(target, operator, value) if type(operator) in _ARITHMETIC:
            yield ast.AugAssign(target, _ARITHMETIC[type(operator)](), value)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not() | ast.USub() | ast.Invert(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(str() as value) if _SQL.search(value):
            yield from (ast.Constant(changed) for changed in _changed_sql(value))
        case ast.JoinedStr(values) if any(_SQL.search(_constant_text(value)) for value in values):
            for at, value in enumerate(values):
                if isinstance(value, ast.Constant):
                    for changed in _changed_sql(_constant_text(value)):
                        yield ast.JoinedStr([*values[:at], ast.Constant(changed), *values[at + 1 :]])
        case ast.If(test, body, orelse) if _is_plain(test):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.IfExp(test, body, orelse) if _is_plain(test):
            yield ast.IfExp(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Expr(ast.Call() as call) if not _TOLD.match(ast.unparse(call)):
            yield ast.Pass()
        case ast.Continue():
            yield ast.Break()
        case ast.Break():
            yield ast.Continue()


def _constant_text(value: ast.expr) -> str:
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _is_plain(test: ast.expr) -> bool:
    """Whether no other change negates the condition."""
    return not isinstance(test, ast.Compare | ast.BoolOp) and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _changed_sql(text: str) -> Iterator[str]:
    for pattern, replacement in _SQL_CHANGES:
        for found in pattern.finditer(text):
            yield text[: found.start()] + replacement + text[found.end() :]
