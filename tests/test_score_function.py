"""Score-function gradients against the closed form of a linear-Gaussian problem and an enumerated one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from problems import gaussian_return, linear_gaussian_problem, scalar, seeded
from torch import Tensor

from sim2real import ModelMDP, Params, boltzmann_policy, linear_policy, ravel, sample_noise
from sim2real.estimators import pathwise_gradient, score_function_gradient


@pytest.mark.parametrize("wrt", ["nu", "theta"])
def test_mean_over_seeds_is_within_four_standard_errors_of_the_closed_form(wrt: str) -> None:
    """20 seeds of 2000 rollouts; false-alarm rate below 1 % over the entries (t(19) beyond 4: 8e-4 each)."""
    mdp, policy, theta, nu = linear_gaussian_problem()
    grads, told = [], []
    for seed in range(20):
        noise = sample_noise(mdp, policy, 2000, 6, seeded(seed))
        estimate = score_function_gradient(mdp, policy, theta, nu, noise, wrt=wrt, groups=20)
        grads.append(ravel(estimate.grad))
        told.append(estimate.info["stderr"])
    leaves = {key: value.clone().requires_grad_() for key, value in (nu if wrt == "nu" else theta).items()}
    value = gaussian_return(*((theta, leaves) if wrt == "nu" else (leaves, nu)), 6)
    exact = ravel(dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True)))
    stacked = torch.stack(grads)
    error = stacked.mean(0) - exact
    assert bool((error.abs() <= 4 * stacked.std(0) / 20**0.5).all()), error
    # relative error of a spread over 20 seeds: 16 %; four of them
    torch.testing.assert_close(torch.stack(told).mean(0), stacked.std(0), rtol=0.65, atol=0)


def test_standard_error_falls_as_the_root_of_n() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    figures = []
    for batch in (250, 4000):
        seeds = [
            score_function_gradient(mdp, policy, theta, nu, sample_noise(mdp, policy, batch, 6, seeded(s)), groups=20)
            for s in range(20)
        ]
        figures.append(float(torch.stack([estimate.info["stderr"] for estimate in seeds]).mean()))
    # sixteen times the rollouts, a quarter of the error; mean over 20 seeds of a 16 % figure: 4 %, four of them
    assert figures[0] / figures[1] == pytest.approx(4.0, rel=0.16)


def chain() -> ModelMDP:
    """Two states, two actions, deterministic: the action becomes the state; theta pays for state 1; ends at state 2."""
    return ModelMDP(
        initial_state=lambda theta, e: torch.zeros(len(e), 1, dtype=torch.float64),
        step=lambda theta, s, a, e: a,
        reward=lambda theta, s, a, e, following: theta["pay"] * following[:, 0] - 0.3 * s[:, 0] * a[:, 0],
        noise_dims=(0, 0),
        dt=1.0,
        discount=0.9,
        terminal=lambda theta, s: s[:, 0] > 1.5,
    )


def test_discrete_actions_and_termination_equal_the_enumeration() -> None:
    """Three actions 0, 1, 2 over three steps, action 2 ends the run; 16000 rollouts, 4 standard errors (6e-5 each)."""
    mdp = chain()
    policy = boltzmann_policy(lambda nu, s: nu["q"].expand(len(s), 3) + nu["slope"] * s * torch.arange(3.0), 1.0)
    nu = {"q": torch.tensor([0.2, -0.1, -0.5], dtype=torch.float64), "slope": scalar(0.3)}
    theta = {"pay": scalar(1.5)}

    def exact(nu: Params) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for actions in itertools.product((0.0, 1.0, 2.0), repeat=3):
            log_p, worth, state = torch.zeros((), dtype=torch.float64), 0.0, 0.0
            for t, action in enumerate(actions):
                s, a = torch.full((1, 1), state, dtype=torch.float64), torch.full((1, 1), action, dtype=torch.float64)
                log_p = log_p + policy.log_prob(nu, s, a)[0]
                if state < 1.5:
                    worth += 0.9**t * (1.5 * action - 0.3 * state * action)
                    state = action
            total = total + log_p.exp() * worth
        return total

    leaves = {key: value.clone().requires_grad_() for key, value in nu.items()}
    expected = torch.autograd.grad(exact(leaves), list(leaves.values()))
    noise = sample_noise(mdp, policy, 16000, 3, seeded(1))
    estimate = score_function_gradient(mdp, policy, theta, nu, noise, groups=100)
    error = ravel(estimate.grad) - torch.cat([g.reshape(-1) for g in expected])
    assert bool((error.abs() <= 4 * estimate.info["stderr"]).all()), error
    assert float((estimate.value - exact(nu)).abs()) <= 4 * float(estimate.info["value_stderr"])


def test_a_first_state_that_depends_on_theta_keeps_its_derivative() -> None:
    """4000 rollouts of one step and of three, 4 standard errors (6e-5 each), against the pathwise gradient's mean."""
    mdp, policy, theta, nu = linear_gaussian_problem()
    moved = replace(mdp, initial_state=lambda theta, e: theta["start"] + e)
    theta = {**theta, "start": torch.tensor([0.7, -0.4], dtype=torch.float64)}
    for horizon in (1, 3):
        noise = sample_noise(moved, policy, 4000, horizon, seeded(2))
        score = score_function_gradient(moved, policy, theta, nu, noise, wrt="theta", groups=50)
        path = pathwise_gradient(moved, policy, theta, nu, noise, wrt="theta", groups=50)
        allowed = 4 * (score.info["stderr"] ** 2 + path.info["stderr"] ** 2).sqrt() + 1e-12
        assert bool(((ravel(score.grad) - ravel(path.grad)).abs() <= allowed).all())


def test_bad_requests_are_named() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    noise = sample_noise(mdp, policy, 4, 3, seeded(0))
    with pytest.raises(ValueError, match="wrt"):
        score_function_gradient(mdp, policy, theta, nu, noise, wrt="state")
    with pytest.raises(ValueError, match="declares no log_prob"):
        score_function_gradient(replace(mdp, log_prob=None), policy, theta, nu, noise, wrt="theta")
    with pytest.raises(ValueError, match="at least two rollouts"):
        score_function_gradient(mdp, policy, theta, nu, sample_noise(mdp, policy, 1, 3, seeded(0)))
    sure = linear_policy(1)
    with pytest.raises(ValueError, match="deterministic policy has no log_prob"):
        score_function_gradient(mdp, sure, theta, nu, sample_noise(mdp, sure, 4, 3, seeded(0)))
