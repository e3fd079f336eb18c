"""C++ of constraint rows and of the residual in the MuJoCo kernels.

    r = M a + c - passive - actuators - applied + J' s'(J a - aref),      H = dr/da = M + J' s'' J

Bodies carry wrenches (`load`), degrees of freedom carry forces (`push`); r_d = S_d . (loads of all that d carries) +
push_d. A contact acts by its spatial stiffness  Phi = sum_kl K_kl X_k X_l'  (K = s'' in its frame, X_k the wrench of
its k-th direction), which adds to the composite inertia of its body: no Jacobian is formed. Between moving bodies, the
products of one chain with the other are subtracted, and H is factored as full.
"""

from __future__ import annotations

LIMITS = """
auto limit_input = [&](int k, int side, N* x) APART {
    const int j = limit_joint[k], d = joint_dof[j];
    x[1] = v[d];
    x[2] = a[d];
    x[3] = position(joint_qpos[j], d);
    x[4] = field(JNT_RANGE, 2 * j + side);
    x[5] = field(DOF_INVWEIGHT0, d);
    for (int e = 0; e < 2; ++e) x[6 + e] = field(JNT_SOLREF, 2 * j + e);
    for (int e = 0; e < 5; ++e) x[8 + e] = field(JNT_SOLIMP, 5 * j + e);
    x[13] = real(V(side ? T(1) : T(-1)));
    x[14] = real(V(limit_margin[k]));
    x[15] = real(V(T(2) * timestep));
};
auto limit_open = [&](const N* x) -> B {  // whether the row exists
    return value_of(x[13] * (x[4] - x[3])) < value_of(x[14]);
};
auto friction_input = [&](int d, N* x) APART {
    x[1] = v[d];
    x[2] = a[d];
    x[3] = field(DOF_FRICTIONLOSS, d);
    x[4] = field(DOF_INVWEIGHT0, d);
    for (int e = 0; e < 2; ++e) x[5 + e] = field(DOF_SOLREF, 2 * d + e);
    for (int e = 0; e < 5; ++e) x[7 + e] = field(DOF_SOLIMP, 5 * d + e);
    x[12] = real(V(T(2) * timestep));
};
auto actuator_input = [&](int i, N* x) APART {
    const int j = actuator_joint[i], d = joint_dof[j], act = actuator_act[i];
    x[0] = x[1] = zero;
    x[2] = v[d];
    x[3] = position(joint_qpos[j], d);
    x[4] = act < 0 ? field(CTRL, i) : field(ACT, act);
    x[5] = field(ACTUATOR_GEAR, 6 * i);
    for (int e = 0; e < 3; ++e) {
        x[6 + e] = e == 0 || actuator_affine[2 * i] ? field(ACTUATOR_GAINPRM, 10 * i + e) : zero;
        x[9 + e] = actuator_affine[2 * i + 1] ? field(ACTUATOR_BIASPRM, 10 * i + e) : zero;
    }
    for (int e = 0; e < 2; ++e) x[12 + e] = real(V(actuator_control[2 * i + e]));
    for (int e = 0; e < 2; ++e) x[14 + e] = real(V(actuator_force_range[2 * i + e]));
};
auto spring_input = [&](int j, N* x) APART {  // the rotation of a ball or free joint
    const int q = joint_qpos[j] + (joint_type[j] == 0 ? 3 : 0), d = joint_dof[j] + (joint_type[j] == 0 ? 3 : 0);
    for (int e = 0; e < 3; ++e) x[3 + e] = turned(d + e);
    x[6] = field(JNT_STIFFNESS, j);
    for (int e = 0; e < 4; ++e) x[7 + e] = field(QPOS_SPRING, q + e);
    V size = V(T(0));
    for (int e = 0; e < 4; ++e) size += given(BASE, q + e) * given(BASE, q + e);
    size = T(1) / __builtin_elementwise_sqrt(size);
    for (int e = 0; e < 4; ++e) x[11 + e] = real(given(BASE, q + e) * size);
};
"""

