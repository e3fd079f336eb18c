"""Exact figures of benchmark B (battery), in NumPy and independent of the library.

Charge s, power a (costs are minimised here; the library maximises their negative):

    L(s, a) = a (a > 0: buy at 1.0), 0.5 a (a < 0: sell) + 10 max(-s, 0) + 10 max(s - 1, 0),
    s' = clip(s + a + w),    w ~ 0.8 N(0.02, 0.03) + 0.2 N(-0.15, 0.05), both on 61 points of [-0.3, 0.3],

on 161 charges of [-0.3, 1.3] and 51 powers of [-0.25, 0.25], discount 0.98, started uniformly in [0, 1].
Charges and powers are multiples of 0.01, so s + a lies on a grid of 211 post-decision charges and a model of w is
one matrix `M[211, 161]`. A policy is found by value iteration and evaluated by one linear solve.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DISCOUNT = 0.98
CHARGES, POWERS, LOADS = np.linspace(-0.3, 1.3, 161), np.linspace(-0.25, 0.25, 51), np.linspace(-0.3, 0.3, 61)
POST = np.arange(161)[:, None] + np.arange(51)[None]  # index of s + a on the post-decision grid
COST = (
    np.where(POWERS > 0, POWERS, 0.5 * POWERS)[None]
    + 10 * (np.maximum(-CHARGES, 0) + np.maximum(CHARGES - 1, 0))[:, None]
)
START = np.where((CHARGES >= -1e-9) & (CHARGES <= 1 + 1e-9), 1.0 / 101, 0.0)


def bell(mean: float, std: float) -> Array:
    """Weights of a Gaussian net load on the 61 load points."""
    weights = np.exp(-0.5 * ((LOADS - mean) / std) ** 2)
    return weights / weights.sum()


REAL_LOAD: Array = 0.8 * bell(0.02, 0.03) + 0.2 * bell(-0.15, 0.05)


def post_matrix(loads: Iterable[float], weights: Iterable[float]) -> Array:
    """`M[211, 161]`: distribution of the next charge from a post-decision charge, linear between charges."""
    post = CHARGES[0] + POWERS[0] + 0.01 * np.arange(211)
    matrix, rows = np.zeros((211, 161)), np.arange(211)
    for load, weight in zip(loads, weights, strict=True):
        place = (np.clip(post + load, CHARGES[0], CHARGES[-1]) - CHARGES[0]) / 0.01
        low = np.minimum(np.floor(place + 1e-9).astype(int), 159)
        fraction = place - low
        matrix[rows, low] += weight * (1 - fraction)
        matrix[rows, low + 1] += weight * fraction
    return matrix


REAL: Array = post_matrix(LOADS, REAL_LOAD)


def optimal_policy(matrix: Array, *, tolerance: float = 1e-11) -> NDArray[np.intp]:
    """Index of the best power per charge, by value iteration (policy evaluation in between, for speed)."""
    value = np.zeros(161)
    for _ in range(2000):
        q = COST + DISCOUNT * (matrix @ value)[POST]
        if np.abs(q.min(1) - value).max() < tolerance:
            return q.argmin(1)
        value = _cost_to_go(matrix, q.argmin(1))
    raise RuntimeError("value iteration of the battery did not converge in 2000 sweeps")


def _cost_to_go(matrix: Array, policy: NDArray[np.intp]) -> Array:
    rows = np.arange(161)
    solution: Array = np.linalg.solve(np.eye(161) - DISCOUNT * matrix[POST[rows, policy]], COST[rows, policy])
    return solution


def real_cost(policy: NDArray[np.intp]) -> float:
    """Exact expected discounted cost of a policy in the real system."""
    return float(START @ _cost_to_go(REAL, policy))


def gaussian_cost(mean: float, std: float) -> float:
    """Real cost of the policy that is optimal in the Gaussian model."""
    return real_cost(optimal_policy(post_matrix(LOADS, bell(mean, std))))


def drift_cost(drift: float) -> float:
    """Real cost of the policy that is optimal in the deterministic drift model."""
    return real_cost(optimal_policy(post_matrix([drift], [1.0])))


def fitted_moments() -> tuple[float, float]:
    """Mean and standard deviation of the real load: the maximum-likelihood Gaussian (system identification)."""
    mean = float(REAL_LOAD @ LOADS)
    return mean, float(np.sqrt(REAL_LOAD @ (LOADS - mean) ** 2))


def best_gaussian(*, refinements: int = 3) -> tuple[float, float, float]:
    """`(cost, mean, std)` of the best model of the Gaussian class: a dense grid, then ever finer ones around its best.

    The cost is piecewise constant in the model, so this is a search, not a descent: 21 x 21 points over
    [-0.1, 0.1] x [0.02, 0.2], then as many over a box one fifth as large around the five best, `refinements` times.
    It ends early at a model as good as the real system itself, which no model can beat.
    """
    floor = real_cost(optimal_policy(REAL))
    centres, width = [(0.0, 0.11)], (0.1, 0.09)
    best: list[tuple[float, float, float]] = []
    for _ in range(refinements + 1):
        if best and best[0][0] < floor + 1e-9:
            break
        offsets = np.linspace(-1.0, 1.0, 21)
        points = {(m + dm * width[0], s + ds * width[1]) for m, s in centres for dm in offsets for ds in offsets}
        best = sorted(best + [(gaussian_cost(m, s), m, s) for m, s in points if s > 0.01])[:5]
        centres, width = [(m, s) for _, m, s in best], (width[0] / 5, width[1] / 5)
    return best[0]
