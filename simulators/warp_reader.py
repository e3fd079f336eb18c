"""Statements of a user's function, run once on graphs: branches become choices, loops are unrolled, calls entered."""

from __future__ import annotations

import ast
import builtins
import inspect
import itertools
import textwrap
from collections import ChainMap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any, NoReturn

import warp as wp

from sim2real.simulators.warp_algebra import Matrix, Quaternion, Value, Vector, describe, is_number
from sim2real.simulators.warp_builtins import is_warps
from sim2real.simulators.warp_expressions import (
    Scope,
    Undefined,
    WarpLanguageError,
    binary,
    chosen,
    condition_of,
    evaluate,
    fail,
    position,
)
from sim2real.simulators.warp_graph import Node

_UNROLLED = 4096  # iterations of all loops of a function; longer code takes minutes to compile


def frozen(function: Any, copies: dict[Any, Any] | None = None) -> Any:
    """A copy of a user's function that keeps today's globals and closure, as do the functions that it calls by name.

    A model is read again for the other precision and for policies inside the kernel: numbers from outside must be the
    same then. What is not a function is returned as it is.
    """
    copies = {} if copies is None else copies
    if isinstance(function, list):
        return list(function)
    plain: Any = getattr(function, "func", None) or function if isinstance(function, wp.Function) else function
    if not inspect.isfunction(plain) or is_warps(plain):
        return function
    if plain not in copies:
        code, names, cells = plain.__code__, plain.__globals__, plain.__closure__ or ()
        space: dict[str, Any] = {"__name__": plain.__module__}
        inner = tuple(CellType() for _ in cells)
        copy = FunctionType(code, space, plain.__name__, plain.__defaults__, inner or None)
        copy.__kwdefaults__, copies[plain] = plain.__kwdefaults__, copy  # known before those it calls are copied
        space.update((name, frozen(names[name], copies)) for name in code.co_names if name in names)
        for old, new in zip(cells, inner, strict=True):
            with suppress(ValueError):  # a variable of the outer function that has no value yet
                new.cell_contents = frozen(old.cell_contents, copies)
    return copies[plain]


def run_function(
    function: Any, arguments: Sequence[Value], keywords: dict[str, Value], caller: Scope | None = None
) -> Value:
    """What a user's function returns for these values, called from the scope `caller`."""
    scope, body, signature = _read(function, caller)
    try:
        bound = signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise WarpLanguageError(
            f"{scope.file}:{scope.first_line}: {scope.name}: {error}; pass what it declares"
        ) from None
    bound.apply_defaults()
    names: dict[str, Any] = dict(bound.arguments)
    returned = run_block(body, names, replace(scope, arguments=tuple(names)))
    if returned is None:
        raise WarpLanguageError(
            f"{scope.file}:{scope.first_line}: {scope.name}: a path ends without `return`; return a value on every path"
        )
    return returned


