"""The inverse problem that all inversions share: which unseen input explains an observed outcome.

    u_i = argmin_u  (y_i - g(theta, rows_i, u))' W_i (y_i - g(theta, rows_i, u)) + (u - c_i)' S_i (u - c_i)
    subject to      low <= u <= high,

for every row i of a batch at once. g is any differentiable map: one model step, T steps under a lower level that is
given the goal u, the torques of that lower level. `rows` holds what is known of each transition: the state it starts
in, logged gains, poses.

Internally a sum of squares `|r|^2`, r = [L'(g - y), R'(u - c)] with W = L L' and S = R R'.
Reference: Schmidt, Gammelli, Harrison, Pavone, Rodrigues, Offline hierarchical reinforcement learning via inverse
optimization, 2024, equations 5 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from sim2real.params import Params

Predict = Callable[[Params, Params, Tensor], Tensor]
"""theta, rows (each `[N, ...]`), u `[N, p]` -> outcome `[N, q]`; row i of the outcome depends on row i alone"""


@dataclass(frozen=True)
class Inversion:
    """The input that explains each row; only `u` carries derivatives."""

    u: Tensor
    """`[N, p]`; NaN in `saturated` rows, where no single input is the answer"""
    residual: Tensor
    """`[N]`: root of `(y - g)'W(y - g)` at the input found, in saturated rows too"""
    converged: Tensor
    """`[N]` bool: the residual is negligible, or no direction left free decreases the objective"""
    rank: Tensor
    """`[N]`: of the Jacobian dg/du, weighted by W"""
    saturated: Tensor
    """`[N]` bool: the rank is below `full_rank`: a whole set of inputs explains the row equally well"""
    steps: Tensor
    """`[N]`: iterations spent"""


@dataclass(frozen=True)
class InverseProblem:
    """A checked batch of inverse problems; see the module."""

    predict: Predict
    theta: Params
    rows: Params
    outcome: Tensor
    """`[N, q]`"""
    root: Tensor | None
    """L' `[q, q]` or `[N, q, q]`, W = L L'; None: the identity"""
    center: Tensor
    """c `[N, p]`"""
    prior_root: Tensor | None
    """R' `[p, p]` or `[N, p, p]`, S = R R'; None: no regulariser"""
    low: Tensor
    high: Tensor
    """`[N, p]`"""


def inverse_problem(
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
) -> InverseProblem:
    """Check the data once; arguments as for `inversion.invert`. Raises `ValueError` naming what does not fit."""
    if outcome.ndim != 2 or start.ndim != 2 or len(outcome) != len(start) or not len(start) or not start.shape[1]:
        raise ValueError(
            f"outcome must be [N, q] and start [N, p], got {tuple(outcome.shape)} and {tuple(start.shape)}"
        )
    for name, value in rows.items():
        if value.ndim == 0 or len(value) != len(start):
            raise ValueError(f"rows['{name}'] must be [N, ...] with N = {len(start)}, got {tuple(value.shape)}")
    if prior is not None and (prior_precision is None or prior.shape != start.shape):
        raise ValueError(
            f"prior must be shaped like start, {tuple(start.shape)}, and needs prior_precision; got "
            f"{tuple(prior.shape)} and prior_precision {'None' if prior_precision is None else 'given'}"
        )
    data: dict[str, Tensor | None] = {"outcome": outcome, "start": start, "prior": prior, **rows}
    for name, given in data.items():
        if given is not None and not bool(torch.isfinite(given).all()):
            raise ValueError(f"{name} holds values that are not finite; drop or mask those rows first")
    bounds = [torch.as_tensor(b, dtype=start.dtype, device=start.device).expand_as(start) for b in (low, high)]
    outside = ((start < bounds[0]) | (start > bounds[1])).any(-1)
    if bool(outside.any()):
        raise ValueError(
            f"start lies outside [low, high] in {int(outside.sum())} rows, first {int(outside.nonzero()[0])}"
        )
    return InverseProblem(
        predict,
        theta,
        rows,
        outcome,
        precision_root(precision, outcome, "precision"),
        start if prior is None else prior,
        precision_root(prior_precision, start, "prior_precision"),
        *bounds,
    )


def precision_root(precision: Tensor | None, like: Tensor, name: str) -> Tensor | None:
    """L' of a matrix `[q, q]` or `[N, q, q]`, or of a diagonal `[q]`."""
    if precision is None:
        return None
    size = like.shape[1]
    if precision.shape not in ((size,), (size, size), (len(like), size, size)):
        wanted = f"[{size}], [{size}, {size}] or [{len(like)}, {size}, {size}]"
        raise ValueError(f"{name} must be {wanted}, got {list(precision.shape)}")
    matrix = torch.diag(precision) if precision.ndim == 1 else precision
    factor, failed = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.mT))
    if bool((failed > 0).any()):
        raise ValueError(
            f"{name} must be positive definite: leave signals that carry no information out of the outcome"
        )
    return factor.mT


def split(problem: InverseProblem) -> Params:
    """Every floating-point tensor of the problem under one name."""
    fields = {name: getattr(problem, name) for name in ("outcome", "root", "center", "prior_root", "low", "high")}
    named = {f"theta.{key}": value for key, value in problem.theta.items()}
    named |= {f"rows.{key}": value for key, value in problem.rows.items()}
    named |= fields
    return {key: value for key, value in named.items() if value is not None and value.is_floating_point()}


