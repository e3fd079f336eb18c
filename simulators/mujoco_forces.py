"""Smooth forces of a MuJoCo model, batched: inertia, springs, dampers, gravity compensation.

Every force enters as virtual power, force times the rate of its own coordinate along lam:

    inertia of a body    m a_c . v_c(lam) + (I A + w x I w) . w(lam)                c: centre of mass, A, w: world frame
    armature, damping    lam_i m_i a_i,  -lam_i b_i v_i
    spring               -k (q - q_spring) lam,  with the rotation vector of q_spring^-1 q for balls and free joints
    tendon y = sum c q   -(b y' + k (y outside its slack range)) y(lam),  armature m y'' y(lam) within branches

Gravity acts as a spatial acceleration -g of the world. Reference: Featherstone, Rigid Body Dynamics Algorithms, 2008,
2.13 and 5.3; mujoco_recipe 1.
"""

from __future__ import annotations

import mujoco
import torch
from torch import Tensor

from sim2real.simulators.mujoco_kinematics import Poses, State, cross, point_acceleration, point_velocity
from sim2real.simulators.mujoco_quaternions import (
    normalized,
    quaternion_conjugate,
    quaternion_exp,
    quaternion_product,
    rotation_vector,
)
from sim2real.simulators.mujoco_structure import Structure

Fields = dict[str, Tensor]
_OFF = mujoco.mjtDisableBit
_FULL = ((0, 3, 4), (3, 1, 5), (4, 5, 2))  # where the six numbers of an inertia tensor go


def disabled(structure: Structure, bit: mujoco.mjtDisableBit) -> bool:
    """Whether the model's options switch a part of the physics off."""
    return bool(structure.model.opt.disableflags & int(bit))


def gravity(structure: Structure, fields: Fields) -> Tensor:
    """The acceleration of gravity [1 or B, 3], m/s^2."""
    return 0 * fields["gravity"] if disabled(structure, _OFF.mjDSBL_GRAVITY) else fields["gravity"]


def inertia_wrench(
    poses: Poses, fields: Fields, velocity: Tensor | None, acceleration: Tensor
) -> tuple[Tensor, Tensor]:
    """Force and torque (about the centre of mass) [B, K, nbody, 3] that accelerate the bodies.

    velocity: twists [B, 1, nbody, 6], None at rest; acceleration: spatial accelerations [B, K, nbody, 6].
    """
    center, tensor = centers(poses, fields)[:, None], _world_inertia(poses, fields)[:, None]
    turning = acceleration[..., :3]
    torque = (tensor @ turning[..., None]).squeeze(-1)
    if velocity is None:
        return fields["body_mass"][:, None, :, None] * point_velocity(acceleration, center), torque
    spin = velocity[..., :3]
    force = fields["body_mass"][:, None, :, None] * point_acceleration(acceleration, velocity, center)
    return force, torque + cross(spin, (tensor @ spin[..., None]).squeeze(-1))


def wrench_power(poses: Poses, fields: Fields, virtual: Tensor, wrench: tuple[Tensor, Tensor]) -> Tensor:
    """Power [B, K] of a wrench at the centres of mass along the twists `virtual` [B, 1 or K, nbody, 6]."""
    rate = point_velocity(virtual, centers(poses, fields)[:, None])
    return (rate * wrench[0] + virtual[..., :3] * wrench[1]).sum((-1, -2))


def centers(poses: Poses, fields: Fields) -> Tensor:
    """Centres of mass [B, nbody, 3] in the world."""
    return poses.position + (poses.rotation @ fields["body_ipos"][..., None]).squeeze(-1)


def _world_inertia(poses: Poses, fields: Fields) -> Tensor:
    tensor = fields["body_inertia"][..., _FULL]
    return poses.rotation @ tensor @ poses.rotation.transpose(-1, -2)


def armature_power(structure: Structure, lam: Tensor, a: Tensor, fields: Fields) -> Tensor:
    """lam' diag(armature) a, and the same of tendons, [B]."""
    power = (lam * fields["dof_armature"] * a).sum(-1)
    if not structure.model.ntendon:
        return power
    return power + ((_tendon_inertia(structure, fields) @ a[..., None]).squeeze(-1) * lam).sum(-1)


def mass_matrix(structure: Structure, poses: Poses, columns: Tensor, fields: Fields) -> Tensor:
    """M(q) [B, nv, nv]; columns: twists [B, nv, nbody, 6] of the unit velocities."""
    force, torque = inertia_wrench(poses, fields, None, columns)
    rate = point_velocity(columns, centers(poses, fields)[:, None])
    flat = lambda x, y: torch.cat([x, y], -1).flatten(2)
    matrix = flat(rate, columns[..., :3]) @ flat(force, torque).transpose(1, 2)
    matrix = matrix + torch.diag_embed(fields["dof_armature"])
    if not structure.model.ntendon:
        return matrix
    return matrix + _tendon_inertia(structure, fields)


