"""Inversion of whole episodes at once: inputs of neighbouring times are pulled together.

    min_u  sum_t |y_t - g(theta, rows_t, u_t)|^2_W + |u_t - c_t|^2_S  +  sum_t |u_{t+1} - u_t|^2_D

What one transition leaves open (torques at their limits, rank-deficient lower levels) its neighbours then decide: u is
filled there on purpose, and `saturated` still says where. The Gauss-Newton matrix is block tridiagonal in time, blocks

    diagonal   J_t'J_t + S + k D  (k neighbours, 1 or 2) + mu,      beside it   -D,

solved by block elimination along time, batched over episodes; Levenberg-Marquardt with one damping for each episode.
Derivatives by the implicit function theorem, with the same solve.
Reference: Golub and Van Loan, Matrix computations, 2013, section 4.5.1 (block tridiagonal systems).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from sim2real.params import Params
from sim2real.solve_report import LinearSolution, SolveReport
from sim2real.solvers.implicit import implicit_root
from sim2real.solvers.inversion_problem import (
    InverseProblem,
    Inversion,
    Predict,
    data_residual,
    inverse_problem,
    jacobian,
    joined,
    ranks,
    residuals,
    split,
)
from sim2real.solvers.linear import Matvec


def invert_jointly(
    predict: Predict,
    theta: Params,
    rows: Params,
    outcome: Tensor,
    start: Tensor,
    coupling: Tensor,
    *,
    precision: Tensor | None = None,
    prior: Tensor | None = None,
    prior_precision: Tensor | None = None,
    full_rank: int | None = None,
    tolerance: float = 1e-10,
    max_steps: int = 60,
    strict: bool = False,
) -> Inversion:
    """Inputs `[E, T, p]` of E episodes from outcomes `[E, T, q]`, differentiable in theta, rows, outcome and coupling.

    coupling D `[p, p]`, positive semidefinite: the inverse covariance of `u_{t+1} - u_t`. rows: each `[E, T, ...]`,
    given to `predict` as `[E T, ...]`. Other arguments as for `inversion.invert`, fields of the report `[E, T]`;
    `converged` and `steps` are those of the whole episode. Raises `ValueError` for data that do not fit.
    """
    if start.ndim != 3 or outcome.ndim != 3 or coupling.shape != (start.shape[2],) * 2:
        shapes = [tuple(x.shape) for x in (outcome, start, coupling)]
        raise ValueError(f"outcome must be [E, T, q], start [E, T, p], coupling [p, p]; got {shapes}")
    flat = {key: value.flatten(0, 1) for key, value in rows.items()}
    if prior is not None:
        prior = prior.flatten(0, 1)
    options: dict[str, Any] = {"precision": precision, "prior": prior, "prior_precision": prior_precision}
    problem = inverse_problem(predict, theta, flat, outcome.flatten(0, 1), start.flatten(0, 1), **options)
    shape, ends = start.shape, list[tuple[Tensor, Tensor]]()

    def solver(tensors: Params, nu0: Params) -> Params:
        part = joined(problem, {key: value for key, value in tensors.items() if key != "coupling"})
        u, done, steps = _descend(part, nu0["u"], tensors["coupling"], tolerance, max_steps)
        ends.append((done, steps))
        return {"u": u}

    def gradient(tensors: Params, nu: Params) -> Params:
        part = joined(problem, {key: value for key, value in tensors.items() if key != "coupling"})
        u = nu["u"]
        r, pull = vjp(lambda x: residuals(part, x.flatten(0, 1)), u)[:2]
        return {"u": pull(r)[0] + _differences(u, tensors["coupling"])}

    layer = implicit_root(gradient, solver, solve=_probed_solve, symmetric=True, strict=strict)
    u = layer(split(problem) | {"coupling": coupling}, {"u": start.detach()})["u"]
    r, J = jacobian(problem, u.detach().flatten(0, 1))
    rank = ranks(problem, J).reshape(shape[:2])
    full = min(shape[2], outcome.shape[2]) if full_rank is None else full_rank
    done, steps = (x.unsqueeze(1).expand(shape[:2]) for x in ends[0])
    return Inversion(u, data_residual(problem, r).reshape(shape[:2]), done, rank, rank < full, steps)


def block_tridiagonal_solve(diagonal: Tensor, lower: Tensor, right: Tensor) -> Tensor:
    """x `[..., T, p]` of the symmetric system with blocks `diagonal [..., T, p, p]`, `lower [..., T - 1, p, p]` below.

    `diagonal_t x_t + lower_{t-1} x_{t-1} + lower_t' x_{t+1} = right_t`, eliminated forward, substituted backward.
    """
    pivots, reduced = [torch.linalg.inv(diagonal[..., 0, :, :])], [right[..., 0, :]]
    for t in range(1, diagonal.shape[-3]):
        below = lower[..., t - 1, :, :]
        factor = below @ pivots[-1]
        pivots.append(torch.linalg.inv(diagonal[..., t, :, :] - factor @ below.mT))
        reduced.append(right[..., t, :] - _apply(factor, reduced[-1]))
    x = [_apply(pivots[-1], reduced[-1])]
    for t in reversed(range(len(pivots) - 1)):
        x.append(_apply(pivots[t], reduced[t] - _apply(lower[..., t, :, :].mT, x[-1])))
    return torch.stack(x[::-1], -2)


def _differences(u: Tensor, coupling: Tensor) -> Tensor:
    """Half the gradient of `sum_t |u_{t+1} - u_t|^2_D`."""
    pull = u.diff(dim=1) @ coupling
    zero = torch.zeros_like(u[:, :1])
    return torch.cat([zero, pull], 1) - torch.cat([pull, zero], 1)


def _descend(
    problem: InverseProblem, start: Tensor, coupling: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """u `[E, T, p]`, converged `[E]`, steps `[E]`: stationary means a relative step below the tolerance."""
    episodes, length, width = start.shape
    u, mu = start, start.new_full((episodes, 1, 1, 1), 1e-6)
    done, steps = torch.zeros(episodes, dtype=torch.bool), torch.zeros(episodes, dtype=torch.long)
    eye = torch.eye(width).to(start)
    neighbours = start.new_tensor([float((t > 0) + (t + 1 < length)) for t in range(length)]).reshape(-1, 1, 1)
    lower = -coupling.expand(episodes, length - 1, width, width)

    def value(x: Tensor) -> Tensor:
        data = residuals(problem, x.flatten(0, 1)).square().sum(-1).reshape(episodes, length).sum(-1)
        return data + (x.diff(dim=1) @ coupling * x.diff(dim=1)).sum((-2, -1))

    now = value(u)
    for _ in range(max_steps):
        r, J = (x.reshape(episodes, length, *x.shape[1:]) for x in jacobian(problem, u.flatten(0, 1)))
        gradient = _apply(J.mT, r) + _differences(u, coupling)
        normal = J.mT @ J + neighbours * coupling
        scale = normal.diagonal(dim1=-2, dim2=-1).amax((-2, -1)).reshape(-1, 1, 1, 1)
        step = -block_tridiagonal_solve(normal + mu * scale * eye, lower, gradient)
        small = step.abs().amax((-2, -1)) <= tolerance * u.abs().amax((-2, -1)).clamp(min=1.0)
        trial = value(u + step)
        taken = ~done & ((trial <= now) | (small & (trial <= now * (1 + 1e-12))))
        u = torch.where(taken.reshape(-1, 1, 1), u + step, u)
        now, steps = torch.where(taken, trial, now), steps + (~done).long()
        done = done | (small & (mu.flatten() < 1e-3))
        mu = torch.where(taken.reshape(-1, 1, 1, 1), (mu * 0.1).clamp(min=1e-14), mu.clamp(min=1e-8) * 10)
        if bool(done.all()):
            break
    return u, done, steps


def _probed_solve(matvec: Matvec, b: Params, *, batch_dims: int = 0) -> LinearSolution:
    """The blocks of a symmetric block-tridiagonal matrix, from 3 p products, and the solve with them."""
    v = b["u"]
    length, width = v.shape[-2:]
    eye = torch.eye(width, dtype=v.dtype, device=v.device)
    diagonal, lower = v.new_zeros(*v.shape, width), v.new_zeros(*v.shape[:-2], length - 1, width, width)
    for first in range(min(3, length)):  # columns three apart do not touch the same row
        at = torch.arange(first, length, 3, device=v.device)
        chosen = torch.zeros(length, 1, dtype=v.dtype, device=v.device).index_fill(0, at, 1.0)
        columns = torch.stack([matvec({"u": (chosen * e).expand_as(v)})["u"] for e in eye], -1)
        diagonal = diagonal.index_copy(-3, at, columns.index_select(-3, at))
        before = at[at + 1 < length]
        lower = lower.index_copy(-3, before, columns.index_select(-3, before + 1))
    x = block_tridiagonal_solve(diagonal, lower, v)
    return LinearSolution({"u": x}, SolveReport(True, 0.0, 3 * width, "block elimination along time"))


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
