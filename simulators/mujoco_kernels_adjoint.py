"""C++ of the reverse pass in the MuJoCo kernels: gradients of  phi = <lam, r> + mu' M (a - w) + h mu' D w.

With the twists L, V, A of a body along lam, v and a (A with the bias), the inertial part of phi is a sum over pairs of
twists of X . (I Y): (L, A), (L x V, V), and (mu, a - w). Moving the body by a twist Delta changes it by

    Delta . -(X.wrench(I Y) + Y.wrench(I X)),

so every gradient by a pose is a wrench, and wrenches add up from the leaves to the root. With load (of L), f, e, c
the wrenches dual to the twists along lam, v, a and to the bias, all of what dof d carries, U = sum of S_d v_d over its
group and V what the group stands on,

    g = f - V.wrench(c)           S_d* = load lam_d + g v_d + e a_d
    by v_d   S_d . g              turn += sum of S_d.wrench(S_d*)   by d_d   S_d . turn          f += U.wrench(c)

where turn is the wrench dual to poses. Gradients by fields fall off on the way.
"""

from __future__ import annotations

BODIES = """
auto inertial = [&](int b, const S6& X, const S6& Y, S6& by_x, S6& by_y) APART {  // of X . (I Y)
    by_x = momentum(b, Y);
    by_y = momentum(b, X);
    by_turn[b] = by_turn[b] - X.wrench(by_x) - Y.wrench(by_y);
    const V3 p = point_rate(X, centre[b]), q = point_rate(Y, centre[b]);
    if (wanted[BODY_MASS]) gains[slot_first[BODY_MASS] + b] += p.dot(q);
    if (wanted[BODY_IPOS]) {
        const V3 c = pose[b].back(q.cross(X.w) + p.cross(Y.w)) * mass[b];
        N* by = gains + slot_first[BODY_IPOS] + 3 * b;
        by[0] += c.x;
        by[1] += c.y;
        by[2] += c.z;
    }
    if (wanted[BODY_INERTIA]) {
        const V3 x = pose[b].back(X.w), y = pose[b].back(Y.w);
        N* by = gains + slot_first[BODY_INERTIA] + 6 * b;
        by[0] += x.x * y.x;
        by[1] += x.y * y.y;
        by[2] += x.z * y.z;
        by[3] += x.x * y.y + x.y * y.x;
        by[4] += x.x * y.z + x.z * y.x;
        by[5] += x.y * y.z + x.z * y.y;
    }
};
auto body_gradients = [&]() APART {
    for (int b = 0; b < bodies; ++b) {
        by_velocity[b] = by_rate[b] = by_bias[b] = by_turn[b] = by_push[b] = by_rest[b] = still;
        if (body_last[b] < 0) continue;
        S6 x, y;
        inertial(b, virtually[b], rate[b] + bias[b], x, y);
        by_rate[b] = by_bias[b] = y;
        const S6 lv = virtually[b].cross(velocity[b]);
        inertial(b, lv, velocity[b], x, y);
        by_velocity[b] = y - virtually[b].wrench(x);
        if (implicit) inertial(b, pushed[b], rest[b], by_push[b], by_rest[b]);
    }
};
"""

