"""Arithmetic graphs as C++: statements on numbers, or on short vectors of them that the CPU computes together.

`V` is the type of every real value: one number on a GPU, several environments side by side on a CPU. Constants carry
all digits of the precision. Sine and cosine of one argument are computed together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch

from sim2real.simulators.warp_elementary import NEEDS, elementary
from sim2real.simulators.warp_graph import TRUTHS, Node, in_order

CTYPES = {torch.float32: "float", torch.float64: "double"}
LANES = {torch.float32: 16, torch.float64: 8}  # one cache line of environments
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==", "and": "&", "or": "|"}
_LONGEST = 80  # characters of an expression before it gets a name
_ELEMENTWISE = {
    "sqrt": "sqrt",
    "norm": "sqrt",
    "abs": "abs",
    "floor": "floor",
    "ceil": "ceil",
}
_KEEPING_NAN = {  # as in torch; Warp's own functions and the vector instructions lose it
    "min": "((y < x) | (y != y)) ? y : x",
    "max": "((x < y) | (y != y)) ? y : x",
    "asin": "(x != x) ? x : {one}asin(x)",
    "acos": "(x != x) ? x : {one}acos(x)",
}


def statements(outputs: Sequence[Node], precision: torch.dtype) -> tuple[list[str], list[str]]:
    """C++ statements that compute the outputs, and the expression of each; what is used once stands where it is."""
    order = in_order(outputs)
    uses = Counter(chain(outputs, *(node.arguments for node in order)))
    together = {node.arguments[0] for node in order if node.operation == "sin"}
    together &= {node.arguments[0] for node in order if node.operation == "cos"}
    pairs: dict[Node, tuple[str, str]] = {}
    names: dict[Node, str] = {}
    lines: list[str] = []
    for node in order:
        if node.operation in ("sin", "cos") and node.arguments[0] in together:
            argument = node.arguments[0]
            if argument not in pairs:
                pairs[argument] = f"s{len(lines)}", f"c{len(lines)}"
                sine, cosine = pairs[argument]
                lines.append(f"V {sine}, {cosine}; f_sincos({names[argument]}, {sine}, {cosine});")
            names[node] = pairs[argument][node.operation == "cos"]
            continue
        text = _expression(node, names, precision)
        if node.operation in ("input", "constant") or (uses[node] == 1 and len(text) < _LONGEST):
            names[node] = text
        else:
            names[node] = f"v{len(lines)}"
            lines.append(f"const {'B' if node.operation in TRUTHS else 'V'} {names[node]} = {text};")
    return lines, [names[node] for node in outputs]


def _expression(node: Node, names: dict[Node, str], precision: torch.dtype) -> str:
    values = [names[argument] for argument in node.arguments]
    if node.operation == "input":
        return node.name
    if node.operation == "constant":
        return f"V({literal(node.value, precision)})"
    if node.operation in _INFIX:
        return f"({values[0]} {_INFIX[node.operation]} {values[1]})"
    if node.operation == "neg":
        return f"(-{values[0]})"
    if node.operation == "not":
        return f"({values[0]} == 0)"
    if node.operation == "select":
        return f"({values[0]} ? {values[1]} : {values[2]})"
    return f"f_{node.operation}({', '.join(values)})"


def literal(value: float, precision: torch.dtype) -> str:
    """A C++ literal that reads back as the same number."""
    narrow = precision == torch.float32
    if narrow:
        value = float(torch.tensor(value, dtype=torch.float32))
    if not math.isfinite(value):
        return "NAN" if math.isnan(value) else "INFINITY" if value > 0.0 else "-INFINITY"
    return f"{value!r}f" if narrow else repr(value)


def prelude(outputs: Iterable[Node], precision: torch.dtype, *, lanes: int) -> str:
    """Types `T`, `V`, `B` and the functions `f_...` that these outputs use; one lane: plain numbers."""
    operations = {node.operation for node in in_order(outputs)} - TRUTHS - _INFIX.keys()
    called = sorted(operations - {"input", "constant", "neg", "select"})
    plain = "".join(_plain(name) for name in _with_needs(called, {"sin": ("sincos",), "cos": ("sincos",)}))
    narrow = f"using V = T; using B = bool; constexpr int W = 1;\n{plain}"
    if lanes == 1:
        return f"using T = {CTYPES[precision]};\n{narrow}"
    names = _with_needs(called, NEEDS)
    single = dict.fromkeys(
        part for name in names for part in _ONE_BY_ONE.get(name, (name,)) if name not in _ELEMENTWISE
    )
    wide = "".join([_lanes(name) for name in single] + [_wide(name, precision) for name in names])
    return (
        f"using T = {CTYPES[precision]};\n#if defined(__CUDA_ARCH__)\n{narrow}#else\nconstexpr int W = {lanes};\n"
        f"typedef T V __attribute__((ext_vector_type({lanes})));\nusing I = decltype(V() < V()); using B = I;\n"
        f"{wide}#endif\n"
    )


def _with_needs(called: Sequence[str], needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The functions, each after those it calls."""
    return list(dict.fromkeys(name for call in called for name in (*needs.get(call, ()), call)))


_ONE_BY_ONE = {  # C functions behind a vector function
    "sincos": ("sin", "cos"),
    **dict.fromkeys(("sin", "cos", "tan", "min", "max"), ()),
}
_BINARY = {"atan2", "pow", "min", "max"}


def _plain(name: str) -> str:
    """`f_name` on one number."""
    if name == "sincos":
        return "auto f_sincos = [](V x, V& s, V& c) { s = wp::sin(x); c = wp::cos(x); };\n"
    arguments, values = ("V x, V y", "x, y") if name in _BINARY else ("V x", "x")
    value = _KEEPING_NAN.get(name, f"wp::{_ELEMENTWISE.get(name, name)}({values})").format(one="wp::")
    return f"auto f_{name} = []({arguments}) -> V {{ return {value}; }};\n"


def _wide(name: str, precision: torch.dtype) -> str:
    """`f_name` on a vector: an instruction, or a polynomial, or one lane after the other."""
    arguments, values = ("V x, V y", "x, y") if name in _BINARY else ("V x", "x")
    if name == "sincos":
        return f"auto f_sincos = [&](V x, V& s, V& c) {{{elementary(precision)[name]}}};\n"
    if name in _KEEPING_NAN:
        body = f"return {_KEEPING_NAN[name].format(one='lanes_')};"
    elif name in _ELEMENTWISE:
        body = f"return __builtin_elementwise_{_ELEMENTWISE[name]}({values});"
    else:
        body = elementary(precision).get(name, f"return lanes_{name}({values});")
    return f"auto f_{name} = [&]({arguments}) -> V {{ {body} }};\n"


def _lanes(name: str) -> str:
    """`lanes_name` on a vector: one lane after the other, out of line."""
    arguments, values = ("V x, V y", ("x", "y")) if name in _BINARY else ("V x", ("x",))
    lane = ", ".join(f"T({value}[j])" for value in values)
    body = f"V out; for (int j = 0; j < W; ++j) out[j] = wp::{name}({lane}); return out;"
    return f"auto lanes_{name} = []({arguments}) __attribute__((noinline)) -> V {{ {body} }};\n"
