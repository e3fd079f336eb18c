"""Theorem 2: on tables and from transitions, against the derivative of the whole game."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.theorems import (
    Instance,
    configurable,
    differences,
    exact_gradient,
    follower,
    instance,
    pairs,
    relative,
    theorem_1,
    theorem_2,
)
from sim2real.estimators import (
    CriticOptions,
    seen_leader_tables,
    stackelberg_gradient,
    stackelberg_tables_gradient,
    unseen_leader_tables,
)
from sim2real.estimators.stackelberg import game_transitions
from sim2real.estimators.transitions import Transitions
from sim2real.leader_task import ConfigurableTables, GameTables, LeaderTask
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.policy import Policy, boltzmann_policy
from sim2real.solvers import discounted_visits

EXACT = 1e-9
"""rounding of linear solves with conditions up to 1e3, and of values solved to 1e-14"""


@pytest.mark.parametrize("seed", range(6))
def test_theorem_2_on_tables(seed: int) -> None:
    problem = instance(seed, leader_actions=2, states=4)
    found = theorem_2(problem)
    assert relative(found, exact_gradient(problem, pairs(problem))) < EXACT
    assert relative(found, differences(problem, pairs(problem))) < 1e-8  # rounding over a step of 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_game_is_the_followers_configurable_mdp(seed: int) -> None:
    problem = instance(seed, leader_actions=2, states=4)
    assert relative(theorem_1(problem, pairs(problem)), theorem_2(problem)) < EXACT


@pytest.mark.parametrize("seed", range(3))
def test_one_leader_action_is_theorem_1(seed: int) -> None:
    problem = instance(seed, leader_actions=1)
    assert relative(theorem_2(problem), theorem_1(problem, configurable(problem))) < EXACT


@pytest.mark.parametrize("seed", range(3))
def test_a_follower_that_does_not_see_the_leader(seed: int) -> None:
    problem = instance(seed, leader_actions=2, states=4)
    tables = unseen(problem)
    assert relative(theorem_1(problem, tables), exact_gradient(problem, tables)) < EXACT
    # and it is another follower: its gradient is not that of the one that sees
    assert relative(theorem_1(problem, tables), theorem_2(problem)) > 1e-2


def unseen(problem: Instance) -> Callable[[Params], ConfigurableTables]:
    return lambda theta: unseen_leader_tables(problem.game(theta), problem.leader_policy(theta))


def gradient(problem: Instance, game: Callable[[Params], GameTables] | None = None, **changed: object) -> Tensor:
    """`stackelberg_tables_gradient` with some of its inputs replaced."""
    at, f = problem.game(problem.theta), problem.leader_policy(problem.theta)
    g, value = follower(problem, seen_leader_tables(at, f))
    shape = at.leader_reward.shape
    inputs = {
        "leader_policy": problem.leader_policy,
        "theta": problem.theta,
        "follower_policy": g.reshape(shape),
        "soft_value": value.reshape(shape[:2]),
        "temperature": problem.temperature,
        "leader_discount": problem.leader_discount,
        "follower_discount": problem.follower_discount,
    } | changed
    return stackelberg_tables_gradient(game or problem.game, **inputs).grad["x"]


def averaged_first(problem: Instance) -> dict[str, Any]:
    """The follower whose action values are averaged over the leader's action before the log-sum-exp."""
    at, f = problem.game(problem.theta), problem.leader_policy(problem.theta)
    q, temperature = torch.zeros_like(at.follower_reward), problem.temperature
    for _ in range(3000):
        value = temperature * torch.logsumexp(torch.einsum("sb,sba->sa", f, q) / temperature, -1)
        q = at.follower_reward + problem.follower_discount * at.transition @ value
    soft_value = temperature * torch.logsumexp(q / temperature, -1)
    return {"follower_policy": torch.softmax(q / temperature, -1), "soft_value": soft_value}


