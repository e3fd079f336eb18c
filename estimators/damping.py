"""Damping of a Hessian that is positive semidefinite up to what training left over, chosen from its spectrum.

At a maximiser nu that a network represents well, -J_nunu is a Gauss-Newton matrix (positive semidefinite, mostly near
zero) plus `sum_i dJ/da_i d2a_i/dnu2`, which is indefinite and as large as nu is from stationary. Solves amplify what
lies at that level, so `-J_nunu + damping I` must be positive definite with room: with the lowest Ritz value of a
Lanczos probe and its residual,

    damping = 2 (max(0, -lowest) + residual),

the residual being the level below which the probe resolved nothing; 0 where lowest > 10 residual. The probe goes on
until -J_nunu is positive definite in that sense or the residual is 1e-5 of the largest curvature; what has a condition
below 1e4 is not damped. A solve that meets `1.5 |curvature| > damping` is repeated with twice that curvature.

On four tasks with nets of 1e3 parameters (`benchmarks/scale.py`), after 30 to 2000 steps of L-BFGS, the factor 2 left
d action / d theta within 1.6 of the least error of any damping; half of it met singular matrices twice.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from sim2real.params import Params
from sim2real.solve_report import LinearSolution, SolveReport
from sim2real.solvers.linear import Solve, cg
from sim2real.solvers.linear_system import Matvec
from sim2real.solvers.nystrom import NystromSketch, nystrom_cg
from sim2real.solvers.spectrum import Spectrum, spectrum

SADDLE = 1e-3
"""negative curvature beyond this share of the largest is no leftover of training: the point is a saddle"""

_LEAST = 1e-6  # of the largest curvature: less costs a solve more steps than its accuracy, below 1 %, is worth
_ATTEMPTS = 6  # each raises the damping by a third at least, mostly by two


def probe_damping(probe: Spectrum) -> tuple[float, str]:
    """The damping (units of A) a `spectrum` of A asks for, and a sentence that says why."""
    low, width = probe.lowest, probe.lowest_residual
    size = max(probe.largest, -low)
    rounding = 10 * torch.finfo(probe.values.dtype).eps * max(len(probe.values), 10) * size
    if _definite(low, width) or (probe.exact and low > rounding):
        return 0.0, f"no damping: the probe's lowest curvature is {low:.1e}, residual {width:.1e}"
    # flat directions of an exact spectrum: half of the digits for the bias, half for the noise
    least = torch.finfo(probe.values.dtype).eps ** 0.5 if probe.exact else _LEAST
    damping = max(2 * (max(0.0, -low) + width), least * size)
    return damping, f"damping {damping:.1e} from the probe's lowest curvature {low:.1e}, residual {width:.1e}"


def _definite(lowest: float, residual: float) -> bool:
    return lowest > 10 * residual


def _resolved(steps: int, lowest: float, residual: float, largest: float) -> bool:
    # few steps leave the bias of the damping larger than a network's training deserves
    return _definite(lowest, residual) or (steps >= 40 and residual <= 1e-5 * max(largest, -lowest))


def damped_solve(solve: Solve | None, matvec: Matvec, b: Params, *, steps: int = 200) -> tuple[LinearSolution, Solve]:
    """Solve `(A + damping I) x = b`, damped as a probe of at most `steps` products asks, more where that is too little.

    Returns the solver too, for further right-hand sides: `solve`, or where that is None `cg` for a definite A, else CG
    to a residual of 1e-3 behind the Ritz vectors of the probe. The report's eigenvalues and negative curvature are the
    extremes of probe and solves. It is not converged where A is too indefinite for a maximum: curvature below `-SADDLE`
    of the largest.
    """
    probe = spectrum(matvec, b, steps=steps, enough=_resolved)
    damping, why = probe_damping(probe)
    if solve is None:
        solve = partial(nystrom_cg, tol=1e-3, sketch=_ritz_sketch(probe)) if damping else cg
    low, high = probe.lowest, probe.largest
    negative = probe.negative_curvature
    for _ in range(_ATTEMPTS):
        solution: LinearSolution = solve(matvec, b, damping=damping)
        report = solution.report
        if report.eigenvalues is not None:
            low, high = min(low, report.eigenvalues[0]), max(high, report.eigenvalues[1])
        met = report.negative_curvature
        negative = met if negative is None else negative if met is None else min(met, negative)
        if negative is None or 1.5 * -negative <= damping or -negative > SADDLE * high:
            break
        damping = 2 * -negative
        why = f"damping raised to {damping:.1e}, twice the negative curvature met"
    report = replace(report, eigenvalues=(low, high), negative_curvature=negative, damping=damping)
    return LinearSolution(solution.x, _judged(report, high, why)), solve


def _ritz_sketch(probe: Spectrum) -> NystromSketch:
    """The upper end of the spectrum as the probe found it: `nystrom_cg` then sees only what lies below."""
    known = probe.values > 2 * probe.residuals
    vectors, values = probe.vectors[known].flip(0), probe.values[known].flip(0)
    return NystromSketch(vectors.mT[None], values[None], probe.lowest)


def _judged(report: SolveReport, largest: float, why: str) -> SolveReport:
    status, converged = f"{report.status}; {why}", report.converged
    if report.negative_curvature is not None and -report.negative_curvature > SADDLE * largest:
        status += f"; no maximum: curvature {report.negative_curvature:.1e} against a largest of {largest:.1e}"
        converged = False
    return replace(report, status=status, converged=converged)
