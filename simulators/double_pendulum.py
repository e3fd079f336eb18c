"""Two-link pendulum, both joints driven through gears, with viscous and smoothed Coulomb friction.

    M(q) q'' + c(q, w) + G(q) + b w + cf atan(100 w) = torque + torque_offset

    M = [[A + 2 l1 h cos q2,  B + l1 h cos q2],    c = l1 h sin q2 [-w2 (2 w1 + w2), w1^2],
         [B + l1 h cos q2,    C              ]]    G = g [mu sin q1 + h sin(q1 + q2),  h sin(q1 + q2)]

Angle 0 hangs down, angle 2 is relative to link 1. The base parameters, which alone reach the motion, follow from
masses m, link length l1, centres of mass r, inertias I about the joints, rotor inertia Ir and gear ratio gr as

    A = I1 + I2 + m2 l1^2 + (gr^2 + 1) Ir,  B = I2 - gr Ir,  C = I2 + gr^2 Ir,  h = m2 r2,  mu = m1 r1 + m2 l1.

The task is the swing-up: per second, `2 + cos q1 + cos(q1 + q2) + 0.01 |w|^2 + 0.01 |torque|^2`.
Reference: Wiebe et al., Open source dual-purpose acrobot and pendubot platform, IEEE Robotics and Automation
Magazine 31(2), 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import Integrator, check_time_step, integrate_second_order

COULOMB_SLOPE = 100.0
"""s/rad: Coulomb friction is cf * atan(COULOMB_SLOPE * w)"""

_NAMES = {
    "state": ("angle1", "angle2", "velocity1", "velocity2"),
    "action": ("torque1", "torque2"),
    "signal": ("angle1", "angle2", "velocity1", "velocity2"),
}
_UNITS = {
    "angle1": "rad",
    "angle2": "rad",
    "velocity1": "rad/s",
    "velocity2": "rad/s",
    "torque1": "N m",
    "torque2": "N m",
}

_PHYSICAL: dict[str, tuple[float, float, str, float]] = {  # name: (low, high, unit, design value of the published rig)
    "m1": (0.01, 10.0, "kg", 0.608),
    "m2": (0.01, 10.0, "kg", 0.630),
    "l1": (0.01, 2.0, "m", 0.3),
    "r1": (0.001, 2.0, "m", 0.275),
    "r2": (0.001, 2.0, "m", 0.166),
    "I1": (1e-4, 5.0, "kg m^2", 0.05472),
    "I2": (1e-4, 5.0, "kg m^2", 0.02522),
    "Ir": (0.0, 0.01, "kg m^2", 6.0719e-5),
    "gr": (1.0, 200.0, "1", 6.0),
    "g": (1.0, 30.0, "m/s^2", 9.81),
}
_FRICTION: dict[str, tuple[float, float, str, float]] = {
    "b1": (0.0, 2.0, "N m s/rad", 0.081),
    "b2": (0.0, 2.0, "N m s/rad", 0.0),
    "cf1": (0.0, 2.0, "N m", 0.093),
    "cf2": (0.0, 2.0, "N m", 0.186),
    "torque_offset1": (-1.0, 1.0, "N m", 0.0),
    "torque_offset2": (-1.0, 1.0, "N m", 0.0),
}
_BASE: dict[str, tuple[float, float, str, float]] = {  # design values: the base parameters of _PHYSICAL
    "A": (1e-3, 10.0, "kg m^2", 0.05472 + 0.02522 + 0.630 * 0.3**2 + 37.0 * 6.0719e-5),
    "B": (-1.0, 5.0, "kg m^2", 0.02522 - 6.0 * 6.0719e-5),
    "C": (1e-3, 5.0, "kg m^2", 0.02522 + 36.0 * 6.0719e-5),
    "h": (1e-3, 5.0, "kg m", 0.630 * 0.166),
    "mu": (1e-3, 10.0, "kg m", 0.608 * 0.275 + 0.630 * 0.3),
}


def base_parameters(physical: Params) -> Params:
    """Base parameters A, B, C (kg m^2), h, mu (kg m) of masses, lengths, inertias, rotor and gear, and the friction."""
    p = physical
    base = {
        "A": p["I1"] + p["I2"] + p["m2"] * p["l1"] ** 2 + (p["gr"] ** 2 + 1.0) * p["Ir"],
        "B": p["I2"] - p["gr"] * p["Ir"],
        "C": p["I2"] + p["gr"] ** 2 * p["Ir"],
        "h": p["m2"] * p["r2"],
        "mu": p["m1"] * p["r1"] + p["m2"] * p["l1"],
    }
    return base | {key: p[key] for key in _FRICTION}


def double_pendulum(
    *,
    parameters: Literal["base", "physical"] = "base",
    dt: float = 0.004,
    integrator: Integrator = "midpoint",
    substeps: int = 2,
    discount: float = 1.0,
    l1: float = 0.3,
    g: float = 9.81,
    initial_std: float = 0.05,
) -> ModelMDP:
    """State (angle1, angle2, velocity1, velocity2), action (torque1, torque2).

    theta: A, B, C, h, mu ("base", with `l1` in m and `g` in m/s^2 constants) or m1, m2, l1, r1, r2, I1, I2, Ir, gr, g
    ("physical"), and in both b1, b2, cf1, cf2, torque_offset1, torque_offset2. Starts hanging at rest with normal
    deviations of `initial_std` (rad, rad/s); no process noise. The default theta holds published design values; its
    friction is stiff (slope cf * 100 s/rad at rest): at 4 ms one midpoint step is unstable there, two are not.
    """
    check_time_step(dt, substeps, integrator)
    if parameters not in ("base", "physical"):
        raise ValueError(f"parameters must be 'base' or 'physical', got '{parameters}'")

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        if parameters == "physical":
            acceleration = _motion(base_parameters(theta), theta["l1"], theta["g"], action)
        else:
            acceleration = _motion(theta, l1, g, action)
        position, velocity = state[..., :2], state[..., 2:]
        following = integrate_second_order(
            acceleration, position, velocity, dt=dt, integrator=integrator, substeps=substeps
        )
        return torch.cat(following, -1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        q1, q2, w1, w2 = state.unbind(-1)
        effort = 0.01 * (w1**2 + w2**2 + (action**2).sum(-1))
        return -dt * (2.0 + torch.cos(q1) + torch.cos(q1 + q2) + effort)

    table = (_BASE if parameters == "base" else _PHYSICAL) | _FRICTION
    box = Box(
        low={key: row[0] for key, row in table.items()},
        high={key: row[1] for key, row in table.items()},
        unit={key: row[2] for key, row in table.items()},
        default={key: row[3] for key, row in table.items()},
    )
    return ModelMDP(
        lambda theta, e0: initial_std * e0,
        step,
        reward,
        noise_dims=(4, 0),
        dt=dt,
        discount=discount,
        names=_NAMES,
        units=_UNITS,
        box=box,
    )


def _motion(base: Params, l1: Tensor | float, g: Tensor | float, action: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """q'' as a function of q and w, with the torques held: the 2 x 2 system is solved in closed form."""
    A, B, C, b1, b2, cf1, cf2 = (base[key] for key in ("A", "B", "C", "b1", "b2", "cf1", "cf2"))
    lever, weight2, weight1 = l1 * base["h"], g * base["h"], g * base["mu"]
    torque1, torque2 = action.unbind(-1)
    drive1, drive2 = torque1 + base["torque_offset1"], torque2 + base["torque_offset2"]

    def acceleration(q: Tensor, w: Tensor) -> Tensor:
        (q1, q2), (w1, w2) = q.unbind(-1), w.unbind(-1)
        grip1, grip2 = torch.atan(COULOMB_SLOPE * w).unbind(-1)
        coupling, spin, fall = lever * torch.cos(q2), lever * torch.sin(q2), weight2 * torch.sin(q1 + q2)
        force1 = drive1 + spin * w2 * (2.0 * w1 + w2) - weight1 * torch.sin(q1) - fall - b1 * w1 - cf1 * grip1
        force2 = drive2 - spin * w1 * w1 - fall - b2 * w2 - cf2 * grip2
        m11, m12 = A + 2.0 * coupling, B + coupling
        determinant = m11 * C - m12 * m12
        return torch.stack([C * force1 - m12 * force2, m11 * force2 - m12 * force1], -1) / determinant.unsqueeze(-1)

    return acceleration


def double_pendulum_energy(theta: Params, state: Tensor, *, l1: float = 0.3, g: float = 9.81) -> Tensor:
    """Mechanical energy `w' M(q) w / 2 - g mu cos q1 - g h cos(q1 + q2)` `[B]` in J of base parameters."""
    q1, q2, w1, w2 = state.unbind(-1)
    coupling = l1 * theta["h"] * torch.cos(q2)
    kinetic = 0.5 * (theta["A"] + 2.0 * coupling) * w1**2 + (theta["B"] + coupling) * w1 * w2 + 0.5 * theta["C"] * w2**2
    return kinetic - g * theta["mu"] * torch.cos(q1) - g * theta["h"] * torch.cos(q1 + q2)
