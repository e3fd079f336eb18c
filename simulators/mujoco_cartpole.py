"""A cart-pole rig in MuJoCo: a world richer than the torch `cartpole`, and a black box without derivatives.

The motor drives a carriage along the rail; the cart hangs on the carriage through a gear with play, the pole on the
cart. Over the torch model the rig has

- dry friction (stiction) of the carriage on the rail and of the hinge,
- backlash: the cart moves freely within +-`backlash` of the carriage, then hits the tooth,
- delay: a force acts `delay` seconds after it was commanded, and saturates at `force_limit`.

State: position of the cart, angle, velocity, angular_velocity (what the torch model has, and all that is observed),
then play (cart relative to carriage, m) and its rate, then the commands still under way. Angle 0 is upright.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
import torch
from mujoco.rollout import Rollout as EnginePool
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params

# dry friction close to a hard one (the engine's default creeps ten times faster below the breakaway force); the tooth
# meets the rack with a time constant of 6 ms, critically damped
_RIG = """
<mujoco model="cart-pole rig">
  <compiler autolimits="true"/>
  <option timestep="{timestep}" integrator="implicitfast" cone="elliptic">
    <flag contact="disable" eulerdamp="disable"/>
  </option>
  <worldbody>
    <body name="carriage">
      <joint name="rail" type="slide" axis="1 0 0" solreffriction="0.004 1" solimpfriction="0.99 0.999 0.001"
             frictionloss="{rail_stiction}" damping="{rail_damping}"/>
      <inertial pos="0 0 0" mass="{carriage_mass}" diaginertia="0.01 0.01 0.01"/>
      <body name="cart">
        <joint name="play" type="slide" axis="1 0 0" range="-{play} {play}" solreflimit="0.006 1" damping="0.5"/>
        <inertial pos="0 0 0" mass="{cart_mass}" diaginertia="0.01 0.01 0.01"/>
        <body name="pole">
          <joint name="hinge" type="hinge" axis="0 1 0" frictionloss="{hinge_stiction}" damping="{hinge_damping}"/>
          <inertial pos="0 0 {center}" mass="{pole_mass}" diaginertia="{inertia} {inertia} {inertia}"/>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="rail" ctrllimited="true" ctrlrange="-{force_limit} {force_limit}"/>
  </actuator>
