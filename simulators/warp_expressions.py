"""Expressions of a user's function, evaluated on graphs of real numbers; what is not known is refused with its line."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import warp as wp

from sim2real.simulators.warp_algebra import (
    Matrix,
    Mismatch,
    Quaternion,
    Value,
    Vector,
    add,
    choose,
    describe,
    divide,
    is_condition,
    multiply,
    negate,
    raise_to,
    subtract,
)
from sim2real.simulators.warp_builtins import (
    FUNCTIONS,
    Builtin,
    captured,
    combine,
    compare,
    is_warps,
    language_name,
    operation,
)
from sim2real.simulators.warp_graph import Node


class WarpLanguageError(ValueError):
    """A function holds something that cannot be translated; the message says where, what, and what to write instead."""


@dataclass(frozen=True)
class Undefined:
    """A name that only one branch of an `if` assigned."""

    line: int


@dataclass(frozen=True)
class Scope:
    """Where a body is read: its function's file, first line and captured names, and the functions that called it."""

    name: str
    file: str
    first_line: int
    captured: Mapping[str, Any]
    callers: tuple[Any, ...]
    arguments: tuple[str, ...]
    enter: Callable[..., Value]  # runs another function of the user
    iterations: Iterator[int]  # of all loops together


def fail(scope: Scope, node: ast.AST, found: str, advice: str) -> NoReturn:
    """Raise `WarpLanguageError` with file, line and function of the user's code, what stands there, what to write."""
    line = scope.first_line + getattr(node, "lineno", 1) - 1
    raise WarpLanguageError(f"{scope.file}:{line}: {scope.name}: {found}; {advice}")


def condition_of(node: ast.expr, names: dict[str, Any], scope: Scope) -> Node | bool:
    """The value of an expression where a condition is wanted; a number counts as in Python."""
    value = evaluate(node, names, scope)
    if is_condition(value):
        return value
    if isinstance(value, int | float):
        return bool(value)
    fail(scope, node, f"{describe(value)} as a condition", "compare it with something, for example `x > 0.0`")


def chosen(condition: Node, a: Any, b: Any, node: ast.AST, scope: Scope, what: str) -> Value:
    """`a` where the condition holds, else `b`; refuses branches of different form."""
    try:
        return choose(condition, a, b)
    except Mismatch as error:
        fail(scope, node, f"{what}: {error}", "both branches must give the same kind of value")


