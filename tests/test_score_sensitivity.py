"""Second-order score functions: all four variance levels against exact second derivatives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import gaussian_return, linear_gaussian_problem, scalar, seeded
from torch import Tensor
from torch.func import grad, hessian, jacrev

from benchmarks.samples import problem, relative_error
from sim2real import (
    ModelMDP,
    Params,
    UnconvergedError,
    UnconvergedWarning,
    boltzmann_policy,
    dot,
    linear_policy,
    ravel,
    sample_noise,
    unravel,
)
from sim2real.estimators.model_critic import model_critic
from sim2real.estimators.score_sensitivity import SecondOrder, score_sensitivity, second_order

LEVELS = ("plain", "baseline", "causal", "critic")


def exact(J, theta: Params, nu: Params) -> tuple[Tensor, Tensor, Tensor]:
    """grad_nu J, J_nunu and J_nutheta of a closed form, on raveled parameters."""
    f = lambda x, y: J(unravel(y, theta), unravel(x, nu))
    x, y = ravel(nu), ravel(theta)
    return grad(f)(x, y), hessian(f)(x, y), jacrev(grad(f), argnums=1)(x, y)


def worst_z(parts: SecondOrder, expected: tuple[Tensor, Tensor, Tensor]) -> float:
    """Largest error of gradient, H and C in standard errors over the groups."""
    figures = []
    for found, true in zip(vars(parts).values(), expected, strict=True):
        stderr = found.std(0) / len(found) ** 0.5
        figures.append(float(((found.mean(0) - true).abs() / (stderr + 1e-12)).max()))
    return max(figures)


@pytest.mark.parametrize("variance", ["plain", "baseline", "causal"])
def test_levels_without_a_critic_are_unbiased(variance: str) -> None:
    """18 entries of a 6-step rollout, 5 standard errors of 100 groups: 3e-5 false alarms."""
    mdp, policy, theta, nu = linear_gaussian_problem()
    noise = sample_noise(mdp, policy, 8000, 6, seeded(0))
    parts = second_order(mdp, policy, theta, nu, noise, variance=variance, critic=None, groups=100)
    assert worst_z(parts, exact(lambda th, n: gaussian_return(th, n, 6), theta, nu)) < 5


def test_the_critic_level_is_right_where_features_span_q() -> None:
    """Long rollouts, because a critic means the infinite horizon; 5 standard errors of 50 groups: 1e-4 false alarms."""
    mdp, policy, theta, nu = linear_gaussian_problem()
    mdp = replace(mdp, discount=0.8)
    noise = sample_noise(mdp, policy, 2000, 40, seeded(1))
    critic = model_critic(mdp, policy, theta, nu, noise, derivative="score", groups=1)
    parts = second_order(mdp, policy, theta, nu, noise, variance="critic", critic=critic, groups=50)
    assert worst_z(parts, exact(lambda th, n: discounted(th, n, 0.8), theta, nu)) < 5
    g, v = {"gain": torch.ones(1, 2).double()}, {"A": torch.ones(2, 2).double(), "B": -torch.ones(2, 1).double()}
    found = score_sensitivity(mdp, policy, theta, nu, noise, critic=critic, tolerance=1e9, damping=3.0, cotangent=g)
    assert found.report.error_bound == pytest.approx(2 * float(found.info["stderr"].norm()))
    assert float(dot(found.vjp(g), v)) == pytest.approx(float(dot(found.jvp(v), g)), rel=1e-9)
    promised = 0.5 * float(found.info["newton_step"] @ found.info["gradient"])
    assert float(found.info["gain"]) == pytest.approx(promised, rel=1e-9)


def discounted(theta: Params, nu: Params, discount: float) -> Tensor:
    """`gaussian_return` with another discount, to its end."""
    eye, K = torch.eye(2, dtype=torch.float64), nu["gain"]
    closed, second, total = theta["A"] - theta["B"] @ K, eye, torch.zeros((), dtype=torch.float64)
    for t in range(80):
        total = total - discount**t * (((eye + K.mT @ K) * second).sum() + 0.4**2)
        second = closed @ second @ closed.mT + 0.4**2 * theta["B"] @ theta["B"].mT + 0.05 * eye
    return total


def test_each_level_has_less_variance_than_the_one_before() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    noise = sample_noise(mdp, policy, 1000, 25, seeded(2))
    figures = []
    critic = model_critic(mdp, policy, theta, nu, noise, derivative="score", groups=1)
    for variance in LEVELS:
        parts = second_order(mdp, policy, theta, nu, noise, variance=variance, critic=critic, groups=20)
        figures.append(float((parts.hessian.std(0).square().sum() + parts.cross.std(0).square().sum()).sqrt()))
    # measured ratios of 2 to 4 per level; a spread over 20 groups is known to 16 %
    assert figures[3] < 0.7 * figures[2] < 0.7 * figures[1] < 0.7 * figures[0]


def test_standard_errors_fall_as_the_root_of_n() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    figures = []
    for batch in (400, 6400):
        noise = sample_noise(mdp, policy, batch, 10, seeded(3))
        parts = second_order(mdp, policy, theta, nu, noise, variance="causal", critic=None, groups=40)
        figures.append(float((parts.hessian.std(0) / 40**0.5).norm()))
    # sixteen times the rollouts; each figure known to 11 % over 40 groups
    assert figures[0] / figures[1] == pytest.approx(4.0, rel=0.5)


def chain() -> ModelMDP:
    """States 0 and 1; the action may fail with probability 1 - p(theta); state 2 ends the run."""

    def log_prob(theta: Params, s: Tensor, a: Tensor, after: Tensor) -> Tensor:
        p = torch.sigmoid(theta["skill"])
        return torch.where(after[:, 0] == a[:, 0], p, 1 - p).log()

    def step(theta: Params, s: Tensor, a: Tensor, e: Tensor) -> Tensor:
        works = torch.special.ndtr(e) < torch.sigmoid(theta["skill"])
        return torch.where(works, a, (a + 1) % 3).detach()  # a failed action goes on to the next state, cyclically

    return ModelMDP(
        initial_state=lambda theta, e: torch.zeros(len(e), 1, dtype=torch.float64),
        step=step,
        reward=lambda theta, s, a, e, after: theta["pay"] * after[:, 0] - 0.3 * s[:, 0] * a[:, 0],
        noise_dims=(0, 1),
        dt=1.0,
        discount=0.9,
        terminal=lambda theta, s: s[:, 0] > 1.5,
        log_prob=log_prob,
        derivative_order=0,
    )


def chain_policy():
    return boltzmann_policy(lambda nu, s: nu["q"].expand(len(s), 3) + nu["slope"] * s * torch.arange(3.0), 1.0)


@pytest.mark.parametrize("variance", LEVELS)
def test_discrete_actions_and_ends_equal_the_recursion(variance: str) -> None:
    """A black box with three actions, ending runs, theta in density and reward: 12 entries, 5 standard errors of 80
    groups, 1e-4 false alarms. The critic gets one feature per state and action, so it means the infinite horizon."""
    mdp, policy = chain(), chain_policy()
    theta = {"skill": scalar(1.0), "pay": scalar(1.5)}
    nu = {"q": torch.tensor([0.2, -0.1, -0.5], dtype=torch.float64), "slope": scalar(0.3)}
    steps = 40 if variance == "critic" else 3
    noise = sample_noise(mdp, policy, 2000 if variance == "critic" else 8000, steps, seeded(4))
    critic = None
    if variance == "critic":
        cells = lambda s, a: torch.nn.functional.one_hot((3 * s[:, 0].clamp(max=1) + a[:, 0]).long(), 6).double()
        three = torch.arange(3.0).double().unsqueeze(-1)
        critic = model_critic(mdp, policy, theta, nu, noise, features=cells, actions=three, groups=1)
    parts = second_order(mdp, policy, theta, nu, noise, variance=variance, critic=critic, groups=80)
    assert worst_z(parts, exact(lambda th, n: tabular(th, n, steps), theta, nu)) < 5


def tabular(theta: Params, nu: Params, steps: int) -> Tensor:
    """Exact return of the chain, by backward recursion over its two states."""
    mdp, policy = chain(), chain_policy()
    skill = torch.sigmoid(theta["skill"])
    one = lambda x: torch.full((1, 1), float(x), dtype=torch.float64)
    rows, rewards = [], []
    for s in (0.0, 1.0):
        row, reward = [torch.zeros((), dtype=torch.float64) for _ in range(3)], torch.zeros((), dtype=torch.float64)
        for a in range(3):
            pi = policy.log_prob(nu, one(s), one(a))[0].exp()
            for after, chance in ((a, skill), ((a + 1) % 3, 1 - skill)):
                row[after] = row[after] + pi * chance
                reward = reward + pi * chance * mdp.reward(theta, one(s), one(a), one(0), one(after))[0]
        rows.append(torch.stack(row[:2]))
        rewards.append(reward)
    transition, reward = torch.stack(rows), torch.stack(rewards)
    value = torch.zeros(2, dtype=torch.float64)
    for _ in range(steps):
        value = reward + 0.9 * transition @ value
    return value[0]


def test_a_first_state_that_depends_on_theta_keeps_its_derivative() -> None:
    """One step: the return and its second derivatives in closed form; 5 standard errors of 100 groups."""
    mdp, policy, theta, nu = linear_gaussian_problem()
    moved = replace(mdp, initial_state=lambda theta, e: theta["start"] + e)
    theta = {**theta, "start": torch.tensor([0.7, -0.4], dtype=torch.float64)}

    def one_step(th: Params, n: Params) -> Tensor:
        second = torch.eye(2).double() + torch.outer(th["start"], th["start"])
        return -((torch.eye(2).double() + n["gain"].mT @ n["gain"]) * second).sum() - 0.4**2

    noise = sample_noise(moved, policy, 8000, 1, seeded(5))
    parts = second_order(moved, policy, theta, nu, noise, variance="causal", critic=None, groups=100)
    assert worst_z(parts, exact(one_step, theta, nu)) < 5


def test_the_reference_problem_at_twenty_thousand_transitions() -> None:
    """Bars at 1e5: 0.50 with a fitted critic; 20 000 transitions: 1.1. The literal estimator is far off and told."""
    p = problem()
    noise = sample_noise(p.mdp, p.policy, 500, 40, seeded(0))
    assert relative_error(score_sensitivity(p.mdp, p.policy, p.theta, p.nu, noise), p) < 1.1
    with pytest.warns(UnconvergedWarning, match="not positive definite"):
        plain = score_sensitivity(p.mdp, p.policy, p.theta, p.nu, noise, variance="plain")
    assert plain.report.negative_curvature is not None
    assert relative_error(plain, p) > 2.0
    with pytest.raises(UnconvergedError, match="not positive definite"):
        score_sensitivity(p.mdp, p.policy, p.theta, p.nu, noise, variance="plain", strict=True)
    away = {"gain": 0.4 * p.nu["gain"]}
    with pytest.warns(UnconvergedWarning, match="not stationary"):
        score_sensitivity(p.mdp, p.policy, p.theta, away, noise, damping=5.0)


def test_bad_requests_are_named() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    noise = sample_noise(mdp, policy, 40, 5, seeded(0))
    with pytest.raises(ValueError, match="variance must be"):
        score_sensitivity(mdp, policy, theta, nu, noise, variance="none")
    with pytest.raises(ValueError, match="declares no log_prob"):
        score_sensitivity(replace(mdp, log_prob=None), policy, theta, nu, noise)
    with pytest.raises(ValueError, match="groups must be at least 2"):
        score_sensitivity(mdp, policy, theta, nu, noise, groups=21)
    sure = linear_policy(1)
    silent = sample_noise(mdp, sure, 40, 5, seeded(0))
    with pytest.raises(ValueError, match="deterministic policy has no log_prob"):
        score_sensitivity(mdp, sure, theta, nu, silent, variance="causal")
    with pytest.raises(ValueError, match="too many for second-order scores"):
        score_sensitivity(mdp, policy, theta, {"gain": torch.zeros(1, 3000)}, noise, variance="causal")
    flat = replace(policy, log_prob=lambda nu, s, a: torch.zeros(len(s)).double())
    level = replace(mdp, log_prob=lambda theta, s, a, after: torch.zeros(len(s)).double())
    with pytest.raises(ValueError, match="depend neither on nu"):
        score_sensitivity(level, flat, theta, nu, noise, variance="causal")
    with pytest.raises(ValueError, match="needs a critic"):
        second_order(mdp, policy, theta, nu, noise, variance="critic", critic=None, groups=2)
