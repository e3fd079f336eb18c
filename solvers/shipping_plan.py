r"""What to ship and produce over H periods for a known demand: the plan of a warehouse with stores, a linear program.

In period t the stores sell s, owe u, hold x after selling and exceed their capacity by o; the warehouse holds w after
shipping f (lead time one), exceeds its capacity by v and produces p, which it has in the next period:

    max  sum_t price s - production p - transport f - holding (x, w) - backlog u - overflow (o, v)
    s.t. x_t = x_{t-1} + f_{t-1} - s_t,   s_t + u_t = D_t + u_{t-1},   x_t - o_t <= capacity,
         w_t = w_{t-1} + p_{t-1} - sum f_t,   w_t - v_t <= capacity,   p_t <= cap,   all >= 0.

It is a flow in the network of places and times, so whole data have whole vertices: the plan of model predictive control
needs no integer program, and the same program with the true demand is the bound of perfect foresight. HiGHS (dual
simplex) through scipy, several rows in one block-diagonal program.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.optimize import linprog
from torch import Tensor

BLOCK = 1000
"""variables solved in one call: below, the overhead of calls dominates, above, the simplex method"""


@dataclass(frozen=True)
class PlanCosts:
    """Per unit and period; `holding` and `capacity` `[n+1]`, the warehouse last."""

    price: float
    production: float
    transport: float
    backlog: float
    overflow: float
    holding: Tensor
    capacity: Tensor
    production_cap: float


@dataclass(frozen=True)
class PlanStart:
    """Where B plans begin: what has arrived is counted."""

    available: Tensor
    """`[B]` in the warehouse"""
    stock: Tensor
    """`[B, n]`"""
    owed: Tensor
    """`[B, n]`"""


@dataclass(frozen=True)
class ShippingSchedule:
    """Optimal `shipments [B, H, n]`, `production [B, H]` and the `profit [B]` they bring."""

    shipments: Tensor
    production: Tensor
    profit: Tensor


def plan_shipments(costs: PlanCosts, start: PlanStart, demand: Tensor) -> ShippingSchedule:
    """Solve the program for demands `[B, n, H]`.

    Raises `ValueError` for shapes that do not fit and data that are not finite, `RuntimeError` where HiGHS stops
    without an optimum (a negative demand).
    """
    if demand.ndim != 3 or not demand.numel():
        raise ValueError(f"demand must be [B, n, H] and not empty, got {list(demand.shape)}")
    rows, stores, periods = demand.shape
    if start.stock.shape != (rows, stores) or start.owed.shape != (rows, stores) or start.available.shape != (rows,):
        raise ValueError(
            f"for demand {tuple(demand.shape)} stock and owed must be {(rows, stores)} and available {(rows,)}, got "
            f"{tuple(start.stock.shape)}, {tuple(start.owed.shape)} and {tuple(start.available.shape)}"
        )
    if costs.holding.shape != (stores + 1,) or costs.capacity.shape != (stores + 1,):
        raise ValueError(f"holding and capacity need {stores + 1} entries, the warehouse last")
    per_period = 3 + 5 * stores
    size = max(1, BLOCK // (per_period * periods))
    matrix, limits = _balances(stores, periods), _limits(stores, periods)
    right = _right_hand_side(start, demand).detach().cpu().numpy()
    if not np.isfinite(right).all():
        raise ValueError("demand, stock, owed and available must be finite")
    solved = [_solve(costs, matrix, limits, block) for block in np.split(right, range(size, rows, size))]
    x = torch.from_numpy(np.concatenate([each[0] for each in solved])).reshape(rows, periods, per_period).to(demand)
    profit = torch.from_numpy(np.concatenate([each[1] for each in solved])).to(demand)
    return ShippingSchedule(x[..., 3 : 3 + stores], x[..., 0], profit)


def _right_hand_side(start: PlanStart, demand: Tensor) -> Tensor:
    """`[B, H (1 + 2 n)]`: the balances of the warehouse, of the stores' stocks and of their demands."""
    right = torch.zeros(demand.shape[0], demand.shape[2], 1 + 2 * demand.shape[1], dtype=torch.float64)
    n = demand.shape[1]
    right[:, 0, 0] = start.available
    right[:, 0, 1 : 1 + n] = start.stock
    right[:, :, 1 + n :] = demand.movedim(1, 2)
    right[:, 0, 1 + n :] += start.owed
    return right.flatten(1)


def _balances(stores: int, periods: int) -> sparse.csc_matrix:
    """Equalities; variables of a period: p, w, v, then f, x, o, s, u of the stores."""
    n, eye = stores, sparse.identity(stores)
    house, ones = sparse.coo_matrix([[0.0, 1.0, 0.0]]), sparse.coo_matrix(np.ones((1, n)))
    now = sparse.bmat(
        [
            [house, ones, None, None, None, None],
            [None, None, eye, sparse.coo_matrix((n, n)), eye, None],
            [None, None, None, None, eye, eye],
        ]
    )
    made = sparse.coo_matrix([[-1.0, -1.0, 0.0]])
    before = sparse.bmat(
        [
            [made, sparse.coo_matrix((1, n)), None, None, sparse.coo_matrix((1, n)), None],
            [None, -eye, -eye, sparse.coo_matrix((n, n)), None, None],
            [None, None, None, None, sparse.coo_matrix((n, n)), -eye],
        ]
    )
    return sparse.csc_matrix(
        sparse.kron(sparse.identity(periods), now) + sparse.kron(sparse.eye(periods, k=-1), before)
    )


def _limits(stores: int, periods: int) -> sparse.csc_matrix:
    """Inequalities: stocks less overflow, stores first."""
    n, eye = stores, sparse.identity(stores)
    store = sparse.hstack([sparse.coo_matrix((n, 3 + n)), eye, -eye, sparse.coo_matrix((n, 2 * n))])
    house = sparse.hstack([sparse.coo_matrix([[0.0, 1.0, -1.0]]), sparse.coo_matrix((1, 5 * n))])
    return sparse.csc_matrix(sparse.kron(sparse.identity(periods), sparse.vstack([store, house])))


def _solve(
    costs: PlanCosts, matrix: sparse.csc_matrix, limits: sparse.csc_matrix, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Solutions `[b, variables]` and profits `[b]` of the rows of one block."""
    rows, n = len(right), len(costs.holding) - 1
    holding = costs.holding.double().numpy()
    per_period = np.concatenate(
        [
            [costs.production, holding[-1], costs.overflow],
            np.full(n, costs.transport),
            holding[:-1],
            np.full(n, costs.overflow),
            np.full(n, -costs.price),
            np.full(n, costs.backlog),
        ]
    )
    periods = matrix.shape[1] // len(per_period)
    price, upper = np.tile(per_period, periods), np.full(matrix.shape[1], np.inf)
    upper[:: len(per_period)] = costs.production_cap
    blocks = sparse.identity(rows)
    result = linprog(
        np.tile(price, rows),
        A_ub=sparse.kron(blocks, limits, format="csc"),
        b_ub=np.tile(costs.capacity.double().numpy(), rows * periods),
        A_eq=sparse.kron(blocks, matrix, format="csc"),
        b_eq=right.ravel(),
        bounds=np.stack([np.zeros(rows * len(price)), np.tile(upper, rows)], -1),
        method="highs-ds",
    )
    if not result.success:
        raise RuntimeError(f"HiGHS found no plan: {result.message}")
    x = result.x.reshape(rows, -1)
    return x, -(x @ price)
