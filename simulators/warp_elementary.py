"""Elementary functions of vectors of numbers, as C++: polynomials of a reduced argument, to a few units of rounding.

`elementary(precision)[name]` is the body of `f_name(V x)`, of `f_atan2(V x, V y)` or of `f_sincos(V x, V& s, V& c)`,
with the number `T`, the vector `V` and the vector `I` of integers as wide. Lanes where a reduction fails or that are
not finite are computed by `lanes_name`, the C library; no lane depends on another. Sine and cosine are near their
zeros as precise as the reduced argument: to an absolute, not a relative, rounding.
Reference: Cody and Waite, Software Manual for the Elementary Functions, 1980; coefficients of Moshier's Cephes library,
release 2.8, and for sine and cosine in float64 of Sun's fdlibm 5.3.
"""

from __future__ import annotations

from functools import cache

import torch

# polynomials by Horner's rule, highest power first; those of "/" have a leading 1
_WIDE = {
    "sin": "1.58969099521155010221e-10 -2.50507602534068634195e-8 2.75573137070700676789e-6 -1.98412698298579493134e-4 "
    "8.33333333332248946124e-3 -1.66666666666666324348e-1",
    "cos": "-1.13596475577881948265e-11 2.08757232129817482790e-9 -2.75573143513906633035e-7 2.48015872894767294178e-5 "
    "-1.38888888888741095749e-3 4.16666666666666019037e-2",
    "atan": "-8.750608600031904122785e-1 -1.615753718733365076637e1 -7.500855792314704667340e1 "
    "-1.228866684490136173410e2 -6.485021904942025371773e1",
    "atan/": "1 2.485846490142306297962e1 1.650270098316988542046e2 4.328810604912902668951e2 "
    "4.853903996359136964868e2 1.945506571482613964425e2",
    "exp": "1.26177193074810590878e-4 3.02994407707441961300e-2 9.99999999999999999910e-1",
    "exp/": "3.00198505138664455042e-6 2.52448340349684104192e-3 2.27265548208155028766e-1 2.00000000000000000009",
    "log": "1.01875663804580931796e-4 4.97494994976747001425e-1 4.70579119878881725854 1.44989225341610930846e1 "
    "1.79368678507819816313e1 7.70838733755885391666",
    "log/": "1 1.12873587189167450590e1 4.52279145837532221105e1 8.29875266912776603211e1 7.11544750618563894466e1 "
    "2.31251620126765340583e1",
    "tanh": "-9.64399179425052238628e-1 -9.92877231001918586564e1 -1.61468768441708447952e3",
    "tanh/": "1 1.12811678491632931402e2 2.23548839060100448583e3 4.84406305325125486048e3",
}
_NARROW = {
    "sin": "-1.9515295891e-4 8.3321608736e-3 -1.6666654611e-1",
    "cos": "2.443315711809948e-5 -1.388731625493765e-3 4.166664568298827e-2",
    "atan": "8.05374449538e-2 -1.38776856032e-1 1.99777106478e-1 -3.33329491539e-1",
    "exp": "1.9875691500e-4 1.3981999507e-3 8.3334519073e-3 4.1665795894e-2 1.6666665459e-1 5.0000001201e-1",
    "log": "7.0376836292e-2 -1.1514610310e-1 1.1676998740e-1 -1.2420140846e-1 1.4249322787e-1 -1.6668057665e-1 "
    "2.0000714765e-1 -2.4999993993e-1 3.3333331174e-1",
    "tanh": "-5.70498872745e-3 2.06390887954e-2 -5.37397155531e-2 1.33314422036e-1 -3.33332819422e-1",
}


@cache
def elementary(precision: torch.dtype) -> dict[str, str]:
    """Function name -> C++ body."""
    wide = precision == torch.float64
    polynomials = {name: _horner(text) for name, text in (_WIDE if wide else _NARROW).items()}
    ratio = {
        name: f"{polynomials[name]} / {polynomials[name + '/']}" for name in polynomials if name + "/" in polynomials
    }
    rational = {**polynomials, **ratio}
    return {
        "sincos": _sincos(polynomials, wide=wide),
        "sin": "V s, c; f_sincos(x, s, c); return s;",
        "cos": "V s, c; f_sincos(x, s, c); return c;",
        "tan": "V s, c; f_sincos(x, s, c); return s / c;",
        "atan": _arctangent(rational["atan"], wide=wide),
        "atan2": _ARCTANGENT_2,
        "exp": _exponential(polynomials, wide=wide),
        "log": _logarithm(rational["log"], wide=wide),
        "tanh": _hyperbolic_tangent(rational["tanh"]),
    }


NEEDS = {"sin": ("sincos",), "cos": ("sincos",), "tan": ("sincos",), "atan2": ("atan",), "tanh": ("exp",)}
"""functions that others call"""


def _horner(text: str) -> str:
    coefficients = [f"T({coefficient})" for coefficient in text.split()]
    if coefficients[0] == "T(1)":
        coefficients[:2] = [f"(z + {coefficients[1]})"]
    result = coefficients[0]
    for coefficient in coefficients[1:]:
        result = f"({result} * z + {coefficient})"
    return result


def _library(name: str, allowed: str, arguments: str = "x") -> str:
    """The lanes where the condition does not hold by the C library."""
    return f"""const I fine = {allowed};
    if (!__builtin_reduce_and(fine)) out = fine ? out : lanes_{name}({arguments});
"""


