"""Arithmetic graphs as C++: statements on numbers, or on short vectors of them that the CPU computes together.

`V` is the type of every real value: one number on a GPU, several environments side by side on a CPU. Constants carry
all digits of the precision. Sine and cosine of one argument are computed together; on vectors by polynomials after a
reduction to [-pi/4, pi/4], with the C library for large arguments.
Reference: Cody and Waite, Software Manual for the Elementary Functions, 1980, chapter 8; coefficients of fdlibm
(float64) and Cephes (float32).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import torch

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
    "min": "min",
    "max": "max",
}

_SINCOS = {
    torch.float32: """
    const V k = __builtin_elementwise_rint(x * 0.636619772f);
    const V r = ((x - k * 1.5703125f) - k * 4.837512969970703125e-4f) - k * 7.54978995489188216e-8f;
    const I q = __builtin_convertvector(k, I);
    const V z = r * r;
    const V a = r + r * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - 1.9515295891e-4f * z));
    const V b = 1.0f - 0.5f * z
        + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + 2.443315711809948e-5f * z));
""",
    torch.float64: """
    const V k = __builtin_elementwise_rint(x * 0.63661977236758134308);
    const V r = (x - k * 1.57079632673412561417) - k * 6.07710050650619224932e-11;
    const I q = __builtin_convertvector(k, I);
    const V z = r * r;
    const V a = r + r * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03
        + z * (-1.98412698298579493134e-04 + z * (2.75573137070700676789e-06
        + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
    const V h = 0.5 * z;
    const V w = 1.0 - h;
    const V b = w + (((1.0 - w) - h) + z * z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03
        + z * (2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07
        + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11))))));
""",
}
_LARGE = {torch.float32: "8192.0f", torch.float64: "1.0e6"}  # beyond, the reduction loses digits


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
    if math.isnan(value) or math.isinf(value):
        return {True: "NAN", False: "INFINITY" if value > 0 else "-INFINITY"}[math.isnan(value)]
    if precision == torch.float32:
        return f"{float(torch.tensor(value, dtype=torch.float32))!r}f"
    return repr(value)


def prelude(outputs: Iterable[Node], precision: torch.dtype, *, lanes: int) -> str:
    """Types `T`, `V`, `B` and the functions `f_...` that these outputs use; one lane: plain numbers."""
    operations = {node.operation for node in in_order(outputs)} - TRUTHS - _INFIX.keys()
    operations -= {"input", "constant", "neg", "select"}
    called = sorted(
        operations | ({"sincos"} if operations & {"sin", "cos"} else set()), key=lambda name: (name != "sincos", name)
    )
    ctype = CTYPES[precision]
    plain = "".join(_plain(name) for name in called)
    if lanes == 1:
        return f"using T = {ctype}; using V = T; using B = bool; constexpr int W = 1;\n{plain}"
    wide = "".join(_wide(name, precision) for name in called)
    return (
        f"using T = {ctype};\n#if defined(__CUDA_ARCH__)\nusing V = T; using B = bool; constexpr int W = 1;\n{plain}"
        f"#else\nconstexpr int W = {lanes};\ntypedef T V __attribute__((ext_vector_type({lanes})));\n"
        f"using I = decltype(V() < V()); using B = I;\n{wide}#endif\n"
    )


_BINARY = {"atan2", "pow", "min", "max"}


def _plain(name: str) -> str:
    """`f_name` on one number."""
    if name == "sincos":
        return "auto f_sincos = [](V x, V& s, V& c) { s = wp::sin(x); c = wp::cos(x); };\n"
    arguments, values = ("V x, V y", "x, y") if name in _BINARY else ("V x", "x")
    return f"auto f_{name} = []({arguments}) -> V {{ return wp::{_ELEMENTWISE.get(name, name)}({values}); }};\n"


def _wide(name: str, precision: torch.dtype) -> str:
    """`f_name` on a vector: by instructions where there are some, else one lane after the other."""
    if name == "sincos":
        return (
            f"auto f_sincos = [](V x, V& s, V& c) {{{_SINCOS[precision]}"
            "    const V e = (q & 1) != 0 ? b : a, f = (q & 1) != 0 ? a : b;\n"
            "    s = (q & 2) != 0 ? -e : e; c = ((q + 1) & 2) != 0 ? -f : f;\n"
            f"    if (!(__builtin_reduce_max(__builtin_elementwise_abs(x)) < {_LARGE[precision]}))\n"
            "        for (int j = 0; j < W; ++j) { s[j] = wp::sin(T(x[j])); c[j] = wp::cos(T(x[j])); }\n};\n"
        )
    if name in ("sin", "cos"):
        return f"auto f_{name} = [&](V x) -> V {{ V s, c; f_sincos(x, s, c); return {name[0]}; }};\n"
    arguments, values = ("V x, V y", "x, y") if name in _BINARY else ("V x", "x")
    if name in _ELEMENTWISE:
        body = f"return __builtin_elementwise_{_ELEMENTWISE[name]}({values});"
    else:
        lane = ", ".join(f"T({value}[j])" for value in values.split(", "))
        body = f"V out; for (int j = 0; j < W; ++j) out[j] = wp::{name}({lane}); return out;"
    return f"auto f_{name} = []({arguments}) -> V {{ {body} }};\n"
