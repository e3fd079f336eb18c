"""Linear programs with many right-hand sides, and the right-hand side behind a logged decision.

    min c'x      subject to   A x >= b  (= b on equal rows),   0 <= x <= high

A and c stay, b changes: rows of a batch are solved together, block-diagonal, by HiGHS.

The inverse: which b makes a logged x optimal? Where b is unknown, b = A x: a smaller b leaves slack, whose dual must be
zero, so it explains nothing that b = A x does not. Then, by strong duality, x is optimal if and only if its cost is the
dual value

    c'x = max  b'y - high'w     subject to   A'y - w <= c,   w >= 0,   y >= 0 (free on equal rows),

and otherwise no b explains x: the gap, what x wastes, is

    sum_j (c - A'y + w)_j x_j + y'(A x - b) + w'(high - x)      of terms that are all at least 0:

entries that should not be in use, known rows met by more than they ask, entries that should be at their bound. Flows of
a fleet need no solver for this: `flow_inverse`.

Reference: Schmidt et al., Offline hierarchical reinforcement learning via inverse optimization, 2024, section 4; Ahuja
and Orlin, Inverse optimization, Operations Research, 2001.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import linprog
from torch import Tensor

from sim2real.solvers.convex import InfeasibleError

COLUMNS = 4000
"""solved in one call: below, the overhead of calls dominates, above, the simplex method"""
TOLERANCE = 1e-7
"""HiGHS's own; of costs relative to the largest, of rows absolute: choose units in which b is not small"""


@dataclass(frozen=True)
class LinearProgram:
    """All but the right-hand side. Raises `ValueError` for shapes that do not fit and data that are not finite."""

    cost: np.ndarray
    """`[m]`"""
    rows: scipy.sparse.csr_array
    """A, `[p, m]`"""
    equal: np.ndarray
    """`[p]` bool"""
    high: np.ndarray
    """`[m]`; inf: no bound"""

    def __post_init__(self) -> None:
        p, m = self.rows.shape
        if self.cost.shape != (m,) or self.high.shape != (m,) or self.equal.shape != (p,):
            raise ValueError(
                f"rows are [{p}, {m}], so cost and high must be [{m}] and equal [{p}]; got {list(self.cost.shape)}, "
                f"{list(self.high.shape)}, {list(self.equal.shape)}"
            )
        if self.equal.dtype != bool:
            raise ValueError(f"equal must be bool, got {self.equal.dtype}")
        if not np.isfinite(self.cost).all() or not (self.high >= 0).all():
            raise ValueError("cost must be finite, and high at least 0 (inf: no bound)")


@dataclass(frozen=True)
class LinearOptimum:
    """Solutions of a batch."""

    x: Tensor
    """`[B, m]`"""
    cost: Tensor
    """`[B]`"""
    dual: Tensor
    """`[B, p]` of the rows: what one more unit of b costs"""
    reduced: Tensor
    """`[B, m]` reduced costs `c - A'y`"""


@dataclass(frozen=True)
class RightHandSide:
    """What a batch of logged decisions was aiming at."""

    value: Tensor
    """`[B, p]`"""
    optimal: Tensor
    """`[B]` bool"""
    saving: Tensor
    """`[B]` cost of x less the least cost for `value`"""
    dual: Tensor
    """`[B, p]` of the least cost: the proof"""
    wasteful: Tensor
    """`[B, m]` bool: entries in use that the cheapest plans do not use; none where the waste is of another kind"""


