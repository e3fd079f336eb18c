"""Straight-line arithmetic on real numbers as a graph: what a kernel's step becomes before it is differentiated.

A `Node` is one operation on nodes, and equal operations are one node: `sin(x)` written twice is computed once, and so
are the terms that values and derivatives share. Nodes are built by Python's operators and by the functions below, which
drop what is certainly zero and fold constants in float64. A branch is `select(condition, a, b)` with both sides
computed; a derivative is masked with the same condition, never multiplied by zero, so the side not taken may hold nan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakValueDictionary


@dataclass(frozen=True, eq=False)
class Node:
    """`operation(*arguments)`; an input has a name, a constant a value; `key` is a digest, equal in every process."""

    operation: str
    arguments: tuple[Node, ...]
    key: bytes
    name: str = ""
    value: float = 0.0

    def __add__(self, other: Node | float) -> Node:
        return _add(self, as_node(other))

    def __radd__(self, other: Node | float) -> Node:
        return _add(as_node(other), self)

    def __sub__(self, other: Node | float) -> Node:
        return _subtract(self, as_node(other))

    def __rsub__(self, other: Node | float) -> Node:
        return _subtract(as_node(other), self)

    def __mul__(self, other: Node | float) -> Node:
        return _multiply(self, as_node(other))

    def __rmul__(self, other: Node | float) -> Node:
        return _multiply(as_node(other), self)

    def __truediv__(self, other: Node | float) -> Node:
        return _divide(self, as_node(other))

    def __rtruediv__(self, other: Node | float) -> Node:
        return _divide(as_node(other), self)

    def __neg__(self) -> Node:
        return _negate(self)


_NODES: WeakValueDictionary[bytes, Node] = WeakValueDictionary()
_COMMUTATIVE = {"add", "mul", "min", "max", "eq", "and", "or"}
TRUTHS = {"truth", "lt", "le", "eq", "not", "and", "or"}  # operations whose result is true or false
_FOLD: dict[str, Callable[..., float]] = {
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "atan2": math.atan2,
    "sinh": math.sinh,
    "cosh": math.cosh,
    "tanh": math.tanh,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "norm": math.sqrt,
    "abs": abs,
    "min": min,
    "max": max,
    "floor": math.floor,
    "ceil": math.ceil,
    "pow": math.pow,
}


def _node(operation: str, arguments: tuple[Node, ...], name: str = "", value: float = 0.0) -> Node:
    if operation in _COMMUTATIVE:
        arguments = tuple(sorted(arguments, key=lambda node: node.key))
    text = f"{operation}|{name}|{value.hex()}|".encode()
    key = hashlib.blake2b(text + b"".join(node.key for node in arguments), digest_size=16).digest()
    found = _NODES.get(key)
    if found is None:
        found = Node(operation, arguments, key, name, value)
        _NODES[key] = found
    return found


def constant(value: float) -> Node:
    """A number known when the kernel is generated."""
    return _node("constant", (), value=float(value))


def variable(name: str) -> Node:
    """An input, written `name` in the generated code."""
    return _node("input", (), name=name)


def as_node(value: Node | float) -> Node:
    """The value itself, or a number as a constant."""
    return value if isinstance(value, Node) else constant(value)


def is_constant(node: Node, value: float | None = None) -> bool:
    """Whether the node is a constant, and of that value if one is given."""
    return node.operation == "constant" and (value is None or node.value == value)


def is_truth(node: Node) -> bool:
    """Whether the node is a condition, not a number."""
    return node.operation in TRUTHS


def apply(operation: str, *arguments: Node | float) -> Node:
    """A function of real numbers (`sin`, `atan2`, ...), folded where all arguments are constants."""
    nodes = tuple(as_node(argument) for argument in arguments)
    if operation in _FOLD and all(is_constant(node) for node in nodes):
        return constant(_FOLD[operation](*(node.value for node in nodes)))
    return _node(operation, nodes)


def _add(a: Node, b: Node) -> Node:
    if is_constant(a) and is_constant(b):
        return constant(a.value + b.value)
    if is_constant(a, 0.0):
        return b
    if is_constant(b, 0.0):
        return a
    if b.operation == "neg":
        return _subtract(a, b.arguments[0])
    if a.operation == "neg":
        return _subtract(b, a.arguments[0])
    return _node("add", (a, b))


def _subtract(a: Node, b: Node) -> Node:
    if is_constant(a) and is_constant(b):
        return constant(a.value - b.value)
    if is_constant(b, 0.0):
        return a
    if is_constant(a, 0.0):
        return _negate(b)
    if b.operation == "neg":
        return _add(a, b.arguments[0])
    return _node("sub", (a, b))


def _negate(a: Node) -> Node:
    if is_constant(a):
        return constant(-a.value)
    if a.operation == "neg":
        return a.arguments[0]
    if a.operation == "sub":
        return _node("sub", (a.arguments[1], a.arguments[0]))
    return _node("neg", (a,))


def _multiply(a: Node, b: Node) -> Node:
    if is_constant(a) and is_constant(b):
        return constant(a.value * b.value)
    for this, other in ((a, b), (b, a)):
        if is_constant(this, 0.0):
            return constant(0.0)
        if is_constant(this, 1.0):
            return other
        if is_constant(this, -1.0):
            return _negate(other)
        if this.operation == "neg":
            return _negate(_multiply(this.arguments[0], other))
    return _node("mul", (a, b))


def _divide(a: Node, b: Node) -> Node:
    if is_constant(b, 0.0):
        raise ZeroDivisionError("division by zero")
    if is_constant(a) and is_constant(b):
        return constant(a.value / b.value)
    if is_constant(a, 0.0):
        return a
    if is_constant(b, 1.0):
        return a
    if a.operation == "neg":
        return _negate(_divide(a.arguments[0], b))
    return _node("div", (a, b))


def masked(a: Node, factor: Node) -> Node:
    """`a * factor` for a derivative `a`: where a mask makes `a` zero, so is the product, whatever `factor` is there."""
    if factor.operation == "select" and all(is_constant(side) for side in factor.arguments[1:]):
        condition, x, y = factor.arguments
        return select(condition, masked(a, x), masked(a, y))
    mask = _mask(a)
    return a * factor if mask is None else select(mask[0], masked(mask[1], factor), 0.0)


def total(a: Node, b: Node) -> Node:
    """`a + b` for derivatives: two masked terms keep a mask, true where either is."""
    one, other = _mask(a), _mask(b)
    if one is None or other is None:
        return a + b
    if one[0] is other[0]:
        return select(one[0], total(one[1], other[1]), 0.0)
    return select(either(one[0], other[0]), a + b, 0.0)


def _mask(a: Node) -> tuple[Node, Node] | None:
    """(condition, value) of a node that is zero where the condition does not hold."""
    if a.operation == "select":
        condition, x, y = a.arguments
        if is_constant(y, 0.0):
            return condition, x
        if is_constant(x, 0.0):
            return negation(condition), y
    return None


def select(condition: Node, a: Node | float, b: Node | float) -> Node:
    """`a` where the condition holds, else `b`; both are computed."""
    x, y = as_node(a), as_node(b)
    if x is y:
        return x
    if condition.operation == "truth":
        return x if condition.value else y
    if is_truth(x):
        return either(both(condition, x), both(negation(condition), y))
    if condition.operation == "not":
        return select(condition.arguments[0], y, x)
    return _node("select", (condition, x, y))


def less(a: Node | float, b: Node | float) -> Node:
    """The condition a < b."""
    return _compare("lt", a, b, lambda x, y: x < y)


def less_equal(a: Node | float, b: Node | float) -> Node:
    """The condition a <= b."""
    return _compare("le", a, b, lambda x, y: x <= y)


def equal(a: Node | float, b: Node | float) -> Node:
    """The condition a == b."""
    return _compare("eq", a, b, lambda x, y: x == y)


def truth(value: bool) -> Node:
    """A condition known when the kernel is generated."""
    return _node("truth", (), value=float(value))


def _compare(operation: str, a: Node | float, b: Node | float, known: Callable[[float, float], bool]) -> Node:
    x, y = as_node(a), as_node(b)
    if is_constant(x) and is_constant(y):
        return truth(known(x.value, y.value))
    return _node(operation, (x, y))


def negation(a: Node) -> Node:
    """The condition `not a`."""
    if a.operation == "truth":
        return truth(not a.value)
    return a.arguments[0] if a.operation == "not" else _node("not", (a,))


def both(a: Node, b: Node) -> Node:
    """The condition `a and b`."""
    for this, other in ((a, b), (b, a)):
        if this.operation == "truth":
            return other if this.value else this
    return a if a is b else _node("and", (a, b))


def either(a: Node, b: Node) -> Node:
    """The condition `a or b`."""
    for this, other in ((a, b), (b, a)):
        if this.operation == "truth":
            return this if this.value else other
    return a if a is b else _node("or", (a, b))


def power(a: Node | float, b: Node | float) -> Node:
    """`a**b`: multiplications for whole exponents up to 8, `sqrt` for one half, else `pow`."""
    x, y = as_node(a), as_node(b)
    if is_constant(x) and is_constant(y):
        return constant(math.pow(x.value, y.value))
    if not is_constant(y):
        return _node("pow", (x, y))
    exponent = y.value
    if exponent == 0.5:
        return apply("sqrt", x)
    if exponent != int(exponent) or abs(exponent) > 8:
        return _node("pow", (x, y))
    if exponent < 0:
        return constant(1.0) / power(x, -exponent)
    result, square, rest = constant(1.0), x, int(exponent)
    while rest:
        result = result * square if rest % 2 else result
        square, rest = square * square, rest // 2
    return result


def in_order(outputs: Iterable[Node]) -> list[Node]:
    """Every node the outputs depend on, arguments first."""
    done: dict[bytes, Node] = {}
    stack = [(node, False) for node in reversed(tuple(outputs))]
    while stack:
        node, ready = stack.pop()
        if node.key in done:
            continue
        if ready:
            done[node.key] = node
        else:
            stack.append((node, True))
            stack.extend((argument, False) for argument in reversed(node.arguments))
    return list(done.values())
