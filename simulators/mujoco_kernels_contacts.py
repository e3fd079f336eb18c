"""C++ of contact geometry in the MuJoCo kernels: spheres and capsules against planes and against one another.

Every candidate is one contact. Its frame (n, t, s = n x t), its point x, the middle of both surfaces, and its distance
are functions of the poses. The first tangent is a seed less its part along n: the capsule's axis against a plane, which
moves with the body, else an axis of the world. Two cores p + s a and q + t b, |s|, |t| <= 1, are nearest where

    a . w = 0 or s = -1, 1,      b . w = 0 or t = -1, 1,      w = (q + t b) - (p + s a),      n = w / |w|,

and (s, t) follow the poses by these conditions. Which ends are clamped is decided as MuJoCo does.
Reference: MuJoCo, engine_collision_primitive.c (plane-sphere, sphere-capsule, capsule-capsule).
"""

from __future__ import annotations

CORES = """
auto cores = [&](int k) APART -> Cores {
    const Pose one = pose[contact_body[2 * k]], two = pose[contact_body[2 * k + 1]];
    const T along = contact_half0[k], across = contact_half1[k];
    const V3 p = one.p + one.turn(contact_point0 + 3 * k), q = two.p + two.turn(contact_point1 + 3 * k);
    const V3 a = one.turn(contact_axis0 + 3 * k) * along, b = two.turn(contact_axis1 + 3 * k) * across;
    const V3 gap = q - p;
    const N top = real(V(T(1))), low = -top;
    const B never = V(T(1)) < V(T(0)), always = V(T(0)) < V(T(1));
    auto clamped = [&](N x, B& free) -> N {
        const B over = value_of(x) > V(T(1)), under = value_of(x) < V(T(-1));
        free = (over | under) == 0;
        return pick(over, top, pick(under, low, x));
    };
    B free_s = never, free_t = never;
    if (across == T(0)) {
        const N s = along == T(0) ? zero : clamped(a.dot(gap) * (T(1) / (along * along)), free_s);
        return {p, a, q, b, s, zero, free_s, free_t};
    }
    if (along == T(0)) {
        const N t = clamped(-(b.dot(gap)) * (T(1) / (across * across)), free_t);
        return {p, a, q, b, zero, t, free_s, free_t};
    }
    const N ab = a.dot(b), u = a.dot(gap), v = -(b.dot(gap));
    const T aa = along * along, bb = across * across;
    const N scale = reciprocal(real(V(aa * bb)) - ab * ab);
    N s = (u * bb + ab * v) * scale, t = (v * aa + ab * u) * scale;
    const N s0 = clamped(s, free_s);
    t = pick(free_s, t, (v + ab * s0) * (T(1) / bb));
    s = s0;
    const N t0 = clamped(t, free_t);
    B still_free = always;
    const N s1 = clamped((u + ab * t0) * (T(1) / aa), still_free);
    s = pick(free_t, s, s1);
    free_s = (free_t & free_s) | ((free_t == 0) & still_free);
    return {p, a, q, b, s, t0, free_s, free_t};
};
"""
"""`cores(k)`: the nearest points of two cores, and which of them slide"""

CONTACTS = """
auto middle_of = [&](const Pose& at, const T* k, V* u) {
    u[0] = value_of(at.p.x) + value_of(at.x.x) * k[0] + value_of(at.y.x) * k[1] + value_of(at.z.x) * k[2];
    u[1] = value_of(at.p.y) + value_of(at.x.y) * k[0] + value_of(at.y.y) * k[1] + value_of(at.z.y) * k[2];
    u[2] = value_of(at.p.z) + value_of(at.x.z) * k[0] + value_of(at.y.z) * k[1] + value_of(at.z.z) * k[2];
};
auto far_apart = [&](int k) -> bool {  // by the spheres around both cores
    if (contact_kind[k] == 0) return false;
    V p[3], q[3], square = V(T(0));
    middle_of(pose[contact_body[2 * k]], contact_point0 + 3 * k, p);
    middle_of(pose[contact_body[2 * k + 1]], contact_point1 + 3 * k, q);
    for (int m = 0; m < 3; ++m) square += (q[m] - p[m]) * (q[m] - p[m]);
    const T reach = contact_reach[k];
    return __builtin_reduce_and(square > V(reach * reach)) != 0;
};
auto touching = [&](int k) APART -> Contact {  // frame and distance of candidate k
    const Pose one = pose[contact_body[2 * k]], two = pose[contact_body[2 * k + 1]];
    const V3 p = one.p + one.turn(contact_point0 + 3 * k), q = two.p + two.turn(contact_point1 + 3 * k);
    const N low = real(V(contact_radius0[k])), high = real(V(contact_radius1[k]));
    if (contact_kind[k] == 0) {
        const V3 n = one.turn(contact_axis0 + 3 * k);
        const N distance = n.dot(q - p) - high;
        const V3 x = q - n * (high + distance * T(0.5));
        const V3 seed = contact_half1[k] > T(0) ? two.turn(contact_axis1 + 3 * k) : seeded(n);
        const V3 t = unit(seed - n * n.dot(seed));
        return {n, t, n.cross(t), x, distance};
    }
    const Cores c = cores(k);
    const V3 at = c.p + c.a * c.s, to = c.q + c.b * c.t, w = to - at;
    const N length = root(w.dot(w));
    const V3 n = w * reciprocal(length), seed = seeded(n), t = unit(seed - n * n.dot(seed));
    const V3 x = (at + to + n * (low - high)) * T(0.5);
    return {n, t, n.cross(t), x, length - low - high};
};
auto direction = [](const Contact& c, int m) -> V3 { return m == 0 ? c.n : m == 1 ? c.t : c.s; };
auto rates = [&](const Contact& c, int k, const S6* twist, N* y) APART {  // of the contact along a twist of all bodies
    const V3 u = point_rate(twist[contact_body[2 * k + 1]] - twist[contact_body[2 * k]], c.x);
    for (int m = 0; m < contact_dim[k]; ++m) y[m] = direction(c, m).dot(u);
};
auto contact_input = [&](int k, const Contact& c, N* x) APART {  // all but the rate along lam
    const int dim = contact_dim[k];
    rates(c, k, velocity, x + dim);
    rates(c, k, rate, x + 2 * dim);
    N* y = x + 3 * dim;
    *y++ = c.distance;
    for (int m = 0; m < 2; ++m) *y++ = field(GEOM_FRICTION, 3 * contact_rubbing[2 * k + m]);
    for (int m = 0; m < 2; ++m) *y++ = field(BODY_INVWEIGHT0, 2 * contact_body[2 * k + m]);
    for (int m = 0; m < 2; ++m)
        for (int e = 0; e < 2; ++e) *y++ = field(GEOM_SOLREF, 2 * contact_geom[2 * k + m] + e);
    for (int m = 0; m < 2; ++m)
        for (int e = 0; e < 5; ++e) *y++ = field(GEOM_SOLIMP, 5 * contact_geom[2 * k + m] + e);
    *y++ = real(V(contact_weight[k]));
    *y++ = real(V(contact_margin[k]));
    *y++ = real(V(impratio));
    *y++ = real(V(T(2) * timestep));
};
"""
"""`touching(k)`, and the inputs of the contact laws"""


