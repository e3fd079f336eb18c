"""The ends of the spectrum of a symmetric operator A, given only `matvec(x) = A x`: Lanczos, fully orthogonalised.

On an orthonormal basis V of a Krylov space the eigenpairs `(value, y)` of `V' A V` (Ritz values) lie inside the
spectrum and reach its ends first. For each Ritz pair, `u = V y`,

    some eigenvalue of A lies within |A u - value u| of value,

so the lowest Ritz value proves negative curvature but never its absence. From a random start the lowest eigenvalue
lies, with probability 0.999, above

    floor = lowest - (largest - lowest) e / (1 - 2e),    1.648 sqrt(P) exp(-sqrt(e) (2k - 1)) = 0.0005,

after k steps on P unknowns (each end may be missed by the share e of the whole width). A space built from another start
before it is coupled to the rest by the one residual at its end, by whose norm the floor is lower (Weyl). References:
Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, section 4.5; Kuczynski and Wozniakowski, SIAM J. Matrix Anal.
Appl. 13 (1992) 1094, theorem 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.params import Params
from sim2real.solvers.linear_system import FlatMatvec, Matvec, check_finite, flatten, negative

Enough = Callable[[int, float, float, float], bool]


@dataclass(frozen=True)
class Spectrum:
    """What `steps` products tell of the eigenvalues of A, all in the units of A."""

    lowest: float
    largest: float
    lowest_residual: float
    """`|A u - lowest u|`: some eigenvalue lies within it of `lowest`"""
    largest_residual: float
    floor: float
    """below the lowest eigenvalue with probability 0.999 over random starts; -inf after too few steps"""
    exact: bool
    """no Krylov space is left: `values` holds every distinct eigenvalue, to rounding"""
    negative_curvature: float | None
    """`lowest` where it is negative beyond rounding"""
    direction: Params
    """the unit Ritz vector of `lowest`"""
    values: Tensor
    """all Ritz values, ascending, `[k]`"""
    residuals: Tensor
    """`|A u - value u|` of each, to rounding, or a bound on it, `[k]`"""
    vectors: Tensor
    """the unit Ritz vectors u `[k, P]`, in the order of `ravel`"""
    steps: int


def spectrum(
    matvec: Matvec,
    like: Params,
    *,
    steps: int = 40,
    starts: tuple[Params, ...] = (),
    enough: Enough | None = None,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """The ends of the spectrum of a symmetric A on `Params` shaped as `like` by at most `steps` products.

    Without `starts` the Krylov space is that of one random vector (of `generator`, by default a fixed one). Each of
    `starts`, such as a gradient, a right-hand side or the `direction` of a former call, gets an equal share of the
    steps, the random vector last. Up to `steps` unknowns the answer is exact. `enough(steps, lowest, its residual,
    largest)`, asked after every tenth step from the random vector, ends the probe early. Memory: `steps` vectors.
    Raises `ValueError` for steps below the number of starts and as `cg` does.
    """
    if steps <= len(starts):
        raise ValueError(f"steps must exceed the number of starts ({len(starts)}), got {steps}")
    apply, reference, restore = flatten(matvec, like, 0)
    given = [flatten(matvec, {key: start[key] for key in like}, 0)[1] for start in starts]
    space = _krylov(apply, reference, given, steps, enough, generator)
    values, coordinates = torch.linalg.eigh(space.projected, UPLO="U")
    lowest, largest = float(values[0]), float(values[-1])
    residuals, vectors = space.rest @ coordinates.abs(), coordinates.mT @ space.basis
    return Spectrum(
        lowest=lowest,
        largest=largest,
        lowest_residual=float(residuals[0]),
        largest_residual=float(residuals[-1]),
        floor=lowest if space.exhausted else _floor(lowest, largest, reference.numel(), space),
        exact=space.exhausted,
        negative_curvature=negative(lowest, largest, reference.dtype),
        direction=restore(vectors[:1]),
        values=values,
        residuals=residuals,
        vectors=vectors,
        steps=len(values),
    )


@dataclass(frozen=True)
class _Space:
    """An orthonormal basis `[k, P]`, the upper triangle of `V A V'`, and `rest[j]`, what `A v_j` has outside, `[k]`."""

    basis: Tensor
    projected: Tensor
    rest: Tensor
    exhausted: bool
    random_steps: int
    coupling: float
    """norms of the residuals at the ends of the spaces before the random one, summed"""


def _krylov(
    apply: FlatMatvec,
    reference: Tensor,
    given: list[Tensor],
    steps: int,
    enough: Enough | None,
    generator: torch.Generator | None,
) -> _Space:
    size = reference.numel()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    random = torch.randn(1, size, generator=generator, dtype=reference.dtype).to(reference.device)
    limit = min(steps, size)
    basis = reference.new_empty(limit, size)  # pages that no step writes stay out of memory
    projected, left = reference.new_zeros(limit, limit), reference.new_zeros(limit)
    count, before, largest, coupling = 0, 0, 0.0, 0.0
    exhausted = True
    for number, start in enumerate([*given, random]):
        before = count
        end = count + (limit - count) // (len(given) + 1 - number)
        rest, scale = start[0] - basis[:count].T @ (basis[:count] @ start[0]), float(start.norm())
        while True:
            # Gram-Schmidt twice is orthogonal to rounding; once was against the last two, or at the start of a block
            overlap = basis[:count] @ rest
            rest = rest - basis[:count].T @ overlap
            if count > before:
                projected[:count, count - 1] += overlap
            invariant = float(rest.norm()) <= 1e3 * torch.finfo(rest.dtype).eps * scale
            if invariant or count == end:
                break
            if enough is not None and number == len(given) and count > before and (count - before) % 10 == 0:
                values, coordinates = torch.linalg.eigh(projected[:count, :count], UPLO="U")
                width = float(left[:count] @ coordinates[:, 0].abs() + rest.norm() * coordinates[-1, 0].abs())
                if enough(count, float(values[0]), width, float(values[-1])):
                    break
            basis[count] = rest / rest.norm()
            rest = apply(basis[count][None])[0]
            check_finite(rest, count + 1, "Lanczos")
            count, largest = count + 1, max(largest, float(rest.norm()))
            scale, near = largest, slice(max(0, count - 2), count)
            projected[near, count - 1] = basis[near] @ rest
            rest = rest - basis[near].T @ projected[near, count - 1]
        exhausted = exhausted and invariant
        if count > before:
            left[count - 1] = rest.norm()
            coupling += float(rest.norm()) if number < len(given) else 0.0
    space = basis[:count], projected[:count, :count], left[:count]
    return _Space(*space, exhausted or count == size, count - before, coupling)


def _floor(lowest: float, largest: float, size: int, space: _Space) -> float:
    e = (math.log(1.648 * size**0.5 / 0.0005) / (2 * space.random_steps - 1)) ** 2
    return lowest - (largest - lowest) * e / (1 - 2 * e) - space.coupling if e < 0.5 else -math.inf
