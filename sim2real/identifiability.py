"""What a log can say about the parameters: the identifiability spectrum and the directions the data do not fix.

Each parameter k is measured in units of its range `scale_k` (prior standard deviation or width of its box), so that
directions that mix kilograms and metres have a meaning. With the weighted Jacobian `K = w^{3/2} J diag(scale)` and the
nuisance columns (sensor zeros, delay, held by their own priors) projected out,

    K = U diag(sigma) V',    spectrum = sigma^2,    direction i: v_i = V[:, i].

A direction is *not fixed* when
  (a) sigma_i is zero to rounding: no data of this kind ever fix it, or
  (b) the half-width of its interval, from the delete-one-block jackknife of the data alone (sim2real.intervals),
      exceeds the range: after the data we know no more than before.
A parameter *reaches the output* when its column of J is not zero, and is *identified* when, besides, its own interval
is narrower than its range and it has no part in a direction that is not fixed.
Reference: Gutenkunst et al., PLoS Comput. Biol. 3(10), 2007, e189 (sloppiness spectra).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import scipy.linalg
import torch
from scipy.stats import t as student
from torch import Tensor

from sim2real.intervals import Linearization, block_sums, check_linearization, deleted_block_shifts, make_blocks

# Singular values below this, relative to the largest, are rounding: 1e2 times P times the unit round-off and more.
_RANK_TOLERANCE = 1e-11
# A parameter with smaller components than these is not moved noticeably by a weak (b) or an exactly open (a) direction.
_PART = 0.1
_EXACT_PART = 1e-4


@dataclass(frozen=True)
class Identifiability:
    """The spectrum of P parameters (nuisance ones projected out), strongest direction first."""

    names: tuple[str, ...]
    spectrum: Tensor
    """`[P]` eigenvalues of the scaled `J'w^3 J`, largest first"""
    vectors: Tensor
    """`[P, P]`: column i is direction i, in units of `scale`"""
    half_width: Tensor
    """`[P]`: 90 % interval of direction i in units of `scale`; infinite where nothing fixes it"""
    fixed: Tensor
    """`[P]` bool, per direction"""
    directions: tuple[dict[str, float], ...]
    """a sparse basis of what is not fixed: parameter -> component in units of its scale, unit length"""
    reaches_output: Tensor
    """`[P]` bool, per parameter"""
    identified: Tensor
    """`[P]` bool, per parameter"""


def identifiability(
    windows: Linearization,
    names: Sequence[str],
    scale: Tensor,
    *,
    nuisance: Tensor | None = None,
    prior_precision: Tensor | None = None,
    level: float = 0.9,
    block_seconds: float | None = None,
) -> Identifiability:
    """Which combinations of the parameters a log fixes.

    names, scale: one per column of the Jacobian; scale in the unit of the parameter. nuisance `[columns]` bool marks
    the columns to project out, held by their entries of `prior_precision` (as in `jackknife`; the other entries are
    not used: the spectrum is that of the data). Raises `ValueError` for lengths or scales that do not fit.
    """
    check_linearization(windows)
    P = windows.jacobian.shape[2]
    if len(names) != P or scale.shape != (P,):
        raise ValueError(f"the jacobian has {P} columns; got {len(names)} names and scale {tuple(scale.shape)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(
            f"every scale must be positive and finite, got {dict(zip(names, scale.tolist(), strict=True))}"
        )
    aside = torch.zeros(P, dtype=torch.bool) if nuisance is None else nuisance.cpu()
    kept, removed = (~aside).nonzero().flatten().tolist(), aside.nonzero().flatten().tolist()
    precision = torch.zeros_like(scale)
    if prior_precision is not None:
        precision[removed] = prior_precision[removed]
    weighted = (windows.jacobian * windows.weights.pow(1.5).unsqueeze(-1)).flatten(0, 1) * scale
    triangle = torch.linalg.qr(torch.cat([weighted, torch.diag(precision.sqrt() * scale)]), mode="r").R
    sigma, vectors = _spectrum(triangle[:, kept], triangle[:, removed])
    blocks = make_blocks(windows, seconds=block_seconds)
    shifts, null = deleted_block_shifts(*block_sums(windows, blocks), precision.diag())
    moves = shifts[:, kept] / scale[kept], null[:, kept] / scale[kept]
    half_width, own = (_half_widths(*moves, basis, level) for basis in (vectors, torch.eye(len(kept)).to(vectors)))
    zero = sigma <= _RANK_TOLERANCE * sigma.max()
    half_width = torch.where(zero, torch.full_like(half_width, torch.inf), half_width)
    fixed = half_width < 1.0
    chosen = tuple(names[k] for k in kept)
    part = torch.maximum(_part(vectors[:, ~fixed]) / _PART, _part(vectors[:, zero]) / _EXACT_PART)
    reaches = windows.jacobian.flatten(0, 1)[:, kept].abs().amax(0) > 0
    directions = _sparse_basis(vectors[:, ~fixed], chosen)
    return Identifiability(
        chosen, sigma.square(), vectors, half_width, fixed, directions, reaches, reaches & (own < 1) & (part < 1)
    )


def parameter_range(value: Tensor, low: Tensor, high: Tensor, prior_std: Tensor) -> Tensor:
    """How much is known about each parameter before the data, all `[P]` in its unit: the `scale` of `identifiability`.

    The standard deviation of its prior, or the width of its box where that is infinite; for a positive quantity (lower
    bound above 0) at most its value, a factor of about two either way. The value itself, or 1, where nothing is finite.
    """
    size = torch.where(value == 0, torch.ones_like(value), value.abs())
    known = torch.where(prior_std.isfinite(), prior_std, high - low)
    known = torch.where(known.isfinite(), known, size)
    return torch.where(low > 0, torch.minimum(known, size), known)


def describe(direction: Mapping[str, float]) -> str:
    """A direction as text, largest component first: "0.71 m1 - 0.71 m2"; components below 0.05 are left out."""
    terms = sorted(((value, name) for name, value in direction.items() if abs(value) >= 0.05), key=lambda t: -abs(t[0]))
    sign = -1.0 if terms and terms[0][0] < 0 else 1.0
    parts = [f"{'-' if sign * value < 0 else '+'} {abs(value):.2f} {name}" for value, name in terms]
    return " ".join(parts).removeprefix("+ ")


def _spectrum(kept: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values `[P]` and right vectors `[P, P]` of `kept` with the range of `removed` projected out."""
    if removed.shape[1]:
        U, values, _ = torch.linalg.svd(removed, full_matrices=False)
        basis = U[:, values > _RANK_TOLERANCE * values.max()]
        kept = kept - basis @ (basis.mT @ kept)
    P = kept.shape[1]
    padded = torch.cat([kept, kept.new_zeros(max(0, P - kept.shape[0]), P)])
    _, sigma, vectors = torch.linalg.svd(padded, full_matrices=False)
    return sigma, vectors.mT


