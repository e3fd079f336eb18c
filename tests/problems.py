"""Problems that several tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.derivatives import Case, simulator_cases
from sim2real import ModelMDP, Noise, Params, Policy, discounted_return, linear_policy, rollout, sample_noise
from sim2real.simulators import linear_gaussian

CASES = simulator_cases()
"""every simulator with every integrator, at plausible parameters"""


EXACT = {"rtol": 1e-10, "atol": 1e-11}
"""two orders of the same float64 operations: rounding over a few steps"""


def stack(*values: float | list[float]) -> Tensor:
    """A float64 tensor of the numbers or rows given."""
    return torch.tensor(values, dtype=torch.float64)


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


def linear_gaussian_problem() -> tuple[ModelMDP, Policy, Params, Params]:
    """A noisy two-state system under a noisy linear gain, with default costs: mdp, policy, theta, nu."""
    A = torch.tensor([[1.0, 0.2], [-0.1, 0.9]], dtype=torch.float64)
    B = torch.tensor([[0.1], [0.3]], dtype=torch.float64)
    mdp = linear_gaussian(A, B, noise_covariance=0.05 * torch.eye(2, dtype=torch.float64))
    gain = torch.tensor([[0.5, 0.8]], dtype=torch.float64)
    return mdp, linear_policy(1, std=0.4), {"A": A, "B": B}, {"gain": gain}


def gaussian_return(theta: Params, nu: Params, horizon: int) -> Tensor:
    """Exact return of `linear_gaussian_problem`, from the recursion of the second moment of the state."""
    eye, K = torch.eye(2, dtype=torch.float64), nu["gain"]
    closed, second, total = theta["A"] - theta["B"] @ K, eye, torch.zeros((), dtype=torch.float64)
    for t in range(horizon):
        total = total - 0.95**t * (((eye + K.mT @ K) * second).sum() + 0.4**2)
        second = closed @ second @ closed.mT + 0.4**2 * theta["B"] @ theta["B"].mT + 0.05 * eye
    return total


def spectrum(values: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    A = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
    return 0.5 * (A + A.T)


def random_vector(size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_flat(matrix: Tensor) -> Callable[[Params], Params]:
    """The matrix acting on {"x": [P]}."""
    return lambda v: {"x": matrix @ v["x"]}


def on_rows(matrices: Tensor) -> Callable[[Params], Params]:
    """Matrices [R, P, P] acting on {"x": [R, P]}, a row each."""
    return lambda v: {"x": (matrices @ v["x"].unsqueeze(-1)).squeeze(-1)}
