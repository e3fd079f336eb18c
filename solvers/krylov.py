"""MINRES and GMRES: `(A + damping I) x = b` for operators that CG cannot take, given only `matvec(x) = A x`.

Both minimise `||b - (A + damping I) x||` over the Krylov space of the residual they start from.

`minres` (Paige and Saunders, SIAM J. Numer. Anal. 12 (1975) 617, section 6) takes any symmetric A, definite or not.
Lanczos gives `A V_k = V_{k+1} T_k` with T_k tridiagonal, plane rotations its QR factorisation; memory is constant. For
a singular A and b in its range the answer is the one of least norm (Choi, Paige and Saunders, SIAM J. Sci. Comput.
33 (2011) 1810); for b outside the range it is a least-squares solution and does not count as converged.

`gmres` (Saad and Schultz, SIAM J. Sci. Stat. Comput. 7 (1986) 856, algorithm 4) takes any A. Arnoldi gives
`A V_k = V_{k+1} H_k` with H_k upper Hessenberg; V is kept, so it starts again every `restart` steps, which may stall.
"""

from __future__ import annotations

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
    tridiagonal_extremes,
)


def minres(
    matvec: Matvec,
    b: Params,
    *,
    damping: float = 0.0,
    tol: float = 1e-10,
    max_steps: int | None = None,
    batch_dims: int = 0,
) -> LinearSolution:
    """Minimal residuals for symmetric `A + damping I` of any signs, one `matvec` per step.

    Converged means: `||b - (A + damping I) x|| <= tol ||b||`, computed anew from x. Negative curvature does not stop
    it and is reported, as the Ritz values are, for A without the damping. `max_steps` and errors as for `cg`.
    """
    check_options(damping, tol)
    apply, rhs, restore = flatten(matvec, b, batch_dims)
    limit = step_limit(max_steps, rhs.shape[1])

    def damped(x: Tensor) -> Tensor:
        return apply(x) + damping * x

    def run(residual: Tensor, goal: Tensor, left: int) -> Pass:
        return _minres_pass(damped, residual, damping, goal, left)

    whole, relative = restarted(run, damped, rhs, tol=tol, limit=limit)
    stall = "b has a part outside the range of A, A is not symmetric, or tol is too tight"
    return concluded(whole, relative, restore, tol=tol, limit=limit, damping=damping, stall=stall)


def _minres_pass(damped: FlatMatvec, b: Tensor, damping: float, goal: Tensor, limit: int) -> Pass:
    """MINRES from x = 0 on `[R, P]`; scalars of a row are `[R]`, named as in the QR factorisation of T_k."""
    tiny = torch.finfo(b.dtype).eps
    beta = phi_bar = b.norm(dim=1)
    active = beta > goal
    v_before, v = torch.zeros_like(b), b / safe(beta, beta > 0)[:, None]
    x, w_before, w = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    zero = torch.zeros_like(beta)
    coupling, delta_bar, epsilon, cos, sin, size = zero, zero, zero, zero - 1, zero, zero
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    counts = torch.zeros_like(beta)
    while len(alphas) < limit and bool(active.any()):
        product = damped(v) - coupling[:, None] * v_before
        alpha = (v * product).sum(1)
        check_finite(alpha, len(alphas) + 1, "MINRES")
        product = product - alpha[:, None] * v
        beta = product.norm(dim=1)
        alphas.append(alpha - damping)
        betas.append(beta)
        counts = counts + active
        # the new column of T_k: rotated by the last two rotations, then by a new one that removes beta
        delta, gamma_bar, epsilon_before = cos * delta_bar + sin * alpha, sin * delta_bar - cos * alpha, epsilon
        epsilon, delta_bar = sin * beta, -cos * beta
        gamma = torch.hypot(gamma_bar, beta)
        size = torch.stack([size, alpha.abs() + beta, gamma]).amax(0)
        # ||A r|| = phi_bar hypot(gamma_bar, delta_bar) before this step: where it is nothing, r is outside the range
        active = active & (torch.hypot(gamma_bar, delta_bar) > tiny**0.75 * size) & (gamma > tiny * size)
        cos, sin = gamma_bar / safe(gamma, active), beta / safe(gamma, active)
        direction = (v - epsilon_before[:, None] * w_before - delta[:, None] * w) / safe(gamma, active)[:, None]
        x = x + torch.where(active, cos * phi_bar, zero)[:, None] * direction
        w_before, w = w, direction
        phi_bar = torch.where(active, sin * phi_bar, phi_bar)
        active = active & (phi_bar > goal) & (beta > tiny * size)
        v_before, v, coupling = v, product / safe(beta, active)[:, None], beta
        w, v = w.where(active[:, None], torch.zeros_like(w)), v.where(active[:, None], torch.zeros_like(v))
    ritz = _lanczos_extremes(alphas, betas, counts)
    return Pass(x, len(alphas), ritz, ritz[0])


def _lanczos_extremes(alphas: list[Tensor], betas: list[Tensor], counts: Tensor) -> tuple[float, float]:
    low, high = NO_VALUES
    for row, count in enumerate(counts.int().tolist()):
        if count:
            diagonal = torch.stack(alphas[:count], 1)[row]
            least, largest = tridiagonal_extremes(diagonal, torch.stack(betas[:count], 1)[row, :-1])
            low, high = min(low, least), max(high, largest)
    return low, high


