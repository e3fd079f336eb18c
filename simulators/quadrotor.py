"""Quadrotors in space and in a vertical plane, with rotor drag and lagging motors.

    p' = v,    m v' = -m g e3 + f b - drag_xy v - (drag_z - drag_xy) b (b . v),    b = R(q) e3,    f = sum_i f_i
    q' = q (0, w) / 2,      J w' = torque - w x J w,      J = diag(inertia_x, inertia_y, inertia_z)
    torque = (arm sum_i sin(a_i) f_i,  -arm sum_i cos(a_i) f_i,  Q1 - Q2 + Q3 - Q4)

World axes with z up; q = (qw, qx, qy, qz) turns body into world axes, w is in body axes. Rotor i pushes along the z
axis of the body at the angle a_i = (i - 1) 90 deg ("plus") or (i - 1/2) 90 deg ("cross") from its x axis; rotors 1 and
3 turn clockwise seen from above, so that their drag torque Q turns the body the other way. The drag is linear in the
velocity, drag_xy across and drag_z along the rotor axes. What a motor is told, u_i, it follows with a lag:

    thrust    f_i' = (u_i - f_i) / motor_lag,        Q_i = torque_ratio f_i
    speed     W_i' = (u_i - W_i) / motor_lag,        f_i = thrust_coefficient W_i^2,    Q_i = torque_coefficient W_i^2

Thrusts and speeds are not limited. The step normalises q before and after integrating: it depends on the attitude
alone, and derivatives are those of the normalised map. The planar quadrotor is the same body in the x-z plane, pitching
about +y, with a front and a rear rotor. Steps are stable for `dt / substeps` below about 2 `motor_lag`.

The task is hover at a target: per second, the cost of position, attitude, velocity and command errors

    |p - target|^2 + qx^2 + qy^2 + qz^2 + 0.1 |v|^2 + 0.1 |w|^2 + 0.01 sum_i (u_i / u_hover - 1)^2,

u_hover that of the design values; in the plane `2 (1 - cos pitch)` stands for the attitude.
Design values: AscTec Hummingbird in S. Folk, J. Paulos and V. Kumar, RotorPy, 2023, its drag at hover; a lag of 30 ms.
Reference: R. Mahony, V. Kumar and P. Corke, Multirotor aerial vehicles, IEEE Robotics and Automation Magazine 19(3),
2012, equations 1-8; drag: M. Faessler, A. Franchi and D. Scaramuzza, Differential flatness of quadrotor dynamics
subject to rotor drag, IEEE Robotics and Automation Letters 3(2), 2018, equations 1-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import check_time_step, integrate_first_order

Command = Literal["thrust", "speed"]
Frame = Literal["plus", "cross"]
FIRST_ROTOR: dict[str, float] = {"plus": 0.0, "cross": math.pi / 4}
"""rad, angle a_1 of the first rotor; the others follow counter-clockwise, 90 degrees apart"""

_Table = dict[str, tuple[float, float, str, float]]  # name: (low, high, unit, design value)
_BODY: _Table = {
    "mass": (0.005, 50.0, "kg", 0.5),
    "inertia_x": (1e-6, 5.0, "kg m^2", 3.65e-3),
    "inertia_y": (1e-6, 5.0, "kg m^2", 3.68e-3),
    "inertia_z": (1e-6, 10.0, "kg m^2", 7.03e-3),
    "arm": (0.01, 2.0, "m", 0.17),
    "drag_xy": (0.0, 10.0, "N s/m", 0.22),
    "drag_z": (0.0, 10.0, "N s/m", 0.44),
    "motor_lag": (2e-3, 1.0, "s", 0.03),
    "g": (1.0, 30.0, "m/s^2", 9.81),
}
_PLANAR_BODY: _Table = {
    "mass": _BODY["mass"],
    "inertia": _BODY["inertia_y"],
    "arm": _BODY["arm"],
    "drag_x": _BODY["drag_xy"],
    "drag_z": _BODY["drag_z"],
    "motor_lag": _BODY["motor_lag"],
    "g": _BODY["g"],
}
_THRUST: _Table = {"thrust_coefficient": (1e-10, 1e-2, "N s^2/rad^2", 5.57e-6)}
_ROTORS: dict[str, _Table] = {
    "thrust": {"torque_ratio": (0.0, 0.5, "m", 1.36e-7 / 5.57e-6)},
    "speed": _THRUST | {"torque_coefficient": (0.0, 1e-3, "N m s^2/rad^2", 1.36e-7)},
}
_PLANAR_ROTORS: dict[str, _Table] = {"thrust": {}, "speed": _THRUST}
_ROTOR_UNIT = {"thrust": "N", "speed": "rad/s"}
_UNITS = {"x": "m", "y": "m", "z": "m", "vx": "m/s", "vy": "m/s", "vz": "m/s"}
_UNITS |= {"qw": "1", "qx": "1", "qy": "1", "qz": "1", "wx": "rad/s", "wy": "rad/s", "wz": "rad/s"}
_PLANAR_UNITS = {"x": "m", "z": "m", "pitch": "rad", "vx": "m/s", "vz": "m/s", "pitch_rate": "rad/s"}


def quadrotor(
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
    """State (x, y, z, qw, qx, qy, qz, vx, vy, vz, wx, wy, wz, rotor1 .. rotor4), action (command1 .. command4).

    theta: mass, inertia_x, inertia_y, inertia_z, arm, drag_xy, drag_z, motor_lag, g and torque_ratio ("thrust": rotors
    and commands in N) or thrust_coefficient and torque_coefficient ("speed": in rad/s). `target` in m. Starts level
    around the origin with rotors at hover, with normal deviations of `initial_std` (m, rad, m/s, rad/s; rotors:
    relative to hover); no process noise. Raises `ValueError` for an unknown command or frame, or a wrong time step.
    """
    _check(command, dt, integrator, substeps)
    if frame not in FIRST_ROTOR:
        raise ValueError(f"frame must be 'plus' or 'cross', got '{frame}'")
    box = _box(_BODY | _ROTORS[command])
    hover = hover_command(box, rotors=4)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        mean = e0.new_tensor([0.0] * 3 + [1.0] + [0.0] * 9 + [hover] * 4)
        # a small quaternion (1, a/2) turns by the angle a
        spread = e0.new_tensor([1.0] * 3 + [0.5] * 4 + [1.0] * 6 + [hover] * 4)
        return unit_attitude(mean + initial_std * spread * e0)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        rates = _spatial_rates(theta, action, FIRST_ROTOR[frame])
        following = integrate_first_order(rates, unit_attitude(state), dt=dt, integrator=integrator, substeps=substeps)
        return unit_attitude(following)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        away = (state[..., :3] - state.new_tensor(target)).square().sum(-1)
        moving = 0.1 * state[..., 7:13].square().sum(-1)
        effort = 0.01 * (action / hover - 1.0).square().sum(-1)
        return -dt * (away + state[..., 4:7].square().sum(-1) + moving + effort)

    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(17, 0),
        dt=dt,
        discount=discount,
        names=_names(tuple(_UNITS), 4),
        units=_UNITS | _rotor_units(command, 4),
        box=box,
    )


def planar_quadrotor(
    *,
    command: Command = "thrust",
    dt: float = 0.01,
    integrator: Literal["midpoint", "rk4"] = "rk4",
    substeps: int = 1,
    discount: float = 1.0,
    target: tuple[float, float] = (0.0, 0.0),
    initial_std: float = 0.05,
) -> ModelMDP:
    """State (x, z, pitch, vx, vz, pitch_rate, rotor1, rotor2), action (command1, command2), front rotor first.

    theta: mass, inertia, arm, drag_x, drag_z, motor_lag, g and, with command "speed", thrust_coefficient. Otherwise as
    `quadrotor`.
    """
    _check(command, dt, integrator, substeps)
    box = _box(_PLANAR_BODY | _PLANAR_ROTORS[command])
    hover = hover_command(box, rotors=2)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        mean = e0.new_tensor([0.0] * 6 + [hover] * 2)
        return mean + initial_std * e0.new_tensor([1.0] * 6 + [hover] * 2) * e0

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        rates = _planar_rates(theta, action)
        return integrate_first_order(rates, state, dt=dt, integrator=integrator, substeps=substeps)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        away = (state[..., :2] - state.new_tensor(target)).square().sum(-1)
        moving = 0.1 * state[..., 3:6].square().sum(-1)
        effort = 0.01 * (action / hover - 1.0).square().sum(-1)
        return -dt * (away + 2.0 * (1.0 - torch.cos(state[..., 2])) + moving + effort)

    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(8, 0),
        dt=dt,
        discount=discount,
        names=_names(tuple(_PLANAR_UNITS), 2),
        units=_PLANAR_UNITS | _rotor_units(command, 2),
        box=box,
    )


def hover_command(box: Box, *, rotors: int) -> float:
    """What each of the rotors is told (N or rad/s) to carry the weight of the design values."""
    thrust = float(box.default["mass"]) * float(box.default["g"]) / rotors
    coefficient = box.default.get("thrust_coefficient")
    return thrust if coefficient is None else math.sqrt(thrust / float(coefficient))


def unit_attitude(state: Tensor) -> Tensor:
    """The state `[..., 17]` of `quadrotor` with its quaternion normalised."""
    attitude = state[..., 3:7]
    unit = attitude / attitude.square().sum(-1, keepdim=True).sqrt()
    return torch.cat([state[..., :3], unit, state[..., 7:]], -1)


def quadrotor_energy(theta: Params, state: Tensor) -> Tensor:
    """Mechanical energy `m |v|^2 / 2 + w' J w / 2 + m g z` `[B]` in J of a `quadrotor` state, rotors not counted."""
    wx, wy, wz = state[..., 10:13].square().unbind(-1)
    turning = theta["inertia_x"] * wx + theta["inertia_y"] * wy + theta["inertia_z"] * wz
    moving = theta["mass"] * state[..., 7:10].square().sum(-1)
    return 0.5 * (moving + turning) + theta["mass"] * theta["g"] * state[..., 2]


def _check(command: str, dt: float, integrator: str, substeps: int) -> None:
    check_time_step(dt, substeps, integrator, ("midpoint", "rk4"))
    if command not in _ROTOR_UNIT:
        raise ValueError(f"command must be 'thrust' or 'speed', got '{command}'")


def _box(table: _Table) -> Box:
    return Box(
        low={key: row[0] for key, row in table.items()},
        high={key: row[1] for key, row in table.items()},
        unit={key: row[2] for key, row in table.items()},
        default={key: row[3] for key, row in table.items()},
    )


def _names(body: tuple[str, ...], rotors: int) -> dict[str, tuple[str, ...]]:
    state = (*body, *(f"rotor{i + 1}" for i in range(rotors)))
    return {"state": state, "action": tuple(f"command{i + 1}" for i in range(rotors)), "signal": state}


def _rotor_units(command: Command, rotors: int) -> dict[str, str]:
    return {f"{name}{i + 1}": _ROTOR_UNIT[command] for name in ("rotor", "command") for i in range(rotors)}


def _thrusts(theta: Params, rotors: Tensor) -> tuple[Tensor, ...]:
    coefficient = theta.get("thrust_coefficient")
    return rotors.unbind(-1) if coefficient is None else (coefficient.unsqueeze(-1) * rotors.square()).unbind(-1)


def _spatial_rates(theta: Params, action: Tensor, first_rotor: float) -> Callable[[Tensor], Tensor]:
    """state -> its derivative, with the commands held."""
    mass, arm, g, drag = (theta[key] for key in ("mass", "arm", "g", "drag_xy"))
    Jx, Jy, Jz = (theta[f"inertia_{axis}"] for axis in "xyz")
    if "torque_ratio" in theta:
        ratio = theta["torque_ratio"]
    else:
        ratio = theta["torque_coefficient"] / theta["thrust_coefficient"]
    along, lag = theta["drag_z"] - drag, theta["motor_lag"].unsqueeze(-1)
    across, ahead = math.sin(first_rotor), math.cos(first_rotor)

    def rates(state: Tensor) -> Tensor:
        qw, qx, qy, qz, vx, vy, vz, wx, wy, wz = state[..., 3:13].unbind(-1)
        f1, f2, f3, f4 = _thrusts(theta, state[..., 13:])
        bx, by, bz = 2.0 * (qx * qz + qw * qy), 2.0 * (qy * qz - qw * qx), qw * qw - qx * qx - qy * qy + qz * qz
        push = f1 + f2 + f3 + f4 - along * (bx * vx + by * vy + bz * vz)
        roll = arm * (across * (f1 - f3) + ahead * (f2 - f4))
        pitch = arm * (across * (f2 - f4) - ahead * (f1 - f3))
        yaw = ratio * (f1 - f2 + f3 - f4)
        body = [
            vx,
            vy,
            vz,
            -0.5 * (qx * wx + qy * wy + qz * wz),
            0.5 * (qw * wx + qy * wz - qz * wy),
            0.5 * (qw * wy + qz * wx - qx * wz),
            0.5 * (qw * wz + qx * wy - qy * wx),
            (bx * push - drag * vx) / mass,
            (by * push - drag * vy) / mass,
            (bz * push - drag * vz) / mass - g,
            (roll - (Jz - Jy) * wy * wz) / Jx,
            (pitch - (Jx - Jz) * wz * wx) / Jy,
            (yaw - (Jy - Jx) * wx * wy) / Jz,
        ]
        return torch.cat([torch.stack(body, -1), (action - state[..., 13:]) / lag], -1)

    return rates


def _planar_rates(theta: Params, action: Tensor) -> Callable[[Tensor], Tensor]:
    """state -> its derivative, with the commands held."""
    mass, inertia, arm, g, drag = (theta[key] for key in ("mass", "inertia", "arm", "g", "drag_x"))
    along, lag = theta["drag_z"] - drag, theta["motor_lag"].unsqueeze(-1)

    def rates(state: Tensor) -> Tensor:
        pitch, vx, vz, pitch_rate = state[..., 2:6].unbind(-1)
        front, rear = _thrusts(theta, state[..., 6:])
        bx, bz = torch.sin(pitch), torch.cos(pitch)
        push = front + rear - along * (bx * vx + bz * vz)
        body = [
            vx,
            vz,
            pitch_rate,
            (bx * push - drag * vx) / mass,
            (bz * push - drag * vz) / mass - g,
            arm * (rear - front) / inertia,
        ]
        return torch.cat([torch.stack(body, -1), (action - state[..., 6:]) / lag], -1)

    return rates