def _read(function: Any, caller: Scope | None) -> tuple[Scope, list[ast.stmt], inspect.Signature]:
    """Scope, statements and signature of a function."""
    plain: Any = getattr(function, "func", None) or function if isinstance(function, wp.Function) else function
    code = getattr(plain, "__code__", None)
    if code is None or plain.__name__ == "<lambda>":
        raise WarpLanguageError(f"{function!r}: not a function written with `def`; write `def step(...)` in a file")
    definition = _definition(code)
    closure: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, plain.__closure__ or (), strict=True):
        with suppress(ValueError):  # a variable of the outer function that has no value yet
            closure[name] = cell.cell_contents
    callers = caller.callers if caller else ()
    scope = Scope(
        name=plain.__name__,
        file=code.co_filename,
        first_line=code.co_firstlineno,
        captured=ChainMap(closure, plain.__globals__, vars(builtins)),
        callers=(*callers, plain),
        arguments=(),
        enter=run_function,
        iterations=caller.iterations if caller else itertools.count(1),
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


@lru_cache(maxsize=256)
def _definition(code: CodeType) -> ast.stmt:
    """The `def` statement that was compiled to this code."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise WarpLanguageError(
            f"{code.co_filename}: {code.co_name}: its source cannot be read ({error}); define it in a file"
        ) from None


def run_block(statements: Sequence[ast.stmt], names: dict[str, Any], scope: Scope) -> Value | None:
    """Run statements on `names` (updated); the returned value, or None where the end is reached."""
    pending = list(reversed(statements))
    while pending:
        statement = pending.pop()
        if isinstance(statement, ast.Return):
            if statement.value is None:
                fail(scope, statement, "`return` without a value", "return the next state or the reward")
            return evaluate(statement.value, names, scope)
        if isinstance(statement, ast.If):
            condition = condition_of(statement.test, names, scope)
            if isinstance(condition, bool):
                pending += reversed(statement.body if condition else statement.orelse)
            elif _returns(statement):
                return _split(statement, condition, pending[::-1], names, scope)
            else:
                _branch(statement, condition, names, scope)
        elif isinstance(statement, ast.For):
            pending += reversed(_unrolled(statement, names, scope))
        elif isinstance(statement, ast.Assign):
            value = evaluate(statement.value, names, scope)
            for target in statement.targets:
                _assign(target, value, names, scope)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            _assign(statement.target, evaluate(statement.value, names, scope), names, scope)
        elif isinstance(statement, ast.AugAssign):
            old = evaluate(statement.target, names, scope)
            value = evaluate(statement.value, names, scope)
            _assign(statement.target, binary(statement, statement.op, old, value, scope), names, scope)
        elif not (isinstance(statement, ast.Pass) or _is_docstring(statement)):
            _refuse_statement(statement, scope)
    return None


def _refuse_statement(statement: ast.stmt, scope: Scope) -> NoReturn:
    advice = {
        ast.While: "a loop of variable length has wrong derivatives; use `for i in range(constant)` with `if`",
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
    one = run_block([*statement.body, *rest], dict(names), scope)
    other = run_block([*statement.orelse, *rest], dict(names), scope)
    if one is None or other is None:
        return None
    return chosen(condition, one, other, statement, scope, "`return`")


def _branch(statement: ast.If, condition: Node, names: dict[str, Any], scope: Scope) -> None:
    """An `if` whose sides assign; a name that only one of them knows is undefined afterwards."""
    one, other = dict(names), dict(names)
    run_block(statement.body, one, scope)
    run_block(statement.orelse, other, scope)
    for name in {**one, **other}:
        a, b = one.get(name), other.get(name)
        if name not in one or name not in other or isinstance(a, Undefined) or isinstance(b, Undefined):
            names[name] = Undefined(scope.first_line + statement.lineno - 1)
        elif a is not b:
            names[name] = chosen(condition, a, b, statement, scope, f"`{name}`")


def _unrolled(loop: ast.For, names: dict[str, Any], scope: Scope) -> list[ast.stmt]:
    """The iterations of a loop one after the other."""
    call = loop.iter
    if not (
        isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range" and not call.keywords
    ):
        fail(scope, loop, f"a loop over `{ast.unparse(call)}`", "loop over `range` of constants")
    if not isinstance(loop.target, ast.Name) or loop.orelse:
        fail(scope, loop, "this form of `for`", "write `for i in range(constant):`")
    bounds = [evaluate(argument, names, scope) for argument in call.args]
    if not bounds or not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds):
        found = " and ".join(describe(bound) for bound in bounds)
        fail(
            scope,
            loop,
            f"a `range` of {found}",
            "its bounds must be whole numbers known beforehand: a loop of variable length has wrong derivatives",
        )
    span = range(*bounds)
    statements: list[ast.stmt] = []
    for value in span:
        if next(scope.iterations) > _UNROLLED:
            fail(scope, loop, f"more than {_UNROLLED} iterations of loops", "loops are unrolled: write fewer")
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
    whole = evaluate(target.value, names, scope)
    index = evaluate(target.slice, names, scope)
    if not is_number(value):
        fail(scope, target, f"a component set to {describe(value)}", "a component is a number")
    if isinstance(whole, Vector | Quaternion) and isinstance(index, int):
        place = position(index, len(whole.items), target, scope)
        items = tuple(value if k == place else x for k, x in enumerate(whole.items))
        names[name] = Vector(items) if isinstance(whole, Vector) else Quaternion(items)
    elif isinstance(whole, Matrix) and isinstance(index, tuple) and len(index) == 2:
        i = position(index[0], len(whole.rows), target, scope)
        j = position(index[1], len(whole.rows[0]), target, scope)
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