ROW_GRADIENTS = """
auto contact_gradient = [&](int k) APART {
    const Contact c = contact[k];
    const int dim = contact_dim[k], one = contact_body[2 * k], two = contact_body[2 * k + 1];
    const B near = value_of(c.distance) < V(contact_margin[k]);
    N x[40], y[40];
    rates(c, k, virtually, x);
    contact_input(k, c, x);
    // y: by the rates along lam, v, a (dim each), distance, friction, invweight, solref, solimp
    if (dim == 1) contact1_pull(x, y);
    else contact3_pull(x, y);
    const int count = 3 * dim + (SOFT ? 19 : 5);
    for (int m = 0; m < count; ++m) y[m] = pick(near, y[m], zero);
    V3 force[3] = {none, none, none}, frame[3] = {none, none, none}, point = none;
    const S6* twist[3] = {virtually, velocity, rate};
    for (int i = 0; i < 3; ++i) {
        const S6 u = twist[i][two] - twist[i][one];
        const V3 w = point_rate(u, c.x);
        for (int m = 0; m < dim; ++m) {
            force[i] = force[i] + direction(c, m) * y[dim * i + m];
            frame[m] = frame[m] + w * y[dim * i + m];
        }
        point = point + force[i].cross(u.w);
    }
    const S6 by_v = force_at(c.x, force[1]), by_a = force_at(c.x, force[2]);
    by_velocity[two] = by_velocity[two] + by_v;
    by_velocity[one] = by_velocity[one] - by_v;
    by_rate[two] = by_rate[two] + by_a;
    by_rate[one] = by_rate[one] - by_a;
    const N* rest = y + 3 * dim;
    frame_gradient(k, c, frame, point, rest[0]);
    for (int m = 0; m < 2; ++m) {
        gain(GEOM_FRICTION, 3 * contact_rubbing[2 * k + m], rest[1 + m]);
        gain(BODY_INVWEIGHT0, 2 * contact_body[2 * k + m], rest[3 + m]);
        if (!SOFT) continue;
        for (int e = 0; e < 2; ++e) gain(GEOM_SOLREF, 2 * contact_geom[2 * k + m] + e, rest[5 + 2 * m + e]);
        for (int e = 0; e < 5; ++e) gain(GEOM_SOLIMP, 5 * contact_geom[2 * k + m] + e, rest[9 + 5 * m + e]);
    }
};
auto limit_gradient = [&](int k, int side) APART {
    N x[16], y[16];
    const int j = limit_joint[k], d = joint_dof[j];
    limit_input(k, side, x);
    const B open = limit_open(x);
    if (!__builtin_reduce_or(open)) return;
    x[0] = lam[d];
    limit_pull(x, y);
    for (int m = 1; m < (SOFT ? 13 : 6); ++m) y[m] = pick(open, y[m], zero);
    gain(VELOCITY, d, y[1]);
    gain(SHIFT, d, y[3]);
    gain(JNT_RANGE, 2 * j + side, y[4]);
    gain(DOF_INVWEIGHT0, d, y[5]);
    if (!SOFT) return;
    for (int e = 0; e < 2; ++e) gain(JNT_SOLREF, 2 * j + e, y[6 + e]);
    for (int e = 0; e < 5; ++e) gain(JNT_SOLIMP, 5 * j + e, y[8 + e]);
};
"""