def evaluate(node: ast.expr, names: dict[str, Any], scope: Scope) -> Any:
    """The value of a Python expression of a kernel: constants are folded, the rest becomes graph nodes."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool | int | float):
            return node.value
        fail(scope, node, f"the constant {node.value!r}", "a step computes with numbers only")
    if isinstance(node, ast.Name):
        return _name(node, names, scope)
    if isinstance(node, ast.Attribute):
        return _attribute(node, names, scope)
    if isinstance(node, ast.Subscript):
        return _component(node, names, scope)
    if isinstance(node, ast.Tuple):
        return tuple(evaluate(item, names, scope) for item in node.elts)
    if isinstance(node, ast.BinOp):
        left, right = evaluate(node.left, names, scope), evaluate(node.right, names, scope)
        return binary(node, node.op, left, right, scope)
    if isinstance(node, ast.UnaryOp):
        return _unary(node, evaluate(node.operand, names, scope), scope)
    if isinstance(node, ast.BoolOp):
        word = "and" if isinstance(node.op, ast.And) else "or"
        return _guarded(node, scope, combine, word, [evaluate(value, names, scope) for value in node.values])
    if isinstance(node, ast.Compare):
        values = [evaluate(value, names, scope) for value in (node.left, *node.comparators)]
        links = [
            _guarded(node, scope, compare, _comparison(operation, node, scope), a, b)
            for operation, a, b in zip(node.ops, values[:-1], values[1:], strict=True)
        ]
        return links[0] if len(links) == 1 else combine("and", links)
    if isinstance(node, ast.IfExp):
        condition = condition_of(node.test, names, scope)
        if isinstance(condition, bool):
            return evaluate(node.body if condition else node.orelse, names, scope)
        a, b = evaluate(node.body, names, scope), evaluate(node.orelse, names, scope)
        return chosen(condition, a, b, node, scope, "`a if c else b`")
    if isinstance(node, ast.Call):
        return _call(node, names, scope)
    fail(scope, node, f"`{ast.unparse(node)}`", "use numbers, names, arithmetic, comparisons and calls")


def _name(node: ast.Name, names: dict[str, Any], scope: Scope) -> Any:
    if node.id in names:
        value = names[node.id]
        if isinstance(value, Undefined):
            fail(
                scope,
                node,
                f"`{node.id}` has a value on one branch only of the `if` in line {value.line}",
                "assign it on both",
            )
        return value
    if node.id in scope.captured:
        return _guarded(node, scope, captured, scope.captured[node.id])
    fail(scope, node, f"the unknown name `{node.id}`", "assign it first")


def _attribute(node: ast.Attribute, names: dict[str, Any], scope: Scope) -> Any:
    value = evaluate(node.value, names, scope)
    if isinstance(value, Vector | Quaternion):
        fields = value.fields if isinstance(value, Vector) and value.fields else ("x", "y", "z", "w")
        if node.attr in fields[: len(value.items)]:
            return value.items[fields.index(node.attr)]
        fail(scope, node, f"`{ast.unparse(node)}`", f"it has {', '.join(fields[: len(value.items)])}")
    if value is wp and language_name(node.attr) is not None:
        return language_name(node.attr)
    if isinstance(value, Node | Matrix | tuple) or not hasattr(value, node.attr):
        fail(scope, node, f"`{ast.unparse(node)}`", "there is no such attribute")
    return _guarded(node, scope, captured, getattr(value, node.attr))


def _component(node: ast.Subscript, names: dict[str, Any], scope: Scope) -> Any:
    whole = evaluate(node.value, names, scope)
    if isinstance(node.slice, ast.Slice):
        bounds = [
            None if b is None else evaluate(b, names, scope)
            for b in (node.slice.lower, node.slice.upper, node.slice.step)
        ]
        if not isinstance(whole, Vector) or not all(b is None or isinstance(b, int) for b in bounds):
            fail(scope, node, f"`{ast.unparse(node)}`", "slice vectors, with constant bounds")
        return Vector(whole.items[slice(*bounds)])
    index = evaluate(node.slice, names, scope)
    if isinstance(whole, Matrix) and isinstance(index, tuple) and len(index) == 2:
        row = whole.rows[position(index[0], len(whole.rows), node, scope)]
        return row[position(index[1], len(row), node, scope)]
    if isinstance(whole, Matrix):
        return Vector(whole.rows[position(index, len(whole.rows), node, scope)])
    items = whole.items if isinstance(whole, Vector | Quaternion) else whole
    if not isinstance(items, tuple):
        fail(
            scope,
            node,
            f"an index into {describe(whole)}",
            "only vectors, matrices, quaternions and tuples have components",
        )
    return items[position(index, len(items), node, scope)]


def position(index: Any, size: int, node: ast.AST, scope: Scope) -> int:
    """A constant index as 0 <= index < size; negative ones count from the end."""
    if not isinstance(index, int) or isinstance(index, bool):
        fail(scope, node, f"{describe(index)} as an index", "indices are whole numbers known beforehand")
    if not -size <= index < size:
        fail(scope, node, f"index {index} of {size} components", f"use 0 to {size - 1}" if size else "it has none")
    return index % size


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: add,
    ast.Sub: subtract,
    ast.Mult: multiply,
    ast.MatMult: multiply,
    ast.Div: divide,
    ast.Pow: raise_to,
}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}


def _comparison(operation: ast.cmpop, node: ast.expr, scope: Scope) -> str:
    if type(operation) not in _COMPARISONS:
        fail(scope, node, f"`{ast.unparse(node)}`", "compare numbers with < <= > >= == !=")
    return _COMPARISONS[type(operation)]


def binary(node: ast.AST, operation: ast.operator, a: Any, b: Any, scope: Scope) -> Any:
    """The value of `a <operation> b`."""
    if isinstance(operation, ast.FloorDiv | ast.Mod) and isinstance(a, int | float) and isinstance(b, int | float):
        return a // b if isinstance(operation, ast.FloorDiv) else a % b
    if type(operation) not in _OPERATORS:
        fail(scope, node, f"`{ast.unparse(node)}`", "use + - * / ** @; a remainder is x - y * wp.floor(x / y)")
    return _guarded(node, scope, _OPERATORS[type(operation)], a, b)


def _unary(node: ast.UnaryOp, value: Any, scope: Scope) -> Any:
    if isinstance(node.op, ast.USub):
        return _guarded(node, scope, negate, value)
    if isinstance(node.op, ast.Not):
        return _guarded(node, scope, combine, "not", [value])
    if isinstance(node.op, ast.UAdd):
        return value
    fail(scope, node, f"`{ast.unparse(node)}`", "use - or not")


def _guarded(node: ast.AST, scope: Scope, operation: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """An operation whose complaints are given the line."""
    try:
        return operation(*arguments, **keywords)
    except Mismatch as error:
        fail(scope, node, str(error), "change the operands to values that fit")
    except (ArithmeticError, ValueError) as error:
        if isinstance(error, WarpLanguageError):
            raise
        fail(scope, node, f"`{ast.unparse(node)}` of constants: {error}", "it has no value")
    except (TypeError, AttributeError) as error:
        found = " and ".join(describe(argument) for argument in arguments)
        fail(
            scope,
            node,
            f"`{ast.unparse(node)}` with {found or 'no arguments'} ({error})",
            "pass the arguments it takes",
        )


def _call(node: ast.Call, names: dict[str, Any], scope: Scope) -> Any:
    function = evaluate(node.func, names, scope)
    if any(isinstance(argument, ast.Starred) for argument in node.args) or any(
        word.arg is None for word in node.keywords
    ):
        fail(scope, node, f"`{ast.unparse(node)}`", "write the arguments one by one")
    words = {word.arg: word.value for word in node.keywords if word.arg is not None}
    dtype = words.pop("dtype", None)  # the model's precision decides
    arguments = [evaluate(argument, names, scope) for argument in node.args]
    keywords = {name: evaluate(value, names, scope) for name, value in words.items()}
    if dtype is not None and not isinstance(function, Builtin):
        keywords["dtype"] = None
    rule = operation(function)
    if rule is not None:
        return _guarded(node, scope, rule, *arguments, **keywords)
    plain = function.func if isinstance(function, wp.Function) and not function.is_builtin() else function
    if inspect.isfunction(plain) and not is_warps(plain):
        return scope.enter(plain, arguments, keywords, scope)
    known = ", ".join(sorted(FUNCTIONS))
    fail(
        scope,
        node,
        f"the function `{ast.unparse(node.func)}`",
        f"its derivative is not known; known are {known} and your own functions",
    )
