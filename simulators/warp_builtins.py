"""What a kernel may call: the functions, types and casts of Warp's language that have derivatives here.

As in Warp, `wp.sign(0)` is 1 and a normalized zero vector is zero. Kinks are differentiated as in `warp_dual`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import warp as wp

from sim2real.simulators.warp_algebra import (
    Matrix,
    Mismatch,
    Quaternion,
    Real,
    Value,
    Vector,
    add,
    as_truth,
    choose,
    cross,
    describe,
    determinant,
    divide,
    dot,
    inverse,
    is_condition,
    is_number,
    length,
    like,
    multiply,
    need_numbers,
    need_vectors,
    negate,
    normalize,
    outer,
    parts,
    quat_from_axis_angle,
    quat_inverse,
    quat_rotate,
    quat_rotate_inv,
    quat_to_matrix,
    raise_to,
    same_form,
    subtract,
    trace,
    transpose,
)
from sim2real.simulators.warp_graph import (
    Node,
    apply,
    both,
    either,
    equal,
    is_truth,
    less,
    less_equal,
    negation,
    select,
)


@dataclass(frozen=True)
class Builtin:
    """A name of Warp's language that Python does not know, such as `wp.vector`."""

    name: str


def language_name(name: str) -> Builtin | None:
    """`wp.name` where only Warp's compiler knows it."""
    return Builtin(name) if name in _CONSTRUCTORS else None


def captured(value: Any) -> Any:
    """A global or closure value as the kernel sees it: a number or constant vector; functions and modules unchanged."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, torch.Tensor):
        raise Mismatch("a tensor: make it a parameter of the model, or take float(...) of it outside")
    if isinstance(value, wp.float16 | wp.float32 | wp.float64 | wp.int32 | wp.int64):
        return value.value
    shape = getattr(type(value), "_shape_", None)
    if shape is not None and not isinstance(value, type):
        rows = [[float(x) for x in row] for row in value] if len(shape) == 2 else [[float(x) for x in value]]
        return _built(type(value), [x for row in rows for x in row])
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    if isinstance(value, list) and all(isinstance(item, bool | int | float) for item in value):
        return tuple(value)
    return value


def operation(function: Any) -> Callable[..., Any] | None:
    """The rule of a function or type of Warp's language or of Python, None for anything else."""
    if function is wp.static:
        return lambda value: value
    if isinstance(function, Builtin):
        return _CONSTRUCTORS[function.name]
    if isinstance(function, wp.Function) and function.is_builtin():
        return FUNCTIONS.get(function.key)
    if is_warps(function):
        return FUNCTIONS.get(function.__name__)
    if isinstance(function, type):
        if hasattr(function, "_wp_generic_type_str_"):
            return lambda *items: _constructed(function, items)
        return _CASTS.get(function)
    return _PYTHON.get(function) if isinstance(function, Hashable) else None


def is_warps(function: Any) -> bool:
    """Whether it is a Python function of the Warp package."""
    return inspect.isfunction(function) and function.__module__.partition(".")[0] == "warp"


def _built(kind: Any, items: Sequence[Any]) -> Value:
    """A value of a Warp type from its scalars."""
    label, shape = kind._wp_generic_type_str_, kind._shape_
    if label == "quat_t":
        return Quaternion(tuple(items))
    if len(shape) == 2:
        return Matrix(tuple(tuple(items[k * shape[1] : (k + 1) * shape[1]]) for k in range(shape[0])))
    return Vector(tuple(items))


def componentwise(operation: Callable[[Any, Any], Any], name: str) -> Callable[[Value, Value], Value]:
    """`wp.cw_*`: the operation of two scalars on vectors or matrices of one form."""

    def each(a: Value, b: Value) -> Value:
        if not same_form(a, b) or not isinstance(a, Vector | Matrix):
            raise Mismatch(f"wp.{name} of {describe(a)} and {describe(b)}")
        return like(a, [operation(x, y) for x, y in zip(parts(a), parts(b), strict=True)])

    return each


def _scalar(name: str) -> Callable[..., Value]:
    def call(*values: Value) -> Value:
        need_numbers(f"wp.{name}", *values)
        if len(values) != (2 if name == "atan2" else 1):
            raise Mismatch(f"wp.{name} of {len(values)} numbers")
        return apply(name, *values)

    return call


def _extremum(name: str) -> Callable[..., Value]:
    def call(*values: Value) -> Value:
        if len(values) == 1 and isinstance(values[0], Vector):
            values = values[0].items
        result = values[0]
        for value in values[1:]:
            if isinstance(result, Vector):
                result = componentwise(lambda x, y: apply(name, x, y), name)(result, value)
            else:
                need_numbers(f"wp.{name}", result, value)
                result = apply(name, result, value)
        return result

    return call


def _absolute(a: Value) -> Value:
    if isinstance(a, Vector):
        return like(a, [apply("abs", x) for x in a.items])
    need_numbers("wp.abs", a)
    return apply("abs", a)


