"""The bicycles of `sim2real.simulators.bicycle` as Warp models: same parameters, units and options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import warp as wp

from sim2real.mdp import ModelMDP
from sim2real.simulators.bicycle import GRAVITY, Tyre, dynamic_bicycle, kinematic_bicycle
from sim2real.simulators.warp_integrate import first_order
from sim2real.simulators.warp_model import warp_twin


def warp_kinematic_bicycle(
    *,
    dt: float = 0.02,
    integrator: Literal["midpoint", "rk4"] = "rk4",
    substeps: int = 1,
    discount: float = 1.0,
    speed: float = 10.0,
    initial_std: float = 0.05,
) -> ModelMDP:
    """Options and result as `kinematic_bicycle`, stepped and rolled out by Warp."""
    twin = kinematic_bicycle(
        dt=dt, integrator=integrator, substeps=substeps, discount=discount, speed=speed, initial_std=initial_std
    )
    advance = first_order(_kinematic_rates, dt=dt, integrator=integrator, substeps=substeps)
    return warp_twin(twin, advance, _tracking(dt, speed))


def warp_dynamic_bicycle(
    *,
    tyre: Tyre = "pacejka",
    dt: float = 0.01,
    integrator: Literal["midpoint", "rk4"] = "rk4",
    substeps: int = 1,
    discount: float = 1.0,
    speed: float = 10.0,
    slow_speed: float = 1.0,
    initial_std: float = 0.05,
) -> ModelMDP:
    """Options and result as `dynamic_bicycle`, stepped and rolled out by Warp."""
    twin = dynamic_bicycle(
        tyre=tyre,
        dt=dt,
        integrator=integrator,
        substeps=substeps,
        discount=discount,
        speed=speed,
        slow_speed=slow_speed,
        initial_std=initial_std,
    )
    force = _pacejka if tyre == "pacejka" else _linear

    def rates(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        heading, vx, vy, r = state[2], state[3], state[4], state[5]
        cos = wp.cos(state[6] + theta.steering_offset)
        sin = wp.sin(state[6] + theta.steering_offset)
        sideways = vy + theta.front * r
        slip_front = _slip(sideways * cos - vx * sin, vx * cos + sideways * sin, slow_speed)
        load = theta.mass * GRAVITY
        load_front = load * theta.rear / (theta.front + theta.rear)
        front = force(theta, slip_front, theta.stiffness_front, load_front)
        rear = force(theta, _slip(vy - theta.rear * r, vx, slow_speed), theta.stiffness_rear, load - load_front)
        return wp.vector(
            vx * wp.cos(heading) - vy * wp.sin(heading),
            vx * wp.sin(heading) + vy * wp.cos(heading),
            r,
            action[1] - theta.drag * vx + vy * r - front * sin / theta.mass,
            (front * cos + rear) / theta.mass - vx * r,
            (theta.front * front * cos - theta.rear * rear) / theta.inertia,
            action[0],
        )

    advance = first_order(rates, dt=dt, integrator=integrator, substeps=substeps)
    return warp_twin(twin, advance, _tracking(dt, speed))


def _tracking(dt: float, speed: float) -> Callable[..., Any]:
    def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
        fast = state[3] - speed
        off = state[1] * state[1] + 2.0 * (1.0 - wp.cos(state[2])) + 0.1 * fast * fast
        return -dt * (off + 0.1 * action[0] * action[0] + 0.01 * action[1] * action[1])

    return reward


def _kinematic_rates(theta: Any, state: Any, action: Any, noise: Any) -> Any:
    wheelbase = theta.front + theta.rear
    slope = wp.tan(state[4] + theta.steering_offset)
    ratio = theta.rear / wheelbase * slope
    course = state[2] + wp.atan(ratio)
    v = state[3]
    turning = v * slope / (wp.sqrt(1.0 + ratio * ratio) * wheelbase)
    return wp.vector(v * wp.cos(course), v * wp.sin(course), turning, action[1] - theta.drag * v, action[0])


def _slip(lateral: Any, rolling: Any, slow_speed: Any) -> Any:
    return -wp.atan(lateral / wp.sqrt(rolling * rolling + slow_speed * slow_speed))


def _linear(theta: Any, slip: Any, stiffness: Any, load: Any) -> Any:
    return stiffness * slip


def _pacejka(theta: Any, slip: Any, stiffness: Any, load: Any) -> Any:
    peak = theta.friction * load
    scaled = stiffness / (theta.shape * peak) * slip
    bent = scaled - theta.curvature * (scaled - wp.atan(scaled))
    return peak * wp.sin(theta.shape * wp.atan(bent))