def gmres(
    matvec: Matvec,
    b: Params,
    *,
    damping: float = 0.0,
    tol: float = 1e-10,
    max_steps: int | None = None,
    restart: int = 50,
    batch_dims: int = 0,
) -> LinearSolution:
    """Generalised minimal residuals for any `A + damping I`, one `matvec` per step, `restart + 1` vectors of memory.

    Converged means: `||b - (A + damping I) x|| <= tol ||b||`, computed anew from x. `report.negative_curvature` is the
    lowest Rayleigh quotient of A on the Krylov space; `report.eigenvalues` are given where A is symmetric there.
    `max_steps` (over all restarts) and errors as for `cg`.
    """
    check_options(damping, tol)
    if restart < 1:
        raise ValueError(f"restart must be at least 1, got {restart}")
    apply, rhs, restore = flatten(matvec, b, batch_dims)
    limit = step_limit(max_steps, rhs.shape[1])

    def damped(x: Tensor) -> Tensor:
        return apply(x) + damping * x

    def run(residual: Tensor, goal: Tensor, left: int) -> Pass:
        return _gmres_cycle(damped, residual, damping, goal, min(restart, left))

    whole, relative = restarted(run, damped, rhs, tol=tol, limit=limit, passes=limit, gain=0.999)
    stall = f"A is singular, tol is too tight, or restart = {restart} is too short"
    return concluded(whole, relative, restore, tol=tol, limit=limit, damping=damping, stall=stall)


def _gmres_cycle(damped: FlatMatvec, b: Tensor, damping: float, goal: Tensor, limit: int) -> Pass:
    """GMRES from x = 0 on `[R, P]` without restart; a finished row gets unit columns, which change nothing."""
    tiny = torch.finfo(b.dtype).eps
    rest = b.norm(dim=1)
    active = rest > goal
    basis = [b / safe(rest, rest > 0)[:, None]]
    columns: list[Tensor] = []  # of H, [R, k + 2]
    rotated: list[Tensor] = []  # of its triangular factor, [R, k + 1]
    rotations: list[tuple[Tensor, Tensor]] = []
    weights: list[Tensor] = []  # of the rotated right-hand side, [R]
    counts = torch.zeros_like(rest)
    while len(columns) < limit and bool(active.any()):
        product = damped(basis[-1])
        check_finite(product, len(columns) + 1, "GMRES")
        V, size = torch.stack(basis, 1), product.norm(dim=1)
        column = torch.zeros_like(V[:, :, 0])
        for _ in range(2):  # Gram-Schmidt twice is orthogonal to rounding
            overlap = torch.einsum("rkp,rp->rk", V, product)
            product = product - torch.einsum("rkp,rk->rp", V, overlap)
            column = column + overlap
        below = product.norm(dim=1)
        below = below.where(below > tiny * size, torch.zeros_like(below))
        counts = counts + active
        columns.append(torch.cat([column, below[:, None]], 1))
        factor = list(column.unbind(1))
        for k, (cos, sin) in enumerate(rotations):
            upper, lower = factor[k], factor[k + 1]
            factor[k], factor[k + 1] = cos * upper + sin * lower, cos * lower - sin * upper
        length = torch.hypot(factor[-1], below)
        active = active & (length > tiny * size)  # else A is singular on the space: nothing more to gain
        cos, sin = factor[-1] / safe(length, active), below / safe(length, active)
        rotations.append((cos, sin))
        kept = [value.where(active, torch.zeros_like(value)) for value in factor[:-1]]
        rotated.append(torch.stack([*kept, safe(length, active)], 1))
        weights.append(torch.where(active, cos * rest, torch.zeros_like(rest)))
        rest = torch.where(active, -sin * rest, rest)
        active = active & (rest.abs() > goal) & (below > 0)
        basis.append((product / safe(below, active)[:, None]).where(active[:, None], torch.zeros_like(product)))
    ritz, lowest = _arnoldi_extremes(columns, counts, damping)
    return Pass(_combine(basis, rotated, weights), len(columns), ritz, lowest)


def _combine(basis: list[Tensor], rotated: list[Tensor], weights: list[Tensor]) -> Tensor:
    """`V y` with `R y = weights`, R upper triangular given by its columns."""
    count = len(rotated)
    triangle = torch.stack([torch.nn.functional.pad(c, (0, count - c.shape[1])) for c in rotated], 2)
    y = torch.linalg.solve_triangular(triangle, torch.stack(weights, 1)[..., None], upper=True)[..., 0]
    return torch.einsum("rkp,rk->rp", torch.stack(basis[:count], 1), y)


def _arnoldi_extremes(columns: list[Tensor], counts: Tensor, damping: float) -> tuple[tuple[float, float], float]:
    """Ritz values if every H is symmetric to half the digits, and the lowest Rayleigh quotient on the Krylov space."""
    low, high = NO_VALUES
    symmetric = True
    for row, count in enumerate(counts.int().tolist()):
        if count:
            H = torch.stack(
                [torch.nn.functional.pad(c[row, :count], (0, max(0, count - c.shape[1]))) for c in columns[:count]], 1
            )
            symmetric = symmetric and bool((H - H.mT).norm() <= torch.finfo(H.dtype).eps ** 0.5 * H.norm())
            values = torch.linalg.eigvalsh(0.5 * (H + H.mT)) - damping
            low, high = min(low, float(values[0])), max(high, float(values[-1]))
    return ((low, high) if symmetric else NO_VALUES), low
