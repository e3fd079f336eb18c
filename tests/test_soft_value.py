"""Soft returns and action values of models that end early, of discrete policies, and in doubt."""

import math
import warnings
from functools import partial

import pytest
import torch
from problems import scalar, seeded, stack
from test_hessian_free import (
    LAMBDA,
    MODEL,
    REAL,
    THETA,
    boltzmann,
    finite_model,
    lqr_log,
    lqr_model,
    soft,
    soft_optimum,
)

from sim2real.estimators import hessian_free_gradient, soft_action_value, soft_consistency, soft_return
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.params import Params
from sim2real.policy import linear_policy
from sim2real.rollout import expected_return
from sim2real.solve_report import UnconvergedWarning
from sim2real.solvers import linear_noise_policy, policy_optimum
from sim2real.tuning import tune_step

POLICY, NU, CUBIC = linear_policy(1, std=0.3), {"gain": stack([0.1])}, {"k": scalar(2.0)}


def log_density(theta: Params, s: torch.Tensor, a: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    z = (following - 10 * theta["k"] * s**3 - 0.1 * a) / 0.05
    return (-0.5 * z * z).sum(-1)


def cubic() -> ModelMDP:
    """Beyond |s| = 1 the state is not finite after eight more steps."""
    return ModelMDP(
        initial_state=lambda theta, e: e,
        step=lambda theta, s, a, e: 10 * theta["k"] * s**3 + 0.1 * a + 0.05 * e,
        reward=lambda theta, s, a, e, following: -following.square().sum(-1) - a.square().sum(-1),
        noise_dims=(1, 1),
        dt=0.1,
        discount=0.9,
        terminal=lambda theta, s: s[:, 0].abs() > 1.0,
        log_prob=log_density,
    )


def test_nothing_beyond_a_terminal_state_is_computed() -> None:
    noise = sample_noise(cubic(), POLICY, 64, 12, seeded(1))
    plain = expected_return(cubic(), POLICY, CUBIC, NU, noise)
    # without a bonus the soft return is the return
    torch.testing.assert_close(soft_return(cubic(), POLICY, CUBIC, NU, noise, temperature=0.0), plain)
    states, actions = noise.initial[:20], torch.zeros(20, 1, dtype=torch.float64)

    def value(theta: Params) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnconvergedWarning)
            return soft_action_value(
                cubic(), POLICY, theta, NU, noise, states, actions, temperature=0.1, method="pathwise"
            ).sum()

    (slope,) = torch.autograd.grad(value(theta := {"k": scalar(2.0).requires_grad_()}), theta["k"])
    # no rollout ends elsewhere for so small a change
    difference = (value({"k": scalar(2.0 + 1e-7)}) - value({"k": scalar(2.0 - 1e-7)})) / 2e-7
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=0)


def test_rollouts_that_end_early_are_named_where_derivatives_miss_the_end() -> None:
    noise = sample_noise(cubic(), POLICY, 8, 6, seeded(2))
    theta = {"k": scalar(2.0).requires_grad_()}
    start = (noise.initial, torch.zeros(8, 1, dtype=torch.float64))
    value = partial(soft_action_value, cubic(), POLICY, theta, NU, noise, *start, temperature=0.1)
    known = lambda nu, s: -s.square().sum(-1)
    for options in ({}, {"method": "mixed"}, {"soft_value": known}):
        with pytest.warns(UnconvergedWarning, match="end early"):
            value(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value(method="score")
        with torch.no_grad():
            value()  # a value alone misses nothing


def test_discrete_actions_have_no_soft_return_to_climb() -> None:
    # the reward carries no derivative in nu there, the entropy does: climbing that would be silently wrong
    mdp, policy, nu = finite_model(), boltzmann(), {"q": soft_optimum(THETA)}
    noise = sample_noise(mdp, policy, 16, 5, seeded(3))
    assert math.isfinite(float(soft_return(mdp, policy, THETA, nu, noise, temperature=LAMBDA)))
    with pytest.raises(ValueError, match="no derivative in nu"):
        policy_optimum(lambda th, at: soft_return(mdp, policy, th, at, noise, temperature=LAMBDA), THETA, nu)


def test_terminal_states_do_not_count_against_the_policy() -> None:
    policy, nu = (
        linear_noise_policy(1),
        soft(MODEL := {"A": stack([1.0, 0.2], [-0.1, 0.9]), "B": stack([0.1], [0.3])}),
    )
    mdp = lqr_model()
    ended = ModelMDP(**(vars(mdp) | {"terminal": lambda theta, s: s[:, 0] > 50.0}))
    noise = sample_noise(mdp, policy, 40, 30, seeded(4))
    states = torch.randn(20, 2, generator=seeded(5), dtype=torch.float64)
    beyond = stack([60.0, 0.0]).expand(20, 2)
    consistency = partial(soft_consistency, ended, policy, MODEL, nu, noise, temperature=LAMBDA)
    torch.testing.assert_close(consistency(torch.cat([states, beyond])), consistency(states))
    with pytest.raises(ValueError, match="all states are terminal"):
        consistency(beyond)


def test_states_that_share_their_noise_do_not_make_a_consistency_surer() -> None:
    policy, mdp = linear_noise_policy(1), lqr_model()
    nu = soft(MODEL)
    states = torch.randn(1, 2, generator=seeded(6), dtype=torch.float64).expand(200, 2)
    errors, stderrs = [], []
    for seed in range(40):
        noise = sample_noise(mdp, policy, 8, 40, seeded(100 + seed))
        gap, stderr = soft_consistency(mdp, policy, MODEL, nu, noise, states, temperature=LAMBDA)
        errors.append(float(gap))
        stderrs.append(float(stderr))
    # four pairs of rollouts, however many states: 200 taken for independent would say a seventh of it
    ratio = torch.tensor(stderrs).square().mean().sqrt() / torch.tensor(errors).std()
    assert 0.5 < float(ratio) < 2.0


def test_tune_does_not_trust_the_gradient_of_a_policy_that_is_no_soft_optimum() -> None:
    policy, mdp, log = linear_noise_policy(1), lqr_model(), lqr_log()
    noise = sample_noise(mdp, policy, 100, 30, seeded(7))
    hypergradient = partial(hessian_free_gradient, temperature=LAMBDA, groups=0)
    off = soft(MODEL) | {"gain": soft(MODEL)["gain"] + stack([0.5, 0.5])}
    for nu, trusted in ((soft(MODEL), True), (off, False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnconvergedWarning)
            out = tune_step(
                mdp,
                policy,
                MODEL,
                nu,
                log,
                noise,
                real_reward=None,
                real_discount=REAL,
                optimum=lambda theta, nu: nu,
                hypergradient=hypergradient,
            )
        assert out.report.converged is trusted, out.report.status
        assert ("nats from soft-optimal" in out.report.status) is not trusted
