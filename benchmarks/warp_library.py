"""The library's Warp models beside their torch twins, and points at which to compare them.

`LIBRARY` holds (name, Warp factory, torch factory), one row for each system and variant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sim2real import Box, ModelMDP, Params, default_params
from sim2real.simulators import (
    building_rc,
    cartpole,
    double_pendulum,
    dynamic_bicycle,
    kinematic_bicycle,
    pendulum,
    planar_quadrotor,
    quadrotor,
)
from sim2real.simulators.inventory_network import Routes, inventory_network
from sim2real.simulators.warp_bicycle import warp_dynamic_bicycle, warp_kinematic_bicycle
from sim2real.simulators.warp_building_rc import warp_building_rc
from sim2real.simulators.warp_cartpole import warp_cartpole
from sim2real.simulators.warp_double_pendulum import warp_double_pendulum
from sim2real.simulators.warp_inventory import warp_inventory_network
from sim2real.simulators.warp_pendulum import warp_pendulum
from sim2real.simulators.warp_quadrotor import warp_planar_quadrotor, warp_quadrotor

Factory = Callable[..., ModelMDP]


def _variant(name: str, kernel: Factory, twin: Factory, **options: object) -> tuple[str, Factory, Factory]:
    return name, partial(kernel, **options), partial(twin, **options)


def by_entry(mdp: ModelMDP) -> ModelMDP:
    """The model with a scalar parameter, such as `holding1`, for each entry of its vectors."""
    default = {
        f"{key}{i}": float(x) for key, value in mdp.box.default.items() for i, x in enumerate(torch.as_tensor(value))
    }
    whole = lambda theta: {
        key: torch.stack([theta[f"{key}{i}"] for i in range(len(torch.as_tensor(value)))], -1)
        for key, value in mdp.box.default.items()
    }
    roll = mdp.open_loop
    return replace(
        mdp,
        step=lambda theta, *x: mdp.step(whole(theta), *x),
        reward=lambda theta, *x: mdp.reward(whole(theta), *x),
        open_loop=None if roll is None else lambda theta, *x: roll(whole(theta), *x),
        box=Box(low=dict.fromkeys(default, 0.0), high=dict.fromkeys(default, 100.0), default=default),
    )


NETWORKS: dict[str, dict[str, Any]] = {
    "inventory_network": {
        "routes": Routes(((1, 2, 0), (3, 0, 1)), (2, 1)),
        "start": [2.0, 3.0, 4.0],
        "holding": [1.0, 1.5, 0.7],
        "underage": [9.0, 7.0, 8.0],
        "warehouse_holding": [0.5, 0.3],
        "purchase": [0.4, 0.6],
    },
    "inventory_network hub": {
        "routes": Routes(((2, 2, 2),), (3,)),
        "hub": True,
        "lost": False,
        "start": [2.0, 3.0, 4.0],
        "holding": [1.0, 1.5, 0.7],
        "underage": [9.0, 7.0, 8.0],
        "warehouse_holding": [0.5],
    },
}


def _network(name: str) -> tuple[str, Factory, Factory]:
    build = lambda factory: lambda: by_entry(factory(**NETWORKS[name]))
    return name, build(warp_inventory_network), build(inventory_network)


LIBRARY: tuple[tuple[str, Factory, Factory], ...] = (
    ("cartpole", warp_cartpole, cartpole),
    ("pendulum", warp_pendulum, pendulum),
    ("double_pendulum", warp_double_pendulum, double_pendulum),
    _variant("double_pendulum physical", warp_double_pendulum, double_pendulum, parameters="physical"),
    ("quadrotor", warp_quadrotor, quadrotor),
    _variant("quadrotor speed cross", warp_quadrotor, quadrotor, command="speed", frame="cross"),
    ("planar_quadrotor", warp_planar_quadrotor, planar_quadrotor),
    _variant("planar_quadrotor speed", warp_planar_quadrotor, planar_quadrotor, command="speed"),
    ("kinematic_bicycle", warp_kinematic_bicycle, kinematic_bicycle),
    ("dynamic_bicycle", warp_dynamic_bicycle, dynamic_bicycle),
    _variant("dynamic_bicycle linear", warp_dynamic_bicycle, dynamic_bicycle, tyre="linear"),
    ("building_rc", warp_building_rc, building_rc),
    _variant("building_rc 1", warp_building_rc, building_rc, order=1),
    _variant("building_rc 2", warp_building_rc, building_rc, order=2),
    _variant("building_rc rk4", warp_building_rc, building_rc, integrator="rk4", substeps=8),
    _network("inventory_network"),
    _network("inventory_network hub"),
)
"""(name, Warp factory, torch factory); factories return models and, but for networks, take the options of the system"""

SYSTEMS = tuple(row for row in LIBRARY if " " not in row[0])
"""one variant of each system"""


def points(twin: ModelMDP, batch: int, generator: torch.Generator) -> tuple[Params, Tensor, Tensor, Tensor]:
    """theta (each value per environment), states, actions and noise `[B, ...]`, float64, well away from equilibrium.

    Parameters lie within 10 % of their design values, or of 1 % of the box where the design value is 0.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    theta = {}
    for key, value in default_params(twin.box).items():
        width = 0.01 * (twin.box.high[key] - max(twin.box.low[key], 0.0))
        theta[key] = value + 0.1 * (float(value) or width) * (
            2.0 * torch.rand(batch, generator=generator).double() - 1.0
        )
        theta[key] = theta[key].clamp(twin.box.low[key], twin.box.high[key])
    still = twin.initial_state(theta, torch.zeros(batch, twin.noise_dims[0], dtype=torch.float64))
    scale = torch.where(still.abs() > 0.1, 0.1 * still.abs(), 0.5)
    state = still + scale * normal(still.shape[1])
    centre = torch.zeros(batch, len(twin.names["action"]), dtype=torch.float64)
    if "motor_lag" in theta:
        centre = still[:, -centre.shape[1] :]
    if twin.exogenous_dim and "purchase0" in theta:
        centre = centre + 2.0  # a share of next to nothing has second derivatives of any size
    return theta, state, centre + (0.1 * centre + 0.5) * normal(centre.shape[1]), normal(twin.noise_dims[1])
