"""The arm of `sim2real.simulators.spring_arm` as a Warp model: same parameters, units and options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import warp as wp

from sim2real.leader_task import LeaderTask
from sim2real.simulators.spring_arm import FOLLOWER_COST, GRAVITY, LENGTH, MASS, ROTOR, spring_arm
from sim2real.simulators.warp_model import warp_twin


def warp_spring_arm(
    *, dt: float = 0.1, discount: float = 0.9, noise_std: float = 0.1, linear: bool = False
) -> LeaderTask:
    """Options and result as `spring_arm`; the follower's world is stepped and rolled out by Warp."""
    twin = spring_arm(dt=dt, discount=discount, noise_std=noise_std, linear=linear)
    per_angle, per_speed, per_torque = FOLLOWER_COST

    def step(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        angle, speed = state[0], state[1]
        weight = MASS * GRAVITY * LENGTH * (angle if linear else wp.sin(angle))
        inertia = MASS * LENGTH * LENGTH + ROTOR * theta.gear * theta.gear
        torque = weight - theta.spring * angle - theta.damping * speed + theta.gear * action[0]
        w = speed + dt * torque / inertia + noise_std * noise[0]
        return wp.vector(angle + dt * w, w)

    def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
        motion = per_angle * state[0] * state[0] + per_speed * state[1] * state[1]
        return -dt * (motion + per_torque * action[0] * action[0])

    return replace(twin, follower=warp_twin(twin.follower, step, reward))
