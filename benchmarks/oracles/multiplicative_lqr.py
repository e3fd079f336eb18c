"""LQR with input-multiplicative noise, solved exactly; numpy only, independent of the library.

World: s' = A s + B (1 + sigma xi) a + w, one standard normal xi per input, w ~ N(0, W), s_0 ~ N(0, I), cost
s'Qs + a'Ra, discount g, policy a = -K s. With C_i the column i of sigma B (zero elsewhere) and Acl = A - B K:

    P = Q + K'RK + g (Acl'P Acl + sum_i K'C_i'P C_i K),          J = tr(P X_0),  X_0 = I + g/(1-g) W,
    X = X_0 + g (Acl X Acl' + sum_i C_i K X K'C_i'),             dJ/dK = 2 (S K - g B'P A) X,
    S = R + g B'P B + g sum_i C_i'P C_i,                         optimal: K = g S^-1 B'P A.

Reference: D. Kleinman, Optimal stationary control of linear systems with control-dependent noise, 1969.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


# A, B, Q, R of the three systems; the four-state one was drawn once at random
SYSTEMS: dict[str, tuple[list[list[float]], list[list[float]], list[float], list[float]]] = {
    "scalar": ([[1.1]], [[1.0]], [1.0], [0.1]),
    "double-integrator": ([[1.0, 0.2], [0.0, 1.0]], [[0.0], [0.3]], [1.0, 0.1], [0.01]),
    "four-states": (
        [
            [-0.8102175216044764, -0.13089198545226885, -0.37200825414817784, 0.3505089405140733],
            [-0.31001077304800895, -0.44731007363453046, -0.2185530191851105, -0.30384460780778016],
            [-0.454351821806604, 0.5343086619391011, 0.11350161127242939, 0.7075781833964891],
            [0.3982832600751514, -0.43024397541922443, 0.02503458050425464, 0.11853628107820076],
        ],
        [
            [-0.2831587375774273, 0.18655731709124979],
            [-0.44599765740328123, -0.754553872316101],
            [0.18519676668690765, 0.7282513033951683],
            [0.46990495397676285, 0.3874244088922084],
        ],
        [1.0, 1.0, 1.0, 1.0],
        [0.05, 0.05],
    ),
}


def case_of(system: str, sigma: float) -> World:
    """One of `SYSTEMS` with the given input noise."""
    A, B, Q, R = SYSTEMS[system]
    return World(f"{system}-{sigma}", np.array(A), np.array(B), np.diag(Q), np.diag(R), sigma)


WORLDS = (
    case_of("scalar", 0.5),
    case_of("scalar", 1.0),
    case_of("double-integrator", 0.5),
    case_of("double-integrator", 0.8),
    case_of("four-states", 0.5),
    case_of("four-states", 0.8),
)
"""the six cases of benchmark A"""


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


def fitted_gain(world: World) -> Matrix:
    """The gain that is best in the model which least squares finds: the same A and B, no input noise."""
    return optimal_gain(replace(world, sigma=0.0))


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
