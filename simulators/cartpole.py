"""Pole on a cart, pushed by a horizontal force, with viscous friction at the cart and at the hinge.

    (M + m) x'' + m l cos(phi) phi'' = force + m l sin(phi) w^2 - cart_friction v
    m l cos(phi) x'' + (4/3) m l^2 phi'' = m g l sin(phi) - pole_friction w,          l = length / 2, v = x', w = phi'

M cart mass, m mass of a uniform pole of the given length. Angle 0 is upright, pi hangs. The task is balance: per
second, the cost `x^2 + 10 (1 - cos phi) + 0.1 (v^2 + w^2) + 0.001 force^2`. Limits on |x| or |phi| end an episode;
`alive_reward` (per second) then makes living worth it.
Reference: Florian, Correct equations for the dynamics of the cart-pole system, 2007, with friction that does not depend
on the contact force.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import Integrator, check_time_step, integrate_second_order

_PARAMETERS: dict[str, tuple[float, float, str, float]] = {  # name: (low, high, unit, design value)
    "cart_mass": (0.01, 100.0, "kg", 1.0),
    "pole_mass": (0.001, 50.0, "kg", 0.1),
    "length": (0.01, 10.0, "m", 1.0),
    "cart_friction": (0.0, 50.0, "N s/m", 0.1),
    "pole_friction": (0.0, 5.0, "N m s/rad", 0.002),
    "g": (1.0, 30.0, "m/s^2", 9.81),
}
_STATE = ("position", "angle", "velocity", "angular_velocity")
_UNITS = {"position": "m", "angle": "rad", "velocity": "m/s", "angular_velocity": "rad/s", "force": "N"}


def cartpole(
    *,
    dt: float = 0.02,
    integrator: Integrator = "midpoint",
    substeps: int = 1,
    discount: float = 1.0,
    initial_angle: float = 0.0,
    initial_std: float = 0.05,
    position_limit: float = math.inf,
    angle_limit: float = math.inf,
    alive_reward: float = 0.0,
) -> ModelMDP:
    """State (position, angle, velocity, angular_velocity), action (force,).

    theta: cart_mass, pole_mass, length, cart_friction, pole_friction, g. Starts at rest at `initial_angle` (rad) with
    normal deviations of `initial_std` (SI units); no process noise. `position_limit` (m) and `angle_limit` (rad) end
    an episode; without them it has no terminal state.
    """
    check_time_step(dt, substeps, integrator)
    if not (position_limit > 0.0 and angle_limit > 0.0):
        raise ValueError(f"limits must be > 0, got position_limit={position_limit} m, angle_limit={angle_limit} rad")

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return e0.new_tensor([0.0, initial_angle, 0.0, 0.0]) + initial_std * e0

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        following = integrate_second_order(
            _motion(theta, action[..., 0]),
            state[..., :2],
            state[..., 2:],
            dt=dt,
            integrator=integrator,
            substeps=substeps,
        )
        return torch.cat(following, -1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        x, angle, v, w = state.unbind(-1)
        cost = x**2 + 10.0 * (1.0 - torch.cos(angle)) + 0.1 * (v**2 + w**2) + 0.001 * action[..., 0] ** 2
        return dt * (alive_reward - cost)

    def terminal(theta: Params, state: Tensor) -> Tensor:
        return (state[..., 0].abs() > position_limit) | (state[..., 1].abs() > angle_limit)

    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(4, 0),
        dt=dt,
        discount=discount,
        terminal=None if math.isinf(position_limit) and math.isinf(angle_limit) else terminal,
        names={"state": _STATE, "action": ("force",), "signal": _STATE},
        units=_UNITS,
        box=Box(
            low={key: row[0] for key, row in _PARAMETERS.items()},
            high={key: row[1] for key, row in _PARAMETERS.items()},
            unit={key: row[2] for key, row in _PARAMETERS.items()},
            default={key: row[3] for key, row in _PARAMETERS.items()},
        ),
    )


def _motion(theta: Params, force: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(x'', phi'') as a function of (x, phi) and (v, w), with the force held."""
    cart_friction, pole_friction = theta["cart_friction"], theta["pole_friction"]
    lever, total = 0.5 * theta["pole_mass"] * theta["length"], theta["cart_mass"] + theta["pole_mass"]
    inertia, weight = lever * theta["length"] / 1.5, lever * theta["g"]

    def acceleration(q: Tensor, w: Tensor) -> Tensor:
        v, spin = w.unbind(-1)
        sine, coupling = torch.sin(q[..., 1]), lever * torch.cos(q[..., 1])
        push = force + lever * sine * spin * spin - cart_friction * v
        torque = weight * sine - pole_friction * spin
        determinant = total * inertia - coupling * coupling
        solution = [inertia * push - coupling * torque, total * torque - coupling * push]
        return torch.stack(solution, -1) / determinant.unsqueeze(-1)

    return acceleration


def cartpole_energy(theta: Params, state: Tensor) -> Tensor:
    """Mechanical energy `[B]` in J, 0 for the pole at rest in the horizontal."""
    _, angle, v, w = state.unbind(-1)
    lever = 0.5 * theta["pole_mass"] * theta["length"]
    kinetic = 0.5 * (theta["cart_mass"] + theta["pole_mass"]) * v**2 + lever * torch.cos(angle) * v * w
    return kinetic + lever * theta["length"] / 3.0 * w**2 + lever * theta["g"] * torch.cos(angle)