</mujoco>
"""
_SIGNALS = ("position", "angle", "velocity", "angular_velocity")
_UNITS = {"position": "m", "angle": "rad", "velocity": "m/s", "angular_velocity": "rad/s", "force": "N"}
_NO_DERIVATIVE = (
    "the MuJoCo cart-pole is a black box (derivative_order = 0): use a score-function or finite-difference estimator"
)


def mujoco_cartpole(
    *,
    dt: float = 0.02,
    substeps: int = 10,
    delay: float = 0.04,
    backlash: float = 0.003,
    rail_stiction: float = 1.0,
    hinge_stiction: float = 0.003,
    rail_damping: float = 0.5,
    hinge_damping: float = 0.002,
    carriage_mass: float = 0.3,
    cart_mass: float = 0.7,
    pole_mass: float = 0.1,
    length: float = 1.0,
    force_limit: float = 20.0,
    discount: float = 1.0,
    initial_angle: float = 0.0,
    initial_std: float = 0.05,
    reward: Callable[[Params, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    threads: int = 1,
) -> ModelMDP:
    """The rig as a world: state `[B, 6 + commands under way]`, of which `observe` gives the first four.

    SI units; `delay` is a whole number of engine steps of `dt / substeps`; `backlash` is half the free play. theta is
    not used (pass `{}`). Starts at rest at `initial_angle` (rad) with normal deviations of `initial_std` in the four
    observed states, no command under way. `reward` sees the first four states only; None: the task of the torch
    `cartpole`. Batches are stepped on `threads` threads; a row does not depend on the rows beside it.
    `derivative_order` is 0. Raises `ValueError` for a delay between engine steps or a value that must be positive.
    """
    lag = _check(dt, substeps, delay, backlash, force_limit)
    commands = math.ceil(lag / substeps)
    friction = {"rail_stiction": rail_stiction, "hinge_stiction": hinge_stiction}
    friction |= {"rail_damping": rail_damping, "hinge_damping": hinge_damping}
    bodies = {"carriage_mass": carriage_mass, "cart_mass": cart_mass, "pole_mass": pole_mass}
    bodies |= {"center": length / 2, "inertia": pole_mass * length**2 / 12}
    rail = {"timestep": dt / substeps, "force_limit": force_limit, "play": max(backlash, 1e-6)}
    model = mujoco.MjModel.from_xml_string(_RIG.format(**friction, **bodies, **rail))
    # engine step j of a control step applies the known command `order[j]`, the oldest one first
    order = [commands + (j - lag) // substeps for j in range(substeps)]
    advance = _stepper(model, order, commands, threads)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        observed = e0.new_tensor([0.0, initial_angle, 0.0, 0.0]) + initial_std * e0
        return torch.cat([observed, e0.new_zeros(e0.shape[0], 2 + commands)], -1)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        following: Tensor = _BlackBox.apply(state, action, advance)
        return following

    def task(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        if reward is None:
            return -dt * _balancing_cost(state, action)
        return reward(theta, state[:, :4], action, e, following[:, :4])

    return ModelMDP(
        initial_state,
        step,
        task,
        noise_dims=(4, 0),
        dt=dt,
        discount=discount,
        observe=lambda theta, state: state[..., :4],
        derivative_order=0,
        names={"action": ("force",), "signal": _SIGNALS},
        units=_UNITS,
        box=Box(),
    )


def _balancing_cost(state: Tensor, action: Tensor) -> Tensor:
    """Per second, that of the torch `cartpole`."""
    x, angle, v, w = state[:, :4].unbind(-1)
    return x**2 + 10.0 * (1.0 - torch.cos(angle)) + 0.1 * (v**2 + w**2) + 0.001 * action[:, 0] ** 2


def _stepper(model: Any, order: list[int], commands: int, threads: int) -> Callable[[Tensor, Tensor], Tensor]:
    """One control step of `state [B, 6 + commands]` under `action [B, 1]`; reuses the engine's buffers."""
    data, pool = [mujoco.MjData(model) for _ in range(threads)], EnginePool(nthread=threads if threads > 1 else 0)

    def advance(state: Tensor, action: Tensor) -> Tensor:
        known = torch.cat([state[:, 6:], action], -1)
        physics = _advance(model, data, pool, state, known[:, order])
        return torch.cat([physics, known[:, known.shape[1] - commands :]], -1)

    return advance


class _BlackBox(torch.autograd.Function):
    """A step without derivatives: asking for one raises, where detaching would give a silently wrong gradient."""

    @staticmethod
    def forward(state: Tensor, action: Tensor, advance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return advance(state, action)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        raise NotImplementedError(_NO_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], state: Tensor, action: Tensor, advance: Any) -> tuple[Tensor, int]:
        rows = [
            x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
            for x, dim in zip((state, action), in_dims, strict=False)
        ]
        following = _BlackBox.apply(*(x.flatten(0, 1) for x in rows), advance)
        return following.unflatten(0, (info.batch_size, -1)), 0


def _advance(model: Any, data: list[Any], pool: EnginePool, state: Tensor, forces: Tensor) -> Tensor:
    """One control step of every row: `state [B, 6+]`, forces `[B, substeps]` -> `[B, 6]`."""
    x, angle, v, w, play, play_rate = state[:, :6].double().cpu().numpy().T
    start = np.stack([np.zeros_like(x), x - play, play, angle, v - play_rate, play_rate, w], -1)
    control = forces.double().cpu().numpy()[..., None]
    states, _ = pool.rollout(model, data[: max(1, min(len(data), len(x)))], start, control)
    _, rail, play, angle, v, play_rate, w = states[:, -1].T
    return torch.as_tensor(np.stack([rail + play, angle, v + play_rate, w, play, play_rate], -1)).to(state)


def _check(dt: float, substeps: int, delay: float, backlash: float, force_limit: float) -> int:
    if dt <= 0.0 or substeps < 1 or delay < 0.0 or backlash < 0.0 or force_limit <= 0.0:
        raise ValueError(
            "dt, substeps and force_limit must be positive, delay and backlash at least 0, got "
            f"dt={dt} s, substeps={substeps}, force_limit={force_limit} N, delay={delay} s, backlash={backlash} m"
        )
    lag = round(delay * substeps / dt)
    if abs(lag * dt / substeps - delay) > 1e-9:
        raise ValueError(
            f"delay = {delay} s is not a whole number of engine steps of dt / substeps = {dt / substeps} s"
        )
    return lag
