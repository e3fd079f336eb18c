"""Single-track cars: the kinematic bicycle, which does not slip, and the dynamic one, on linear or Pacejka tyres.

Both steer by `d = steering + steering_offset`, `steering' = steering_rate`, and a is the demanded acceleration.

    kinematic   x' = v cos(heading + b),   y' = v sin(heading + b),   heading' = v sin(b) / rear,   v' = a - drag v
                tan b = rear tan(d) / (front + rear)                   (slip angle b of the centre of mass)
    dynamic     x' = vx cos heading - vy sin heading,   y' = vx sin heading + vy cos heading,   heading' = r
                vx' = a - drag vx + vy r - Ff sin(d) / mass
                vy' = (Ff cos d + Fr) / mass - vx r,        inertia r' = front Ff cos d - rear Fr
    axles       slip of front = -atan(lateral / sqrt(rolling^2 + slow_speed^2)), both velocities in the tyre's own axes,
                (rolling, lateral) = (vx cos d + (vy + front r) sin d, (vy + front r) cos d - vx sin d);
                the rear one likewise with d = 0 and vy - rear r
    linear      F = stiffness slip
    pacejka     F = D sin(shape atan(B slip - curvature (B slip - atan(B slip)))),   D = friction load,
                B = stiffness / (shape D), so that small slips see the linear tyre; the load of the front axle is
                mass g rear / (front + rear), the rest is behind

At `rear = 0` the kinematic form is that of the rear axle. The usual slip angle divides by the rolling speed, which is
singular at rest; with `slow_speed` it is smooth everywhere, right in reverse, and at rest tyres only damp sliding. The
slip at speed v is smaller than the usual one by the share (slow_speed / v)^2 / 2. Near rest the lateral motion is
stiff: with Runge-Kutta steps, `dt / substeps` must be below about 2.8 slow_speed divided by the larger of
(stiffness_front + stiffness_rear) / mass and (front^2 stiffness_front + rear^2 stiffness_rear) / inertia.

The task is to follow the x axis at a speed: per second, the cost
`y^2 + 2 (1 - cos heading) + 0.1 (v - speed)^2 + 0.1 steering_rate^2 + 0.01 a^2`, in the dynamic model with vx for v.
Design values: the passenger sedan of Rajamani, chapter 3; shape: Bakker, Nyborg and Pacejka, SAE 870421, 1987.
Reference: R. Rajamani, Vehicle Dynamics and Control, 2nd edition, 2012, 2.2 (kinematic), 2.3 (dynamic), 3.2 (steady
cornering); J. Kong, M. Pfeiffer, G. Schildbach and F. Borrelli, Kinematic and dynamic vehicle models for autonomous
driving control design, IEEE Intelligent Vehicles Symposium, 2015, equations 1-3; H. Pacejka, Tire and Vehicle Dynamics,
3rd edition, 2012, 4.3 (magic formula); J. Bernard and C. Clover, Tire modeling for low-speed and high-speed
calculations, SAE 950311, 1995.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import check_time_step, integrate_first_order

Tyre = Literal["linear", "pacejka"]
GRAVITY = 9.81
"""m/s^2, for the loads of the axles"""

_Table = dict[str, tuple[float, float, str, float]]  # name: (low, high, unit, design value)
_SHARED: _Table = {
    "front": (0.01, 10.0, "m", 1.1),
    "rear": (0.01, 10.0, "m", 1.58),
    "steering_offset": (-0.2, 0.2, "rad", 0.0),
    "drag": (0.0, 2.0, "1/s", 0.0),
}
_DYNAMIC: _Table = {
    "mass": (0.1, 1e5, "kg", 1573.0),
    "inertia": (1e-3, 1e6, "kg m^2", 2873.0),
    "stiffness_front": (1.0, 1e7, "N/rad", 160000.0),
    "stiffness_rear": (1.0, 1e7, "N/rad", 160000.0),
}
_TYRE: dict[str, _Table] = {
    "linear": {},
    "pacejka": {
        "friction": (0.05, 2.5, "1", 0.9),
        "shape": (1.0, 2.0, "1", 1.3),
        "curvature": (-10.0, 1.0, "1", 0.0),
    },
}
_UNITS = {"x": "m", "y": "m", "heading": "rad", "steering": "rad", "steering_rate": "rad/s", "acceleration": "m/s^2"}
_KINEMATIC_STATE = ("x", "y", "heading", "speed", "steering")
_DYNAMIC_STATE = ("x", "y", "heading", "vx", "vy", "yaw_rate", "steering")


def kinematic_bicycle(
    *,
    dt: float = 0.02,
    integrator: Literal["midpoint", "rk4"] = "rk4",
    substeps: int = 1,
    discount: float = 1.0,
    speed: float = 10.0,
    initial_std: float = 0.05,
) -> ModelMDP:
    """State (x, y, heading, speed, steering), action (steering_rate, acceleration).

    theta: front, rear (from the centre of mass to the axles), steering_offset, drag. Starts at the origin along the x
    axis at `speed` (m/s) with normal deviations of `initial_std` (m, rad, m/s); no process noise.
    """
    check_time_step(dt, substeps, integrator, ("midpoint", "rk4"))

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        rates = _kinematic_rates(theta, action)
        return integrate_first_order(rates, state, dt=dt, integrator=integrator, substeps=substeps)

    return ModelMDP(
        lambda theta, e0: e0.new_tensor([0.0, 0.0, 0.0, speed, 0.0]) + initial_std * e0,
        step,
        _tracking(dt, speed),
        noise_dims=(5, 0),
        dt=dt,
        discount=discount,
        names=_names(_KINEMATIC_STATE),
        units=_UNITS | {"speed": "m/s"},
        box=_box(_SHARED),
    )


def dynamic_bicycle(
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
    """State (x, y, heading, vx, vy, yaw_rate, steering), action (steering_rate, acceleration).

    theta: front, rear, steering_offset, drag, mass, inertia, stiffness_front, stiffness_rear (of an axle) and, with
    tyre "pacejka", friction, shape, curvature. Starts as the kinematic bicycle, deviations also in rad/s. `slow_speed`
    in m/s. Raises `ValueError` for an unknown tyre, a slow_speed that is not positive, or a wrong time step.
    """
    check_time_step(dt, substeps, integrator, ("midpoint", "rk4"))
    if tyre not in _TYRE:
        raise ValueError(f"tyre must be 'linear' or 'pacejka', got '{tyre}'")
    if not slow_speed > 0.0:
        raise ValueError(f"slow_speed must be > 0 m/s, got {slow_speed}: without it slip is singular at rest")

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        rates = _dynamic_rates(theta, action, slow_speed)
        return integrate_first_order(rates, state, dt=dt, integrator=integrator, substeps=substeps)

    return ModelMDP(
        lambda theta, e0: e0.new_tensor([0.0, 0.0, 0.0, speed, 0.0, 0.0, 0.0]) + initial_std * e0,
        step,
        _tracking(dt, speed),
        noise_dims=(7, 0),
        dt=dt,
        discount=discount,
        names=_names(_DYNAMIC_STATE),
        units=_UNITS | {"vx": "m/s", "vy": "m/s", "yaw_rate": "rad/s"},
        box=_box(_SHARED | _DYNAMIC | _TYRE[tyre]),
    )


def tyre_force(theta: Params, slip: Tensor, stiffness: Tensor, load: Tensor) -> Tensor:
    """Lateral force (N) of an axle at `slip` (rad): magic formula if theta holds a friction, else `stiffness slip`."""
    if "friction" not in theta:
        return stiffness * slip
    peak, shape = theta["friction"] * load, theta["shape"]
    scaled = stiffness / (shape * peak) * slip
    bent = scaled - theta["curvature"] * (scaled - torch.atan(scaled))
    return peak * torch.sin(shape * torch.atan(bent))


def _names(state: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {"state": state, "action": ("steering_rate", "acceleration"), "signal": state}


def _box(table: _Table) -> Box:
    return Box(
        low={key: row[0] for key, row in table.items()},
        high={key: row[1] for key, row in table.items()},
        unit={key: row[2] for key, row in table.items()},
        default={key: row[3] for key, row in table.items()},
    )


def _tracking(dt: float, speed: float) -> Callable[[Params, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The reward of both models: their first four states are the position, the heading and the speed ahead."""

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        _, y, heading, v = state[..., :4].unbind(-1)
        off = y**2 + 2.0 * (1.0 - torch.cos(heading)) + 0.1 * (v - speed) ** 2
        return -dt * (off + 0.1 * action[..., 0] ** 2 + 0.01 * action[..., 1] ** 2)

    return reward


