"""Parameter intervals that stay honest when window errors are correlated: the delete-one-block jackknife.

The residuals of one window share its start error and neighbouring windows share data, so `J'J` counts the same error
many times (its 90 % intervals cover 16-24 %). Blocks of windows of one run, a few seconds long, are nearly
independent. With the Jacobian J and residual r of the windows, the weights w of the robust loss
(soft-L1: `w = 1 / sqrt(1 + (r/c)^2)`, so that `w^3` is its curvature), prior precisions L, and g a block:

    A_g = sum_{g} J' w^3 J,   s_g = sum_{g} J' w r,   A = L + sum_g A_g,
    d_g = (A - A_g)^{-1} s_g                        one Newton step after deleting block g
    cov = (G - 1)/G sum_g d_g d_g'  +  A^{-1} L S L A^{-1}
    interval = value +- t_{G-1} sqrt(diag cov)

The second term is the share of the priors (S: their covariance): without it a parameter held by its prior alone would
seem exactly known. A direction that one block alone fixes, or none, has an infinite interval.
References: Quenouille (1956); Tukey (1958); blocks: Kuensch, Ann. Statist. 17 (1989), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import t as student
from torch import Tensor

BLOCK_SECONDS = 2.0
"""shortest block, s: longer than the memory of friction and torque disturbances on the logged machines"""
WINDOWS_PER_BLOCK = 4.0
MINIMUM_BLOCKS = 6
# Relative to the largest eigenvalue of the unit-diagonal normal matrix: 1e3 times the rounding of eigh.
_RANK_TOLERANCE = 1e-12
# A parameter lies in an open direction when its loading exceeds this; rounding gives 1e-8.
_LOADING = 1e-5
# One block out of many with this share of the information is an accident of a window that amplifies everything.
_DOMINATING = 0.95


@dataclass(frozen=True)
class Linearization:
    """Residuals of W windows with R rows each and their exact Jacobian in P parameters, at the fitted point."""

    jacobian: Tensor
    """`[W, R, P]`, d residual / d parameter"""
    residual: Tensor
    """`[W, R]`"""
    weights: Tensor
    """`[W, R]` of the robust loss, `1 / sqrt(1 + (r/c)^2)`; ones for least squares, 0 for a masked row"""
    run: Tensor
    """`[W]` integer, the episode of each window"""
    start: Tensor
    """`[W]` s, start of each window within its run"""
    horizon: float
    """s, length of a window"""


@dataclass(frozen=True)
class Blocks:
    """Which block each window belongs to."""

    index: Tensor
    """`[W]` integer in [0, count)"""
    count: int
    seconds: float
    """nominal length"""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Jackknife:
    """Covariance and intervals of P parameters; `std` and `half_width` are infinite where the data leave a gap."""

    covariance: Tensor
    """`[P, P]`, of the directions that the data or a prior fix"""
    std: Tensor
    """`[P]`"""
    half_width: Tensor
    """`[P]`: value +- half_width is the interval at `level`"""
    open: Tensor
    """`[P]` bool: the parameter has a part in a direction that fewer than two blocks fix"""
    level: float
    blocks: Blocks
    notes: tuple[str, ...] = ()


def soft_l1_weights(residual: Tensor, scale: float | None) -> Tensor:
    """`1 / sqrt(1 + (r/scale)^2)` of the soft-L1 loss; ones when `scale` is None (least squares)."""
    if scale is None:
        return torch.ones_like(residual)
    return torch.rsqrt(1 + (residual / scale) ** 2)


def check_linearization(windows: Linearization) -> None:
    """Raise `ValueError` naming what is wrong with shapes or values."""
    J = windows.jacobian
    if J.ndim != 3:
        raise ValueError(f"jacobian must be [windows, rows, parameters], got shape {tuple(J.shape)}")
    wanted = {"residual": J.shape[:2], "weights": J.shape[:2], "run": J.shape[:1], "start": J.shape[:1]}
    for name, shape in wanted.items():
        if getattr(windows, name).shape != shape:
            got = tuple(getattr(windows, name).shape)
            raise ValueError(f"{name} has shape {got}, the jacobian {tuple(J.shape)} asks for {tuple(shape)}")
    for name in ("jacobian", "residual", "weights", "start"):
        bad = (~torch.isfinite(getattr(windows, name))).reshape(J.shape[0], -1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name} is not finite in {len(bad)} of {J.shape[0]} windows (first: window {bad[0]}); "
                f"leave out windows in which the model diverges"
            )
    if not windows.horizon > 0:
        raise ValueError(f"horizon must be positive, got {windows.horizon} s")


def _divide(windows: Linearization, seconds: float) -> tuple[Tensor, int]:
    """Cut each run into equal blocks of about `seconds`, at least one per run."""
    index = torch.zeros_like(windows.run)
    count = 0
    for run in windows.run.unique():
        inside = windows.run == run
        start = windows.start[inside] - windows.start[inside].min()
        number = max(1, round(float(start.max() + windows.horizon) / seconds))
        # cut the range of starts, not of samples, so that the last block is as full as the others
        width = max(float(start.max()), 1e-12) * (1 + 1e-9) / number
        _, local = torch.unique((start / width).floor(), return_inverse=True)
        index[inside] = local + count
        count += int(local.max()) + 1
    return index, count


def make_blocks(windows: Linearization, *, seconds: float | None = None) -> Blocks:
    """Blocks of windows of one run; default length `max(2 s, 4 horizons)`.

    With fewer than 6 such blocks the length is cut until there are 6, and a note says so: neighbouring blocks are
    then correlated and the intervals come out too narrow.
    """
    wanted = max(BLOCK_SECONDS, WINDOWS_PER_BLOCK * windows.horizon) if seconds is None else seconds
    if not wanted > 0:
        raise ValueError(f"the block length must be positive, got {wanted} s")
    length = wanted
    index, count = _divide(windows, length)
    shortest = windows.horizon / max(1, len(windows.run))
    while count < MINIMUM_BLOCKS and length > shortest:
        length *= 0.9
        index, count = _divide(windows, length)
    notes: tuple[str, ...] = ()
    if count < MINIMUM_BLOCKS:
        notes = (f"only {count} blocks of windows: intervals need at least {MINIMUM_BLOCKS}; record a longer log",)
    elif length < wanted:
        notes = (
            f"short log: {count} blocks of {length:.3g} s instead of {wanted:.3g} s; "
            f"neighbouring blocks are correlated, so the intervals may be too narrow",
        )
    return Blocks(index, count, length, notes)


def block_sums(windows: Linearization, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Per block, the normal matrix `A_g = sum J'w^3 J [G, P, P]` and the score `s_g = sum J'w r [G, P]`."""
    J, w = windows.jacobian, windows.weights
    scaled = J * w.pow(1.5).unsqueeze(-1)
    normal = scaled.mT @ scaled
    score = (J.mT @ (w * windows.residual).unsqueeze(-1)).squeeze(-1)
    A = normal.new_zeros(blocks.count, *normal.shape[1:]).index_add(0, blocks.index, normal)
    s = score.new_zeros(blocks.count, score.shape[1]).index_add(0, blocks.index, score)
    return A, s


