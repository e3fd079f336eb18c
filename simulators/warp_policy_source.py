"""The C++ of policies inside kernels: unit k of environment e of a block is `h[k][e]` (`warp_policy` says the maths).

Blocks of environments are loops of fixed length E, so that a compiler works on several at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sim2real.policy import Activation

# a setup, f, f' and f'' as expressions of z, h = f(z) and what the setup names
_SIGMOID = "const S s = S(1) / (S(1) + wp::exp(-z));"
_F: dict[Activation, tuple[str, str, str, str]] = {
    "identity": ("", "z", "S(1)", "S(0)"),
    "tanh": ("", "tanh_of(z)", "S(1) - h * h", "S(-2) * h * (S(1) - h * h)"),
    "relu": ("", "z > S(0) ? z : S(0)", "z > S(0) ? S(1) : S(0)", "S(0)"),
    "sigmoid": (_SIGMOID, "s", "h * (S(1) - h)", "h * (S(1) - h) * (S(1) - S(2) * h)"),
    "silu": (_SIGMOID, "z * s", "s * (S(1) + z * (S(1) - s))", "s * (S(1) - s) * (S(2) + z * (S(1) - S(2) * s))"),
    "elu": ("", "z > S(0) ? z : wp::exp(z) - S(1)", "z > S(0) ? S(1) : h + S(1)", "z > S(0) ? S(0) : h + S(1)"),
    "softplus": (
        _SIGMOID,
        "z > S(20) ? z : wp::log(S(1) + wp::exp(z))",
        "z > S(20) ? S(1) : s",
        "z > S(20) ? S(0) : s * (S(1) - s)",
    ),
}


@dataclass(frozen=True)
class Network:
    """What the native functions are written for: `widths` from the state to the last h, one activation per layer."""

    widths: tuple[int, ...]
    activations: tuple[Activation, ...]
    head: bool
    """the last h is the mean and, after it, the log of the standard deviation"""
    own: bool
    """each environment has weights of its own"""


def action_length(network: Network) -> int:
    """Components of the action."""
    return network.widths[-1] // 2 if network.head else network.widths[-1]


def header(precision: torch.dtype, wide: int) -> str:
    """Blocks, access to arrays, and tanh without a call, so that it runs on several environments at once.

    tanh(z) = -q / (2 + q) with q = exp(-2 |z|) - 1 = 2^k (1 + p) - 1; p = exp(x) - 1 by its series to x^13, where
    |x| <= ln(2) / 2 (remainder below 1e-17), and 2^k by its bits. Exact to a few units in the last place.
    """
    terms = [1.0 / math.factorial(order) for order in range(13, 1, -1)]
    horner = f"double p = {terms[0]!r};" + "".join(f" p = p * x + {term!r};" for term in terms[1:])
    return f"""using S = {"float" if precision == torch.float32 else "double"};