_SIZE = "const V m = __builtin_elementwise_abs(x);\n"


def _sincos(polynomials: dict[str, str], *, wide: bool) -> str:
    parts = ("1.57079632673412561417", "6.07710050650619224932e-11") if wide else (
        "1.5703125", "4.837512969970703125e-4", "7.54978995489188216e-8"
    )  # fmt: skip
    reduced = "x"
    for part in parts:  # pi / 2 in pieces whose multiples are exact
        reduced = f"({reduced} - k * T({part}))"
    largest = "1.0e6" if wide else "8192.0"
    return f"""
    const V k = __builtin_elementwise_rint(x * T(0.63661977236758134308));
    const V r = {reduced};
    const I q = __builtin_convertvector(k, I);
    const V z = r * r, h = T(0.5) * z, w = T(1) - h;
    const V a = r + r * z * {polynomials["sin"]};
    const V b = w + (((T(1) - w) - h) + z * z * {polynomials["cos"]});
    const V e = (q & 1) != 0 ? b : a, f = (q & 1) != 0 ? a : b;
    s = (q & 2) != 0 ? -e : e;
    c = ((q + 1) & 2) != 0 ? -f : f;
    const I fine = __builtin_elementwise_abs(x) < T({largest});
    if (!__builtin_reduce_and(fine)) {{ s = fine ? s : lanes_sin(x); c = fine ? c : lanes_cos(x); }}
"""


def _arctangent(polynomial: str, *, wide: bool) -> str:
    middle, rest = ("0.66", "T(6.123233995736765886e-17)") if wide else ("0.4142135623730950", "T(0)")
    return f"""
    {_SIZE}    const I far = m > T(2.414213562373095), mid = m > T({middle});
    const V t = (far ? V(T(-1)) : mid ? m - T(1) : m) / (far ? m : mid ? m + T(1) : V(T(1)));
    const V z = t * t;
    V out = t * z * {polynomial} + t;
    out += far ? V({rest}) : mid ? V(T(0.5) * {rest}) : V(T(0));
    out += far ? V(T(1.57079632679489661923)) : mid ? V(T(0.78539816339744830962)) : V(T(0));
    out = __builtin_elementwise_copysign(out, x);
    {_library("atan", "m < T(INFINITY)")}    return out;
"""


_ARCTANGENT_2 = f"""
    const V a = f_atan(x / y), b = a + __builtin_elementwise_copysign(V(T(3.14159265358979323846)), x);
    V out = y < T(0) ? b : a;
    const V p = __builtin_elementwise_abs(x), q = __builtin_elementwise_abs(y);
    {_library("atan2", "(p > T(0)) & (q > T(0)) & (p < T(INFINITY)) & (q < T(INFINITY))", "x, y")}    return out;
"""


def _exponential(polynomials: dict[str, str], *, wide: bool) -> str:
    high, low = ("6.93145751953125e-1", "1.42860682030941723212e-6") if wide else ("0.693359375", "-2.12194440e-4")
    if wide:
        power = f"const V p = r * {polynomials['exp']}; const V y = T(1) + T(2) * p / ({polynomials['exp/']} - p);"
        bias, shift, largest = 1023, 52, 700
    else:
        power = f"const V y = {polynomials['exp']} * r * r + r + T(1);"
        bias, shift, largest = 127, 23, 80
    return f"""
    const V k = __builtin_elementwise_rint(x * T(1.44269504088896340736));
    const V r = (x - k * T({high})) - k * T({low});
    const V z = {"r * r" if wide else "r"};
    {power}
    const I n = (__builtin_convertvector(k, I) + {bias}) << {shift};
    V scale;
    __builtin_memcpy(&scale, &n, sizeof(V));
    V out = y * scale;
    {_library("exp", f"__builtin_elementwise_abs(x) < T({largest})")}    return out;
"""


def _logarithm(polynomial: str, *, wide: bool) -> str:
    bias, shift, fraction = (1022, 52, "0x000fffffffffffffLL") if wide else (126, 23, "0x007fffff")
    half, least = ("0x3fe0000000000000LL", "2.3e-308") if wide else ("0x3f000000", "1.2e-38")
    high, low = ("0.693359375", "-2.121944400546905827679e-4")
    return f"""
    I bits;
    __builtin_memcpy(&bits, &x, sizeof(V));
    V e = __builtin_convertvector((bits >> {shift}) - {bias}, V);
    bits = (bits & {fraction}) | {half};
    V f;
    __builtin_memcpy(&f, &bits, sizeof(V));
    const I small = f < T(0.70710678118654752440);
    e = small ? e - T(1) : e;
    f = (small ? f + f : f) - T(1);
    const V z = f, w = f * f;
    V out = f * (w * {polynomial}) + e * T({low});
    out = f + (out - T(0.5) * w) + e * T({high});
    {_library("log", f"(x > T({least})) & (x < T(INFINITY))")}    return out;
"""


def _hyperbolic_tangent(polynomial: str) -> str:
    return f"""
    {_SIZE}    const V z = x * x;
    const V near = x + x * z * {polynomial};
    const V far = T(1) - T(2) / (f_exp(__builtin_elementwise_min(m + m, V(T(60)))) + T(1));
    V out = m < T(0.625) ? near : __builtin_elementwise_copysign(far, x);
    {_library("tanh", "m < T(INFINITY)")}    return out;
"""
