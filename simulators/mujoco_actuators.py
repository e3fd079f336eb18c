"""Actuators of a MuJoCo model, batched: transmission and force law.

    y = gear . coordinate,  force = gain(y, y') u + bias(y, y'),  u = clamped ctrl or activation,
    gain = g0 + g1 y + g2 y' (affine) or g0,  bias = b0 + b1 y + b2 y' (affine) or 0,  force clamped to its range.

A ball joint's coordinate is its rotation vector, a free joint's forces act without a length; activations move in
`mujoco_integrators`. Muscles' forces and site, body, slider-crank and spatial-tendon transmissions are left out
(`Structure.uncovered`).
Reference: MuJoCo documentation, Computation, Actuation model; mujoco_recipe 1.
"""

from __future__ import annotations

import mujoco
import numpy as np
import torch
from torch import Tensor

from sim2real.simulators.mujoco_forces import Fields, coordinates, disabled, joint_quaternion
from sim2real.simulators.mujoco_integrators import activation_rate, activations, next_activation
from sim2real.simulators.mujoco_kinematics import State
from sim2real.simulators.mujoco_quaternions import quaternion_matrix, rotation_vector
from sim2real.simulators.mujoco_structure import Joint, Structure

_OFF, _AFFINE = mujoco.mjtDisableBit, int(mujoco.mjtGain.mjGAIN_AFFINE)


def actuator_force(structure: Structure, state: State, fields: Fields) -> Tensor:
    """qfrc_actuator [B, nv] of the covered actuators."""
    model = structure.model
    if not model.nu or disabled(structure, _OFF.mjDSBL_ACTUATION):
        return 0 * (state.base[:, :1] + state.d[:, :1]) * state.v
    length, moment = _transmission(structure, state, fields)
    rate = (moment * state.v[:, None]).sum(-1)
    drive = _drive(structure, state, fields)
    raw = _law(structure, length, rate, drive, fields)
    force = _covered(structure) * torch.clamp(raw, *_bounds(model.actuator_forcelimited, model.actuator_forcerange))
    total = (force[..., None] * moment).sum(-2)
    low, high = _joint_bounds(model)
    return torch.clamp(total, low, high)


def actuator_derivative(structure: Structure, state: State, mu: Tensor, w: Tensor, fields: Fields) -> Tensor:
    """mu' d(qfrc_actuator)/dv w [B], as MuJoCo's implicit integrators have it.

    An actuator at the bound of its force adds nothing, nor one on a joint whose total force is at its bound.
    """
    model = structure.model
    if not model.nu or disabled(structure, _OFF.mjDSBL_ACTUATION):
        return (mu * w).sum(-1) * 0
    length, moment = _transmission(structure, state, fields)
    rate = (moment * state.v[:, None]).sum(-1)
    drive = _drive(structure, state, fields)
    gain, bias = _affine(structure)
    slope = gain * fields["actuator_gainprm"][..., 2] * drive + bias * fields["actuator_biasprm"][..., 2]
    low, high = _bounds(model.actuator_forcelimited, model.actuator_forcerange)
    force = _law(structure, length, rate, drive, fields).detach()
    slope = _covered(structure) * torch.where((force > low) & (force < high), slope, 0 * slope)
    total = ((_covered(structure) * force.clamp(low, high))[..., None] * moment.detach()).sum(-2)
    least, most = _joint_bounds(model)
    joint = model.actuator_trntype <= int(mujoco.mjtTrn.mjTRN_JOINTINPARENT)
    dof = torch.as_tensor(model.jnt_dofadr[np.where(joint, model.actuator_trnid[:, 0], 0)].astype(np.int64))
    stopped = ((total <= least) | (total >= most))[:, dof] & torch.as_tensor(joint)
    slope = torch.where(stopped, 0 * slope, slope)
    return (slope * (moment * mu[:, None]).sum(-1) * (moment * w[:, None]).sum(-1)).sum(-1)


def clamped_ctrl(structure: Structure, ctrl: Tensor) -> Tensor:
    """Controls [B, nu] inside their ranges."""
    if disabled(structure, _OFF.mjDSBL_CLAMPCTRL):
        return ctrl
    return torch.clamp(ctrl, *_bounds(structure.model.actuator_ctrllimited, structure.model.actuator_ctrlrange))


