"""Vectors, matrices and quaternions of a kernel, as scalars.

Quaternions are (x, y, z, w) as in Warp, with `quat_rotate(q, v) = v (2 w^2 - 1) + 2 w (q x v) + 2 q (q . v)` for the
vector part q; matrices are written row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sim2real.simulators.warp_graph import Node, apply, as_node, is_truth, less, power, select, truth

Real = Node | float | int | bool


@dataclass(frozen=True)
class Vector:
    """A Warp vector; `fields` names its components (the parameters)."""

    items: tuple[Real, ...]
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """A matrix of a kernel, row by row."""

    rows: tuple[tuple[Real, ...], ...]


@dataclass(frozen=True)
class Quaternion:
    """A quaternion of a kernel; w is the real part, as in Warp."""

    items: tuple[Real, ...]  # x, y, z, w


Value = Any
"""a Real, Vector, Matrix, Quaternion or tuple of values; the form is checked where values meet"""


class Mismatch(TypeError):
    """Values that do not fit an operation; the reader adds where it stands."""


def describe(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, Vector):
        return f"a vector of length {len(value.items)}"
    if isinstance(value, Matrix):
        return f"a {len(value.rows)}x{len(value.rows[0])} matrix"
    if isinstance(value, Quaternion):
        return "a quaternion"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)} values"
    if isinstance(value, Node):
        return "a condition" if is_condition(value) else "a number"
    return f"the constant {value!r}" if isinstance(value, bool | int | float) else repr(value)


def is_condition(value: object) -> bool:
    """Whether a value is true or false, now or when the kernel runs."""
    return isinstance(value, bool) or (isinstance(value, Node) and is_truth(value))


def is_number(value: object) -> bool:
    """Whether a value is a scalar number, now or when the kernel runs."""
    return isinstance(value, int | float | Node) and not is_condition(value)


def parts(value: Value) -> tuple[Real, ...]:
    """All scalars of a value, in order."""
    if isinstance(value, Vector | Quaternion):
        return value.items
    if isinstance(value, Matrix):
        return tuple(item for row in value.rows for item in row)
    if isinstance(value, tuple):
        return tuple(item for entry in value for item in parts(entry))
    return (value,)


def like(value: Value, items: Sequence[Real]) -> Value:
    """`items` in the form of `value`."""
    if isinstance(value, Vector):
        return Vector(tuple(items))
    if isinstance(value, Quaternion):
        return Quaternion(tuple(items))
    if isinstance(value, Matrix):
        width = len(value.rows[0])
        return Matrix(tuple(tuple(items[k : k + width]) for k in range(0, len(items), width)))
    if isinstance(value, tuple):
        entries, start = [], 0
        for entry in value:
            entries.append(like(entry, items[start : start + len(parts(entry))]))
            start += len(parts(entry))
        return tuple(entries)
    return items[0]


def same_form(a: Value, b: Value) -> bool:
    """Whether two values have the same shape and kind, so that one can stand for the other."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same_form(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Matrix) and isinstance(b, Matrix):
        return len(a.rows) == len(b.rows) and len(a.rows[0]) == len(b.rows[0])
    if isinstance(a, Vector | Quaternion):
        return type(a) is type(b) and len(a.items) == len(b.items)
    return (is_number(a) and is_number(b)) or (is_condition(a) and is_condition(b))


def choose(condition: Node, a: Value, b: Value) -> Value:
    """`a` where the condition holds, else `b`, component by component."""
    if not same_form(a, b):
        raise Mismatch(f"one branch gives {describe(a)}, the other {describe(b)}")
    return like(a, [_chosen(condition, x, y) for x, y in zip(parts(a), parts(b), strict=True)])


def _chosen(condition: Node, x: Real, y: Real) -> Real:
    if not isinstance(x, Node) and not isinstance(y, Node) and x == y:
        return x
    if is_condition(x):
        return select(condition, as_truth(x), as_truth(y))
    return select(condition, x, y)


def as_truth(value: Real) -> Node:
    """A condition as a node."""
    return value if isinstance(value, Node) else truth(bool(value))


def need_numbers(operation: str, *values: Value) -> None:
    """Raise `Mismatch` unless all values are scalar numbers."""
    for value in values:
        if not is_number(value):
            raise Mismatch(f"{operation} needs numbers, got {describe(value)}")


