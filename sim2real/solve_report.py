"""What every iterative solve reports, and the types that carry it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sim2real.params import Params


@dataclass(frozen=True)
class SolveReport:
    """How a solve ended. `residual`: relative to the right-hand side for linear solves, gradient norm for optima."""

    converged: bool
    residual: float
    steps: int
    status: str = ""
    """one sentence: what stopped the solve"""
    negative_curvature: float | None = None
    """most negative Rayleigh quotient met; None when none was negative"""
    damping: float = 0.0
    stationarity: float | None = None
    """norm of the gradient at the point the derivative is taken"""
    error_bound: float | None = None
    """bound on the norm of the answer's error, in the answer's units"""
    eigenvalues: tuple[float, float] | None = None
    """(smallest, largest) Ritz value of the operator"""


@dataclass(frozen=True)
class LinearSolution:
    """x of `A x = b`, given only `matvec`."""

    x: Params
    report: SolveReport


@dataclass(frozen=True)
class Optimum:
    """`nu*(theta)` with the report of the search."""

    nu: Params
    report: SolveReport


@dataclass(frozen=True)
class Sensitivity:
    """dnu*/dtheta, never formed as a matrix: `vjp(g) = (dnu*/dtheta)^T g`, `jvp(v) = (dnu*/dtheta) v`."""

    vjp: Callable[[Params], Params]
    jvp: Callable[[Params], Params]
    report: SolveReport
    info: dict[str, Tensor] = field(default_factory=dict)


class UnconvergedError(RuntimeError):
    """A derivative was asked of a solve that did not converge, under `strict=True`."""


class UnconvergedWarning(UserWarning):
    """A derivative was built on a solve that did not converge."""
