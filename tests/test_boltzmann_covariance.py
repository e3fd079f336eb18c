"""Theorem 1: on tables and from transitions, against the derivative of the whole two-level problem."""

from collections.abc import Callable
from dataclasses import replace

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
    leader_return,
    relative,
    theorem_1,
)
from sim2real.estimators import CriticOptions, boltzmann_covariance_gradient, boltzmann_tables_gradient
from sim2real.estimators.leader_view import look, sources
from sim2real.estimators.transitions import Transitions
from sim2real.leader_task import ConfigurableTables, LeaderTask
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.policy import boltzmann_policy
from sim2real.solvers import discounted_visits

EXACT = 1e-9
"""rounding of linear solves with conditions up to 1e3, and of values solved to 1e-14"""


@pytest.mark.parametrize("seed", range(6))
def test_theorem_1_on_tables(seed: int) -> None:
    problem = instance(seed, leader_actions=1)
    tables = configurable(problem)
    found = theorem_1(problem, tables)
    assert relative(found, exact_gradient(problem, tables)) < EXACT
    assert relative(found, differences(problem, tables)) < 1e-8  # rounding over a step of 1e-3


def gradient(problem: Instance, tables: Callable[[Params], ConfigurableTables], **changed: object) -> Tensor:
    """`boltzmann_tables_gradient` with some of its inputs replaced."""
    policy, value = follower(problem, tables(problem.theta))
    inputs = {
        "policy": policy,
        "soft_value": value,
        "temperature": problem.temperature,
        "leader_discount": problem.leader_discount,
        "follower_discount": problem.follower_discount,
    } | changed
    return boltzmann_tables_gradient(tables, problem.theta, **inputs).grad["x"]


def frozen(tables: Callable[[Params], ConfigurableTables], *names: str) -> Callable[[Params], ConfigurableTables]:
    """Tables without the derivative of those named."""

    def partly(theta: Params) -> ConfigurableTables:
        at = tables(theta)
        return replace(at, **{name: getattr(at, name).detach() for name in names})

    return partly


MISTAKES = {
    "discount of the leader in the inner sum": lambda p, t: gradient(p, t, follower_discount=p.leader_discount),
    "discount of the follower over time": lambda p, t: gradient(p, t, leader_discount=p.follower_discount),
    "normalised visits without 1 / (1 - gamma_L) in the guiding term": lambda p, t: gradient(
        p, t, temperature=p.temperature / (1 - p.leader_discount)
    ),
    "hard value in place of the soft one": lambda p, t: gradient(p, t, soft_value=hard_value(p, t)),
    "no initial-state term": lambda p, t: gradient(p, frozen(t, "start")),
    "no transition terms": lambda p, t: gradient(p, frozen(t, "transition")),
    "no source from the follower's reward": lambda p, t: gradient(p, frozen(t, "follower_reward")),
    "no direct reward term": lambda p, t: gradient(p, frozen(t, "leader_reward")),
    "no guiding term (naive)": lambda p, t: gradient(p, t, temperature=1e12),
}


def hard_value(problem: Instance, tables: Callable[[Params], ConfigurableTables]) -> Tensor:
    """Return of the follower without its entropy."""
    at = tables(problem.theta)
    policy, _ = follower(problem, at)
    assert at.transition is not None
    closed = torch.einsum("sa,sax->sx", policy, at.transition)
    eye = torch.eye(len(closed), dtype=closed.dtype)
    return torch.linalg.solve(eye - problem.follower_discount * closed, (policy * at.follower_reward).sum(-1))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_common_mistake_is_seen(mistake: str) -> None:
    problem = instance(2, leader_actions=1)  # two different discounts, temperature 1
    tables = configurable(problem)
    right = exact_gradient(problem, tables)
    assert relative(gradient(problem, tables), right) < EXACT
    assert relative(MISTAKES[mistake](problem, tables), right) > 1e-3


def test_an_estimated_kernel_moves_by_its_score() -> None:
    """With the exact kernel handed in as an estimate, `P grad log p` is `grad P`."""
    problem = instance(2, leader_actions=1)
    tables = configurable(problem)
    kernel = tables(problem.theta).transition
    assert relative(gradient(problem, tables, transition=kernel), exact_gradient(problem, tables)) < EXACT


