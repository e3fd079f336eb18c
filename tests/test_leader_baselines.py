"""Naive, HPGD, SoBiRL and Bi-AC gradients on random finite problems with sampled episodes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import seeded
from test_boltzmann_covariance import enumerated, frozen, gradient, one_hot, world
from test_stackelberg import fixed_world, leader_of, table_policy
from test_stackelberg import world as game_world
from torch import Tensor

from benchmarks.theorems import Instance, configurable, exact_gradient, follower, instance, pairs, relative
from sim2real.estimators import (
    CriticOptions,
    bi_ac_gradient,
    boltzmann_covariance_gradient,
    hpgd_gradient,
    naive_leader_gradient,
    sobirl_gradient,
    stackelberg_gradient,
)
from sim2real.estimators.transitions import Transitions
from sim2real.leader_task import ConfigurableTables
from sim2real.policy import boltzmann_policy

ACTIONS = torch.arange(3.0, dtype=torch.float64).unsqueeze(-1)


def episodes(tables: ConfigurableTables, policy: Tensor, count: int, horizon: int, start: Tensor) -> Transitions:
    """On-policy transitions of indices; `start [count]`."""
    generator, state, rows = seeded(0), start, []
    assert tables.transition is not None
    for _ in range(horizon):
        action = torch.multinomial(policy[state], 1, generator=generator)[:, 0]
        after = torch.multinomial(tables.transition[state, action], 1, generator=generator)[:, 0]
        rows.append((state, action, tables.leader_reward[state, action], after))
        state = after
    s, a, r, after = (torch.stack(column, 1).flatten() for column in zip(*rows, strict=True))
    wide = lambda x: x.double().unsqueeze(-1)
    steps, episode = torch.arange(horizon).repeat(count), torch.arange(count).repeat_interleave(horizon)
    return Transitions(
        wide(s), wide(a), r, wide(after), torch.zeros_like(steps, dtype=torch.bool), steps, episode, wide(start)
    )


def inputs(problem: Instance) -> dict[str, Any]:
    """Everything but the data, tabular features."""
    _, value = follower(problem, configurable(problem)(problem.theta))
    return {
        "temperature": problem.temperature,
        "soft_value": lambda s: value[s[:, 0].long()],
        "source": "score",
        "critics": CriticOptions(lambda s, a: one_hot(15)(3 * s + a), one_hot(5)),
        "actions": ACTIONS,
    }


def sampled(problem: Instance, count: int) -> tuple[Any, Transitions]:
    """(task, policy, theta, nu) and data from states drawn uniformly."""
    tables = configurable(problem)(problem.theta)
    policy, _ = follower(problem, tables)
    start = torch.multinomial(tables.start, count, replacement=True, generator=seeded(1))
    data = episodes(tables, policy, count, 40, start)
    boltzmann = boltzmann_policy(lambda nu, s: nu["q"][s[:, 0].long()], 1.0)
    return (world(problem), boltzmann, problem.theta, {"q": policy.log()}), data


def without_start(problem: Instance) -> Tensor:
    """The exact gradient less that of the first state, which sampled estimators get by `start` alone."""
    return gradient(problem, frozen(configurable(problem), "start"))


@pytest.mark.parametrize("estimator", [boltzmann_covariance_gradient, hpgd_gradient], ids=["covariance", "hpgd"])
def test_sampled_gradients_point_along_the_exact_one(estimator: Callable[..., Any]) -> None:
    """12 000 transitions of a problem with 15 pairs; the exact direction within a cosine of 0.97 (one fixed draw)."""
    problem = instance(0, leader_actions=1)
    task, data = sampled(problem, 300)
    found = estimator(*task, data, **inputs(problem)).grad["x"]
    assert float(torch.nn.functional.cosine_similarity(found, without_start(problem), dim=0)) > 0.97


def test_hpgd_by_temporal_differences_and_from_other_transitions() -> None:
    problem = instance(0, leader_actions=1)
    task, data = sampled(problem, 300)
    expected = hpgd_gradient(*task, data, **inputs(problem)).grad["x"]
    td = hpgd_gradient(*task, data, **inputs(problem), values="td").grad["x"]
    oracle = hpgd_gradient(*task, data, **inputs(problem), value_data=data).grad["x"]
    assert float(torch.nn.functional.cosine_similarity(td, expected, dim=0)) > 0.95
    assert relative(oracle, expected) < 1e-9  # the same transitions handed in twice
    with pytest.raises(ValueError, match="values must be one of"):
        hpgd_gradient(*task, data, **inputs(problem), values="returns")


def test_naive_is_the_direct_part() -> None:
    problem = instance(2, leader_actions=1)
    data, rows, _, log_pi = enumerated(problem)
    policy = boltzmann_policy(lambda nu, s: nu["q"][s[:, 0].long()], 1.0)
    options = inputs(problem)
    options["critics"] = CriticOptions(lambda s, a: one_hot(15)(3 * s + a), one_hot(5), row_weights=rows)
    args = (world(problem), policy, problem.theta, {"q": log_pi}, data)
    naive = naive_leader_gradient(*args, **options).grad["x"]
    cold = boltzmann_covariance_gradient(*args, **options | {"temperature": 1e14}).grad["x"]
    assert relative(naive, cold) < 1e-9


def test_sobirl_is_naive_where_rewards_do_not_depend_on_actions() -> None:
    problem = instance(1, leader_actions=1)
    task, data = sampled(problem, 40)
    naive, other = (f(*task, data, **inputs(problem)).grad["x"] for f in (naive_leader_gradient, sobirl_gradient))
    assert relative(other, naive) > 1e-2
    mean = lambda theta: configurable(problem)(theta).follower_reward.mean(-1)
    of_state = lambda theta, s, a, e, after: mean(theta)[s[:, 0].long()]
    changed = replace(task[0], follower=replace(task[0].follower, reward=of_state))
    naive, other = (
        f(changed, *task[1:], data, **inputs(problem)).grad["x"] for f in (naive_leader_gradient, sobirl_gradient)
    )
    assert relative(other, naive) < 1e-9


def test_bi_ac_and_theorem_2_in_a_game() -> None:
    problem = fixed_world(instance(0, leader_actions=2, states=4))
    tables = pairs(problem)(problem.theta)
    g, value = follower(problem, tables)
    start = torch.multinomial(tables.start, 300, replacement=True, generator=seeded(2))
    flat = episodes(tables, g, 300, 40, start)
    split = lambda pair: (torch.div(pair, 2, rounding_mode="floor"), pair % 2)
    s, b = split(flat.states)
    after, _ = split(flat.next_states)
    data = Transitions(
        s, torch.cat([b, flat.actions], -1), flat.rewards, after, flat.ended, flat.step, flat.episode,
        split(flat.initial_states)[0],
    )  # fmt: skip
    args = (game_world(problem), leader_of(problem), table_policy(2), problem.theta, {"q": g.log()}, data)
    q_pair = lambda z: 2 * z[:, :1] + z[:, 1:]
    features = lambda z, a: one_hot(24)(3 * q_pair(z) + a)
    options = {
        "temperature": problem.temperature,
        "soft_value": lambda z: value[q_pair(z)[:, 0].long()],
        "critics": CriticOptions(features, lambda z: one_hot(8)(q_pair(z))),
        "actions": ACTIONS,
    }
    found = stackelberg_gradient(*args, **options).grad["x"]
    exact = exact_gradient(problem, pairs(problem))
    assert float(torch.nn.functional.cosine_similarity(found, exact, dim=0)) > 0.95
    choices = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    other = bi_ac_gradient(*args, **options, leader_actions=choices)
    assert bool(torch.isfinite(other.grad["x"]).all())
    assert float(other.grad["x"].norm()) > 0
    with pytest.raises(ValueError, match="sweeps"):
        bi_ac_gradient(*args, **options, leader_actions=choices, sweeps=0)
