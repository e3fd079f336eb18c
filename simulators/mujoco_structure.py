"""What the derivative program needs to know of a compiled MuJoCo model: static tables and physical fields.

`prepare` makes a copy of the model whose solver converges and whose inertia follows edited fields. `structure` reads
the tables and refuses, by element, what the program cannot differentiate (`mujoco_coverage`). Forces outside the
program (fluid, spatial tendons, muscles, site and body transmissions) are named in `uncovered`: they are differenced
alone.

Fields are the physical numbers of the model under MuJoCo's names, `[1, *shape]` or `[B, *shape]`. One differs:
`body_inertia` is the full tensor (xx, yy, zz, xy, xz, yz) about the centre of mass in *body* axes, R(iquat) diag
R(iquat)': smooth where principal axes are not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import mujoco
import numpy as np
import torch
from torch import Tensor

from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError, Uncovered, check_covered, uncovered_forces

FIELDS: tuple[str, ...] = (
    "body_mass",
    "body_ipos",
    "body_inertia",
    "body_invweight0",
    "dof_armature",
    "dof_damping",
    "dof_frictionloss",
    "dof_solref",
    "dof_solimp",
    "dof_invweight0",
    "jnt_stiffness",
    "jnt_range",
    "jnt_solref",
    "jnt_solimp",
    "qpos_spring",
    "gravity",
    "geom_friction",
    "geom_solref",
    "geom_solimp",
    "pair_friction",
    "pair_solref",
    "pair_solreffriction",
    "pair_solimp",
    "actuator_gear",
    "actuator_gainprm",
    "actuator_biasprm",
    "actuator_dynprm",
    "tendon_stiffness",
    "tendon_damping",
    "tendon_armature",
    "tendon_frictionloss",
    "tendon_range",
    "tendon_solref_lim",
    "tendon_solimp_lim",
    "tendon_solref_fri",
    "tendon_solimp_fri",
    "tendon_invweight0",
    "eq_solref",
    "eq_solimp",
)
"""the physical fields, each with the shape of the array of this name in `MjModel` (`body_inertia`: [nbody, 6])"""

_TOLERANCE = 1e-20
"""as exact as 0, which wanders on in rounding for 40 iterations"""

JointKind = Literal["free", "ball", "slide", "hinge"]
_KINDS: tuple[JointKind, ...] = ("free", "ball", "slide", "hinge")


@dataclass(frozen=True, eq=False)
class Joint:
    """One joint; `qpos` and `dof` are its first addresses, `reference` its qpos0 where it is scalar."""

    kind: JointKind
    index: int
    body: int
    qpos: int
    dof: int
    reference: float
    axis: Tensor
    anchor: Tensor


@dataclass(frozen=True, eq=False)
class Structure:
    """Static tables of one compiled model. `model` is prepared and is never written again."""

    model: mujoco.MjModel
    parents: tuple[int, ...]
    joints: tuple[tuple[Joint, ...], ...]
    """joints of every body, in order"""
    body_pos: Tensor
    """[nbody, 3] in the parent frame; of mocap bodies in the world"""
    body_quat: Tensor
    """[nbody, 4]"""
    moves: Tensor
    """[nbody, nv] 1 where the degree of freedom moves the body"""
    before: Tensor
    """[nv, nv] 1 where the second degree of freedom carries the frame of the first's axis"""
    lone: Tensor
    """[nv] 1 for free joints whose tree is one body: implicitfast keeps their gyroscopic terms"""
    scalar_joint: Tensor
    """[ns] hinges and slides, with their addresses"""
    scalar_qpos: Tensor
    scalar_dof: Tensor
    quaternion_joint: Tensor
    """[nk] balls and the rotations of free joints, with the addresses of the quaternion and its three rates"""
    quaternion_qpos: Tensor
    quaternion_dof: Tensor
    free_joint: Tensor
    """[nf] free joints, with the addresses of their translation"""
    free_qpos: Tensor
    free_dof: Tensor
    tendon_coef: Tensor
    """[ntendon, nv] coefficients of fixed tendons; rows of spatial tendons are zero"""
    tendon_inertia: Tensor
    """[ntendon, nv, nv] inertia per armature: coef coef' within branches, since MuJoCo's M has no entries across"""
    tendon_free: Tensor
    """[ntendon, 2] range of lengths in which the spring is slack"""
    transmission: Tensor
    """[nu, nv] coefficients of actuators on scalar joints and fixed tendons, before the gear"""
    turning: tuple[tuple[int, Joint, bool], ...]
    """actuators on ball and free joints: (actuator, joint, whether in the parent's frame)"""
    uncovered: tuple[Uncovered, ...]
    """forces that the program leaves out"""
    simple: tuple[str, ...]
    """bodies compiled as simple: their inertia ignores an edited centre of mass (compile with simple="false")"""


