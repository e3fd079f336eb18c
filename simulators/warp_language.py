"""Warp's kernel language, read from a user's function: one step written once, differentiable to second order.

`translate` runs the body of a plain Python function (or `wp.func`) on graphs of real numbers (`warp_graph`), takes its exact tangent
and the adjoints of both (`warp_dual`), and hands them back as Warp functions in float32 or float64 (`warp_source`). What a body
may hold: arithmetic on scalars, `wp.vector`, `wp.vec2/3/4`, matrices and quaternions, the functions in
`warp_algebra.FUNCTIONS`, `if`, conditional expressions, `for` over a `range` known beforehand, early `return`, and calls of other such
functions. Numbers from globals and closures become constants of the model's precision; integers are Python's (`1 / 2` is
0.5). Both sides of an `if` are computed and one is chosen. Anything else is refused with its file and line.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import textwrap
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import warp as wp

from sim2real.simulators.warp_algebra import (
    FUNCTIONS,
    Matrix,
    Mismatch,
    Quaternion,
    Value,
    Vector,
    add,
    choose,
    combine,
    compare,
    describe,
    divide,
    is_number,
    multiply,
    negate,
    parts,
    raise_to,
    select,
    subtract,
)
from sim2real.simulators.warp_dual import adjoints, tangents
from sim2real.simulators.warp_graph import Node, as_node, is_truth, variable
from sim2real.simulators.warp_native import native_function, unstacked

_UNROLLED = 4096  # iterations of all loops of one function together; longer code takes minutes to compile


class WarpLanguageError(ValueError):
    """A function holds something that cannot be translated; the message names the line, what was found and what to do."""


@dataclass(frozen=True)
class Undefined:
    """A name that only one branch of an `if` assigned."""

    line: int


@dataclass(frozen=True)
class Builtin:
    """A name of Warp's language that Python does not know, such as `wp.vector`."""

    name: str


@dataclass(frozen=True)
class Scope:
    """Where a body is read: its function's file, first line and captured names, and the functions that called it."""

    name: str
    file: str
    first_line: int
    captured: dict[str, Any]
    callers: tuple[Any, ...]
    arguments: tuple[str, ...]


def fail(scope: Scope, node: ast.AST, found: str, advice: str) -> NoReturn:
    line = scope.first_line + getattr(node, "lineno", 1) - 1
    raise WarpLanguageError(f"{scope.file}:{line}: {scope.name}: {found}; {advice}")


def run_function(
    function: Any, arguments: Sequence[Value], keywords: dict[str, Value], callers: tuple[Any, ...]
) -> Value:
    """What a user's function returns for these values."""
    scope, body, signature = _read(function, callers)
    try:
        bound = signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise WarpLanguageError(
            f"{scope.file}:{scope.first_line}: {scope.name}: {error}; pass what it declares"
        ) from None
    bound.apply_defaults()
    names: dict[str, Any] = dict(bound.arguments)
    returned = _run(body, names, replace(scope, arguments=tuple(names)))
    if returned is None:
        raise WarpLanguageError(
            f"{scope.file}:{scope.first_line}: {scope.name}: a path ends without `return`; return a value on every path"
        )
    return returned


def _read(function: Any, callers: tuple[Any, ...]) -> tuple[Scope, list[ast.stmt], inspect.Signature]:
    """Scope, statements and signature of a function."""
    plain = getattr(function, "func", None) or function if isinstance(function, wp.Function) else function
    code = getattr(plain, "__code__", None)
    if code is None or plain.__name__ == "<lambda>":
        raise WarpLanguageError(f"{function!r}: not a function written with `def`; write `def step(...)` in a file")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
    except (OSError, TypeError, SyntaxError) as error:
        raise WarpLanguageError(
            f"{code.co_filename}: {plain.__name__}: its source cannot be read ({error}); define it in a file"
        ) from None
    definition = tree.body[0]
    closure = inspect.getclosurevars(plain)
    scope = Scope(
        name=plain.__name__,
        file=code.co_filename,
        first_line=code.co_firstlineno,
        captured={**vars(builtins), **plain.__globals__, **closure.nonlocals},
        callers=(*callers, plain),
        arguments=(),
    )
    if not isinstance(definition, ast.FunctionDef):
        fail(scope, definition, "not a plain function", "write `def name(...):`")
    if plain in callers:
        fail(scope, definition, "it calls itself", "recursion cannot be unrolled; write a loop over a constant range")
    signature = inspect.signature(plain)
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            fail(scope, definition, f"the argument *{parameter.name}", "name every argument")
    return scope, definition.body, signature


