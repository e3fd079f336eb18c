"""Gauss-Newton with the natural level function: for inverse problems too ill conditioned for descent of |r|^2.

    d = -J^+ r,      u <- u + lambda d,      lambda = argmin |J^+ r(u + lambda d)|  over 1, 1/2, ..., 1/1000

Where limits hide most of an input (all torques of one motor at their limit), what remains of J has singular values of
1e-6 to 1e-10: the answer lies along a curved valley so narrow that no step of useful length decreases |r|. Measured in
the input, by J^+, the same step is seen to help: the test does not change under any linear map of the outcome.
Reference: Deuflhard, Newton methods for nonlinear problems, 2004, sections 3.3 (natural level) and 4.3 (Gauss-Newton).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim2real.solvers.inversion_problem import InverseProblem, allowed, free_gradient, jacobian, residuals, select

LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 0.001)
_RTOL = 1e-12


def natural_steps(problem: InverseProblem, start: Tensor, *, tolerance: float, max_steps: int) -> Tensor:
    """The inputs `[N, p]` of smallest `|r|` met in `max_steps` steps from start; rows leave when r is negligible."""
    index = torch.arange(len(start), device=start.device)
    best, lowest = start, torch.full_like(start[:, 0], torch.inf)
    part, u = problem, start
    for _ in range(max_steps):
        r, J = jacobian(part, u)
        size = torch.where(r.isfinite().all(-1), r.norm(dim=-1), torch.inf)
        better = size < lowest[index]
        best = best.index_put((index[better],), u[better])
        lowest = lowest.index_put((index[better],), size[better])
        moving = (size > allowed(part, tolerance)) & J.isfinite().all(-1).all(-1)
        if not bool(moving.any()):
            break
        if not bool(moving.all()):
            part, index, u, r, J = select(part, moving.nonzero().flatten()), *(x[moving] for x in (index, u, r, J))
        u = _stepped(part, u, r, J)
    return best


def _stepped(problem: InverseProblem, u: Tensor, r: Tensor, J: Tensor) -> Tensor:
    held = free_gradient(problem, u, r, J)[1]
    pseudo = torch.linalg.pinv(torch.where(held.unsqueeze(-2), 0.0, J), rtol=_RTOL)
    direction = -(pseudo @ r.unsqueeze(-1)).squeeze(-1)
    lengths = u.new_tensor(LENGTHS).reshape(-1, 1, 1)
    trials = (u + lengths * direction).clamp(problem.low, problem.high)
    wide = select(problem, torch.arange(len(u), device=u.device).repeat(len(LENGTHS)))
    ahead = residuals(wide, trials.flatten(0, 1)).reshape(len(LENGTHS), *r.shape)
    levels = (pseudo @ ahead.unsqueeze(-1)).squeeze(-1).norm(dim=-1)
    chosen = torch.where(levels.isnan(), torch.inf, levels).argmin(0)
    return trials.gather(0, chosen.reshape(1, -1, 1).expand(1, *u.shape)).squeeze(0)
