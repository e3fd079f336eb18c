"""Which MuJoCo models the kernels cover, and the static tables that drive them.

`uncovered` says in words what the kernels lack for a model, None if nothing; other models take the torch program.
`tables` are flat integer and real arrays by name: bodies, joints, groups of degrees of freedom whose axes are fixed in
one frame, ancestors, and contact candidates. A candidate is a sphere, an end or a side of a capsule, against a plane or
against another of them: at most one contact each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from sim2real.simulators.mujoco_forward import Kind
from sim2real.simulators.mujoco_structure import FIELDS as ALL_FIELDS
from sim2real.simulators.mujoco_structure import Structure

_LACKING = ("pair_", "tendon_", "eq_", "actuator_dynprm")
FIELDS = tuple(name for name in ALL_FIELDS if not name.startswith(_LACKING))
"""the fields the kernels know"""
SOFT = {"dof_solref", "dof_solimp", "jnt_solref", "jnt_solimp", "geom_solref", "geom_solimp"}
KINDS: tuple[Kind, ...] = ("explicit", "eulerdamp", "implicitfast")
_FREE, _BALL, _SLIDE, _HINGE = range(4)
_OFF = mujoco.mjtDisableBit
_PLANE, _SPHERE, _CAPSULE = (
    int(mujoco.mjtGeom.mjGEOM_PLANE),
    int(mujoco.mjtGeom.mjGEOM_SPHERE),
    int(mujoco.mjtGeom.mjGEOM_CAPSULE),
)


@dataclass(frozen=True, eq=False)
class Tables:
    """Static arrays by name, and sizes by name."""

    integers: dict[str, NDArray[np.int32]]
    reals: dict[str, NDArray[np.float64]]
    sizes: dict[str, int]
    numbers: dict[str, float]


def uncovered(structure: Structure, names: tuple[str, ...], kind: Kind) -> str | None:
    """What the kernels lack for this model, in words; None: nothing."""
    return next(_lacking(structure, names, kind), None)


def _lacking(structure: Structure, names: tuple[str, ...], kind: Kind) -> Iterator[str]:
    model = structure.model
    unknown = [name for name in names if name not in FIELDS]
    if unknown:
        yield f"the fields {unknown}"
    if kind not in KINDS:
        yield f"the integrator {kind}"
    if kind == "implicitfast" and bool(structure.lone.any()):
        yield "the gyroscopic terms that implicitfast keeps for single free bodies"
    if structure.uncovered:
        yield f"the force {structure.uncovered[0].name}"
    if model.neq:
        yield "equality constraints"
    if model.npair:
        yield "explicit contact pairs"
    if model.flg_gravcomp:
        yield "gravity compensation"
    flags = [_OFF.mjDSBL_SPRING, _OFF.mjDSBL_DAMPER, _OFF.mjDSBL_GRAVITY, _OFF.mjDSBL_CLAMPCTRL, _OFF.mjDSBL_REFSAFE]
    flags += [_OFF.mjDSBL_LIMIT, _OFF.mjDSBL_CONTACT, _OFF.mjDSBL_CONSTRAINT, _OFF.mjDSBL_ACTUATION]
    flags += [_OFF.mjDSBL_FILTERPARENT]
    if model.opt.disableflags & sum(int(flag) for flag in flags):
        yield "a disabled part of the engine"
    if model.nmocap:
        yield "mocap bodies"
    yield from _lacking_elements(model)


def _lacking_elements(model: mujoco.MjModel) -> Iterator[str]:
    for t in range(model.ntendon):
        if model.tendon_limited[t] or model.tendon_stiffness[t] or model.tendon_damping[t]:
            yield f"the forces of tendon {t}"
        if model.tendon_frictionloss[t] or model.tendon_armature[t]:
            yield f"friction or armature of tendon {t}"
    for j in range(model.njnt):
        if model.jnt_actfrclimited[j]:
            yield f"the limited actuator force of joint {j}"
        if model.jnt_type[j] == _BALL and model.jnt_limited[j]:
            yield f"the limit of ball joint {j}"
    for i in range(model.nu):
        joint = int(model.actuator_trnid[i, 0])
        if model.actuator_trntype[i] != int(mujoco.mjtTrn.mjTRN_JOINT) or model.jnt_type[joint] < _SLIDE:
            yield f"the transmission of actuator {i}"
        if model.actuator_dyntype[i] != int(mujoco.mjtDyn.mjDYN_NONE) and model.actuator_actearly[i]:
            yield f"the early activation of actuator {i}"
        if model.actuator_group[i] and model.opt.disableactuator:
            yield "disabled groups of actuators"
    for one, two in _pairs(model):
        kinds = {int(model.geom_type[one]), int(model.geom_type[two])}
        if not kinds <= {_PLANE, _SPHERE, _CAPSULE} or _dim(model, one, two) not in (1, 3):
            yield f"contacts between geoms {one} and {two}"


def tables(structure: Structure) -> Tables:
    """The tables of a covered model."""
    model = structure.model
    integers: dict[str, Any] = {
        "body_parent": model.body_parentid,
        "body_joint": np.r_[np.where(model.body_jntnum > 0, model.body_jntadr, 0)],
        "body_joints": model.body_jntnum,
        "joint_type": model.jnt_type,
        "joint_qpos": model.jnt_qposadr,
        "joint_dof": model.jnt_dofadr,
    }
    reals: dict[str, Any] = {
        "body_pos": model.body_pos,
        "body_turn": [_matrix(quaternion) for quaternion in model.body_quat],
        "joint_axis": model.jnt_axis,
        "joint_anchor": model.jnt_pos,
        "joint_start": model.qpos0[model.jnt_qposadr],
    }
    integers |= _groups(model) | _ancestors(model)
    sizes = {"bodies": model.nbody, "dofs": model.nv, "joints": model.njnt, "actuators": model.nu}
    for part in (_limits(model), _actuators(model), _contacts(model)):
        integers |= part.integers
        reals |= part.reals
        sizes |= part.sizes
    moving = [b for b in range(1, model.nbody) if model.body_dofnum[b]]
    sizes |= {"first_moving": moving[0] if moving else 0, "groups": len(integers["group_first"]), "positions": model.nq}
    return Tables(
        {name: np.ascontiguousarray(array, np.int32).ravel() for name, array in integers.items()},
        {name: np.ascontiguousarray(array, np.float64).ravel() for name, array in reals.items()},
        sizes,
        {"timestep": float(model.opt.timestep), "impratio": float(model.opt.impratio)},
    )


def _matrix(quaternion: Any) -> NDArray[np.float64]:
    out = np.empty(9)
    mujoco.mju_quat2Mat(out, quaternion)
    return out


def _groups(model: mujoco.MjModel) -> dict[str, Any]:
    """Groups of degrees of freedom that turn together: [first, first + size), of every body in order."""
    first: list[int] = []
    size: list[int] = []
    begin: list[int] = []
    count: list[int] = []
    for body in range(model.nbody):
        begin.append(len(first))
        for j in range(model.body_jntadr[body], model.body_jntadr[body] + model.body_jntnum[body]):
            dof, kind = int(model.jnt_dofadr[j]), int(model.jnt_type[j])
            parts = {_FREE: [(dof, 3), (dof + 3, 3)], _BALL: [(dof, 3)]}.get(kind, [(dof, 1)])
            first += [part[0] for part in parts]
            size += [part[1] for part in parts]
        count.append(len(first) - begin[-1])
    return {"group_first": first, "group_size": size, "body_group": begin, "body_groups": count}


def _ancestors(model: mujoco.MjModel) -> dict[str, Any]:
    """Of every dof the dofs above it, nearest first; `all_` the same as if the tree were a chain."""
    rows, chain = [], []
    for dof in range(model.nv):
        row, k = [], int(model.dof_parentid[dof])
        while k >= 0:
            row.append(k)
            k = int(model.dof_parentid[k])
        rows.append(row)
        chain.append(list(range(dof - 1, -1, -1)))
    last = [-1] * model.nbody
    for body in range(1, model.nbody):
        number = int(model.body_dofnum[body])
        last[body] = int(model.body_dofadr[body]) + number - 1 if number else last[model.body_parentid[body]]
    return {
        "above": [k for row in rows for k in row],
        "above_first": np.r_[0, np.cumsum([len(row) for row in rows])],
        "all_above": [k for row in chain for k in row],
        "all_above_first": np.r_[0, np.cumsum([len(row) for row in chain])],
        "body_last": last,
    }


def _limits(model: mujoco.MjModel) -> Tables:
    joints = [j for j in range(model.njnt) if model.jnt_limited[j]]
    return Tables(
        {"limit_joint": np.array(joints)},
        {"limit_margin": model.jnt_margin[joints]},
        {"limits": len(joints)},
        {},
    )


def _actuators(model: mujoco.MjModel) -> Tables:
    wide = np.array([-np.inf, np.inf])
    control = np.where(model.actuator_ctrllimited[:, None] & (model.actuator_dyntype[:, None] == 0) != 0,
                       model.actuator_ctrlrange, wide)  # fmt: skip
    force = np.where(model.actuator_forcelimited[:, None] != 0, model.actuator_forcerange, wide)
    affine = np.stack([model.actuator_gaintype != 0, model.actuator_biastype != 0], -1)
    act = [int(model.actuator_actadr[i]) if model.actuator_dyntype[i] else -1 for i in range(model.nu)]
    return Tables(
        {"actuator_joint": model.actuator_trnid[:, 0], "actuator_affine": affine, "actuator_act": np.array(act)},
        {"actuator_control": control, "actuator_force_range": force},
        {},
        {},
    )


def _pairs(model: mujoco.MjModel) -> Iterator[tuple[int, int]]:
    """Pairs of geoms that MuJoCo tests, the one of lower type first."""
    weld, parent = model.body_weldid, model.body_parentid
    excluded = {int(signature) for signature in model.exclude_signature}
    for one in range(model.ngeom):
        for two in range(one + 1, model.ngeom):
            a, b = sorted((int(model.geom_bodyid[one]), int(model.geom_bodyid[two])))
            wa, wb = int(weld[a]), int(weld[b])
            touching = (model.geom_contype[one] & model.geom_conaffinity[two]) or (
                model.geom_contype[two] & model.geom_conaffinity[one]
            )
            if not touching or wa == wb or (a << 16) + b in excluded:
                continue
            if wa and wb and (wa == int(weld[parent[wb]]) or wb == int(weld[parent[wa]])):
                continue
            yield (one, two) if model.geom_type[one] <= model.geom_type[two] else (two, one)


def _dim(model: mujoco.MjModel, one: int, two: int) -> int:
    priority = int(model.geom_priority[one]) - int(model.geom_priority[two])
    dims = int(model.geom_condim[one]), int(model.geom_condim[two])
    return max(dims) if priority == 0 else dims[priority < 0]


def _weight(model: mujoco.MjModel, one: int, two: int) -> float:
    """Weight of the first geom's solref and solimp."""
    priority = int(model.geom_priority[one]) - int(model.geom_priority[two])
    if priority:
        return float(priority > 0)
    a, b = float(model.geom_solmix[one]), float(model.geom_solmix[two])
    tiny = 1e-15
    if a >= tiny and b >= tiny:
        return a / (a + b)
    return 0.5 if a < tiny and b < tiny else float(a >= tiny)


