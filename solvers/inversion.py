"""Which unseen input u explains an observed transition: a batch of small inverse problems, solved and differentiated.

    u = argmin_u |y - g(theta, rows, u)|^2_W + |u - c|^2_S     subject to   low <= u <= high

by batched Levenberg-Marquardt with forward-mode Jacobians (`inversion_search`), started from the closed form of the
linearised problem. Linear problems have closed forms: `inversion_lqr`. Siblings with the same arguments:
`inversion_descent`. Rows coupled in time: `inversion_smoothing`. Maps made of a model and a lower level:
`inversion_maps`.

Derivative, by the implicit function theorem for `F = J'r = 0` on the coordinates that are not held at a bound, with
r and J as in `inversion_problem`. F_u is block diagonal, one block `[p, p]` per row, found by p products:

    du = -F_u^-1 F_theta dtheta,       F_u = J'J + sum_k r_k d2r_k/du2      ("full")
                                       F_u = J'J, J constant in F           ("gauss_newton", exact where r = 0)

Reference: Schmidt et al., Offline hierarchical reinforcement learning via inverse optimization, 2024, equations 5, 6.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vjp

from sim2real.params import Params
from sim2real.solve_report import LinearSolution, SolveReport, UnconvergedError, UnconvergedWarning
from sim2real.solvers.implicit import implicit_root
from sim2real.solvers.inversion_problem import (
    InverseProblem,
    Inversion,
    Predict,
    detached,
    edge_ranks,
    finished,
    inverse_problem,
    joined,
    residuals,
    split,
)
from sim2real.solvers.inversion_search import Found, search
from sim2real.solvers.linear import Matvec

Curvature = Literal["full", "gauss_newton"]


def invert(
    predict: Predict,
    theta: Params,
    rows: Params,
    outcome: Tensor,
    start: Tensor,
    *,
    precision: Tensor | None = None,
    prior: Tensor | None = None,
    prior_precision: Tensor | None = None,
    low: Tensor | float = -math.inf,
    high: Tensor | float = math.inf,
    full_rank: int | None = None,
    tolerance: float = 1e-11,
    max_steps: int = 60,
    curvature: Curvature = "full",
    differentiable: bool = True,
    strict: bool = False,
) -> Inversion:
    """The input `[N, p]` that explains each outcome `[N, q]` best, differentiable in theta, rows, outcome and prior.

    predict(theta, rows, u) -> `[N, q]` must treat rows apart. start `[N, p]`: where the map is linearised; where u is
    not unique, the answer is near it. precision W, prior_precision S: `[q]` diagonal, `[q, q]` or `[N, q, q]`, positive
    definite, the inverse of a noise covariance; prior c `[N, p]`, by default start. low and high: numbers, `[p]` or
    `[N, p]`.

    A row is `saturated` when dg/du has a rank below `full_rank` (default the smaller of p and q; 2 for one step of two
    motors): limits hide the input, any of a set explains the row, and u is NaN there, without derivative. `converged`:
    the residual is below `tolerance` times the norm of y (at least 1), or stationary. `curvature`: "gauss_newton" for
    an engine whose step has first derivatives only; second derivatives of the answer are then wrong.
    `differentiable=False` saves the cost of preparing derivatives.
    Rows that did not converge warn `UnconvergedWarning` when differentiated, under `strict` raise `UnconvergedError`.
    Raises `ValueError` for data that do not fit.
    """
    terms: dict[str, Any] = {"precision": precision, "prior": prior, "prior_precision": prior_precision}
    problem = inverse_problem(predict, theta, rows, outcome, start, low=low, high=high, **terms)
    full = min(start.shape[1], outcome.shape[1]) if full_rank is None else full_rank
    find = partial(search, tolerance=tolerance, max_steps=max_steps, full_rank=full)
    if not differentiable:
        plain, start = detached(problem), start.detach().double()
        found = find(plain, start)
        u, rank = found.u, edge_ranks(plain, found.u, found.J, start)
    else:
        u, found, rank = _layer(problem, start, find, full, curvature, strict)
    stationary = found.stationary
    return finished(problem, u, found.r, rank, stationary=stationary, steps=found.steps, full_rank=full)


def _layer(
    problem: InverseProblem,
    start: Tensor,
    find: Callable[[InverseProblem, Tensor], Found],
    full_rank: int,
    curvature: Curvature,
    strict: bool,
) -> tuple[Tensor, Found, Tensor]:
    """u with derivatives, the search behind it, and the ranks."""
    ends: list[tuple[Found, Tensor]] = []

    def solver(tensors: Params, nu0: Params) -> Params:
        part = joined(problem, tensors)
        found = find(part, nu0["u"])
        ends.append((found, edge_ranks(part, found.u, found.J, nu0["u"])))
        return {"u": found.u}

    def residual(tensors: Params, nu: Params) -> Params:
        part, u = joined(problem, tensors), nu["u"]
        found, rank = ends[0]
        if curvature == "gauss_newton":
            slope = (found.J.mT @ residuals(part, u).unsqueeze(-1)).squeeze(-1)
        else:
            r, pull = vjp(lambda x: residuals(part, x), u)[:2]
            (slope,) = pull(r)
        at_low = found.held & (found.u <= part.low)
        slope = torch.where(found.held, u - torch.where(at_low, part.low, part.high), slope)
        return {"u": torch.where((rank < full_rank).unsqueeze(-1), u - found.u, slope)}

    layer = implicit_root(residual, solver, solve=_row_solve, tol=math.inf)  # rows are judged below
    u = layer(split(problem), {"u": start.detach()})["u"]
    found, rank = ends[0]
    late = ~(found.stationary | (rank < full_rank))
    if bool(late.any()):
        message = (
            f"invert: {int(late.sum())} of {len(u)} rows (first: {late.nonzero().flatten()[:5].tolist()}) did not "
            "converge, their derivatives belong to another point: raise max_steps, give a nearer start, or drop them"
        )
        if strict:
            raise UnconvergedError(message)
        warnings.warn(message, UnconvergedWarning, stacklevel=3)
    return u, found, rank


def _row_solve(matvec: Matvec, b: Params, *, batch_dims: int = 0) -> LinearSolution:
    """Blocks of a matrix that couples no two rows, from one product for each column, and their pseudo-inverses."""
    v = b["u"]
    columns = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    blocks = torch.stack([matvec({"u": e.expand_as(v)})["u"] for e in columns], -1)
    x = (torch.linalg.pinv(blocks, rtol=1e-13) @ v.unsqueeze(-1)).squeeze(-1)
    report = SolveReport(True, 0.0, v.shape[-1], "solved row by row")
    return LinearSolution({"u": x}, report)