# ---------------------------------------------------------------------------------------------------- statements


def _run(statements: Sequence[ast.stmt], names: dict[str, Any], scope: Scope) -> Value | None:
    """Run statements on `names` (updated); the returned value, or None where the end is reached."""
    for index, statement in enumerate(statements):
        rest = statements[index + 1 :]
        if isinstance(statement, ast.Return):
            if statement.value is None:
                fail(scope, statement, "`return` without a value", "return the next state or the reward")
            return _evaluate(statement.value, names, scope)
        if isinstance(statement, ast.If):
            condition = _condition(statement.test, names, scope)
            if isinstance(condition, bool):
                return _run([*(statement.body if condition else statement.orelse), *rest], names, scope)
            if _returns(statement):
                return _split(statement, condition, rest, names, scope)
            _branch(statement, condition, names, scope)
        elif isinstance(statement, ast.For):
            return _run([*_unrolled(statement, names, scope), *rest], names, scope)
        elif isinstance(statement, ast.Assign):
            value = _evaluate(statement.value, names, scope)
            for target in statement.targets:
                _assign(target, value, names, scope)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            _assign(statement.target, _evaluate(statement.value, names, scope), names, scope)
        elif isinstance(statement, ast.AugAssign):
            old = _evaluate(statement.target, names, scope)
            value = _evaluate(statement.value, names, scope)
            _assign(statement.target, _binary(statement, statement.op, old, value, scope), names, scope)
        elif not (isinstance(statement, ast.Pass) or _is_docstring(statement)):
            _refuse_statement(statement, scope)
    return None


def _refuse_statement(statement: ast.stmt, scope: Scope) -> NoReturn:
    advice = {
        ast.While: "a loop whose length depends on values has wrong derivatives; use `for i in range(constant)` with `if`",
        ast.Break: "let the loop run and choose with `if`",
        ast.Continue: "put the rest of the body under `if`",
        ast.Expr: "a step only computes values: no prints, no calls for their effect",
        ast.FunctionDef: "define it outside and call it",
    }.get(type(statement), "use assignments, `if`, `for` over a constant range and `return`")
    fail(scope, statement, f"`{ast.unparse(statement).splitlines()[0]}`", advice)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _returns(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Return) for node in ast.walk(statement))


def _split(
    statement: ast.If, condition: Node, rest: Sequence[ast.stmt], names: dict[str, Any], scope: Scope
) -> Value | None:
    """An `if` that may return: each side runs to the end of the function."""
    one = _run([*statement.body, *rest], dict(names), scope)
    other = _run([*statement.orelse, *rest], dict(names), scope)
    if one is None or other is None:
        return None
    return _chosen(condition, one, other, statement, scope, "`return`")


def _branch(statement: ast.If, condition: Node, names: dict[str, Any], scope: Scope) -> None:
    """An `if` whose sides assign; a name that only one of them knows is undefined afterwards."""
    one, other = dict(names), dict(names)
    _run(statement.body, one, scope)
    _run(statement.orelse, other, scope)
    for name in {**one, **other}:
        a, b = one.get(name), other.get(name)
        if name not in one or name not in other or isinstance(a, Undefined) or isinstance(b, Undefined):
            names[name] = Undefined(scope.first_line + statement.lineno - 1)
        elif a is not b:
            names[name] = _chosen(condition, a, b, statement, scope, f"`{name}`")


def _chosen(condition: Node, a: Any, b: Any, node: ast.AST, scope: Scope, what: str) -> Value:
    try:
        return choose(condition, a, b)
    except Mismatch as error:
        fail(scope, node, f"{what}: {error}", "both branches must give the same kind of value")