def test_tables_that_do_not_fit() -> None:
    problem = instance(0, leader_actions=1)
    tables = configurable(problem)
    with pytest.raises(ValueError, match="follower_discount must lie"):
        gradient(problem, tables, follower_discount=1.0)
    with pytest.raises(ValueError, match="distribution"):
        gradient(problem, tables, policy=torch.ones(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="soft_value must be"):
        gradient(problem, tables, soft_value=torch.zeros(4, dtype=torch.float64))
    without = lambda theta: replace(tables(theta), transition=None)
    with pytest.raises(ValueError, match="pass one"):
        boltzmann_tables_gradient(
            without,
            problem.theta,
            torch.full((5, 3), 1 / 3, dtype=torch.float64),
            torch.zeros(5, dtype=torch.float64),
            temperature=1.0,
            leader_discount=0.9,
            follower_discount=0.9,
        )
    still = lambda theta: ConfigurableTables(*(x.detach() for x in vars(tables(theta)).values()))
    with pytest.raises(ValueError, match="nothing here depends"):
        gradient(problem, still)


# ---- from transitions: every (s, a, s') once, with its exact weight, stands for infinitely many samples


def world(problem: Instance) -> LeaderTask:
    """The tables as a model with states `[N, 1]` and actions `[N, 1]` that are indices."""
    tables = configurable(problem)
    at = lambda table, *index: table[tuple(x[:, 0].long() for x in index)]

    def log_prob(theta: Params, state: Tensor, action: Tensor, after: Tensor) -> Tensor:
        transition = tables(theta).transition
        assert transition is not None
        return at(transition, state, action, after).log()

    mdp = ModelMDP(
        initial_state=lambda theta, e0: e0[:, :1] * 0,
        step=lambda theta, s, a, e: s,
        reward=lambda theta, s, a, e, after: at(tables(theta).follower_reward, s, a),
        noise_dims=(1, 0),
        dt=1.0,
        discount=problem.follower_discount,
        log_prob=log_prob,
    )
    return LeaderTask(mdp, lambda theta, s, a, after: at(tables(theta).leader_reward, s, a), problem.leader_discount)


def one_hot(size: int) -> Callable[[Tensor], Tensor]:
    return lambda index: torch.nn.functional.one_hot(index[:, 0].long(), size).double()


def enumerated(problem: Instance) -> tuple[Transitions, Tensor, Tensor, Tensor]:
    """Every transition as data, its row weight, its weight in the outer sum, and log pi."""
    at = configurable(problem)(problem.theta)
    assert at.transition is not None
    policy, _ = follower(problem, at)
    visits = discounted_visits(at.start, policy, at.transition, problem.leader_discount)
    share = policy.unsqueeze(-1) * at.transition
    s, a, after = (
        x.flatten().unsqueeze(-1).double() for x in torch.meshgrid(*map(torch.arange, share.shape), indexing="ij")
    )
    count = len(s)
    whole = torch.zeros(count, dtype=torch.long)
    rewards = at.leader_reward.unsqueeze(-1).expand_as(share).flatten()
    first = torch.arange(5.0, dtype=torch.float64).unsqueeze(-1)
    data = Transitions(s, a, rewards, after, whole.bool(), whole, whole, first)
    return data, share.flatten(), (visits[:, None, None] * share).flatten(), policy.log()


@pytest.mark.parametrize("guiding", ["summed", "taken"])
@pytest.mark.parametrize("centring", ["double", "single"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_theorem_1_from_all_transitions(guiding: str, centring: str, seed: int) -> None:
    problem = instance(seed, leader_actions=1)
    tables = configurable(problem)
    data, rows, outer, log_pi = enumerated(problem)
    _, value = follower(problem, tables(problem.theta))
    states = torch.arange(5.0, dtype=torch.float64).unsqueeze(-1)
    pair = lambda s, a: one_hot(15)(3 * s + a)
    estimate = boltzmann_covariance_gradient(
        world(problem),
        boltzmann_policy(lambda nu, s: nu["q"][s[:, 0].long()], 1.0),
        problem.theta,
        {"q": log_pi},
        data,
        temperature=problem.temperature,
        soft_value=lambda s: value[s[:, 0].long()],
        source="score",
        critics=CriticOptions(pair, one_hot(5), row_weights=rows, guiding=guiding, centring=centring),
        actions=torch.arange(3.0, dtype=torch.float64).unsqueeze(-1),
        weights=outer,
        start=lambda theta: (states, tables(theta).start),
    )
    assert relative(estimate.grad["x"], exact_gradient(problem, tables)) < EXACT
    expected = leader_return(problem, tables(problem.theta))
    assert float(estimate.value) == pytest.approx(float(expected), rel=1e-9)


def test_visits_of_the_value_critic_are_the_discounted_ones() -> None:
    problem = instance(1, leader_actions=1)
    tables = configurable(problem)
    data, rows, outer, log_pi = enumerated(problem)
    states = torch.arange(5.0, dtype=torch.float64).unsqueeze(-1)
    _, value = follower(problem, tables(problem.theta))
    estimate = boltzmann_covariance_gradient(
        world(problem),
        boltzmann_policy(lambda nu, s: nu["q"][s[:, 0].long()], 1.0),
        problem.theta,
        {"q": log_pi},
        data,
        temperature=problem.temperature,
        soft_value=lambda s: value[s[:, 0].long()],
        source="score",
        critics=CriticOptions(lambda s, a: one_hot(15)(3 * s + a), one_hot(5), row_weights=rows),
        actions=torch.arange(3.0, dtype=torch.float64).unsqueeze(-1),
        start=lambda theta: (states, tables(theta).start),
    )
    assert torch.allclose(estimate.info["outer_weights"], outer, rtol=1e-9)
    assert relative(estimate.grad["x"], exact_gradient(problem, tables)) < EXACT


def test_the_baseline_of_scores_is_cross_fitted_too() -> None:
    """One feature per row: a fit without the row knows nothing of it, so the baseline there is 0, not the target."""
    problem = instance(0, leader_actions=1)
    data, rows, _, log_pi = enumerated(problem)
    data = replace(data, episode=torch.arange(len(rows)) % 5)
    critics = CriticOptions(lambda s, a: torch.eye(len(s), dtype=s.dtype), one_hot(5), row_weights=rows, folds=5)
    policy, task = boltzmann_policy(lambda nu, s: nu["q"][s[:, 0].long()], 1.0), world(problem)
    seen = look(task, policy, problem.theta, {"q": log_pi}, data, lambda s: s[:, 0], critics=critics, actions=None)
    leader, follower_part = sources(seen, "score")
    log_prob = task.follower.log_prob(problem.theta, data.states, data.actions, data.next_states)
    values = seen.value_weights[data.episode, data.next_states[:, 0].long()]
    torch.testing.assert_close((leader - data.rewards) / log_prob, data.rewards + task.discount * values)
    reward = task.follower.reward(problem.theta, data.states, data.actions, data.rewards, data.next_states)
    target = reward + task.follower.discount * data.next_states[:, 0]
    torch.testing.assert_close((follower_part - reward) / log_prob, target)


def test_options_that_do_not_fit() -> None:
    problem = instance(0, leader_actions=1)
    data, rows, _, log_pi = enumerated(problem)
    policy = boltzmann_policy(lambda nu, s: nu["q"][s[:, 0].long()], 1.0)

    def run(critics: CriticOptions, **options: object) -> None:
        arguments = {"task": world(problem), "soft_value": lambda s: s[:, 0], "source": "score"} | options
        boltzmann_covariance_gradient(
            policy=policy, theta=problem.theta, nu={"q": log_pi}, data=data, temperature=1.0,
            critics=critics, actions=torch.arange(3.0, dtype=torch.float64).unsqueeze(-1), **arguments,
        )  # fmt: skip

    good = CriticOptions(lambda s, a: one_hot(15)(3 * s + a), one_hot(5), row_weights=rows)
    with pytest.raises(ValueError, match='source="pathwise"'):
        run(replace(good, kind="state"))
    with pytest.raises(ValueError, match="row_weights must be"):
        run(replace(good, row_weights=rows[1:]))
    with pytest.raises(ValueError, match="weights must be"):
        run(good, weights=rows[1:])
    with pytest.raises(ValueError, match="folds must be"):
        run(replace(good, folds=9))
    with pytest.raises(ValueError, match="shares of shape"):
        run(good, start=lambda theta: (torch.zeros(2, 1, dtype=torch.float64), torch.ones(3, dtype=torch.float64)))
    for wrong in ({"kind": "states"}, {"guiding": "sum"}, {"centring": "none"}, {"ridge": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            run(replace(good, **wrong))
    with pytest.raises(ValueError, match="source must be one of"):
        run(good, source="scores")
    with pytest.raises(ValueError, match=r"leader_value gave \(75, 1\)"):
        run(replace(good, leader_value=lambda s: s))
    with pytest.raises(ValueError, match=r"soft_value gave \(75, 1\)"):
        run(good, soft_value=lambda s: s)
    with pytest.raises(ValueError, match="use stackelberg_gradient"):
        run(good, task=replace(world(problem), leader_actions=1))
