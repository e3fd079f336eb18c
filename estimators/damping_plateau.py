"""`C' (A + delta)^-1 g` for singular or slightly indefinite A, with the damping it depends on least.

Networks have directions of nu that hardly move the policy: A has curvatures near zero there, of either sign where nu is
not exactly stationary, and `dnu*/dtheta` is not determined, while `w = C' A^-1 g` is, for a g that comes from the
policy's actions. The error of `w(delta)` falls with delta where it comes from the damping, and grows below the noise of
the small curvatures; between the two w stands still. One Krylov space of g serves all dampings (Lanczos: V'A V = T),

    w(delta) = |g| C' V (T + delta)^-1 e_1,

and that of the least change along a ladder of dampings is taken, twice the change being its error. References: Hansen,
Rank-Deficient and Discrete Ill-Posed Problems, SIAM 1998, section 7.1 (the quasi-optimality choice); Parlett, The
Symmetric Eigenvalue Problem, SIAM 1998, section 13.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sim2real.estimators.second_order import LocalProducts, size_of
from sim2real.params import Params, axpy, ravel, unravel
from sim2real.solvers.spectrum import Spectrum

Norm = Callable[[Params], float]

# Factor between the dampings of the ladder, and the residual up to which a rung counts.
_RUNG = 10**0.5
_RESIDUAL = 1e-3


@dataclass(frozen=True)
class Product:
    """`w = C' A^-1 g` at one nu, with its error and what it took."""

    value: Params
    x: Params
    error: float
    damping: float
    residual: float
    lowest: float


def plateau_product(local: LocalProducts, g: Params, probe: Spectrum, norm: Norm, max_steps: int) -> Product:
    """`C' (A + delta)^-1 g` for the delta at which a threefold change of it matters least, from one Krylov space."""
    basis, T, rest = _lanczos(local.curvature, g, min(max_steps, 150))
    lowest = min(probe.lowest, float(torch.linalg.eigvalsh(T)[0]))
    unit = torch.zeros_like(T[0])
    unit[0] = 1.0
    rungs: list[tuple[float, Params, Params, float]] = []
    damping = max(3 * abs(lowest), 1e-9 * probe.largest)
    while damping < 0.1 * probe.largest or len(rungs) < 2:
        y = torch.linalg.inv(T + damping * torch.eye(len(T), dtype=T.dtype, device=T.device)) @ unit
        x = unravel(size_of(g) * (basis.mT @ y), g)
        rungs.append((damping, x, local.cross(x), rest * abs(float(y[-1]))))
        damping *= _RUNG
    spreads = [norm(axpy(-1.0, b[2], a[2])) for a, b in pairwise(rungs)]
    solved = [spread for spread, rung in zip(spreads, rungs, strict=False) if rung[3] <= _RESIDUAL]
    best = spreads.index(min(solved if solved else spreads))
    damping, x, value, residual = rungs[best]
    error = 2 * spreads[best] if solved else math.inf
    return Product(value, x, error, damping, residual, lowest)


def _lanczos(curvature: Callable[[Params], Params], g: Params, steps: int) -> tuple[Tensor, Tensor, float]:
    """Orthonormal basis `[k, P]` of the Krylov space of g, A on it `[k, k]`, and the norm of what leads out of it."""
    direction = ravel(g) / size_of(g)
    limit, rest = min(steps, len(direction)), 0.0
    basis, T = direction.new_zeros(limit, len(direction)), direction.new_zeros(limit, limit)
    for k in range(limit):
        basis[k] = direction
        image = ravel(curvature(unravel(direction, g)))
        T[: k + 1, k] = T[k, : k + 1] = basis[: k + 1] @ image
        following = image
        for _ in range(2):  # Gram-Schmidt twice is orthogonal to rounding
            following = following - basis[: k + 1].mT @ (basis[: k + 1] @ following)
        rest = float(following.norm())
        if rest <= 1e-12 * float(image.norm()):
            break
        direction = following / rest
    return basis[: k + 1], T[: k + 1, : k + 1], rest
