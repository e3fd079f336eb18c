"""Torque-driven pendulum with viscous and smoothed Coulomb friction.

    inertia q'' + damping w + coulomb atan(100 w) + mgl sin q = torque + torque_offset,        w = q'

Angle 0 hangs down, pi is upright, and angles are not wrapped. The task is the swing-up: per second, the cost
`1 + cos q + 0.01 w^2 + 0.01 torque^2`, which is 0 at rest upright. Friction law: torque-limited simple pendulum,
Wiebe et al., JOSS 7(74), 2022, 3884.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import Integrator, check_time_step, integrate_second_order

COULOMB_SLOPE = 100.0
"""s/rad: Coulomb friction is coulomb * atan(COULOMB_SLOPE * w)"""

_BOX = Box(
    low={"inertia": 1e-3, "mgl": 0.0, "damping": 0.0, "coulomb": 0.0, "torque_offset": -2.0},
    high={"inertia": 10.0, "mgl": 100.0, "damping": 5.0, "coulomb": 5.0, "torque_offset": 2.0},
    unit={"inertia": "kg m^2", "mgl": "N m", "damping": "N m s/rad", "coulomb": "N m", "torque_offset": "N m"},
    default={
        "inertia": 0.6755 * 0.5**2,
        "mgl": 0.6755 * 9.81 * 0.5,
        "damping": 0.1,
        "coulomb": 0.0,
        "torque_offset": 0.0,
    },
)
_NAMES = {"state": ("angle", "velocity"), "action": ("torque",), "signal": ("angle", "velocity")}
_UNITS = {"angle": "rad", "velocity": "rad/s", "torque": "N m"}


def pendulum(
    *,
    dt: float = 0.005,
    integrator: Integrator = "midpoint",
    substeps: int = 1,
    discount: float = 1.0,
    initial_angle: float = 0.0,
    initial_std: float = 0.05,
) -> ModelMDP:
    """State (angle, velocity), action (torque,); theta: inertia, mgl, damping, coulomb, torque_offset.

    Starts at `initial_angle` (rad) at rest, with independent normal deviations of `initial_std` (rad, rad/s); no
    process noise. The default theta holds the design values of a bench pendulum of 0.5 m and 0.68 kg.
    """
    check_time_step(dt, substeps, integrator)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return e0.new_tensor([initial_angle, 0.0]) + initial_std * e0

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        inverse_inertia = 1.0 / theta["inertia"].unsqueeze(-1)
        mgl, damping, coulomb = (theta[key].unsqueeze(-1) for key in ("mgl", "damping", "coulomb"))
        drive = action + theta["torque_offset"].unsqueeze(-1)

        def acceleration(q: Tensor, w: Tensor) -> Tensor:
            friction = damping * w + coulomb * torch.atan(COULOMB_SLOPE * w)
            return (drive - mgl * torch.sin(q) - friction) * inverse_inertia

        position, velocity = state[..., :1], state[..., 1:]
        following = integrate_second_order(
            acceleration, position, velocity, dt=dt, integrator=integrator, substeps=substeps
        )
        return torch.cat(following, -1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        angle, velocity = state.unbind(-1)
        return -dt * (1.0 + torch.cos(angle) + 0.01 * velocity**2 + 0.01 * action[..., 0] ** 2)

    return ModelMDP(
        initial_state, step, reward, noise_dims=(2, 0), dt=dt, discount=discount, names=_NAMES, units=_UNITS, box=_BOX
    )


def pendulum_energy(theta: Params, state: Tensor) -> Tensor:
    """Mechanical energy `inertia w^2 / 2 - mgl cos q` `[B]` in J, 0 at the horizontal at rest."""
    angle, velocity = state.unbind(-1)
    return 0.5 * theta["inertia"] * velocity**2 - theta["mgl"] * torch.cos(angle)
