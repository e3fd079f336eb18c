"""Soft optimum of a discounted linear-quadratic problem: a Gaussian policy, in closed form and differentiable.

Model `s' = A s + B a + w`, return `-(s'Q s + a'R a)` discounted by g, entropy weight lambda. With P and K of `riccati`,

    S = R + g B'P B,      pi(. | s) = N(-K s, lambda / 2 S^-1),      V(s) = -(s'P s + v),
    (1 - g) v = -m lambda / 2 ln(pi lambda) + lambda / 2 ln det S + g tr(P W),      W the covariance of w,

so that pi = exp((Q - V) / lambda). The mean is that of the ordinary optimum; the noise explores most where it costs
least. Reference: Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026, arXiv 2603.14867 (building control), for the constant v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.solvers.riccati import riccati


@dataclass(frozen=True)
class SoftLQR:
    """`nu` of `linear_noise_policy`, and the soft value `-(s'P s + offset)` of the optimum."""

    nu: Params
    """{"gain": K `[m, n]`, "factor": lower triangular `[m, m]` with factor factor' = lambda / 2 S^-1}"""
    cost_matrix: Tensor
    """P `[n, n]`"""
    offset: Tensor
    """v, a scalar"""


def soft_lqr(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor,
    *,
    discount: float,
    temperature: float,
    noise_covariance: Tensor | None = None,
) -> SoftLQR:
    """The soft optimum, differentiable in A, B, Q and R; shapes as in `riccati`, costs Q and R are minimised.

    `temperature` lambda in units of the return, `noise_covariance` W `[n, n]` (None: 0) enters `offset` alone.
    Raises `ValueError` for a temperature that is not positive, a discount outside (0, 1) or a W of another shape, and
    as `riccati` does.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite (units of the return), got {temperature}")
    if not 0 < discount < 1:
        raise ValueError(f"discount must lie in (0, 1), got {discount}")
    if noise_covariance is not None and noise_covariance.shape[-2:] != A.shape[-2:]:
        raise ValueError(
            f"noise_covariance must be {tuple(A.shape[-2:])}, of the states, got {tuple(noise_covariance.shape)}"
        )
    P, K = riccati(A, B, Q, R, discount)
    S = R + discount * B.mT @ P @ B
    S = 0.5 * (S + S.mT)
    factor = torch.linalg.cholesky(0.5 * temperature * torch.linalg.inv(S))
    m = R.shape[-1]
    spread = torch.linalg.cholesky(S).diagonal(dim1=-2, dim2=-1).log().sum(-1)  # half of ln det S
    offset = temperature * (spread - 0.5 * m * math.log(math.pi * temperature))
    if noise_covariance is not None:
        offset = offset + discount * (P * noise_covariance).sum((-2, -1))
    return SoftLQR({"gain": K, "factor": factor}, P, offset / (1 - discount))


def linear_noise_policy(action_dim: int) -> Policy:
    """`a = -K s + L e` with `nu = {"gain": K [m, n], "factor": L [m, m]}`, L lower triangular, diagonal positive.

    What stands above the diagonal of L is ignored.
    """

    def act(nu: Params, state: Tensor, noise: Tensor) -> Tensor:
        return noise @ nu["factor"].tril().mT - state @ nu["gain"].mT

    def log_prob(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        factor = nu["factor"].tril()
        residual = (action + state @ nu["gain"].mT).unsqueeze(-1)
        z = torch.linalg.solve_triangular(factor.expand(*residual.shape[:-2], -1, -1), residual, upper=False)
        volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * z.squeeze(-1).square().sum(-1) - volume - 0.5 * action_dim * math.log(2 * math.pi)

    return Policy(act, log_prob, noise_dim=action_dim)
