"""A design task: the leader builds an arm that must stand upright, a follower learns to hold it there.

    (m l^2 + gear^2 J) phi'' = m g l sin(phi) - spring phi - damping phi' + gear torque,

phi = 0 upright, `torque` (N m) that of the motor, whose rotor inertia J the gear multiplies; steps are semi-implicit,
`w' = w + dt phi'' + noise_std e`, `phi' = phi + dt w'`, the noise a shaking base. The leader chooses the balancing
spring, the damper and the gear. Costs per second:

    follower  20 phi^2 + 0.5 w^2 + 0.2 torque^2,
    leader    2 phi^2 + 0.5 w^2 + torque^2 + price,      price = 0.005 spring^2 + 0.02 damping^2 + 0.005 gear^2.

The follower cares for accuracy, the leader for the heat of the motor and for what the parts cost. At fixed behaviour
less gear spares the leader money and disturbance; but the follower answers a weak gear with more torque.
`linear=True` puts phi for sin(phi): the soft optimum is then `soft_lqr`, with `spring_arm_matrices`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.leader_task import LeaderTask
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import check_time_step

MASS, LENGTH, GRAVITY, ROTOR = 1.0, 0.5, 9.81, 0.004  # kg, m, m/s^2, kg m^2
START = (0.7, 1.0)  # standard deviations of the first state, rad and rad/s
FOLLOWER_COST = (20.0, 0.5, 0.2)  # per second, of phi^2, w^2 and torque^2
LEADER_COST = (2.0, 0.5, 1.0)
PRICE = {"spring": 0.005, "damping": 0.02, "gear": 0.005}
_BOX = Box(
    low={"spring": 0.0, "damping": 0.01, "gear": 1.0},
    high={"spring": 20.0, "damping": 5.0, "gear": 15.0},
    unit={"spring": "N m/rad", "damping": "N m s/rad", "gear": "1"},
    default={"spring": 8.0, "damping": 2.0, "gear": 3.0},
)


def spring_arm(*, dt: float = 0.1, discount: float = 0.9, noise_std: float = 0.1, linear: bool = False) -> LeaderTask:
    """State (angle, angular_velocity), action (torque,); theta: spring, damping, gear. One discount for both.

    Starts are normal around rest, `START`. Raises `ValueError` for a time step or a noise that is not positive.
    """
    check_time_step(dt, 1, "semi_implicit")
    if not 0.0 < noise_std < float("inf"):
        raise ValueError(f"noise_std must be positive and finite (rad/s per step), got {noise_std}")

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return e0 * e0.new_tensor(START)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        angle, w = state.unbind(-1)
        weight = MASS * GRAVITY * LENGTH * (angle if linear else torch.sin(angle))
        inertia = MASS * LENGTH**2 + ROTOR * theta["gear"] ** 2
        torque = weight - theta["spring"] * angle - theta["damping"] * w + theta["gear"] * action[..., 0]
        w = w + dt * torque / inertia + noise_std * e[..., 0]
        return torch.stack([angle + dt * w, w], -1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return -dt * _cost(FOLLOWER_COST, state, action)

    def leader_reward(theta: Params, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        price = sum(rate * theta[key] ** 2 for key, rate in PRICE.items())
        return -dt * (_cost(LEADER_COST, state, action) + price)

    names = ("angle", "angular_velocity")
    world = ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(2, 1),
        dt=dt,
        discount=discount,
        names={"state": names, "action": ("torque",), "signal": names},
        units={"angle": "rad", "angular_velocity": "rad/s", "torque": "N m"},
        box=_BOX,
    )
    return LeaderTask(world, leader_reward, discount)


def _cost(rates: tuple[float, float, float], state: Tensor, action: Tensor) -> Tensor:
    angle, w = state.unbind(-1)
    return rates[0] * angle**2 + rates[1] * w**2 + rates[2] * action[..., 0] ** 2


def spring_arm_matrices(theta: Params, *, dt: float = 0.1) -> tuple[Tensor, Tensor]:
    """A `[2, 2]` and B `[2, 1]` of the arm linearised where it stands upright, differentiable in theta."""
    inertia = MASS * LENGTH**2 + ROTOR * theta["gear"] ** 2
    push = [MASS * GRAVITY * LENGTH - theta["spring"], -theta["damping"], theta["gear"]]
    angle, speed, gain = (dt * slope / inertia for slope in push)
    w = torch.stack([angle, 1 + speed])
    A = torch.stack([torch.stack([1 + dt * angle, dt * (1 + speed)]), w])
    return A, torch.stack([dt * gain, gain]).unsqueeze(-1)
