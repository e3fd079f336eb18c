"""The cart-pole of `sim2real.simulators.cartpole` as a Warp model: same parameters, units and options."""

from __future__ import annotations

import math
from typing import Any

import warp as wp

from sim2real.mdp import ModelMDP
from sim2real.simulators.cartpole import cartpole
from sim2real.simulators.integrate import Integrator
from sim2real.simulators.warp_integrate import second_order
from sim2real.simulators.warp_model import warp_twin


def warp_cartpole(
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
    """Options and result as `cartpole`, stepped and rolled out by Warp."""
    twin = cartpole(
        dt=dt,
        integrator=integrator,
        substeps=substeps,
        discount=discount,
        initial_angle=initial_angle,
        initial_std=initial_std,
        position_limit=position_limit,
        angle_limit=angle_limit,
        alive_reward=alive_reward,
    )
    advance = second_order(_acceleration, dt=dt, integrator=integrator, substeps=substeps)

    def step(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        q, w = advance(theta, state[0:2], state[2:4], action)
        return wp.vector(q[0], q[1], w[0], w[1])

    def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
        speed = state[2] * state[2] + state[3] * state[3]
        upright = 10.0 * (1.0 - wp.cos(state[1]))
        cost = state[0] * state[0] + upright + 0.1 * speed + 0.001 * action[0] * action[0]
        return dt * (alive_reward - cost)

    return warp_twin(twin, step, reward)


def _acceleration(theta: Any, q: Any, w: Any, action: Any) -> Any:
    lever = 0.5 * theta.pole_mass * theta.length
    total = theta.cart_mass + theta.pole_mass
    inertia = lever * theta.length / 1.5
    sine, coupling = wp.sin(q[1]), lever * wp.cos(q[1])
    push = action[0] + lever * sine * w[1] * w[1] - theta.cart_friction * w[0]
    torque = lever * theta.g * sine - theta.pole_friction * w[1]
    determinant = total * inertia - coupling * coupling
    return wp.vector(
        (inertia * push - coupling * torque) / determinant, (total * torque - coupling * push) / determinant
    )
