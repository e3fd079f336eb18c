"""LQR with input-multiplicative noise, solved exactly; numpy only, independent of the library.

World: s' = A s + B (1 + sigma xi) a + w, one standard normal xi per input, w ~ N(0, W), s_0 ~ N(0, I), cost
s'Qs + a'Ra, discount g, policy a = -K s. With C_i the column i of sigma B (zero elsewhere) and Acl = A - B K:

    P = Q + K'RK + g (Acl'P Acl + sum_i K'C_i'P C_i K),          J = tr(P X_0),  X_0 = I + g/(1-g) W,
    X = X_0 + g (Acl X Acl' + sum_i C_i K X K'C_i'),             dJ/dK = 2 (S K - g B'P A) X,
    S = R + g B'P B + g sum_i C_i'P C_i,                         optimal: K = g S^-1 B'P A.

Reference: D. Kleinman, Optimal stationary control of linear systems with control-dependent noise, 1969.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """Matrices of one case; costs, to be minimised."""

    name: str
    A: Matrix
    B: Matrix
    Q: Matrix
    R: Matrix
    sigma: float
    discount: float = 0.95
    noise: float = 0.05
    """W = noise * I"""


def worlds(path: Path) -> tuple[tuple[World, dict[str, Any]], ...]:
    """The cases of benchmark_a.json, each with its published figures (gain_sysid, J_sysid, gain_optimal, J_optimal)."""
    return tuple(
        (World(case["name"], *(np.array(case[key]) for key in "ABQR"), case["sigma"]), case)
        for case in json.loads(path.read_text())["cases"]
    )


def _start(world: World) -> Matrix:
    return np.eye(len(world.A)) * (1 + world.noise * world.discount / (1 - world.discount))


def _moment_map(world: World, gain: Matrix) -> Matrix:
    """Matrix of X -> g (Acl X Acl' + sum_i C_i K X K'C_i') on vec(X)."""
    closed = world.A - world.B @ gain
    total = np.kron(closed, closed)
    for i in range(world.B.shape[1]):
        kicked = world.sigma * np.outer(world.B[:, i], gain[i])
        total = total + np.kron(kicked, kicked)
    return world.discount * total


def spectral_radius(world: World, gain: Matrix) -> float:
    """Discounted mean-square spectral radius; J is infinite from 1 on."""
    return float(np.abs(np.linalg.eigvals(_moment_map(world, gain))).max())


def cost_and_gradient(world: World, gain: Matrix) -> tuple[float, Matrix]:
    """J(K) and dJ/dK `[m, n]`; infinite J and a NaN-free zero gradient where K does not stabilise in mean square."""
    if spectral_radius(world, gain) >= 1:
        return float("inf"), np.zeros_like(gain)
    n, start = len(world.A), _start(world)
    transfer = np.eye(n * n) - _moment_map(world, gain)
    running = world.Q + gain.T @ world.R @ gain
    P = np.linalg.solve(transfer.T, running.reshape(-1)).reshape(n, n)
    X = np.linalg.solve(transfer, start.reshape(-1)).reshape(n, n)
    S, cross = _normal_equations(world, P)
    return float((P * start).sum()), 2 * (S @ gain - cross) @ X


def _normal_equations(world: World, P: Matrix) -> tuple[Matrix, Matrix]:
    curvature = world.B.T @ P @ world.B
    kicks = world.sigma**2 * np.diag(np.diag(curvature))
    return world.R + world.discount * (curvature + kicks), world.discount * world.B.T @ P @ world.A


def optimal_gain(world: World, *, tol: float = 1e-14, max_steps: int = 100_000) -> Matrix:
    """Fixed point of the generalised Riccati map; `RuntimeError` when it does not settle."""
    P = world.Q
    for _ in range(max_steps):
        S, cross = _normal_equations(world, P)
        following = world.Q + world.discount * world.A.T @ P @ world.A - cross.T @ np.linalg.solve(S, cross)
        if np.abs(following - P).max() <= tol * np.abs(P).max():
            S, cross = _normal_equations(world, following)
            return np.linalg.solve(S, cross)
        P = following
    raise RuntimeError(f"the generalised Riccati iteration of '{world.name}' did not settle in {max_steps} steps")
