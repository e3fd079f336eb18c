"""The convex half of fitting a lower level: kinks and multipliers, for given slopes, by a structured interior point.

With Q positive definite, duality gives the gap of an expert action u exactly, for any slopes z, multipliers
lambda >= 0 and w (upper bound; equal at the optimal ones):

    eps = lambda'(h - H u) + sum_k [max(theta_k'u - nu_k, 0) - z_k (theta_k'u - nu_k)] + r'Q^-1 r / 4,
    r = c + 2 Q u + sum_k z_k theta_k + H'lambda + B'w.

So penalised stationarity with the weight Q^-1 / 4 is the true gap; no weight is left to choose. For fixed z, the sum
over experts plus rho |theta_k, nu_k / scale|^2 is convex in (theta, nu, lambda, w): w goes in closed form (r is
projected on ker B); an interior point (Mehrotra 1992) eliminates lambda and the hinges of each expert, whose system is
diagonal plus rank m - p, and is left with one Schur complement of K (m + 1) rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Solve = Callable[[Tensor, Tensor, Tensor], "_Point"]


class Pairs(NamedTuple):
    """T experts, prepared: everything the fit asks again and again."""

    features: Tensor
    """(u_t, -scale) `[T, m + 1]`: theta_k'u_t - nu_k = features_t'p_k with p_k = (theta_k, nu_k / scale)"""
    force: Tensor
    """M (c_t + 2 Q u_t) `[T, r]`"""
    slack: Tensor
    """h_t - H u_t `[T, q]`, >= 0, cut where more changes nothing"""
    M: Tensor
    """`[r, m]`: M'M = N (N'Q N)^-1 N', N an orthonormal basis of ker B"""
    L: Tensor
    """M H' `[r, q]`"""


class _Point(NamedTuple):
    """Parameters p `[S, K, m + 1]`, slacks tau, sigma = tau - features'p and lambda, and their duals."""

    p: Tensor
    tau: Tensor
    sigma: Tensor
    lam: Tensor
    alpha: Tensor
    beta: Tensor
    gamma: Tensor


def dual_step(pairs: Pairs, z: Tensor, *, weight: float, tol: float = 1e-7, max_steps: int = 40) -> Tensor:
    """Parameters p `[S, K, m + 1]` that are best for slopes z `[S, T, K]`; S starts side by side.

    An inexact answer is no harm: the caller solves the lower level again and measures the true gap.
    """
    point = _first(pairs, z)
    best, error = point.p, torch.full_like(point.p[:, 0, 0], torch.inf)
    size = max(1.0, float(pairs.force.abs().max()))
    for _ in range(max_steps):
        mu, gradient = _mu(point), _gradient(pairs, z, point, weight)
        off = torch.stack([mu, *(g.abs().flatten(1).amax(1) for g in gradient)]).amax(0) / size
        best = torch.where((off < error)[:, None, None], point.p, best)
        if not bool((off < 100 * error).any()) or not bool((off > tol).any()):
            break
        error = torch.minimum(off, error)
        solve = _newton(pairs, z, point, gradient, weight)
        guess = solve(*(torch.zeros_like(d) for d in point[4:]))
        mean = _mu(_move(point, guess, _length(point, guess)))
        centre = ((mean / mu).clamp(0, 1) ** 3 * mu)[:, None, None]
        step = solve(*(centre - ds * dd for ds, dd in zip(guess[1:4], guess[4:], strict=True)))
        point = _move(point, step, 0.99 * _length(point, step))
    return best


def _first(pairs: Pairs, z: Tensor) -> _Point:
    S, T, K = z.shape
    q = pairs.slack.shape[-1]
    size = float(pairs.force.abs().mean()) + 1e-3
    half = torch.full_like(z, 0.5)
    lam = torch.full((S, T, q), size, dtype=z.dtype, device=z.device)
    p = torch.zeros(S, K, pairs.features.shape[-1], dtype=z.dtype, device=z.device)
    tau = torch.full_like(z, 2 * size)
    return _Point(p, tau, tau, lam, half, half, torch.ones_like(lam))


def _hinge(pairs: Pairs, p: Tensor) -> Tensor:
    return torch.einsum("tm,skm->stk", pairs.features, p)


def _mu(point: _Point) -> Tensor:
    """Mean product of slacks and duals `[S]`."""
    return torch.cat([(a * b).flatten(1) for a, b in zip(point[1:4], point[4:], strict=True)], 1).mean(1)


