"""Poses and twists of all bodies of a MuJoCo model, batched over environments.

Poses are functions of the tangent displacement d at `base` (`mj_integratePos`). Every degree of freedom i has an axis
S_i in R^6, angular and linear part about the world origin. With `moves[b, i] = 1` where dof i moves body b,

    twist of b along u      t_b(u) = sum_i moves[b, i] S_i u_i                      (angular w, linear l at the origin)
    velocity bias           c_b = sum_i moves[b, i] (V_i x S_i) v_i,               V_i = sum_j before[i, j] S_j v_j,

where `before[i, j] = 1` if dof j carries the frame in which S_i is fixed. V x S is the spatial cross product
(Vw x Sw, Vw x Sl + Vl x Sw). The spatial acceleration of b is t_b(a) + c_b.
Reference: Featherstone, Rigid Body Dynamics Algorithms, 2008, 3.5 and 5.1; mujoco_recipe 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.simulators.mujoco_quaternions import (
    normalized,
    quaternion_exp,
    quaternion_matrix,
    quaternion_product,
)
from sim2real.simulators.mujoco_structure import Joint, Structure

cross = torch.linalg.cross


@dataclass(frozen=True, eq=False)
class State:
    """What the acceleration depends on apart from fields, B environments; a tensor of length 1 is shared by all."""

    base: Tensor
    """[B, nq] qpos, without derivatives"""
    d: Tensor
    """[B, nv] tangent displacement at base: its value is zero, its derivatives are those of the position"""
    v: Tensor
    """[B, nv]"""
    act: Tensor
    """[B, na]"""
    ctrl: Tensor
    """[B, nu]"""
    force: Tensor
    """[B, nv] applied generalised force"""


@dataclass(frozen=True, eq=False)
class Poses:
    """Where the bodies are, B environments."""

    position: Tensor
    """[B, nbody, 3] of the body frames, m"""
    rotation: Tensor
    """[B, nbody, 3, 3] from body to world"""
    quaternion: Tensor
    """[B, nbody, 4]"""
    axes: Tensor
    """[B, nv, 6] the twist of each degree of freedom at unit rate, about the world origin"""


@dataclass(frozen=True, eq=False)
class _Frame:
    """One body frame [B, ...] while its joints are applied."""

    position: Tensor
    quaternion: Tensor
    rotation: Tensor


def poses(structure: Structure, base: Tensor, d: Tensor) -> Poses:
    """Poses and axes at base [B, nq] displaced by d [B, nv], whose value is zero."""
    batch = (max(len(base), len(d)),)
    start, turn = structure.body_pos.expand(*batch, -1, -1), structure.body_quat.expand(*batch, -1, -1)
    turned = quaternion_matrix(turn)
    frames = [_Frame(start[:, 0], turn[:, 0], turned[:, 0])]
    axes: list[Tensor] = []
    for body, (parent, joints) in enumerate(zip(structure.parents[1:], structure.joints[1:], strict=True), 1):
        over = frames[parent]
        frame = _Frame(
            over.position + _rotate(over.rotation, start[:, body]),
            quaternion_product(over.quaternion, turn[:, body]),
            over.rotation @ turned[:, body],
        )
        for joint in joints:
            frame, moved = _moved(joint, frame, base, d)
            axes += moved
        frames.append(frame)
    none = start.new_zeros(*batch, 0, 6)
    return Poses(
        position=torch.stack([f.position for f in frames], 1),
        rotation=torch.stack([f.rotation for f in frames], 1),
        quaternion=torch.stack([f.quaternion for f in frames], 1),
        axes=torch.stack(axes, 1) if axes else none,
    )


def _moved(joint: Joint, frame: _Frame, base: Tensor, d: Tensor) -> tuple[_Frame, list[Tensor]]:
    """The frame after one joint, and the axes of its degrees of freedom."""
    q, i = joint.qpos, joint.dof
    if joint.kind == "slide":
        axis = frame.rotation @ joint.axis
        shift = (base[:, q] + d[:, i] - joint.reference)[:, None]
        moved = _Frame(frame.position + axis * shift, frame.quaternion, frame.rotation)
        return moved, [torch.cat([torch.zeros_like(axis), axis], -1)]
    if joint.kind == "hinge":
        anchor, axis = frame.position + frame.rotation @ joint.anchor, frame.rotation @ joint.axis
        half = (base[:, q] + d[:, i] - joint.reference)[:, None] / 2
        turn = torch.cat([half.cos(), half.sin() * joint.axis], -1)
        return _turned(joint, frame, turn, anchor), [torch.cat([axis, cross(anchor, axis)], -1)]
    if joint.kind == "ball":
        anchor = frame.position + frame.rotation @ joint.anchor
        turn = quaternion_product(normalized(base[:, q : q + 4]), quaternion_exp(d[:, i : i + 3]))
        moved = _turned(joint, frame, turn, anchor)
        return moved, _spin(moved.rotation, anchor)
    position = base[:, q : q + 3] + d[:, i : i + 3]
    turn = quaternion_product(normalized(base[:, q + 3 : q + 7]), quaternion_exp(d[:, i + 3 : i + 6]))
    rotation = quaternion_matrix(turn)
    along = torch.eye(3, 6, dtype=position.dtype, device=position.device).roll(3, 1).expand(len(position), 3, 6)
    return _Frame(position, turn, rotation), [*along.unbind(1), *_spin(rotation, position)]


def _turned(joint: Joint, frame: _Frame, turn: Tensor, anchor: Tensor) -> _Frame:
    """The frame turned by the quaternion `turn` of its own axes about the anchor."""
    rotation = frame.rotation @ quaternion_matrix(turn)
    return _Frame(anchor - rotation @ joint.anchor, quaternion_product(frame.quaternion, turn), rotation)


def _spin(rotation: Tensor, anchor: Tensor) -> list[Tensor]:
    """Axes of the three body-frame rates of a quaternion joint: the columns of its rotation, through the anchor."""
    return [torch.cat([axis, cross(anchor, axis)], -1) for axis in rotation.unbind(-1)]


def _rotate(rotation: Tensor, vector: Tensor) -> Tensor:
    return (rotation @ vector[..., None]).squeeze(-1)


def twists(structure: Structure, axes: Tensor, along: Tensor) -> Tensor:
    """Twists [B, K, nbody, 6] of all bodies along K generalised velocities `along` [B, K, nv]."""
    return structure.moves @ (along[..., None] * axes[:, None])


def velocity_bias(structure: Structure, axes: Tensor, v: Tensor) -> Tensor:
    """The spatial acceleration [B, nbody, 6] of all bodies at zero generalised acceleration, gravity left out."""
    rate = v[..., None] * axes
    carried = structure.before @ rate
    w, l = carried[..., :3], carried[..., 3:]
    bias = torch.cat([cross(w, rate[..., :3]), cross(w, rate[..., 3:]) + cross(l, rate[..., :3])], -1)
    return structure.moves @ bias


def point_velocity(twist: Tensor, point: Tensor) -> Tensor:
    """Velocity [..., 3] of a point that moves with a twist [..., 6]."""
    return twist[..., 3:] + cross(twist[..., :3], point)


def point_acceleration(acceleration: Tensor, velocity: Tensor, point: Tensor) -> Tensor:
    """Acceleration [..., 3] of a body point, from the spatial acceleration and the twist of its body, both [..., 6]."""
    return point_velocity(acceleration, point) + cross(velocity[..., :3], point_velocity(velocity, point))