def _contacts(model: mujoco.MjModel) -> Tables:
    """Candidates: for each geom of a pair its core (a point and, of a capsule, its half axis), in its body's frame."""
    rows: dict[str, list[Any]] = {name: [] for name in (*_INTEGER, *_REAL)}
    for one, two in _pairs(model):
        plane = model.geom_type[one] == _PLANE
        capsule = model.geom_type[two] == _CAPSULE
        for end in (1.0, -1.0) if plane and capsule else (0.0,):
            priority = int(model.geom_priority[one]) - int(model.geom_priority[two])
            rows["contact_kind"].append(0 if plane else 1)
            rows["contact_dim"].append(_dim(model, one, two))
            rows["contact_geom"].append((one, two))
            rows["contact_rubbing"].append((one, two) if not priority else (one, one) if priority > 0 else (two, two))
            rows["contact_body"].append((model.geom_bodyid[one], model.geom_bodyid[two]))
            for k, geom in enumerate((one, two)):
                turn = _matrix(model.geom_quat[geom]).reshape(3, 3)
                half = model.geom_size[geom, 1] if model.geom_type[geom] == _CAPSULE else 0.0
                rows[f"contact_point{k}"].append(model.geom_pos[geom] + k * end * half * turn[:, 2])
                rows[f"contact_axis{k}"].append(turn[:, 2])
                rows[f"contact_half{k}"].append(half)
                rows[f"contact_radius{k}"].append(0.0 if k == 0 and plane else model.geom_size[geom, 0])
            margin = model.geom_margin[one] + model.geom_margin[two]
            rows["contact_margin"].append(margin)
            rows["contact_weight"].append(_weight(model, one, two))
            sizes = [rows[f"contact_{name}{k}"][-1] for name in ("half", "radius") for k in (0, 1)]
            rows["contact_reach"].append(margin + sum(sizes))
    return Tables(
        {name: np.array(rows[name], np.int32) for name in _INTEGER},
        {name: np.array(rows[name], np.float64) for name in _REAL},
        {"contacts": len(rows["contact_kind"])},
        {},
    )


_INTEGER = ("contact_kind", "contact_dim", "contact_geom", "contact_rubbing", "contact_body")
_REAL = (
    *(f"contact_{name}{k}" for name in ("point", "axis", "half", "radius") for k in (0, 1)),
    "contact_margin",
    "contact_weight",
    "contact_reach",
)