GRADIENTS = """
auto friction_gradient = [&](int d) APART {
    N x[16], y[16];
    friction_input(d, x);
    const B rubs = value_of(x[3]) > V(T(0));
    x[0] = lam[d];
    friction_pull(x, y);
    for (int m = 1; m < (SOFT ? 12 : 5); ++m) y[m] = pick(rubs, y[m], zero);
    gain(VELOCITY, d, y[1]);
    gain(DOF_FRICTIONLOSS, d, y[3]);
    gain(DOF_INVWEIGHT0, d, y[4]);
    if (!SOFT) return;
    for (int e = 0; e < 2; ++e) gain(DOF_SOLREF, 2 * d + e, y[5 + e]);
    for (int e = 0; e < 5; ++e) gain(DOF_SOLIMP, 5 * d + e, y[7 + e]);
};
auto joint_gradients = [&]() APART {
    for (int b = bodies - 1; b > 0; --b) {
        S6 f = by_velocity[b], turn = by_turn[b];
        for (int g = body_group[b] + body_groups[b] - 1; g >= body_group[b]; --g) {
            const int from = group_first[g], to = from + group_size[g];
            const S6 h = f - before[g].wrench(by_bias[b]);
            S6 u = still;
            for (int d = from; d < to; ++d) {
                S6 s = load[b] * lam[d] + h * v[d] + by_rate[b] * a[d];
                if (implicit) s = s + by_push[b] * mu[d] + by_rest[b] * z[d];
                turn = turn + axis[d].wrench(s);
                u = u + axis[d] * v[d];
            }
            for (int d = from; d < to; ++d) {
                gain(SHIFT, d, axis[d].dot(turn));
                gain(VELOCITY, d, axis[d].dot(h));
            }
            f = f + u.wrench(by_bias[b]);
        }
        const int p = body_parent[b];
        by_velocity[p] = by_velocity[p] + f;
        by_turn[p] = by_turn[p] + turn;
        by_rate[p] = by_rate[p] + by_rate[b];
        by_bias[p] = by_bias[p] + by_bias[b];
        by_push[p] = by_push[p] + by_push[b];
        by_rest[p] = by_rest[p] + by_rest[b];
    }
    const V3 fall = by_bias[0].l;
    gain(GRAVITY, 0, -fall.x);
    gain(GRAVITY, 1, -fall.y);
    gain(GRAVITY, 2, -fall.z);
    if (!DUAL) return;
    for (int j = 0; j < joints; ++j) {  // second derivatives in the chart exp(d), not along the group
        if (joint_type[j] > 1) continue;
        const int d = joint_dof[j] + (joint_type[j] == 0 ? 3 : 0);
        const V3 e = {turned(d), turned(d + 1), turned(d + 2)};
        const V3 g = {gained(SHIFT, d), gained(SHIFT, d + 1), gained(SHIFT, d + 2)};
        const V3 c = e.cross(g) * T(0.5);
        gain(SHIFT, d, c.x);
        gain(SHIFT, d + 1, c.y);
        gain(SHIFT, d + 2, c.z);
    }
};
auto law_gradients = [&]() APART {
    N x[16], y[16];
    for (int d = 0; d < dofs; ++d) {
        gain(VELOCITY, d, lam[d] * field(DOF_DAMPING, d));
        gain(FORCE, d, -lam[d]);
        N armature = lam[d] * a[d], damping = lam[d] * v[d];
        if (implicit) {
            armature += mu[d] * z[d];
            damping -= mu[d] * w[d] * T(timestep);
        }
        gain(DOF_ARMATURE, d, armature);
        gain(DOF_DAMPING, d, damping);
    }
    for (int i = 0; i < actuators; ++i) {
        const int j = actuator_joint[i], d = joint_dof[j], act = actuator_act[i];
        actuator_input(i, x);
        x[0] = lam[d];
        if (implicit == 2) x[1] = mu[d] * w[d] * T(timestep);
        actuator_pull(x, y);
        gain(VELOCITY, d, y[0]);
        gain(SHIFT, d, y[1]);
        gain(act < 0 ? CTRL : ACT, act < 0 ? i : act, y[2]);
        gain(ACTUATOR_GEAR, 6 * i, y[3]);
        for (int e = 0; e < 3; ++e) {
            if (e == 0 || actuator_affine[2 * i]) gain(ACTUATOR_GAINPRM, 10 * i + e, y[4 + e]);
            if (actuator_affine[2 * i + 1]) gain(ACTUATOR_BIASPRM, 10 * i + e, y[7 + e]);
        }
    }
    for (int j = 0; j < joints; ++j) {
        if (!elastic[j]) continue;
        int d = joint_dof[j], q = joint_qpos[j];
        for (int e = 0; e < (joint_type[j] == 0 ? 3 : joint_type[j] == 1 ? 0 : 1); ++e, ++d, ++q) {
            const N stiffness = field(JNT_STIFFNESS, j);
            gain(SHIFT, d, lam[d] * stiffness);
            gain(JNT_STIFFNESS, j, lam[d] * (position(q, d) - field(QPOS_SPRING, q)));
            gain(QPOS_SPRING, q, -(lam[d] * stiffness));
        }
        if (joint_type[j] > 1) continue;
        spring_input(j, x);
        for (int e = 0; e < 3; ++e) x[e] = lam[d + e];
        spring_pull(x, y);
        for (int e = 0; e < 3; ++e) gain(SHIFT, d + e, y[e]);
        gain(JNT_STIFFNESS, j, y[3]);
        for (int e = 0; e < 4; ++e) gain(QPOS_SPRING, q + e, y[4 + e]);
    }
};
"""
