"""The tasks of `economic.py`, a stirred-tank reactor and an evaporator: model, world and policy class of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.bounds import default_params
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy
from sim2real.simulators.cstr import cstr
from sim2real.simulators.evaporation import evaporation


@dataclass(frozen=True)
class Task:
    """A model, the world it stands for, and the policies: `base + span (bias + gain (s - center) / spread)`.

    That is bent smoothly into (0, limit), unchanged in value and slope at `base`.
    """

    name: str
    unit: str
    """of minus or plus the return per minute, `sign` times that"""
    sign: float
    model: ModelMDP
    world: ModelMDP
    """its theta are the design values of the model"""
    base: Tensor
    """`[m]` action units, as `span`"""
    span: Tensor
    center: Tensor
    """`[n]` state units, as `spread`"""
    spread: Tensor
    signals: tuple[str, ...]
    """what the fit compares"""
    scale: Params
    """of the free parameters, for the trust region and for Nelder-Mead"""
    limit: float
    """of the inputs, in action units"""
    horizon: int = 60
    """steps of an in-sim rollout and of a real episode"""


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def reactor() -> Task:
    """A -> B with 12 s between moves; in the world B -> C, too, and the feed varies by a tenth."""
    common = {"discount": 0.95, "effort": 0.05}
    return Task(
        name="cstr",
        unit="profit/min",
        sign=1.0,
        model=cstr(integrator="midpoint", **common),
        world=cstr(side_rate=0.5, feed_std=0.1, **common),
        base=_vector(12.0),
        span=_vector(2.0),
        center=_vector(0.5, 0.5, 12.0),
        spread=_vector(0.1, 0.1, 2.0),
        signals=("cA", "cB"),
        scale={"rate": _vector(0.2)[0], "feed": _vector(0.1)[0]},
        limit=20.0,
    )


def evaporator() -> Task:
    """Two minutes between moves; in the world feed and cooling water vary. T1 hardly shows in the data: kept."""
    common = {"discount": 0.95, "penalty": 1000.0, "softness": 0.25}
    return Task(
        name="evaporation",
        unit="cost/min",
        sign=-1.0,
        model=evaporation(integrator="midpoint", **common),
        world=evaporation(disturbance_std=(0.5, 1.0, 4.0, 2.5), **common),
        base=_vector(191.713, 215.888),
        span=_vector(20.0, 20.0),
        center=_vector(25.0, 49.743),
        spread=_vector(2.0, 4.0),
        signals=("X2", "P2"),
        scale={"X1": _vector(0.25)[0], "F1": _vector(0.5)[0], "T200": _vector(3.0)[0]},
        limit=400.0,
    )


def truth(task: Task) -> Params:
    """theta of the world: nominal."""
    return default_params(task.world.box)


def policy_of(task: Task) -> Policy:
    """State feedback, deterministic."""

    def act(nu: Params, state: Tensor) -> Tensor:
        deviation = ((state - task.center) / task.spread).unsqueeze(-1)
        move = task.span * (nu["bias"] + (nu["gain"] @ deviation).squeeze(-1))
        share = task.base / task.limit
        return task.limit * torch.sigmoid(torch.logit(share) + move / (task.limit * share * (1 - share)))

    return deterministic_policy(act)


def start_of(task: Task) -> Params:
    """The policy that holds the inputs at `base`."""
    m, n = len(task.base), len(task.center)
    return {"bias": torch.zeros(m, dtype=torch.float64), "gain": torch.zeros(m, n, dtype=torch.float64)}