def _tendon_inertia(structure: Structure, fields: Fields) -> Tensor:
    return (fields["tendon_armature"] @ structure.tendon_inertia.flatten(1)).unflatten(-1, (structure.model.nv,) * 2)


def coordinates(structure: Structure, state: State) -> Tensor:
    """Values [B, nv] of hinges and slides at their degree of freedom, zero elsewhere."""
    base, d = state.base, state.d
    out = torch.zeros(structure.model.nv, len(structure.scalar_dof), dtype=d.dtype, device=d.device)
    out = out.index_put((structure.scalar_dof, torch.arange(len(structure.scalar_dof))), torch.ones_like(out[0]))
    return (base[:, structure.scalar_qpos] + d[:, structure.scalar_dof]) @ out.T


def joint_quaternion(state: State, qpos: Tensor, dof: Tensor) -> Tensor:
    """Unit quaternions [B, n, 4] of the ball and free joints at the given addresses."""
    fixed = normalized(state.base[:, qpos[:, None] + torch.arange(4)])
    return quaternion_product(fixed, quaternion_exp(state.d[:, dof[:, None] + torch.arange(3)]))


def passive_power(
    structure: Structure, state: State, poses: Poses, lam: Tensor, virtual: Tensor, fields: Fields
) -> Tensor:
    """<lam, qfrc_passive> [B] without the forces of the medium and of spatial tendons; virtual: twists of lam."""
    spring = not disabled(structure, _OFF.mjDSBL_SPRING)
    damper = not disabled(structure, _OFF.mjDSBL_DAMPER)
    power = (lam * state.v).sum(-1) * 0
    if spring:
        power = power + _spring_power(structure, state, lam, fields)
    if damper:
        power = power - (lam * fields["dof_damping"] * state.v).sum(-1)
    if structure.model.ntendon:
        power = power + _tendon_power(structure, state, lam, fields, spring=spring, damper=damper)
    if structure.model.flg_gravcomp and (spring or damper):
        weight = fields["body_mass"] * torch.as_tensor(structure.model.body_gravcomp.copy())
        rate = point_velocity(virtual, centers(poses, fields))
        power = power - (weight[..., None] * gravity(structure, fields)[:, None] * rate).sum((-1, -2))
    return power


def _spring_power(structure: Structure, state: State, lam: Tensor, fields: Fields) -> Tensor:
    stiffness, rest = fields["jnt_stiffness"], fields["qpos_spring"]
    s, base, d = structure, state.base, state.d
    stretch = base[:, s.scalar_qpos] + d[:, s.scalar_dof] - rest[:, s.scalar_qpos]
    power = -(stiffness[:, s.scalar_joint] * stretch * lam[:, s.scalar_dof]).sum(-1)
    if len(s.free_joint):
        qpos, dof = s.free_qpos[:, None] + torch.arange(3), s.free_dof[:, None] + torch.arange(3)
        stretch = base[:, qpos] + d[:, dof] - rest[:, qpos]
        power = power - (stiffness[:, s.free_joint, None] * stretch * lam[:, dof]).sum((-1, -2))
    if len(s.quaternion_joint):
        turn = joint_quaternion(state, s.quaternion_qpos, s.quaternion_dof)
        reference = rest[:, s.quaternion_qpos[:, None] + torch.arange(4)]
        angle = rotation_vector(quaternion_product(quaternion_conjugate(normalized(reference)), turn))
        rate = lam[:, s.quaternion_dof[:, None] + torch.arange(3)]
        power = power - (stiffness[:, s.quaternion_joint, None] * angle * rate).sum((-1, -2))
    return power


def _tendon_power(
    structure: Structure, state: State, lam: Tensor, fields: Fields, *, spring: bool, damper: bool
) -> Tensor:
    rows = structure.tendon_coef.T
    length = coordinates(structure, state) @ rows
    low, high = structure.tendon_free.unbind(-1)
    stretch = torch.clamp(length - high, min=0) + torch.clamp(length - low, max=0)
    force = spring * fields["tendon_stiffness"] * stretch + damper * fields["tendon_damping"] * (state.v @ rows)
    return -((lam @ rows) * force).sum(-1)


def passive_derivative(structure: Structure, mu: Tensor, w: Tensor, fields: Fields) -> Tensor:
    """mu' d(qfrc_passive)/dv w [B]: dampers of joints and fixed tendons."""
    if disabled(structure, _OFF.mjDSBL_DAMPER):
        return (mu * w).sum(-1) * 0
    power = -(mu * fields["dof_damping"] * w).sum(-1)
    if not structure.model.ntendon:
        return power
    rows = structure.tendon_coef.T
    return power - ((mu @ rows) * fields["tendon_damping"] * (w @ rows)).sum(-1)
