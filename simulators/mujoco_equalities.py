"""Rows of equality constraints: connect, weld, joint, tendon.

    connect   p = p1 - p2 of the two anchors, 3 rows; violation |p|
    weld      p, and torquescale vec(q2^-1 q1 q_rel), 6 rows; violation the norm of all six
    joint     y1 - y1_0 - poly(y2 - y2_0), 1 row; tendons the same with their lengths

Only connect and weld carry the velocity part of the acceleration, J' v, as MuJoCo has it.
Reference: MuJoCo documentation, Computation, Equality; mujoco_recipe 2.
"""

from __future__ import annotations

from collections.abc import Callable

import mujoco
import numpy as np
import torch
from torch import Tensor

from sim2real.simulators.mujoco_forces import Fields, disabled
from sim2real.simulators.mujoco_kinematics import point_acceleration, point_velocity
from sim2real.simulators.mujoco_limits import tendon_motion
from sim2real.simulators.mujoco_quaternions import quaternion_conjugate, quaternion_product
from sim2real.simulators.mujoco_rows import Motion, Rows, spring_rows
from sim2real.simulators.mujoco_structure import Structure

_EQ, _OFF = mujoco.mjtEq, mujoco.mjtDisableBit
Coordinate = tuple[Tensor, Tensor]


def equality_rows(structure: Structure, motion: Motion, fields: Fields) -> list[Rows]:
    """Every row of the active equality constraints."""
    if disabled(structure, _OFF.mjDSBL_EQUALITY) or disabled(structure, _OFF.mjDSBL_CONSTRAINT):
        return []
    model = structure.model
    laws: dict[int, Callable[[Structure, Motion, int, Fields], Rows]] = {
        int(_EQ.mjEQ_CONNECT): _connect,
        int(_EQ.mjEQ_WELD): _weld,
        int(_EQ.mjEQ_JOINT): _scalar,
        int(_EQ.mjEQ_TENDON): _scalar,
    }
    return [laws[int(model.eq_type[i])](structure, motion, i, fields) for i in range(model.neq) if model.eq_active0[i]]


def _scalar(structure: Structure, motion: Motion, i: int, fields: Fields) -> Rows:
    """One joint or tendon as a quartic polynomial of another."""
    model = structure.model
    tendons = model.eq_type[i] == int(_EQ.mjEQ_TENDON)
    coordinate = _tendon if tendons else _joint
    first, second = int(model.eq_obj1id[i]), int(model.eq_obj2id[i])
    coefficients = [float(c) for c in model.eq_data[i, :5]]
    position, rate = coordinate(structure, motion, first)
    weight = _weight(structure, fields, first, tendons)
    if second < 0:
        position = position - coefficients[0]
    else:
        other, other_rate = coordinate(structure, motion, second)
        value, derivative = 0 * other, 0 * other
        for c in reversed(coefficients):
            derivative = derivative * other + value
            value = value * other + c
        position, rate = position - value, rate - derivative[:, None] * other_rate
        weight = weight + _weight(structure, fields, second, tendons)
    return _rows(structure, i, rate[..., None], position[:, None], fields, weight[:, None], 0.0)


def _connect(structure: Structure, motion: Motion, i: int, fields: Fields) -> Rows:
    bodies, anchors = _anchors(structure, i)
    position, rate, drift = _separation(motion, bodies, anchors)
    weight = fields["body_invweight0"][:, bodies, 0].sum(-1, keepdim=True).expand(-1, 3)
    return _rows(structure, i, rate, position, fields, weight, drift)


def _weld(structure: Structure, motion: Motion, i: int, fields: Fields) -> Rows:
    bodies, anchors = _anchors(structure, i)
    position, rate, drift = _separation(motion, bodies, anchors)
    turn, turn_rate, turn_drift = _turn(motion, bodies, structure.model.eq_data[i])
    weight = fields["body_invweight0"][:, bodies].sum(1).repeat_interleave(3, -1)
    join = lambda x, y: torch.cat([x, y], -1)
    return _rows(structure, i, join(rate, turn_rate), join(position, turn), fields, weight, join(drift, turn_drift))


