"""The houses of `sim2real.simulators.building_rc` as Warp models: same parameters, units and options.

The exact step is linear, `x' = F_d x + G_d (Ph, Ta)`; torch computes the matrix from theta, once per call, and the
kernel takes its entries as parameters. Midpoint and rk4 are kernels of theta itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import warp as wp
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.building_rc import SECONDS_PER_HOUR, building_rc, transition_matrix
from sim2real.simulators.warp_integrate import first_order
from sim2real.simulators.warp_model import warp_twin


def warp_building_rc(
    order: Literal[1, 2, 3] = 3,
    *,
    dt: float = SECONDS_PER_HOUR,
    integrator: Literal["exact", "midpoint", "rk4"] = "exact",
    substeps: int = 1,
    discount: float = 1.0,
    setpoint: float = 20.0,
    energy_price: float = 0.01,
    initial_temperature: float = 20.0,
    initial_std: float = 0.0,
) -> ModelMDP:
    """Options and result as `building_rc`, stepped and rolled out by Warp."""
    twin = building_rc(
        order,
        dt=dt,
        integrator=integrator,
        substeps=substeps,
        discount=discount,
        setpoint=setpoint,
        energy_price=energy_price,
        initial_temperature=initial_temperature,
        initial_std=initial_std,
    )
    hours = dt / SECONDS_PER_HOUR

    def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
        off = following[0] - setpoint
        return -hours * (off * off + energy_price * action[0])

    rates = {1: _one, 2: _two, 3: _three}[order]
    scheme = "midpoint" if integrator == "exact" else integrator
    model = warp_twin(twin, first_order(rates, dt=hours, integrator=scheme, substeps=substeps), reward)
    return _exact(model, order, hours) if integrator == "exact" else model


def _exact(model: ModelMDP, order: Literal[1, 2, 3], hours: float) -> ModelMDP:
    """The model with step and rollout replaced by those of the linear system."""
    columns = order + 2
    names = [f"m{row}{column}" for row in range(order) for column in range(columns)]

    def step(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        following = state
        x = wp.vector(state, action, noise)
        for row in range(order):
            following[row] = wp.dot(theta[row * columns : (row + 1) * columns], x)
        return following

    linear = warp_twin(replace(model, box=Box(default=dict.fromkeys(names, 0.0))), step, None)
    roll = linear.open_loop
    if roll is None:
        raise TypeError("a Warp model rolls out by itself")

    def entries(theta: Params, like: Tensor) -> Params:
        # in float32 the derivatives of the matrix exponential would be off by 5e-4
        exact = transition_matrix(order, {key: value.double() for key, value in theta.items()}, hours)
        return dict(zip(names, exact.to(like.dtype).flatten(-2).unbind(-1), strict=True))

    return replace(
        model,
        step=lambda theta, state, action, e: linear.step(entries(theta, state), state, action, e),
        open_loop=lambda theta, start, actions, e: roll(entries(theta, start), start, actions, e),
    )


def _one(theta: Any, x: Any, action: Any, noise: Any) -> Any:
    return wp.vector(((noise[0] - x[0]) / theta.Ria + action[0]) / theta.Ci)


def _two(theta: Any, x: Any, action: Any, noise: Any) -> Any:
    inward = (x[1] - x[0]) / theta.Rie
    air = inward + (noise[0] - x[0]) / theta.Ria + action[0]
    return wp.vector(air / theta.Ci, ((noise[0] - x[1]) / theta.Rea - inward) / theta.Ce)


def _three(theta: Any, x: Any, action: Any, noise: Any) -> Any:
    inward = (x[1] - x[0]) / theta.Rie
    heated = (x[2] - x[0]) / theta.Rih
    air = inward + heated + (noise[0] - x[0]) / theta.Ria
    envelope = (noise[0] - x[1]) / theta.Rea - inward
    return wp.vector(air / theta.Ci, envelope / theta.Ce, (action[0] - heated) / theta.Ch)
