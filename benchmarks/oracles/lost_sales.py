"""Exact optimum of one store with lost sales: average-cost value iteration on the integer pipeline; NumPy only.

State (x_0, ..., x_{L-1}), order q, Poisson demand D; holding 1, shortage p:

    v(x) = min_q  E[ (x_0 - D)^+ + p (D - x_0)^+ + v((x_0 - D)^+ + x_1, x_2, ..., x_{L-1}, q) ] - g.

Lower and upper bounds of the optimal average cost g are the smallest and largest change of v in one sweep. Expectations
are taken over x_0 once for all (x_1, ..., q). Orders and stock are bounded where the optimum never goes: no order above
the quantile of one period's demand that leaves the bounds unchanged.

Reference: P. Zipkin, Old and new methods for lost-sales inventory systems, Operations Research 56(5), 2008 (table 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import poisson

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LostSales:
    """Bounds of the optimal cost per period, and the optimal order of every state `[stock, orders, ..., orders]`."""

    low: float
    high: float
    orders: NDArray[np.int8]

    @property
    def cost(self) -> float:
        return 0.5 * (self.low + self.high)


def lost_sales_optimum(
    lead_time: int,
    underage: float,
    *,
    mean: float = 5.0,
    max_order: int | None = None,
    max_stock: int | None = None,
    tol: float = 1e-5,
    max_sweeps: int = 2000,
) -> LostSales:
    """Value iteration until the bounds differ by less than `tol`; `RuntimeError` when they do not."""
    top = int(poisson.ppf(underage / (1 + underage), mean)) + 2 if max_order is None else max_order
    level = int(poisson.ppf(underage / (1 + underage), mean * (lead_time + 1))) + 2 if max_stock is None else max_stock
    on_hand = np.arange(level + 1)
    demand = np.arange(level + int(poisson.ppf(1 - 1e-13, mean)) + 1)
    chance = poisson.pmf(demand, mean)
    left = on_hand[:, None] - demand[None]
    cost = (np.maximum(left, 0) + underage * np.maximum(-left, 0)) @ chance
    # row x_0, column what is left of it after demand
    after = np.zeros((level + 1, level + 1))
    np.add.at(after, (on_hand[:, None].repeat(len(demand), 1), np.maximum(left, 0)), chance[None].repeat(level + 1, 0))
    value = np.zeros((level + 1, *(top + 1,) * (lead_time - 1)))
    for _ in range(max_sweeps):
        q = cost.reshape(-1, *(1,) * lead_time) + _expected(value, after, top)
        new = q.min(-1)
        change = new - value
        if change.max() - change.min() < tol:
            return LostSales(float(change.min()), float(change.max()), q.argmin(-1).astype(np.int8))
        value = new - new.flat[0]
    raise RuntimeError(f"value iteration: bounds {change.min()} and {change.max()} after {max_sweeps} sweeps")


def _expected(value: Array, after: Array, top: int) -> Array:
    """E v(next) `[x_0, x_1, ..., x_{L-1}, q]`: first shift by what arrives, then average over what is left."""
    level = len(after) - 1
    # w[r, x_1, x_2, ..., q] = v(r + x_1, x_2, ..., q), stock above the grid held at its end
    arriving = np.minimum(np.arange(level + 1)[:, None] + np.arange(top + 1)[None], level)
    shape = value[arriving].shape
    return (after @ value[arriving].reshape(level + 1, -1)).reshape(shape)
