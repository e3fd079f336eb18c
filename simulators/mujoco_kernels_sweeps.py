"""C++ of the tree sweeps in the MuJoCo kernels: poses, axes, twists, inertia matrix, its factor.

Written on numbers `N` of a tile of environments (`mujoco_kernels_algebra`), driven by static tables
(`mujoco_kernels_model`): nothing depends on the model but the lengths of loops. Degree of freedom d has the axis
S_d, a screw about the origin; the origin is put at the model's first moving body, so that distances stay short.

    twist of a body along u       t(u) = sum of S_d u_d over the dofs above it
    bias acceleration             sum of V x S_d v_d, from (0, -gravity), V the twist of what carries the axis
    inertia matrix                M_ij = S_i . (I S_j), i above j, I the inertia of all that j carries  [composite]
    factor                        M = L' D L, no fill-in outside ancestors

Reference: Featherstone, Rigid Body Dynamics Algorithms, 2008, 6.2 (composite inertia), 6.5 (factor by branches).
"""

from __future__ import annotations

POSES = """
auto place = [&](int b) APART {
    const Pose over = pose[body_parent[b]];
    const T* r = body_turn + 9 * b;
    const T cx[3] = {r[0], r[3], r[6]}, cy[3] = {r[1], r[4], r[7]}, cz[3] = {r[2], r[5], r[8]};
    Pose at = {over.p + over.turn(body_pos + 3 * b), over.turn(cx), over.turn(cy), over.turn(cz)};
    for (int j = body_joint[b]; j < body_joint[b] + body_joints[b]; ++j) {
        const int q = joint_qpos[j], d = joint_dof[j];
        const T* k = joint_axis + 3 * j;
        const T* hold = joint_anchor + 3 * j;
        if (joint_type[j] == 2) {  // slide
            const V3 u = at.turn(k);
            axis[d] = {none, u};
            at.p = at.p + u * (position(q, d) - real(V(joint_start[j])));
        } else if (joint_type[j] == 3) {  // hinge
            const V3 u = at.turn(k), anchor = at.p + at.turn(hold);
            axis[d] = {u, anchor.cross(u)};
            N s, c;
            turning(position(q, d) - real(V(joint_start[j])), s, c);
            const N rest = real(V(T(1))) - c;
            at.x = at.x * c + u.cross(at.x) * s + u * (rest * k[0]);
            at.y = at.y * c + u.cross(at.y) * s + u * (rest * k[1]);
            at.z = at.z * c + u.cross(at.z) * s + u * (rest * k[2]);
            at.p = anchor - at.turn(hold);
        } else {  // ball, free
            V3 anchor = at.p + at.turn(hold);
            int f = q, e = d;
            if (joint_type[j] == 0) {
                at.p = V3{position(q, d), position(q + 1, d + 1), position(q + 2, d + 2)} - origin;
                at.x = {real(V(T(1))), zero, zero};
                at.y = {zero, real(V(T(1))), zero};
                at.z = {zero, zero, real(V(T(1)))};
                axis[d] = {none, at.x}; axis[d + 1] = {none, at.y}; axis[d + 2] = {none, at.z};
                anchor = at.p; f = q + 3; e = d + 3;
            }
            V w = given(BASE, f), x = given(BASE, f + 1), y = given(BASE, f + 2), z = given(BASE, f + 3);
            const V size = T(1) / __builtin_elementwise_sqrt(w * w + x * x + y * y + z * z);
            w *= size; x *= size; y *= size; z *= size;
            const V xx = x * x, yy = y * y, zz = z * z, two = V(T(2));
            const V3 a = {real(T(1) - two * (yy + zz)), real(two * (x * y + w * z)), real(two * (x * z - w * y))};
            const V3 h = {real(two * (x * y - w * z)), real(T(1) - two * (xx + zz)), real(two * (y * z + w * x))};
            const V3 g = {real(two * (x * z + w * y)), real(two * (y * z - w * x)), real(T(1) - two * (xx + yy))};
            V3 X = at.turn(a), Y = at.turn(h), Z = at.turn(g);
            if (DUAL) {  // by exp(d), of which only first derivatives enter
                const N i = turned(e), j = turned(e + 1), k = turned(e + 2);
                const V3 X0 = X, Y0 = Y, Z0 = Z;
                X = X0 + Y0 * k - Z0 * j; Y = Y0 - X0 * k + Z0 * i; Z = Z0 + X0 * j - Y0 * i;
            }
            at.x = X; at.y = Y; at.z = Z;
            axis[e] = {X, anchor.cross(X)}; axis[e + 1] = {Y, anchor.cross(Y)}; axis[e + 2] = {Z, anchor.cross(Z)};
            at.p = joint_type[j] == 0 ? anchor : anchor - at.turn(hold);
        }
    }
    pose[b] = at;
};
"""
"""`place(b)`: pose of body b and axes of its joints, from the pose of its parent"""

