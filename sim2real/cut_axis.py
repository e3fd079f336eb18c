"""Action discontinuities as choices: an action axis cut at its jumps into interval choice + point inside.

A reward or a step that jumps at known action values (a fixed cost once anything is ordered, a minimum order, a bulk
price) has no pathwise derivative across the jump. Cut the axis there: d chooses the cell, c is a point inside it,

    (lo, hi)      lo + (hi - lo) (delta + (1 - 2 delta) sigmoid(z))
    (lo, inf)     lo + scale (delta + softplus(z))          (-inf, hi)   hi - scale (delta + softplus(z))
    (-inf, inf)   scale z                                   lo = hi      the point lo (an atom: z is not used)

with z the continuous part of a discrete-first hybrid policy. The small delta keeps points of an open interval off its
ends in floating point, so that the cell of an action can be read from the action: the user's own model stays as it is.
The log-probability is exact by change of variables, `log pi(d|s) + log p(z|s, d) + log |dz/dc|`: a probability for
atoms, a density per unit for intervals, over all axes at once.
Reference: M. Alvo et al., Policy optimization in hybrid discrete-continuous action spaces via mixed gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sim2real.hybrid_policy import HybridPolicy
from sim2real.params import Params


@dataclass(frozen=True)
class Cells:
    """K disjoint boxes of an m-dimensional action, open intervals or (where low = high) points in each column."""

    low: Tensor
    """`[K, m]`, -inf where unbounded"""
    high: Tensor
    """`[K, m]`"""
    scale: Tensor
    """`[m]` length over which unbounded intervals bend, in units of the action"""


def axis_cells(cuts: Sequence[float], *, low: float = -math.inf, high: float = math.inf, scale: float = 1.0) -> Cells:
    """One axis `(low, high)` cut at `cuts`, strictly increasing inside it: `len(cuts) + 1` open intervals.

    A value that is itself a choice (order nothing at all) is an atom: name it with `box_cells`.
    """
    edges = [low, *cuts, high]
    if not all(a < b for a, b in pairwise(edges)):
        raise ValueError(f"low, cuts and high must increase strictly, got {edges}")
    ends = torch.tensor(edges, dtype=torch.float64)
    return box_cells(ends[:-1, None], ends[1:, None], scale=torch.tensor([scale], dtype=torch.float64))


def box_cells(low: Tensor, high: Tensor, *, scale: Tensor | None = None) -> Cells:
    """Cells `low <= high` `[K, m]`; equal ends are atoms. `scale [m]` None: 1.

    "No order, or any positive quantities of n items" is `low = zeros(2, n)`, `high = [[0] * n, [inf] * n]`. Raises
    `ValueError` for other shapes, ends out of order, a point at infinity, cells that overlap, or an interval so short
    that floating point has no room inside it.
    """
    if low.ndim != 2 or low.shape != high.shape:
        raise ValueError(f"low and high must both be [K, m], got {tuple(low.shape)} and {tuple(high.shape)}")
    size = torch.ones_like(low[0]) if scale is None else scale
    if size.shape != low.shape[1:] or not bool(((size > 0) & torch.isfinite(size)).all()):
        raise ValueError(f"scale must be [{low.shape[1]}], positive and finite, got {size.tolist()}")
    if not bool((low <= high).all()) or bool(((low == high) & torch.isinf(low)).any()):
        raise ValueError(f"ends must be low <= high, points finite, got low {low.tolist()}, high {high.tolist()}")
    cells = Cells(low, high, size)
    ends = _squash(cells, torch.full_like(low, -math.inf)), _squash(cells, torch.full_like(low, math.inf))
    room = ((torch.minimum(*ends) > low) | torch.isinf(low)) & ((torch.maximum(*ends) < high) | torch.isinf(high))
    if not bool((room | (low == high)).all()):
        raise ValueError(f"an interval is too short for {low.dtype}: low {low.tolist()}, high {high.tolist()}")
    for k in range(len(low)):
        for other in range(k):
            same_point = (low[k] == high[k]) & (low[other] == high[other]) & (low[other] == low[k])
            apart = (low[k] >= high[other]) | (low[other] >= high[k])
            if not bool((apart & ~same_point).any()):
                raise ValueError(f"cells {other} and {k} overlap; every action must lie in one cell only")
    return cells


def cut_policy(policy: HybridPolicy, cells: Cells) -> HybridPolicy:
    """`policy`, whose continuous part is z, as a policy over plain actions `[B, m]`, without the index column.

    One choice per cell. Deterministic or stochastic as `policy` is; all estimators take it. Raises `ValueError` when
    `policy` draws the continuous part first or has another number of choices; `index` raises for an action that lies
    in no cell, `log_prob` is -inf there.
    """
    if policy.continuous_first:
        raise ValueError("a point inside an interval needs the interval first; use a discrete_first_policy")
    if policy.choices != len(cells.low):
        raise ValueError(f"the policy has {policy.choices} choices, the axis {len(cells.low)} cells")

    def chosen(choice: Tensor, like: Tensor) -> Cells:
        low, high = (ends.to(like)[choice] for ends in (cells.low, cells.high))
        return Cells(low, high, cells.scale.to(like))

    def plain(hybrid: Tensor) -> Tensor:
        return _squash(chosen(policy.index(hybrid), hybrid), hybrid[..., 1:])

    def column_log_density(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        choice, inside = _cell_of(cells, action)
        own = chosen(choice, action)
        z, log_slope = _unsquash(own, action)
        density = policy.column_log_density(nu, state, torch.cat([choice.to(z.dtype).unsqueeze(-1), z], -1))
        density = torch.where(own.low == own.high, torch.zeros_like(z), density + log_slope)
        return torch.where(inside.unsqueeze(-1), density, torch.full_like(z, -math.inf))

    def log_prob(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        choice, _ = _cell_of(cells, action)
        mass = policy.choice_log_probs(nu, state, action).gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        return mass + column_log_density(nu, state, action).sum(-1)

    def index(action: Tensor) -> Tensor:
        choice, inside = _cell_of(cells, action)
        if not bool(inside.all()):
            raise ValueError(f"{int((~inside).sum())} actions lie in no cell, the first {action[~inside][0].tolist()}")
        return choice

    return replace(
        policy,
        act=lambda nu, state, noise: plain(policy.act(nu, state, noise)),
        log_prob=log_prob,
        index=index,
        branch=lambda nu, state, choice, noise: plain(policy.branch(nu, state, choice, noise)),
        column_log_density=column_log_density,
    )


def _margin(values: Tensor) -> float:
    return float(torch.finfo(values.dtype).eps) ** 0.5


def _finite(ends: Tensor) -> Tensor:
    """Zero in place of infinity: a constant that the branch not taken may use without spoiling derivatives."""
    return torch.where(torch.isinf(ends), torch.zeros_like(ends), ends)


def _squash(cells: Cells, z: Tensor) -> Tensor:
    low, high, delta = _finite(cells.low), _finite(cells.high), _margin(z)
    rise = cells.scale * (delta + softplus(z))
    bounded = low + (high - low) * (delta + (1 - 2 * delta) * torch.sigmoid(z))
    above, below = torch.isinf(cells.high), torch.isinf(cells.low)
    point = torch.where(above, low + rise, torch.where(below, high - rise, bounded))
    point = torch.where(above & below, cells.scale * z, point)
    return torch.where(cells.low == cells.high, cells.low, point)


def _unsquash(cells: Cells, action: Tensor) -> tuple[Tensor, Tensor]:
    """z and `log |dz / d action|`; where no z leads to the action, a finite z and -inf."""
    low, high, delta = _finite(cells.low), _finite(cells.high), _margin(action)
    above, below = torch.isinf(cells.high), torch.isinf(cells.low)
    width = torch.where((high > low) & ~above & ~below, high - low, torch.ones_like(high))
    share = ((action - low) / width - delta) / (1 - 2 * delta)
    reached = (share > 0) & (share < 1)
    share = torch.where(reached, share, torch.full_like(share, 0.5))
    z = torch.log(share) - torch.log1p(-share)
    slope = -torch.log(share) - torch.log1p(-share) - torch.log(width * (1 - 2 * delta))
    rise = torch.where(above, action - low, high - action) / cells.scale - delta
    risen, half = rise > 0, above | below
    rise = torch.where(risen, rise, torch.ones_like(rise))
    fall = torch.log(-torch.expm1(-rise))  # softplus(z) = rise: z = rise + log(1 - exp(-rise))
    z, slope = torch.where(half, rise + fall, z), torch.where(half, -fall - torch.log(cells.scale), slope)
    free, reached = above & below, torch.where(half, risen, reached)
    z, slope = torch.where(free, action / cells.scale, z), torch.where(free, -torch.log(cells.scale), slope)
    return z, torch.where(reached | free, slope, torch.full_like(slope, -math.inf))


def _cell_of(cells: Cells, action: Tensor) -> tuple[Tensor, Tensor]:
    """The cell of each action `[B]` (0 where there is none), and whether there is one."""
    a = action.detach().unsqueeze(-2)
    low, high = cells.low.to(a), cells.high.to(a)
    member = (((a > low) & (a < high)) | ((low == high) & (a == low))).all(-1)
    return member.to(torch.int8).argmax(-1), member.any(-1)
