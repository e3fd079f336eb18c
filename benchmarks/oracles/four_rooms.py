"""Exact leader value and hypergradient of Four Rooms, in NumPy and independent of the library.

Soft values of the follower by Newton steps (soft policy iteration); one inverse of `I - 0.99 P_pi` then gives the
leader's value, the discounted visits and, transposed, the adjoint of grad Q_F, so that none of the 105 columns of
theta is solved for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DISCOUNT, BUDGET, PRICE = 0.99, 0.2, 5.0
ROWS = (
    "#############",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#.....#.....#",
    "##.####.....#",
    "#.....###.###",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#############",
)
_PLACES = np.argwhere(np.array([list(row) for row in ROWS]) == ".")
_NUMBER = {(int(i), int(j)): k for k, (i, j) in enumerate(_PLACES)}
N = len(_PLACES)
START, GOAL, TARGET = _NUMBER[4, 1], _NUMBER[1, 9], _NUMBER[8, 4]
EYE: Array = np.eye(N)


def kernel(intended: float) -> Array:
    """`[N, 4, N]`; the goal's rows are zero."""
    table = np.zeros((N, 4, N))
    for (i, j), here in _NUMBER.items():
        reached = [_NUMBER.get((i + di, j + dj), here) for di, dj in ((-1, 0), (0, 1), (1, 0), (0, -1))]
        for action in range(4):
            for move in range(4):
                table[here, action, reached[move]] += intended if move == action else (1 - intended) / 3
    table[GOAL] = 0.0
    return table


PLANNER = kernel(0.56)


@dataclass(frozen=True)
class Answer:
    """Leader value, hypergradient `[105]`, and the follower's policy `[N, 4]` and soft value `[N]`."""

    value: float
    gradient: Array
    policy: Array
    soft_value: Array


def soft_optimum(reward: Array, transition: Array, temperature: float, value: Array) -> tuple[Array, Array]:
    """Policy and soft value of the follower, from any first guess `value [N]`."""
    for _ in range(500):
        q = reward[:, None] + DISCOUNT * transition @ value
        top = q.max(1)
        weights = np.exp((q - top[:, None]) / temperature)
        total = weights.sum(1)
        policy, improved = weights / total[:, None], top + temperature * np.log(total)
        if np.abs(improved - value).max() < 1e-12:
            return policy, improved
        entropy = -(policy * np.log(np.maximum(policy, 1e-300))).sum(1)
        closed = np.einsum("sa,sax->sx", policy, transition)
        value = np.linalg.solve(EYE - DISCOUNT * closed, reward + temperature * entropy)
    raise RuntimeError("soft policy iteration of Four Rooms did not converge in 500 steps")


def exact(logits: Array, temperature: float, *, transition: Array = PLANNER, warm: Array | None = None) -> Answer:
    """Value and hypergradient at `logits [105]`; `warm [N]`: soft values nearby, which save Newton steps."""
    share = np.exp(logits - logits.max())
    share /= share.sum()
    reward = -BUDGET * share[:-1]
    reward[GOAL] = 1.0
    policy, soft = soft_optimum(reward, transition, temperature, np.zeros(N) if warm is None else warm)
    inverse = np.linalg.inv(EYE - DISCOUNT * np.einsum("sa,sax->sx", policy, transition))
    leader = np.zeros(N)
    leader[TARGET] = 1.0
    leader[GOAL] = -PRICE * BUDGET * share[:-1].sum()
    value = inverse @ leader
    q = leader[:, None] + DISCOUNT * transition @ value
    visits = inverse[START]
    weight = visits[:, None] * policy * (q - (policy * q).sum(1, keepdims=True)) / temperature
    # adjoint of grad Q_F: what one unit of the follower's reward in each cell is worth to the leader
    worth = weight.sum(1) + DISCOUNT * np.einsum("sa,sax->x", weight, transition) @ inverse
    worth[GOAL] = 0.0
    slope = np.append(-BUDGET * (worth + PRICE * visits[GOAL]), 0.0)  # d J / d share
    gradient = share * (slope - share @ slope)
    return Answer(float(value[START]), gradient, policy, soft)


def trained_point() -> tuple[Array, float]:
    """Logits `[105]` and temperature of the reproducible test point (leader value 0.459)."""
    data = json.loads((Path(__file__).parent / "four_rooms_trained_point.json").read_text())
    return np.array(data["logits"]), float(data["temperature"])