def _gradient(pairs: Pairs, z: Tensor, point: _Point, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Stationarity of the Lagrangian in tau, lambda and p."""
    m = pairs.M.shape[-1]
    r = pairs.force + torch.einsum("stk,skm,rm->str", z, point.p[..., :m], pairs.M) + point.lam @ pairs.L.mT
    in_lam = pairs.slack + 0.5 * r @ pairs.L - point.gamma
    in_p = torch.einsum("stk,tm->skm", point.beta - z, pairs.features) + 2 * weight * point.p
    pull = 0.5 * torch.einsum("stk,str,rm->skm", z, r, pairs.M)
    return 1 - point.alpha - point.beta, in_lam, in_p + torch.nn.functional.pad(pull, (0, 1))


def _newton(pairs: Pairs, z: Tensor, point: _Point, gradient: tuple[Tensor, ...], weight: float) -> Solve:
    """Solver of the Newton system for target products of (tau, sigma, lambda) with their duals."""
    S, T, K = z.shape
    r, m = pairs.M.shape
    n = m + 1
    a, b, d = point.alpha / point.tau, point.beta / point.sigma, point.gamma / point.lam
    omega = a * b / (a + b)
    eye = torch.eye(r, dtype=z.dtype, device=z.device)
    inner = torch.linalg.inv(eye + 0.5 * (pairs.L / d.unsqueeze(-2)) @ pairs.L.mT)
    S_t = 0.5 * pairs.M.mT @ inner @ pairs.M
    zz = (z.unsqueeze(-1) * z.unsqueeze(-2)).reshape(S, T, K * K)
    coupled = (zz.mT @ S_t.reshape(S, T, m * m)).reshape(S, K, K, m, m)
    outer = (pairs.features.unsqueeze(-1) * pairs.features.unsqueeze(-2)).reshape(T, n * n)
    own = (omega.mT @ outer).reshape(S, K, n, n) + 2 * weight * torch.eye(n, dtype=z.dtype, device=z.device)
    schur = torch.nn.functional.pad(coupled, (0, 1, 0, 1))
    schur = schur + torch.diag_embed(own.permute(0, 2, 3, 1)).permute(0, 3, 4, 1, 2)
    schur = schur.permute(0, 1, 3, 2, 4).reshape(S, K * n, K * n)
    root = schur.diagonal(dim1=-2, dim2=-1).rsqrt().unsqueeze(-1)
    schur = root * schur * root.mT + 1e-13 * torch.eye(K * n, dtype=z.dtype, device=z.device)
    factor = torch.linalg.cholesky_ex(schur).L
    g_tau, g_lam, g_p = gradient

    def invert(v: Tensor) -> Tensor:
        """(L'L / 2 + diag d)^-1 v."""
        x = v / d
        return x - 0.5 * (((x @ pairs.L.mT).unsqueeze(-2) @ inner).squeeze(-2) @ pairs.L) / d

    def solve(t_tau: Tensor, t_sigma: Tensor, t_lam: Tensor) -> _Point:
        c_alpha, c_beta = t_tau / point.tau - point.alpha, t_sigma / point.sigma - point.beta
        c_gamma = t_lam / point.lam - point.gamma
        r_tau, r_lam = c_alpha + c_beta - g_tau, c_gamma - g_lam
        push = torch.einsum("stk,tm->skm", c_beta - b * r_tau / (a + b), pairs.features)
        pull = 0.5 * torch.einsum("stk,str,rm->skm", z, invert(r_lam) @ pairs.L.mT, pairs.M)
        rhs = -g_p - push - torch.nn.functional.pad(pull, (0, 1))
        p = (root * torch.cholesky_solve(root * rhs.reshape(S, K * n, 1), factor)).reshape(S, K, n)
        hinge = _hinge(pairs, p)
        tau = (r_tau + b * hinge) / (a + b)
        v = torch.einsum("stk,skm,rm->str", z, p[..., :m], pairs.M)
        lam = invert(r_lam - 0.5 * v @ pairs.L)
        return _Point(p, tau, tau - hinge, lam, c_alpha - a * tau, c_beta - b * (tau - hinge), c_gamma - d * lam)

    return solve


def _length(point: _Point, step: _Point) -> Tensor:
    """Largest step `[S]`, at most 1, that keeps slacks and duals nonnegative."""
    limits = [torch.where(dv < 0, -v / dv, 1.0).flatten(1) for v, dv in zip(point[1:], step[1:], strict=True)]
    return torch.cat(limits, 1).amin(1).clamp(0.0, 1.0)


def _move(point: _Point, step: _Point, length: Tensor) -> _Point:
    return _Point(*(v + length[:, None, None] * dv for v, dv in zip(point, step, strict=True)))