def solve_linear_program(program: LinearProgram, b: Tensor) -> LinearOptimum:
    """Minimisers for each row of `b` `[B, p]`.

    Raises `InfeasibleError` naming rows without solution, `ValueError` for another shape.
    """
    p, m = program.rows.shape
    if b.ndim != 2 or b.shape[1] != p or not len(b) or not bool(torch.isfinite(b).all()):
        raise ValueError(f"b must be [B, {p}], not empty and finite, got {list(b.shape)}")
    sides = b.detach().cpu().double().numpy()
    size = max(1, COLUMNS // m)
    parts = [_solved(program, sides[k : k + size], k) for k in range(0, len(sides), size)]
    x, dual = (np.concatenate(column) for column in zip(*parts, strict=True))
    results = x, x @ program.cost, dual, program.cost - dual @ program.rows
    return LinearOptimum(*(torch.from_numpy(values).to(b.device) for values in results))


def _solved(program: LinearProgram, b: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a block of rows."""
    count, equal = len(b), program.equal
    copies = scipy.sparse.eye_array(count)
    high = np.tile(program.high, count)
    unit = min(1.0, np.abs(program.cost).max(initial=0.0)) or 1.0  # HiGHS's tolerances are absolute
    found = linprog(
        np.tile(program.cost / unit, count),
        A_ub=scipy.sparse.kron(copies, -program.rows[~equal], format="csr"),
        b_ub=-b[:, ~equal].ravel(),
        A_eq=scipy.sparse.kron(copies, program.rows[equal], format="csr"),
        b_eq=b[:, equal].ravel(),
        bounds=np.stack([np.zeros_like(high), high], 1),
        method="highs",
    )
    if found.x is None and count > 1:  # one by one, to name the row
        parts = [_solved(program, b[k : k + 1], first + k) for k in range(count)]
        return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
    if found.x is None:
        raise InfeasibleError(f"row {first} of the linear program has no solution: {found.message}", first)
    dual = np.zeros((count, len(equal)))
    dual[:, ~equal] = -unit * found.ineqlin.marginals.reshape(count, -1)
    dual[:, equal] = unit * found.eqlin.marginals.reshape(count, -1)
    return found.x.reshape(count, -1), dual


def invert_right_hand_side(program: LinearProgram, x: Tensor, known: Tensor) -> RightHandSide:
    """Which right-hand sides `[B, p]` make the decisions `x` `[B, m]` optimal, and whether any does.

    `known` `[B, p]`: right-hand sides of rows that nobody chose (stocks, capacities); NaN where it is to be found.
    Compared to 1e-7, or 2e-6 for float32 decisions. Raises `ValueError` for decisions that are out of bounds, against a
    known row or not finite.
    """
    p, m = program.rows.shape
    if x.shape[1:] != (m,) or known.shape != (len(x), p):
        raise ValueError(f"x must be [B, {m}] and known [B, {p}], got {list(x.shape)} and {list(known.shape)}")
    if not bool(torch.isfinite(x).all() and (torch.isfinite(known) | torch.isnan(known)).all()):
        raise ValueError("x must be finite, known finite or NaN (to be found)")
    plan = x.detach().cpu().double().numpy()
    reached, given = plan @ program.rows.T, known.detach().cpu().double().numpy()
    value = np.where(np.isnan(given), reached, given)
    slack = reached - value
    relative = max(TOLERANCE, 16 * torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0)
    tolerance = relative * max(1.0, float(np.abs(value).max(initial=0.0)))
    broken = (slack < -tolerance) | (program.equal & (slack > tolerance))
    if broken.any() or (plan < -tolerance).any() or (plan > program.high + tolerance).any():
        rows = np.flatnonzero(broken.any(-1) | (plan < -tolerance).any(-1) | (plan > program.high + tolerance).any(-1))
        raise ValueError(
            f"decisions {rows[:5].tolist()} break a bound or a known row: they are no decisions of this program"
        )
    best = solve_linear_program(program, torch.from_numpy(value).to(x.device))
    saving = x.double() @ torch.from_numpy(program.cost).to(x.device) - best.cost
    scale = relative * float(np.abs(program.cost).max())
    used = x.double() > tolerance
    optimal = saving <= scale * (1 + x.double().abs().sum(-1))
    wasteful = used & (best.reduced > scale) & ~optimal.unsqueeze(-1)
    return RightHandSide(torch.from_numpy(value).to(x.device), optimal, saving, best.dual, wasteful)
