"""Inversion by batched gradient descent and by the cross-entropy method: arguments and report as `inversion.invert`.

Adam, the method of the public implementation, on |r|^2 of each row,

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   u <- clip(u - rate mhat / (sqrt(vhat) + eps)),

and CEM: each round draws `samples` inputs from a normal distribution for each row, and fits mean and deviation to the
best `elite` of them. Neither is meant to win: Levenberg-Marquardt does. The search of CEM asks for no derivative of the
map (the reported rank does).
References: Kingma and Ba, Adam, 2015; Rubinstein and Kroese, The cross-entropy method, 2004.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from sim2real.params import Params
from sim2real.solvers.inversion_problem import (
    Inversion,
    Predict,
    allowed,
    detached,
    finished,
    inverse_problem,
    jacobian,
    ranks,
    residuals,
    select,
)


def invert_adam(
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
    tolerance: float = 1e-8,
    max_steps: int = 600,
    rate: float = 0.01,
) -> Inversion:
    """Adam from start; a row stops as converged when its residual is below `tolerance` times the norm of y, or of 1.

    The answer carries no derivatives. Other arguments and errors as for `inversion.invert`.
    """
    terms: dict[str, Any] = {"precision": precision, "prior": prior, "prior_precision": prior_precision}
    problem = detached(inverse_problem(predict, theta, rows, outcome, start, low=low, high=high, **terms))
    index, part, u = torch.arange(len(start), device=start.device), problem, start.detach().double()
    answer, steps = u, torch.zeros_like(index)
    first, second = torch.zeros_like(u), torch.zeros_like(u)
    for t in range(1, max_steps + 1):
        r, pull = vjp(lambda x, part=part: residuals(part, x), u)[:2]
        moving = r.norm(dim=-1) > allowed(part, tolerance)
        if not bool(moving.any()):
            break
        (gradient,) = pull(2 * r)
        if int(moving.sum()) < 0.7 * len(index):
            part, kept = select(part, moving.nonzero().flatten()), (index, u, first, second, gradient)
            index, u, first, second, gradient = (x[moving] for x in kept)
            moving = moving[moving]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        step = rate * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        u = torch.where(moving.unsqueeze(-1), (u - step).clamp(part.low, part.high), u)
        answer = answer.index_put((index,), u)
        steps = steps.index_add(0, index, moving.long())
    r, J = jacobian(problem, answer)
    done, full = r.norm(dim=-1) <= allowed(problem, tolerance), min(start.shape[1], outcome.shape[1])
    return finished(
        problem,
        answer,
        r,
        ranks(problem, J),
        stationary=done,
        steps=steps,
        full_rank=full if full_rank is None else full_rank,
    )


def invert_cem(
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
    tolerance: float = 1e-8,
    max_steps: int = 50,
    samples: int = 50,
    elite: int = 10,
    spread: float = 1.0,
    generator: torch.Generator | None = None,
) -> Inversion:
    """Cross-entropy search from start with the standard deviation `spread` (units of u); otherwise as `invert_adam`."""
    if not 1 < elite <= samples:
        raise ValueError(f"elite must lie in 2 ... samples, got elite={elite} and samples={samples}")
    terms: dict[str, Any] = {"precision": precision, "prior": prior, "prior_precision": prior_precision}
    problem = detached(inverse_problem(predict, theta, rows, outcome, start, low=low, high=high, **terms))
    mean = start.detach().double()
    count, width = mean.shape
    deviation, best = torch.full_like(mean, spread), mean
    lowest = residuals(problem, mean).square().sum(-1)
    wide = select(problem, torch.arange(count, device=mean.device).repeat(samples))
    for _ in range(max_steps):
        if bool((lowest.sqrt() <= allowed(problem, tolerance)).all()):
            break
        draw = torch.randn(samples, count, width, generator=generator, dtype=mean.dtype, device=mean.device)
        tried = (mean + deviation * draw).clamp(problem.low, problem.high)
        values = residuals(wide, tried.flatten(0, 1)).square().sum(-1).reshape(samples, count)
        values, order = torch.where(values.isnan(), torch.inf, values).sort(0)
        chosen = tried.gather(0, order[:elite].unsqueeze(-1).expand(-1, -1, width))
        mean, deviation = chosen.mean(0), chosen.std(0)
        better = values[0] < lowest
        best, lowest = torch.where(better.unsqueeze(-1), chosen[0], best), torch.where(better, values[0], lowest)
    r, J = jacobian(problem, best)
    done, full = r.norm(dim=-1) <= allowed(problem, tolerance), min(start.shape[1], outcome.shape[1])
    steps = torch.full_like(done, max_steps, dtype=torch.long)
    return finished(
        problem,
        best,
        r,
        ranks(problem, J),
        stationary=done,
        steps=steps,
        full_rank=full if full_rank is None else full_rank,
    )
