"""Exact optimum of joint replenishment by average-cost value iteration on inventory positions; NumPy only.

With G(y) the expected holding and shortage cost of positions y, L + 1 demands later, and W(y) = E v(y - D):

    v(y) = min( G(y) + W(y), K + min_{S >= y} [G(S) + W(S)] ) - g,

the inner minimum by cumulative minima along each axis. Purchases at c per unit cost `c'E[D]` per period under any
policy. Positions are truncated where ordering is certainly best below (checked) and nothing is ever ordered above.

Reference: E. Ignall, Optimal continuous review policies for two product inventory systems with joint setup costs, 1969.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import nbinom, poisson

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Replenishment:
    """Optimal cost per period (total), where to order and up to which positions."""

    cost: float
    span: float
    """distance of the bounds of the cost"""
    lowest: int
    """position of index 0 on every axis of `order`"""
    order: NDArray[np.bool_]
    level: NDArray[np.intp]


def poisson_pmf(mean: float) -> Array:
    return np.asarray(poisson.pmf(np.arange(int(poisson.ppf(1 - 1e-12, mean)) + 2), mean))


def negative_binomial_pmf(mean: float, variation: float) -> Array:
    """Variance `m (1 + m variation^2)`."""
    shape = 1 / variation**2
    chance = shape / (shape + mean)
    top = int(nbinom.ppf(1 - 1e-10, shape, chance)) + 2
    return np.asarray(nbinom.pmf(np.arange(top), shape, chance))


def joint_replenishment_optimum(
    demands: Sequence[Array],
    holding: Sequence[float],
    underage: Sequence[float],
    fixed: float,
    *,
    purchase: Sequence[float] | None = None,
    lead_time: int = 2,
    lowest: int = -20,
    highest: int = 100,
    tol: float = 1e-5,
    max_sweeps: int = 5000,
) -> Replenishment:
    """Value iteration until the bounds of the cost are within `tol`.

    Raises `RuntimeError` when they are not after `max_sweeps`, `ValueError` when the grid is too small: an order is not
    best at its lower end, or the best position is its upper end.
    """
    positions, n = np.arange(lowest, highest + 1), len(demands)
    stage = np.zeros((1,) * n)
    for i, (demand, h, p) in enumerate(zip(demands, holding, underage, strict=True)):
        cost = _stage_cost(positions, _power(demand, lead_time + 1), h, p)
        stage = stage + cost.reshape([-1 if axis == i else 1 for axis in range(n)])
    kernels = [_kernel(len(positions), demand) for demand in demands]
    value = np.zeros_like(stage)
    for _ in range(max_sweeps):
        keep = stage + _expected(value, kernels)
        ordering = fixed + _best_above(keep)
        change = np.minimum(keep, ordering) - value
        if change.max() - change.min() < tol:
            break
        value = np.minimum(keep, ordering)
        value -= value.flat[0]
    else:
        raise RuntimeError(f"value iteration: bounds {change.min()} and {change.max()} after {max_sweeps} sweeps")
    order = ordering < keep
    level = np.array(np.unravel_index(keep.argmin(), keep.shape))
    if not all(order.take(0, axis).all(where=_reachable(order.take(0, axis), level, axis)) for axis in range(n)):
        raise ValueError(f"ordering is not best at positions of {lowest}; choose a smaller `lowest`")
    if (level == len(positions) - 1).any():
        raise ValueError(f"the best positions reach {highest}; choose a larger `highest`")
    bought = sum(c * float(np.arange(len(d)) @ d) for c, d in zip(purchase or [0.0] * n, demands, strict=True))
    cost = 0.5 * float(change.max() + change.min()) + bought
    return Replenishment(cost, float(change.max() - change.min()), lowest, order, level + lowest)


def _reachable(face: NDArray[np.bool_], level: NDArray[np.intp], axis: int) -> NDArray[np.bool_]:
    """Positions of the other items up to their levels: what an optimal policy meets."""
    mask = np.zeros_like(face)
    mask[tuple(slice(0, top + 1) for i, top in enumerate(level) if i != axis)] = True
    return mask


def _power(pmf: Array, periods: int) -> Array:
    total = np.ones(1)
    for _ in range(periods):
        total = np.convolve(total, pmf)
    return total


def _stage_cost(positions: NDArray[np.intp], demand: Array, holding: float, underage: float) -> Array:
    left = positions[:, None] - np.arange(len(demand))[None]
    cost: Array = (holding * np.maximum(left, 0) + underage * np.maximum(-left, 0)) @ demand
    return cost


def _kernel(count: int, demand: Array) -> Array:
    """`[position, next position]`, everything below the grid at its lower end."""
    kernel = np.zeros((count, count))
    for k, chance in enumerate(demand):
        rows = np.arange(count)
        np.add.at(kernel, (rows, np.maximum(rows - k, 0)), chance)
    return kernel / demand.sum()


def _expected(value: Array, kernels: Sequence[Array]) -> Array:
    for axis, kernel in enumerate(kernels):
        value = np.moveaxis(np.tensordot(kernel, value, axes=(1, axis)), 0, axis)
    return value


def _best_above(value: Array) -> Array:
    """`min_{S >= y} value(S)`."""
    for axis in range(value.ndim):
        value = np.flip(np.minimum.accumulate(np.flip(value, axis), axis), axis)
    return value
