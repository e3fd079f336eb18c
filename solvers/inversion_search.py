"""Levenberg-Marquardt on many small inverse problems at once, each row with its own damping and its own end.

    s = argmin_s |r + J s|^2 + mu m |s|^2   subject to   low <= u + s <= high,     m = largest diag J'J met so far

Rows leave the batch as they finish. The damping is isotropic, so a step stays in the row space of J: where J is rank
deficient the answer is the explanation nearest to the start. With the gain ratio rho the step is taken when rho > 1e-4
and mu becomes mu max(1/3, 1 - (2 rho - 1)^3), otherwise mu grows by 2, 4, 8, ...

A limit in the map (a clipped torque) flattens it: a start beyond the limit has nothing to descend. So the search begins
at the point along the linearised step from the reference, `start - J^+ r`, that explains the row best. What ten steps
leave goes to `inversion_natural`, what that leaves begins again at the other points along the linearised step.
Reference: Madsen, Nielsen, Tingleff, Methods for non-linear least squares problems, 2004, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sim2real.solvers.box_qp import box_qp
from sim2real.solvers.inversion_natural import natural_steps
from sim2real.solvers.inversion_problem import (
    InverseProblem,
    allowed,
    data_residual,
    free_gradient,
    jacobian,
    ranks,
    residuals,
    select,
)

FRACTIONS = (1.0, 0.0, 0.5, 0.25, 0.75, 1.5, 2.0, 3.0, 5.0)
"""of the linearised step, where the search may begin"""
_FLOOR = 1e-12
_HOPELESS = 1e14
_FIRST, _NATURAL = 8, 25


@dataclass(frozen=True)
class Found:
    """Where each row ended, all `[N, ...]`."""

    u: Tensor
    r: Tensor
    J: Tensor
    stationary: Tensor
    held: Tensor
    steps: Tensor


@dataclass(frozen=True)
class _Rows:
    """The rows still moving."""

    index: Tensor
    u: Tensor
    r: Tensor
    J: Tensor
    damping: Tensor
    growth: Tensor
    scale: Tensor


def search(problem: InverseProblem, start: Tensor, *, tolerance: float, max_steps: int, full_rank: int) -> Found:
    """Minimise every row from the best of its beginnings, then rows left unexplained from the others."""
    reference = jacobian(problem, start)
    step = _linearised(*reference)
    candidates = torch.stack([(start + f * step).clamp(problem.low, problem.high) for f in FRACTIONS])
    values = torch.stack([residuals(problem, u).square().sum(-1) for u in candidates])
    order = torch.where(values.isnan(), torch.inf, values).argsort(dim=0, stable=True)
    pick = lambda k: candidates.gather(0, order[k].reshape(1, -1, 1).expand(1, *start.shape)).squeeze(0)
    found = _attempt(problem, pick(0), tolerance, full_rank)
    for attempt in range(1, len(FRACTIONS)):
        again = _unexplained(problem, found, tolerance, full_rank).nonzero().flatten()
        if not len(again):
            return found
        found = _improved(found, again, _attempt(select(problem, again), pick(attempt)[again], tolerance, full_rank))
    left = (~found.stationary).nonzero().flatten()
    if len(left):
        part = select(problem, left)
        found = _improved(found, left, descend(part, found.u[left], tolerance=tolerance, max_steps=max_steps))
    return found


def _attempt(problem: InverseProblem, start: Tensor, tolerance: float, full_rank: int) -> Found:
    """Descent from one start; what it leaves, by natural steps."""
    found = descend(problem, start, tolerance=tolerance, max_steps=_FIRST)
    hard = (_unexplained(problem, found, tolerance, full_rank) & ~found.stationary).nonzero().flatten()
    if not len(hard):
        return found
    part = select(problem, hard)
    u = natural_steps(part, found.u[hard], tolerance=tolerance, max_steps=_NATURAL)
    r, J = jacobian(part, u)
    steps = torch.full_like(hard, _NATURAL)
    return _improved(found, hard, Found(u, r, J, *_ends(part, u, r, J, tolerance), steps))


def _improved(found: Found, index: Tensor, other: Found) -> Found:
    """The better end of each row, all steps counted."""
    better = (other.r.square().sum(-1) < found.r[index].square().sum(-1)) | (
        other.stationary & ~found.stationary[index]
    )
    steps = found.steps.index_add(0, index, other.steps)
    return replace(_updated(found, index[better], _subset(other, better)), steps=steps)


def _linearised(r: Tensor, J: Tensor) -> Tensor:
    """The closed form of the linearised problem: `-J^+ r`."""
    return -(torch.linalg.pinv(J, rtol=1e-9) @ r.unsqueeze(-1)).squeeze(-1)


def _unexplained(problem: InverseProblem, found: Found, tolerance: float, full_rank: int) -> Tensor:
    """Rows whose outcome is not met and that may have met a flat region instead of a minimum."""
    missed = data_residual(problem, found.r) > allowed(problem, 2 * tolerance)
    stuck = missed & ~found.stationary
    doubtful = (missed & found.stationary).nonzero().flatten()
    flat = ranks(select(problem, doubtful), found.J[doubtful]) < full_rank if len(doubtful) else doubtful.bool()
    return stuck.index_put((doubtful,), flat)


def descend(problem: InverseProblem, start: Tensor, *, tolerance: float, max_steps: int) -> Found:
    """Levenberg-Marquardt from one start `[N, p]` for all rows."""
    r, J = jacobian(problem, start)
    count = torch.zeros(len(start), dtype=torch.long, device=start.device)
    found = Found(start, r, J, *_ends(problem, start, r, J, tolerance), count)
    rows = _Rows(
        count.new_tensor(range(len(start))),
        start,
        r,
        J,
        torch.full_like(r[:, 0], 1e-6),
        torch.full_like(r[:, 0], 2.0),
        J.square().sum(-2).amax(-1),
    )
    part, moving = problem, ~found.stationary
    for _ in range(max_steps):
        if not bool(moving.any()):
            break
        if not bool(moving.all()):
            rows, part = _kept(rows, moving), select(part, moving.nonzero().flatten())
        rows, taken = _step(part, rows)
        found = replace(found, steps=found.steps.index_add(0, rows.index, torch.ones_like(rows.index)))
        done, held = _ends(part, rows.u, rows.r, rows.J, tolerance)
        update = taken | done
        ends = Found(rows.u, rows.r, rows.J, done, held, found.steps[rows.index])
        found = _updated(found, rows.index[update], _subset(ends, update))
        moving = ~done & (rows.damping < _HOPELESS)
    return found


def _step(problem: InverseProblem, rows: _Rows) -> tuple[_Rows, Tensor]:
    """One trial for every row."""
    gradient, normal = (rows.J.mT @ rows.r.unsqueeze(-1)).squeeze(-1), rows.J.mT @ rows.J
    mu = (rows.damping * rows.scale).clamp(min=torch.finfo(rows.u.dtype).tiny)
    damped = normal + torch.diag_embed(mu.unsqueeze(-1).expand_as(rows.u))
    trial = _trial(problem, rows.u, damped, gradient)
    step = trial - rows.u
    promised = -(2 * gradient * step + step * (normal @ step.unsqueeze(-1)).squeeze(-1)).sum(-1)
    r, J = jacobian(problem, trial)
    gain = (rows.r.square().sum(-1) - r.square().sum(-1)) / promised
    descends = (promised > 0) & (gain > 1e-4)
    # a decrease below rounding is judged by the gradient, which can be told more exactly than the value
    level = promised.abs() <= 1e-13 * rows.r.square().sum(-1)
    before, after = free_gradient(problem, rows.u, rows.r, rows.J)[0], free_gradient(problem, trial, r, J)[0]
    descends = descends | (level & (after.norm(dim=-1) < 0.9 * before.norm(dim=-1)))
    taken = descends & torch.isfinite(J).all(-1).all(-1)
    keep = lambda new, old: torch.where(taken.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    factor = torch.where(level, 0.1, (1 - (2 * gain - 1) ** 3).clamp(min=0.1))
    shrunk = (rows.damping * factor).clamp(min=_FLOOR)
    J = keep(J, rows.J)
    following = _Rows(
        rows.index,
        keep(trial, rows.u),
        keep(r, rows.r),
        J,
        keep(shrunk, rows.damping.clamp(min=1e-4) * rows.growth),
        keep(torch.full_like(gain, 2.0), rows.growth * 2),
        torch.maximum(rows.scale, J.square().sum(-2).amax(-1)),
    )
    return following, taken


def _trial(problem: InverseProblem, u: Tensor, damped: Tensor, gradient: Tensor) -> Tensor:
    """The minimiser of the damped model; where that leaves the box, inside the box."""
    factor = torch.linalg.cholesky_ex(damped).L
    trial = u - torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    out = ((trial < problem.low) | (trial > problem.high)).any(-1).nonzero().flatten()
    if not len(out):
        return trial
    x, low, high = u[out], problem.low[out], problem.high[out]
    inside = box_qp(damped[out], gradient[out], low - x, high - x, tol=1e-8).x
    return trial.index_put((out,), (x + inside).clamp(low, high))


def _ends(problem: InverseProblem, u: Tensor, r: Tensor, J: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Done: r negligible, or at right angles to every free column of J. Held: at a bound, gradient outward."""
    gradient, held = free_gradient(problem, u, r, J)
    right_angle = (gradient.abs() <= 1e-12 * J.norm(dim=-2) * r.norm(dim=-1, keepdim=True)).all(-1)
    return right_angle | (r.norm(dim=-1) <= allowed(problem, tolerance)), held


def _kept(rows: _Rows, mask: Tensor) -> _Rows:
    return _Rows(*(getattr(rows, name)[mask] for name in rows.__dataclass_fields__))


def _subset(found: Found, mask: Tensor) -> Found:
    return Found(*(getattr(found, name)[mask] for name in found.__dataclass_fields__))


def _updated(found: Found, index: Tensor, rows: Found) -> Found:
    """`found` with the given rows replaced."""
    values = (getattr(found, name).index_put((index,), getattr(rows, name)) for name in found.__dataclass_fields__)
    return Found(*values)