def _unrolled(loop: ast.For, names: dict[str, Any], scope: Scope) -> list[ast.stmt]:
    """The iterations of a loop one after the other."""
    call = loop.iter
    if not (
        isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range" and not call.keywords
    ):
        fail(scope, loop, f"a loop over `{ast.unparse(call)}`", "loop over `range` of constants")
    if not isinstance(loop.target, ast.Name) or loop.orelse:
        fail(scope, loop, "this form of `for`", "write `for i in range(constant):`")
    bounds = [_evaluate(argument, names, scope) for argument in call.args]
    if not bounds or not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds):
        found = " and ".join(describe(bound) for bound in bounds)
        fail(
            scope,
            loop,
            f"a `range` of {found}",
            "its bounds must be whole numbers known beforehand: a loop of variable length has wrong derivatives",
        )
    span = range(*bounds)
    if len(span) > _UNROLLED:
        fail(scope, loop, f"a loop of {len(span)} iterations", f"loops are unrolled, up to {_UNROLLED} iterations")
    statements: list[ast.stmt] = []
    for value in span:
        bind = ast.Assign(targets=[loop.target], value=ast.Constant(value))
        statements += [ast.copy_location(bind, loop), *loop.body]
    return statements


def _assign(target: ast.expr, value: Any, names: dict[str, Any], scope: Scope) -> None:
    if isinstance(target, ast.Name):
        names[target.id] = value
    elif isinstance(target, ast.Tuple | ast.List):
        values = value.items if isinstance(value, Vector) else value
        if not isinstance(values, tuple) or len(values) != len(target.elts):
            fail(scope, target, f"{len(target.elts)} names for {describe(value)}", "assign as many values as names")
        for part, item in zip(target.elts, values, strict=True):
            _assign(part, item, names, scope)
    elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
        _store(target, value, names, scope)
    else:
        fail(
            scope,
            target,
            f"assignment to `{ast.unparse(target)}`",
            "assign to a name or to a component of a local vector",
        )


def _store(target: ast.Subscript, value: Any, names: dict[str, Any], scope: Scope) -> None:
    """`v[i] = x` of a local vector or matrix: a new value under the same name."""
    assert isinstance(target.value, ast.Name)
    name = target.value.id
    if name in scope.arguments or name not in names:
        fail(
            scope,
            target,
            f"a write into `{name}`",
            "arguments are not written to; build a new vector with wp.vector(...)",
        )
    whole = _evaluate(target.value, names, scope)
    index = _evaluate(target.slice, names, scope)
    if not is_number(value):
        fail(scope, target, f"a component set to {describe(value)}", "a component is a number")
    if isinstance(whole, Vector | Quaternion) and isinstance(index, int):
        position = _position(index, len(whole.items), target, scope)
        items = tuple(value if k == position else x for k, x in enumerate(whole.items))
        names[name] = Vector(items) if isinstance(whole, Vector) else Quaternion(items)
    elif isinstance(whole, Matrix) and isinstance(index, tuple) and len(index) == 2:
        i = _position(index[0], len(whole.rows), target, scope)
        j = _position(index[1], len(whole.rows[0]), target, scope)
        rows = [list(row) for row in whole.rows]
        rows[i][j] = value
        names[name] = Matrix(tuple(tuple(row) for row in rows))
    else:
        fail(
            scope,
            target,
            f"a write into {describe(whole)}",
            "write single components of vectors and matrices at constant indices",
        )


# --------------------------------------------------------------------------------------------------- expressions


def _condition(node: ast.expr, names: dict[str, Any], scope: Scope) -> Node | bool:
    value = _evaluate(node, names, scope)
    if isinstance(value, bool) or (isinstance(value, Node) and is_truth(value)):
        return value
    if isinstance(value, int | float):
        return bool(value)
    fail(scope, node, f"{describe(value)} as a condition", "compare it with something, for example `x > 0.0`")


def _evaluate(node: ast.expr, names: dict[str, Any], scope: Scope) -> Any:
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
        return tuple(_evaluate(item, names, scope) for item in node.elts)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, names, scope), _evaluate(node.right, names, scope)
        return _binary(node, node.op, left, right, scope)
    if isinstance(node, ast.UnaryOp):
        return _unary(node, _evaluate(node.operand, names, scope), scope)
    if isinstance(node, ast.BoolOp):
        word = "and" if isinstance(node.op, ast.And) else "or"
        return _guarded(node, scope, combine, word, [_evaluate(value, names, scope) for value in node.values])
    if isinstance(node, ast.Compare):
        values = [_evaluate(value, names, scope) for value in (node.left, *node.comparators)]
        links = [
            _guarded(node, scope, compare, _comparison(operation, node, scope), a, b)
            for operation, a, b in zip(node.ops, values[:-1], values[1:], strict=True)
        ]
        return links[0] if len(links) == 1 else combine("and", links)
    if isinstance(node, ast.IfExp):
        condition = _condition(node.test, names, scope)
        if isinstance(condition, bool):
            return _evaluate(node.body if condition else node.orelse, names, scope)
        a, b = _evaluate(node.body, names, scope), _evaluate(node.orelse, names, scope)
        return _chosen(condition, a, b, node, scope, "`a if c else b`")
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
        return _captured(scope.captured[node.id], node, scope)
    fail(scope, node, f"the unknown name `{node.id}`", "assign it first")


