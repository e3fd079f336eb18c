"""Randomised objectives against closed forms and enumeration: values, optima, and derivatives of the optima."""

from typing import Literal

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from sim2real import Box, Params
from sim2real.domain_randomization import (
    clipped_share,
    posterior_covariance,
    posterior_draws,
    posterior_factor,
    randomized_objective,
    standard_draws,
)
from sim2real.estimators import policy_sensitivity
from sim2real.solvers import lyapunov, policy_optimum
from tests.problems import scalar, seeded, stack

R = 0.3


def one_step(theta: Params, nu: Params) -> Tensor:
    """Expected return of one step from s ~ N(0, 1): `-((a - b K)^2 + r K^2)`."""
    return -((theta["a"] - theta["b"] * nu["K"]).square() + R * nu["K"].square())


def problem(count: int = 8) -> tuple[Params, Tensor, Tensor]:
    factor = stack([0.3, 0.0], [0.1, 0.2])
    return {"a": scalar(1.2), "b": scalar(0.8)}, factor, standard_draws(count, 2, seeded(0))


def closed_gain(theta: Params, factor: Tensor) -> Tensor:
    """`E[a b] / (E[b^2] + r)`; matched draws have these moments exactly."""
    covariance = factor @ factor.T
    return (theta["a"] * theta["b"] + covariance[0, 1]) / (theta["b"] ** 2 + covariance[1, 1] + R)


@pytest.mark.parametrize("batch", ["loop", "vmap"])
def test_optimum_and_its_derivatives_in_closed_form(batch: Literal["loop", "vmap"]) -> None:
    theta, factor, draws = problem()
    J = randomized_objective(one_step, ("a", "b"), draws, batch=batch)
    full = theta | {"factor": factor}
    nu = policy_optimum(J, full, {"K": scalar(0.0)}).nu
    torch.testing.assert_close(nu["K"], closed_gain(theta, factor), rtol=1e-12, atol=0)
    found = policy_sensitivity(J, full, nu, strict=True).vjp({"K": scalar(1.0)})
    leaves = {key: value.clone().requires_grad_() for key, value in full.items()}
    closed_gain({k: leaves[k] for k in "ab"}, leaves["factor"]).backward()
    for key in full:
        torch.testing.assert_close(found[key], leaves[key].grad, rtol=1e-9, atol=1e-12)


def test_a_fixed_factor_gives_the_same_optimum() -> None:
    theta, factor, draws = problem()
    J = randomized_objective(one_step, ("a", "b"), draws, factor=factor)
    nu = policy_optimum(J, theta, {"K": scalar(0.0)}).nu
    torch.testing.assert_close(nu["K"], closed_gain(theta, factor), rtol=1e-12, atol=0)


def lqr_return(theta: Params, nu: Params) -> Tensor:
    """`-tr P` of a fixed gain in a double integrator with damping d and input gain b."""
    A = stack([1.0, 0.2], [0.0, 0.0]) + theta["d"] * stack([0.0, 0.0], [0.0, 1.0])
    B = theta["b"] * stack([0.0], [1.0])
    cost = stack([1.0, 0.0], [0.0, 0.1]) + 0.1 * nu["gain"].mT @ nu["gain"]
    return -lyapunov(A - B @ nu["gain"], cost, 0.9).diagonal().sum()


def test_lqr_against_enumeration_and_central_differences() -> None:
    theta = {"d": scalar(0.9), "b": scalar(0.4), "factor": 0.08 * torch.eye(2).double()}
    draws = standard_draws(6, 2, seeded(1))
    J = randomized_objective(lqr_return, ("d", "b"), draws, batch="vmap")
    start = {"gain": stack([0.8, 1.0])}
    nu = policy_optimum(J, theta, start).nu

    def enumerated(gain: np.ndarray, d: float, b: float, factor: np.ndarray) -> float:
        total = 0.0
        for z in draws.numpy():
            point = np.array([d, b]) + factor @ z
            A = np.array([[1.0, 0.2], [0.0, point[0]]])
            closed = np.sqrt(0.9) * (A - np.array([[0.0], [point[1]]]) @ gain)
            W = np.diag([1.0, 0.1]) + 0.1 * gain.T @ gain
            P = np.linalg.solve(np.eye(4) - np.kron(closed.T, closed.T), W.reshape(-1)).reshape(2, 2)
            total -= np.trace(P) / len(draws)
        return total

    found = nu["gain"].numpy()
    assert float(J(theta, nu)) == pytest.approx(enumerated(found, 0.9, 0.4, 0.08 * np.eye(2)), rel=1e-12)
    for k in range(2):  # no better gain along either axis, by golden section on the enumerated return
        along = np.eye(2)[k : k + 1]
        best = minimize_scalar(
            lambda t, e=along: -enumerated(found + t * e, 0.9, 0.4, 0.08 * np.eye(2)),
            bounds=(-0.1, 0.1),
            method="bounded",
        )
        assert abs(best.x) < 1e-4  # the search's own tolerance is 1e-5
    sensitivity = policy_sensitivity(J, theta, nu, strict=True)
    pulled = sensitivity.vjp({"gain": stack([1.0, 2.0])})
    for key in theta:
        direction = torch.randn(theta[key].shape, generator=seeded(2), dtype=torch.float64)
        ends = [policy_optimum(J, theta | {key: theta[key] + s * 1e-4 * direction}, nu).nu["gain"] for s in (1, -1)]
        expected = ((ends[0] - ends[1]) / 2e-4 * stack([1.0, 2.0])).sum()
        # truncation of order 1e-8, and the optima are exact to 1e-10 over 2e-4
        torch.testing.assert_close((pulled[key] * direction).sum(), expected, rtol=1e-5, atol=1e-6)
    tangent = {key: torch.randn(value.shape, generator=seeded(3), dtype=torch.float64) for key, value in theta.items()}
    left = (sensitivity.jvp(tangent)["gain"] * stack([1.0, 2.0])).sum()
    torch.testing.assert_close(left, sum((pulled[k] * tangent[k]).sum() for k in theta), rtol=1e-8, atol=0)