def _unit_diagonal(normal: Tensor) -> Tensor:
    """`1/sqrt` of the diagonal, 1 where it is 0: parameters in very different units become comparable."""
    diagonal = normal.diagonal()
    return torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()


def deleted_block_shifts(A: Tensor, s: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """`d_g = (A - A_g)^+ s_g [G, P]` and the null vectors of every `A - A_g`, `[K, P]`, in units of the parameters.

    `A [G, P, P]`, `s [G, P]` from `block_sums`, `precision [P, P]` of the priors.
    """
    total = A.sum(0) + precision
    scale = _unit_diagonal(total)
    values, vectors = torch.linalg.eigh((total - A) * scale.outer(scale))
    null = values < _RANK_TOLERANCE * values[:, -1:].clamp(min=1.0)
    inverse = torch.where(null, torch.zeros_like(values), 1 / torch.where(null, torch.ones_like(values), values))
    score = (vectors.mT @ (s * scale).unsqueeze(-1)).squeeze(-1)
    shifts = (vectors @ (inverse * score).unsqueeze(-1)).squeeze(-1) * scale
    return shifts, vectors.mT[null] * scale


def jackknife(
    windows: Linearization,
    *,
    prior_precision: Tensor | None = None,
    prior_std: Tensor | None = None,
    held: Tensor | None = None,
    level: float = 0.9,
    block_seconds: float | None = None,
) -> Jackknife:
    """Delete-one-block jackknife of a fit.

    prior_precision `[P]`: what the priors add to the normal matrix `J'w^3 J` (0: no prior). prior_std `[P]`: the
    standard deviation a prior claims, in the parameter's unit; default `prior_precision^-1/2`, right when residuals
    are in units of their own standard deviation. held `[P]` bool: parameters at a bound, kept there when a block is
    deleted; their own `std` is what it would be if they were free. Nuisance parameters (sensor zeros of one run, an
    input delay) are ordinary columns of the Jacobian. Raises `ValueError` for shapes or values that do not fit.
    """
    check_linearization(windows)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    P = windows.jacobian.shape[2]
    precision = windows.residual.new_zeros(P) if prior_precision is None else prior_precision
    held = torch.zeros(P, dtype=torch.bool, device=precision.device) if held is None else held
    for name, vector in (("prior_precision", precision), ("held", held)):
        if vector.shape != (P,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, the jacobian has {P} parameters")
    if prior_std is None:
        prior_std = torch.where(precision > 0, precision, torch.ones_like(precision)).rsqrt()
    variance = torch.where(precision > 0, prior_std.square(), torch.zeros_like(precision))
    blocks = make_blocks(windows, seconds=block_seconds)
    A, s = block_sums(windows, blocks)
    covariance, opened = _covariance(A, s, precision, variance)
    if bool(held.any()):
        released, free = covariance.diagonal(), (~held).nonzero().flatten()
        inner, inner_open = _covariance(A[:, free][:, :, free], s[:, free], precision[free], variance[free])
        covariance = torch.zeros_like(covariance).index_put((free.unsqueeze(1), free), inner)
        covariance = covariance + torch.diag(torch.where(held, released, torch.zeros_like(released)))
        opened = (opened & held).index_put((free,), inner_open)
    if blocks.count < 2:
        opened = torch.ones_like(opened)
    infinite = torch.full_like(precision, torch.inf)
    std = torch.where(opened, infinite, covariance.diagonal().clamp(min=0).sqrt())
    quantile = float(student.ppf((1 + level) / 2, max(blocks.count - 1, 1)))
    notes = (*blocks.notes, *_dominating_block(A, windows, blocks))
    return Jackknife(covariance, std, quantile * std, opened, level, blocks, notes)


def _dominating_block(A: Tensor, windows: Linearization, blocks: Blocks) -> tuple[str, ...]:
    """A note when one of several blocks holds most of the information on the parameters that all runs share."""
    information = A.diagonal(dim1=1, dim2=2)
    runs = [information[blocks.index[windows.run == run].unique()].sum(0) > 0 for run in windows.run.unique()]
    shared = torch.stack(runs).all(0)
    if blocks.count < 2 or not bool(shared.any()):
        return ()
    share, block = (information[:, shared] / information[:, shared].sum(0)).max(0)
    middle = int(share.argsort()[len(share) // 2])
    if float(share[middle]) < _DOMINATING:
        return ()
    window = int((blocks.index == block[middle]).nonzero()[0, 0])
    where = f"from {float(windows.start[window]):.3g} s of run {int(windows.run[window])}"
    return (
        f"{100 * float(share[middle]):.0f} % of the information comes from one block ({where}): the model is near an "
        f"instability there or its time step too long; use more substeps, or leave such windows out with max_growth",
    )


def _covariance(A: Tensor, s: Tensor, precision: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Jackknife covariance plus the priors' share `[P, P]`, and which parameters are open `[P]`."""
    G = A.shape[0]
    shifts, null = deleted_block_shifts(A, s, precision.diag())
    covariance = (G - 1) / G * shifts.mT @ shifts
    total = A.sum(0) + precision.diag()
    scale = _unit_diagonal(total)
    if bool((precision > 0).any()):
        pull = torch.linalg.pinv(total * scale.outer(scale), hermitian=True) * scale.outer(scale) * precision
        covariance = covariance + (pull * variance) @ pull.mT
    loading = (null / scale).abs()
    return covariance, (loading > _LOADING).any(0)


def correlation(covariance: Tensor) -> Tensor:
    """`cov_ij / sqrt(cov_ii cov_jj) [P, P]`; a parameter without variance correlates with none."""
    std = covariance.diagonal().sqrt()
    scale = torch.where(std > 0, 1 / torch.where(std > 0, std, torch.ones_like(std)), torch.zeros_like(std))
    matrix = covariance * scale.outer(scale)
    return matrix - torch.diag(matrix.diagonal()) + torch.eye(len(std)).to(matrix)
