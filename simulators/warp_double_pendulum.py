"""The double pendulum of `sim2real.simulators.double_pendulum` as a Warp model: same parameters, units and options."""

from __future__ import annotations

from typing import Any, Literal

import warp as wp

from sim2real.mdp import ModelMDP
from sim2real.simulators.double_pendulum import COULOMB_SLOPE, double_pendulum
from sim2real.simulators.integrate import Integrator
from sim2real.simulators.warp_integrate import second_order
from sim2real.simulators.warp_model import warp_twin


def warp_double_pendulum(
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
    """Options and result as `double_pendulum`, stepped and rolled out by Warp."""
    twin = double_pendulum(
        parameters=parameters,
        dt=dt,
        integrator=integrator,
        substeps=substeps,
        discount=discount,
        l1=l1,
        g=g,
        initial_std=initial_std,
    )

    def of_base(theta: Any, q: Any, w: Any, action: Any) -> Any:
        return _acceleration(theta, (theta.A, theta.B, theta.C, theta.h, theta.mu), (l1, g), q, w, action)

    acceleration = of_base if parameters == "base" else _of_masses
    advance = second_order(acceleration, dt=dt, integrator=integrator, substeps=substeps)

    def step(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        q, w = advance(theta, state[0:2], state[2:4], action)
        return wp.vector(q[0], q[1], w[0], w[1])

    def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
        speed = state[2] * state[2] + state[3] * state[3]
        effort = 0.01 * (speed + action[0] * action[0] + action[1] * action[1])
        return -dt * (2.0 + wp.cos(state[0]) + wp.cos(state[0] + state[1]) + effort)

    return warp_twin(twin, step, reward)


def _of_masses(theta: Any, q: Any, w: Any, action: Any) -> Any:
    base = (
        theta.I1 + theta.I2 + theta.m2 * theta.l1 * theta.l1 + (theta.gr * theta.gr + 1.0) * theta.Ir,
        theta.I2 - theta.gr * theta.Ir,
        theta.I2 + theta.gr * theta.gr * theta.Ir,
        theta.m2 * theta.r2,
        theta.m1 * theta.r1 + theta.m2 * theta.l1,
    )
    return _acceleration(theta, base, (theta.l1, theta.g), q, w, action)


def _acceleration(theta: Any, base: Any, constants: Any, q: Any, w: Any, action: Any) -> Any:
    A, B, C, h, mu = base
    l1, g = constants
    coupling = l1 * h * wp.cos(q[1])
    spin = l1 * h * wp.sin(q[1])
    fall = g * h * wp.sin(q[0] + q[1])
    friction1 = theta.b1 * w[0] + theta.cf1 * wp.atan(COULOMB_SLOPE * w[0])
    friction2 = theta.b2 * w[1] + theta.cf2 * wp.atan(COULOMB_SLOPE * w[1])
    swirl = spin * w[1] * (2.0 * w[0] + w[1])
    force1 = action[0] + theta.torque_offset1 + swirl - g * mu * wp.sin(q[0]) - fall - friction1
    force2 = action[1] + theta.torque_offset2 - spin * w[0] * w[0] - fall - friction2
    m11 = A + 2.0 * coupling
    m12 = B + coupling
    determinant = m11 * C - m12 * m12
    return wp.vector((C * force1 - m12 * force2) / determinant, (m11 * force2 - m12 * force1) / determinant)