@pytest.mark.parametrize("tail", [0.5, 0.3])
def test_tail_is_the_mean_of_the_worst(tail: float) -> None:
    theta, factor, draws = problem(8)
    J = randomized_objective(one_step, ("a", "b"), draws, factor=factor, tail=tail)
    nu = {"K": scalar(0.7)}
    points = np.array([1.2, 0.8]) + draws.numpy() @ factor.numpy().T
    returns = np.sort(-((points[:, 0] - 0.7 * points[:, 1]) ** 2) - R * 0.49)
    # conditional value at risk as the maximum of Rockafellar and Uryasev's function, attained at one of the returns
    expected = max(v - np.maximum(v - returns, 0).mean() / tail for v in returns)
    assert float(J(theta, nu)) == pytest.approx(expected, rel=1e-12)
    mean = randomized_objective(one_step, ("a", "b"), draws, factor=factor)
    assert float(J(theta, nu)) < float(mean(theta, nu))


def test_draws_stay_in_the_box() -> None:
    theta, factor, draws = problem(20)
    box = Box(low={"a": 1.1}, high={"b": 0.9})
    points = posterior_draws(theta, ("a", "b"), factor, draws, box=box)
    free = posterior_draws(theta, ("a", "b"), factor, draws)
    torch.testing.assert_close(points["a"], free["a"].clamp(min=1.1))
    torch.testing.assert_close(points["b"], free["b"].clamp(max=0.9))
    moved = int((free["a"] < 1.1).sum() + (free["b"] > 0.9).sum())
    assert moved > 0
    assert clipped_share(theta, ("a", "b"), factor, draws, box) == pytest.approx(moved / 40)


def test_parameters_that_are_not_drawn_and_tensors_that_are() -> None:
    theta = {"A": stack([1.0, 2.0], [3.0, 4.0]), "c": stack(5.0, 6.0)}
    draws = standard_draws(10, 4, seeded(0))
    factor = torch.eye(4, dtype=torch.float64)
    points = posterior_draws(theta, ("A",), factor, draws)
    torch.testing.assert_close(points["A"], theta["A"] + draws.reshape(10, 2, 2))
    torch.testing.assert_close(points["c"], theta["c"].expand(10, 2))


def test_draws_and_factors() -> None:
    draws = standard_draws(12, 3, seeded(0))
    torch.testing.assert_close(draws.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(draws.T @ draws / 12, torch.eye(3).double(), rtol=0, atol=1e-13)
    assert standard_draws(7, 3, seeded(0), matched=False).shape == (7, 3)
    for covariance in (stack([2.0, 0.5], [0.5, 1.0]), stack([1.0, 1.0], [1.0, 1.0])):
        factor = posterior_factor(covariance)
        torch.testing.assert_close(factor @ factor.T, covariance, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="semi-definite"):
        posterior_factor(stack([1.0, 2.0], [2.0, 1.0]))
    with pytest.raises(ValueError, match="finite square"):
        posterior_factor(stack([1.0, torch.nan], [2.0, 1.0]))
    with pytest.raises(ValueError, match="even and at least 8"):
        standard_draws(7, 3)


def test_covariance_of_some_parameters_of_a_fit() -> None:
    theta = {"m": scalar(1.0), "A": stack([1.0, 2.0]), "x": scalar(0.0)}
    rows, covariance = ["A[0]", "A[1]", "delay", "m"], torch.arange(16.0).reshape(4, 4).double()
    theta["A"] = theta["A"].reshape(2)
    torch.testing.assert_close(
        posterior_covariance(rows, covariance, theta, ("m", "A")), covariance[[3, 0, 1]][:, [3, 0, 1]]
    )
    with pytest.raises(ValueError, match=r"no \['x'\]"):
        posterior_covariance(rows, covariance, theta, ("x",))
    with pytest.raises(ValueError, match=r"theta has no \['z'\]"):
        posterior_covariance(rows, covariance, theta, ("z",))
    covariance[3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"do not fix \['m'\]"):
        posterior_covariance(rows, covariance, theta, ("m",))


def test_what_does_not_fit() -> None:
    theta, factor, draws = problem()
    nu = {"K": scalar(0.0)}
    with pytest.raises(ValueError, match="names must list"):
        randomized_objective(one_step, ("a", "z"), draws, factor=factor)(theta, nu)
    with pytest.raises(ValueError, match=r"draws must be \[N, 1\]"):
        randomized_objective(one_step, ("a",), draws, factor=factor)(theta, nu)
    with pytest.raises(ValueError, match="pass factor"):
        randomized_objective(one_step, ("a", "b"), draws)(theta, nu)
    with pytest.raises(ValueError, match="N >= 1"):
        randomized_objective(one_step, ("a", "b"), draws[:0], factor=factor)
    for options in ({"tail": 0.0}, {"batch": "map"}):
        with pytest.raises(ValueError, match="tail in"):
            randomized_objective(one_step, ("a",), draws, **options)
