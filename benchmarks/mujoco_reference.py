"""Derivatives of one MuJoCo step by Richardson differences, for judging gradients: nothing here is the library's.

Central differences of a fully converged engine (tolerance 1e-20, no warm start, dense Jacobian) at steps h and 2h,

    D = (4 D(h) - D(2h)) / 3,        error about |D - (4 D(2h) - D(4h)) / 3|,

in tangent coordinates: positions move by `mj_integratePos`, results are compared by `mj_differentiatePos`. At every
evaluation the active set is noted: the contacts, and for each constraint row the piece of its law that holds. Columns
whose evaluations lie on different pieces are marked `switched`: there the step has a kink and no reference exists.

MuJoCo keeps shortcuts that are only right for the compiled parameters: bodies marked simple have a constant part of the
inertia matrix, frames marked the same are copied. `general` turns them off, otherwise an edited parameter does not act.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROW = mujoco.mjtConstraint
JOINT = mujoco.mjtJoint
STEPS = {"q": (1e-6, 1e-5, 2e-7), "v": (1e-6, 1e-5, 1e-4), "act": (1e-5, 1e-4), "ctrl": (1e-5, 1e-4)}
"""of the state, in its own units; the one with the smallest uncertainty is taken"""
PARAMETER_STEPS = (3e-4, 3e-5, 3e-3, 3e-6)
"""relative to the parameter, or to a tenth of the field's largest"""
GOOD = 1e-10
"""relative uncertainty at which no other step is tried"""
PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
"""xx, yy, zz, xy, xz, yz"""


@dataclass(frozen=True, eq=False)
class State:
    """Where a step starts: `qpos [nq]`, `qvel [nv]`, `act [na]`, `ctrl [nu]`."""

    qpos: Array
    qvel: Array
    act: Array
    ctrl: Array


@dataclass(frozen=True, eq=False)
class Columns:
    """Derivatives of (tangent q+, v+, act+) by the entries of one input."""

    matrix: Array
    """`[2 nv + na, n]`"""
    error: Array
    """`[n]`, what the differences themselves are uncertain by, Euclidean"""
    switched: NDArray[np.bool_]
    """`[n]`, the active set changes within the difference"""


@dataclass(frozen=True, eq=False)
class World:
    """A converged model that `edit` moves parameters of, and its data."""

    model: mujoco.MjModel
    data: mujoco.MjData
    moving_weights: bool = False
    """inverse weights, which scale the softness of constraints, follow edited parameters"""