def add(a: Value, b: Value, sign: int = 1) -> Value:
    """a + b, or a - b with sign -1, of two values of the same form."""
    if not same_form(a, b) or isinstance(a, tuple) or is_condition(a):
        raise Mismatch(f"{'+' if sign > 0 else '-'} of {describe(a)} and {describe(b)}")
    return like(a, [x + y if sign > 0 else x - y for x, y in zip(parts(a), parts(b), strict=True)])


def subtract(a: Value, b: Value) -> Value:
    """a - b of two values of the same form."""
    return add(a, b, -1)


def negate(a: Value) -> Value:
    """-a, component by component."""
    if isinstance(a, tuple) or is_condition(a):
        raise Mismatch(f"- of {describe(a)}")
    return like(a, [-x for x in parts(a)])


def multiply(a: Value, b: Value) -> Value:
    """a b: scaling by a number, matrix with vector or matrix, Hamilton's product of quaternions."""
    if is_number(a) and not isinstance(b, tuple):
        return like(b, [a * x for x in parts(b)])
    if is_number(b) and not isinstance(a, tuple):
        return like(a, [x * b for x in parts(a)])
    if isinstance(a, Quaternion) and isinstance(b, Quaternion):
        return _hamilton(a, b)
    if isinstance(a, Matrix) and isinstance(b, Vector) and len(a.rows[0]) == len(b.items):
        return Vector(tuple(_sum(x * y for x, y in zip(row, b.items, strict=True)) for row in a.rows))
    if isinstance(a, Vector) and isinstance(b, Matrix) and len(a.items) == len(b.rows):
        return multiply(transpose(b), a)
    if isinstance(a, Matrix) and isinstance(b, Matrix) and len(a.rows[0]) == len(b.rows):
        columns = transpose(b).rows
        return Matrix(tuple(tuple(_sum(x * y for x, y in zip(r, c, strict=True)) for c in columns) for r in a.rows))
    raise Mismatch(f"* of {describe(a)} and {describe(b)}; component by component is wp.cw_mul")


def divide(a: Value, b: Value) -> Value:
    """a / b, each component by the number b."""
    if not is_number(b) or isinstance(a, tuple) or is_condition(a):
        raise Mismatch(f"/ of {describe(a)} and {describe(b)}; component by component is wp.cw_div")
    return like(a, [x / b for x in parts(a)])


def raise_to(a: Value, b: Value) -> Value:
    """a to the power of b, both numbers."""
    need_numbers("a power", a, b)
    return a**b if isinstance(a, int | float) and isinstance(b, int | float) else power(a, b)


def _sum(terms: Iterable[Real]) -> Real:
    result: Real = 0.0
    for term in terms:
        result = result + term
    return result


def _hamilton(a: Quaternion, b: Quaternion) -> Quaternion:
    (x, y, z, w), (p, q, r, s) = a.items, b.items
    return Quaternion(
        (
            w * p + s * x + y * r - z * q,
            w * q + s * y + z * p - x * r,
            w * r + s * z + x * q - y * p,
            w * s - x * p - y * q - z * r,
        )
    )


def need_vectors(name: str, *values: Value) -> None:
    """Raise `Mismatch` unless all values are vectors or quaternions of one length."""
    lengths = {len(value.items) if isinstance(value, Vector | Quaternion) else None for value in values}
    if None in lengths or len(lengths) > 1:
        raise Mismatch(f"wp.{name} of {' and '.join(describe(value) for value in values)}")


def dot(a: Value, b: Value) -> Real:
    """Inner product."""
    need_vectors("dot", a, b)
    return _sum(x * y for x, y in zip(parts(a), parts(b), strict=True))


def cross(a: Vector, b: Vector) -> Vector:
    """a x b in three dimensions."""
    need_vectors("cross", a, b)
    if len(a.items) != 3:
        raise Mismatch(f"wp.cross of {describe(a)} and {describe(b)}")
    (x, y, z), (p, q, r) = a.items, b.items
    return Vector((y * r - z * q, z * p - x * r, x * q - y * p))


def length(a: Value) -> Real:
    """Euclidean norm; its derivative at zero is zero, as in Warp."""
    need_vectors("length", a)
    return apply("norm", dot(a, a))