BETWEEN = """
auto between_gradient = [&](int k, const V3& n, const V3& point, const N& distance) APART {
    const Cores c = cores(k);
    const int one = contact_body[2 * k], two = contact_body[2 * k + 1];
    const T radii = (contact_radius0[k] - contact_radius1[k]) * T(0.5);
    const V3 w = (c.q + c.b * c.t) - (c.p + c.a * c.s);
    const N shorter = reciprocal(root(w.dot(w)));
    const V3 unit_w = w * shorter, by_n = n + point * radii;
    const V3 by_w = (by_n - unit_w * unit_w.dot(by_n)) * shorter + unit_w * distance;
    const V3 by_at = point * T(0.5) - by_w, by_to = point * T(0.5) + by_w;
    // multipliers of the conditions by which s and t follow
    const N aa = c.a.dot(c.a), bb = c.b.dot(c.b), ab = c.a.dot(c.b), by_s = c.a.dot(by_at), by_t = -(c.b.dot(by_to));
    const B both = c.free_s & c.free_t;
    const N one_n = real(V(T(1)));
    const N scale = reciprocal(pick(both, aa * bb - ab * ab, one_n));
    const N alone_s = by_s * reciprocal(pick(c.free_s, aa, one_n));
    const N alone_t = by_t * reciprocal(pick(c.free_t, bb, one_n));
    const N m = pick(both, (by_s * bb - ab * by_t) * scale, pick(c.free_s, alone_s, zero));
    const N h = pick(both, (by_t * aa - ab * by_s) * scale, pick(c.free_t, alone_t, zero));
    const V3 shift = c.a * m + c.b * h;
    S6 first_turn = force_at(c.p, by_at - shift), second_turn = force_at(c.q, by_to + shift);
    first_turn.w = first_turn.w + c.a.cross(by_at * c.s + w * m - shift * c.s);
    second_turn.w = second_turn.w + c.b.cross(by_to * c.t + w * h + shift * c.t);
    by_turn[one] = by_turn[one] + first_turn;
    by_turn[two] = by_turn[two] + second_turn;
};
"""

FRAMES = """
auto frame_gradient = [&](int k, const Contact& c, V3* frame, const V3& point, const N& distance) APART {
    const int one = contact_body[2 * k], two = contact_body[2 * k + 1];
    V3 n = frame[0], t = frame[1] + frame[2].cross(c.n);  // s = n x t
    const bool plane = contact_kind[k] == 0, bound = plane && contact_half1[k] > T(0);
    if (!plane) n = n + c.t.cross(frame[2]);
    V3 seed = none;
    if (bound || !plane) {  // t = unit(seed - n (n . seed))
        const V3 along = bound ? pose[two].turn(contact_axis1 + 3 * k) : seeded(c.n);
        const V3 left = along - c.n * c.n.dot(along);
        const V3 by_left = (t - c.t * c.t.dot(t)) * reciprocal(root(left.dot(left)));
        if (bound) seed = along.cross(by_left - c.n * c.n.dot(by_left));
        else n = n - along * c.n.dot(by_left) - by_left * c.n.dot(along);
    }
    if (plane) {  // distance = n . (q - p) - r,  x = q - n (r + distance / 2)
        const V3 q = pose[two].p + pose[two].turn(contact_point1 + 3 * k);
        S6 turn = force_at(q, point - c.n * (c.n.dot(point) * T(0.5)) + c.n * distance);
        turn.w = turn.w + seed;
        by_turn[two] = by_turn[two] + turn;
        return;
    }
    between_gradient(k, n, point, distance);
};
"""