def _captured(value: Any, node: ast.expr, scope: Scope) -> Any:
    """A global or closure value: a number, a constant vector, or something callable or a module that is looked into later."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, wp.float16 | wp.float32 | wp.float64 | wp.int32 | wp.int64):
        return value.value
    shape = getattr(type(value), "_shape_", None)
    if shape is not None and not isinstance(value, type):
        numbers = [[float(x) for x in row] for row in value] if len(shape) == 2 else [float(x) for x in value]
        return _built(type(value), numbers if len(shape) == 1 else [x for row in numbers for x in row])
    if hasattr(value, "item") and getattr(value, "shape", None) == () and not isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, torch.Tensor):
        fail(
            scope,
            node,
            f"the tensor `{ast.unparse(node)}`",
            "make it a parameter of the model, or take float(...) of it outside",
        )
    if isinstance(value, tuple | list) and all(isinstance(item, bool | int | float) for item in value):
        return tuple(value)
    return value


def _built(kind: Any, items: Sequence[Any]) -> Value:
    """A value of a Warp type from its scalars."""
    label, shape = kind._wp_generic_type_str_, kind._shape_
    if label == "quat_t":
        return Quaternion(tuple(items))
    if len(shape) == 2:
        return Matrix(tuple(tuple(items[k * shape[1] : (k + 1) * shape[1]]) for k in range(shape[0])))
    return Vector(tuple(items))


def _attribute(node: ast.Attribute, names: dict[str, Any], scope: Scope) -> Any:
    value = _evaluate(node.value, names, scope)
    if isinstance(value, Vector | Quaternion):
        fields = value.fields if isinstance(value, Vector) and value.fields else ("x", "y", "z", "w")
        if node.attr in fields[: len(value.items)]:
            return value.items[fields.index(node.attr)]
        fail(scope, node, f"`{ast.unparse(node)}`", f"it has {', '.join(fields[: len(value.items)])}")
    if value is wp and node.attr in _CONSTRUCTORS:
        return Builtin(node.attr)
    if isinstance(value, Node | Matrix | tuple) or not hasattr(value, node.attr):
        fail(scope, node, f"`{ast.unparse(node)}`", "there is no such attribute")
    return _captured(getattr(value, node.attr), node, scope)


def _component(node: ast.Subscript, names: dict[str, Any], scope: Scope) -> Any:
    whole = _evaluate(node.value, names, scope)
    if isinstance(node.slice, ast.Slice):
        bounds = [
            None if b is None else _evaluate(b, names, scope)
            for b in (node.slice.lower, node.slice.upper, node.slice.step)
        ]
        if not isinstance(whole, Vector) or not all(b is None or isinstance(b, int) for b in bounds):
            fail(scope, node, f"`{ast.unparse(node)}`", "slice vectors, with constant bounds")
        return Vector(whole.items[slice(*bounds)])
    index = _evaluate(node.slice, names, scope)
    if isinstance(whole, Matrix) and isinstance(index, tuple) and len(index) == 2:
        row = whole.rows[_position(index[0], len(whole.rows), node, scope)]
        return row[_position(index[1], len(row), node, scope)]
    if isinstance(whole, Matrix):
        return Vector(whole.rows[_position(index, len(whole.rows), node, scope)])
    items = whole.items if isinstance(whole, Vector | Quaternion) else whole
    if not isinstance(items, tuple):
        fail(
            scope,
            node,
            f"an index into {describe(whole)}",
            "only vectors, matrices, quaternions and tuples have components",
        )
    return items[_position(index, len(items), node, scope)]


def _position(index: Any, size: int, node: ast.AST, scope: Scope) -> int:
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


def _binary(node: ast.AST, operation: ast.operator, a: Any, b: Any, scope: Scope) -> Any:
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
    function = _evaluate(node.func, names, scope)
    if any(isinstance(argument, ast.Starred) for argument in node.args) or any(
        word.arg is None for word in node.keywords
    ):
        fail(scope, node, f"`{ast.unparse(node)}`", "write the arguments one by one")
    words = {word.arg: word.value for word in node.keywords if word.arg is not None}
    dtype = words.pop("dtype", None)  # the model's precision decides
    arguments = [_evaluate(argument, names, scope) for argument in node.args]
    keywords = {name: _evaluate(value, names, scope) for name, value in words.items()}
    if dtype is not None and not _constructs(function):
        keywords["dtype"] = None
    operation = _operation(function)
    if operation is not None:
        return _guarded(node, scope, operation, *arguments, **keywords)
    plain = function.func if isinstance(function, wp.Function) and not function.is_builtin() else function
    if inspect.isfunction(plain):
        return run_function(plain, arguments, keywords, scope.callers)
    known = ", ".join(sorted(FUNCTIONS))
    fail(
        scope,
        node,
        f"the function `{ast.unparse(node.func)}`",
        f"its derivative is not known; known are {known} and your own functions",
    )


def _constructs(function: Any) -> bool:
    return isinstance(function, Builtin)


def _operation(function: Any) -> Callable[..., Any] | None:
    """The rule of a builtin function or type, None for a user's function."""
    if function is wp.static:
        return lambda value: value
    if isinstance(function, Builtin):
        return _CONSTRUCTORS[function.name]
    if isinstance(function, wp.Function) and function.is_builtin():
        return FUNCTIONS.get(function.key)
    if isinstance(function, type):
        if function in (float, wp.float32, wp.float64):
            return _to_number
        if hasattr(function, "_wp_generic_type_str_"):
            return lambda *items: _constructed(function, items)
        return {int: _to_whole, bool: _to_bool}.get(function)
    if not isinstance(function, Hashable):
        return None
    return {abs: FUNCTIONS["abs"], min: FUNCTIONS["min"], max: FUNCTIONS["max"], pow: raise_to, len: _count}.get(
        function
    )