def _drive(structure: Structure, state: State, fields: Fields) -> Tensor:
    """What the gain multiplies [B, nu]: the control, or the activation (already advanced where actearly)."""
    model = structure.model
    act, ctrl = state.act, state.ctrl
    u = clamped_ctrl(structure, ctrl)
    if not model.na:
        return u
    table = activations(model)
    early = torch.as_tensor(model.actuator_actearly.astype(bool))[table.actuator]
    if early.any():
        dynprm = fields["actuator_dynprm"]
        later = next_activation(table, act, activation_rate(table, act, ctrl, dynprm), dynprm)
        act = torch.where(early, later, act)
    address = torch.as_tensor(model.actuator_actadr.astype(np.int64))
    return torch.where(address >= 0, act[:, address.clamp(min=0)], u)


def _law(structure: Structure, length: Tensor, rate: Tensor, drive: Tensor, fields: Fields) -> Tensor:
    """Unclamped forces [B, nu]."""
    gain, bias = _affine(structure)
    g, b = fields["actuator_gainprm"], fields["actuator_biasprm"]
    factor = g[..., 0] + gain * (g[..., 1] * length + g[..., 2] * rate)
    return factor * drive + bias * (b[..., 0] + b[..., 1] * length + b[..., 2] * rate)


def _transmission(structure: Structure, state: State, fields: Fields) -> tuple[Tensor, Tensor]:
    """Lengths [B, nu] and moments [B, nu, nv]."""
    gear = fields["actuator_gear"]
    moment = gear[..., :1] * structure.transmission
    length = (moment * coordinates(structure, state)[:, None]).sum(-1)
    if not structure.turning:
        return length, moment
    batch = length.shape[0]
    lengths, moments = list(length.unbind(1)), list(moment.expand(batch, -1, -1).unbind(1))
    for actuator, joint, in_parent in structure.turning:
        lengths[actuator], moments[actuator] = _turning(joint, in_parent, gear[:, actuator], state)
    return torch.stack([y.expand(batch) for y in lengths], 1), torch.stack([m.expand(batch, -1) for m in moments], 1)


def _turning(joint: Joint, in_parent: bool, gear: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Length [B] and moment [B, nv] of an actuator on a ball or a free joint."""
    shift = 3 if joint.kind == "free" else 0
    at = lambda k: torch.tensor([k + shift])
    turn = joint_quaternion(state, at(joint.qpos), at(joint.dof))[:, 0]
    torque = gear[:, shift : shift + 3]
    if in_parent:
        torque = (quaternion_matrix(turn).transpose(-1, -2) @ torque[..., None]).squeeze(-1)
    width = shift + 3
    place = torch.eye(width, state.v.shape[-1], dtype=state.v.dtype, device=state.v.device).roll(joint.dof, 1)
    force = torque if joint.kind == "ball" else torch.cat([gear[:, :3].expand(len(torque), -1), torque], -1)
    length = (gear[:, :3] * rotation_vector(turn)).sum(-1)
    return length if joint.kind == "ball" else 0 * length, force @ place


def _covered(structure: Structure) -> Tensor:
    """[nu] 1 for actuators whose force the program has."""
    mask = torch.ones(structure.model.nu, dtype=torch.float64)
    for force in structure.uncovered:
        if force.kind == "actuator":
            mask[force.index] = 0
    return mask


def _affine(structure: Structure) -> tuple[Tensor, Tensor]:
    """[nu] 1 where the gain, and where the bias, is affine."""
    model = structure.model
    mask = lambda kinds: torch.as_tensor((kinds == _AFFINE).astype(np.float64))
    return mask(model.actuator_gaintype), mask(model.actuator_biastype)


def _bounds(limited: np.ndarray, interval: np.ndarray) -> tuple[Tensor, Tensor]:
    limited = limited.astype(bool)
    low, high = np.where(limited, interval[:, 0], -np.inf), np.where(limited, interval[:, 1], np.inf)
    return torch.as_tensor(low), torch.as_tensor(high)


def _joint_bounds(model: mujoco.MjModel) -> tuple[Tensor, Tensor]:
    """Bounds [nv] of the total actuator force on each degree of freedom."""
    low, high = _bounds(model.jnt_actfrclimited, model.jnt_actfrcrange)
    joint = torch.as_tensor(model.dof_jntid.astype(np.int64))
    return low[joint], high[joint]