def normalize(a: Value) -> Value:
    """a / |a|; at zero the zero vector, or the unit quaternion, as in Warp."""
    size = as_node(length(a))
    rest = (0.0, 0.0, 0.0, 1.0) if isinstance(a, Quaternion) else (0.0,) * len(parts(a))
    return like(a, [select(less(0.0, size), x / size, zero) for x, zero in zip(parts(a), rest, strict=True)])


def outer(a: Vector, b: Vector) -> Matrix:
    """The matrix a b^T."""
    if not (isinstance(a, Vector) and isinstance(b, Vector)):
        raise Mismatch(f"wp.outer of {describe(a)} and {describe(b)}")
    return Matrix(tuple(tuple(x * y for y in b.items) for x in a.items))


def transpose(a: Matrix) -> Matrix:
    """Rows become columns."""
    if not isinstance(a, Matrix):
        raise Mismatch(f"wp.transpose of {describe(a)}")
    return Matrix(tuple(zip(*a.rows, strict=True)))


def _square(name: str, a: Matrix) -> None:
    if not isinstance(a, Matrix) or len(a.rows) != len(a.rows[0]) or len(a.rows) > 4:
        raise Mismatch(f"wp.{name} needs a square matrix up to 4x4, got {describe(a)}")


def determinant(a: Matrix) -> Real:
    """By Laplace's expansion along the first row, up to 4x4."""
    _square("determinant", a)
    return _laplace(a.rows)


def _minor(rows: Sequence[Sequence[Real]], i: int, j: int) -> list[list[Real]]:
    return [[x for k, x in enumerate(row) if k != j] for m, row in enumerate(rows) if m != i]


def _laplace(rows: Sequence[Sequence[Real]]) -> Real:
    if len(rows) == 1:
        return rows[0][0]
    return _sum((-1.0) ** j * x * _laplace(_minor(rows, 0, j)) for j, x in enumerate(rows[0]))


def inverse(a: Matrix) -> Matrix:
    """By cofactors; where the determinant is 0 it is infinite or nan (Warp's own returns zeros there)."""
    _square("inverse", a)
    size, scale = len(a.rows), 1.0 / as_node(determinant(a))
    if size == 1:
        return Matrix(((scale,),))
    return Matrix(
        tuple(
            tuple((-1.0) ** (i + j) * _laplace(_minor(a.rows, j, i)) * scale for j in range(size)) for i in range(size)
        )
    )


def trace(a: Matrix) -> Real:
    """Sum of the diagonal."""
    _square("trace", a)
    return _sum(a.rows[k][k] for k in range(len(a.rows)))


def _quaternion(name: str, q: Value) -> tuple[Vector, Real]:
    if not isinstance(q, Quaternion):
        raise Mismatch(f"wp.{name} needs a quaternion, got {describe(q)}")
    return Vector(q.items[:3]), q.items[3]


def quat_rotate(q: Quaternion, v: Vector) -> Value:
    """v turned by the unit quaternion q."""
    axis, w = _quaternion("quat_rotate", q)
    return _turned(axis, w, cross(axis, v), v)


def quat_rotate_inv(q: Quaternion, v: Vector) -> Value:
    """v turned back by the unit quaternion q."""
    axis, w = _quaternion("quat_rotate_inv", q)
    return _turned(axis, w, cross(v, axis), v)


def _turned(axis: Vector, w: Real, twist: Vector, v: Vector) -> Value:
    straight = multiply(2.0 * w * w - 1.0, v)
    return add(add(straight, multiply(2.0 * w, twist)), multiply(2.0 * dot(axis, v), axis))


def quat_inverse(q: Quaternion) -> Quaternion:
    """The conjugate of q: the inverse of a unit quaternion."""
    axis, w = _quaternion("quat_inverse", q)
    return Quaternion((*(-x for x in axis.items), w))


def quat_from_axis_angle(axis: Vector, angle: Real) -> Quaternion:
    """(axis sin(angle / 2), cos(angle / 2)), angle in rad, axis of length 1."""
    need_numbers("wp.quat_from_axis_angle", angle)
    half = angle * 0.5
    sine = apply("sin", half)
    return Quaternion((*(x * sine for x in axis.items), apply("cos", half)))


def quat_to_matrix(q: Quaternion) -> Matrix:
    """The rotation matrix of the unit quaternion q."""
    _quaternion("quat_to_matrix", q)
    columns = [quat_rotate(q, Vector(tuple(float(i == j) for j in range(3)))) for i in range(3)]
    return transpose(Matrix(tuple(parts(column) for column in columns)))
