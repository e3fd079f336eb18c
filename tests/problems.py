"""Problems that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from derivatives import Case, simulator_cases
from torch import Tensor

from sim2real import Noise, Params, Policy, discounted_return, linear_policy, rollout, sample_noise

CASES = simulator_cases()
"""every simulator with every integrator, at plausible parameters"""


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shared(path: str) -> Path:
    """A file of the shared data or reference folder beside the repository; the test is skipped where there is none."""
    file = Path(__file__).parents[2] / "shared" / path
    if not file.exists():
        pytest.skip(f"needs shared/{path}")
    return file


def closed_loop(case: Case, batch: int, horizon: int, seed: int = 0) -> tuple[Policy, Params, Noise]:
    """A stochastic linear policy, its nu and the noise of `batch` rollouts of a case."""
    m, n = len(case.mdp.names["action"]), case.mdp.noise_dims[0]
    generator = seeded(seed)
    gain = 0.1 * torch.randn(m, n, generator=generator, dtype=torch.float64)
    nu = {"gain": gain, "offset": torch.full((m,), 0.1 * case.action_scale, dtype=torch.float64)}
    policy = linear_policy(m, std=case.action_scale)
    exogenous = None
    if case.mdp.exogenous_dim:
        shape = (batch, horizon, case.mdp.exogenous_dim)
        weather = torch.randn(shape, generator=generator, dtype=torch.float64)
        exogenous = case.input_mean + case.input_std * weather
    return policy, nu, sample_noise(case.mdp, policy, batch, horizon, generator, exogenous=exogenous)


def returns_of(case: Case, policy: Policy, nu: Params, noise: Noise) -> Callable[[Params], Tensor]:
    """theta -> the return of each rollout `[B]`."""
    return lambda theta: discounted_return(rollout(case.mdp, policy, theta, nu, noise).rewards, case.mdp.discount)
