"""Exact optimum of a backlogged serial line by the echelon recursion of Clark and Scarf; NumPy only.

Stocks 1 (store) to N (top), lead times L_j, holding costs H_1 > ... > H_N, echelon holding costs h_j = H_j - H_{j+1},
shortage p. With y the echelon position after ordering and D(k) the demand of k periods:

    C_1(y) = E[ h_1 (y - D(L_1 + 1)) + (p + H_1) (D(L_1 + 1) - y)^+ ],
    C_j(y) = E[ h_j (y - D(L_j + 1)) + C_{j-1}(min(y - D(L_j), S_{j-1})) ],    S_j = argmin C_j,

and the optimal cost per period is C_N(S_N): what a stock receives it can ship in the same period, while holding is paid
after demand. This counts goods in transit at the rate of the stock that sent them; the simulator does not charge them,
which is the constant `E[D] sum_j H_{j+1} L_j` less. Demand is normal, clipped at 0, on a grid.

Reference: A. Clark and H. Scarf, Optimal policies for a multi-echelon inventory problem, Management Science 6(4), 1960.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.oracles.base_stock import clipped_normal, sum_of


def clark_scarf(
    lead_times: Sequence[int],
    holding: Sequence[float],
    underage: float,
    *,
    mean: float = 5.0,
    std: float = 2.0,
    step: float = 0.02,
) -> tuple[list[float], float]:
    """Echelon levels from the store to the top, and the optimal cost per period without goods in transit."""
    pmf = clipped_normal(mean, std, step)
    average = step * float(np.arange(len(pmf)) @ pmf)
    high = sum(lead_times) + len(lead_times)
    # positions from well below any level (its cost is a straight line there) to above all of them
    grid = np.arange(-int(6 * mean / step), int(1.6 * mean * high / step) + 1) * step
    rates = np.append(-np.diff(holding), holding[-1])
    levels: list[float] = []
    induced, slope = np.zeros_like(grid), 0.0
    for j, (lead, rate) in enumerate(zip(lead_times, rates, strict=True)):
        cost = rate * (grid - (lead + 1) * average)
        if j == 0:
            demand = sum_of(pmf, lead + 1)
            values = step * np.arange(len(demand))
            # (D - y)^+ from the tail sums of the demand
            tail, first = np.cumsum(demand[::-1])[::-1], np.cumsum((demand * values)[::-1])[::-1]
            k = np.clip(np.round(grid / step).astype(int), 0, len(demand) - 1)
            cost += (underage + holding[0]) * (first[k] - grid * tail[k])
        else:
            cost += _expected(induced, sum_of(pmf, lead), slope, step)
        best = int(np.argmin(cost))
        levels.append(float(grid[best]))
        induced = np.where(grid < grid[best], cost, cost[best])
        slope = float((induced[1] - induced[0]) / step)
    transit = average * sum(above * lead for above, lead in zip(holding[1:], lead_times[:-1], strict=True))
    return levels, float(cost[best] - transit)


def _expected(values: np.ndarray, pmf: np.ndarray, slope: float, step: float) -> np.ndarray:
    """`E values(y - D)` on the grid of y; below the grid the function goes on with its slope."""
    below = values[0] - slope * step * np.arange(len(pmf) - 1, 0, -1)
    padded = np.concatenate([below, values])
    length = len(padded) + len(pmf) - 1
    product = np.fft.irfft(np.fft.rfft(padded, length) * np.fft.rfft(pmf, length), length)
    return product[len(below) : len(below) + len(values)]
