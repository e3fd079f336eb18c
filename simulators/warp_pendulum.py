"""The pendulum of `sim2real.simulators.pendulum` as a Warp model: same parameters, units and options."""

from __future__ import annotations

from typing import Any

import warp as wp

from sim2real.mdp import ModelMDP
from sim2real.simulators.integrate import Integrator
from sim2real.simulators.pendulum import COULOMB_SLOPE, pendulum
from sim2real.simulators.warp_integrate import second_order
from sim2real.simulators.warp_model import warp_twin


def warp_pendulum(
    *,
    dt: float = 0.005,
    integrator: Integrator = "midpoint",
    substeps: int = 1,
    discount: float = 1.0,
    initial_angle: float = 0.0,
    initial_std: float = 0.05,
) -> ModelMDP:
    """Options and result as `pendulum`, stepped and rolled out by Warp."""
    twin = pendulum(
        dt=dt,
        integrator=integrator,
        substeps=substeps,
        discount=discount,
        initial_angle=initial_angle,
        initial_std=initial_std,
    )
    advance = second_order(_acceleration, dt=dt, integrator=integrator, substeps=substeps)

    def step(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        q, w = advance(theta, state[0:1], state[1:2], action)
        return wp.vector(q[0], w[0])

    def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
        effort = 0.01 * (state[1] * state[1] + action[0] * action[0])
        return -dt * (1.0 + wp.cos(state[0]) + effort)

    return warp_twin(twin, step, reward)


def _acceleration(theta: Any, q: Any, w: Any, action: Any) -> Any:
    friction = theta.damping * w[0] + theta.coulomb * wp.atan(COULOMB_SLOPE * w[0])
    torque = action[0] + theta.torque_offset - theta.mgl * wp.sin(q[0]) - friction
    return wp.vector(torque / theta.inertia)
