"""Exact derivatives of arithmetic graphs: dual numbers (forward) and adjoints (reverse).

    tangents:  dy = sum_i (df/dx_i) dx_i,      adjoints:  x_i* += (df/dx_i) y*

Both return graphs again, so the adjoint of the dual is a Hessian-vector product, exact to rounding. The partial
derivatives stand in one table. At a kink the partial is that of the branch which computes the value (`max(x, 0)` at 0:
that of `x`); `sign`, `floor` and `ceil` have derivative 0, and so has the length of a zero vector.
Reference: Griewank and Walther, Evaluating Derivatives, 2nd edition, 2008, sections 3.1, 3.2 and 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sim2real.simulators.warp_graph import (
    Node,
    apply,
    both,
    constant,
    equal,
    in_order,
    is_constant,
    is_truth,
    less,
    less_equal,
    masked,
    power,
    select,
    total,
)

_ONE, _ZERO = constant(1.0), constant(0.0)


def _reciprocal(x: Node) -> Node:
    return _ONE / x


def _power_partials(out: Node, x: Node, y: Node) -> tuple[Node, ...]:
    by_base = y * power(x, y - 1.0)
    if is_constant(y):
        return by_base, _ZERO
    flat = both(equal(x, 0.0), less_equal(0.0, y))  # 0**y stays 0: log(0) must not enter
    return by_base, select(flat, 0.0, out * apply("log", x))


def _atan2_partials(out: Node, y: Node, x: Node) -> tuple[Node, ...]:
    scale = _reciprocal(x * x + y * y)
    return x * scale, -(y * scale)


# operation -> partial derivatives with respect to each argument, from the result and the arguments
_PARTIALS: dict[str, Callable[..., tuple[Node, ...]]] = {
    "neg": lambda out, x: (constant(-1.0),),
    "add": lambda out, x, y: (_ONE, _ONE),
    "sub": lambda out, x, y: (_ONE, constant(-1.0)),
    "mul": lambda out, x, y: (y, x),
    "div": lambda out, x, y: (_reciprocal(y), -(out * _reciprocal(y))),
    "pow": _power_partials,
    "sin": lambda out, x: (apply("cos", x),),
    "cos": lambda out, x: (-apply("sin", x),),
    "tan": lambda out, x: (1.0 + out * out,),
    "asin": lambda out, x: (_reciprocal(apply("sqrt", 1.0 - x * x)),),
    "acos": lambda out, x: (-_reciprocal(apply("sqrt", 1.0 - x * x)),),
    "atan": lambda out, x: (_reciprocal(1.0 + x * x),),
    "atan2": _atan2_partials,
    "sinh": lambda out, x: (apply("cosh", x),),
    "cosh": lambda out, x: (apply("sinh", x),),
    "tanh": lambda out, x: (1.0 - out * out,),
    "exp": lambda out, x: (out,),
    "log": lambda out, x: (_reciprocal(x),),
    "sqrt": lambda out, x: (0.5 / out,),
    "norm": lambda out, x: (select(less(0.0, out), 0.5 / out, 0.0),),
    "abs": lambda out, x: (select(less(x, 0.0), -1.0, select(less(0.0, x), 1.0, 0.0)),),
    "min": lambda out, x, y: (select(less(y, x), 0.0, 1.0), select(less(y, x), 1.0, 0.0)),
    "max": lambda out, x, y: (select(less(x, y), 0.0, 1.0), select(less(x, y), 1.0, 0.0)),
    "floor": lambda out, x: (_ZERO,),
    "ceil": lambda out, x: (_ZERO,),
}
FUNCTIONS = frozenset(_PARTIALS)


def tangents(outputs: Sequence[Node], seeds: Mapping[Node, Node]) -> list[Node]:
    """Directional derivatives of the outputs, the inputs moving by `seeds` (an input not named stands still)."""
    moved: dict[Node, Node] = {}
    for node in in_order(outputs):
        if node in seeds:
            moved[node] = seeds[node]
        elif node.operation == "select":
            condition, x, y = node.arguments
            moved[node] = select(condition, moved[x], moved[y])
        elif node.operation in _PARTIALS:
            moved[node] = _ZERO
            if any(not is_constant(moved[argument], 0.0) for argument in node.arguments):
                partials = _PARTIALS[node.operation](node, *node.arguments)
                for argument, partial in zip(node.arguments, partials, strict=True):
                    moved[node] = total(moved[node], masked(moved[argument], partial))
        else:
            moved[node] = _ZERO
    return [moved[node] for node in outputs]


def adjoints(outputs: Sequence[Node], cotangents: Sequence[Node], inputs: Sequence[Node]) -> list[Node]:
    """`sum_k cotangents[k] d outputs[k] / d inputs[i]` for each input."""
    order = in_order(outputs)
    needed: set[Node] = set(inputs)
    for node in order:
        if any(argument in needed for argument in node.arguments) and not is_truth(node):
            needed.add(node)
    gathered: dict[Node, Node] = {}

    def give(node: Node, amount: Node) -> None:
        if node in needed and not is_constant(amount, 0.0):
            gathered[node] = total(gathered[node], amount) if node in gathered else amount

    for node, cotangent in zip(outputs, cotangents, strict=True):
        give(node, cotangent)
    for node in reversed(order):
        if node not in gathered or not node.arguments:
            continue
        amount = gathered[node]
        if node.operation == "select":
            condition, x, y = node.arguments
            give(x, select(condition, amount, 0.0))
            give(y, select(condition, 0.0, amount))
            continue
        for argument, partial in zip(node.arguments, _PARTIALS[node.operation](node, *node.arguments), strict=True):
            give(argument, masked(amount, partial))
    return [gathered.get(node, _ZERO) for node in inputs]
