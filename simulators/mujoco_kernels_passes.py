"""The three passes of the MuJoCo kernels, each one native function over a range of environments, put together.

    push     dr at da = 0, da = -H^-1 dr;  G dw = M da + dM (a - w) + h dD w                          on dual numbers
    pull     lam = -H^-1 M mu, mu = G^-1 g (explicit: lam = -H^-1 g), then the gradients of phi      on numbers
    second   the same on dual numbers, along (dx, dg): its derivative is the second-order product

`second` needs no formula of its own: the derivative of J(x)' h along (dx, g) is what is asked for, H included.
A pass is compiled once for every `Variant`, never for a model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import warp as wp

from sim2real.simulators.mujoco_kernels_adjoint import BODIES, GRADIENTS, ROW_GRADIENTS
from sim2real.simulators.mujoco_kernels_algebra import PRECISION, Piece, algebra, graphs, piece_text
from sim2real.simulators.mujoco_kernels_contacts import BETWEEN, CONTACTS, CORES, FRAMES
from sim2real.simulators.mujoco_kernels_laws import (
    actuator_pieces,
    contact_pieces,
    friction_pieces,
    limit_pieces,
    spring_pieces,
)
from sim2real.simulators.mujoco_kernels_model import FIELDS
from sim2real.simulators.mujoco_kernels_rows import LIMITS, RESIDUAL, ROWS, SPATIAL
from sim2real.simulators.mujoco_kernels_sweeps import FACTOR, INERTIAS, POSES, TWISTS
from sim2real.simulators.warp_graph import apply, variable
from sim2real.simulators.warp_native import warp_function
from sim2real.simulators.warp_source import LANES, prelude

SLOTS = ("base", "shift", "velocity", "act", "ctrl", "force", "advance", "acceleration", "cotangent", *FIELDS)
"""arrays of a pass: inputs of the program, w, a, the cotangent of w, fields"""
WORDS = 12
"""integers of a slot: address, bytes between environments, bytes between components; of x, dx, and what is written"""
INTEGERS = (
    *("body_parent", "body_joint", "body_joints", "body_group", "body_groups", "body_last"),
    *("joint_type", "joint_qpos", "joint_dof", "group_first", "group_size"),
    *("above", "above_first", "all_above", "all_above_first", "limit_joint"),
    *("actuator_joint", "actuator_affine", "actuator_act", "elastic", "rubbing", "slot_first", "slot_length"),
    *("contact_kind", "contact_dim", "contact_geom", "contact_rubbing", "contact_body"),
)
REALS = (
    *("body_pos", "body_turn", "joint_axis", "joint_anchor", "joint_start"),
    *("limit_margin", "actuator_control", "actuator_force_range"),
    *(f"contact_{name}{k}" for name in ("point", "axis", "half", "radius") for k in (0, 1)),
    *("contact_margin", "contact_weight", "contact_reach"),
)
SIZES = (
    "bodies",
    "dofs",
    "joints",
    "groups",
    "actuators",
    "limits",
    "contacts",
    "first_moving",
    "components",
    "implicit",
    "cotangents",
)
NUMBERS = ("timestep", "impratio")
SCRATCH = (  # name, type, numbers of each, how many
    ("pose", "Pose", 12, "bodies"),
    ("centre", "V3", 3, "bodies"),
    ("mass", "N", 1, "bodies"),
    ("inertia", "Symmetric", 6, "bodies"),
    ("composite", "Rigid", 10, "bodies"),
    ("spatial", "N", 21, "bodies"),
    *((name, "S6", 6, "bodies") for name in ("velocity", "bias", "rate", "virtually", "pushed", "rest", "load")),
    *((f"by_{name}", "S6", 6, "bodies") for name in ("velocity", "rate", "bias", "turn", "push", "rest")),
    ("axis", "S6", 6, "dofs"),
    ("before", "S6", 6, "groups"),
    *((name, "N", 1, "dofs") for name in ("v", "a", "w", "lam", "mu", "z", "r", "push", "stiff")),
    *((name, "N", 1, "squares") for name in ("M", "H", "G")),
    ("contact", "Contact", 13, "contacts"),
    ("gains", "N", 1, "components"),
    ("loaded", "int", 1, "bodies"),
    ("active", "int", 1, "contacts"),
)
Pass = Literal["push", "pull", "second"]


@dataclass(frozen=True)
class Variant:
    """What a pass is compiled for.

    soft: with gradients by solref and solimp; elliptic: friction cones are elliptic.
    """

    which: Pass
    soft: bool
    elliptic: bool


def scratch_numbers(sizes: dict[str, int]) -> int:
    """Numbers `N` that one thread needs."""
    counts = {**sizes, "squares": sizes["dofs"] ** 2}
    return sum(width * counts[count] for _, _, width, count in SCRATCH)


@cache
def kernel(variant: Variant) -> Any:
    """The Warp kernel `(begin, end, scratch, pointers)` of a pass."""
    snippet = source(variant)
    digest = hashlib.blake2b(snippet.encode(), digest_size=6).hexdigest()
    types = {"begin": wp.int32, "end": wp.int32, "scratch": wp.int64, "pointers": wp.array(dtype=wp.int64)}
    name = f"mujoco_{variant.which}_{digest}"
    tile = warp_function("@wp.func_native(snippet)", f"{name}_tile", types, "...", {"snippet": snippet})
    decorator = "@wp.kernel(enable_backward=False, module='unique')"
    return warp_function(decorator, name, types, "tile(begin, end, scratch, pointers)", {"tile": tile})


def pieces(variant: Variant) -> list[Piece]:
    """The scalar laws that a pass uses."""
    soft = variant.soft
    found = [piece for dim in (1, 3) for piece in contact_pieces(dim, soft=soft, elliptic=variant.elliptic)]
    found += [*limit_pieces(soft=soft), *friction_pieces(soft=soft), *actuator_pieces(), *spring_pieces()]
    return [piece for piece in found if variant.which != "push" or not piece.name.endswith("_pull")]


def source(variant: Variant) -> str:
    """C++ of a pass."""
    dual = variant.which != "pull"
    laws = pieces(variant)
    angle = variable("x[0]")
    used = [node for piece in laws for node in graphs(piece, dual=dual)] + [apply("sin", angle), apply("cos", angle)]
    types = prelude(used, PRECISION, lanes=LANES[PRECISION]).replace(*_POWER)
    parts = [types, algebra(dual=dual), _SETTING.format(**_setting(variant))]
    parts += [piece_text(piece, dual=dual) for piece in laws]
    parts += [POSES, TWISTS, INERTIAS, FACTOR, CORES, CONTACTS, LIMITS, SPATIAL, ROWS, RESIDUAL, _POSITION]
    if variant.which == "push":
        parts += [_PUSH]
    else:
        parts += [BODIES, BETWEEN, FRAMES, ROW_GRADIENTS, GRADIENTS, _PULL]
    text = "\n".join(parts)
    return text.replace("APART", "__attribute__((noinline))")  # keeps code short, and so quick to compile


def _setting(variant: Variant) -> dict[str, str]:
    """The parts of `_SETTING` that tables give."""
    lines = [f"const int* {name} = (const int*)*word++;" for name in INTEGERS]
    lines += [f"const T* {name} = (const T*)*word++;" for name in REALS]
    lines += [f"const int {name} = (int)*word++;" for name in SIZES]
    lines += [f"T {name}; __builtin_memcpy(&{name}, word++, sizeof(T));" for name in NUMBERS]
    room = ["const int squares = dofs * dofs;", "N* room = (N*)scratch;"]
    room += [f"{kind}* {name} = ({kind}*)room; room += {width} * {count};" for name, kind, width, count in SCRATCH]
    return {
        "slots": ", ".join(name.upper() for name in SLOTS),
        "tables": "\n".join(lines),
        "room": "\n".join(room),
        "soft": str(variant.soft).lower(),
        "words": str(WORDS),
        "count": str(len(SLOTS)),
    }


_POWER = (  # of vectors: usual exponents without the C library
    "return lanes_pow(x, y);",
    """if (__builtin_reduce_and(y == V(T(2)))) return x * x;
    if (__builtin_reduce_and(y == V(T(1)))) return x;
    if (__builtin_reduce_and(y == V(T(0)))) return V(T(1));
    return lanes_pow(x, y);""",
)

_SETTING = """
struct Contact {{ V3 n, t, s, x; N distance; }};
struct Cores {{ V3 p, a, q, b; N s, t; B free_s, free_t; }};  // of capsules: p + s a and q + t b
enum {{ {slots} }};
constexpr bool SOFT = {soft};
constexpr int NUMBER = sizeof(N) / sizeof(T);
constexpr int WORDS = {words}, COUNT = {count};
const long long* slot = (const long long*)pointers.data;
const long long* word = slot + WORDS * {count};
unsigned char* covered = (unsigned char*)*word++;
{tables}
{room}
int i = begin, n = W;
bool full = false;
V size = V(T(0));
V3 origin = none;
const int* list = above;
const int* first = above_first;
auto fetch = [&](long long base, long long step) APART -> V {{
    if (base == 0) return V(T(0));
    const char* at = (const char*)base + i * step;
    if (step == 0) return V(*(const T*)at);
    V x;
    if (n < W) {{
        for (int j = 0; j < W; ++j) x[j] = *(const T*)(at + (j < n ? j : n - 1) * step);
    }} else if (step == sizeof(T)) {{
        __builtin_memcpy(&x, at, sizeof(V));
    }} else {{  // built in a register: a vector read back from numbers just stored would wait for them
#pragma unroll
        for (int j = 0; j < W; ++j) x[j] = *(const T*)(at + j * step);
    }}
    return x;
}};
auto keep = [&](long long base, long long step, V x) APART {{
    if (base == 0) return;
    char* at = (char*)base + i * step;
    alignas(V) T lane[W];
    *(V*)lane = x;
    if (step == sizeof(T) && n == W) __builtin_memcpy(at, lane, sizeof(V));
    else for (int j = 0; j < n; ++j) *(T*)(at + j * step) = lane[j];
}};
auto keep_all = [&](const long long* out, int from, int count, const N* x, int part) APART {{
    if (out[0] == 0) return;  // part: 0 for values, W for tangents
    const T* lane = (const T*)x + part;
    const long long at = out[0] + from * out[2];
    const bool whole = out[1] == sizeof(T) && n == W && (at + i * (long long)sizeof(T)) % sizeof(V) == 0;
    for (int c = 0; c < count; ++c) {{
        const V y = *(const V*)(lane + c * NUMBER);
        if (whole)  // past the cache, which the next tiles need
            __builtin_nontemporal_store(y, (V*)(at + c * out[2] + i * (long long)sizeof(T)));
        else keep(at + c * out[2], out[1], y);
    }}
}};
auto given = [&](int s, int c) -> V {{
    const long long* x = slot + WORDS * s;
    return fetch(x[0] + c * x[2], x[1]);
}};
auto turned = [&](int d) -> N {{  // the displacement of a degree of freedom: zero, with its tangent
    if (!DUAL) return zero;
    const long long* x = slot + WORDS * SHIFT;
    return number(V(T(0)), x[3] ? fetch(x[3] + d * x[5], x[4]) : V(T(0)));
}};
auto field = [&](int s, int c) APART -> N {{
    const long long* x = slot + WORDS * s;
    const V value = fetch(x[0] + c * x[2], x[1]);
    if (!DUAL || x[3] == 0) return real(value);
    return number(value, fetch(x[3] + c * x[5], x[4]));
}};
auto position = [&](int q, int d) -> N {{ return real(given(BASE, q)) + turned(d); }};
auto all = [&](int s, N* x) {{
    for (int d = 0; d < dofs; ++d) x[d] = field(s, d);
}};
bool wanted[{count}];
for (int s = 0; s < {count}; ++s) wanted[s] = slot[WORDS * s + 6] || slot[WORDS * s + 9] || s == SHIFT;
auto gain = [&](int s, int c, const N& x) APART {{
    if (wanted[s]) gains[slot_first[s] + c] += x;
}};
auto gained = [&](int s, int c) -> N {{ return gains[slot_first[s] + c]; }};
"""

_POSITION = """
auto of_advance = [&]() APART {  // a where it is not given: M a = G w
    all(ADVANCE, w);
    for (int d = 0; d < dofs; ++d) a[d] = w[d];
    if (!implicit) return;
    times(M, w, a);
    for (int d = 0; d < dofs; ++d) {
        a[d] += field(DOF_DAMPING, d) * w[d] * T(timestep);
        G[d * dofs + d] = M[d * dofs + d];
        for (int k = above_first[d]; k < above_first[d + 1]; ++k) G[d * dofs + above[k]] = M[d * dofs + above[k]];
    }
    factor(G, above, above_first);
    solve(G, a, above, above_first);
};
auto at_state = [&]() APART {  // all that depends on the position and velocity
    origin = none;
    pose[0] = {none, {real(V(T(1))), zero, zero}, {zero, real(V(T(1))), zero}, {zero, zero, real(V(T(1)))}};
    for (int b = 1; b <= first_moving; ++b) place(b);
    const V3 p = pose[first_moving].p;
    origin = {real(value_of(p.x)), real(value_of(p.y)), real(value_of(p.z))};
    pose[0].p = -origin;
    for (int b = 1; b < bodies; ++b) place(b);
    weigh();
    all(VELOCITY, v);
    all(ACCELERATION, a);
    velocity[0] = rate[0] = virtually[0] = pushed[0] = rest[0] = still;
    bias[0] = {none, {-field(GRAVITY, 0), -field(GRAVITY, 1), -field(GRAVITY, 2)}};
    along_velocity();
    inertia_matrix(M);
    if (!slot[WORDS * ACCELERATION]) of_advance();
};
auto at_acceleration = [&]() APART {
    along(rate, a);
    residual();
    assemble();
    V worst = V(T(0));
    for (int d = 0; d < dofs; ++d) worst = __builtin_elementwise_max(worst, magnitude_of(value_of(r[d])));
    const B fine = worst <= size * T(1e-8);
    for (int j = 0; j < n; ++j) covered[i + j] = fine[j] != 0;
};
auto damped = [&]() APART {  // G = M - h D, factored
    N x[16], y;
    for (int d = 0; d < dofs; ++d) {
        G[d * dofs + d] = M[d * dofs + d] + field(DOF_DAMPING, d) * T(timestep);
        for (int k = above_first[d]; k < above_first[d + 1]; ++k) G[d * dofs + above[k]] = M[d * dofs + above[k]];
    }
    if (implicit == 2)  // implicitfast: D has the actuators' damping too
        for (int k = 0; k < actuators; ++k) {
            const int d = joint_dof[actuator_joint[k]];
            actuator_input(k, x);
            actuator_slope(x, &y);
            G[d * dofs + d] -= y * T(timestep);
        }
    factor(G, above, above_first);
};
auto moved_acceleration = [&](N* x) APART {  // x = da (its value): a moves so that r stays zero
    for (int d = 0; d < dofs; ++d) x[d] = real(-tangent_of(r[d]));
    solve(H, x, list, first);
};
"""

_PUSH = """
for (; i < end; i += W) {
    n = end - i < W ? end - i : W;
    at_state();
    at_acceleration();
    moved_acceleration(lam);
    if (implicit) {  // G dw = M da + dM (a - w) + h dD w
        all(ADVANCE, w);
        for (int d = 0; d < dofs; ++d) z[d] = real(value_of(a[d]) - value_of(w[d]));
        along(rest, z);
        for (int b = 0; b < bodies; ++b) load[b] = body_last[b] < 0 ? still : momentum(b, rest[b]);
        times(M, lam, mu);
        for (int d = 0; d < dofs; ++d) stiff[d] = -field(DOF_DAMPING, d);
        if (implicit == 2)
            for (int k = 0; k < actuators; ++k) {
                N x[16], y;
                actuator_input(k, x);
                actuator_slope(x, &y);
                stiff[joint_dof[actuator_joint[k]]] += y;
            }
        for (int b = bodies - 1; b > 0; --b) {
            for (int g = body_group[b]; g < body_group[b] + body_groups[b]; ++g)
                for (int d = group_first[g]; d < group_first[g] + group_size[g]; ++d) {
                    N f = axis[d].dot(load[b]) + field(DOF_ARMATURE, d) * z[d];
                    f += stiff[d] * (real(value_of(w[d])) * T(timestep));
                    lam[d] = real(value_of(mu[d]) + tangent_of(f));
                }
            load[body_parent[b]] = load[body_parent[b]] + load[b];
        }
        damped();
        solve(G, lam, above, above_first);
    }
    const long long* out = slot + WORDS * COTANGENT;
    for (int d = 0; d < dofs; ++d) keep(out[6] + d * out[8], out[7], value_of(lam[d]));
}
"""

_PULL = """
for (; i < end; i += W) {
    n = end - i < W ? end - i : W;
    at_state();
    at_acceleration();
    if (DUAL && implicit) {  // the tangent of a, which the given one lacks
        moved_acceleration(lam);
        for (int d = 0; d < dofs; ++d) a[d] = number(value_of(a[d]), value_of(lam[d]));
        at_acceleration();
    }
    if (implicit) {
        all(ADVANCE, w);
        for (int d = 0; d < dofs; ++d) z[d] = a[d] - w[d];
        damped();
        along(rest, z);
    }
    for (int column = 0; column < cotangents; ++column) {  // of one state
        for (int s = 0; s < COUNT; ++s)
            if (wanted[s])
                for (int c = 0; c < slot_length[s]; ++c) gains[slot_first[s] + c] = zero;
        for (int d = 0; d < dofs; ++d) lam[d] = field(COTANGENT, column * dofs + d);
        if (implicit) {
            for (int d = 0; d < dofs; ++d) mu[d] = lam[d];
            solve(G, mu, above, above_first);
            times(M, mu, lam);
            along(pushed, mu);
        }
        for (int d = 0; d < dofs; ++d) lam[d] = -lam[d];
        solve(H, lam, list, first);
        along(virtually, lam);
        body_gradients();
        for (int k = 0; k < contacts; ++k)
            if (active[k]) contact_gradient(k);
        joint_gradients();
        for (int k = 0; k < limits; ++k) { limit_gradient(k, 0); limit_gradient(k, 1); }
        for (int d = 0; d < dofs; ++d)
            if (rubbing[d]) friction_gradient(d);
        law_gradients();
        for (int s = 0; s < COUNT; ++s) {
            const long long* out = slot + WORDS * s;
            keep_all(out + 6, column * slot_length[s], slot_length[s], gains + slot_first[s], DUAL ? W : 0);
            keep_all(out + 9, column * slot_length[s], slot_length[s], gains + slot_first[s], 0);
        }
    }
}
"""
