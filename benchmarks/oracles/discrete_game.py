"""Exact leader return and hypergradient of the three-state game, in NumPy and independent of the library.

Only p = f(1 | A) matters. The follower's soft values solve `Q = r + 0.99 P sum_b' f(b' | s') V(s', b')`,
`V(s, b) = 0.05 log sum_a exp(Q / 0.05)`, by Newton steps; the leader's return is the sum over 150 steps. Every
operation is analytic in p, so that the derivative is `Im J(p + ih) / h`, exact to rounding (complex step).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

GAMMA, TEMPERATURE, HORIZON = 0.99, 0.05, 150
REACHED = np.array([[[0, 1, 2]] * 2, [[0, 1, 2], [0, 0, 0]], [[0, 2, 2]] * 2])
TRANSITION = np.eye(3)[REACHED]
LEADER = np.zeros((3, 2, 3))
LEADER[0, :, 1] = 1.0


def follower_reward(bonus: float) -> Array:
    reward = np.zeros((3, 2, 3))
    reward[0, :, 1:] = 1.0
    reward[1, 0, 2] = bonus
    reward[1, 1] = -1.0
    return reward


def leader_policy(p: complex) -> Array:
    return np.array([[0.5, 0.5], [1 - p, p], [0.5, 0.5]])


def follower_policy(p: complex, bonus: float, *, value: Array | None = None) -> Array:
    """g(a | s, b) `[3, 2, 3]` at the soft optimum."""
    f, reward = leader_policy(p), follower_reward(bonus)
    mean = np.zeros(3, dtype=complex)
    for step in range(2000):
        q = reward + GAMMA * TRANSITION @ mean
        top = q.real.max(-1)
        weights = np.exp((q - top[..., None]) / TEMPERATURE)
        total = weights.sum(-1)
        policy, soft = weights / total[..., None], top + TEMPERATURE * np.log(total)
        improved = (f * soft).sum(-1)
        change = np.abs(improved - mean).max()
        if step > 1 and change < 1e-13:
            return policy
        kernel = np.einsum("sb,sba,sbax->sx", f, policy, TRANSITION)
        mean = mean + np.linalg.solve(np.eye(3) - GAMMA * kernel, improved - mean)
    raise RuntimeError("soft policy iteration of the game did not converge in 2000 steps")


def leader_return(p: complex, bonus: float, *, discount: float = GAMMA) -> complex:
    """Return over 150 steps from S; discount 1 gives the undiscounted one. Complex p: for the complex step."""
    f, g = leader_policy(p), follower_policy(p, bonus)
    kernel = np.einsum("sb,sba,sbax->sx", f, g, TRANSITION)
    reward = np.einsum("sb,sba,sba->s", f, g, LEADER)
    visits, total = np.array([1.0 + 0j, 0, 0]), 0j
    for t in range(HORIZON):
        total += discount**t * (visits @ reward)
        visits = visits @ kernel
    return complex(total)


def exact(p: float, bonus: float) -> tuple[float, float]:
    """(return, d return / d p)."""
    answer = leader_return(p + 1e-30j, bonus)
    return answer.real, answer.imag / 1e-30


def best(bonus: float) -> tuple[float, float]:
    """(highest return, p there): 51 points of [0, 1], then 51 between the neighbours of the best."""
    low, high, found = 0.0, 1.0, (-np.inf, 0.0)
    for _ in range(2):
        points = np.linspace(low, high, 51).tolist()
        found = max((leader_return(complex(p), bonus).real, p) for p in points)
        low, high = max(0.0, found[1] - 0.02), min(1.0, found[1] + 0.02)
    return found
