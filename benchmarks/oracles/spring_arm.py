"""The arm of `simulators/spring_arm.py` solved on a grid: the soft-optimal follower, the leader's return, its gradient.

Soft value iteration on cubic splines over 41 x 41 angles and speeds; the integral over the torque is a Gauss-Hermite
rule of 21 points around the follower's own mean and spread, so that the policy is any density, not a Gaussian; noise
and first state by Gauss-Hermite, too. Own equations of motion. The gradient is by central differences of the return.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import splu

Array = NDArray[np.float64]

DT, GAMMA, NOISE, SPREAD = 0.1, 0.9, 0.1, (0.7, 1.0)
LIMITS, NODES = ((-7.0, 7.0), (-18.0, 18.0)), 41  # far beyond the starts: who leaves the grid stays at its edge


@dataclass(frozen=True)
class Arm:
    """What stands still: grid, splines, the first state's weights, and whether sin(phi) is phi."""

    knots: tuple[Array, Array]
    grid: Array
    fit: object
    start: Array
    linear: bool


def normal(points: int) -> tuple[Array, Array]:
    nodes, weights = hermegauss(points)
    return nodes, weights / weights.sum()


def rows(knots: tuple[Array, Array], states: Array) -> csr_matrix:
    """Values of all products of B-splines at `states [N, 2]`, which are kept inside of the grid."""
    parts = []
    for axis, (low, high) in enumerate(LIMITS):
        inside = np.clip(states[:, axis], low, high)
        matrix = BSpline.design_matrix(inside, knots[axis], 3)
        parts.append((matrix.data.reshape(-1, 4), matrix.indices.reshape(-1, 4)))
    (x, i), (y, j) = parts
    data, index = x[:, :, None] * y[:, None, :], i[:, :, None] * NODES + j[:, None, :]
    count = len(states)
    return csr_matrix((data.ravel(), index.ravel(), np.arange(0, 16 * count + 1, 16)), shape=(count, NODES**2))


def prepare(*, linear: bool = False) -> Arm:
    axes = [np.linspace(low, high, NODES) for low, high in LIMITS]
    knots = tuple(np.concatenate([[x[0]] * 4, x[2:-2], [x[-1]] * 4]) for x in axes)
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    nodes, weights = normal(25)
    first = np.stack(np.meshgrid(*(spread * nodes for spread in SPREAD), indexing="ij"), -1).reshape(-1, 2)
    start = np.outer(weights, weights).ravel() @ rows(knots, first)
    return Arm(knots, grid, splu(rows(knots, grid).tocsc()), np.asarray(start).ravel(), linear)


def drift(arm: Arm, design: Array, states: Array, torque: Array) -> Array:
    """The next state without noise."""
    spring, damping, gear = design
    angle, speed = states[..., 0], states[..., 1]
    weight = 1.0 * 9.81 * 0.5 * (angle if arm.linear else np.sin(angle))
    moment = weight - spring * angle - damping * speed + gear * torque
    speed = speed + DT * moment / (1.0 * 0.5**2 + 0.004 * gear**2)
    return np.stack([angle + DT * speed, speed], -1)


def leader_return(arm: Arm, design: Array, temperature: float) -> float:
    """J of the leader under the soft optimum of the arm with spring, damping and gear `design [3]`."""
    z, share = normal(21)
    shocks, odds = normal(3)
    angle, speed = arm.grid[:, :1], arm.grid[:, 1:]
    mean, spread = -2.0 * angle - 0.2 * speed, np.full_like(angle, 1.0)
    coefficients = np.zeros(NODES**2)
    for sweeps in (30, 30, 30, 60, 150):
        torque = mean + spread * z
        after = drift(arm, design, arm.grid[:, None, :].repeat(len(z), 1), torque).reshape(-1, 2)
        ahead = sum(
            odd * rows(arm.knots, after + NOISE * shock * np.array([DT, 1.0]))
            for shock, odd in zip(shocks, odds, strict=True)
        )
        reward = -DT * (20.0 * angle**2 + 0.5 * speed**2 + 0.2 * torque**2)
        volume = np.log(share * np.sqrt(2 * np.pi)) + 0.5 * z**2 + np.log(spread)  # log of the rule's weight in torque
        for _ in range(sweeps):
            q = (reward + GAMMA * (ahead @ coefficients).reshape(torque.shape)) / temperature + volume
            top = q.max(1, keepdims=True)
            total = np.exp(q - top).sum(1)
            coefficients = arm.fit.solve(temperature * (top[:, 0] + np.log(total)))
        policy = np.exp(q - top) / total[:, None]
        mean = (policy * torque).sum(1, keepdims=True)
        spread = np.sqrt((policy * (torque - mean) ** 2).sum(1, keepdims=True))
    spring, damping, gear = design
    price = 0.005 * spring**2 + 0.02 * damping**2 + 0.005 * gear**2
    reward = -DT * (policy * (2.0 * angle**2 + 0.5 * speed**2 + torque**2 + price)).sum(1)
    coefficients = np.zeros(NODES**2)
    for _ in range(200):
        value = reward + GAMMA * (policy * (ahead @ coefficients).reshape(torque.shape)).sum(1)
        coefficients = arm.fit.solve(value)
    return float(arm.start @ coefficients)


def gradient(arm: Arm, design: Array, temperature: float, *, step: float = 0.01) -> Array:
    """dJ per relative change of spring, damping and gear, by extrapolated central differences."""
    slopes = []
    for h in (step, step / 2):
        moved = [design * np.exp(sign * h * axis) for axis in np.eye(3) for sign in (1, -1)]
        values = np.array([leader_return(arm, x, temperature) for x in moved])
        slopes.append((values[::2] - values[1::2]) / (2 * h))
    return (4 * slopes[1] - slopes[0]) / 3
