"""Linear systems: densities, moments of the multiplicative noise, cost and start."""

from __future__ import annotations

import pytest
import torch
from problems import CASES, EXACT, scalar, seeded, stack

from sim2real import default_params
from sim2real.simulators import (
    linear_gaussian,
    multiplicative_noise_lqr,
)


def test_log_densities_match_torch_distributions() -> None:
    A, B = CASES["linear Gaussian"].theta["A"], CASES["linear Gaussian"].theta["B"]
    W = 0.1 * torch.eye(3, dtype=torch.float64) + 0.02
    state, action, following = (torch.randn(5, k, generator=seeded(k), dtype=torch.float64) for k in (3, 2, 3))
    mean = state @ A.T + action @ B.T
    normal = torch.distributions.MultivariateNormal
    plain = linear_gaussian(A, B, noise_covariance=W)
    assert plain.log_prob is not None
    torch.testing.assert_close(
        plain.log_prob({"A": A, "B": B, "noise_scale": scalar(0.7)}, state, action, following),
        normal(mean, 0.49 * W).log_prob(following),
        **EXACT,
    )
    torch.testing.assert_close(
        plain.log_prob({"A": A, "B": B}, state, action, following), normal(mean, W).log_prob(following), **EXACT
    )
    world = multiplicative_noise_lqr(A, B, 0.5, noise_covariance=W)
    assert world.log_prob is not None
    spread = torch.stack([W + 0.25 * B @ torch.diag(a**2) @ B.T for a in action])
    torch.testing.assert_close(
        world.log_prob(default_params(world.box), state, action, following),
        normal(mean, spread).log_prob(following),
        **EXACT,
    )


def test_multiplicative_noise_has_the_stated_moments() -> None:
    """Mean and covariance of s' over 200 000 draws; six-sigma bounds, so a false alarm has probability below 1e-7."""
    A, B = CASES["linear Gaussian"].theta["A"], CASES["linear Gaussian"].theta["B"]
    world = multiplicative_noise_lqr(A, B, 0.8)
    count = 200_000
    state, action = stack([1.0, -0.5, 0.3]), stack([0.7, -1.2])
    e = torch.randn(count, 5, generator=seeded(0), dtype=torch.float64)
    sample = world.step(default_params(world.box), state.expand(count, -1), action.expand(count, -1), e)
    covariance = 0.05 * torch.eye(3, dtype=torch.float64) + 0.64 * B @ torch.diag(action[0] ** 2) @ B.T
    deviation = (sample.mean(0) - (state @ A.T + action @ B.T)[0]) / (covariance.diagonal() / count).sqrt()
    assert float(deviation.abs().max()) < 6.0
    variance = covariance.diagonal()
    spread = torch.sqrt((variance[:, None] * variance + covariance**2) / count)
    assert float(((torch.cov(sample.T) - covariance) / spread).abs().max()) < 6.0


def test_quadratic_cost_and_start_of_linear_systems() -> None:
    A, B = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    Q, R = stack([2.0, 0.5], [0.5, 1.0]), stack([3.0])
    mdp = linear_gaussian(A, B, state_cost=Q, action_cost=R, initial_mean=stack(1.0, 2.0), initial_covariance=4.0 * A)
    e0 = stack([1.0, -1.0])
    state, action = mdp.initial_state({}, e0), stack([2.0])
    assert state.tolist() == [[3.0, 0.0]]
    assert float(mdp.reward({}, state, action, e0, state)) == -(2.0 * 9.0 + 3.0 * 4.0)
    assert mdp.log_prob is None
    assert mdp.noise_dims == (2, 0)
    assert mdp.step({"A": A, "B": B}, state, action, e0[:, :0]).tolist() == [[5.0, 2.0]]


def test_a_noise_scale_without_noise_is_named() -> None:
    mdp = linear_gaussian(torch.eye(2).double(), torch.ones(2, 1).double())
    theta = default_params(mdp.box) | {"noise_scale": torch.tensor(2.0).double()}
    with pytest.raises(ValueError, match="noise_covariance"):
        mdp.step(theta, torch.zeros(1, 2).double(), torch.zeros(1, 1).double(), torch.zeros(1, 0).double())
