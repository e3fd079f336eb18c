"""Neumann series: `(A + damping I)^-1 b = step sum_k (I - step (A + damping I))^k b`, given only `matvec(x) = A x`.

Its partial sums are Richardson's iteration `x <- x + step (b - (A + damping I) x)`, which converges for every b if and
only if the spectral radius of `I - step (A + damping I)` is below 1 (Saad, Iterative Methods for Sparse Linear Systems,
2nd ed., theorem 4.1 and example 4.1): with eigenvalues in (0, L] for every step below 2 / L. The step is 1 / L, L from
power iteration (Golub and Van Loan, 4th ed., 7.3.1), so that a low estimate, down to L / 2, does no harm. A truncated
series is the usual cheap inverse of hypergradients: Lorraine, Vicol and Duvenaud, AISTATS 2020, theorem 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sim2real.params import Params
from sim2real.solve_report import LinearSolution
from sim2real.solvers.linear_system import (
    NO_VALUES,
    FlatMatvec,
    Matvec,
    Pass,
    check_finite,
    check_options,
    concluded,
    flatten,
    restarted,
    safe,
    step_limit,
)

_GROWTH = 1e4  # of the residual over its start: beyond what the transients of a convergent series usually reach


def neumann(
    matvec: Matvec,
    b: Params,
    *,
    damping: float = 0.0,
    tol: float = 1e-10,
    max_steps: int | None = None,
    step: float | None = None,
    power_steps: int = 20,
    batch_dims: int = 0,
) -> LinearSolution:
    """Neumann series in `A + damping I`, one `matvec` per term; `step` (units of 1 / A) by power iteration if None.

    Converged means: `||b - (A + damping I) x|| <= tol ||b||`, computed anew from x. Where the series cannot converge,
    or would need more than `max_steps` products (default 1000, power iteration included), the status gives the factor
    that the residual changes by in a step, which tends to the spectral radius; x is then the partial sum of least
    residual. `report.negative_curvature` and `eigenvalues` (given where A proves symmetric) are the extreme Rayleigh
    quotients met. Errors as for `cg`.
    """
    check_options(damping, tol)
    if step is not None and not (step > 0 and math.isfinite(step)):
        raise ValueError(f"step must be finite and > 0 (units of 1 / A), got {step}")
    if power_steps < 2:
        raise ValueError(f"power_steps must be at least 2, got {power_steps}")
    apply, rhs, restore = flatten(matvec, b, batch_dims)
    limit = 1000 if max_steps is None else step_limit(max_steps, rhs.shape[1])

    def damped(x: Tensor) -> Tensor:
        return apply(x) + damping * x

    used, symmetric, ritz = 0, False, NO_VALUES
    if step is None and bool(rhs.any()):
        used = min(power_steps, max(limit - 1, 1))
        largest, symmetric, ritz = _power_iteration(damped, rhs, damping, used)
        steps = 1 / safe(largest, largest > 0)
    else:
        steps = torch.full_like(rhs[:, 0], step if step is not None else 1.0)

    def run(residual: Tensor, goal: Tensor, left: int) -> Pass:
        return _series(damped, residual, damping, goal, left, steps)

    whole, relative = restarted(run, damped, rhs, tol=tol, limit=max(limit - used, 1))
    low, high = min(whole.ritz[0], ritz[0]), max(whole.ritz[1], ritz[1])
    whole = Pass(whole.x, whole.steps + used, (low, high) if symmetric else NO_VALUES, low, whole.stopped)
    stall = "tol is too tight"
    return concluded(whole, relative, restore, tol=tol, limit=limit, damping=damping, stall=stall)


def _power_iteration(
    damped: FlatMatvec, like: Tensor, damping: float, count: int
) -> tuple[Tensor, bool, tuple[float, float]]:
    """Largest growth `|A v| / |v|` of each row, whether A proves symmetric, and the Rayleigh quotients (undamped)."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.shape[1], generator=generator, dtype=like.dtype).to(like.device).expand_as(like)
    v = v / v.norm(dim=1, keepdim=True)
    largest, symmetric, (low, high) = torch.zeros_like(like[:, 0]), False, NO_VALUES
    before = v
    for k in range(count):
        product = damped(v)
        check_finite(product, k + 1, "power iteration")
        size, quotient = product.norm(dim=1), (v * product).sum(1) - damping
        low, high = min(low, float(quotient.min())), max(high, float(quotient.max()))
        if k == 1:  # v = A before / |A before|: for a symmetric A, before' A v = v' A before = |A before|
            gap = ((before * product).sum(1) - largest).abs()
            symmetric = bool((gap <= torch.finfo(gap.dtype).eps ** 0.5 * torch.maximum(size, largest)).all())
        largest = torch.maximum(largest, size)
        before, v = v, product / safe(size, size > 0)[:, None]
    return largest, symmetric, (low, high)


def _series(damped: FlatMatvec, b: Tensor, damping: float, goal: Tensor, limit: int, steps: Tensor) -> Pass:
    """Terms of the series from x = 0 on `[R, P]`, the best partial sum of each row kept; a hopeless row stops alone."""
    x, best, r = torch.zeros_like(b), torch.zeros_like(b), b
    start = size = least = b.norm(dim=1)
    active, factor, count, (low, high) = size > goal, torch.zeros_like(size), 0, NO_VALUES
    diverged = stuck = torch.zeros_like(active)
    while count < limit and bool(active.any()):
        product = damped(r)
        check_finite(product, count + 1, "the Neumann series")
        quotient = ((r * product).sum(1) / safe(size * size, active))[active] - damping
        low, high = min(low, float(quotient.min())), max(high, float(quotient.max()))
        length = torch.where(active, steps, torch.zeros_like(steps))
        x, r = x + length[:, None] * r, r - length[:, None] * product
        before, size, count = size, r.norm(dim=1), count + 1
        factor = torch.where(active, size / safe(before, active), factor)
        best, least = x.where((size < least)[:, None], best), torch.minimum(size, least)
        stuck = stuck | (active & (length * product.norm(dim=1) <= 10 * torch.finfo(b.dtype).eps * before))
        diverged = diverged | (active & (size > _GROWTH * start))
        active = active & (size > goal) & ~stuck & ~diverged
    stopped = _verdict(active, stuck, diverged | (active & (factor >= 1)), factor, count)
    return Pass(best, count, (low, high), low, stopped)


def _verdict(active: Tensor, stuck: Tensor, diverged: Tensor, factor: Tensor, count: int) -> str:
    """Why a pass left a row above its goal; empty when it left none."""
    if bool(diverged.any()):
        grown = f"the residual grew {float(factor[diverged].max()):.6g} times in its last step"
        return f"the Neumann series diverges: {grown}; the spectral radius of I - step (A + damping I) must be below 1"
    if bool(stuck.any()):
        return "the Neumann series stands still: b has a part outside the range of A + damping I"
    if bool(active.any()):
        rate = f"a step leaves {float(factor[active].max()):.6g} of the residual"
        return f"the Neumann series is too slow: {rate}, after {count} terms"
    return ""