ROWS = """
auto all_rows = [&]() APART {  // forces and stiffness of contacts, limits and dry friction
    N x[40], y[12];
    full = false;
    for (int b = 0; b < bodies; ++b) { loaded[b] = 0; }
    for (int d = 0; d < dofs; ++d) { push[d] = zero; stiff[d] = zero; }
    for (int k = 0; k < contacts; ++k) {
        active[k] = 0;
        if (far_apart(k)) continue;
        const Contact c = touching(k);
        const B near = value_of(c.distance) < V(contact_margin[k]);
        active[k] = __builtin_reduce_or(near) != 0;
        if (!active[k]) continue;
        contact[k] = c;
        const int dim = contact_dim[k], one = contact_body[2 * k], two = contact_body[2 * k + 1];
        contact_input(k, c, x);
        if (dim == 1) contact1_row(x, y);
        else contact3_row(x, y);
        for (int m = 0; m < dim * (dim + 3) / 2; ++m) y[m] = pick(near, y[m], zero);
        S6 wrench = still, side[3];
        for (int m = 0; m < dim; ++m) {
            side[m] = force_at(c.x, direction(c, m));
            wrench = wrench + side[m] * y[m];
        }
        size += magnitude(wrench.l);
        load[two] = load[two] + wrench;
        load[one] = load[one] - wrench;
        N part[21];
        for (int m = 0; m < 21; ++m) part[m] = zero;
        const N* entry = y + dim;
        for (int m = 0; m < dim; ++m) {
            S6 sum = side[m] * *entry++;  // upper triangle: K_mm once, K_mn twice by symmetry
            for (int n = m + 1; n < dim; ++n) sum = sum + side[n] * (*entry++ * T(2));
            symmetric_outer(part, side[m], sum);
        }
        spread(part, one, two);
    }
    for (int k = 0; k < limits; ++k)
        for (int side = 0; side < 2; ++side) {
            limit_input(k, side, x);
            const B open = limit_open(x);
            if (!__builtin_reduce_or(open)) continue;
            limit_row(x, y);
            const int d = joint_dof[limit_joint[k]];
            push[d] += pick(open, y[0], zero);
            stiff[d] += pick(open, y[1], zero);
            size += magnitude_of(value_of(pick(open, y[0], zero)));
        }
    for (int d = 0; d < dofs; ++d) {
        if (!rubbing[d]) continue;
        friction_input(d, x);
        const B rubs = value_of(x[3]) > V(T(0));
        friction_row(x, y);
        push[d] += pick(rubs, y[0], zero);
        stiff[d] += pick(rubs, y[1], zero);
        size += magnitude_of(value_of(pick(rubs, y[0], zero)));
    }
};
"""
"""`all_rows()`: adds to load, push, stiff, spatial"""

