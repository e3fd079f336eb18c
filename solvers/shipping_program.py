r"""What to ship and produce for given goals: the lower level of a warehouse with stores, and its inverse.

Available units S, room r_j of the stores (negative: over capacity already), warehouse capacity W, production cap P,
goals q_j (shipments) and g (production); the linear program, lexicographic,

    first   min sum_j max(f_j - r_j, 0)
    then    min |p - g| + sum_j |f_j - q_j|
    s.t.    0 <= f,  sum_j f_j <= S,  0 <= p <= P,  S - sum_j f_j + p <= W.

Its matrix is an interval matrix, so whole data have whole solutions; with one warehouse they are known in closed form.
With R = sum_j max(r_j, 0), and as long as S - W <= R, no store need exceed its room: each gets min(q_j, r_j^+), less
where the sum exceeds S, and the warehouse is kept within W by producing less and, if that is not enough, shipping more.
Otherwise S - W - R units must go to stores that have no room, nothing is produced, and stores that ask for more come
first. Where a unit costs the same wherever it goes, it goes in proportion, by largest remainders.

The inverse is an index-add: flows f and production p are optimal for the goals q = f, g = p unless one of the
constraints or the first objective forbids them. As shares of S, u_j = f_j / S with the remainder for the warehouse.

Reference: Schmidt, Gammelli, Harrison, Pavone, Rodrigues, arXiv 2410.07933, equation 33, with the lexicographic
objective of the published implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.solvers.apportionment import largest_remainder


@dataclass(frozen=True)
class ShippingLimits:
    """The constraints of B programs with n stores, whole units. Raises `ValueError` for other shapes or fractions."""

    available: Tensor
    """S `[B]`"""
    room: Tensor
    """r `[B, n]`"""
    warehouse_capacity: Tensor
    """W `[B]` or a scalar"""
    production_cap: Tensor
    """P `[B]` or a scalar"""

    def __post_init__(self) -> None:
        if self.room.ndim != 2 or self.available.shape != self.room.shape[:1]:
            raise ValueError(
                f"available must be [B] and room [B, n], got {tuple(self.available.shape)} and {tuple(self.room.shape)}"
            )
        for name in ("available", "room", "warehouse_capacity", "production_cap"):
            value = getattr(self, name)
            if not bool((value == torch.round(value)).all()):
                raise ValueError(f"'{name}' must be whole numbers of units; round it first")
            if name in ("available", "room") and not bool(torch.isfinite(value).all()):
                raise ValueError(f"'{name}' must be finite; a large whole number stands for no limit")
            if name not in ("available", "room") and value.shape not in ((), self.available.shape):
                size = len(self.available)
                raise ValueError(f"'{name}' must be a scalar or [{size}], got {list(value.shape)}")
            if name != "room" and bool((value < 0).any()):
                raise ValueError(f"'{name}' must not be negative, got {float(value.min()):.6g}")


@dataclass(frozen=True)
class ShippingPlan:
    """An optimal decision: `shipments [B, n]`, `production [B]` and the values of both objectives `[B]`."""

    shipments: Tensor
    production: Tensor
    violation: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class ShippingGoals:
    """Goals recovered from flows."""

    share: Tensor
    """`[B, n+1]`: of the available units, the last one stays in the warehouse; sums to 1"""
    production: Tensor
    """`[B]`"""
    optimal: Tensor
    """`[B]` bool: the logged flows are optimal for these goals; otherwise no goals explain them"""


def shipping_goals(share: Tensor, available: Tensor) -> Tensor:
    """Whole goals q `[B, n]` from shares `[B, n+1]` of the available units `[B]`, by largest remainders."""
    return largest_remainder(share, available)[..., :-1]


def ship(limits: ShippingLimits, goals: Tensor, production: Tensor) -> ShippingPlan:
    """Solve the programs for goals `[B, n]` and production goals `[B]` (rounded to whole units, below 0 taken as 0).

    Raises `ValueError` for goals of another shape or that are not finite.
    """
    if goals.shape != limits.room.shape or production.shape != limits.available.shape:
        raise ValueError(
            f"goals must be {tuple(limits.room.shape)} and production {tuple(limits.available.shape)}, got "
            f"{tuple(goals.shape)} and {tuple(production.shape)}"
        )
    if not bool(torch.isfinite(goals).all() and torch.isfinite(production).all()):
        raise ValueError("goals must be finite")
    goals, production = torch.round(torch.relu(goals)), torch.round(torch.relu(production))
    room, stay = torch.relu(limits.room), limits.available - limits.warehouse_capacity
    within = _within_room(limits, goals, room)
    # the warehouse may be left with at most its capacity: produce less, then ship more
    produced = torch.minimum(production, limits.production_cap)
    produced = torch.relu(torch.minimum(produced, within.sum(-1) - stay))
    slack = room - within
    more = torch.minimum(torch.relu(stay - within.sum(-1)), slack.sum(-1))
    shipped = within + _spread(slack, more)
    shipped = shipped + _forced(goals - shipped, torch.relu(stay - shipped.sum(-1)))
    deviation = (produced - production).abs() + (shipped - goals).abs().sum(-1)
    return ShippingPlan(shipped, produced, torch.relu(shipped - limits.room).sum(-1), deviation)


def invert_shipments(limits: ShippingLimits, shipments: Tensor, production: Tensor) -> ShippingGoals:
    """Goals that explain logged flows `[B, n]` and production `[B]`; where none do, `optimal` is False.

    Flows are optimal for some goals exactly where they are for themselves as goals: deviation 0 is then the least.
    Raises `ValueError` as `ship` does, and for flows beyond what was available.
    """
    if shipments.shape != limits.room.shape:
        raise ValueError(f"shipments must be {tuple(limits.room.shape)}, got {tuple(shipments.shape)}")
    sent = shipments.sum(-1)
    if bool((shipments < 0).any() or (sent > limits.available).any()):
        rows = int(((sent > limits.available) | (shipments < 0).any(-1)).sum())
        raise ValueError(f"{rows} rows ship less than nothing or more than is available; log what was executed")
    plan = ship(limits, shipments, production)
    optimal = (plan.shipments == shipments).all(-1) & (plan.production == production)
    kept = torch.cat([shipments, (limits.available - sent).unsqueeze(-1)], -1)
    nothing = torch.zeros_like(kept)
    nothing[:, -1] = 1.0
    share = torch.where(
        (limits.available > 0).unsqueeze(-1), kept / limits.available.clamp(min=1).unsqueeze(-1), nothing
    )
    return ShippingGoals(share, production, optimal)


def _within_room(limits: ShippingLimits, goals: Tensor, room: Tensor) -> Tensor:
    """Goals cut at the room of each store and, in proportion, at what is available."""
    wanted = torch.minimum(goals, room)
    excess = torch.relu(wanted.sum(-1) - limits.available)
    return wanted - _spread(wanted, excess)


def _forced(asked: Tensor, units: Tensor) -> Tensor:
    """Units that must go beyond the room of the stores: first to those that ask for more, then to all alike."""
    asked = torch.relu(asked)
    first = torch.minimum(units, asked.sum(-1))
    rest = units - first
    return _spread(asked, first) + largest_remainder(torch.ones_like(asked), rest)


def _spread(limit: Tensor, units: Tensor) -> Tensor:
    """Whole `units [B]`, at most the sum of the limits, in proportion to the limits `[B, n]` and within them."""
    weight = torch.where(limit.sum(-1, keepdim=True) > 0, limit, torch.ones_like(limit))
    # floor(l u / sum l) <= l, and a remainder above 0 means it is below l: one more stays within the limit
    return largest_remainder(weight, units)