def _rows(
    structure: Structure, i: int, rate: Tensor, position: Tensor, fields: Fields, weight: Tensor, drift: Tensor | float
) -> Rows:
    size = len(rate)
    solref, solimp = (fields[name][:, i].expand(size, -1) for name in ("eq_solref", "eq_solimp"))
    square = position.square().sum(-1)
    violation = torch.where(square > 0, square, 1 + 0 * square).sqrt() * (square > 0)
    env, diagonal = torch.arange(size), weight.expand(size, -1)
    return spring_rows(
        structure,
        "equality",
        env,
        rate,
        position.expand(size, -1),
        violation.expand(size),
        (solref, solimp, diagonal),
        drift=drift,
    )


def _anchors(structure: Structure, i: int) -> tuple[list[int], tuple[Tensor, Tensor]]:
    """The two bodies, and the two anchors in their frames."""
    model, data = structure.model, structure.model.eq_data[i]
    objects = [int(model.eq_obj1id[i]), int(model.eq_obj2id[i])]
    real = lambda x: torch.as_tensor(np.array(x))
    if model.eq_objtype[i] == int(mujoco.mjtObj.mjOBJ_SITE):
        return [int(model.site_bodyid[s]) for s in objects], (
            real(model.site_pos[objects[0]]),
            real(model.site_pos[objects[1]]),
        )
    first, second = (data[0:3], data[3:6]) if model.eq_type[i] == int(_EQ.mjEQ_CONNECT) else (data[3:6], data[0:3])
    return objects, (real(first), real(second))


def _separation(motion: Motion, bodies: list[int], anchors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """p1 - p2 [B, 3], its rates [B, K, 3] and its acceleration [B, 3] at a = 0."""
    points, rates, drifts = [], [], []
    for body, anchor in zip(bodies, anchors, strict=True):
        point = motion.poses.position[:, body] + motion.poses.rotation[:, body] @ anchor
        twist = motion.twists[:, :, body]
        points.append(point)
        rates.append(point_velocity(twist, point[:, None]))
        drifts.append(point_acceleration(motion.bias[:, body], twist[:, 0], point))
    return points[0] - points[1], rates[0] - rates[1], drifts[0] - drifts[1]


def _turn(motion: Motion, bodies: list[int], data: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """torquescale vec(q2^-1 q1 q_rel) [B, 3], its rates [B, K, 3] and its acceleration [B, 3] at a = 0."""
    first, second = bodies
    scale, relative = float(data[10]), torch.as_tensor(np.array(data[None, 6:10]))
    back = quaternion_conjugate(motion.poses.quaternion[:, second])
    ahead = quaternion_product(motion.poses.quaternion[:, first], relative)
    between = lambda w: quaternion_product(quaternion_product(back, _pure(w)), ahead)
    spins = motion.twists[..., :3]
    difference = spins[:, :, first] - spins[:, :, second]
    turning = quaternion_product(quaternion_product(back[:, None], _pure(difference)), ahead[:, None])
    w1, w2, dw = spins[:, 0, first], spins[:, 0, second], difference[:, 0]
    receding = -0.5 * quaternion_product(quaternion_product(quaternion_product(back, _pure(w2)), _pure(dw)), ahead)
    advancing = 0.5 * quaternion_product(quaternion_product(back, _pure(dw)), quaternion_product(_pure(w1), ahead))
    drift = receding + between(motion.bias[:, first, :3] - motion.bias[:, second, :3]) + advancing
    position = quaternion_product(back, ahead)[..., 1:]
    return scale * position, 0.5 * scale * turning[..., 1:], 0.5 * scale * drift[..., 1:]


def _pure(w: Tensor) -> Tensor:
    return torch.nn.functional.pad(w, (1, 0))


def _joint(structure: Structure, motion: Motion, joint: int) -> Coordinate:
    """q - q0 [B] of a scalar joint, and its rates [B, K]."""
    qpos, dof = int(structure.model.jnt_qposadr[joint]), int(structure.model.jnt_dofadr[joint])
    y = motion.state.base[:, qpos] + motion.state.d[:, dof] - float(structure.model.qpos0[qpos])
    return y.expand(len(motion.along)), motion.along[:, :, dof]


def _tendon(structure: Structure, motion: Motion, tendon: int) -> Coordinate:
    env = torch.arange(len(motion.along))
    length, rate = tendon_motion(structure, motion, env, torch.full_like(env, tendon))
    return length - float(structure.model.tendon_length0[tendon]), rate


def _weight(structure: Structure, fields: Fields, index: int, tendons: bool) -> Tensor:
    if tendons:
        return fields["tendon_invweight0"][:, index]
    return fields["dof_invweight0"][:, int(structure.model.jnt_dofadr[index])]
