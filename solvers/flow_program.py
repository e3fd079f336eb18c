"""Fleet rebalancing as a linear program: the cheapest flows that bring idle vehicles where they are wanted.

Stations hold q_i vehicles and want t_i; moving one from i to j costs c_ij, staying (c_ii) nothing:

    min  sum_ij c_ij f_ij      subject to   q_i + inflow_i - outflow_i >= t_i,   outflow_i <= q_i,   f >= 0

With staying as an edge it is a transportation problem, so vertices are whole where q and t are. What is solved is much
smaller: let d_ij be the cost of the cheapest way from i to j by any stations. A feasible flow decomposes into ways from
stations that have too many (q_i > t_i) to stations that have too few, so

    min  sum_ij d_ij g_ij      subject to   sum_j g_ij <= q_i - t_i,   sum_i g_ij = t_j - q_j,   g >= 0

bounds the program from below, and g laid along its ways attains the bound wherever they pass no station through which
more than its q vehicles would leave. That is checked for every row; rows that fail are solved in full. If c obeys the
triangle inequality (`FlowProgram.direct`), every way is one move and nothing can fail.

Many rows are one block-diagonal program, large rows are solved with few columns at first, others added while their
reduced cost is negative. HiGHS (dual simplex) through `scipy.optimize.linprog`.

Equal costs leave several optima. `tie_break` makes the answer unique (to HiGHS's 1e-7) and never a dearer one: costs
that are whole multiples of a unit are raised by distinct fractions of it, so small that they cannot add up to one unit
along the 2n edges of a cycle. The inverse is in `flow_inverse`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import linprog
from scipy.sparse.csgraph import shortest_path
from torch import Tensor

from sim2real.solvers.convex import InfeasibleError

Array = np.ndarray

BLOCK = 4000
"""edges solved in one call: below, the overhead of calls dominates, above, the simplex method"""
FIRST = 6
"""edges from and to each station that a large row begins with"""
TOLERANCE = 1e-9
"""relative to the largest cost: reduced costs below this are negative"""


@dataclass(frozen=True)
class FlowProgram:
    """The costs of a graph, prepared once."""

    cost: Array
    """`[n, n]` as given; inf where no edge is; diagonal 0"""
    priced: Array
    """`[n, n]` with ties broken"""
    way_cost: Array
    """`[n, n]` of the cheapest way, priced"""
    before: Array
    """`[n, n]` last station before j on the cheapest way from i"""
    direct: bool
    """every cheapest way is a single edge"""


@dataclass(frozen=True)
class Flows:
    """Optimal flows of a batch."""

    flows: Tensor
    """`[B, n, n]` vehicles from i to j, whole; diagonal: those that stay"""
    cost: Tensor
    """`[B]` without slack"""
    shortfall: Tensor
    """`[B, n]` vehicles wanted that nobody brings; 0 without slack"""
    full: Tensor
    """`[B]` bool: rows solved in full, because the cheapest ways pass a station with too few vehicles"""


def flow_program(
    cost: Tensor, *, tie_break: float | None = None, preference: Tensor | None = None, seed: int = 0
) -> FlowProgram:
    """Prepare the costs `[n, n]` (inf: no edge; the diagonal is ignored, staying is free).

    `tie_break`: the unit of which all costs are whole multiples (1 for times in steps); None: ties stay. `preference`
    `[n, n]`, at least 0: a second cost that decides between equally cheap flows; None: the fewest moves. Raises
    `ValueError` for costs or preferences that are negative, NaN or not square, or costs not multiples of the unit.
    """
    given = _square(cost, "cost")
    priced, n = given.copy(), len(given)
    if tie_break is not None:
        units = given[np.isfinite(given)] / tie_break
        if not tie_break > 0 or np.abs(units - np.rint(units)).max() > 1e-9:
            raise ValueError(f"with tie_break = {tie_break:g} all costs must be whole multiples of it; it is positive")
        chance = np.random.default_rng(seed).random((n, n))
        # both at most 2; in the first, two edges always weigh more than one
        second = 1 + chance if preference is None else _second(_square(preference, "preference"), n) + 0.02 * chance
        priced += tie_break / (4 * n + 1) * second
        np.fill_diagonal(priced, 0.0)
    elif preference is not None:
        raise ValueError("preference decides between equal costs: pass tie_break, the unit of the costs, too")
    away = priced.copy()
    np.fill_diagonal(away, np.inf)
    with np.errstate(invalid="ignore"):
        way_cost, before = shortest_path(
            np.where(np.isfinite(away), np.maximum(away, 1e-300), 0), return_predecessors=True
        )
    tied = priced <= way_cost * (1 + 1e-14)  # of equal ways the edge itself
    before = np.where(tied, np.arange(n)[:, None], before)
    way_cost = np.where(tied, priced, way_cost)
    return FlowProgram(given, priced, way_cost, before, bool(tied.all()))


def _square(values: Tensor, name: str) -> Array:
    given = values.detach().cpu().double().numpy().copy()
    if given.ndim != 2 or given.shape[0] != given.shape[1]:
        raise ValueError(f"{name} must be [n, n], got {list(values.shape)}")
    np.fill_diagonal(given, 0.0)
    if not (given >= 0).all():
        raise ValueError(f"{name} must be at least 0 (inf: no edge), got {given[~(given >= 0)][0]:g}")
    return given


def _second(preference: Array, n: int) -> Array:
    """Scaled to at most 1.98."""
    if preference.shape != (n, n) or not np.isfinite(preference).all():
        raise ValueError(f"preference must be finite and [{n}, {n}] like cost, got shape {list(preference.shape)}")
    return 1.98 * preference / max(preference.max(), 1e-300)


def rebalance_flows(program: FlowProgram, idle: Tensor, target: Tensor, *, slack: float | None = None) -> Flows:
    """The cheapest flows from `idle` to at least `target`, both `[B, n]` whole numbers.

    `slack`: cost of every vehicle wanted that nobody brings (the targets may then ask for more than there are); None:
    `InfeasibleError` names the first row that asks for too much. Raises `ValueError` for shapes, negative or fractional
    numbers, and a `slack` that is not positive.
    """
    have, want = (_whole(values, name, len(program.cost)) for values, name in ((idle, "idle"), (target, "target")))
    if have.shape != want.shape:
        raise ValueError(f"idle {list(have.shape)} and target {list(want.shape)} must have one shape")
    if slack is not None and not 0 < slack < np.inf:
        raise ValueError(f"slack is the cost of a vehicle that nobody brings, above 0 and finite; got {slack:g}")
    wanting = np.flatnonzero(want.sum(-1) > have.sum(-1))
    if slack is None and len(wanting):
        row = int(wanting[0])
        raise InfeasibleError(
            f"row {row} wants {want[row].sum():g} vehicles of {have[row].sum():g}: pass slack=, the cost of a vehicle "
            "nobody brings, or targets that sum to at most the idle vehicles (integer_target)",
            row,
        )
    every, spare = np.arange(len(have)), np.maximum(have - want, 0)
    moved = _laid(program, _transport(program.way_cost, spare, np.maximum(want - have, 0), slack, every))
    full = (moved.sum(-1) > have).any(-1)
    if full.any():
        moved[full] = _transport(program.priced, have[full], want[full], slack, every[full])
    stations = np.arange(len(program.cost))
    moved[:, stations, stations] = 0.0
    cost = (moved * np.where(np.isfinite(program.cost), program.cost, 0)).sum((-1, -2))
    moved[:, stations, stations] = have - moved.sum(-1)
    short = np.maximum(want - moved.sum(-2), 0)
    return Flows(*(torch.from_numpy(values).to(idle.device) for values in (moved, cost, short, full)))


def _whole(values: Tensor, name: str, n: int) -> Array:
    array = values.detach().cpu().double().numpy()
    if array.ndim != 2 or array.shape[1] != n:
        raise ValueError(f"{name} must be [B, {n}], got {list(values.shape)}")
    if not ((array >= 0) & (array == np.rint(array)) & np.isfinite(array)).all():
        raise ValueError(f"{name} must be finite whole numbers of at least 0; round shares with integer_target")
    return array


def _transport(cost: Array, supply: Array, demand: Array, slack: float | None, names: Array) -> Array:
    """Cheapest g `[b, n, n]` with row sums of at most `supply` and column sums `demand`, both `[b, n]`."""
    g = np.zeros((*supply.shape, supply.shape[1]))
    # at most 100 rows, so that the pairs of all their stations fit
    size = ((supply > 0).sum(-1) * (demand > 0).sum(-1) + BLOCK // 100).cumsum()
    for rows in np.split(np.arange(len(supply)), np.flatnonzero(np.diff(size // BLOCK)) + 1):
        origin, goal = np.nonzero(supply[rows]), np.nonzero(demand[rows])
        if len(goal[0]):
            start, end = np.nonzero((origin[0][:, None] == goal[0]) & np.isfinite(cost[origin[1][:, None], goal[1]]))
            price = cost[origin[1][start], goal[1][end]]
            ends = (supply[rows][origin], demand[rows][goal])
            flow = _priced_out((start, end, price), *ends, slack, names[rows])
            g[rows[origin[0][start]], origin[1][start], goal[1][end]] = flow
    return g


def _priced_out(
    edges: tuple[Array, Array, Array], supply: Array, demand: Array, slack: float | None, names: Array
) -> Array:
    """Whole flows of the edges (origin, goal, price): few columns first, then all whose reduced cost is negative."""
    origin, goal, price = edges
    chosen = np.ones(len(price), dtype=bool) if len(price) <= 2 * BLOCK else _cheapest(edges, price)
    # HiGHS's tolerances are absolute: small costs in units of the largest
    unit = min(1.0, price.max(initial=0.0)) or 1.0
    price = price / unit
    dear = 2 * (price.max(initial=0.0) + 1) * (len(supply) + len(demand)) if slack is None else slack / unit
    m, flow = len(demand), np.zeros(len(price))
    while True:
        index = np.flatnonzero(chosen)
        k = len(index)
        found = linprog(
            np.r_[price[index], np.full(m, dear)],
            A_ub=_incidence(origin[index], np.arange(k), (len(supply), k + m)),
            b_ub=supply,
            A_eq=_incidence(np.r_[goal[index], np.arange(m)], np.arange(k + m), (m, k + m)),
            b_eq=demand,
            method="highs-ds",
            options={"presolve": False},
        )
        if found.x is None:
            raise InfeasibleError(f"HiGHS found no flows for rows {names.tolist()}: {found.message}", int(names[0]))
        reduced = price - found.ineqlin.marginals[origin] - found.eqlin.marginals[goal]
        missing = (reduced < -TOLERANCE * price.max(initial=1.0)) & ~chosen
        if not missing.any():
            break
        chosen |= _cheapest(edges, np.where(missing, reduced, np.inf)) & missing
    flow[index] = np.rint(found.x[:k])
    if slack is None and np.rint(found.x[k:]).any():
        raise InfeasibleError(f"no edges lead to stations that want vehicles, in rows {names.tolist()}", None)
    return flow


def _incidence(rows: Array, columns: Array, shape: tuple[int, int]) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def _cheapest(edges: tuple[Array, Array, Array], value: Array) -> Array:
    """Which edges are among the `FIRST` of least value of their origin or of their goal."""
    chosen = np.zeros(len(value), dtype=bool)
    for end in edges[:2]:
        order = np.lexsort((value, end))
        sorted_end = end[order]
        rank = np.arange(len(order)) - np.searchsorted(sorted_end, sorted_end)
        chosen[order[rank < FIRST]] = True
    return chosen & np.isfinite(value)


def _laid(program: FlowProgram, g: Array) -> Array:
    """The flows of g along the cheapest ways, `[b, n, n]`."""
    if program.direct:
        return g
    flows = np.zeros_like(g)
    row, origin, last = np.nonzero(g)
    amount = g[row, origin, last]
    while len(row):
        previous = program.before[origin, last]
        np.add.at(flows, (row, previous, last), amount)
        further = previous != origin
        row, origin, last, amount = row[further], origin[further], previous[further], amount[further]
    return flows
