"""Arithmetic graphs as Warp functions: one native snippet per function, with an adjoint snippet written from the same graph.

A snippet is C++ that compiles for CPU and CUDA alike. Constants are written with all digits of the model's precision. The functions
are known to Warp by a digest of their graph: the same function translated twice, or in another process, is the same code, so
Warp's kernel cache stays warm.
"""

from __future__ import annotations

import hashlib
import linecache
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import warp as wp

from sim2real.simulators.warp_graph import Node, in_order

_TYPES = {torch.float32: (wp.float32, "float"), torch.float64: (wp.float64, "double")}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==", "and": "&&", "or": "||"}
_CALLS = {"norm": "sqrt"}


def scalar_type(precision: torch.dtype) -> Any:
    """The Warp scalar of a precision, `wp.float32` or `wp.float64`."""
    if precision not in _TYPES:
        raise ValueError(f"precision must be torch.float32 or torch.float64, got {precision}")
    return _TYPES[precision][0]


def vector_type(length: int | None, precision: torch.dtype) -> Any:
    """The Warp type of an argument: a vector, or a scalar for None. Length 0 becomes a vector of one unused component."""
    scalar = scalar_type(precision)
    return scalar if length is None else wp.types.vector(length=max(length, 1), dtype=scalar)


def statements(outputs: Sequence[Node], precision: torch.dtype) -> tuple[str, list[str]]:
    """C++ statements that compute the outputs, and the expression of each output."""
    ctype = _TYPES[precision][1]
    names: dict[Node, str] = {}
    lines = []
    for node in in_order(outputs):
        if node.operation == "input":
            names[node] = node.name
        elif node.operation == "constant":
            names[node] = literal(node.value, precision)
        else:
            names[node] = f"v{len(lines)}"
            kind = "bool" if node.operation in {"lt", "le", "eq", "and", "or", "not", "truth"} else ctype
            lines.append(f"const {kind} {names[node]} = {_expression(node, names)};")
    return "\n".join(lines), [names[node] for node in outputs]


def _expression(node: Node, names: dict[Node, str]) -> str:
    values = [names[argument] for argument in node.arguments]
    if node.operation in _INFIX:
        return f"{values[0]} {_INFIX[node.operation]} {values[1]}"
    if node.operation == "neg":
        return f"-{values[0]}" if not values[0].startswith("-") else f"-({values[0]})"
    if node.operation == "not":
        return f"!{values[0]}"
    if node.operation == "truth":
        return "true" if node.value else "false"
    if node.operation == "select":
        return f"{values[0]} ? {values[1]} : {values[2]}"
    return f"wp::{_CALLS.get(node.operation, node.operation)}({', '.join(values)})"


def literal(value: float, precision: torch.dtype) -> str:
    """A C++ literal that reads back as the same number."""
    ctype = _TYPES[precision][1]
    if math.isnan(value):
        return f"{ctype}(NAN)"
    if math.isinf(value):
        return f"{ctype}({'-' if value < 0 else ''}INFINITY)"
    if precision == torch.float32:
        value = float(torch.tensor(value, dtype=torch.float32))
        return f"({value!r}f)" if value < 0 else f"{value!r}f"
    return f"({value!r})" if value < 0 else repr(value)


def native_function(
    name: str,
    arguments: Sequence[tuple[str, int | None]],
    result: int | None,
    value: Sequence[Node],
    adjoint: Sequence[Sequence[Node]],
    precision: torch.dtype,
) -> Any:
    """A Warp function of the named arguments (vectors, or scalars for None) whose components are `value`.

    `adjoint` holds, for each argument, what its adjoint gains, as graphs of the arguments and of `adj_ret`.
    """
    ctype = _TYPES[precision][1]
    body, outputs = statements(value, precision)
    if result is None:
        snippet = f"{body}\nreturn {outputs[0]};\n"
    else:
        stores = "".join(f"\nresult[{index}] = {output};" for index, output in enumerate(outputs))
        snippet = f"{body}\nwp::vec_t<{result}, {ctype}> result;{stores}\nreturn result;\n"
    gains = [gain for row in adjoint for gain in row]
    reverse, amounts = statements(gains, precision)
    targets = [
        f"adj_{argument}" if length is None else f"adj_{argument}[{index}]"
        for (argument, length), row in zip(arguments, adjoint, strict=True)
        for index in range(len(row))
    ]
    reverse += "".join(
        f"\n{target} += {amount};"
        for target, amount, gain in zip(targets, amounts, gains, strict=True)
        if not (gain.operation == "constant" and gain.value == 0.0)
    )
    return _native(name, tuple(arguments), result, snippet, reverse + "\n", precision)


@cache
def _native(
    name: str,
    arguments: tuple[tuple[str, int | None], ...],
    result: int | None,
    snippet: str,
    reverse: str,
    precision: torch.dtype,
) -> Any:
    digest = hashlib.blake2b((snippet + reverse).encode(), digest_size=6).hexdigest()
    names = {"snippet": snippet, "reverse": reverse, "Result": vector_type(result, precision)}
    return warp_function("@wp.func_native(snippet, reverse)", f"{name}_{digest}", arguments, "...", precision, names)


@cache
def unstacked(
    stacked: Any, name: str, arguments: tuple[tuple[str, int | None], ...], length: int | None, precision: torch.dtype
) -> Any:
    """A Warp function that returns the two halves of what `stacked` returns: two vectors, or two scalars for length None."""
    width = 1 if length is None else length
    halves = [[f"both[{k + half * width}]" for k in range(width)] for half in (0, 1)]
    values = [half[0] if length is None else f"Pair({', '.join(half)})" for half in halves]
    body = f"both = stacked({', '.join(argument for argument, _ in arguments)})\n    return {values[0]}, {values[1]}"
    names = {"stacked": stacked, "Pair": vector_type(width, precision)}
    return warp_function("@wp.func", f"{name}_{stacked.key.rpartition('_')[2]}", arguments, body, precision, names)


def warp_function(
    decorator: str,
    name: str,
    arguments: Sequence[tuple[str, int | None]],
    body: str,
    precision: torch.dtype,
    names: dict[str, Any],
) -> Any:
    """Define and decorate a function from its text; `names` are its globals, among them `Result` if it is declared.

    Warp reads the source of what it compiles, so the text is put where `inspect` finds it.
    """
    types = {f"Type{index}": vector_type(length, precision) for index, (_, length) in enumerate(arguments)}
    signature = ", ".join(f"{argument}: Type{index}" for index, (argument, _) in enumerate(arguments))
    arrow = " -> Result" if "Result" in names else ""
    source = f"{decorator}\ndef {name}({signature}){arrow}:\n    {body}\n"
    filename = f"<sim2real {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space: dict[str, Any] = {"__name__": __name__, "wp": wp, **types, **names}
    exec(compile(source, filename, "exec", dont_inherit=True), space)
    return space[name]