def joined(problem: InverseProblem, tensors: Params) -> InverseProblem:
    """The problem with the tensors of `split` replaced."""
    fields: dict[str, Any] = {key: value for key, value in tensors.items() if "." not in key}
    theta = {key: tensors.get(f"theta.{key}", value) for key, value in problem.theta.items()}
    rows = {key: tensors.get(f"rows.{key}", value) for key, value in problem.rows.items()}
    return replace(problem, theta=theta, rows=rows, **fields)


def detached(problem: InverseProblem) -> InverseProblem:
    """The problem in float64, cut from the graph of its tensors."""
    return joined(problem, {key: value.detach().double() for key, value in split(problem).items()})


def select(problem: InverseProblem, index: Tensor) -> InverseProblem:
    """The problem of some of the rows."""

    def pick(root: Tensor | None) -> Tensor | None:
        return root if root is None or root.ndim == 2 else root[index]

    return replace(
        problem,
        rows={key: value[index] for key, value in problem.rows.items()},
        outcome=problem.outcome[index],
        root=pick(problem.root),
        center=problem.center[index],
        prior_root=pick(problem.prior_root),
        low=problem.low[index],
        high=problem.high[index],
    )


def residuals(problem: InverseProblem, u: Tensor) -> Tensor:
    """r `[N, q]`, or `[N, q + p]` with a regulariser."""
    given = problem.predict(problem.theta, problem.rows, u)
    if given.shape != problem.outcome.shape:
        wanted = tuple(problem.outcome.shape)
        raise ValueError(f"predict(theta, rows, u) gave {tuple(given.shape)}, the outcome is {wanted}")
    data = apply_root(problem.root, given - problem.outcome)
    if problem.prior_root is None:
        return data
    return torch.cat([data, apply_root(problem.prior_root, u - problem.center)], -1)


def jacobian(problem: InverseProblem, u: Tensor) -> tuple[Tensor, Tensor]:
    """r `[N, q']` and `dr/du [N, q', p]`, forward mode: one tangent for each column, none of them crossing rows."""
    width = u.shape[-1]
    # explicit zero tangents for what does not move: implicit ones cost a Python call per operation
    fixed = {key: value.contiguous() for key, value in problem.theta.items() if value.is_floating_point()}
    known = {key: value.contiguous() for key, value in problem.rows.items() if value.is_floating_point()}
    still = tuple({key: torch.zeros_like(value) for key, value in part.items()} for part in (fixed, known))

    def at(theta: Params, rows: Params, x: Tensor) -> Tensor:
        return residuals(replace(problem, theta=problem.theta | theta, rows=problem.rows | rows), x)

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        value, tangent = jvp(at, (fixed, known, u), (*still, direction.expand_as(u)))[:2]
        return value, tangent

    value, columns = vmap(along, out_dims=(0, -1))(torch.eye(width, dtype=u.dtype, device=u.device))
    return value[0], columns


def data_residual(problem: InverseProblem, r: Tensor) -> Tensor:
    """`[N]` norm of the part of r that belongs to the outcome."""
    return r[:, : problem.outcome.shape[1]].norm(dim=-1)


def allowed(problem: InverseProblem, tolerance: float) -> Tensor:
    """`[N]`: a residual below this is negligible."""
    return tolerance * problem.outcome.norm(dim=-1).clamp(min=1.0)


def free_gradient(problem: InverseProblem, u: Tensor, r: Tensor, J: Tensor) -> tuple[Tensor, Tensor]:
    """`J'r`, zero for coordinates held at a bound (the gradient points outward), and which those are."""
    gradient = (J.mT @ r.unsqueeze(-1)).squeeze(-1)
    held = ((u <= problem.low) & (gradient > 0)) | ((u >= problem.high) & (gradient < 0))
    return torch.where(held, 0.0, gradient), held


def ranks(problem: InverseProblem, J: Tensor) -> Tensor:
    """`[N]` rank of the weighted dg/du: singular values above 1e-9 of the row's largest."""
    values = torch.linalg.svdvals(J[:, : problem.outcome.shape[1]])
    return (values > 1e-9 * values[:, :1]).sum(-1)


def edge_ranks(problem: InverseProblem, u: Tensor, J: Tensor, start: Tensor) -> Tensor:
    """`[N]` least rank at u and just before and behind it, as seen from start.

    A search that comes from inside a limit ends on the edge of the set of answers, where J is still of full rank.
    """
    away = u - start
    size = away.norm(dim=-1, keepdim=True)
    along = torch.where(size > 0, away / size.clamp(min=torch.finfo(u.dtype).tiny), torch.ones_like(u))
    rank = ranks(problem, J)
    for sign in (1e-6, -1e-6):
        probe = u + sign * u.norm(dim=-1, keepdim=True).clamp(min=1.0) * along
        beside = jacobian(problem, probe.clamp(problem.low, problem.high))[1]
        rank = torch.minimum(rank, ranks(problem, beside))
    return rank


def finished(
    problem: InverseProblem, u: Tensor, r: Tensor, rank: Tensor, *, stationary: Tensor, steps: Tensor, full_rank: int
) -> Inversion:
    """The report at u; `stationary [N]` says which rows are done."""
    saturated = rank < full_rank
    shown = torch.where(saturated.unsqueeze(-1), math.nan, u)
    return Inversion(shown, data_residual(problem, r), stationary, rank, saturated, steps)


def apply_root(root: Tensor | None, vector: Tensor) -> Tensor:
    """L' times each row."""
    return vector if root is None else (root @ vector.unsqueeze(-1)).squeeze(-1)
