"""Soft optimum of a linear-quadratic follower that sees a disturbance before it acts.

World `s' = A s + D d + B u` with `d = K s + eps`, eps ~ N(0, W), known to the follower before it acts; return
`-(s'Q s + u'R u)` discounted by g, entropy weight lambda. With A_K = A + D K and P, S of the Riccati equation of
(A_K, B, Q, R, g),

    u ~ N(-K_x s - K_a D eps, lambda / 2 S^-1),    K_x = g S^-1 B'P A_K,    K_a = g S^-1 B'P,
    V(s, d) = -(s'P s + 2 s'A_K'M D eps + eps'D'M D eps + v),    M = g P - g^2 P B S^-1 B'P,
    (1 - g) v = -m lambda / 2 ln(pi lambda) + lambda / 2 ln det S + g tr(M D W D').

A disturbance that is not observed is process noise: `soft_lqr` with `noise_covariance = D W D'` and A_K for A.
Reference: Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026, arXiv 2603.14867 (both propositions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.solvers.riccati import riccati


@dataclass(frozen=True)
class ObservedSoftLQR:
    """`u ~ N(-state_gain s - disturbance_gain eps, factor factor')`, V = `-(z'value_matrix z + offset)`, z (s, eps)."""

    state_gain: Tensor
    """K_x `[m, n]`"""
    disturbance_gain: Tensor
    """K_a D `[m, p]`"""
    factor: Tensor
    """lower triangular `[m, m]`"""
    value_matrix: Tensor
    """`[n + p, n + p]`"""
    offset: Tensor
    """v, a scalar"""


def observed_soft_lqr(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor,
    D: Tensor,
    K: Tensor,
    W: Tensor,
    *,
    discount: float,
    temperature: float,
) -> ObservedSoftLQR:
    """The soft optimum; A `[n, n]`, B `[n, m]`, D `[n, p]`, K `[p, n]`, W `[p, p]`; differentiable in all of them.

    Raises `ValueError` for a temperature that is not positive, a discount outside (0, 1) or shapes that do not fit, and
    as `riccati` does.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite (units of the return), got {temperature}")
    if not 0 < discount < 1:
        raise ValueError(f"discount must lie in (0, 1), got {discount}")
    n, p = D.shape
    if A.shape != (n, n) or K.shape != (p, n) or W.shape != (p, p):
        raise ValueError(
            f"for D {(n, p)}: A must be {(n, n)}, K {(p, n)} and W {(p, p)}, got {tuple(A.shape)}, {tuple(K.shape)} "
            f"and {tuple(W.shape)}"
        )
    closed = A + D @ K
    P, state_gain = riccati(closed, B, Q, R, discount)
    S = R + discount * B.mT @ P @ B
    inverse = torch.linalg.inv(0.5 * (S + S.mT))
    response = discount * inverse @ B.mT @ P
    M = discount * P @ (torch.eye(n, dtype=A.dtype, device=A.device) - B @ response)
    M = 0.5 * (M + M.mT)
    cross = closed.mT @ M @ D
    value_matrix = torch.cat([torch.cat([P, cross], 1), torch.cat([cross.mT, D.mT @ M @ D], 1)])
    m = R.shape[-1]
    entropy = 0.5 * temperature * (torch.logdet(S) - m * math.log(math.pi * temperature))
    offset = (entropy + discount * (M * (D @ W @ D.mT)).sum()) / (1 - discount)
    factor = torch.linalg.cholesky(0.5 * temperature * inverse)
    return ObservedSoftLQR(state_gain, response @ D, factor, value_matrix, offset)