def _half_widths(shifts: Tensor, null: Tensor, vectors: Tensor, level: float) -> Tensor:
    """Half-width of each direction's interval; infinite where one block alone fixes half of it or more."""
    G = shifts.shape[0]
    variance = (G - 1) / G * (shifts @ vectors).square().sum(0)
    width = float(student.ppf((1 + level) / 2, max(G - 1, 1))) * variance.sqrt()
    if null.shape[0]:
        length = null.norm(dim=1, keepdim=True)
        share = (null / torch.where(length > 0, length, torch.ones_like(length)) @ vectors).abs().amax(0)
        width = torch.where(share > 0.5, torch.full_like(width, torch.inf), width)
    return width if G > 1 else torch.full_like(width, torch.inf)


def _part(vectors: Tensor) -> Tensor:
    """Norm of each parameter's components in the columns of `vectors`, `[P]`."""
    return vectors.square().sum(1).sqrt()


def _sparse_basis(vectors: Tensor, names: Sequence[str]) -> tuple[dict[str, float], ...]:
    """The span of the columns as few-parameter combinations (echelon form on pivot parameters), each of unit length."""
    count = vectors.shape[1]
    if count == 0:
        return ()
    pivots = scipy.linalg.qr(vectors.mT.cpu().numpy(), mode="r", pivoting=True)[1][:count].tolist()
    basis = torch.linalg.solve(vectors[pivots].mT, vectors.mT)
    basis = basis / basis.norm(dim=1, keepdim=True)
    return tuple(
        {name: value for name, value in zip(names, row, strict=True) if abs(value) > 1e-3} for row in basis.tolist()
    )
