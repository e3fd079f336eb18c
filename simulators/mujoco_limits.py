"""Rows of limits and of dry friction, of joints and fixed tendons.

    limit of a scalar coordinate y    pos = y - low, rate y'      or      pos = high - y, rate -y'
    limit of a ball joint             pos = max(range) - |theta|, rate -u . w,   theta = |theta| u its rotation vector
    dry friction                      rate y', no position

A limit is active where pos < margin. Which ones are is frozen by `find_limits`, from values alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import torch
from torch import Tensor

from sim2real.simulators.mujoco_forces import Fields, coordinates, disabled, joint_quaternion
from sim2real.simulators.mujoco_kinematics import State
from sim2real.simulators.mujoco_quaternions import rotation_vector
from sim2real.simulators.mujoco_rows import Motion, Rows, friction_rows, spring_rows
from sim2real.simulators.mujoco_structure import Structure

_OFF = mujoco.mjtDisableBit


@dataclass(frozen=True, eq=False)
class Limits:
    """Active rows as pairs [n, 2] of (environment, element), or triples with the side: 0 low, 1 high."""

    joint: Tensor
    """[n, 3] limits of hinges and slides; the element counts among the scalar joints"""
    ball: Tensor
    """[n, 2] limits of balls; the element counts among the quaternion joints"""
    tendon: Tensor
    """[n, 3]"""
    joint_friction: Tensor
    """[n, 2] degrees of freedom with a friction loss"""
    tendon_friction: Tensor
    """[n, 2]"""


def find_limits(structure: Structure, state: State, fields: Fields) -> Limits:
    """The limits and frictions that act at B positions, as MuJoCo includes them."""
    model, base = structure.model, state.base
    limited = not disabled(structure, _OFF.mjDSBL_LIMIT) and not disabled(structure, _OFF.mjDSBL_CONSTRAINT)
    rubbed = not disabled(structure, _OFF.mjDSBL_FRICTIONLOSS) and not disabled(structure, _OFF.mjDSBL_CONSTRAINT)
    flag = lambda array: torch.as_tensor(array.astype(bool))
    scalar = base[:, structure.scalar_qpos]
    bounds = fields["jnt_range"][:, structure.scalar_joint]
    joint = _sides(scalar, bounds, torch.as_tensor(model.jnt_margin)[structure.scalar_joint])
    joint = joint & (limited & flag(model.jnt_limited)[structure.scalar_joint])[:, None]
    length = coordinates(structure, state) @ structure.tendon_coef.T
    tendon = _sides(length, fields["tendon_range"], torch.as_tensor(model.tendon_margin))
    tendon = tendon & (limited & flag(model.tendon_limited))[:, None]
    turn = joint_quaternion(state, structure.quaternion_qpos, structure.quaternion_dof)
    gap = fields["jnt_range"][:, structure.quaternion_joint].amax(-1) - rotation_vector(turn).norm(dim=-1)
    ball = (gap < torch.as_tensor(model.jnt_margin)[structure.quaternion_joint]) & limited
    friction = (fields["dof_frictionloss"] > 0) & rubbed
    tied = (fields["tendon_frictionloss"] > 0) & rubbed
    size = len(base)
    return Limits(
        joint=joint.nonzero(),
        ball=(ball & flag(model.jnt_limited)[structure.quaternion_joint]).nonzero(),
        tendon=tendon.nonzero(),
        joint_friction=friction.expand(size, -1).nonzero(),
        tendon_friction=tied.expand(size, -1).nonzero(),
    )


def limit_rows(structure: Structure, motion: Motion, limits: Limits, fields: Fields) -> list[Rows]:
    """Every row of limits and dry friction."""
    found = [_joint_rows, _ball_rows, _tendon_rows, _joint_friction_rows, _tendon_friction_rows]
    counted = [limits.joint, limits.ball, limits.tendon, limits.joint_friction, limits.tendon_friction]
    return [
        rows(structure, motion, where, fields) for rows, where in zip(found, counted, strict=True) if len(where) > 0
    ]


def pick(field: Tensor, env: Tensor, element: Tensor) -> Tensor:
    """Entries of a field [1 or B, n, ...] at pairs of environment and element."""
    return field[env if len(field) > 1 else torch.zeros_like(env), element]


def _sides(y: Tensor, bounds: Tensor, margin: Tensor) -> Tensor:
    """[B, n, 2] whether the low and the high side are closer than the margin."""
    return torch.stack([y - bounds[..., 0], bounds[..., 1] - y], -1) < margin[:, None]


def _joint_rows(structure: Structure, motion: Motion, where: Tensor, fields: Fields) -> Rows:
    env, element, side = where.unbind(-1)
    joint, dof = structure.scalar_joint[element], structure.scalar_dof[element]
    y = pick(motion.state.base, env, structure.scalar_qpos[element]) + pick(motion.state.d, env, dof)
    rate = _along(motion, env)[torch.arange(len(env)), :, dof]
    margin = torch.as_tensor(structure.model.jnt_margin)[joint]
    bound = pick(fields["jnt_range"], env, joint)[torch.arange(len(env)), side]
    solver = tuple(pick(fields[name], env, joint) for name in ("jnt_solref", "jnt_solimp"))
    diagonal = pick(fields["dof_invweight0"], env, dof)[:, None]
    return _one_sided(structure, env, (y, rate, side), bound, margin, (solver[0], solver[1], diagonal))


def _tendon_rows(structure: Structure, motion: Motion, where: Tensor, fields: Fields) -> Rows:
    env, tendon, side = where.unbind(-1)
    length, rate = tendon_motion(structure, motion, env, tendon)
    margin = torch.as_tensor(structure.model.tendon_margin)[tendon]
    bound = pick(fields["tendon_range"], env, tendon)[torch.arange(len(env)), side]
    solver = tuple(pick(fields[name], env, tendon) for name in ("tendon_solref_lim", "tendon_solimp_lim"))
    diagonal = pick(fields["tendon_invweight0"], env, tendon)[:, None]
    return _one_sided(structure, env, (length, rate, side), bound, margin, (solver[0], solver[1], diagonal))


def _one_sided(
    structure: Structure,
    env: Tensor,
    coordinate: tuple[Tensor, Tensor, Tensor],
    bound: Tensor,
    margin: Tensor,
    solver: tuple[Tensor, Tensor, Tensor],
) -> Rows:
    y, rate, side = coordinate
    sign = 1 - 2 * side.to(y.dtype)
    position = sign * (y - bound) - margin
    return spring_rows(structure, "limit", env, (sign[:, None] * rate)[..., None], position[:, None], position, solver)


def _ball_rows(structure: Structure, motion: Motion, where: Tensor, fields: Fields) -> Rows:
    env, element = where.unbind(-1)
    joint, dof = structure.quaternion_joint[element], structure.quaternion_dof[element]
    batch = motion.along.shape[0]
    turn = joint_quaternion(motion.state, structure.quaternion_qpos, structure.quaternion_dof)
    angles = rotation_vector(turn.expand(batch, -1, -1)[env, element])
    angle = angles.norm(dim=-1)
    axis = angles / angle[:, None]
    spin = _along(motion, env)[torch.arange(len(env))[:, None], :, dof[:, None] + torch.arange(3)]
    rate = -(spin * axis[..., None]).sum(1)
    margin = torch.as_tensor(structure.model.jnt_margin)[joint]
    position = pick(fields["jnt_range"], env, joint).amax(-1) - angle - margin
    solref, solimp = (pick(fields[name], env, joint) for name in ("jnt_solref", "jnt_solimp"))
    diagonal = pick(fields["dof_invweight0"], env, dof)[:, None]
    return spring_rows(
        structure, "limit", env, rate[..., None], position[:, None], position, (solref, solimp, diagonal)
    )


def _joint_friction_rows(structure: Structure, motion: Motion, where: Tensor, fields: Fields) -> Rows:
    env, dof = where.unbind(-1)
    rate = _along(motion, env)[torch.arange(len(env)), :, dof]
    solref, solimp, loss = (pick(fields[f"dof_{name}"], env, dof) for name in ("solref", "solimp", "frictionloss"))
    diagonal = pick(fields["dof_invweight0"], env, dof)[:, None]
    return friction_rows(structure, env, rate[..., None], loss, (solref, solimp, diagonal))


def _tendon_friction_rows(structure: Structure, motion: Motion, where: Tensor, fields: Fields) -> Rows:
    env, tendon = where.unbind(-1)
    rate = tendon_motion(structure, motion, env, tendon)[1]
    names = ("solref_fri", "solimp_fri", "frictionloss")
    solref, solimp, loss = (pick(fields[f"tendon_{name}"], env, tendon) for name in names)
    diagonal = pick(fields["tendon_invweight0"], env, tendon)[:, None]
    return friction_rows(structure, env, rate[..., None], loss, (solref, solimp, diagonal))


def tendon_motion(structure: Structure, motion: Motion, env: Tensor, tendon: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths [N] and rates [N, K] of fixed tendons."""
    rows = structure.tendon_coef[tendon]
    y = coordinates(structure, motion.state).expand(motion.along.shape[0], -1)
    return (y[env] * rows).sum(-1), (_along(motion, env) * rows[:, None]).sum(-1)


def _along(motion: Motion, env: Tensor) -> Tensor:
    """The generalised velocities [N, K, nv] of each row."""
    return motion.along[env]
