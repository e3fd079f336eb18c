"""Two-link arm in a horizontal plane that reaches for a target: the reacher of the DeepMind control suite, exactly.

    M(q) w' + c(q, w) + d w = gear a,     M = [[A + 2 B cos q2,  C + B cos q2],    c = B sin q2 [-w2 (2 w1 + w2),  w1^2]
                                               [C + B cos q2,    C           ]]

Each engine step of h = 0.02 s takes the damping implicitly and the position from the new velocity:

    (M(q) + h d I) (w' - w) = h (gear a - d w - c(q, w)),     q' = q + h w'.

A, B, C (kg m^2) are the inertias of arm, coupling and hand of the suite's geometry. Two capsules of the suite's density
1000 kg/m^3 make them; what they sum to is stated in the box. The shoulder turns freely. The wrist is limited to 160
degrees by a soft constraint of the engine, which is not modelled: a step that would end beyond the limit is exact only
up to that constraint's force, and `wrist_free` marks the rows to trust. Joints do not collide with anything.

Reward: 1 while the fingertip is within `target_radius` + 0.01 m (finger) of the target, else 0.
Reference: Tassa et al., DeepMind control suite, 2018, reacher (hard: target radius 0.015 m).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params

DT = 0.02
"""s"""
WRIST_LIMIT = math.radians(160.0)
"""rad"""
ARM, HAND = 0.12, 0.12
"""m, from joint to joint, and from wrist to fingertip"""
FINGER = 0.01
"""m, radius of the fingertip"""

_NAMES = {
    "state": ("shoulder", "wrist", "shoulder_velocity", "wrist_velocity", "target_x", "target_y"),
    "action": ("shoulder_motor", "wrist_motor"),
    "signal": (
        "shoulder",
        "wrist",
        "to_target_x",
        "to_target_y",
        "shoulder_velocity",
        "wrist_velocity",
    ),
}
_UNITS = {
    "shoulder": "rad",
    "wrist": "rad",
    "shoulder_velocity": "rad/s",
    "wrist_velocity": "rad/s",
    "target_x": "m",
    "target_y": "m",
    "to_target_x": "m",
    "to_target_y": "m",
    "shoulder_motor": "1",
    "wrist_motor": "1",
}
_BOX: dict[str, tuple[float, float, str, float]] = {  # name: (low, high, unit, value of the suite)
    "arm_inertia": (1e-5, 1e-1, "kg m^2", 0.0009758100941315256),
    "coupling": (0.0, 1e-2, "kg m^2", 0.0002739468793930299),
    "hand_inertia": (1e-6, 1e-1, "kg m^2", 0.000188673582799091),
    "damping": (0.0, 1.0, "N m s/rad", 0.01),
    "gear": (1e-4, 10.0, "N m", 0.05),
}


def reacher(*, target_radius: float = 0.015, discount: float = 1.0) -> ModelMDP:
    """State (shoulder, wrist, their velocities, target x, y), action two motors, clipped to [-1, 1] inside the step.

    theta: arm_inertia A, coupling B, hand_inertia C, damping d, gear. Start as in the suite, at rest: shoulder uniform
    in (-pi, pi), wrist within its limit, target at a radius of 0.05 to 0.20 m and any angle; e_0 has four columns, of
    which the normal distribution function makes uniform ones. Signals as the suite's observations. Deterministic.
    """
    reach = target_radius + FINGER

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        q1, q2, angle, radius = torch.special.ndtr(e0).unbind(-1)
        angle, radius = 2 * math.pi * angle, 0.05 + 0.15 * radius
        zero = torch.zeros_like(q1)
        wrist = (2 * q2 - 1) * WRIST_LIMIT
        target = (radius * torch.sin(angle), radius * torch.cos(angle))
        return torch.stack([(2 * q1 - 1) * math.pi, wrist, zero, zero, *target], -1)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        arm = reacher_step(theta, state[..., :4], action.clamp(-1.0, 1.0))
        return torch.cat([arm, state[..., 4:]], -1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return (to_target(following).norm(dim=-1) <= reach).to(following)

    def observe(theta: Params, state: Tensor) -> Tensor:
        return torch.cat([state[..., :2], to_target(state), state[..., 2:4]], -1)

    columns: dict[str, Any] = dict(
        zip(("low", "high", "unit", "default"), zip(*_BOX.values(), strict=True), strict=True)
    )
    box = Box(**{key: dict(zip(_BOX, values, strict=True)) for key, values in columns.items()})
    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(4, 0),
        dt=DT,
        discount=discount,
        observe=observe,
        names=_NAMES,
        units=_UNITS,
        box=box,
    )


def reacher_step(theta: Params, arm: Tensor, action: Tensor) -> Tensor:
    """One step of the arm alone, (q1, q2, w1, w2) `[..., 4]`, with motor commands `[..., 2]` that are not clipped."""
    q1, q2, w1, w2 = arm.unbind(-1)
    A, B, C, d = (theta[key] for key in ("arm_inertia", "coupling", "hand_inertia", "damping"))
    cosine, bend = B * torch.cos(q2), B * torch.sin(q2)
    force1 = theta["gear"] * action[..., 0] - d * w1 + bend * w2 * (2 * w1 + w2)
    force2 = theta["gear"] * action[..., 1] - d * w2 - bend * w1 * w1
    m11, m12, m22 = A + 2 * cosine + DT * d, C + cosine, C + DT * d
    scale = DT / (m11 * m22 - m12 * m12)
    v1, v2 = w1 + scale * (m22 * force1 - m12 * force2), w2 + scale * (m11 * force2 - m12 * force1)
    return torch.stack([q1 + DT * v1, q2 + DT * v2, v1, v2], -1)


def to_target(state: Tensor) -> Tensor:
    """Target minus fingertip `[..., 2]` in m."""
    q1, both = state[..., 0], state[..., 0] + state[..., 1]
    tip = torch.stack([ARM * torch.cos(q1) + HAND * torch.cos(both), ARM * torch.sin(q1) + HAND * torch.sin(both)], -1)
    return state[..., 4:6] - tip


def wrist_free(states: Tensor) -> Tensor:
    """True where a step `[..., T, n]` of states `[..., T + 1, n]` begins and ends within the wrist limit."""
    inside = states[..., 1].abs() <= WRIST_LIMIT
    return inside[..., :-1] & inside[..., 1:]