def _clamp(x: Real, low: Real, high: Real) -> Value:
    need_numbers("wp.clamp", x, low, high)
    return apply("min", apply("max", x, low), high)


def _sign(x: Real) -> Value:
    need_numbers("wp.sign", x)
    return select(less(x, 0.0), -1.0, 1.0)  # as in Warp, sign(0) = 1


def _where(condition: Value, a: Value, b: Value) -> Value:
    if isinstance(condition, bool):
        return a if condition else b
    if not is_condition(condition):
        raise Mismatch(f"wp.where needs a condition such as x > 0.0, got {describe(condition)}")
    return choose(condition, a, b)


def _lerp(a: Value, b: Value, t: Real) -> Value:
    return add(multiply(a, 1.0 - t), multiply(b, t))


def _diagonal(a: Vector) -> Matrix:
    return Matrix(tuple(tuple(x if i == j else 0.0 for j in range(len(a.items))) for i, x in enumerate(a.items)))


def _from_rows(*rows: Vector) -> Matrix:
    need_vectors("matrix_from_rows", *rows)
    return Matrix(tuple(row.items for row in rows))


def compare(operation: str, a: Value, b: Value) -> Node | bool:
    """`a < b` and its kin, of numbers."""
    need_numbers(f"the comparison {operation}", a, b)
    table: dict[str, Callable[[], Node]] = {
        "<": lambda: less(a, b),
        "<=": lambda: less_equal(a, b),
        ">": lambda: less(b, a),
        ">=": lambda: less_equal(b, a),
        "==": lambda: equal(a, b),
        "!=": lambda: negation(equal(a, b)),
    }
    return known(table[operation]())


def known(condition: Node) -> Node | bool:
    """A condition that does not depend on any input as a plain bool."""
    return bool(condition.value) if condition.operation == "truth" else condition


def combine(word: str, values: Sequence[Value]) -> Node | bool:
    """`and`, `or`, `not` of conditions."""
    for value in values:
        if not is_condition(value):
            raise Mismatch(f"'{word}' needs conditions such as x > 0.0, got {describe(value)}")
    nodes = [as_truth(value) for value in values]
    if word == "not":
        return known(negation(nodes[0]))
    result = nodes[0]
    for node in nodes[1:]:
        result = both(result, node) if word == "and" else either(result, node)
    return known(result)


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
    """`wp.vec3(...)`, `wp.quat(...)`, `wp.mat33(...)`: from nothing (zeros), one number for all, or all components."""
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


FUNCTIONS: dict[str, Callable[..., Value]] = {
    **{
        name: _scalar(name)
        for name in (
            *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh"),
            *("exp", "log", "sqrt", "floor", "ceil"),
        )
    },
    "abs": _absolute,
    "min": _extremum("min"),
    "max": _extremum("max"),
    "clamp": _clamp,
    "sign": _sign,
    "pow": raise_to,
    "log2": lambda x: _scalar("log")(x) * (1.0 / math.log(2.0)),
    "log10": lambda x: _scalar("log")(x) * (1.0 / math.log(10.0)),
    "degrees": lambda x: multiply(x, 180.0 / math.pi),
    "radians": lambda x: multiply(x, math.pi / 180.0),
    "where": _where,
    "lerp": _lerp,
    "dot": dot,
    "cross": cross,
    "length": length,
    "length_sq": lambda a: dot(a, a),
    "normalize": normalize,
    "outer": outer,
    "transpose": transpose,
    "determinant": determinant,
    "inverse": inverse,
    "trace": trace,
    "cw_mul": componentwise(lambda x, y: x * y, "cw_mul"),
    "cw_div": componentwise(lambda x, y: x / y, "cw_div"),
    "diag": _diagonal,
    "matrix_from_rows": _from_rows,
    "matrix_from_cols": lambda *columns: transpose(_from_rows(*columns)),
    "quat_identity": lambda: Quaternion((0.0, 0.0, 0.0, 1.0)),
    "quat_rotate": quat_rotate,
    "quat_rotate_inv": quat_rotate_inv,
    "quat_inverse": quat_inverse,
    "quat_from_axis_angle": quat_from_axis_angle,
    "quat_to_matrix": quat_to_matrix,
    "add": add,
    "sub": subtract,
    "mul": multiply,
    "div": divide,
    "neg": negate,
}
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "vector": _vector,
    "matrix": _matrix,
    "identity": _unit,
    "quaternion": lambda *items: _constructed(wp.quatd, items),
}
_CASTS: dict[type, Callable[[Any], Any]] = {
    float: _to_number,
    wp.float32: _to_number,
    wp.float64: _to_number,
    int: _to_whole,
    bool: _to_bool,
}
_PYTHON: dict[Any, Callable[..., Any]] = {
    abs: FUNCTIONS["abs"],
    min: FUNCTIONS["min"],
    max: FUNCTIONS["max"],
    pow: raise_to,
    len: _count,
}