SPATIAL = """
auto symmetric_outer = [](N* part, const S6& x, const S6& y) APART {  // += (x y' + y x') / 2, upper triangle by rows
    const N p[6] = {x.w.x, x.w.y, x.w.z, x.l.x, x.l.y, x.l.z};
    const N q[6] = {y.w.x, y.w.y, y.w.z, y.l.x, y.l.y, y.l.z};
    int m = 0;
    for (int i = 0; i < 6; ++i)
        for (int j = i; j < 6; ++j) part[m++] += (p[i] * q[j] + p[j] * q[i]) * T(0.5);
};
auto spatial_times = [](const N* part, const S6& x) APART -> S6 {
    const N p[6] = {x.w.x, x.w.y, x.w.z, x.l.x, x.l.y, x.l.z};
    N q[6];
    int m = 0;
    for (int i = 0; i < 6; ++i) q[i] = part[0] * T(0);
    for (int i = 0; i < 6; ++i)
        for (int j = i; j < 6; ++j, ++m) {
            q[i] += part[m] * p[j];
            if (j > i) q[j] += part[m] * p[i];
        }
    return {{q[0], q[1], q[2]}, {q[3], q[4], q[5]}};
};
auto spread = [&](const N* part, int one, int two) APART {  // the stiffness of a contact over its bodies
    for (int m = 0; m < 2; ++m) {
        const int b = m ? two : one;
        if (body_last[b] < 0) continue;
        for (int e = 0; e < 21; ++e) spatial[21 * b + e] = loaded[b] ? spatial[21 * b + e] + part[e] : part[e];
        loaded[b] = 1;
    }
    if (body_last[one] < 0 || body_last[two] < 0) return;
    if (!full)
        for (int m = 0; m < dofs * dofs; ++m) H[m] = zero;
    full = true;
    for (int i = body_last[one];;) {
        const S6 f = spatial_times(part, axis[i]);
        for (int j = body_last[two];;) {
            H[i > j ? i * dofs + j : j * dofs + i] -= axis[j].dot(f) * T(i == j ? 2 : 1);
            if (above_first[j] == above_first[j + 1]) break;
            j = above[above_first[j]];
        }
        if (above_first[i] == above_first[i + 1]) break;
        i = above[above_first[i]];
    }
};
auto assemble = [&]() APART {  // H = M + J' s'' J, factored
    if (!full)
        for (int m = 0; m < dofs * dofs; ++m) H[m] = zero;
    for (int b = bodies - 1; b > 0; --b) {
        if (!loaded[b]) continue;
        const int p = body_parent[b];
        for (int g = body_group[b]; g < body_group[b] + body_groups[b]; ++g)
            for (int d = group_first[g]; d < group_first[g] + group_size[g]; ++d) {
                const S6 f = spatial_times(spatial + 21 * b, axis[d]);
                H[d * dofs + d] += axis[d].dot(f);
                for (int k = above_first[d]; k < above_first[d + 1]; ++k)
                    H[d * dofs + above[k]] += axis[above[k]].dot(f);
            }
        if (body_last[p] < 0) continue;
        for (int m = 0; m < 21; ++m) {
            spatial[21 * p + m] = loaded[p] ? spatial[21 * p + m] + spatial[21 * b + m] : spatial[21 * b + m];
        }
        loaded[p] = 1;
    }
    for (int d = 0; d < dofs; ++d) {
        H[d * dofs + d] += M[d * dofs + d] + stiff[d];
        for (int k = above_first[d]; k < above_first[d + 1]; ++k) H[d * dofs + above[k]] += M[d * dofs + above[k]];
    }
    list = full ? all_above : above;
    first = full ? all_above_first : above_first;
    factor(H, list, first);
};
"""

RESIDUAL = """
auto momentum = [&](int b, const S6& u) APART -> S6 {  // inertia of body b times a twist
    const V3 c = centre[b], p = point_rate(u, c) * mass[b];
    return {inertia[b] * u.w + c.cross(p), p};
};
auto residual = [&]() APART {  // r, with load[b] summed over all that b carries; size: of the largest forces
    N x[16], y[3];
    for (int b = 0; b < bodies; ++b) load[b] = still;
    size = V(T(0));
    all_rows();
    for (int b = 1; b < bodies; ++b) {
        if (body_last[b] < 0) continue;
        const S6 f = momentum(b, rate[b] + bias[b]) + velocity[b].wrench(momentum(b, velocity[b]));
        size += magnitude(f.w) + magnitude(f.l);
        load[b] = load[b] + f;
    }
    for (int d = 0; d < dofs; ++d) {
        const N own = field(DOF_ARMATURE, d) * a[d] + field(DOF_DAMPING, d) * v[d], applied = field(FORCE, d);
        size += magnitude_of(value_of(own)) + magnitude_of(value_of(applied));
        push[d] += own - applied;
    }
    for (int i = 0; i < actuators; ++i) {
        actuator_input(i, x);
        actuator_force(x, y);
        size += magnitude_of(value_of(y[0]));
        push[joint_dof[actuator_joint[i]]] += y[0];
    }
    for (int j = 0; j < joints; ++j) {
        if (!elastic[j]) continue;
        int d = joint_dof[j], q = joint_qpos[j];
        for (int e = 0; e < (joint_type[j] == 0 ? 3 : joint_type[j] == 1 ? 0 : 1); ++e, ++d, ++q)
            push[d] += field(JNT_STIFFNESS, j) * (position(q, d) - field(QPOS_SPRING, q));
        if (joint_type[j] > 1) continue;
        spring_input(j, x);
        for (int e = 0; e < 3; ++e) x[e] = zero;
        spring_force(x, y);
        for (int e = 0; e < 3; ++e) push[d + e] += y[e];
    }
    for (int b = bodies - 1; b > 0; --b) {
        for (int g = body_group[b]; g < body_group[b] + body_groups[b]; ++g)
            for (int d = group_first[g]; d < group_first[g] + group_size[g]; ++d) r[d] = axis[d].dot(load[b]) + push[d];
        load[body_parent[b]] = load[body_parent[b]] + load[b];
    }
};
"""
