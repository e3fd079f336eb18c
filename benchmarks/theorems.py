"""`b-theorems`: both hypergradients on random finite problems, against the derivative of the whole two-level problem.

20 configurable MDPs (5 states, 3 actions) and 20 games (4 states, 2 and 3 actions), theta of 4 in rewards of both,
kernel, first state and leader policy, discounts (0.9, 0.9), (0.8, 0.95), (0.95, 0.7) of follower and leader in turn,
temperatures 0.2 to 1.

    error        worst relative error of theorem 1 and of theorem 2 against automatic differentiation of the leader's
                 return through the soft Bellman fixed point (implicit, second implementation)
    differences  the same against central differences, extrapolated twice
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from sim2real.estimators import boltzmann_tables_gradient, seen_leader_tables, stackelberg_tables_gradient
from sim2real.leader_task import ConfigurableTables, GameTables
from sim2real.params import Params
from sim2real.solvers import optimal_values, policy_values

SETTINGS = ((0.5, 0.9, 0.9), (0.2, 0.8, 0.95), (1.0, 0.95, 0.7))
"""temperature, follower's discount, leader's discount"""


@dataclass(frozen=True)
class Instance:
    """A random problem: tables and leader policy of theta, with temperature and discounts."""

    game: Callable[[Params], GameTables]
    leader_policy: Callable[[Params], Tensor]
    theta: Params
    temperature: float
    follower_discount: float
    leader_discount: float


def instance(seed: int, *, leader_actions: int, states: int = 5, actions: int = 3, size: int = 4) -> Instance:
    """A game; with one leader action it is a configurable MDP."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    table = (states, leader_actions, actions)
    base = {"leader": draw(*table), "follower": draw(*table), "kernel": draw(*table, states), "start": draw(states)}
    slope = {key: 0.7 * draw(size, *value.shape) for key, value in base.items()}
    lead, lead_slope = draw(states, leader_actions), draw(size, states, leader_actions)

    def moved(theta: Params, key: str) -> Tensor:
        return torch.einsum("d,d...->...", theta["x"], slope[key])

    def game(theta: Params) -> GameTables:
        return GameTables(
            base["leader"] + torch.sin(moved(theta, "leader")),
            base["follower"] + torch.tanh(moved(theta, "follower")),
            torch.softmax(base["start"] + moved(theta, "start"), -1),
            torch.softmax(base["kernel"] + moved(theta, "kernel"), -1),
        )

    def leader_policy(theta: Params) -> Tensor:
        return torch.softmax(lead + torch.einsum("d,dsb->sb", theta["x"], lead_slope), -1)

    return Instance(game, leader_policy, {"x": 0.3 * draw(size)}, *SETTINGS[seed % 3])


def configurable(problem: Instance) -> Callable[[Params], ConfigurableTables]:
    """The tables without the axis of the single leader action."""

    def tables(theta: Params) -> ConfigurableTables:
        at = problem.game(theta)
        return ConfigurableTables(at.leader_reward[:, 0], at.follower_reward[:, 0], at.start, at.transition[:, 0])

    return tables


def pairs(problem: Instance) -> Callable[[Params], ConfigurableTables]:
    """The follower's own MDP in a game, over pairs of state and leader action."""
    return lambda theta: seen_leader_tables(problem.game(theta), problem.leader_policy(theta))


def follower(problem: Instance, tables: ConfigurableTables, *, order: int = 0) -> tuple[Tensor, Tensor]:
    """Policy and soft value, differentiable up to `order`."""
    assert tables.transition is not None
    best = optimal_values(
        tables.follower_reward,
        tables.transition,
        problem.follower_discount,
        temperature=problem.temperature,
        order=order,
        tol=1e-14,
        strict=True,
    )
    return torch.softmax(best.q / problem.temperature, -1), best.value


def leader_return(problem: Instance, tables: ConfigurableTables, *, order: int = 0) -> Tensor:
    """J through the follower's soft optimum."""
    policy, _ = follower(problem, tables, order=order)
    assert tables.transition is not None
    return tables.start @ policy_values(policy, tables.leader_reward, tables.transition, problem.leader_discount)


def exact_gradient(problem: Instance, tables: Callable[[Params], ConfigurableTables]) -> Tensor:
    x = problem.theta["x"].clone().requires_grad_()
    return torch.autograd.grad(leader_return(problem, tables({"x": x}), order=1), x)[0]


def differences(problem: Instance, tables: Callable[[Params], ConfigurableTables]) -> Tensor:
    """Central differences of steps h, h / 2, h / 4, extrapolated to order 6."""
    columns = []
    for unit in torch.eye(len(problem.theta["x"]), dtype=torch.float64):
        value = lambda h, unit=unit: leader_return(problem, tables({"x": problem.theta["x"] + h * unit}))
        rows = [(value(h) - value(-h)) / (2 * h) for h in (4e-3, 2e-3, 1e-3)]
        once = [(4 * fine - coarse) / 3 for coarse, fine in pairwise(rows)]
        columns.append((16 * once[1] - once[0]) / 15)
    return torch.stack(columns)


def theorem_1(problem: Instance, tables: Callable[[Params], ConfigurableTables]) -> Tensor:
    policy, value = follower(problem, tables(problem.theta))
    return boltzmann_tables_gradient(
        tables,
        problem.theta,
        policy,
        value,
        temperature=problem.temperature,
        leader_discount=problem.leader_discount,
        follower_discount=problem.follower_discount,
    ).grad["x"]


def theorem_2(problem: Instance) -> Tensor:
    at, f = problem.game(problem.theta), problem.leader_policy(problem.theta)
    policy, value = follower(problem, seen_leader_tables(at, f))
    shape = at.leader_reward.shape
    return stackelberg_tables_gradient(
        problem.game,
        problem.leader_policy,
        problem.theta,
        policy.reshape(shape),
        value.reshape(shape[:2]),
        temperature=problem.temperature,
        leader_discount=problem.leader_discount,
        follower_discount=problem.follower_discount,
    ).grad["x"]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def b_theorems(quick: bool) -> Iterator[Figure]:
    """Both theorems on 20 instances each."""
    count = 6 if quick else 20
    exact, differenced = [], []
    for seed in range(count):
        single, double = instance(seed, leader_actions=1), instance(seed, leader_actions=2, states=4)
        for found, problem, tables in (
            (theorem_1(single, configurable(single)), single, configurable(single)),
            (theorem_2(double), double, pairs(double)),
        ):
            exact.append(relative(found, exact_gradient(problem, tables)))
            differenced.append(relative(found, differences(problem, tables)))
    yield Figure("error", max(exact), "relative", 2 * count)
    yield Figure("differences", max(differenced), "relative", 2 * count)


if __name__ == "__main__":
    main({"b-theorems": b_theorems})
