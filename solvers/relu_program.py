"""A lower level with learned kinks: linear, piecewise linear and quadratic cost under linear constraints, as a layer.

    u = argmin_u f(u),  f(u) = c'u + sum_k max(theta_k'u - nu_k, 0) + u'Q u,   subject to  B u = b,  H u <= h,

Q = l I + R with l > 0 and R positive semi-definite, so that u is unique. It is a QP in (u, tau), tau_k >= 0 and
tau_k >= theta_k'u - nu_k, whose multipliers of the second kind are the slopes z_k in [0, 1]; it is solved in batches
and differentiated exactly by `qp.py`. b is what a goal asks of the action: goal minus what happens without it.

Reference: Wang, Zhou and Yang, Hierarchical Decision Making with Structured Policies (2026), equation 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.solvers.convex import InfeasibleError
from sim2real.solvers.qp import OnFailure, qp

_FEASIBLE = 1e-6  # of actions, goals and 1; what the layer solves to is a thousand times smaller


@dataclass(frozen=True)
class ReluCost:
    """What is learned, theta and nu, and the curvature Q = ridge I + R that makes the action unique."""

    theta: Tensor
    """`[K, m]`, K may be 0"""
    nu: Tensor
    """`[K]`"""
    ridge: float
    """l > 0"""
    curvature: Tensor | None = None
    """R `[m, m]` of a quadratic stage cost u'R u, or None"""


@dataclass(frozen=True)
class ReluSolution:
    """Actions of a batch and the multipliers that prove them optimal; all carry derivatives."""

    u: Tensor
    """`[..., m]`; NaN where there is no solution"""
    slopes: Tensor
    """z `[..., K]` in [0, 1]: 1 above the kink, 0 below, between on it"""
    inequality_multipliers: Tensor
    """`[..., q]`, >= 0"""
    equality_multipliers: Tensor
    """`[..., p]`"""
    converged: Tensor
    """`[...]` bool"""
    infeasible: Tensor
    """`[...]` bool: no action meets the constraints"""
    margin: Tensor
    """`[...]`: how near the next change of active set is, where derivatives jump"""


def relu_program(
    cost: ReluCost,
    c: Tensor,
    B: Tensor,
    b: Tensor,
    H: Tensor,
    h: Tensor,
    *,
    tol: float = 1e-10,
    max_steps: int = 60,
    strict: bool = False,
    on_failure: OnFailure = "raise",
) -> ReluSolution:
    """Minimise `f` over `B u = b, H u <= h`, batched over leading dimensions, differentiable in all tensors.

    c `[..., m]`, B `[p, m]`, b `[..., p]`, H `[q, m]`, h `[..., q]`; theta `[..., K, m]` and nu `[..., K]` of `cost`
    may be batched too. Raises `ValueError` for shapes that do not fit or ridge <= 0, `InfeasibleError` where no action
    meets the constraints (with `on_failure="nan"`: NaN); warns or raises as `qp` where a row did not converge.
    """
    Q = quadratic(cost, c)
    K, m, q = cost.nu.shape[-1], c.shape[-1], h.shape[-1]
    if cost.theta.shape[-2:] != (K, m):
        raise ValueError(
            f"theta must be [..., K, m] = [..., {K}, {m}] for nu and c given, got {tuple(cost.theta.shape)}"
        )
    pad = torch.nn.functional.pad
    lead = cost.theta.shape[:-2]
    eye = torch.eye(K, dtype=c.dtype, device=c.device)
    kinks = torch.cat([cost.theta, -eye.expand(*lead, K, K)], -1)
    floor = pad(-eye, (m, 0))
    G = torch.cat([pad(H, (0, K)).expand(*lead, q, m + K), kinks, floor.expand(*lead, K, m + K)], -2)
    rows = torch.broadcast_shapes(h.shape[:-1], cost.nu.shape[:-1])
    limits = torch.cat([h.expand(*rows, q), cost.nu.expand(*rows, K), h.new_zeros(*rows, K)], -1)
    gradient = pad(c, (0, K), value=1.0)
    found = qp(
        pad(2 * Q, (0, K, 0, K)),
        gradient,
        pad(B, (0, K)),
        b,
        G,
        limits,
        tol=tol,
        max_steps=max_steps,
        strict=strict,
        on_failure=on_failure,
    )
    multipliers, u = found.inequality_multipliers, found.x[..., :m]
    broken = _broken(u.detach(), B, b.detach(), H, h.detach())
    if on_failure == "raise" and bool(broken.any()):
        row = int(broken.flatten().nonzero()[0, 0])
        raise InfeasibleError(f"relu_program: no action of sample {row} meets B u = b and H u <= h", row)
    return ReluSolution(
        u=torch.where(broken.unsqueeze(-1), torch.nan, u),
        slopes=multipliers[..., q : q + K],
        inequality_multipliers=multipliers[..., :q],
        equality_multipliers=found.equality_multipliers,
        converged=found.converged & ~broken,
        infeasible=found.infeasible | broken,
        margin=found.margin,
    )


