"""What every linear solver shares: options, the operator on rows `[R, P]`, passes on the true residual, the report.

A solver gives one pass, `run(residual, goal, limit)`, which reduces each row of the residual to `goal` as its own
recursion sees it. That recursion drifts from `b - (A + damping I) x`; a pass that starts again from the true residual
takes the last digits (iterative refinement: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., ch. 12).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.params import Params, check_same_keys
from sim2real.solve_report import LinearSolution, SolveReport

Matvec = Callable[[Params], Params]
FlatMatvec = Callable[[Tensor], Tensor]

NO_VALUES = (math.inf, -math.inf)
"""extreme Ritz values of a recursion that took no step"""


@dataclass(frozen=True)
class Pass:
    """A correction `[R, P]`, its number of products, and what it met of the spectrum of A (undamped)."""

    x: Tensor
    steps: int
    ritz: tuple[float, float] = NO_VALUES
    lowest: float = math.inf
    stopped: str = ""
    """why the answer does not count, whatever its residual; empty when it may"""


Run = Callable[[Tensor, Tensor, int], Pass]


def restarted(
    run: Run, damped: FlatMatvec, rhs: Tensor, *, tol: float, limit: int, passes: int = 4, gain: float = 0.5
) -> tuple[Pass, float]:
    """Passes on the true residual until `tol`, `limit` products or a pass that leaves more than `gain` of it."""
    norm, residual = rhs.norm(dim=1), rhs
    whole = Pass(torch.zeros_like(rhs), 0)
    for _ in range(passes):
        before = worst(residual, norm)
        if before <= tol or whole.stopped or whole.steps >= limit:
            break
        step = run(residual, 0.3 * tol * norm, limit - whole.steps)
        whole = Pass(
            whole.x + step.x,
            whole.steps + step.steps,
            (min(whole.ritz[0], step.ritz[0]), max(whole.ritz[1], step.ritz[1])),
            min(whole.lowest, step.lowest),
            step.stopped,
        )
        residual = rhs - damped(whole.x)
        if not worst(residual, norm) <= gain * before:
            break
    return whole, worst(residual, norm)


def concluded(
    whole: Pass,
    relative: float,
    restore: Callable[[Tensor], Params],
    *,
    tol: float,
    limit: int,
    damping: float,
    stall: str,
) -> LinearSolution:
    """The solution with its report; `stall` names the likely causes of a residual that stays above `tol`."""
    if whole.stopped:
        status = whole.stopped
    elif relative <= tol:
        status = f"relative residual {relative:.1e} <= {tol:.1e} after {whole.steps} steps"
    elif whole.steps >= limit:
        status = f"relative residual {relative:.1e} > {tol:.1e} after the allowed {limit} steps"
    else:
        status = f"relative residual stalled at {relative:.1e} > {tol:.1e} after {whole.steps} steps: {stall}"
    report = SolveReport(
        converged=relative <= tol and not whole.stopped,
        residual=relative,
        steps=whole.steps,
        status=status,
        negative_curvature=negative(whole.lowest, whole.ritz[1], whole.x.dtype),
        damping=damping,
        eigenvalues=whole.ritz if whole.ritz[0] <= whole.ritz[1] else None,
    )
    return LinearSolution(restore(whole.x), report)


def check_options(damping: float, tol: float) -> None:
    """Raise `ValueError` unless damping (units of A) is finite and >= 0 and tol (relative to ||b||) lies in (0, 1)."""
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"damping must be finite and >= 0 (units of A), got {damping}")
    if not 0 < tol < 1:
        raise ValueError(f"tol is relative to ||b|| and must lie in (0, 1), got {tol}")


def step_limit(max_steps: int | None, size: int) -> int:
    """`max_steps`, by default 10 P, at least 10 and at most 1000."""
    limit = max_steps if max_steps is not None else max(10, min(10 * size, 1000))
    if limit < 1:
        raise ValueError(f"max_steps must be at least 1, got {limit}")
    return limit


def check_finite(values: Tensor, step: int, method: str) -> None:
    """Raise `ValueError` when what `matvec` returned at this step of a method holds NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"matvec returned values that are not finite, at step {step} of {method}")


def flatten(matvec: Matvec, b: Params, batch_dims: int) -> tuple[FlatMatvec, Tensor, Callable[[Tensor], Params]]:
    """The operator and the right-hand side on `[R, P]`, and the way back to `Params`; checks both."""
    if not b:
        raise ValueError("b holds no parameters")
    lead = next(iter(b.values())).shape[:batch_dims]
    for key, value in b.items():
        if value.shape[:batch_dims] != lead or value.ndim < batch_dims:
            raise ValueError(
                f"b['{key}'] has shape {tuple(value.shape)}, needs the batch dimensions {tuple(lead)} first"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"b['{key}'] holds values that are not finite")
    shapes = {key: value.shape for key, value in b.items()}
    rows = math.prod(lead)
    sizes = [value.numel() // max(rows, 1) for value in b.values()]

    def flat(params: Params) -> Tensor:
        return torch.cat([params[key].reshape(rows, -1) for key in shapes], dim=1)

    def restore(x: Tensor) -> Params:
        parts = x.split(sizes, dim=1)
        return {key: part.reshape(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}

    def apply(x: Tensor) -> Tensor:
        product = matvec(restore(x))
        check_same_keys(b, product, "what matvec returned")
        for key, shape in shapes.items():
            if product[key].shape != shape:
                raise ValueError(
                    f"matvec returned shape {tuple(product[key].shape)} for '{key}', expected {tuple(shape)}"
                )
        return flat(product)

    return apply, flat(b), restore


def safe(divisor: Tensor, where: Tensor) -> Tensor:
    """`divisor` where it counts, 1 elsewhere: rows that are finished divide by nothing."""
    return divisor.where(where, torch.ones_like(divisor))


def worst(residual: Tensor, norm: Tensor) -> float:
    """Largest relative residual over the rows; a row with b = 0 counts 0 when solved by 0."""
    return float((residual.norm(dim=1) / safe(norm, norm > 0)).max())


def tridiagonal_extremes(diagonal: Tensor, off: Tensor) -> tuple[float, float]:
    """Extreme eigenvalues of the symmetric tridiagonal matrix with these diagonals, `[k]` and `[k - 1]`."""
    values = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return float(values[0]), float(values[-1])


def negative(lowest: float, largest: float, dtype: torch.dtype) -> float | None:
    """`lowest` when it is negative beyond the rounding of an operator of size `largest` (-inf: nothing known of it)."""
    size = max(abs(largest), abs(lowest)) if math.isfinite(largest) else abs(lowest)
    rounding = 45 * torch.finfo(dtype).eps * size  # 1e-14 in float64
    return lowest if lowest < -rounding else None
