"""Closed-loop benchmarks: tuning a simulator for real return where the answer is known exactly, and in richer worlds.

`a-exact`: LQR with input-multiplicative noise, exact real return and gradient. `a-sampled`: the double integrator with
sigma 0.8 from at most 120 000 real transitions. `b-battery`, `a-mujoco`: see `battery.py` and `mujoco_world.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.oracles.multiplicative_lqr import WORLDS, World, case_of, cost_and_gradient, fitted_gain, optimal_gain
from sim2real.bounds import Box
from sim2real.fit import FitSettings, fit
from sim2real.mdp import ModelMDP
from sim2real.params import Estimate, Params
from sim2real.policy import Policy, linear_policy
from sim2real.rollout_log import RolloutLog
from sim2real.simulators.linear_gaussian import linear_gaussian
from sim2real.solvers.riccati import lyapunov, riccati
from sim2real.tuning import TuneResult, TuneSettings, tune

EXACT_STEPS = 40


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
    for case in WORLDS:
        result = tune_exactly(case, EXACT_STEPS - 1)  # the start is an evaluation, too
        best, _ = cost_and_gradient(case, optimal_gain(case))
        cost, _ = cost_and_gradient(case, result.nu["gain"].numpy())
        fitted_cost, _ = cost_and_gradient(case, fitted_gain(case))
        yield Figure(case.name, cost / best - 1, "relative", len(result.history), fitted_cost / best - 1)


BATCH, HORIZON, ROUNDS = 100, 20, 30
"""episodes and steps of one recording (2000 transitions), recordings after the first"""
EXPLORATION = 1.0


def record(world: World, act: Callable[[Tensor], Tensor], generator: torch.Generator, name: str) -> RolloutLog:
    """2000 transitions of the world: 100 episodes from N(0, I), 20 steps each, actions `act(s)` plus exploration."""
    A, B = torch.tensor(world.A), torch.tensor(world.B)
    normal = lambda width: torch.randn(BATCH, width, generator=generator, dtype=torch.float64)
    states, actions = [normal(len(A))], []
    for _ in range(HORIZON):
        actions.append(act(states[-1]) + EXPLORATION * normal(B.shape[1]))
        push = actions[-1] * (1 + world.sigma * normal(B.shape[1]))
        states.append(states[-1] @ A.T + push @ B.T + world.noise**0.5 * normal(len(A)))
    columns = {"signal": ("s1", "s2"), "action": ("a1",), "exogenous": ()}
    return RolloutLog(
        signals=torch.stack(states, 1),
        actions=torch.stack(actions, 1),
        exogenous=None,
        mask=torch.ones(BATCH, HORIZON, dtype=torch.bool),
        dt=1.0,
        names=columns | {"episode": tuple(f"{name}-{i}" for i in range(BATCH))},
        units={"s1": "1", "s2": "1", "a1": "1"},
        source=name,
    )


ENTRIES = ("a11", "a12", "a21", "a22", "b1", "b2")


def matrices(theta: Params) -> Params:
    """A and B from the six named entries."""
    a11, a12, a21, a22, b1, b2 = (theta[name] for name in ENTRIES)
    A = torch.stack([torch.stack([a11, a12], -1), torch.stack([a21, a22], -1)], -2)
    return {"A": A, "B": torch.stack([b1, b2], -1).unsqueeze(-1)}


def named_model(world: World) -> ModelMDP:
    """The model of the double integrator with named scalar parameters, as `fit` and `tune` like them."""
    model, _ = model_of(world)
    return replace(
        model,
        step=lambda theta, s, a, e: model.step(matrices(theta), s, a, e),
        box=Box(dict.fromkeys(ENTRIES, -3.0), dict.fromkeys(ENTRIES, 3.0), dict.fromkeys(ENTRIES, "1")),
    )


def fitted(mdp: ModelMDP, log: RolloutLog) -> Params:
    """theta by least squares on single steps."""
    settings = FitSettings(
        free=ENTRIES,
        signals=("s1", "s2"),
        horizon=1.0,
        stride=1.0,
        sample_every=1,
        first_row=0,
        margin=0,
        loss_scale=1e6,  # far above the residuals: plain squares
        prior_width=0.0,
    )
    return fit(mdp, log, {name: torch.tensor(0.1, dtype=torch.float64) for name in ENTRIES}, settings).theta


def tune_from_samples(world: World, seed: int, rounds: int) -> tuple[TuneResult, list[float]]:
    """The library's loop on `2000 (rounds + 1)` real transitions, and the exact cost of every policy that ran."""
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.tensor(world.Q), torch.tensor(world.R)
    costs: list[float] = []

    def collect(policy: Policy, nu: Params, iteration: int, rng: torch.Generator) -> RolloutLog:
        costs.append(cost_and_gradient(world, nu["gain"].numpy())[0])
        return record(world, lambda s: policy.act(nu, s, s[:, :0]), rng, f"round-{iteration}")

    mdp, first = named_model(world), record(world, lambda s: 0.0 * s[:, :1], generator, "fit")
    result = tune(
        mdp,
        linear_policy(1),
        fitted(mdp, first),
        {"gain": torch.zeros(1, 2, dtype=torch.float64)},
        first,
        None,
        real_reward=lambda s, a, following: -(s @ Q * s).sum(-1) - (a @ R * a).sum(-1),
        real_discount=world.discount,
        collect=collect,
        settings=TuneSettings(max_steps=rounds - 1),
        objective=lambda theta, nu: in_sim_return(world, matrices(theta), nu),
        optimum=lambda theta, nu: in_sim_optimum(world, matrices(theta), nu),
        generator=generator,
    )
    return result, costs


def a_sampled(quick: bool) -> Iterator[Figure]:
    """Worst of 5 seeds: share of the gap closed, and the largest cost of any policy run relative to the start's."""
    case = case_of("double-integrator", 0.8)
    closed, ratios, best = [], [], cost_and_gradient(case, optimal_gain(case))[0]
    for seed in range(2 if quick else 5):
        result, costs = tune_from_samples(case, seed, rounds=10 if quick else ROUNDS)
        end = cost_and_gradient(case, result.nu["gain"].numpy())[0]
        closed.append((costs[0] - end) / (costs[0] - best))
        ratios.append(max(costs) / costs[0])
    transitions = BATCH * HORIZON * (1 + len(costs))
    yield Figure("closed", min(closed), "fraction of the gap", len(closed), 0.986)
    yield Figure("overshoot", max(ratios) - 1, "relative to the start", len(ratios), 14.5 / 11.778 - 1)
    yield Figure("transitions", transitions, "real transitions per seed", len(closed), 122_000)


def b_battery(quick: bool) -> Iterator[Figure]:
    """See `benchmarks/battery.py`."""
    from benchmarks.battery import b_battery as bar

    yield from bar(quick)


def a_mujoco(quick: bool) -> Iterator[Figure]:
    """See `benchmarks/mujoco_world.py`; MuJoCo is imported only here."""
    from benchmarks.mujoco_world import a_mujoco as bar

    yield from bar(quick)


if __name__ == "__main__":
    main({"a-exact": a_exact, "a-sampled": a_sampled, "b-battery": b_battery, "a-mujoco": a_mujoco})
