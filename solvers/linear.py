"""Solve `(A + damping I) x = b` given only `matvec(x) = A x`, on `Params`: conjugate gradients and the dense solve.

Every solver has the form `solve(matvec, b, *, batch_dims=0) -> LinearSolution`; bind further options with `partial`.
With `batch_dims = d` the first d dimensions of every tensor of b (and of what `matvec` takes and returns) count
independent systems, solved together with a step length each. `minres` and `gmres` (`solvers/krylov.py`), `neumann` and
`nystrom_cg` keep to the same form.

`cg`: Hestenes and Stiefel, J. Res. NBS 49 (1952) 409, algorithm (3:1), for symmetric positive definite A + damping I.
It stops at non-positive curvature, where the quadratic model has no minimum. The coefficients of CG are those of the
Lanczos recursion (Golub and Van Loan, Matrix Computations, 4th ed., 11.3.5), whose eigenvalues (Ritz values) lie
inside the spectrum of A and reach its ends first.

`dense`: A is formed column by column, then Cholesky; for an indefinite A its eigenvalues; for an unsymmetric A LU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from sim2real.params import Params
from sim2real.solve_report import LinearSolution, SolveReport
from sim2real.solvers.linear_system import (
    NO_VALUES,
    FlatMatvec,
    Matvec,
    Pass,
    check_finite,
    check_options,
    concluded,
    flatten,
    negative,
    restarted,
    safe,
    step_limit,
    tridiagonal_extremes,
    worst,
)

Solve = Callable[..., LinearSolution]


def cg(
    matvec: Matvec,
    b: Params,
    *,
    damping: float = 0.0,
    tol: float = 1e-10,
    max_steps: int | None = None,
    batch_dims: int = 0,
) -> LinearSolution:
    """Conjugate gradients for symmetric positive definite `A + damping I`, one `matvec` per step.

    Converged means: `||b - (A + damping I) x|| <= tol ||b||`, computed anew from x, and no curvature <= 0 met. At such
    a curvature the iterate so far is returned with `converged = False`. `report.negative_curvature` and
    `report.eigenvalues` belong to A without the damping. `max_steps` (default 10 P, at most 1000, P unknowns) counts
    the steps after which the solve gives up. Raises `ValueError` for bad options, a right-hand side or a product that
    is not finite, and a product of other keys or shapes than b.
    """
    check_options(damping, tol)
    apply, rhs, restore = flatten(matvec, b, batch_dims)
    limit = step_limit(max_steps, rhs.shape[1])
    whole, relative = preconditioned_cg(apply, rhs, damping, tol, limit, None)
    return concluded(whole, relative, restore, tol=tol, limit=limit, damping=damping, stall=STALL)


STALL = "A is not symmetric or tol is too tight"


def preconditioned_cg(
    apply: FlatMatvec, rhs: Tensor, damping: float, tol: float, limit: int, precondition: FlatMatvec | None
) -> tuple[Pass, float]:
    """Passes of CG on rows `[R, P]` and the relative residual; `precondition` is symmetric positive definite.

    With it the Ritz values are those of the preconditioned operator, less the damping, and count for no curvature.
    """

    def run(residual: Tensor, goal: Tensor, left: int) -> Pass:
        return _cg_pass(apply, residual, damping, goal, left, precondition)

    return restarted(run, lambda x: apply(x) + damping * x, rhs, tol=tol, limit=limit)


def _cg_pass(
    apply: FlatMatvec, b: Tensor, damping: float, goal: Tensor, limit: int, precondition: FlatMatvec | None
) -> Pass:
    """CG from x = 0 on `[R, P]`; z = M r, the preconditioned residual, is r itself without a preconditioner."""
    x, r = torch.zeros_like(b), b
    p = z = r if precondition is None else precondition(r)
    rz, active = (r * z).sum(1), r.norm(dim=1) > goal
    lowest, stopped = math.inf, ""
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    while len(alphas) < limit and bool(active.any()):
        product = apply(p) + damping * p
        square = (p * p).sum(1)
        curvature = (p * product).sum(1) / safe(square, active)
        check_finite(curvature, len(alphas) + 1, "CG")
        lowest = min(lowest, float((curvature - damping)[active].min()))
        if bool((active & (curvature <= 0)).any()):
            place = f"of A + {damping:g} I after {len(alphas) + 1} steps"
            stopped = f"stopped at non-positive curvature {place}; raise the damping"
            active = active & (curvature > 0)
        # a finished row keeps its x: its step length is zero
        alpha = torch.where(active, rz / safe(square * curvature, active), torch.zeros_like(rz))
        x = x + alpha[:, None] * p
        r = r - alpha[:, None] * product
        z = r if precondition is None else precondition(r)
        following = (r * z).sum(1)
        beta = torch.where(active, following / safe(rz, active), torch.zeros_like(rz))
        p = z + beta[:, None] * p
        rz = following
        alphas.append(alpha)
        betas.append(beta)
        active = active & (r.norm(dim=1) > goal)
    ritz = _ritz_values(alphas, betas, damping)
    return Pass(x, len(alphas), ritz, lowest if precondition else min(lowest, ritz[0]), stopped)


def _ritz_values(alphas: list[Tensor], betas: list[Tensor], damping: float) -> tuple[float, float]:
    """Extreme eigenvalues of the Lanczos matrices of CG, less the damping; (inf, -inf) when no step was taken."""
    low, high = NO_VALUES
    for alpha, beta in zip(torch.stack(alphas, 1), torch.stack(betas, 1), strict=True) if alphas else ():
        count = int((alpha > 0).sum())
        if count == 0:
            continue
        inverse, ratio = 1 / alpha[:count], beta[: count - 1]
        diagonal = inverse + torch.cat([inverse.new_zeros(1), ratio * inverse[:-1]])
        least, largest = tridiagonal_extremes(diagonal, ratio.sqrt() * inverse[:-1])
        low, high = min(low, least - damping), max(high, largest - damping)
    return low, high


def dense(
    matvec: Matvec, b: Params, *, damping: float = 0.0, tol: float = 1e-10, batch_dims: int = 0
) -> LinearSolution:
    """Form A from P products (`matvec` under vmap) and factorise it: P^2 memory, any invertible A.

    Converged means: `||b - (A + damping I) x|| <= tol ||b||`. A symmetric A that is not positive definite is solved all
    the same and its lowest eigenvalue reported as `negative_curvature`; null directions of a singular one get 0.
    Raises `ValueError` as `cg` does.
    """
    check_options(damping, tol)
    apply, rhs, restore = flatten(matvec, b, batch_dims)
    rows, size = rhs.shape
    basis = torch.eye(size, dtype=rhs.dtype, device=rhs.device)
    columns = vmap(lambda e: apply(e.expand(rows, size)), out_dims=2)(basis)
    if not bool(torch.isfinite(columns).all()):
        raise ValueError("matvec returned values that are not finite; check the point the operator is taken at")
    # products of an exactly symmetric A differ from symmetry by rounding only; each row of the batch has its own size
    skew, scale = (columns - columns.mT).norm(dim=(1, 2)), columns.norm(dim=(1, 2))
    symmetric = bool((skew <= 1e3 * torch.finfo(rhs.dtype).eps * math.sqrt(size) * scale).all())
    system = columns + damping * basis
    if symmetric:
        x, values, status = _solve_symmetric(0.5 * (system + system.mT), rhs, damping)
    else:
        factors, pivots, failures = torch.linalg.lu_factor_ex(system)
        singular = bool((failures > 0).any())
        x = (
            torch.linalg.lstsq(system, rhs[..., None]).solution
            if singular
            else torch.linalg.lu_solve(factors, pivots, rhs[..., None])
        )[..., 0]
        values, status = None, "least squares: A is singular" if singular else "LU factorisation of an unsymmetric A"
    residual = worst(rhs - (system @ x[..., None])[..., 0], rhs.norm(dim=1))
    report = SolveReport(
        converged=residual <= tol,
        residual=residual,
        steps=size,
        status=status,
        negative_curvature=None if values is None else negative(*values, rhs.dtype),
        damping=damping,
        eigenvalues=values,
    )
    return LinearSolution(restore(x), report)


def _solve_symmetric(system: Tensor, rhs: Tensor, damping: float) -> tuple[Tensor, tuple[float, float], str]:
    """x, extreme eigenvalues of the undamped operator and a status, for `system [R, P, P]`."""
    values, vectors = torch.linalg.eigh(system)
    extremes = (float(values[:, 0].min()) - damping, float(values[:, -1].max()) - damping)
    scale, least = values.abs().amax(1), torch.finfo(rhs.dtype).eps * values.shape[1]
    if bool((values[:, 0] > least * scale).all()):
        factor = torch.linalg.cholesky(system)
        return torch.cholesky_solve(rhs[..., None], factor)[..., 0], extremes, "Cholesky factorisation"
    keep = values.abs() > least * scale[:, None]
    inverse = torch.where(keep, 1 / values.where(keep, torch.ones_like(values)), torch.zeros_like(values))
    x = (vectors @ (inverse[..., None] * (vectors.mT @ rhs[..., None])))[..., 0]
    kind = "indefinite" if bool((values[:, 0] < -least * scale).any()) else "singular"
    return x, extremes, f"A + {damping:g} I is {kind}: solved by its eigenvectors"