def general(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compile without the shortcuts that ignore edited inertias."""
    for body in spec.bodies[1:]:
        body.simple = False
    model = spec.compile()
    for shortcut in (model.body_simple, model.dof_simplenum, model.body_sameframe):
        shortcut[:] = 0
    model.geom_sameframe[:], model.site_sameframe[:] = 0, 0
    return model


def world(spec: mujoco.MjSpec, *, moving_weights: bool = False) -> World:
    """The model of a specification, set to converge as far as floating point goes."""
    model = general(spec)
    option = model.opt
    option.tolerance, option.iterations = 1e-20, 100
    option.ls_tolerance, option.ls_iterations = 1e-12, 100
    option.ccd_tolerance, option.ccd_iterations = 1e-12, 100
    option.solver = mujoco.mjtSolver.mjSOL_NEWTON
    option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    off = mujoco.mjtDisableBit
    option.disableflags |= off.mjDSBL_WARMSTART | off.mjDSBL_ISLAND
    option.disableflags |= off.mjDSBL_MIDPHASE  # keeps boxes in the inertial frames of bodies, which edits move
    return World(model, mujoco.MjData(model), moving_weights)


def place(w: World, state: State) -> None:
    """Put the data into a state."""
    d = w.data
    d.qpos[:], d.qvel[:], d.act[:], d.ctrl[:] = state.qpos, state.qvel, state.act, state.ctrl
    d.qacc_warmstart[:] = 0
    d.time = 0


def after(w: World, state: State) -> State:
    """The state one step later."""
    place(w, state)
    mujoco.mj_step(w.model, w.data)
    d = w.data
    return State(d.qpos.copy(), d.qvel.copy(), d.act.copy(), state.ctrl)


def marked(w: World, state: State) -> tuple[State, bytes]:
    """The state one step later, and the pieces on which the step lay."""
    if w.model.opt.integrator != mujoco.mjtIntegrator.mjINT_RK4:
        return after(w, state), pieces(w.model, w.data)
    marks = b"".join(pieces(w.model, w.data) for _ in stages(w, state))
    return after(w, state), marks


def stages(w: World, state: State) -> Iterator[None]:
    """Put the data through the four stages of Runge-Kutta-Munthe-Kaas, as MuJoCo 4 does; yields after each."""
    m, d, h = w.model, w.data, w.model.opt.timestep
    u, v, act = np.zeros(m.nv), state.qvel, state.act
    for weight in (h / 2, h / 2, h, 0.0):
        q = state.qpos.copy()
        mujoco.mj_integratePos(m, q, u, 1.0)
        place(w, State(q, v, act, state.ctrl))
        mujoco.mj_forward(m, d)
        yield
        u = weight * turning_rate(m, u, d.qvel)
        v, act = state.qvel + weight * d.qacc, state.act + weight * d.act_dot


def turning_rate(m: mujoco.MjModel, u: Array, v: Array) -> Array:
    """Rate of u in q (+) u at velocity v: the inverse right Jacobian on quaternions, v elsewhere."""
    rate = v.copy()
    for joint in range(m.njnt):
        kind, first = int(m.jnt_type[joint]), int(m.jnt_dofadr[joint])
        if kind in (JOINT.mjJNT_FREE.value, JOINT.mjJNT_BALL.value):
            first += 3 if kind == JOINT.mjJNT_FREE.value else 0
            x, part = u[first : first + 3], slice(first, first + 3)
            t = float(np.linalg.norm(x))
            c = 1 / 12 + t**2 / 720 if t < 1e-2 else 1 / t**2 - (1 + np.cos(t)) / (2 * t * np.sin(t))
            y = np.cross(x, v[part])
            rate[part] = v[part] + y / 2 + c * np.cross(x, y)
    return rate


def pieces(m: mujoco.MjModel, d: mujoco.MjData) -> bytes:
    """Which contacts there are and on which smooth piece of its law each constraint row lies, at `d.qacc`."""
    if not d.nefc:
        return b""
    jar = d.efc_J.reshape(d.nefc, m.nv) @ d.qacc - d.efc_aref
    kind = d.efc_type
    zone = (jar < 0).astype(np.int8)
    zone[kind == ROW.mjCNSTR_EQUALITY.value] = 9
    friction = (kind == ROW.mjCNSTR_FRICTION_DOF.value) | (kind == ROW.mjCNSTR_FRICTION_TENDON.value)
    loss = d.efc_frictionloss[friction]
    sliding = np.where(np.abs(jar[friction]) * d.efc_D[friction] < loss, 3, 4 + (jar[friction] > 0))
    zone[friction] = sliding
    contacts = d.contact
    rows, dim = np.array(contacts.efc_address), np.array(contacts.dim)
    for i in np.flatnonzero(rows >= 0) if (kind == ROW.mjCNSTR_CONTACT_ELLIPTIC.value).any() else ():
        part = slice(rows[i], rows[i] + dim[i])
        zone[part] = cone_zone(contacts[i], jar[part])
    own = ramps(np.array(contacts.solimp).reshape(-1, 5), np.array(contacts.dist) - np.array(contacts.includemargin))
    marks = (contacts.geom, dim, own, limit_ramps(m, d), kind, d.efc_id, zone)
    return b"".join(np.asarray(part).tobytes() for part in marks)


def cone_zone(contact: Any, jar: Array) -> int:
    """0 free, 1 sticking, 2 sliding."""
    normal = contact.mu * jar[0]
    tangential = float(np.linalg.norm(contact.friction[: contact.dim - 1] * jar[1:]))
    if normal >= contact.mu * tangential:
        return 0
    return 1 if contact.mu * normal + tangential <= 0 else 2


def limit_ramps(m: mujoco.MjModel, d: mujoco.MjData) -> NDArray[np.int64]:
    """`ramps` of limits and of equalities of joints and tendons."""
    scalar = (mujoco.mjtEq.mjEQ_JOINT.value, mujoco.mjtEq.mjEQ_TENDON.value)
    tables = {
        ROW.mjCNSTR_LIMIT_JOINT.value: m.jnt_solimp,
        ROW.mjCNSTR_LIMIT_TENDON.value: m.tendon_solimp_lim,
        ROW.mjCNSTR_EQUALITY.value: m.eq_solimp,
    }
    rows = [
        i
        for i, (kind, which) in enumerate(zip(d.efc_type, d.efc_id, strict=True))
        if kind in tables and (kind != ROW.mjCNSTR_EQUALITY.value or m.eq_type[which] in scalar)
    ]
    solimp = np.array([tables[int(d.efc_type[i])][d.efc_id[i]] for i in rows]).reshape(-1, 5)
    return ramps(solimp, d.efc_pos[rows] - d.efc_margin[rows])


def ramps(solimp: Array, gap: Array) -> NDArray[np.int64]:
    """Piece of each impedance: before its middle, after it, saturated; it is once differentiable between these."""
    x = np.abs(gap) / solimp[:, 2]
    late = (solimp[:, 4] != 1) & (x >= solimp[:, 3])
    return np.where(x >= 1, 2, late).astype(np.int64)


def residual(w: World, state: State) -> float:
    """What the solver left of the equation of motion, relative to the largest force, by the inverse dynamics."""
    m, d = w.model, w.data
    place(w, state)
    mujoco.mj_forward(m, d)
    scale = max(float(np.abs(d.qfrc_smooth).max()), float(np.abs(d.qfrc_constraint).max()), 1.0)
    mujoco.mj_inverse(m, d)
    return float(np.abs(d.qfrc_inverse - d.qfrc_applied - d.qfrc_actuator).max()) / scale


def inertias(m: mujoco.MjModel) -> Array:
    """Inertia about the centre of mass in body axes `[nbody, 6]`: xx, yy, zz, xy, xz, yz."""
    rows = []
    for body in range(m.nbody):
        turn = np.empty(9)
        mujoco.mju_quat2Mat(turn, m.body_iquat[body])
        R = turn.reshape(3, 3)
        full = R @ np.diag(m.body_inertia[body]) @ R.T
        rows.append([full[pair] for pair in PAIRS])
    return np.array(rows)


def value(m: mujoco.MjModel, name: str) -> Array:
    """A field as the derivatives know it; `body_inertia` is `[nbody, 6]`, in body axes."""
    if name == "gravity":
        return m.opt.gravity.copy()
    return inertias(m) if name == "body_inertia" else np.array(getattr(m, name), dtype=np.float64)


def edit(w: World, name: str, index: tuple[int, ...], new: float) -> None:
    """Set one entry of a field."""
    m = w.model
    if name == "body_inertia":
        entries = inertias(m)[index[0]]
        entries[index[1]] = new
        full = np.zeros((3, 3))
        for entry, (i, j) in zip(entries, PAIRS, strict=True):
            full[i, j] = full[j, i] = entry
        m.body_inertia[index[0]], axes = np.linalg.eigh(full)
        axes[:, 2] *= np.sign(np.linalg.det(axes))
        mujoco.mju_mat2Quat(m.body_iquat[index[0]], axes.flatten())
    else:
        (m.opt.gravity if name == "gravity" else getattr(m, name))[index] = new
    if name == "body_mass":
        total = m.body_mass.copy()
        for body in range(m.nbody - 1, 0, -1):
            total[m.body_parentid[body]] += total[body]
        m.body_subtreemass[:] = total
    if w.moving_weights:
        mujoco.mj_setConst(m, w.data)


def difference(m: mujoco.MjModel, low: State, high: State) -> Array:
    """(tangent q, v, act) from one state to the other."""
    tangent = np.empty(m.nv)
    mujoco.mj_differentiatePos(m, tangent, 1.0, low.qpos, high.qpos)
    return np.concatenate([tangent, high.qvel - low.qvel, high.act - low.act])


def column(w: World, at: Callable[[float], State], steps: Sequence[float]) -> tuple[Array, float, bool]:
    """Derivative by x of the step from `at(x)` at 0, its uncertainty, whether the active set changed."""
    best: tuple[Array, float, bool] | None = None
    for h in steps:
        found = richardson(w, at, h)
        if best is None or (found[2], found[1]) < (best[2], best[1]):
            best = found
        if not best[2] and best[1] <= GOOD * float(np.linalg.norm(best[0])):
            break
    assert best is not None
    return best


def richardson(w: World, at: Callable[[float], State], h: float) -> tuple[Array, float, bool]:
    """As `column`, of one step."""
    marks = set()
    slopes = []
    for step in (h, 2 * h, 4 * h):
        ends = []
        for x in (-step, step):
            if step < 3 * h:
                end, mark = marked(w, at(x))
                marks.add(mark)
            else:
                end = after(w, at(x))
            ends.append(end)
        slopes.append(difference(w.model, *ends) / (2 * step))
    fine = (4 * slopes[0] - slopes[1]) / 3
    coarse = (4 * slopes[1] - slopes[2]) / 3
    return fine, float(np.linalg.norm(fine - coarse)), len(marks) > 1


def joined(columns: Sequence[tuple[Array, float, bool]], rows: int) -> Columns:
    matrix = np.stack([c[0] for c in columns], 1) if columns else np.zeros((rows, 0))
    return Columns(matrix, np.array([c[1] for c in columns]), np.array([c[2] for c in columns], dtype=bool))


def moved(m: mujoco.MjModel, state: State, kind: str, index: int, h: float) -> State:
    """The state with one entry (of `q`: one tangent) moved by h."""
    parts = {"q": state.qpos.copy(), "v": state.qvel.copy(), "act": state.act.copy(), "ctrl": state.ctrl.copy()}
    if kind == "q":
        mujoco.mj_integratePos(m, parts["q"], np.eye(m.nv)[index], h)
    else:
        parts[kind][index] += h
    return State(parts["q"], parts["v"], parts["act"], parts["ctrl"])


def by_state(w: World, state: State, kind: str) -> Columns:
    """Derivatives by `q` (tangent), `v`, `act` or `ctrl`."""
    m = w.model
    count = {"q": m.nv, "v": m.nv, "act": m.na, "ctrl": m.nu}[kind]
    columns = [
        column(w, lambda x, i=i: moved(m, state, kind, i, x), STEPS[kind])  # type: ignore[misc]
        for i in range(count)
    ]
    return joined(columns, 2 * m.nv + m.na)


def by_field(w: World, state: State, name: str, entries: Sequence[tuple[int, ...]]) -> Columns:
    """Derivatives by some entries of a physical field; the model is as before afterwards."""
    m = w.model
    nominal = value(m, name)
    columns = []
    for index in entries:
        centre = float(nominal[index])
        scale = max(abs(centre), 0.1 * float(np.abs(nominal).max())) or 1.0

        def at(x: float, index: tuple[int, ...] = index, centre: float = centre) -> State:
            edit(w, name, index, centre + x)
            return state

        columns.append(column(w, at, [step * scale for step in PARAMETER_STEPS]))
        edit(w, name, index, centre)
    return joined(columns, 2 * m.nv + m.na)