#if defined(__CUDA_ARCH__)
constexpr int E = 1;
#else
constexpr int E = {wide};
#endif
auto at3 = [](auto& x, int c, int i, int k) {{
    return (S*)((char*)x.data + c * (long long)x.strides[0]
        + i * (long long)x.strides[1] + k * (long long)x.strides[2]);
}};
auto at4 = [](auto& x, int c, int t, int i, int k) {{
    return (S*)((char*)x.data + c * (long long)x.strides[0] + t * (long long)x.strides[1]
        + i * (long long)x.strides[2] + k * (long long)x.strides[3]);
}};
auto load = [](const S* from, long long stride, int n, S* into) {{
    if (stride == sizeof(S) && n == E) for (int e = 0; e < E; ++e) into[e] = from[e];
    else for (int e = 0; e < E; ++e) into[e] = *(const S*)((const char*)from + (e < n ? e : 0) * stride);
}};
auto put = [](S* to, long long stride, int n, const S* from) {{
    for (int e = 0; e < n; ++e) *(S*)((char*)to + e * stride) = from[e];
}};
auto grow = [](S* to, long long stride, int n, const S* from) {{
    for (int e = 0; e < n; ++e) *(S*)((char*)to + e * stride) += from[e];
}};
auto tanh_of = [](S z) {{
    const double a = double(z);
    double y = a < 0.0 ? 2.0 * a : -2.0 * a;
    y = y < -40.0 ? -40.0 : y;
    const double shifted = y * 1.4426950408889634 + 6755399441055744.0;
    const double k = shifted - 6755399441055744.0;
    const double x = (y - k * 0.6931471803691238) - k * 1.9082149292705877e-10;
    {horner} p = (p * x) * x + x;
    long long bits;
    __builtin_memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    double power;
    __builtin_memcpy(&power, &bits, 8);
    const double q = power * p + (power - 1.0);
    const double t = -q / (2.0 + q);
    return S(a < 0.0 ? -t : t);
}};
(void)at3; (void)at4; (void)load; (void)put; (void)grow; (void)tanh_of;
for (int i0 = first; i0 < last; i0 += E) {{
const int n = last - i0 < E ? last - i0 : E;
"""


def read_rows(network: Network, *, dual: bool) -> str:
    """Pointers to the weights, and the states of the block as h0."""
    text = "const S* w = at3(weights, copy, i0, 0);\n" + _state_rows(network, "h0", "state")
    if dual:
        text += "const S* dw = at3(d_weights, copy, i0, 0);\n" + _state_rows(network, "dh0", "d_state")
    return text


def _state_rows(network: Network, name: str, array: str) -> str:
    a = network.widths[0]
    row = f"load(at4({array}, copy, time, i0, k), {array}.strides[2], n, {name}[k]);"
    return f"S {name}[{a}][E];\nfor (int k = 0; k < {a}; ++k) {row}\n"


def _layers(network: Network) -> list[tuple[int, int, int, int, int]]:
    """(number, inputs, outputs, place of W, place of b) per layer."""
    places, start = [], 0
    for number, (a, b) in enumerate(zip(network.widths[:-1], network.widths[1:], strict=True), start=1):
        places.append((number, a, b, start, start + a * b))
        start += (a + 1) * b
    return places


def _each(count: int, body: str) -> str:
    """Over the units k and environments e."""
    return f"for (int k = 0; k < {count}; ++k) for (int e = 0; e < E; ++e) {{ {body} }}\n"


def _unit(network: Network, i: int) -> str:
    """z, h and what f' and f'' of layer i want."""
    return f"const S z = z{i}[k][e], h = h{i}[k][e]; (void)z; (void)h; {_F[network.activations[i - 1]][0]}"


def forward(network: Network, *, dual: bool) -> str:
    """z_i, h_i of every layer; with dual also dz_i, dh_i."""
    text = ""
    for i, a, b, W, bias in _layers(network):
        setup, f, f1, _ = _F[network.activations[i - 1]]
        names = [f"z{i}", f"h{i}"] + ([f"dz{i}", f"dh{i}"] if dual else [])
        text += "S " + ", ".join(f"{name}[{b}][E]" for name in names) + ";\n"
        sums, start = "S x[E];", f"for (int e = 0; e < E; ++e) x[e] = w[{bias} + k];"
        add, end = f"x[e] += v * h{i - 1}[j][e];", f"z{i}[k][e] = x[e];"
        weight = f"const S v = w[{W} + k * {a} + j];"
        if dual:
            sums, start = "S x[E], y[E];", f"{start} for (int e = 0; e < E; ++e) y[e] = dw[{bias} + k];"
            add += f" y[e] += v * dh{i - 1}[j][e] + dv * h{i - 1}[j][e];"
            end += f" dz{i}[k][e] = y[e];"
            weight += f" const S dv = dw[{W} + k * {a} + j];"
        text += f"""for (int k = 0; k < {b}; ++k) {{
    {sums} {start}
    for (int j = 0; j < {a}; ++j) {{ {weight} for (int e = 0; e < E; ++e) {{ {add} }} }}
    for (int e = 0; e < E; ++e) {{ {end} }}
}}
"""
        text += _each(b, f"const S z = z{i}[k][e]; {setup} h{i}[k][e] = {f};")
        if dual:
            text += _each(b, f"{_unit(network, i)} dh{i}[k][e] = ({f1}) * dz{i}[k][e];")
    return text


def _noise(network: Network, *names: str) -> str:
    """Rows of the noise, where the policy has any."""
    text = "" if network.head else "if (std != S(0)) "
    reads = [f"load(at4({name}, copy, time, i0, k), {name}.strides[2], n, {short}[k]);" for name, short in
             zip(names, ("v", "dv"), strict=False)]  # fmt: skip
    m = action_length(network)
    arrays = ", ".join(f"{short}[{m}][E]" for short in ("v", "dv")[: len(names)])
    clear = "".join(f"{short}[k][e] = S(0);" for short in ("v", "dv")[: len(names)])
    return f"S {arrays};\n{_each(m, clear)}{text}for (int k = 0; k < {m}; ++k) {{ {' '.join(reads)} }}\n"


def action(network: Network) -> str:
    """Source of a_k = mean_k + spread_k noise_k, spread = exp(head of the network) or the constant `std`."""
    m, last = action_length(network), f"h{len(network.activations)}"
    spread = f"wp::exp({last}[{m} + k][e])" if network.head else "std"
    write = "put(at4(action_out, copy, time, i0, k), action_out.strides[2], n, u[k]);"
    text = _noise(network, "noise") + f"S u[{m}][E];\n" + _each(m, f"u[k][e] = {last}[k][e] + {spread} * v[k][e];")
    return text + f"for (int k = 0; k < {m}; ++k) {write}\n"


def action_push(network: Network) -> str:
    """Source of the tangent of `action`: d mean + d spread noise + spread d noise."""
    m, last = action_length(network), len(network.activations)
    if network.head:
        change = f"wp::exp(h{last}[{m} + k][e]) * (dh{last}[{m} + k][e] * v[k][e] + dv[k][e])"
    else:
        change = "std * dv[k][e]"
    write = "put(at4(d_action_out, copy, time, i0, k), d_action_out.strides[2], n, u[k]);"
    text = _noise(network, "noise", "d_noise") + f"S u[{m}][E];\n"
    return text + _each(m, f"u[k][e] = dh{last}[k][e] + {change};") + f"for (int k = 0; k < {m}; ++k) {write}\n"


def _cotangent(network: Network, source: str, name: str) -> str:
    """Rows of the action's cotangent, zero where a block has no environment."""
    L, m, width = len(network.activations), action_length(network), network.widths[-1]
    row = f"load(at3({source}, copy, i0, k), {source}.strides[1], n, {name}{L}[k]);"
    rest = f"for (int e = n; e < E; ++e) {name}{L}[k][e] = S(0);"
    return f"S {name}{L}[{width}][E];\nfor (int k = 0; k < {m}; ++k) {{ {row} {rest} }}\n"


def _write_noise(network: Network, *pairs: tuple[str, str]) -> str:
    m, text = action_length(network), "" if network.head else "if (std != S(0)) "
    rows = [f"put(at4({name}, copy, time, i0, k), {name}.strides[2], n, {short}[k]);" for name, short in pairs]
    return f"{text}for (int k = 0; k < {m}; ++k) {{ {' '.join(rows)} }}\n"


def _places(network: Network, *names: str) -> str:
    """Where the gradients of weights grow."""
    row = "i0" if network.own else "row"
    return "".join(
        f"S* {short} = at3({name}, copy, {row}, 0);\n" for name, short in zip(names, ("gw", "gdw"), strict=False)
    )


def pull(network: Network) -> str:
    """a: the cotangent of h, then of z."""
    L, m = len(network.activations), action_length(network)
    text = _cotangent(network, "g", "a") + f"S u[{m}][E];\n"
    if network.head:
        text += _noise(network, "noise") + _each(
            m, f"const S g1 = a{L}[k][e], x = wp::exp(h{L}[{m} + k][e]); u[k][e] = g1 * x; "
            f"a{L}[{m} + k][e] = g1 * v[k][e] * x;",
        )  # fmt: skip
    else:
        text += _each(m, f"u[k][e] = std * a{L}[k][e];")
    text += _write_noise(network, ("noise_out", "u")) + _places(network, "weights_out")
    for i, a, b, W, bias in reversed(_layers(network)):
        text += _each(b, f"{_unit(network, i)} a{i}[k][e] *= {_F[network.activations[i - 1]][2]};")
        text += f"if (wanted & 1) {{\n{_outer('gw', W, bias, ((f'a{i}', f'h{i - 1}'),), a, b)}}}\n"
        text += f"S a{i - 1}[{a}][E];\n{_transposed(((f'a{i - 1}', ((f'a{i}', 'w'),)),), W, a, b)}"
    return text + _grow_state(network, ("state_out", "a0"))


def second(network: Network) -> str:
    """a: the cotangent of h, then of z; q: that of dh, then of dz."""
    L, m = len(network.activations), action_length(network)
    text = _cotangent(network, "g", "a") + _cotangent(network, "p", "q") + f"S u[{m}][E], du[{m}][E];\n"
    if network.head:
        text += _noise(network, "noise", "d_noise") + _each(
            m, f"const S g1 = a{L}[k][e], p1 = q{L}[k][e], x = wp::exp(h{L}[{m} + k][e]), dl = dh{L}[{m} + k][e]; "
            f"u[k][e] = x * (g1 + dl * p1); du[k][e] = x * p1; q{L}[{m} + k][e] = x * v[k][e] * p1; "
            f"a{L}[{m} + k][e] = x * (v[k][e] * g1 + (dl * v[k][e] + dv[k][e]) * p1);",
        )  # fmt: skip
    else:
        text += _each(m, f"u[k][e] = std * a{L}[k][e]; du[k][e] = std * q{L}[k][e];")
    text += _write_noise(network, ("noise_out", "u"), ("d_noise_out", "du"))
    text += _places(network, "weights_out", "d_weights_out")
    for i, a, b, W, bias in reversed(_layers(network)):
        _, _, f1, f2 = _F[network.activations[i - 1]]
        text += _each(
            b, f"{_unit(network, i)} const S f1 = {f1}, y = q{i}[k][e]; "
            f"a{i}[k][e] = f1 * a{i}[k][e] + ({f2}) * dz{i}[k][e] * y; q{i}[k][e] = f1 * y;",
        )  # fmt: skip
        firsts = ((f"a{i}", f"h{i - 1}"), (f"q{i}", f"dh{i - 1}"))
        text += f"if (wanted & 1) {{\n{_outer('gw', W, bias, firsts, a, b)}}}\n"
        text += f"if (wanted & 2) {{\n{_outer('gdw', W, bias, ((f'q{i}', f'h{i - 1}'),), a, b)}}}\n"
        text += f"S a{i - 1}[{a}][E], q{i - 1}[{a}][E];\n"
        sums = ((f"a{i - 1}", ((f"a{i}", "w"), (f"q{i}", "dw"))), (f"q{i - 1}", ((f"q{i}", "w"),)))
        text += _transposed(sums, W, a, b)
    return text + _grow_state(network, ("state_out", "a0"), ("d_state_out", "q0"))


def _grow_state(network: Network, *pairs: tuple[str, str]) -> str:
    rows = [f"grow(at3({name}, copy, i0, k), {name}.strides[1], n, {short}[k]);" for name, short in pairs]
    return f"for (int k = 0; k < {network.widths[0]}; ++k) {{ {' '.join(rows)} }}\n"


def _transposed(sums: tuple[tuple[str, tuple[tuple[str, str], ...]], ...], W: int, a: int, b: int) -> str:
    """target[j] = sum over k and (vector, matrix) of matrix[k][j] vector[k], for each target."""
    names = [f"x{index}" for index in range(len(sums))]
    matrices = sorted({matrix for _, terms in sums for _, matrix in terms})
    weights = " ".join(f"const S v_{matrix} = {matrix}[{W} + k * {a} + j];" for matrix in matrices)
    add = " ".join(
        f"{x}[e] += " + " + ".join(f"v_{matrix} * {vector}[k][e]" for vector, matrix in terms) + ";"
        for x, (_, terms) in zip(names, sums, strict=True)
    )
    end = " ".join(f"{target}[j][e] = {x}[e];" for x, (target, _) in zip(names, sums, strict=True))
    clear = " ".join(f"{x}[e] = S(0);" for x in names)
    return f"""for (int j = 0; j < {a}; ++j) {{
    S {", ".join(f"{x}[E]" for x in names)}; for (int e = 0; e < E; ++e) {{ {clear} }}
    for (int k = 0; k < {b}; ++k) {{ {weights} for (int e = 0; e < E; ++e) {{ {add} }} }}
    for (int e = 0; e < E; ++e) {{ {end} }}
}}
"""


def _outer(target: str, W: int, bias: int, terms: tuple[tuple[str, str], ...], a: int, b: int) -> str:
    """target grows by the sum over environments of (outputs times inputs); the bias by the first outputs.

    Inputs are turned to `[e][j]` first, so that sums over a block stay in registers, sixteen inputs at a time.
    """
    text = f"for (int k = 0; k < {b}; ++k) {{ S x = S(0); for (int e = 0; e < E; ++e) x += {terms[0][0]}[k][e]; "
    text += f"{target}[{bias} + k] += x; }}\n"
    for index, (_, inputs) in enumerate(terms):
        text += f"S t{index}[E][{a}];\nfor (int j = 0; j < {a}; ++j) for (int e = 0; e < E; ++e) "
        text += f"t{index}[e][j] = {inputs}[j][e];\n"
    for first in range(0, a, 16):
        J = min(16, a - first)
        add = " + ".join(f"v{index} * t{index}[e][{first} + j]" for index in range(len(terms)))
        values = " ".join(f"const S v{index} = {outputs}[k][e];" for index, (outputs, _) in enumerate(terms))
        text += f"""for (int k = 0; k < {b}; ++k) {{
    S x[{J}]; for (int j = 0; j < {J}; ++j) x[j] = S(0);
    for (int e = 0; e < E; ++e) {{ {values} for (int j = 0; j < {J}; ++j) x[j] += {add}; }}
    for (int j = 0; j < {J}; ++j) {target}[{W} + k * {a} + {first} + j] += x[j];
}}
"""
    return text
