"""Closed-loop benchmarks: tuning a simulator for real return where the answer is known exactly, and in richer worlds.

`a-exact`: LQR with input-multiplicative noise, exact real return and gradient. `a-sampled`: the double integrator with
sigma 0.8 from at most 120 000 real transitions. `b-battery`, `a-mujoco`: see `battery.py` and `mujoco_world.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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
from sim2real.rollout import Rollout
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
    return Estimate(torch.tensor(-cost, dtype=torch.float64), {"gain": torch.tensor(-gradient)})


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


BATCH, HORIZON = 100, 20
EXPLORATION = 1.0


def record(world: World, act: Callable[[Tensor], Tensor], generator: torch.Generator) -> Rollout:
    """2000 transitions of the world: 100 episodes from N(0, I), 20 steps each."""
    A, B, Q, R = (torch.tensor(x) for x in (world.A, world.B, world.Q, world.R))

    def normal(width: int) -> Tensor:
        return torch.randn(BATCH, width, generator=generator, dtype=torch.float64)

    states, actions = [normal(len(A))], []
    for _ in range(HORIZON):
        actions.append(act(states[-1]) + EXPLORATION * normal(B.shape[1]))
        push = actions[-1] * (1 + world.sigma * normal(B.shape[1]))
        states.append(states[-1] @ A.T + push @ B.T + world.noise**0.5 * normal(len(A)))
    s, a = torch.stack(states, 1), torch.stack(actions, 1)
    return Rollout(s, a, -(s[:, :-1] @ Q * s[:, :-1]).sum(-1) - (a @ R * a).sum(-1))


def least_squares(data: Rollout) -> Params:
    """theta = (A, B) that explains the transitions best."""
    n = data.states.shape[-1]
    before = torch.cat([data.states[:, :-1], data.actions], -1).flatten(0, 1)
    both = torch.linalg.lstsq(before, data.states[:, 1:].flatten(0, 1)).solution.T
    return {"A": both[:, :n].contiguous(), "B": both[:, n:].contiguous()}


def tune_from_samples(world: World, seed: int, rounds: int) -> tuple[TuneResult, list[float]]:
    """The library's loop on `2000 (rounds + 1)` real transitions, and the exact cost of every policy that ran."""
    generator = torch.Generator().manual_seed(seed)
    first = record(world, lambda s: torch.zeros(len(s), world.B.shape[1], dtype=s.dtype), generator)
    costs: list[float] = []

    def collect(policy: Policy, nu: Params, iteration: int, rng: torch.Generator) -> Rollout:
        costs.append(cost_and_gradient(world, nu["gain"].numpy())[0])
        return record(world, lambda s: policy.act(nu, s, s[:, :0]), rng)

    mdp, _ = model_of(world)
    theta = least_squares(first)
    result = tune(
        mdp,
        linear_policy(world.B.shape[1]),
        theta,
        {"gain": torch.zeros(world.B.shape[::-1], dtype=torch.float64)},
        first,
        None,
        real_reward=None,
        real_discount=world.discount,
        collect=collect,
        settings=TuneSettings(max_steps=rounds - 1),
        objective=partial(in_sim_return, world),
        optimum=partial(in_sim_optimum, world),
        generator=generator,
    )
    return result, costs


def a_sampled(quick: bool) -> Iterator[Figure]:
    """Worst of 5 seeds: share of the gap closed, and the worst cost of any policy run relative to the start's."""
    world, published = next(pair for pair in worlds(CASES) if pair[0].name == "double integrator, sigma 0.8")
    closed, ratios, best = [], [], published["J_optimal"]
    for seed in range(2 if quick else 5):
        result, costs = tune_from_samples(world, seed, rounds=20 if quick else 59)
        end = cost_and_gradient(world, result.nu["gain"].numpy())[0]
        closed.append((costs[0] - end) / (costs[0] - best))
        ratios.append(max(costs) / costs[0])
    yield Figure("closed", min(closed), "share of the gap", len(closed))
    yield Figure("overshoot", max(ratios) - 1, "relative to the start", len(ratios), 14.5 / 11.8 - 1)


if __name__ == "__main__":
    main({"a-exact": a_exact, "a-sampled": a_sampled})