TWISTS = """
auto along = [&](S6* twist, const N* u) APART {  // twist[b] of all bodies along u
    for (int b = 1; b < bodies; ++b) {
        S6 t = twist[body_parent[b]];
        for (int g = body_group[b]; g < body_group[b] + body_groups[b]; ++g)
            for (int d = group_first[g]; d < group_first[g] + group_size[g]; ++d) t = t + axis[d] * u[d];
        twist[b] = t;
    }
};
auto along_velocity = [&]() APART {  // velocity, bias acceleration, and the twist before each group
    for (int b = 1; b < bodies; ++b) {
        S6 t = velocity[body_parent[b]], c = bias[body_parent[b]];
        for (int g = body_group[b]; g < body_group[b] + body_groups[b]; ++g) {
            S6 u = still;
            for (int d = group_first[g]; d < group_first[g] + group_size[g]; ++d) u = u + axis[d] * v[d];
            before[g] = t;
            c = c + t.cross(u);
            t = t + u;
        }
        velocity[b] = t;
        bias[b] = c;
    }
};
"""

INERTIAS = """
auto own_inertia = [&](int b) APART -> Symmetric {  // about the centre of mass, in world axes
    const Pose at = pose[b];
    auto entry = [&](int e) -> N { return field(BODY_INERTIA, 6 * b + e); };
    const N xx = entry(0), yy = entry(1), zz = entry(2), xy = entry(3), xz = entry(4), yz = entry(5);
    const V3 p = at.x * xx + at.y * xy + at.z * xz, q = at.x * xy + at.y * yy + at.z * yz;
    const V3 r = at.x * xz + at.y * yz + at.z * zz;
    return {p.x * at.x.x + q.x * at.y.x + r.x * at.z.x, p.y * at.x.y + q.y * at.y.y + r.y * at.z.y,
            p.z * at.x.z + q.z * at.y.z + r.z * at.z.z, p.x * at.x.y + q.x * at.y.y + r.x * at.z.y,
            p.x * at.x.z + q.x * at.y.z + r.x * at.z.z, p.y * at.x.z + q.y * at.y.z + r.y * at.z.z};
};
auto weigh = [&]() APART {  // centre, mass, inertia of the bodies
    for (int b = 1; b < bodies; ++b) {
        if (body_last[b] < 0) continue;
        mass[b] = field(BODY_MASS, b);
        const V3 offset = {field(BODY_IPOS, 3 * b), field(BODY_IPOS, 3 * b + 1), field(BODY_IPOS, 3 * b + 2)};
        centre[b] = pose[b].p + pose[b].turn(offset);
        inertia[b] = own_inertia(b);
    }
};
auto inertia_matrix = [&](N* M) APART {  // rows i, columns above i
    for (int b = 1; b < bodies; ++b) {
        if (body_last[b] < 0) continue;
        const V3 c = centre[b], h = c * mass[b];
        const N hx = h.x * c.x, hy = h.y * c.y, hz = h.z * c.z;
        const Symmetric shift = {hy + hz, hx + hz, hx + hy, -(h.x * c.y), -(h.x * c.z), -(h.y * c.z)};
        composite[b] = {mass[b], h, inertia[b] + shift};
    }
    for (int b = bodies - 1; b > 0; --b) {
        if (body_last[b] < 0) continue;
        const int p = body_parent[b];
        for (int g = body_group[b]; g < body_group[b] + body_groups[b]; ++g)
            for (int d = group_first[g]; d < group_first[g] + group_size[g]; ++d) {
                const S6 f = composite[b] * axis[d];
                M[d * dofs + d] = axis[d].dot(f) + field(DOF_ARMATURE, d);
                for (int k = above_first[d]; k < above_first[d + 1]; ++k) {
                    M[d * dofs + above[k]] = axis[above[k]].dot(f);
                }
            }
        if (body_last[p] >= 0) composite[p] = composite[p] + composite[b];
    }
};
"""
"""`weigh()`, and `inertia_matrix(M)`: M[i * dofs + j] for j = i and j above i"""

FACTOR = """
auto factor = [&](N* H, const int* list, const int* first) APART {  // in place: L below, 1 / D on the diagonal
    for (int k = dofs - 1; k >= 0; --k) {
        const N r = reciprocal(H[k * dofs + k]);
        H[k * dofs + k] = r;
        for (int m = first[k]; m < first[k + 1]; ++m) {
            const int i = list[m];
            const N l = H[k * dofs + i] * r;
            for (int n = m; n < first[k + 1]; ++n) H[i * dofs + list[n]] -= H[k * dofs + list[n]] * l;
        }
        for (int m = first[k]; m < first[k + 1]; ++m) H[k * dofs + list[m]] = H[k * dofs + list[m]] * r;
    }
};
auto solve = [&](const N* H, N* x, const int* list, const int* first) APART {
    for (int k = dofs - 1; k >= 0; --k)
        for (int m = first[k]; m < first[k + 1]; ++m) x[list[m]] -= H[k * dofs + list[m]] * x[k];
    for (int k = 0; k < dofs; ++k) {
        N t = x[k] * H[k * dofs + k];
        for (int m = first[k]; m < first[k + 1]; ++m) t -= H[k * dofs + list[m]] * x[list[m]];
        x[k] = t;
    }
};
auto times = [&](const N* M, const N* x, N* y) APART {  // y = M x
    for (int k = 0; k < dofs; ++k) y[k] = M[k * dofs + k] * x[k];
    for (int k = 0; k < dofs; ++k)
        for (int m = above_first[k]; m < above_first[k + 1]; ++m) {
            const int i = above[m];
            y[k] += M[k * dofs + i] * x[i];
            y[i] += M[k * dofs + i] * x[k];
        }
};
"""
"""`factor(H, list, first)`, `solve(H, x, list, first)` by the ancestors in `list`, `times(M, x, y)`"""
