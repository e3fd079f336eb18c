"""The quadrotors of `sim2real.simulators.quadrotor` as Warp models: same parameters, units and options."""

from __future__ import annotations

import math
from typing import Any, Literal

import warp as wp

from sim2real.mdp import ModelMDP
from sim2real.simulators.quadrotor import (
    FIRST_ROTOR,
    Command,
    Frame,
    hover_command,
    planar_quadrotor,
    quadrotor,
)
from sim2real.simulators.warp_integrate import first_order
from sim2real.simulators.warp_model import warp_twin


def warp_quadrotor(
    *,
    command: Command = "thrust",
    frame: Frame = "plus",
    dt: float = 0.01,
    integrator: Literal["midpoint", "rk4"] = "rk4",
    substeps: int = 1,
    discount: float = 1.0,
    target: tuple[float, float, float] = (0.0, 0.0, 0.0),
    initial_std: float = 0.05,
) -> ModelMDP:
    """Options and result as `quadrotor`, stepped and rolled out by Warp."""
    twin = quadrotor(
        command=command,
        frame=frame,
        dt=dt,
        integrator=integrator,
        substeps=substeps,
        discount=discount,
        target=target,
        initial_std=initial_std,
    )
    across, ahead = math.sin(FIRST_ROTOR[frame]), math.cos(FIRST_ROTOR[frame])
    hover = hover_command(twin.box, rotors=4)
    rotors = _rotors_by_speed if command == "speed" else _rotors_by_thrust

    def rates(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        f1, f2, f3, f4, yaw = rotors(theta, state[13:17])
        roll = theta.arm * (across * (f1 - f3) + ahead * (f2 - f4))
        pitch = theta.arm * (across * (f2 - f4) - ahead * (f1 - f3))
        body = _body_rates(theta, state, f1 + f2 + f3 + f4, (roll, pitch, yaw))
        return wp.vector(body, (action - state[13:17]) / theta.motor_lag)

    advance = first_order(rates, dt=dt, integrator=integrator, substeps=substeps)

    def step(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        return _unit_attitude(advance(theta, _unit_attitude(state), action, noise))

    def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
        cost = 0.0
        for i in range(3):
            cost = cost + (state[i] - target[i]) * (state[i] - target[i]) + state[4 + i] * state[4 + i]
        for i in range(7, 13):
            cost = cost + 0.1 * state[i] * state[i]
        for i in range(4):
            effort = action[i] / hover - 1.0
            cost = cost + 0.01 * effort * effort
        return -dt * cost

    return warp_twin(twin, step, reward)


def warp_planar_quadrotor(
    *,
    command: Command = "thrust",
    dt: float = 0.01,
    integrator: Literal["midpoint", "rk4"] = "rk4",
    substeps: int = 1,
    discount: float = 1.0,
    target: tuple[float, float] = (0.0, 0.0),
    initial_std: float = 0.05,
) -> ModelMDP:
    """Options and result as `planar_quadrotor`, stepped and rolled out by Warp."""
    twin = planar_quadrotor(
        command=command,
        dt=dt,
        integrator=integrator,
        substeps=substeps,
        discount=discount,
        target=target,
        initial_std=initial_std,
    )
    hover = hover_command(twin.box, rotors=2)
    by_speed = command == "speed"

    def rates(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        front, rear = state[6], state[7]
        if by_speed:
            front = theta.thrust_coefficient * front * front
            rear = theta.thrust_coefficient * rear * rear
        bx, bz = wp.sin(state[2]), wp.cos(state[2])
        push = front + rear - (theta.drag_z - theta.drag_x) * (bx * state[3] + bz * state[4])
        return wp.vector(
            state[3],
            state[4],
            state[5],
            (bx * push - theta.drag_x * state[3]) / theta.mass,
            (bz * push - theta.drag_x * state[4]) / theta.mass - theta.g,
            theta.arm * (rear - front) / theta.inertia,
            (action - state[6:8]) / theta.motor_lag,
        )

    advance = first_order(rates, dt=dt, integrator=integrator, substeps=substeps)

    def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
        cost = 2.0 * (1.0 - wp.cos(state[2]))
        for i in range(2):
            effort = action[i] / hover - 1.0
            cost = cost + (state[i] - target[i]) * (state[i] - target[i]) + 0.01 * effort * effort
        for i in range(3, 6):
            cost = cost + 0.1 * state[i] * state[i]
        return -dt * cost

    return warp_twin(twin, advance, reward)


def _rotors_by_thrust(theta: Any, rotors: Any) -> Any:
    """Four thrusts and the torque about the body's z axis."""
    f1, f2, f3, f4 = rotors
    return f1, f2, f3, f4, theta.torque_ratio * (f1 - f2 + f3 - f4)


def _rotors_by_speed(theta: Any, rotors: Any) -> Any:
    s1, s2, s3, s4 = wp.cw_mul(rotors, rotors)
    k = theta.thrust_coefficient
    return k * s1, k * s2, k * s3, k * s4, theta.torque_coefficient * (s1 - s2 + s3 - s4)


def _body_rates(theta: Any, state: Any, thrust: Any, torque: Any) -> Any:
    """Derivative of the first 13 states."""
    qw, qx, qy, qz = state[3:7]
    v, (wx, wy, wz) = state[7:10], state[10:13]
    b = wp.vector(2.0 * (qx * qz + qw * qy), 2.0 * (qy * qz - qw * qx), qw * qw - qx * qx - qy * qy + qz * qz)
    drag, Jx, Jy, Jz = theta.drag_xy, theta.inertia_x, theta.inertia_y, theta.inertia_z
    push = thrust - (theta.drag_z - drag) * wp.dot(b, v)
    acceleration = (push * b - drag * v) / theta.mass
    return wp.vector(
        v,
        -0.5 * (qx * wx + qy * wy + qz * wz),
        0.5 * (qw * wx + qy * wz - qz * wy),
        0.5 * (qw * wy + qz * wx - qx * wz),
        0.5 * (qw * wz + qx * wy - qy * wx),
        acceleration[0],
        acceleration[1],
        acceleration[2] - theta.g,
        (torque[0] - (Jz - Jy) * wy * wz) / Jx,
        (torque[1] - (Jx - Jz) * wz * wx) / Jy,
        (torque[2] - (Jy - Jx) * wx * wy) / Jz,
    )


def _unit_attitude(state: Any) -> Any:
    q = state[3:7]
    return wp.vector(state[0:3], q / wp.sqrt(wp.dot(q, q)), state[7:17])