def _to_number(value: Any) -> Any:
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Node) and is_truth(value):
        return select(value, 1.0, 0.0)
    if is_number(value):
        return value
    raise Mismatch(f"float of {describe(value)}")


def _to_whole(value: Any) -> int:
    if isinstance(value, int | float):
        return int(value)
    raise Mismatch(f"int of {describe(value)}, whose derivative is lost: use wp.floor")


def _to_bool(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return bool(value)
    if isinstance(value, Node) and is_truth(value):
        return value
    raise Mismatch(f"bool of {describe(value)}: compare it")


def _count(value: Any) -> int:
    if isinstance(value, Vector | Quaternion | tuple):
        return len(value.items) if not isinstance(value, tuple) else len(value)
    raise Mismatch(f"len of {describe(value)}")


def _constructed(kind: Any, items: Sequence[Value]) -> Value:
    """`wp.vec3(...)`, `wp.quat(...)`, `wp.mat33(...)`: from nothing (zeros), one number (all alike), or all components."""
    size = math.prod(kind._shape_)
    flat = [x for item in items for x in parts(item)]
    if kind._wp_generic_type_str_ == "mat_t" and items and all(isinstance(item, Vector) for item in items):
        raise Mismatch("a matrix of vectors: use wp.matrix_from_rows or wp.matrix_from_cols")
    if not all(is_number(x) for x in flat):
        raise Mismatch(f"{kind.__name__} of {' and '.join(describe(item) for item in items)}")
    if len(flat) <= 1 and size > 1:
        flat = (flat or [0.0]) * size
    if len(flat) != size:
        raise Mismatch(f"{kind.__name__} of {len(flat)} numbers, it has {size}")
    return _built(kind, flat)


def _vector(*items: Value, length: int | None = None) -> Vector:
    flat = tuple(x for item in items for x in parts(item))
    if not all(is_number(x) for x in flat):
        raise Mismatch(f"wp.vector of {' and '.join(describe(item) for item in items)}")
    if length is not None and len(flat) <= 1:
        flat = (flat or (0.0,)) * length
    if not flat or (length is not None and len(flat) != length):
        raise Mismatch(f"wp.vector of {len(flat)} numbers{'' if length is None else f', length={length}'}")
    return Vector(flat)


def _matrix(*items: Value, shape: tuple[int, int] | None = None) -> Matrix:
    if shape is None:
        raise Mismatch("wp.matrix without shape=(rows, columns)")
    value = _constructed(wp.types.matrix(shape=shape, dtype=wp.float64), items)
    assert isinstance(value, Matrix)
    return value


def _unit(n: int | None = None) -> Matrix:
    if not isinstance(n, int):
        raise Mismatch("wp.identity without a constant n=")
    return Matrix(tuple(tuple(float(i == j) for j in range(n)) for i in range(n)))


_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "vector": _vector,
    "matrix": _matrix,
    "identity": _unit,
    "quaternion": lambda *items: _constructed(wp.quatd, items),
}