def prepare(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy of the model that solves to convergence, and whose inertia matrix follows edited masses.

    Newton's method to rounding, exact collisions, dense Jacobians, no warm start (the answer would depend on the past),
    no reset of bad states. "Simple" bodies take the general path, else an edited mass never reaches M; frames shared
    with the inertia are not, else geoms follow an edited centre of mass.
    """
    out = copy.copy(model)
    option = out.opt
    option.solver = mujoco.mjtSolver.mjSOL_NEWTON
    option.tolerance, option.iterations = _TOLERANCE, max(int(option.iterations), 100)
    option.ls_tolerance, option.ls_iterations = 1e-12, max(int(option.ls_iterations), 50)
    option.ccd_tolerance, option.ccd_iterations = 1e-10, max(int(option.ccd_iterations), 200)
    option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    off = mujoco.mjtDisableBit
    option.disableflags |= int(off.mjDSBL_WARMSTART) | int(off.mjDSBL_ISLAND) | int(off.mjDSBL_AUTORESET)
    # the midphase keeps boxes in the inertial frame of a body: an edited centre of mass or inertia would lose contacts
    option.disableflags |= int(off.mjDSBL_MIDPHASE)
    for flags in (out.body_simple, out.dof_simplenum, out.body_sameframe, out.geom_sameframe, out.site_sameframe):
        flags[:] = 0
    return out


def structure(model: mujoco.MjModel) -> Structure:
    """Tables of the model; `MujocoUnsupportedError` names the element that cannot be differentiated."""
    check_covered(model)
    prepared = prepare(model)
    joints = tuple(_joints(prepared, body) for body in range(prepared.nbody))
    flat = [joint for of_body in joints for joint in of_body]
    scalar = [j for j in flat if j.kind in ("hinge", "slide")]
    turning = [(j, 3 if j.kind == "free" else 0) for j in flat if j.kind in ("free", "ball")]
    free = [j for j in flat if j.kind == "free"]
    quaternion_qpos, quaternion_dof = [j.qpos + k for j, k in turning], [j.dof + k for j, k in turning]
    moves, before = _carriers(prepared, joints)
    coefficients = _tendon_coefficients(prepared)
    rows, quaternion_rows = _transmissions(prepared, flat, coefficients)
    simple = [prepared.body(b).name or f"body {b}" for b in range(1, model.nbody) if model.body_simple[b]]
    return Structure(
        model=prepared,
        parents=tuple(int(p) for p in prepared.body_parentid),
        joints=joints,
        body_pos=_real(prepared.body_pos),
        body_quat=_real(prepared.body_quat),
        moves=moves,
        before=before,
        lone=_lone(prepared),
        scalar_joint=_index([j.index for j in scalar]),
        scalar_qpos=_index([j.qpos for j in scalar]),
        scalar_dof=_index([j.dof for j in scalar]),
        quaternion_joint=_index([j.index for j, _ in turning]),
        quaternion_qpos=_index(quaternion_qpos),
        quaternion_dof=_index(quaternion_dof),
        free_joint=_index([j.index for j in free]),
        free_qpos=_index([j.qpos for j in free]),
        free_dof=_index([j.dof for j in free]),
        tendon_coef=coefficients,
        tendon_inertia=coefficients[:, :, None] * coefficients[:, None] * _mass_pattern(prepared),
        tendon_free=_real(prepared.tendon_lengthspring).reshape(-1, 2),
        transmission=rows,
        turning=quaternion_rows,
        uncovered=uncovered_forces(prepared),
        simple=tuple(simple),
    )


def nominal_fields(structure: Structure) -> dict[str, Tensor]:
    """Every field at the model's own value, `[1, *shape]`."""
    model = structure.model
    fields = {name: _real(getattr(model, name))[None] for name in FIELDS if name not in ("gravity", "body_inertia")}
    turn = np.empty((model.nbody, 9))
    for body in range(model.nbody):
        mujoco.mju_quat2Mat(turn[body], model.body_iquat[body])
    axes = turn.reshape(-1, 3, 3)
    full = np.einsum("bij,bj,bkj->bik", axes, model.body_inertia, axes)
    six = full[:, [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    return {**fields, "gravity": _real(model.opt.gravity)[None], "body_inertia": _real(six)[None]}


def check_fields(structure: Structure, names: tuple[str, ...]) -> None:
    """Raise `MujocoUnsupportedError` if a named field cannot be differentiated in this model."""
    unknown = [name for name in names if name not in FIELDS]
    if unknown:
        raise MujocoUnsupportedError(
            f"{unknown} are not fields of a MuJoCo model here; choose from {', '.join(FIELDS)}"
        )
    fluid = any(force.kind == "fluid" for force in structure.uncovered)
    if fluid and "body_inertia" in names:
        raise MujocoUnsupportedError(
            "body_inertia cannot be differentiated in a fluid: drag acts in the principal axes, which jump where two "
            "moments are equal; leave body_inertia out, or set density and viscosity to 0"
        )
    if "tendon_armature" in names and any(force.kind == "tendon" for force in structure.uncovered):
        raise MujocoUnsupportedError(
            "tendon_armature cannot be differentiated in a model with spatial tendons: their inertia is not in the "
            "program; leave tendon_armature out"
        )
    edited = sorted({"body_ipos", "body_inertia"} & set(names))
    if structure.simple and edited:
        raise MujocoUnsupportedError(
            f"the bodies {', '.join(structure.simple)} were compiled as simple: their inertia ignores {edited}; "
            'compile them with simple="false"'
        )


def _joints(model: mujoco.MjModel, body: int) -> tuple[Joint, ...]:
    first = int(model.body_jntadr[body])
    return tuple(_joint(model, index) for index in range(first, first + int(model.body_jntnum[body])))


def _joint(model: mujoco.MjModel, index: int) -> Joint:
    kind, address = _KINDS[int(model.jnt_type[index])], int(model.jnt_qposadr[index])
    return Joint(
        kind=kind,
        index=index,
        body=int(model.jnt_bodyid[index]),
        qpos=address,
        dof=int(model.jnt_dofadr[index]),
        reference=float(model.qpos0[address]) if kind in ("slide", "hinge") else 0.0,
        axis=_real(model.jnt_axis[index]),
        anchor=_real(model.jnt_pos[index]),
    )


def _carriers(model: mujoco.MjModel, joints: tuple[tuple[Joint, ...], ...]) -> tuple[Tensor, Tensor]:
    """`moves` and `before` of the kinematics."""
    moves, before = np.zeros((model.nbody, model.nv)), np.zeros((model.nv, model.nv))
    width = {"free": 6, "ball": 3, "slide": 1, "hinge": 1}
    for body in range(1, model.nbody):
        carried = moves[model.body_parentid[body]].copy()
        for joint in joints[body]:
            dofs = slice(joint.dof, joint.dof + width[joint.kind])
            if joint.kind == "free":  # the translation carries the origin about which the body spins
                before[joint.dof + 3 : joint.dof + 6, joint.dof : joint.dof + 3] = 1
            else:
                before[dofs] = carried
            carried[dofs] = 1
        moves[body] = carried
    return _real(moves), _real(before)


def _lone(model: mujoco.MjModel) -> Tensor:
    mask = np.zeros(model.nv)
    for tree in range(model.ntree):
        first, number = int(model.tree_dofadr[tree]), int(model.tree_dofnum[tree])
        moving = [b for b in range(model.nbody) if model.body_treeid[b] == tree and model.body_dofnum[b] > 0]
        if len(moving) == 1 and model.jnt_type[model.dof_jntid[first]] == int(mujoco.mjtJoint.mjJNT_FREE):
            mask[first : first + number] = 1
    return _real(mask)


def _tendon_coefficients(model: mujoco.MjModel) -> Tensor:
    rows = np.zeros((model.ntendon, model.nv))
    for tendon in range(model.ntendon):
        first = int(model.tendon_adr[tendon])
        for k in range(first, first + int(model.tendon_num[tendon])):
            if model.wrap_type[k] == int(mujoco.mjtWrap.mjWRAP_JOINT):
                rows[tendon, model.jnt_dofadr[model.wrap_objid[k]]] += model.wrap_prm[k]
    return _real(rows)


def _mass_pattern(model: mujoco.MjModel) -> Tensor:
    """[nv, nv] 1 where MuJoCo's inertia matrix has an entry: degrees of freedom on one branch of the tree."""
    pattern = np.zeros((model.nv, model.nv))
    for row in range(model.nv):
        first = int(model.M_rowadr[row])
        columns = model.M_colind[first : first + int(model.M_rownnz[row])]
        pattern[row, columns] = pattern[columns, row] = 1
    return _real(pattern)


def _transmissions(
    model: mujoco.MjModel, joints: list[Joint], tendons: Tensor
) -> tuple[Tensor, tuple[tuple[int, Joint, bool], ...]]:
    """Coefficients of actuators over scalar coordinates, and the list of those that turn a ball or a free joint."""
    rows, turning = torch.zeros(model.nu, model.nv, dtype=torch.float64), []
    for actuator in range(model.nu):
        kind, target = mujoco.mjtTrn(int(model.actuator_trntype[actuator])), int(model.actuator_trnid[actuator, 0])
        if kind == mujoco.mjtTrn.mjTRN_TENDON:
            rows[actuator] = tendons[target]
        elif kind in (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT):
            joint = joints[target]
            if joint.kind in ("hinge", "slide"):
                rows[actuator, joint.dof] = 1.0
            else:
                turning.append((actuator, joint, bool(kind == mujoco.mjtTrn.mjTRN_JOINTINPARENT)))
    return rows, tuple(turning)


def _real(array: object) -> Tensor:
    return torch.as_tensor(np.array(array, dtype=np.float64))


def _index(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