def _broken(u: Tensor, B: Tensor, b: Tensor, H: Tensor, h: Tensor) -> Tensor:
    """Broken constraints: the heights tau of an infeasible program may grow until the rest counts as rounding."""
    allowed = _FEASIBLE * (1 + torch.cat([u, b.expand(*u.shape[:-1], b.shape[-1])], -1).abs().amax(-1))
    equal, over = (u @ B.mT - b).abs(), u @ H.mT - h
    return (torch.cat([equal, over], -1) > allowed.unsqueeze(-1)).any(-1)


def quadratic(cost: ReluCost, like: Tensor) -> Tensor:
    """Q = ridge I + R `[m, m]`, after both were checked."""
    m = like.shape[-1]
    if not cost.ridge > 0:
        raise ValueError(f"ridge must be > 0, else the action need not be unique; got {cost.ridge}")
    Q = cost.ridge * torch.eye(m, dtype=like.dtype, device=like.device)
    if cost.curvature is None:
        return Q
    R = cost.curvature.to(like)
    if R.shape != (m, m) or not torch.allclose(R, R.mT) or float(torch.linalg.eigvalsh(R)[0]) < -1e-10:
        raise ValueError(f"curvature must be symmetric positive semi-definite [{m}, {m}], got {tuple(R.shape)}")
    return Q + R


def relu_cost(cost: ReluCost, c: Tensor, u: Tensor) -> Tensor:
    """f(u) `[...]`."""
    kinks = (u.unsqueeze(-2) @ cost.theta.mT).squeeze(-2) - cost.nu
    return (c * u).sum(-1) + kinks.clamp_min(0).sum(-1) + ((u @ quadratic(cost, c)) * u).sum(-1)


def suboptimality(cost: ReluCost, solution: ReluSolution, H: Tensor, h: Tensor, u: Tensor) -> Tensor:
    """`f(u) - min f` `[...]` of feasible actions u, a sum of nonnegative parts, so that none is lost to rounding.

    (u - u*)'Q(u - u*) + lambda'(h - H u) + sum_k max(theta_k'u - nu_k, 0) - z_k (theta_k'u - nu_k)
    """
    step = u - solution.u
    kinks = (u.unsqueeze(-2) @ cost.theta.mT).squeeze(-2) - cost.nu
    slack = torch.where(h.isinf(), 0.0, (h - u @ H.mT).clamp_min(0))
    complementary = (solution.inequality_multipliers * slack).sum(-1)
    z = solution.slopes
    above = torch.where(kinks > 0, (1 - z).clamp_min(0) * kinks, -z.clamp_min(0) * kinks).sum(-1)
    return ((step @ quadratic(cost, u)) * step).sum(-1) + complementary + above