@dataclass(frozen=True)
class Argument:
    """An argument of a step or reward: a vector of `length` components, or a scalar for None.

    `fields` names the components (`theta.mass`); what is not `active` has no tangent in the dual. Length 0 is an argument without
    components (no noise): its Warp type has one that is not used.
    """

    name: str
    length: int | None
    fields: tuple[str, ...] | None = None
    active: bool = True


@dataclass(frozen=True)
class Translated:
    """`primal(x, ...) -> y` and `dual(x, dx, ...) -> y, dy` (an inactive x without its dx) as Warp functions, each with its adjoint."""

    name: str
    arguments: tuple[Argument, ...]
    length: int | None  # components of the result, None for a scalar
    precision: torch.dtype
    primal: Any
    dual: Any
    inputs: tuple[tuple[Node, ...], ...]  # the graph's inputs: the components of each argument,
    moves: tuple[tuple[Node, ...], ...]  # those of their tangents,
    value: tuple[Node, ...]  # and its result


def translate(
    function: Callable[..., Any], arguments: tuple[Argument, ...], *, precision: torch.dtype = torch.float64
) -> Translated:
    """Read a function written in Warp's language and return it, with its derivatives, in the given precision.

    `function(x, ...)` takes the declared arguments in order and returns a scalar or a vector. Raises `WarpLanguageError` with file and
    line for what cannot be translated.
    """
    values, inputs, moves = [], [], []
    for argument in arguments:
        size = 1 if argument.length is None else argument.length
        inputs.append([_input(argument, f"x_{argument.name}", k) for k in range(size)])
        moves.append([_input(argument, f"d_{argument.name}", k) for k in range(size)] if argument.active else [])
        items = tuple(inputs[-1])
        values.append(items[0] if argument.length is None else Vector(items, argument.fields or ()))
    result = run_function(function, values, {}, ())
    label = getattr(function, "__name__", "function")
    if not (is_number(result) or isinstance(result, Vector)):
        raise WarpLanguageError(f"{label} returns {describe(result)}; return a number or wp.vector(...)")
    length = len(result.items) if isinstance(result, Vector) else None
    primal = [as_node(item) for item in parts(result)]
    dual = tangents(primal, {x: d for xs, ds in zip(inputs, moves, strict=True) for x, d in zip(xs, ds, strict=False)})
    plain = tuple((f"x_{argument.name}", argument.length) for argument in arguments)
    width = 1 if length is None else length
    reply = [variable("adj_ret" if length is None else f"adj_ret[{k}]") for k in range(width)]
    both = [variable(f"adj_ret[{k}]") for k in range(2 * width)]
    paired, names = [], []
    for (name, size), argument, xs, ds in zip(plain, arguments, inputs, moves, strict=True):
        paired += [(name, size, xs)] + ([(f"d_{argument.name}", size, ds)] if argument.active else [])
        names += [name] + ([f"d_{argument.name}"] if argument.active else [])
    primal_function = native_function(
        f"{label}_primal", plain, length, primal, _grouped(adjoints(primal, reply, sum(inputs, [])), inputs), precision
    )
    rows = [xs for _, _, xs in paired]
    stacked = native_function(
        f"{label}_stacked",
        tuple((name, size) for name, size, _ in paired),
        2 * width,
        [*primal, *dual],
        _grouped(adjoints([*primal, *dual], both, sum(rows, [])), rows),
        precision,
    )
    signature = tuple((name, size) for name, size, _ in paired)
    return Translated(
        label,
        arguments,
        length,
        precision,
        primal_function,
        unstacked(stacked, f"{label}_dual", signature, length, precision),
        tuple(tuple(xs) for xs in inputs),
        tuple(tuple(ds) for ds in moves),
        tuple(primal),
    )


def _input(argument: Argument, name: str, index: int) -> Node:
    return variable(name if argument.length is None else f"{name}[{index}]")


def _grouped(flat: Sequence[Node], like: Sequence[Sequence[Node]]) -> list[list[Node]]:
    rest = iter(flat)
    return [[next(rest) for _ in row] for row in like]