MISTAKES = {
    "discount of the leader in the inner sum": lambda p: gradient(p, follower_discount=p.leader_discount),
    "discount of the follower over time": lambda p: gradient(p, leader_discount=p.follower_discount),
    "normalised visits in the guiding term": lambda p: gradient(p, temperature=p.temperature / (1 - p.leader_discount)),
    "average over b before the log-sum-exp": lambda p: gradient(p, **averaged_first(p)),
    "leader's policy held fixed": lambda p: gradient(p, leader_policy=lambda th: p.leader_policy(th).detach()),
    "no guiding term (naive)": lambda p: gradient(p, temperature=1e12),
    "kernel held fixed": lambda p: gradient(
        p, lambda th: replace(p.game(th), transition=p.game(th).transition.detach())
    ),
    "start held fixed": lambda p: gradient(p, lambda th: replace(p.game(th), start=p.game(th).start.detach())),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_common_mistake_is_seen(mistake: str) -> None:
    problem = instance(2, leader_actions=2, states=4)  # two different discounts, temperature 1
    right = exact_gradient(problem, pairs(problem))
    assert relative(gradient(problem), right) < EXACT
    assert relative(MISTAKES[mistake](problem), right) > 1e-3


def test_games_that_do_not_fit() -> None:
    problem = instance(0, leader_actions=2, states=4)
    with pytest.raises(ValueError, match="soft_value must be"):
        gradient(problem, soft_value=torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="distribution"):
        gradient(problem, leader_policy=lambda theta: torch.ones(4, 2, dtype=torch.float64))


# ---- from transitions: every one of them, with its exact weight, stands for infinitely many samples


def fixed_world(problem: Instance) -> Instance:
    """Theta in the leader's policy alone, as in the theorem."""
    at = problem.game(problem.theta)
    return replace(problem, game=lambda theta: at)


def index(x: Tensor, column: int = 0) -> Tensor:
    return x[:, column].long()


def world(problem: Instance) -> LeaderTask:
    at = problem.game(problem.theta)
    look = lambda table, s, a: table[index(s), index(a), index(a, 1)]
    mdp = ModelMDP(
        initial_state=lambda theta, e0: e0[:, :1] * 0,
        step=lambda theta, s, a, e: s,
        reward=lambda theta, s, a, e, after: look(at.follower_reward, s, a),
        noise_dims=(1, 0),
        dt=1.0,
        discount=problem.follower_discount,
    )
    leader = lambda theta, s, a, after: look(at.leader_reward, s, a)
    return LeaderTask(mdp, leader, problem.leader_discount, leader_actions=1)


def leader_of(problem: Instance) -> Policy:
    def log_prob(theta: Params, s: Tensor, b: Tensor) -> Tensor:
        return problem.leader_policy(theta)[index(s), index(b)].log()

    return Policy(lambda theta, s, e: e, log_prob, noise_dim=1)


def one_hot(size: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nn.functional.one_hot(index(x), size).double()


def table_policy(width: int) -> Policy:
    return boltzmann_policy(lambda nu, z: nu["q"][index(z) if width == 1 else 2 * index(z) + index(z, 1)], 1.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_theorem_2_from_all_transitions(seed: int) -> None:
    """Episodes of two steps, (s, b, a, s'), (s', b', ...): the second step only tells b' and is dropped."""
    problem = fixed_world(instance(seed, leader_actions=2, states=4))
    tables = pairs(problem)(problem.theta)
    assert tables.transition is not None
    g, value = follower(problem, tables)
    visits = discounted_visits(tables.start, g, tables.transition, problem.leader_discount)
    share = g.unsqueeze(-1) * tables.transition  # [8, 3, 8]
    pair, a, after = (x.flatten() for x in torch.meshgrid(*map(torch.arange, share.shape), indexing="ij"))
    columns = lambda *xs: torch.stack([x.double() for x in xs], -1)
    count = len(pair)
    first = columns(pair // 2)
    states = torch.stack([first, columns(after // 2)], 1).flatten(0, 1)
    actions = torch.stack([columns(pair % 2, a), columns(after % 2, 0 * a)], 1).flatten(0, 1)
    rewards = problem.game(problem.theta).leader_reward[index(states), index(actions), index(actions, 1)]
    twice = torch.arange(2 * count)
    data = Transitions(
        states,
        actions,
        rewards,
        states.roll(-1, 0),
        torch.zeros(2 * count, dtype=torch.bool),
        twice % 2,
        twice // 2,
        first,
    )
    start = torch.arange(8)
    q_pair = lambda z: 2 * z[:, :1] + z[:, 1:]
    estimate = stackelberg_gradient(
        world(problem),
        leader_of(problem),
        table_policy(2),
        problem.theta,
        {"q": g.log()},
        data,
        temperature=problem.temperature,
        soft_value=lambda z: value[index(q_pair(z))],
        critics=CriticOptions(
            lambda z, a: one_hot(24)(3 * q_pair(z) + a), lambda z: one_hot(8)(q_pair(z)), row_weights=share.flatten()
        ),
        actions=torch.arange(3.0, dtype=torch.float64).unsqueeze(-1),
        weights=(visits[:, None, None] * share).flatten(),
        start=lambda theta: (columns(start // 2, start % 2), pairs(problem)(theta).start),
    )
    assert relative(estimate.grad["x"], exact_gradient(problem, pairs(problem))) < EXACT


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_unseen_leader_from_all_transitions(seed: int) -> None:
    problem = fixed_world(instance(seed, leader_actions=2, states=4))
    at, f = problem.game(problem.theta), problem.leader_policy(problem.theta)
    tables = unseen(problem)(problem.theta)
    assert tables.transition is not None
    g, value = follower(problem, tables)
    visits = discounted_visits(tables.start, g, tables.transition, problem.leader_discount)
    share = torch.einsum("sb,sa,sbax->sbax", f, g, at.transition)
    s, b, a, after = (x.flatten().double() for x in torch.meshgrid(*map(torch.arange, share.shape), indexing="ij"))
    whole = torch.zeros(len(s), dtype=torch.long)
    rewards = at.leader_reward.unsqueeze(-1).expand_as(share).flatten()
    data = Transitions(
        s[:, None], torch.stack([b, a], -1), rewards, after[:, None], whole.bool(), whole, whole, s[:1, None]
    )
    estimate = stackelberg_gradient(
        world(problem),
        leader_of(problem),
        table_policy(1),
        problem.theta,
        {"q": g.log()},
        data,
        temperature=problem.temperature,
        soft_value=lambda z: value[index(z)],
        sees_leader=False,
        critics=CriticOptions(lambda z, a: one_hot(12)(3 * z + a), one_hot(4), row_weights=share.flatten()),
        actions=torch.arange(3.0, dtype=torch.float64).unsqueeze(-1),
        weights=(visits[:, None, None, None] * share).flatten(),
    )
    assert relative(estimate.grad["x"], exact_gradient(problem, unseen(problem))) < EXACT


def test_the_last_step_of_a_cut_episode_is_dropped() -> None:
    problem = instance(0, leader_actions=2, states=4)
    column = lambda *xs: torch.tensor(xs, dtype=torch.float64).unsqueeze(-1)
    actions = torch.tensor([[0.0, 2], [1, 1], [1, 0], [0, 2]], dtype=torch.float64)
    data = Transitions(
        column(0, 1, 2, 3), actions, column(5, 6, 7, 8)[:, 0], column(1, 2, 3, 0),
        torch.tensor([False, False, False, True]), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), column(0, 2),
    )  # fmt: skip
    kept = game_transitions(world(problem), data)
    assert kept.rewards.tolist() == [5, 7, 8]  # the second step was cut short, the fourth has ended
    assert kept.next_states[:2].tolist() == [[1, 1], [3, 0]]
    assert kept.initial_states.tolist() == [[0, 0], [2, 1]]
    assert len(game_transitions(world(problem), data, sees_leader=False).rewards) == 4


def test_options_that_do_not_fit() -> None:
    problem = instance(0, leader_actions=2, states=4)
    task = world(problem)
    data = Transitions(*(torch.zeros(1, 2, dtype=torch.float64) for _ in range(8)))

    def run(task: LeaderTask, **options: object) -> None:
        stackelberg_gradient(
            task, leader_of(problem), table_policy(2), problem.theta, {}, data, temperature=1.0,
            soft_value=lambda z: z[:, 0], **options,
        )  # fmt: skip

    with pytest.raises(ValueError, match="leader_actions = 0"):
        run(replace(task, leader_actions=0))
    with pytest.raises(ValueError, match='source="score"'):
        run(task, sees_leader=False, source="pathwise")
