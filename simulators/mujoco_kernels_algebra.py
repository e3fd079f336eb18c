"""C++ of the arithmetic in the MuJoCo kernels: numbers, vectors, screws, inertias, of a tile of environments.

`V` is one number of every environment of a tile (`warp_source`). The kernels are written once on numbers `N`:

    plain   N = V                       the pass itself
    dual    N = v + d eps, eps^2 = 0    the pass and its derivative along given tangents, exact

A screw is a twist (angular w, linear l) or a wrench (moment w, force l), about the origin. With cross products of
screws as in Featherstone,

    X.cross(Y)  = (wx x wy, wx x ly + lx x wy)        Y moving with X
    X.wrench(F) = (wx x n + lx x f, wx x f)           X.cross(Y) . F = -Y . X.wrench(F)

Reference: Featherstone, Rigid Body Dynamics Algorithms, 2008, chapter 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sim2real.simulators.warp_dual import tangents
from sim2real.simulators.warp_graph import Node, variable
from sim2real.simulators.warp_source import statements

PRECISION = torch.float64


@dataclass(frozen=True)
class Piece:
    """A straight-line function of numbers: `name(x, y)` computes y from x[0], x[1], ...

    moving: how many of the first inputs have a tangent; the rest stand still.
    """

    name: str
    moving: int
    outputs: tuple[Node, ...]


def inputs(count: int) -> list[Node]:
    """The inputs of a piece."""
    return [variable(f"x[{k}]") for k in range(count)]


def graphs(piece: Piece, *, dual: bool) -> list[Node]:
    """What a piece computes: its outputs, on dual numbers also their derivatives."""
    if not dual:
        return list(piece.outputs)
    seeds = {variable(f"x[{k}]"): variable(f"dx[{k}]") for k in range(piece.moving)}
    return [*piece.outputs, *tangents(piece.outputs, seeds)]


def piece_text(piece: Piece, *, dual: bool) -> str:
    """C++ of a piece; on dual numbers its inputs are first taken apart."""
    outputs = graphs(piece, dual=dual)
    lines, results = statements(outputs, PRECISION)
    count = len(piece.outputs)
    text = [f"auto {piece.name} = [&](const N* input, N* y) APART {{"]
    if dual:
        used = 1 + max((int(n) for n in _numbers(lines, results)), default=0)
        text += [f"V x[{used}], dx[{used}];"]
        text += [f"for (int k = 0; k < {used}; ++k) {{ x[k] = input[k].v; dx[k] = input[k].d; }}"]
        stores = [f"y[{k}] = N({results[k]}, {results[count + k]});" for k in range(count)]
    else:
        text += ["const V* x = input;"]
        stores = [f"y[{k}] = {results[k]};" for k in range(count)]
    return "\n".join([*text, *lines, *stores, "};\n"])


def _numbers(lines: Sequence[str], results: Sequence[str]) -> list[str]:
    """Indices of the inputs that a text reads."""
    return [part.split("]")[0] for line in (*lines, *results) for part in line.split("x[")[1:]]


def algebra(*, dual: bool) -> str:
    """C++ of numbers, vectors, screws, poses and inertias; `V`, `T`, `B`, `W`, `f_sincos` are defined before."""
    return (_DUAL if dual else _PLAIN) + _VECTORS


_PLAIN = """
using N = V;
constexpr bool DUAL = false;
auto value_of = [](N x) -> V { return x; };
auto tangent_of = [](N x) -> V { return x; };
auto real = [](V x) -> N { return x; };
auto number = [](V x, V d) -> N { return x; };
auto pick = [](B c, N a, N b) -> N { return c ? a : b; };
auto turning = [&](N x, N& s, N& c) { f_sincos(x, s, c); };
auto reciprocal = [](N x) -> N { return T(1) / x; };
auto root = [](N x) -> N { return __builtin_elementwise_sqrt(x); };
"""

_DUAL = """
struct N {
    V v, d;
    N() = default;
    N(V v) : v(v), d(V(T(0))) {}
    N(T v) : v(V(v)), d(V(T(0))) {}
    N(V v, V d) : v(v), d(d) {}
    N operator+(const N& o) const { return N(v + o.v, d + o.d); }
    N operator-(const N& o) const { return N(v - o.v, d - o.d); }
    N operator*(const N& o) const { return N(v * o.v, d * o.v + v * o.d); }
    N operator*(T o) const { return N(v * o, d * o); }
    N operator-() const { return N(-v, -d); }
    N& operator+=(const N& o) { v += o.v; d += o.d; return *this; }
    N& operator-=(const N& o) { v -= o.v; d -= o.d; return *this; }
};
constexpr bool DUAL = true;
auto value_of = [](N x) -> V { return x.v; };
auto tangent_of = [](N x) -> V { return x.d; };
auto real = [](V x) -> N { return N(x); };
auto number = [](V x, V d) -> N { return N(x, d); };
auto pick = [](B c, N a, N b) -> N { return N(c ? a.v : b.v, c ? a.d : b.d); };
auto turning = [&](N x, N& s, N& c) {
    V sine, cosine;
    f_sincos(x.v, sine, cosine);
    s = N(sine, cosine * x.d);
    c = N(cosine, -sine * x.d);
};
auto reciprocal = [](N x) -> N { const V r = T(1) / x.v; return N(r, -r * r * x.d); };
auto root = [](N x) -> N { const V r = __builtin_elementwise_sqrt(x.v); return N(r, x.d * (T(0.5) / r)); };
"""

_VECTORS = """
const N zero = real(V(T(0)));
struct V3 {
    N x, y, z;
    V3 operator+(const V3& o) const { return {x + o.x, y + o.y, z + o.z}; }
    V3 operator-(const V3& o) const { return {x - o.x, y - o.y, z - o.z}; }
    V3 operator*(const N& s) const { return {x * s, y * s, z * s}; }
    V3 operator*(T s) const { return {x * s, y * s, z * s}; }
    V3 operator-() const { return {-x, -y, -z}; }
    N dot(const V3& o) const { return x * o.x + y * o.y + z * o.z; }
    V3 cross(const V3& o) const { return {y * o.z - z * o.y, z * o.x - x * o.z, x * o.y - y * o.x}; }
};
struct S6 {
    V3 w, l;
    S6 operator+(const S6& o) const { return {w + o.w, l + o.l}; }
    S6 operator-(const S6& o) const { return {w - o.w, l - o.l}; }
    S6 operator*(const N& s) const { return {w * s, l * s}; }
    N dot(const S6& o) const { return w.dot(o.w) + l.dot(o.l); }
    S6 cross(const S6& o) const { return {w.cross(o.w), w.cross(o.l) + l.cross(o.w)}; }
    S6 wrench(const S6& f) const { return {w.cross(f.w) + l.cross(f.l), w.cross(f.l)}; }
};
struct Pose {
    V3 p, x, y, z;
    V3 turn(const T* k) const { return x * k[0] + y * k[1] + z * k[2]; }
    V3 turn(const V3& u) const { return x * u.x + y * u.y + z * u.z; }
    V3 back(const V3& u) const { return {x.dot(u), y.dot(u), z.dot(u)}; }
};
struct Symmetric {
    N xx, yy, zz, xy, xz, yz;
    Symmetric operator+(const Symmetric& o) const {
        return {xx + o.xx, yy + o.yy, zz + o.zz, xy + o.xy, xz + o.xz, yz + o.yz};
    }
    V3 operator*(const V3& u) const {
        return {xx * u.x + xy * u.y + xz * u.z, xy * u.x + yy * u.y + yz * u.z, xz * u.x + yz * u.y + zz * u.z};
    }
};
struct Rigid {  // mass, mass times centre of mass, inertia about the origin
    N m;
    V3 h;
    Symmetric o;
    S6 operator*(const S6& u) const { return {o * u.w + h.cross(u.l), u.l * m - h.cross(u.w)}; }
    Rigid operator+(const Rigid& r) const { return {m + r.m, h + r.h, o + r.o}; }
};
const V3 none = {zero, zero, zero};
const S6 still = {none, none};
auto point_rate = [](const S6& u, const V3& x) -> V3 { return u.l + u.w.cross(x); };
auto force_at = [](const V3& x, const V3& f) -> S6 { return {x.cross(f), f}; };
auto unit = [&](const V3& u) -> V3 {  // of a zero vector zero
    const N square = u.dot(u);
    const B some = value_of(square) > V(T(1e-28));
    return u * pick(some, reciprocal(root(pick(some, square, real(V(T(1)))))), zero);
};
auto seeded = [&](const V3& n) -> V3 {  // what MuJoCo projects to get the first tangent of a normal
    const B steep = __builtin_elementwise_abs(value_of(n.y)) < V(T(0.5));
    const N one = real(V(T(1)));
    return {zero, pick(steep, one, zero), pick(steep, zero, one)};
};
auto magnitude_of = [](V x) -> V { return __builtin_elementwise_abs(x); };
auto magnitude = [&](const V3& u) -> V {
    return magnitude_of(value_of(u.x)) + magnitude_of(value_of(u.y)) + magnitude_of(value_of(u.z));
};
"""
