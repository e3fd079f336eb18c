"""Pathwise and difference gradients against the closed form of a linear-Gaussian problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problems import gaussian_return, linear_gaussian_problem, scalar, seeded
from torch import Tensor

from sim2real import Params, boltzmann_policy, deterministic_policy, ravel, sample_noise
from sim2real.estimators import finite_difference_gradient, pathwise_gradient, score_function_gradient

WRT = pytest.mark.parametrize("wrt", ["nu", "theta"])


def exact_gradient(theta: Params, nu: Params, horizon: int, wrt: str) -> Tensor:
    leaves = {key: value.clone().requires_grad_() for key, value in (nu if wrt == "nu" else theta).items()}
    value = gaussian_return(*((theta, leaves) if wrt == "nu" else (leaves, nu)), horizon)
    grads = torch.autograd.grad(value, list(leaves.values()))
    return ravel(dict(zip(leaves, grads, strict=True)))


@WRT
def test_mean_over_seeds_is_within_four_standard_errors_of_the_closed_form(wrt: str) -> None:
    """20 seeds of 400 rollouts; false-alarm rate below 20 x 2e-4 over the entries of t(19) beyond 4 (7 entries)."""
    mdp, policy, theta, nu = linear_gaussian_problem()
    grads, values = [], []
    for seed in range(20):
        noise = sample_noise(mdp, policy, 400, 10, seeded(seed))
        estimate = pathwise_gradient(mdp, policy, theta, nu, noise, wrt=wrt)
        grads.append(ravel(estimate.grad))
        values.append(estimate.value)
    stacked = torch.stack(grads)
    error = stacked.mean(0) - exact_gradient(theta, nu, 10, wrt)
    assert bool((error.abs() <= 4 * stacked.std(0) / 20**0.5).all()), error
    spread = torch.stack(values)
    assert float((spread.mean() - gaussian_return(theta, nu, 10)).abs()) <= 4 * float(spread.std()) / 20**0.5


def test_standard_error_is_the_spread_over_seeds_and_falls_as_the_root_of_n() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    figures: dict[int, float] = {}
    for batch in (200, 800):
        told, grads = [], []
        for seed in range(30):
            noise = sample_noise(mdp, policy, batch, 5, seeded(seed))
            estimate = pathwise_gradient(mdp, policy, theta, nu, noise, groups=20)
            told.append(estimate.info["stderr"])
            grads.append(ravel(estimate.grad))
        seen = torch.stack(grads).std(0)
        # relative error of the spread over 30 seeds: 13 %; four of them
        torch.testing.assert_close(torch.stack(told).mean(0), seen, rtol=0.52, atol=0)
        figures[batch] = float(torch.stack(told).mean())
    # four times the rollouts, half the error; mean over 30 seeds of a 16 % figure: 3 %, five of them
    assert figures[200] / figures[800] == pytest.approx(2.0, rel=0.15)


@WRT
def test_differences_equal_the_pathwise_gradient_of_the_same_noise(wrt: str) -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    noise = sample_noise(mdp, policy, 50, 10, seeded(0))
    path = pathwise_gradient(mdp, policy, theta, nu, noise, wrt=wrt, groups=5)
    difference = finite_difference_gradient(mdp, policy, theta, nu, noise, wrt=wrt)
    # Richardson: truncation (1e-3)^4, rounding 1e-16 / 1e-3, both times values of order 1e2
    torch.testing.assert_close(ravel(difference.grad), ravel(path.grad), rtol=1e-8, atol=1e-8)
    assert bool((difference.info["error"] >= (ravel(difference.grad) - ravel(path.grad)).abs()).all())
    torch.testing.assert_close(difference.value, path.value)
    whole = pathwise_gradient(mdp, policy, theta, nu, noise, wrt=wrt)
    torch.testing.assert_close(ravel(whole.grad), ravel(path.grad), rtol=1e-12, atol=1e-12)


def test_one_theta_per_environment() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    noise = sample_noise(mdp, policy, 3, 5, seeded(0))
    many = {key: value.expand(3, *value.shape).clone() for key, value in theta.items()}
    rows = pathwise_gradient(mdp, policy, many, nu, noise, wrt="theta").grad
    shared = pathwise_gradient(mdp, policy, theta, nu, noise, wrt="theta").grad
    for key, value in shared.items():
        torch.testing.assert_close(rows[key].sum(0), value)


def test_bad_requests_are_named() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    noise = sample_noise(mdp, policy, 4, 3, seeded(0))
    with pytest.raises(ValueError, match="wrt"):
        pathwise_gradient(mdp, policy, theta, nu, noise, wrt="state")
    with pytest.raises(ValueError, match="derivative_order 0"):
        pathwise_gradient(replace(mdp, derivative_order=0), policy, theta, nu, noise)
    for groups in (1, 5, -1):
        with pytest.raises(ValueError, match="groups"):
            pathwise_gradient(mdp, policy, theta, nu, noise, groups=groups)
    chosen = boltzmann_policy(lambda nu, state: state @ nu["w"], 1.0)
    w = {"w": torch.ones(2, 3, dtype=torch.float64)}
    with pytest.raises(ValueError, match="use score_function_gradient"):
        pathwise_gradient(mdp, chosen, theta, w, sample_noise(mdp, chosen, 4, 3, seeded(0)))
    with pytest.raises(ValueError, match="step"):
        finite_difference_gradient(mdp, policy, theta, nu, noise, step=2.0)
    with pytest.raises(ValueError, match="float64"):
        finite_difference_gradient(mdp, policy, theta, {"gain": nu["gain"].float()}, noise)
    with pytest.raises(ValueError, match="wrt"):
        finite_difference_gradient(mdp, policy, theta, nu, noise, wrt="both")


@pytest.mark.parametrize("estimator", [pathwise_gradient, score_function_gradient, finite_difference_gradient])
@pytest.mark.parametrize("value", [float("nan"), 1e200])
def test_returns_that_are_not_finite_are_named(estimator: Callable, value: float) -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    noise = sample_noise(mdp, policy, 4, 3, seeded(0))
    with pytest.raises(ValueError, match=r"the return is -?(nan|inf) and . of . entries of its gradient in nu are not"):
        estimator(mdp, policy, {**theta, "A": torch.full_like(theta["A"], value)}, nu, noise)


def test_one_rollout_tells_nothing_of_its_error() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    noise = sample_noise(mdp, policy, 1, 3, seeded(0))
    assert float(pathwise_gradient(mdp, policy, theta, nu, noise).info["value_stderr"]) == float("inf")


def test_a_parameter_of_the_policy_that_is_not_used_has_gradient_zero() -> None:
    mdp, _, theta, nu = linear_gaussian_problem()
    policy = deterministic_policy(lambda nu, state: -(state @ nu["gain"].mT))
    noise = sample_noise(mdp, policy, 4, 3, seeded(0))
    grad = pathwise_gradient(mdp, policy, theta, {**nu, "idle": scalar(1.0)}, noise).grad
    assert float(grad["idle"]) == 0.0
