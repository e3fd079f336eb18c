"""Constraints in the search of `tune`: the step, the order of points, and when a constrained point is stationary.

A point carries margins m `[C]` (>= 0: satisfied, with the confidence of its estimate) and their slopes S `[C, d]` in
the scaled parameters. Feasibility comes first: a point that satisfies its constraints is never left for one that does
not; one that violates them gives way to any that violates them less. The violation is a length in x,
`max_i (-m_i) / |S_i|`; below 1e-6 it counts as none.

The quasi-Newton matrix follows the Lagrangian `F + mu'm` (see `safe_step`). A candidate that violates a curved
constraint although its linearisation does not is corrected once to second order (Nocedal and Wright, Numerical
Optimization, 2nd ed., 2006, (18.56)).
"""

from __future__ import annotations

import torch
from scipy.optimize import nnls
from torch import Tensor

from sim2real.safe_step import safe_step
from sim2real.trust_region import trust_region_step
from sim2real.tune_state import Point, Space, room

FEASIBLE = 1e-6
"""violation in scaled units that counts as none"""


def violation(margins: Tensor, slopes: Tensor) -> float:
    """How far the worst constraint is from being satisfied, as a length in x; 0 when all are."""
    if not len(margins):
        return 0.0
    size = slopes.norm(dim=-1)
    return float(((-margins).clamp(min=0.0) / torch.where(size > 0, size, torch.ones_like(size))).max())


def feasible(point: Point) -> bool:
    """Whether all constraints hold, to 1e-6 in scaled units."""
    return violation(point.margins, point.slopes) <= FEASIBLE


def violated(point: Point) -> str:
    """The constraints a point violates, with their margins; empty when it satisfies all."""
    size = point.slopes.norm(dim=-1)
    names = [key.removeprefix("margin.") for key in point.info if key.startswith("margin.")]
    bad = (-point.margins > FEASIBLE * torch.where(size > 0, size, torch.ones_like(size))).tolist()
    rows = zip(names, point.margins.tolist(), bad, strict=True)
    return ", ".join(f"'{name}' (margin {margin:.3g})" for name, margin, wrong in rows if wrong)


def next_step(
    anchor: Point, curvature: Tensor, radius: float, space: Space, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The step `[d]` and the multipliers `[C]`; `offset [C]` is added to the margins (a second-order correction)."""
    low, high = room(space, anchor.theta)
    if not len(anchor.margins):
        return trust_region_step(anchor.gradient, curvature, radius, low, high), anchor.margins
    size = anchor.slopes.norm(dim=-1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    # a violation that counts as none is not worth a loss of return
    slight = (anchor.margins < 0) & (anchor.margins >= -FEASIBLE * size)
    margins = torch.where(slight, torch.zeros_like(size), anchor.margins)
    margins = margins if offset is None else margins + offset
    found = safe_step(anchor.gradient, curvature, radius, low, high, margins, anchor.slopes)
    return found.step, found.multipliers


def correction(anchor: Point, point: Point, step: Tensor) -> Tensor | None:
    """What the linearised constraints missed at a candidate `[C]`; None unless it left the feasible set that way."""
    if not len(anchor.margins) or not point.trusted or not feasible(anchor) or feasible(point):
        return None
    # a tenth more than was missed covers what the correction itself misses, which is of higher order in the step
    return 1.1 * (point.margins - (anchor.margins + anchor.slopes @ step)).clamp(max=0.0)


def merit(point: Point, anchor: Point, step: Tensor, predicted: float) -> tuple[float, float]:
    """Gain and promise of a step: of the value, or of the violation where the anchor violates a constraint."""
    if feasible(anchor):
        return point.value - anchor.value, predicted
    before = violation(anchor.margins, anchor.slopes)
    promised = before - violation(anchor.margins + anchor.slopes @ step, anchor.slopes)
    return before - violation(point.margins, anchor.slopes), promised


def inside(anchor: Point, space: Space) -> Tensor:
    """The anchor's gradient without the parts that push against the box or against active constraints."""
    gradient, (low, high) = anchor.gradient, room(space, anchor.theta)
    free = ~(((low >= 0) & (gradient < 0)) | ((high <= 0) & (gradient > 0)))
    return unheld(anchor, free)


def unheld(point: Point, free: Tensor) -> Tensor:
    """The gradient in the variables `free [d]`, without what active constraints hold back; 0 in the others.

    That part is the non-negative combination of their slopes that comes nearest to minus the gradient.
    """
    size = point.slopes.norm(dim=-1)
    active = (size > 0) & (point.margins <= 1e-5 * size)
    if not bool(active.any()) or not bool(free.any()):
        return point.gradient * free
    gradient, rows = point.gradient[free], (point.slopes[active] / size[active].unsqueeze(-1))[:, free]
    held = nnls(rows.T.cpu().numpy(), -gradient.cpu().numpy())[0]
    left = gradient + rows.T @ torch.as_tensor(held, dtype=gradient.dtype, device=gradient.device)
    return torch.zeros_like(point.gradient).index_put((free.nonzero().squeeze(-1),), left)