def _kinematic_rates(theta: Params, action: Tensor) -> Callable[[Tensor], Tensor]:
    front, rear, offset, drag = (theta[key] for key in _SHARED)
    steering_rate, acceleration = action.unbind(-1)
    # of the wheelbase, so that rear = 0 stays regular
    share, wheelbase = rear / (front + rear), front + rear

    def rates(state: Tensor) -> Tensor:
        _, _, heading, v, steering = state.unbind(-1)
        slope = torch.tan(steering + offset)
        cos_slip = 1.0 / torch.sqrt(1.0 + (share * slope) ** 2)
        course = heading + torch.atan(share * slope)
        turning = v * slope * cos_slip / wheelbase  # v sin(slip) / rear
        return torch.stack(
            [v * torch.cos(course), v * torch.sin(course), turning, acceleration - drag * v, steering_rate], -1
        )

    return rates


def _dynamic_rates(theta: Params, action: Tensor, slow_speed: float) -> Callable[[Tensor], Tensor]:
    front, rear, offset, drag = (theta[key] for key in _SHARED)
    mass, inertia, stiffness_front, stiffness_rear = (theta[key] for key in _DYNAMIC)
    steering_rate, acceleration = action.unbind(-1)
    load_front = mass * GRAVITY * rear / (front + rear)
    load_rear = mass * GRAVITY - load_front
    slip = lambda lateral, rolling: -torch.atan(lateral / torch.sqrt(rolling * rolling + slow_speed**2))

    def rates(state: Tensor) -> Tensor:
        _, _, heading, vx, vy, r, steering = state.unbind(-1)
        cos, sin = torch.cos(steering + offset), torch.sin(steering + offset)
        sideways = vy + front * r
        slip_front = slip(sideways * cos - vx * sin, vx * cos + sideways * sin)
        force_front = tyre_force(theta, slip_front, stiffness_front, load_front)
        force_rear = tyre_force(theta, slip(vy - rear * r, vx), stiffness_rear, load_rear)
        along, aside = torch.cos(heading), torch.sin(heading)
        return torch.stack(
            [
                vx * along - vy * aside,
                vx * aside + vy * along,
                r,
                acceleration - drag * vx + vy * r - force_front * sin / mass,
                (force_front * cos + force_rear) / mass - vx * r,
                (front * force_front * cos - rear * force_rear) / inertia,
                steering_rate,
            ],
            -1,
        )

    return rates
