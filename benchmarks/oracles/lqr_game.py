"""Exact leader return and hypergradient of the linear-quadratic game, in NumPy and independent of the library.

State and follower are jointly Gaussian, so `s_t ~ N(m_t, V_t)` by recursion and the expected reward is a Gaussian
integral. Every operation is analytic in the gain, so that the derivative is `Im J(K + ih) / h` (complex step).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

A = np.array([[0.0, 1.0], [0.0, 0.0]])
BL, BF = np.array([[0.1], [0.0]]), np.array([[0.0], [0.1]])
Q, R = np.eye(2), np.eye(1)
GAMMA_F, GAMMA_L, TEMPERATURE, HORIZON, VARIANCE = 0.95, 0.99, 0.1, 100, 1e-6
START, TARGET = np.array([1.0, 0.0]), np.array([-0.8, 0.0])
WIDTH = np.diag([0.04, 1e-4])


def riccati(closed: Array) -> Array:
    """P of the follower, to machine precision; the iteration carries a complex step along."""
    P = Q.astype(complex)
    for _ in range(20000):
        S = R + GAMMA_F * BF.T @ P @ BF
        following = Q + GAMMA_F * closed.T @ P @ closed
        following = following - GAMMA_F**2 * closed.T @ P @ BF @ np.linalg.solve(S, BF.T @ P @ closed)
        real, small = np.abs((following - P).real).max(), np.abs((following - P).imag).max()
        P = following
        if real <= 1e-14 * np.abs(P.real).max() and small <= 1e-13 * np.abs(P.imag).max() + 1e-60:
            return P
    raise RuntimeError("the Riccati iteration of the game did not converge in 20000 steps")


def leader_return(gain: Array, *, discount: float = GAMMA_L) -> complex:
    """Return over 100 steps of the leader's gain `[2]`; discount 1 gives the undiscounted one."""
    closed = A + BL @ gain[None]
    P = riccati(closed)
    S = R + GAMMA_F * BF.T @ P @ BF
    response = GAMMA_F * np.linalg.solve(S, BF.T @ P)  # u = -response (closed s + BL epsilon)
    F = closed - BF @ response @ closed
    push = BL - BF @ response @ BL
    N = VARIANCE * push @ push.T + BF @ (TEMPERATURE / 2 * np.linalg.inv(S)) @ BF.T
    mean, spread, total = START.astype(complex), np.zeros((2, 2), dtype=complex), 0j
    for t in range(HORIZON):
        both, gap = WIDTH + spread, mean - TARGET
        height = np.sqrt(np.linalg.det(WIDTH) / np.linalg.det(both))
        total += discount**t * height * np.exp(-0.5 * gap @ np.linalg.solve(both, gap))
        mean, spread = F @ mean, F @ spread @ F.T + N
    return complex(total)


def exact(gain: Array) -> tuple[float, Array]:
    """(discounted return, hypergradient `[2]`)."""
    answers = [leader_return(gain + 1e-30j * unit) for unit in np.eye(2)]
    return answers[0].real, np.array([answer.imag / 1e-30 for answer in answers])
