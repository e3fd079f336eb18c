"""Closed-loop benchmarks: tuning a simulator for real return where the answer is known exactly, and in richer worlds.

`a-exact`: LQR with input-multiplicative noise, exact real return and gradient. `a-sampled`: the double integrator with
sigma 0.8 from at most 120 000 real transitions. `b-battery`, `a-mujoco`: see `battery.py` and `mujoco_world.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.oracles.multiplicative_lqr import World, cost_and_gradient, worlds
from sim2real.mdp import ModelMDP
from sim2real.params import Estimate, Params
from sim2real.policy import Policy, linear_policy
from sim2real.simulators.linear_gaussian import linear_gaussian
from sim2real.solvers.riccati import lyapunov, riccati
from sim2real.tuning import TuneResult, TuneSettings, tune

CASES = Path(__file__).resolve().parents[2] / "shared" / "reference" / "benchmark_a.json"
EXACT_STEPS = 40


def metric_name(case: str) -> str:
    """'double integrator, sigma 0.8' -> 'double-integrator-0.8'."""
    system, sigma = case.split(", sigma ")
    return system.split(",")[0].replace(" ", "-") + "-" + sigma


def model_of(world: World) -> tuple[ModelMDP, Params]:
    """The model class of benchmark A, linear with additive noise, and theta = (A, B) that least squares finds."""
    A, B, Q, R = (torch.tensor(x) for x in (world.A, world.B, world.Q, world.R))
    mdp = linear_gaussian(A, B, state_cost=Q, action_cost=R, discount=world.discount)
    return mdp, {"A": A, "B": B}


def in_sim_return(world: World, theta: Params, nu: Params) -> Tensor:
    """J(theta, nu) of the model, exact: minus the trace of the cost matrix times the discounted start and noise."""
    Q, R = torch.tensor(world.Q), torch.tensor(world.R)
    A, B, K = theta["A"], theta["B"], nu["gain"]
    start = 1 + world.noise * world.discount / (1 - world.discount)
    return -start * torch.trace(lyapunov(A - B @ K, Q + K.mT @ R @ K, world.discount))


def in_sim_optimum(world: World, theta: Params, nu: Params) -> Params:
    """The model's optimal gain."""
    return {"gain": riccati(theta["A"], theta["B"], torch.tensor(world.Q), torch.tensor(world.R), world.discount)[1]}


def exact_gradient(world: World, policy: Policy, nu: Params, log: Any, **_: Any) -> Estimate:
    """The real return of a gain and its gradient, from the oracle."""
    cost, gradient = cost_and_gradient(world, nu["gain"].numpy())
    return Estimate(torch.tensor(-cost), {"gain": torch.tensor(-gradient)})


def tune_exactly(world: World, steps: int) -> TuneResult:
    """The library's loop on exact figures, from the theta of system identification."""
    mdp, theta = model_of(world)
    return tune(
        mdp,
        linear_policy(world.B.shape[1]),
        theta,
        {"gain": torch.zeros(world.B.shape[::-1], dtype=torch.float64)},
        None,
        None,
        real_reward=None,
        real_discount=world.discount,
        settings=TuneSettings(max_steps=steps, gradient_tol=1e-10),
        objective=partial(in_sim_return, world),
        optimum=partial(in_sim_optimum, world),
        gradient=partial(exact_gradient, world),
    )


def a_exact(quick: bool) -> Iterator[Figure]:
    """Relative distance to the optimal return after at most 40 evaluations; the reference is the fitted model."""
    for world, published in worlds(CASES):
        result = tune_exactly(world, EXACT_STEPS - 1)  # the start is an evaluation, too
        cost, _ = cost_and_gradient(world, result.nu["gain"].numpy())
        best = published["J_optimal"]
        yield Figure(
            metric_name(world.name), cost / best - 1, "relative", len(result.history), published["J_sysid"] / best - 1
        )


if __name__ == "__main__":
    main({"a-exact": a_exact})
