"""Thermal control of N zones on a ring: a leader sets insulation and airflow, a follower runs the heating and cooling.

    s' = A(theta) s + B u + w,    w ~ N(0, noise_std^2 I),    s_0 ~ N(0, initial_std^2 I),

s the deviations of the zone temperatures from their set points. With insulation alpha = sigmoid(theta["insulation"]),
airflow eta = sigmoid(theta["airflow"]), where eta_i couples zones i and i + 1 (the last with the first), and a coupling
table that need not be symmetric,

    A_ij = coupling_ij eta_(ij)  for neighbours,    A_ii = 1 + leak_i (1 - alpha_i) - sum_{j != i} A_ij.

Rewards: the follower's `-(s'Q s + u'R u)`; the leader's `-Var_zones(s) - 0.5 |u|^2 - 0.1 |alpha|^2 - 0.1 |eta|^2`, the
variance being that over the zones at one time. `four_zones()` holds the building of Kudo, Tanabe, Wachi and Akimoto,
ICAPS 2026, arXiv 2603.14867 (which clips states at +-30, six standard deviations of the first one: left out here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.leader_task import LeaderTask
from sim2real.mdp import ModelMDP
from sim2real.params import Params


@dataclass(frozen=True)
class ThermalBuilding:
    """Data of a building with N zones and m units; weights of the leader's reward as in the module's docstring."""

    coupling: Tensor
    """`[N, N]`, only entries of ring neighbours are used"""
    leak: Tensor
    """`[N]`"""
    B: Tensor
    """`[N, m]`"""
    Q: Tensor
    """`[N, N]`"""
    R: Tensor
    """`[m, m]`"""
    noise_std: float = 0.02
    initial_std: float = 5.0
    temperature: float = 0.1
    """entropy weight of the follower"""
    leader_discount: float = 0.9
    follower_discount: float = 0.9
    energy: float = 0.5
    configuration: float = 0.1
    """weight of `|alpha|^2` and of `|eta|^2`"""


def four_zones() -> ThermalBuilding:
    """The published building: 4 zones, 2 units."""
    couple = [[1.0, 0.05, 0.0, 0.05], [0.03, 1.0, 0.04, 0.0], [0.0, 0.04, 1.0, 0.06], [0.05, 0.0, 0.03, 1.0]]
    units = [[0.1, 0.0], [0.6, 0.0], [0.0, 0.55], [0.0, 0.3]]
    of = lambda rows: torch.tensor(rows, dtype=torch.float64)
    return ThermalBuilding(
        of(couple), of([0.04, 0.03, 0.06, 0.05]), of(units), of([8.0, 1.0, 5.0, 6.0]).diag(), of([0.01, 0.01]).diag()
    )


def ring_building(zones: int) -> ThermalBuilding:
    """N zones alike in kind, not in size, with a unit for each pair of neighbours; `ValueError` below 3 zones."""
    if zones < 3:
        raise ValueError(f"a ring needs at least 3 zones, got {zones}")
    index = torch.arange(zones, dtype=torch.float64)
    units = torch.zeros(zones, (zones + 1) // 2, dtype=torch.float64)
    units[torch.arange(zones), torch.arange(zones) // 2] = 0.3 + 0.2 * torch.cos(index)
    coupling = 0.045 + 0.01 * torch.sin(index.unsqueeze(-1) + 2 * index)
    leak = 0.045 + 0.01 * torch.cos(2 * index)
    Q = torch.diag(5.0 + 2.0 * torch.sin(3 * index))
    return ThermalBuilding(coupling, leak, units, Q, 0.01 * torch.eye(units.shape[1], dtype=torch.float64))


def thermal_matrix(theta: Params, building: ThermalBuilding) -> Tensor:
    """A(theta) `[..., N, N]` of logits `[..., N]`, differentiable."""
    insulation, airflow = torch.sigmoid(theta["insulation"]), torch.sigmoid(theta["airflow"])
    along = torch.diag_embed(airflow) @ torch.eye(len(building.leak)).roll(1, -1).to(airflow)  # eta_i at (i, i + 1)
    exchange = building.coupling.to(airflow) * (along + along.mT)
    diagonal = 1 + building.leak.to(airflow) * (1 - insulation) - exchange.sum(-1)
    return exchange + torch.diag_embed(diagonal)


def building_thermal(building: ThermalBuilding | None = None) -> LeaderTask:
    """State `[N]`, action `[m]`; theta: insulation `[N]` and airflow `[N]`, logits. None: `four_zones()`.

    Raises `ValueError` for data whose shapes do not fit.
    """
    data = building if building is not None else four_zones()
    zones, units = _shapes(data)
    volume = zones * math.log(data.noise_std * math.sqrt(2 * math.pi))

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return data.initial_std * e0

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        drift = (thermal_matrix(theta, data) @ state.unsqueeze(-1)).squeeze(-1)
        return drift + action @ data.B.to(action).mT + data.noise_std * e

    def log_prob(theta: Params, state: Tensor, action: Tensor, after: Tensor) -> Tensor:
        z = (after - step(theta, state, action, torch.zeros_like(state))) / data.noise_std
        return -0.5 * z.square().sum(-1) - volume

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, after: Tensor) -> Tensor:
        return -((state @ data.Q.to(state)) * state).sum(-1) - ((action @ data.R.to(action)) * action).sum(-1)

    def leader_reward(theta: Params, state: Tensor, action: Tensor, after: Tensor) -> Tensor:
        spent = sum(torch.sigmoid(theta[key]).square().sum(-1) for key in ("insulation", "airflow"))
        spread = state.var(-1, correction=0)
        return -spread - data.energy * action.square().sum(-1) - data.configuration * spent

    world = ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(zones, zones),
        dt=1.0,
        discount=data.follower_discount,
        log_prob=log_prob,
        names={
            "state": tuple(f"zone_{i}" for i in range(zones)),
            "action": tuple(f"unit_{i}" for i in range(units)),
        },
        box=Box(default={key: torch.zeros(zones, dtype=torch.float64) for key in ("insulation", "airflow")}),
    )
    return LeaderTask(world, leader_reward, discount=data.leader_discount)


def _shapes(data: ThermalBuilding) -> tuple[int, int]:
    zones, units = data.B.shape
    wanted = {"coupling": (zones, zones), "leak": (zones,), "Q": (zones, zones), "R": (units, units)}
    for name, shape in wanted.items():
        if tuple(getattr(data, name).shape) != shape:
            raise ValueError(f"{name} must be {shape} for B {(zones, units)}, got {tuple(getattr(data, name).shape)}")
    return zones, units
