"""Solve `(A + damping I) x = b` given only `matvec(x) = A x`, on `Params`.

Every solver has the form `solve(matvec, b, *, batch_dims=0) -> LinearSolution`; bind further options with `partial`.
With `batch_dims = d` the first d dimensions of every tensor of b (and of what `matvec` takes and returns) count
independent systems, solved together with a step length each.

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

from sim2real.params import Params, check_same_keys
from sim2real.solve_report import LinearSolution, SolveReport

Matvec = Callable[[Params], Params]
Solve = Callable[..., LinearSolution]
FlatMatvec = Callable[[Tensor], Tensor]


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
    _check_options(damping, tol)
    apply, rhs, restore = _flatten(matvec, b, batch_dims)
    limit = max_steps if max_steps is not None else max(10, min(10 * rhs.shape[1], 1000))
    if limit < 1:
        raise ValueError(f"max_steps must be at least 1, got {limit}")
    norm = rhs.norm(dim=1)
    x, steps, ritz, lowest = torch.zeros_like(rhs), 0, (math.inf, -math.inf), math.inf
    residual, indefinite = rhs, False
    # the updated residual drifts from the true one; starting again from the true one takes the last digits
    for _ in range(4):
        before = _worst(residual, norm)
        if before <= tol or indefinite or steps >= limit:
            break
        goal = 0.3 * tol * norm
        correction, taken, spectrum, smallest, indefinite = _cg_run(apply, residual, damping, goal, limit - steps)
        steps, ritz = steps + taken, (min(ritz[0], spectrum[0]), max(ritz[1], spectrum[1]))
        lowest = min(lowest, smallest, ritz[0])
        x = x + correction
        residual = rhs - (apply(x) + damping * x)
        if _worst(residual, norm) > 0.5 * before:
            break
    relative = _worst(residual, norm)
    status = _cg_status(relative, tol, indefinite, steps, limit, damping)
    return LinearSolution(
        restore(x),
        SolveReport(
            converged=relative <= tol and not indefinite,
            residual=relative,
            steps=steps,
            status=status,
            negative_curvature=_negative(lowest, ritz[1]),
            damping=damping,
            eigenvalues=ritz if ritz[0] <= ritz[1] else None,
        ),
    )


def _cg_run(
    apply: FlatMatvec, b: Tensor, damping: float, goal: Tensor, limit: int
) -> tuple[Tensor, int, tuple[float, float], float, bool]:
    """CG from x = 0 on `[R, P]`: x, steps, extreme Ritz values, lowest curvature (both undamped), indefinite or not."""
    x, r, p = torch.zeros_like(b), b, b
    rr = (r * r).sum(1)
    active = rr > goal * goal
    lowest, indefinite = math.inf, False
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    while len(alphas) < limit and bool(active.any()):
        product = apply(p) + damping * p
        square = (p * p).sum(1)
        curvature = (p * product).sum(1) / square.where(active, torch.ones_like(square))
        if not bool(torch.isfinite(curvature).all()):
            raise ValueError(f"matvec returned values that are not finite, at step {len(alphas) + 1} of CG")
        lowest = min(lowest, float((curvature - damping)[active].min()))
        if bool((active & (curvature <= 0)).any()):
            indefinite = True
            active = active & (curvature > 0)
        # a finished row keeps its x: its step length is zero
        alpha = torch.where(active, rr / (square * curvature).where(active, torch.ones_like(rr)), torch.zeros_like(rr))
        x = x + alpha[:, None] * p
        r = r - alpha[:, None] * product
        following = (r * r).sum(1)
        beta = torch.where(active, following / rr.where(active, torch.ones_like(rr)), torch.zeros_like(rr))
        p = r + beta[:, None] * p
        rr = following
        alphas.append(alpha)
        betas.append(beta)
        active = active & (rr > goal * goal)
    return x, len(alphas), _ritz_values(alphas, betas, damping), lowest, indefinite


def _ritz_values(alphas: list[Tensor], betas: list[Tensor], damping: float) -> tuple[float, float]:
    """Extreme eigenvalues of the Lanczos matrices of CG, less the damping; (inf, -inf) when no step was taken."""
    low, high = math.inf, -math.inf
    for alpha, beta in zip(torch.stack(alphas, 1), torch.stack(betas, 1), strict=True) if alphas else ():
        count = int((alpha > 0).sum())
        if count == 0:
            continue
        inverse, ratio = 1 / alpha[:count], beta[: count - 1]
        diagonal = inverse + torch.cat([inverse.new_zeros(1), ratio * inverse[:-1]])
        off = ratio.sqrt() * inverse[:-1]
        values = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)) - damping
        low, high = min(low, float(values[0])), max(high, float(values[-1]))
    return low, high


def _cg_status(relative: float, tol: float, indefinite: bool, steps: int, limit: int, damping: float) -> str:
    if indefinite:
        return f"stopped at non-positive curvature of A + {damping:g} I after {steps} steps; raise the damping"
    if relative <= tol:
        return f"relative residual {relative:.1e} <= {tol:.1e} after {steps} steps"
    if steps >= limit:
        return f"relative residual {relative:.1e} > {tol:.1e} after the allowed {limit} steps"
    cause = "A is not symmetric or tol is too tight"
    return f"relative residual stalled at {relative:.1e} > {tol:.1e} after {steps} steps: {cause}"


def dense(
    matvec: Matvec, b: Params, *, damping: float = 0.0, tol: float = 1e-10, batch_dims: int = 0
) -> LinearSolution:
    """Form A from P products (`matvec` under vmap) and factorise it: P^2 memory, any invertible A.

    Converged means: `||b - (A + damping I) x|| <= tol ||b||`. A symmetric A that is not positive definite is solved all
    the same and its lowest eigenvalue reported as `negative_curvature`; null directions of a singular one get 0.
    Raises `ValueError` as `cg` does.
    """
    _check_options(damping, tol)
    apply, rhs, restore = _flatten(matvec, b, batch_dims)
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
    residual = _worst(rhs - (system @ x[..., None])[..., 0], rhs.norm(dim=1))
    report = SolveReport(
        converged=residual <= tol,
        residual=residual,
        steps=size,
        status=status,
        negative_curvature=None if values is None else _negative(*values),
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


def _check_options(damping: float, tol: float) -> None:
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"damping must be finite and >= 0 (units of A), got {damping}")
    if not 0 < tol < 1:
        raise ValueError(f"tol is relative to ||b|| and must lie in (0, 1), got {tol}")


def _flatten(matvec: Matvec, b: Params, batch_dims: int) -> tuple[FlatMatvec, Tensor, Callable[[Tensor], Params]]:
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


def _worst(residual: Tensor, norm: Tensor) -> float:
    """Largest relative residual over the rows; a row with b = 0 counts 0 when solved by 0."""
    relative = residual.norm(dim=1) / norm.where(norm > 0, torch.ones_like(norm))
    return float(relative.max())


def _negative(lowest: float, largest: float) -> float | None:
    """`lowest` when it is negative beyond the rounding of an operator of size `largest`."""
    return lowest if lowest < -1e-14 * max(abs(largest), abs(lowest)) and lowest < 0 else None
