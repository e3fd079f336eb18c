"""CG with a randomised Nystrom preconditioner, for a positive semidefinite A with a spectrum that decays fast.

With a random orthonormal Omega `[P, k]` and `Y = A Omega`, `Y (Omega' Y)^-1 Y' = U diag(values) U'` approximates A
from below. The preconditioner shrinks its k eigenvalues to the last of them, l:

    M^-1 = (l + damping) U (diag(values) + damping)^-1 U' + I - U U',

so that CG on `M^-1 (A + damping I)` sees only what lies below l. The sketch costs k products; once
`k >= 2 ceil(1.5 d) + 1`, d = trace of `A (A + damping I)^-1`, the expected condition number is below 28.
Reference: Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44 (2023) 718, algorithm 2.1 and theorem 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sim2real.params import Params
from sim2real.solve_report import LinearSolution
from sim2real.solvers.linear import STALL, preconditioned_cg
from sim2real.solvers.linear_system import (
    FlatMatvec,
    Matvec,
    check_finite,
    check_options,
    concluded,
    flatten,
    negative,
    safe,
    step_limit,
)


@dataclass(frozen=True)
class NystromSketch:
    """`A ~ vectors diag(values) vectors'` per row: vectors `[R, P, k]`, values `[R, k]` descending, in units of A."""

    vectors: Tensor
    values: Tensor
    lowest: float
    """lowest eigenvalue of A on the sketched space; A is positive semidefinite only if it is not negative"""


def nystrom_sketch(
    matvec: Matvec, like: Params, *, rank: int = 20, seed: int = 0, batch_dims: int = 0
) -> NystromSketch:
    """The sketch of A by `min(rank, P)` products, for tensors shaped as in `like`; one sketch serves many solves.

    Raises `ValueError` for a rank below 1 and as `cg` does.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    apply, rows, _ = flatten(matvec, like, batch_dims)
    return _sketch(apply, rows, rank, seed)


def nystrom_cg(
    matvec: Matvec,
    b: Params,
    *,
    damping: float = 0.0,
    tol: float = 1e-10,
    max_steps: int | None = None,
    rank: int = 20,
    seed: int = 0,
    sketch: NystromSketch | None = None,
    batch_dims: int = 0,
) -> LinearSolution:
    """CG for symmetric positive definite `A + damping I` behind a Nystrom preconditioner, here or as `sketch` built.

    Converged and `max_steps` mean what they do for `cg`; `report.steps` counts the steps of CG, to which a sketch built
    here adds `min(rank, P)` products. `report.negative_curvature` is the lowest of the curvatures met by CG and the
    sketch. The lower of `report.eigenvalues` comes from the preconditioned operator: M >= I, so for a sound sketch it
    does not exceed what CG without preconditioner would tell. Raises `ValueError` as `cg` does.
    """
    check_options(damping, tol)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    apply, rhs, restore = flatten(matvec, b, batch_dims)
    limit = step_limit(max_steps, rhs.shape[1])
    found = _sketch(apply, rhs, rank, seed) if sketch is None else sketch
    if found.vectors.shape[:2] != rhs.shape:
        raise ValueError(f"sketch is for [R, P] = {tuple(found.vectors.shape[:2])}, b has {tuple(rhs.shape)}")
    whole, relative = preconditioned_cg(apply, rhs, damping, tol, limit, _preconditioner(found, damping))
    solution = concluded(whole, relative, restore, tol=tol, limit=limit, damping=damping, stall=STALL)
    if not whole.steps:
        return solution
    largest = max(whole.ritz[1], float(found.values.max()))
    report = replace(
        solution.report,
        negative_curvature=negative(min(whole.lowest, found.lowest), largest, rhs.dtype),
        eigenvalues=(whole.ritz[0], largest) if whole.ritz[0] <= largest else None,
        status=f"{solution.report.status} (sketch of rank {found.values.shape[1]})",
    )
    return LinearSolution(solution.x, report)


def _sketch(apply: FlatMatvec, like: Tensor, rank: int, seed: int) -> NystromSketch:
    rows, size = like.shape
    rank = min(rank, size)
    generator = torch.Generator().manual_seed(seed)
    omega = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=like.dtype).to(like.device))[0]
    Y = torch.stack([apply(column.expand(rows, size)) for column in omega.unbind(1)], 2)
    check_finite(Y, rank, "the sketch")
    core = omega.mT @ Y
    lowest = float(torch.linalg.eigvalsh(0.5 * (core + core.mT)).min())
    # the shift of algorithm 2.1 keeps rounding from making the core indefinite; taken off the values again
    shift = torch.finfo(like.dtype).eps * Y.norm(dim=(1, 2), keepdim=True)
    Y, core = Y + shift * omega, core + shift * torch.eye(rank, dtype=like.dtype, device=like.device)
    weights, basis = torch.linalg.eigh(0.5 * (core + core.mT))
    kept = weights > 0.1 * shift[..., 0]  # what is left out was not positive: no curvature to precondition
    scale = torch.where(kept, safe(weights, kept).rsqrt(), torch.zeros_like(weights))
    vectors, singular, _ = torch.linalg.svd(Y @ basis * scale[:, None, :], full_matrices=False)
    return NystromSketch(vectors, (singular**2 - shift[..., 0]).clamp_min(0), lowest)


def _preconditioner(sketch: NystromSketch, damping: float) -> FlatMatvec:
    values = sketch.values + damping
    # a sketch of more than the rank of A ends in rounding: those directions are left as they are
    kept = values > torch.finfo(values.dtype).eps ** 0.75 * values[:, :1]
    last = values.where(kept, torch.full_like(values, torch.inf)).amin(1, keepdim=True)
    shrink = torch.where(kept, last / safe(values, kept), torch.ones_like(values))

    def precondition(r: Tensor) -> Tensor:
        inside = torch.einsum("rpk,rp->rk", sketch.vectors, r)
        return r + torch.einsum("rpk,rk->rp", sketch.vectors, (shrink - 1) * inside)

    return precondition
